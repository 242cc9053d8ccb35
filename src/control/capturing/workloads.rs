// SPDX-License-Identifier: Apache-2.0
//! Network namespaces in which something is captured come, go and come again while weir runs.
//!
//! What can be refused is refused before anything is changed.

use super::{Capturing, Taken};
use crate::capture::{Capture, Prepared};
use crate::config::{Captured, Config, SourceAddress};
use crate::control::places::Place;
use crate::control::{RunError, Running, listeners};
use crate::worker::{Change, Listener};

/// Somewhere where nothing is captured until now, and can be: nothing is taken yet.
pub(in crate::control) struct Coming {
    /// By worker.
    listeners: Vec<Vec<Listener>>,
    place: Place,
    prepared: Prepared,
}

impl Coming {
    /// Listens where the workload lives; `None` if there is nothing to capture.
    pub(in crate::control) fn prepare(
        place: Place,
        config: &Config,
        running: &Running,
    ) -> Result<Option<Coming>, RunError> {
        let mut inbounds = place.captured.iter().filter_map(|captured| captured.inbound.as_ref());
        let keeps = inbounds.any(|inbound| inbound.source == SourceAddress::Keep);
        if keeps && running.workers.iter().any(|worker| !worker.features().bind) {
            return Err(RunError::NoBind);
        }
        let Some(plan) = place.plan(config) else { return Ok(None) };
        let prepared = place.within(|| plan.prepare())??;
        let mut listeners: Vec<_> = running.workers.iter().map(|_| Vec::new()).collect();
        let records = prepared.records();
        listeners::open_in(&place, &records, &[], &config.profile, &mut listeners)?;
        Ok(Some(Coming { listeners, place, prepared }))
    }
}

impl Capturing {
    /// Nothing is captured where weir was started, and nothing is open that was.
    pub(in crate::control) fn lacks_home(&self) -> bool {
        self.places.iter().all(|taken| taken.place.for_workers.number != 0)
    }

    /// Workloads elsewhere of `config` that are not taken.
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
        running.records.send_modify(|all| all.meet(&prepared.records()));
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

    /// Workloads whose network namespace had gone, and is there again.
    pub(super) fn take_up_again(&mut self, running: &Running, config: &Config) {
        let lacking: Vec<Captured> = self.lacks(config).cloned().collect();
        for captured in lacking {
            let room = running.workers.iter().all(|worker| worker.has_room());
            if !room || !captured.namespace.path().exists() {
                continue;
            }
            let coming = Place::elsewhere(captured.clone());
            let coming = coming.and_then(|place| Coming::prepare(place, config, running));
            let taken = coming.and_then(|coming| {
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
    /// True if the workload is gone, and every worker knows, or nothing of it is captured and open.
    pub(super) fn left(&self, running: &Running) -> bool {
        if !self.place.is_gone() {
            return self.is_over();
        }
        let mut numbers = self.numbers();
        let gone = numbers.all(|number| running.workers.iter().all(|worker| worker.leave(number)));
        if gone {
            self.capture.iter().for_each(Capture::unpin);
            tracing::warn!(
                workload = self.place.name(),
                "its network namespace is gone: capture has ended until it is there again"
            );
        }
        gone
    }
}
