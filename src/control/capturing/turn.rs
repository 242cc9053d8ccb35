// SPDX-License-Identifier: Apache-2.0
//! One network namespace in which a reload changes what is captured: parts come, change and go.
//!
//! What can be refused is refused before anything is changed. A part that goes takes no more, and what
//! is open goes on for a while; what it needs of the rules goes with its last flow.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::{Capturing, Taken, parts};
use crate::capture::{Plan, PreparedChange};
use crate::config::{Captured, Config, overlap};
use crate::control::places::Place;
use crate::control::{RunError, Running, listeners};
use crate::worker::{self, Listener};

/// What one network namespace comes to: granted, and not begun.
pub(in crate::control) struct Turn {
    /// `None` if rules and hooks stay as they are.
    change: Option<PreparedChange>,
    going: Option<Going>,
    /// Of the parts that come, by worker.
    listeners: Vec<Vec<Listener>>,
    place: Place,
}

/// Parts that are not in the config any more.
#[derive(Clone)]
pub(in crate::control) struct Going {
    captured: Vec<Captured>,
    /// The number of the place that they are taken out of.
    from: u32,
    /// Their own: held by workers for as long as one has a listener or a flow of them.
    place: Arc<worker::Place>,
    /// When what is still open is reset.
    until: Instant,
}

/// How a place was, for the way back.
struct Before {
    going: usize,
    place: Place,
    plan: Option<Plan>,
}

impl Capturing {
    /// What every place comes to under `config`.
    pub(in crate::control) fn turns(
        &self,
        config: &Config,
        running: &Running,
    ) -> Result<Vec<Turn>, RunError> {
        self.places.iter().map(|taken| taken.turn(config, running)).collect()
    }

    /// Takes what was prepared from now on, in every place or in none.
    pub(in crate::control) fn take_turns(
        &mut self,
        turns: &mut [Turn],
        running: &Running,
    ) -> Result<(), RunError> {
        let mut before = Vec::with_capacity(turns.len());
        for (taken, turn) in self.places.iter_mut().zip(turns) {
            let (was, changed) = taken.take_turn(turn, running);
            before.push(was);
            if let Err(error) = changed {
                self.turn_back(before);
                return Err(error);
            }
        }
        Ok(())
    }

    fn turn_back(&mut self, before: Vec<Before>) {
        for (taken, Before { going, place, plan }) in self.places.iter_mut().zip(before) {
            taken.going.truncate(going);
            taken.place = place;
            if let Some(Err(error)) = plan.map(|plan| taken.change(plan)) {
                tracing::error!(workload = taken.place.name(), "undo the change: {error}");
            }
        }
    }
}

impl Turn {
    /// The listeners of the parts that come, of one worker.
    pub(in crate::control) fn listeners_of(&mut self, worker: usize) -> Vec<Listener> {
        self.listeners.get_mut(worker).map(std::mem::take).unwrap_or_default()
    }

    /// What goes with this turn.
    pub(in crate::control) const fn going(&self) -> Option<&Going> {
        self.going.as_ref()
    }
}

impl Going {
    /// Of all its listeners: where they were, where they are told apart from now on.
    pub(in crate::control) fn listeners(
        &self,
    ) -> impl Iterator<Item = (u32, &Captured, &Arc<worker::Place>, SocketAddr)> {
        self.captured.iter().flat_map(move |part| {
            let addrs = listeners::addrs(part).into_iter();
            addrs.map(move |addr| (self.from, part, &self.place, addr))
        })
    }

    /// No worker has a listener or a flow of it any more.
    fn is_over(&self) -> bool {
        Arc::strong_count(&self.place) == 1
    }
}

impl Taken {
    fn turn(&self, config: &Config, running: &Running) -> Result<Turn, RunError> {
        let place = self.place.under(config);
        let going = parts::without(&self.place.captured, &place.captured);
        let coming = parts::without(&place.captured, &self.place.captured);
        refuse_overlap(&coming, &going)?;
        let all_going = self.parts_going().chain(&going).cloned().collect::<Vec<_>>();
        let plan = place.plan_with(&all_going, config);
        let capture = self.capture.as_ref();
        let change = capture.zip(plan).filter(|(capture, plan)| capture.plan() != plan);
        let change = change.map(|(capture, plan)| place.within(|| capture.prepare(plan)));
        let change = change.transpose()?.transpose()?;
        let mut listeners: Vec<_> = running.workers.iter().map(|_| Vec::new()).collect();
        if !coming.is_empty() {
            let records = change.as_ref().map(PreparedChange::records).unwrap_or_default();
            let there = place.of(coming);
            listeners::open_in(&there, records, &[], &config.profile, &mut listeners)?;
        }
        let until = Instant::now() + config.profile.timeouts.drain;
        let going = (!going.is_empty()).then(|| Going {
            captured: going,
            from: place.for_workers.number,
            place: place.aside(),
            until,
        });
        Ok(Turn { change, going, listeners, place })
    }

    fn take_turn(&mut self, turn: &mut Turn, running: &Running) -> (Before, Result<(), RunError>) {
        let before = Before {
            going: self.going.len(),
            place: self.place.clone(),
            plan: self.capture.as_ref().map(|capture| capture.plan().clone()),
        };
        let (name, change) = (turn.place.name(), turn.change.take());
        self.place = turn.place.clone();
        let changed = match (&mut self.capture, change) {
            (Some(capture), Some(change)) => {
                running.records.send_modify(|all| all.meet(change.records()));
                self.place.within(|| capture.change(change)).and_then(|done| Ok(done?))
            }
            _ => Ok(()),
        };
        if let (Some(going), Ok(())) = (&turn.going, &changed) {
            let parts = going.captured.len();
            tracing::info!(workload = name, parts, "capture has ended; what is open goes on");
            self.going.push(going.clone());
        }
        (before, changed)
    }

    fn parts_going(&self) -> impl Iterator<Item = &Captured> {
        self.going.iter().flat_map(|going| &going.captured)
    }

    fn change(&mut self, plan: Plan) -> Result<(), RunError> {
        let Some(capture) = &mut self.capture else { return Ok(()) };
        let change = || capture.prepare(plan).and_then(|change| capture.change(change));
        Ok(self.place.within(change)??)
    }

    /// Parts that went are forgotten with their last flow, and reset when their time is over.
    pub(super) fn see_off(&mut self, running: &Running, config: &Config) {
        let now = Instant::now();
        for going in self.going.iter().filter(|going| going.until <= now) {
            // Asked again at the next look where a mailbox is full.
            let number = going.place.number;
            let _ = running.workers.iter().filter(|worker| !worker.leave(number)).count();
        }
        if !self.going.iter().any(Going::is_over) {
            return;
        }
        let stays = |going: &&Going| !going.is_over();
        let still: Vec<Captured> =
            self.going.iter().filter(stays).flat_map(|going| going.captured.clone()).collect();
        let changed = self.place.plan_with(&still, config).map_or(Ok(()), |plan| self.change(plan));
        // If it failed, something is missing, which is seen by whoever looks at that.
        if changed.is_ok() {
            self.going.retain(|going| !going.is_over());
        }
    }

    /// Nothing is captured here, and nothing is open that was.
    pub(super) fn is_over(&self) -> bool {
        self.place.captured.is_empty() && self.going.iter().all(Going::is_over)
    }

    /// The numbers by which workers know what was captured here.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u32> {
        let going = self.going.iter().map(|going| going.place.number);
        going.chain([self.place.for_workers.number])
    }
}

/// A listener that goes is there until those who wait in its queue are served.
fn refuse_overlap(coming: &[Captured], going: &[Captured]) -> Result<(), RunError> {
    for new in coming {
        for addr in listeners::addrs(new) {
            let there =
                |old: &&Captured| listeners::addrs(old).iter().any(|old| overlap(*old, addr));
            if going.iter().any(|old| there(&old)) {
                return Err(RunError::Overlap { listen: addr, name: new.name.clone() });
            }
        }
    }
    Ok(())
}
