// SPDX-License-Identifier: Apache-2.0
//! Capture as the control thread sees it: planned from the config, installed last, watched while
//! weir runs, stopped first.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::places::Place;
use super::tracking::{Counts, Losses, Tally};
use super::{RunError, Running};
use crate::capture::{
    self, Capture, Filters, HookPlan, Netfilter, Part, Plan, Prepared, Records, SOCKET_MARK,
    SOCKET_MARK_MASK, Way,
};
use crate::config::{
    Captured, Config, Inbound, InboundCapture, Namespace, OnChange, OnExit, Outbound,
    OutboundCapture, Reach, SourceAddress, Workload,
};
use crate::sys::closing;

pub(super) use turn::{Going, Turn};
pub(super) use workloads::Coming;

mod parts;
mod turn;
mod workloads;

/// Capture in place, in one network namespace after the other.
pub(super) struct Capturing {
    count_at: Instant,
    counted: Tally,
    look_at: Instant,
    places: Vec<Taken>,
    /// Workloads of which it was said that they cannot be taken up again yet.
    told: BTreeSet<String>,
}

/// Capture in one network namespace.
struct Taken {
    /// `None` only while it is being dropped.
    capture: Option<Capture>,
    /// What was counted here so far.
    counted: Counts,
    /// Parts that are in the config no more.
    going: Vec<Going>,
    /// What was missing at the last look.
    missing: Option<Part>,
    /// Connects that others had led elsewhere when it was last said, and when that may be said again.
    overruled: (u64, Instant),
    losses: Losses,
    place: Place,
}

/// The plan of one network namespace, with parts that leave it; `None` if nothing is captured there.
pub(super) fn plan(captured: &[Captured], leaving: &[Captured], config: &Config) -> Option<Plan> {
    // What has come again leaves no more.
    let leaving = parts::without(leaving, captured);
    let staying = captured.iter().map(|captured| (captured, false));
    let all: Vec<(&Captured, bool)> =
        staying.chain(leaving.iter().map(|captured| (captured, true))).collect();
    let (first, _) = all.first()?;
    let own_ports = match first.namespace {
        Namespace::Own => own_ports(config, captured),
        _ => listen_ports(captured),
    };
    let inbound = all.iter().filter_map(|(captured, leaves)| {
        captured.inbound.as_ref().map(|inbound| taken_in(inbound, *leaves))
    });
    let outbound = all.iter().filter_map(|(captured, leaves)| {
        let outbound = captured.outbound.as_ref()?;
        match outbound.capture {
            OutboundCapture::Connect => {
                hook(outbound, *leaves, config).map(capture::Outbound::Connect)
            }
            OutboundCapture::Redirect => Some(netfilter(outbound, Way::Redirect, *leaves, config)),
            OutboundCapture::Tproxy => Some(netfilter(outbound, Way::Tproxy, *leaves, config)),
        }
    });
    let (inbound, outbound) = (inbound.collect(), outbound.collect());
    Some(Plan { closed: config.on_exit == OnExit::Closed, inbound, outbound, own_ports })
}

fn taken_in(inbound: &Inbound, leaves: bool) -> capture::Inbound {
    capture::Inbound {
        any_destination: inbound.destinations == Reach::Any,
        exclude: inbound.ports.exclude.clone(),
        include: inbound.ports.include.clone(),
        keep_source: inbound.source == SourceAddress::Keep,
        leaves,
        listen: inbound.listen,
        way: match inbound.capture {
            InboundCapture::Redirect => Way::Redirect,
            InboundCapture::Tproxy => Way::Tproxy,
        },
    }
}

/// Every port that weir listens on where it was started, if this is captured there.
pub(super) fn own_ports(config: &Config, captured: &[Captured]) -> Vec<u16> {
    let takeover = config.takeover.iter().flat_map(|takeover| {
        let own = takeover.services.iter().filter_map(|wanted| wanted.listen);
        let own = own.chain(takeover.facade.iter().map(|facade| facade.listen));
        own.chain([takeover.api, takeover.inbound, takeover.outbound])
    });
    let others = config.forward.iter().map(|forward| forward.listen).chain(config.admin.http);
    let others = others.chain(takeover).map(|addr| addr.port()).filter(|port| *port > 0);
    listen_ports(captured).into_iter().chain(others).collect()
}

/// Every port on which captured connections wait.
pub(super) fn listen_ports(captured: &[Captured]) -> Vec<u16> {
    let inbound = captured.iter().filter_map(|captured| captured.inbound.as_ref());
    let outbound = captured.iter().filter_map(|captured| captured.outbound.as_ref());
    let inbound = inbound.map(|inbound| inbound.listen);
    let all = inbound.chain(outbound.map(|outbound| outbound.listen));
    all.map(|addr| addr.port()).filter(|port| *port > 0).collect()
}

fn hook(outbound: &Outbound, leaves: bool, config: &Config) -> Option<HookPlan> {
    // The reader of the config has seen to it that there is one.
    let Some(Workload::Cgroups(cgroups)) = &outbound.workload else { return None };
    Some(HookPlan {
        cgroups: cgroups.clone(),
        closed: config.on_exit == OnExit::Closed,
        filters: if leaves { Filters::default() } else { filters(outbound) },
        own_mark: SOCKET_MARK,
        own_mark_mask: SOCKET_MARK_MASK,
        port: outbound.listen.port(),
        records_max: config.profile.limits.flows_max.max(RECORDS_MIN),
    })
}

fn netfilter(outbound: &Outbound, way: Way, leaves: bool, config: &Config) -> capture::Outbound {
    let profile = &config.profile;
    capture::Outbound::Netfilter(Netfilter {
        exclude: outbound.exclude.cidrs.clone(),
        exclude_ports: outbound.exclude.ports.clone(),
        flows_max: profile.limits.flows_max,
        half_closed: profile.timeouts.half_closed,
        include: outbound.include.cidrs.clone(),
        include_ports: outbound.include.ports.clone(),
        leaves,
        port: outbound.listen.port(),
        way,
        workload: outbound.workload.as_ref().map(|workload| match workload {
            Workload::Cgroups(paths) => capture::Workload::Cgroups(paths.clone()),
            Workload::Uid(uid) => capture::Workload::Uid(*uid),
        }),
    })
}

fn filters(outbound: &Outbound) -> Filters {
    Filters {
        exclude: outbound.exclude.cidrs.clone(),
        exclude_ports: outbound.exclude.ports.clone(),
        include: outbound.include.cidrs.clone(),
        include_ports: outbound.include.ports.clone(),
    }
}

/// The records of every hook that there is, and what hooks that are gone had lost.
#[derive(Debug, Default)]
pub(super) struct Recorded {
    gone: capture::Losses,
    living: Vec<Arc<Records>>,
}

impl Recorded {
    pub(super) fn meet(&mut self, records: &[(u16, Arc<Records>)]) {
        let mut gone = self.gone;
        self.living.retain(|known| {
            // No hook and no listener has them any more.
            let is_gone = Arc::strong_count(known) == 1;
            if is_gone {
                gone = gone.and(known.losses());
            }
            !is_gone
        });
        self.gone = gone;
        for (_, new) in records {
            if !self.living.iter().any(|known| Arc::ptr_eq(known, new)) {
                self.living.push(Arc::clone(new));
            }
        }
    }

    pub(super) fn losses(&self) -> capture::Losses {
        self.living.iter().map(|records| records.losses()).fold(self.gone, capture::Losses::and)
    }
}

impl Capturing {
    /// Takes the traffic, and says so.
    pub(super) fn install(
        prepared: Vec<(Place, Option<Prepared>)>,
        running: &Running,
    ) -> Result<Capturing, RunError> {
        let mut places = Vec::with_capacity(prepared.len());
        for (place, prepared) in prepared {
            let Some(prepared) = prepared else { continue };
            match Taken::install(place, prepared) {
                Ok(taken) => places.push(taken),
                Err(error) => {
                    places.iter_mut().for_each(Taken::abandon);
                    return Err(error);
                }
            }
        }
        running.capturing.store(true, Ordering::Release);
        tracing::info!("capture is in place");
        let now = Instant::now();
        let (counted, told) = (Tally::default(), BTreeSet::new());
        Ok(Capturing { count_at: now, counted, look_at: now, places, told })
    }

    /// Where traffic is taken.
    pub(super) fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().map(|taken| &taken.place)
    }

    /// Takes no more connections.
    pub(super) fn stop(&mut self, running: &Running) {
        running.capturing.store(false, Ordering::Release);
        self.places.iter_mut().for_each(Taken::stop);
    }

    /// Waits until workloads have acknowledged what sockets of ours said last: those answers find their
    /// way by our rules, and without them the sockets would stay for minutes.
    pub(super) async fn last_acks(&self) {
        let deadline = Instant::now() + LAST_ACKS_WITHIN;
        while Instant::now() < deadline && self.places.iter().any(Taken::awaits_acks) {
            tokio::time::sleep(LAST_ACKS_LOOK).await;
        }
    }

    /// Notices what somebody took away or changed, and puts it back or raises the alarm, as the config
    /// says. While it is away, traffic flows directly. Lets go of network namespaces whose workload is
    /// gone, and takes up those that are there again.
    pub(super) fn watch(&mut self, running: &Running, config: &Config) {
        if Instant::now() < self.look_at {
            return;
        }
        self.look_at = Instant::now() + LOOK_EVERY;
        let counted = &mut self.counted;
        self.places.retain(|taken| {
            let left = taken.left(running);
            if left {
                counted.leave(taken.counted);
            }
            !left
        });
        self.take_up_again(running, config);
        let mut stands = true;
        if Instant::now() >= self.count_at {
            self.count_at = Instant::now() + COUNT_EVERY;
            running.counted.set(self.counted.with(self.places.iter_mut().map(Taken::count)));
        }
        for taken in &mut self.places {
            taken.see_off(running, config);
            taken.watch_neighbours();
            stands &= taken.watch(running);
        }
        running.capturing.store(stands, Ordering::Release);
    }
}

impl Taken {
    fn install(place: Place, prepared: Prepared) -> Result<Taken, RunError> {
        let capture = Some(place.within(|| prepared.install())??);
        let overruled = (0, Instant::now());
        let losses = place.within(Losses::new)?;
        let (counted, going) = (Counts::default(), Vec::new());
        Ok(Taken { capture, counted, going, losses, missing: None, overruled, place })
    }

    /// The start failed elsewhere: nothing of it stays here.
    fn abandon(&mut self) {
        if let Some(capture) = &mut self.capture {
            let _ = self.place.within(|| capture.abandon());
        }
    }

    /// Takes no more connections.
    fn stop(&mut self) {
        if let Some(capture) = &mut self.capture {
            // A place that cannot be entered has nothing left to stop.
            let _ = self.place.within(|| capture.stop());
        }
    }

    fn awaits_acks(&self) -> bool {
        let leads = self.capture.as_ref().is_some_and(|capture| capture.plan().leads_packets());
        // Where the place cannot be entered nobody answers.
        leads
            && self.place.within(closing::under_foreign_addresses).is_ok_and(|sockets| sockets > 0)
    }

    /// What rules and connection tracking counted so far; losses are said.
    fn count(&mut self) -> Counts {
        let Taken { capture: Some(capture), counted, losses, place, .. } = self else {
            return self.counted;
        };
        let workload = place.name();
        let count = || {
            let counts = Counts::read(capture.counts());
            losses.say(&workload, capture.plan(), counts);
            counts
        };
        // A namespace that cannot be entered has gone, and is noticed as such.
        if let Ok(counts) = place.within(count) {
            *counted = counts;
        }
        *counted
    }

    /// A program that runs after ours on the workload's connects has the last word.
    fn watch_neighbours(&mut self) {
        let (told, again_at) = self.overruled;
        let Some(capture) = &self.capture else { return };
        let count = capture.overruled();
        // Hooks that are gone count no more.
        self.overruled.0 = told.min(count);
        if count <= told || Instant::now() < again_at {
            return;
        }
        self.overruled = (count, Instant::now() + TELL_EVERY);
        let by = capture.overruling().join(", ");
        let by = if by.is_empty() { "a program that is gone by now".to_owned() } else { by };
        tracing::warn!(
            workload = self.place.name(),
            count,
            "connects that weir had taken were led elsewhere by {by} (`bpftool cgroup tree` shows \
             where it is attached)"
        );
    }

    /// False if traffic flows directly now.
    fn watch(&mut self, running: &Running) -> bool {
        let Taken { capture: Some(capture), missing, place, .. } = self else { return true };
        let workload = place.name();
        let Ok(found) = place.within(|| capture.missing()) else { return false };
        let Some(part) = found else {
            if missing.take().is_some() {
                tracing::info!(workload, "capture is in place again");
            }
            return true;
        };
        let is_new = missing.replace(part) != Some(part);
        if is_new {
            running.rules_lost.count(part);
        }
        // A cgroup that is made anew is no edit of rules.
        let mended = match running.on_change {
            OnChange::Alarm if part != Part::Cgroup => None,
            _ => place.within(|| capture.mend(part)).ok(),
        };
        match &mended {
            Some(Ok(())) => {
                *missing = None;
                tracing::warn!(
                    workload,
                    "the {part} was gone or changed: capture is in place again"
                );
            }
            Some(Err(error)) if is_new => {
                tracing::error!(workload, "the {part} is gone, traffic flows directly: {error}");
            }
            None if is_new => tracing::error!(
                workload,
                "the {part} is gone or changed, and on_change says alarm: weir is not ready until it is \
                 put back (`weir rules show`) or weir starts anew"
            ),
            _ => {} // Said already.
        }
        matches!(mended, Some(Ok(())))
    }
}

/// How often a part of the capture was found missing.
#[derive(Debug, Default)]
pub(super) struct RulesLost([AtomicU64; Part::ALL.len()]);

impl RulesLost {
    fn count(&self, part: Part) {
        if let Some(count) = self.0.get(part as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// By part.
    pub(super) fn counts(&self) -> Vec<(Part, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        Part::ALL.into_iter().zip(counts).collect()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let capture = self.capture.take();
        // Where the place cannot be entered the capture is undone by the kernel.
        let _ = self.place.within(|| drop(capture));
    }
}

/// Connections that may wait for a worker beside the flows: two accept queues, at least.
const RECORDS_MIN: u32 = 16_384;
/// A look costs a few system calls; only after a change it starts `ip` and `nft`.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A workload can make it happen as often as it likes.
const TELL_EVERY: Duration = Duration::from_mins(1);
/// A FIN that meets its receiver between two states is lost (`tcp_rcv_state_process` in
/// net/ipv4/tcp_input.c says so), and comes again after 0.2 s, 0.6 s, 1.4 s and 3 s (`TCP_RTO_MIN`).
const LAST_ACKS_WITHIN: Duration = Duration::from_millis(3500);
/// A look reads the list of all TCP sockets.
const LAST_ACKS_LOOK: Duration = Duration::from_millis(20);
/// Counting costs a short-lived process.
const COUNT_EVERY: Duration = Duration::from_secs(2);
