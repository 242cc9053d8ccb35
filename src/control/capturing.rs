// SPDX-License-Identifier: Apache-2.0
//! Capture as the control thread sees it: planned from the config, installed last, watched while
//! weir runs, stopped first.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Running;
use crate::capture::{
    self, Capture, CaptureError, Filters, HookPlan, MARK_MASK, Netfilter, OWN_MARK, Part, Plan,
    Prepared, Way,
};
use crate::config::{
    Config, InboundCapture, OnChange, OnExit, Outbound, OutboundCapture, SourceAddress, Workload,
};

/// Capture in place.
pub(super) struct Capturing {
    capture: Capture,
    look_at: Instant,
    /// What was missing at the last look.
    missing: Option<Part>,
    on_change: OnChange,
    /// Connects that others had led elsewhere when it was last said, and when that may be said again.
    overruled: (u64, Instant),
}

/// The plan of a config; `None` if it captures nothing.
pub(super) fn plan(config: &Config) -> Option<Plan> {
    if config.inbound.is_none() && config.outbound.is_none() {
        return None;
    }
    let inbound = config.inbound.as_ref().map(|inbound| capture::Inbound {
        exclude: inbound.ports.exclude.clone(),
        include: inbound.ports.include.clone(),
        keep_source: inbound.source == SourceAddress::Keep,
        listen: inbound.listen,
        way: match inbound.capture {
            InboundCapture::Redirect => Way::Redirect,
            InboundCapture::Tproxy => Way::Tproxy,
        },
    });
    let outbound = config.outbound.iter().filter_map(|outbound| match outbound.capture {
        OutboundCapture::Connect => hook(outbound, config).map(capture::Outbound::Connect),
        OutboundCapture::Redirect => Some(netfilter(outbound, Way::Redirect, config)),
        OutboundCapture::Tproxy => Some(netfilter(outbound, Way::Tproxy, config)),
    });
    let closed = config.on_exit == OnExit::Closed;
    Some(Plan { closed, inbound, outbound: outbound.collect(), own_ports: own_ports(config) })
}

/// Every port that weir listens on with this config.
pub(super) fn own_ports(config: &Config) -> Vec<u16> {
    let forward = config.forward.iter().map(|forward| forward.listen);
    let inbound = config.inbound.iter().map(|inbound| inbound.listen);
    let outbound = config.outbound.iter().map(|outbound| outbound.listen);
    let all = forward.chain(inbound).chain(outbound).chain(config.admin.http);
    all.map(|addr| addr.port()).filter(|port| *port > 0).collect()
}

fn hook(outbound: &Outbound, config: &Config) -> Option<HookPlan> {
    // The reader of the config has seen to it that there is one.
    let Some(Workload::Cgroups(cgroups)) = &outbound.workload else { return None };
    Some(HookPlan {
        cgroups: cgroups.clone(),
        closed: config.on_exit == OnExit::Closed,
        filters: filters(outbound),
        own_mark: OWN_MARK,
        own_mark_mask: MARK_MASK,
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
        prepared: Prepared,
        running: &Running,
    ) -> Result<Capturing, CaptureError> {
        let capture = prepared.install()?;
        running.capturing.store(true, Ordering::Release);
        tracing::info!("capture is in place");
        let now = Instant::now();
        let on_change = running.on_change;
        Ok(Capturing { capture, look_at: now, missing: None, on_change, overruled: (0, now) })
    }

    /// Takes no more connections.
    pub(super) fn stop(&mut self, running: &Running) {
        running.capturing.store(false, Ordering::Release);
        self.capture.stop();
    }

    /// Notices what somebody took away or changed, and puts it back or raises the alarm, as the config
    /// says. While it is away, traffic flows directly.
    pub(super) fn watch(&mut self, running: &Running) {
        if Instant::now() < self.look_at {
            return;
        }
        self.look_at = Instant::now() + LOOK_EVERY;
        self.watch_neighbours();
        let Some(part) = self.capture.missing() else {
            if self.missing.take().is_some() {
                tracing::info!("capture is in place again");
            }
            return running.capturing.store(true, Ordering::Release);
        };
        let is_new = self.missing.replace(part) != Some(part);
        if is_new {
            running.rules_lost.count(part);
        }
        // A cgroup that is made anew is no edit of rules.
        let mended = match self.on_change {
            OnChange::Alarm if part != Part::Cgroup => None,
            _ => Some(self.capture.mend(part)),
        };
        running.capturing.store(matches!(mended, Some(Ok(()))), Ordering::Release);
        match mended {
            Some(Ok(())) => {
                self.missing = None;
                tracing::warn!("the {part} was gone or changed: capture is in place again");
            }
            Some(Err(error)) if is_new => {
                tracing::error!("the {part} is gone, traffic flows directly: {error}");
            }
            None if is_new => tracing::error!(
                "the {part} is gone or changed, and on_change says alarm: weir is not ready until it is \
                 put back (`weir rules show`) or weir starts anew"
            ),
            _ => {} // Said already.
        }
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

impl Capturing {
    /// A program that runs after ours on the workload's connects has the last word.
    fn watch_neighbours(&mut self) {
        let (told, again_at) = self.overruled;
        let count = self.capture.overruled();
        if count == told || Instant::now() < again_at {
            return;
        }
        self.overruled = (count, Instant::now() + TELL_EVERY);
        let by = self.capture.overruling().join(", ");
        let by = if by.is_empty() { "a program that is gone by now".to_owned() } else { by };
        tracing::warn!(
            count,
            "connects that weir had taken were led elsewhere by {by} (`bpftool cgroup tree` shows \
             where it is attached)"
        );
    }
}

/// Connections that may wait for a worker beside the flows: two accept queues, at least.
const RECORDS_MIN: u32 = 16_384;
/// A look costs a few system calls; only after a change it starts `ip` and `nft`.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A workload can make it happen as often as it likes.
const TELL_EVERY: Duration = Duration::from_mins(1);
