// SPDX-License-Identifier: Apache-2.0
//! Capture as the control thread sees it: planned from the config, installed last, watched while
//! weir runs, stopped first.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::places::Place;
use super::tracking::{Counts, Losses, Tally};
use super::{RunError, Running};
use crate::capture::{
    self, Capture, Filters, HookPlan, Netfilter, Part, Plan, Prepared, SOCKET_MARK,
    SOCKET_MARK_MASK, Way,
};
use crate::config::{
    Captured, Config, InboundCapture, Namespace, OnChange, OnExit, Outbound, OutboundCapture,
    Reach, SourceAddress, Workload,
};
use crate::sys::closing;

pub(super) use workloads::Coming;

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
    /// It is in the config no more: when what is still open is reset.
    leaving: Option<Instant>,
    /// What was missing at the last look.
    missing: Option<Part>,
    /// Connects that others had led elsewhere when it was last said, and when that may be said again.
    overruled: (u64, Instant),
    losses: Losses,
    place: Place,
}

/// The plan of one network namespace; `None` if nothing is captured there.
pub(super) fn plan(captured: &[Captured], config: &Config) -> Option<Plan> {
    if captured.is_empty() {
        return None;
    }
    let inbound = captured.iter().find_map(|captured| captured.inbound.as_ref());
    let inbound = inbound.map(|inbound| capture::Inbound {
        any_destination: inbound.destinations == Reach::Any,
        exclude: inbound.ports.exclude.clone(),
        include: inbound.ports.include.clone(),
        keep_source: inbound.source == SourceAddress::Keep,
        listen: inbound.listen,
        way: match inbound.capture {
            InboundCapture::Redirect => Way::Redirect,
            InboundCapture::Tproxy => Way::Tproxy,
        },
    });
    let outbound = captured.iter().filter_map(|captured| captured.outbound.as_ref());
    let outbound = outbound.filter_map(|outbound| match outbound.capture {
        OutboundCapture::Connect => hook(outbound, config).map(capture::Outbound::Connect),
        OutboundCapture::Redirect => Some(netfilter(outbound, Way::Redirect, config)),
        OutboundCapture::Tproxy => Some(netfilter(outbound, Way::Tproxy, config)),
    });
    let is_home = captured.iter().any(|captured| captured.namespace == Namespace::Own);
    let own_ports = if is_home { own_ports(config, captured) } else { listen_ports(captured) };
    let closed = config.on_exit == OnExit::Closed;
    Some(Plan { closed, inbound, outbound: outbound.collect(), own_ports })
}

/// Every port that weir listens on where it was started, if this is captured there.
pub(super) fn own_ports(config: &Config, captured: &[Captured]) -> Vec<u16> {
    let takeover = config.takeover.iter().flat_map(|takeover| {
        let own = takeover.services.iter().filter_map(|wanted| wanted.listen);
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

fn hook(outbound: &Outbound, config: &Config) -> Option<HookPlan> {
    // The reader of the config has seen to it that there is one.
    let Some(Workload::Cgroups(cgroups)) = &outbound.workload else { return None };
    Some(HookPlan {
        cgroups: cgroups.clone(),
        closed: config.on_exit == OnExit::Closed,
        filters: filters(outbound),
        own_mark: SOCKET_MARK,
        own_mark_mask: SOCKET_MARK_MASK,
        port: outbound.listen.port(),
        records_max: config.profile.limits.flows_max.max(RECORDS_MIN),
    })
}

fn netfilter(outbound: &Outbound, way: Way, config: &Config) -> capture::Outbound {
    let profile = &config.profile;
    capture::Outbound::Netfilter(Netfilter {
        exclude: outbound.exclude.cidrs.clone(),
        exclude_ports: outbound.exclude.ports.clone(),
        flows_max: profile.limits.flows_max,
        half_closed: profile.timeouts.half_closed,
        include: outbound.include.cidrs.clone(),
        include_ports: outbound.include.ports.clone(),
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

    /// Takes what `config` says from now on, in every place or in none.
    pub(super) fn change(&mut self, config: &Config) -> Result<(), RunError> {
        let mut old = Vec::with_capacity(self.places.len());
        for index in 0..self.places.len() {
            let Some(taken) = self.places.get_mut(index) else { break };
            let place = taken.place.under(config);
            let plan = taken.capture.as_ref().map(|capture| capture.plan().clone());
            let wanted = place.plan(config);
            // Who leaves stays as it is: workers know the place by what they were given.
            let place = if wanted.is_some() { place } else { taken.place.clone() };
            let changed = wanted.map_or(Ok(()), |plan| taken.change(plan));
            if let Err(error) = changed {
                self.change_back(old);
                return Err(error);
            }
            old.push((std::mem::replace(&mut taken.place, place), plan));
        }
        Ok(())
    }

    fn change_back(&mut self, old: Vec<(Place, Option<Plan>)>) {
        for (taken, (place, plan)) in self.places.iter_mut().zip(old) {
            taken.place = place;
            if let Some(Err(error)) = plan.map(|plan| taken.change(plan)) {
                tracing::error!(workload = taken.place.name(), "undo the change: {error}");
            }
        }
    }

    /// Where traffic is taken.
    pub(super) fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().filter(|taken| taken.leaving.is_none()).map(|taken| &taken.place)
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
        for taken in self.places.iter_mut().filter(|taken| taken.leaving.is_none()) {
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
        let counted = Counts::default();
        Ok(Taken { capture, counted, leaving: None, losses, missing: None, overruled, place })
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

    fn change(&mut self, plan: Plan) -> Result<(), RunError> {
        let Some(capture) = &mut self.capture else { return Ok(()) };
        Ok(self.place.within(|| capture.change(plan))??)
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
        if count == told || Instant::now() < again_at {
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
