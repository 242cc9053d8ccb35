// SPDX-License-Identifier: Apache-2.0
//! In which network namespace this thread is: where a workload lives, its upstream sockets are made.
//!
//! Accepted sockets belong to their listener's namespace whatever this thread does. A dialled one
//! belongs to the thread's at the moment of its submit, so a thread that moves on begins the dials it
//! has made before. It stays where it was last: most neighbours in time are neighbours in place.

use std::sync::Arc;

use super::Place;
use super::turn::Worker;
use crate::metrics::Denied;
use crate::op::{CloseReason, Completion, FlowId};

impl Worker {
    /// Moves to where `listener` lives, so that what is dialled for it begins there.
    pub(super) fn enter(&mut self, listener: u16) -> Result<(), Denied> {
        match self.listening.states.get(usize::from(listener)) {
            Some(state) if state.place.number == self.inside => Ok(()),
            Some(state) => {
                let place = Arc::clone(&state.place);
                self.move_to(&place)
            }
            None => Err(Denied::UnknownDestination),
        }
    }

    fn move_to(&mut self, place: &Place) -> Result<(), Denied> {
        let netns = place.netns.as_ref().ok_or(Denied::Namespace)?;
        if !self.ring.begin_dials() || netns.enter().is_err() {
            return Err(Denied::Namespace);
        }
        self.inside = place.number;
        Ok(())
    }

    /// Places of which no listener and no flow is left are held no longer.
    pub(super) fn leave_places(&mut self) {
        let home = Arc::clone(&self.setup.home);
        if !self.listening.leave_places(&home) {
            return;
        }
        let inside = self.inside;
        let stays = (0..self.listening.states.len()).any(|at| self.listening.lives_in(at, inside));
        if inside != home.number && !stays {
            // If that fails, this thread holds the namespace until it dials elsewhere: no harm.
            let _ = self.move_to(&home);
        }
    }

    /// The workload in `place` is gone: nothing of ours may hold its namespace.
    pub(super) fn leave(&mut self, place: u32) {
        for index in 0..self.listening.states.len() {
            if self.listening.lives_in(index, place) {
                self.close_listener(index);
            }
        }
        for slot in (0..self.slab.slots()).map(FlowId::new) {
            let Some(entry) = self.slab.entry(slot).filter(|entry| entry.flow.is_some()) else {
                continue;
            };
            if self.listening.lives_in(usize::from(entry.peers.listener), place) {
                self.step(slot, Completion::Expelled(CloseReason::WorkloadGone));
            }
        }
        self.listening.forget(place, &self.setup.home);
        if self.inside == place {
            let home = Arc::clone(&self.setup.home);
            // If that fails, this thread holds the namespace until it dials elsewhere: no harm.
            let _ = self.move_to(&home);
        }
    }
}
