// SPDX-License-Identifier: Apache-2.0
//! Workloads in network namespaces of their own come, go and come again while weir runs.
//!
//! What can be refused is refused before anything is changed. Who leaves takes no more, and what is
//! open goes on; its rules go with its last flow.

use std::net::SocketAddr;
use std::time::Instant;

use super::{Capturing, Taken};
use crate::capture::{Capture, Prepared};
use crate::config::{Captured, Config, SourceAddress};
use crate::control::places::Place;
use crate::control::{RunError, Running, listeners};
use crate::worker::{Change, Listener};

/// A workload that can be taken up: nothing is taken yet.
pub(in crate::control) struct Coming {
    /// By worker.
    listeners: Vec<Vec<Listener>>,
    place: Place,
    prepared: Prepared,
}

impl Coming {
    /// Listens where the workload lives; `None` if there is nothing to capture.
    pub(in crate::control) fn prepare(
        captured: &Captured,
        config: &Config,
        running: &Running,
    ) -> Result<Option<Coming>, RunError> {
        let keeps = captured.inbound.as_ref().map(|inbound| inbound.source);
        let binds = running.workers.iter().all(|worker| worker.features().bind);
        if keeps == Some(SourceAddress::Keep) && !binds {
            return Err(RunError::NoBind);
        }
        let place = Place::elsewhere(captured.clone())?;
        let Some(plan) = place.plan(config) else { return Ok(None) };
        let prepared = place.within(|| plan.prepare())??;
        let mut listeners: Vec<_> = running.workers.iter().map(|_| Vec::new()).collect();
        listeners::open_in(&place, Some(&prepared), &[], &config.profile, &mut listeners)?;
        Ok(Some(Coming { listeners, place, prepared }))
    }
}

impl Capturing {
    /// Workloads of `config` that are not taken.
    pub(in crate::control) fn lacks<'a>(
        &self,
        config: &'a Config,
    ) -> impl Iterator<Item = &'a Captured> {
        let elsewhere = config.workloads.iter().filter(|captured| captured.is_elsewhere());
        elsewhere.filter(|captured| !self.places.iter().any(|taken| taken.place.is_of(captured)))
    }

    /// Takes what `coming` wants from now on.
    pub(in crate::control) fn take_up(
        &mut self,
        coming: Coming,
        config: &Config,
        running: &Running,
    ) -> Result<(), RunError> {
        let Coming { listeners, place, prepared } = coming;
        running.records.send_modify(|all| all.extend(prepared.records()));
        for (worker, add) in running.workers.iter().zip(listeners) {
            let timeouts = config.profile.timeouts;
            worker.change(Change { add, alter: Vec::new(), retire: Vec::new(), timeouts });
        }
        let (name, number) = (place.name(), place.for_workers.number);
        match Taken::install(place, prepared) {
            Ok(taken) => self.places.push(taken),
            Err(error) => {
                // Where a mailbox is full the listeners stay, and nothing is led to them.
                let _ = running.workers.iter().filter(|worker| !worker.leave(number)).count();
                return Err(error);
            }
        }
        self.told.remove(&name);
        tracing::info!(workload = name, "capture is in place");
        Ok(())
    }

    /// Workloads that are not in `config` are taken no more; what is open has time until `deadline`.
    /// Says which listeners end with that.
    pub(in crate::control) fn leave_others(
        &mut self,
        config: &Config,
        deadline: Instant,
    ) -> Vec<(u32, SocketAddr)> {
        let mut left = Vec::new();
        for taken in &mut self.places {
            let is_wanted = config.workloads.iter().any(|captured| taken.place.is_of(captured));
            if is_wanted || taken.leaving.is_some() || taken.place.for_workers.number == 0 {
                continue;
            }
            taken.stop();
            taken.leaving = Some(deadline);
            let addrs = taken.place.captured.iter().flat_map(listeners::addrs);
            left.extend(addrs.map(|addr| (taken.place.for_workers.number, addr)));
            tracing::info!(
                workload = taken.place.name(),
                "capture has ended; what is open goes on"
            );
        }
        left
    }

    /// Workloads whose network namespace had gone, and is there again.
    pub(super) fn take_up_again(&mut self, running: &Running, config: &Config) {
        let lacking: Vec<Captured> = self.lacks(config).cloned().collect();
        for captured in lacking {
            let room = running.workers.iter().all(|worker| worker.has_room());
            if !room || !captured.namespace.path().exists() {
                continue;
            }
            let taken = Coming::prepare(&captured, config, running).and_then(|coming| {
                coming.map_or(Ok(()), |coming| self.take_up(coming, config, running))
            });
            match taken {
                // It is being made just now.
                Ok(()) | Err(RunError::Namespace { .. }) => {}
                Err(error) if self.told.insert(captured.name.clone()) => {
                    let workload = captured.name;
                    tracing::error!(
                        workload,
                        "it is there again and cannot be captured yet: {error}"
                    );
                }
                Err(_) => {} // Said already.
            }
        }
    }
}

impl Taken {
    /// True if the workload is gone, or was to leave, and every worker knows.
    pub(super) fn left(&self, running: &Running) -> bool {
        let (name, number) = (self.place.name(), self.place.for_workers.number);
        let leave = || running.workers.iter().all(|worker| worker.leave(number));
        if self.place.is_gone() {
            let gone = leave();
            if gone {
                self.capture.iter().for_each(Capture::unpin);
                tracing::warn!(
                    workload = name,
                    "its network namespace is gone: capture has ended until it is there again"
                );
            }
            return gone;
        }
        let Some(deadline) = self.leaving else { return false };
        if Instant::now() >= deadline {
            leave();
        }
        self.place.is_left()
    }
}
