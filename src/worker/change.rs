// SPDX-License-Identifier: Apache-2.0
//! A worker that goes on otherwise: listeners come, change and go, timeouts change.
//!
//! Invariant: no flow is dropped and nobody who was connected by the kernel is turned away.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::accept::State;
use super::timers::TimerTicks;
use super::turn::Worker;
use super::{Alteration, Change, Listener};
use crate::op::FlowId;
use crate::profile::Timeouts;

impl Worker {
    /// All of it, between two turns.
    pub(super) fn change(&mut self, change: Change) {
        let Change { add, alter, retire, timeouts } = change;
        for alteration in alter {
            self.alter(alteration);
        }
        for listener in add {
            self.add(listener);
        }
        for (place, addr) in retire {
            if let Some(index) = self.listening.index_of(place, addr) {
                self.retire_listener(index);
            }
        }
        self.retime(&timeouts);
    }

    fn alter(&mut self, alteration: Alteration) {
        let Alteration { addr, from, place, proxy_protocol, route, workload } = alteration;
        // One for each socket: another worker's may be lent.
        let states = self.listening.states.iter_mut();
        for state in states.filter(|state| state.serves_at(from, addr)) {
            state.place = Arc::clone(&place);
            state.proxy_protocol = proxy_protocol;
            state.workload = Arc::clone(&workload);
            if let Some(route) = &route {
                state.route = route.clone();
            }
        }
    }

    fn add(&mut self, listener: Listener) {
        // The options were taken at the start; one that is refused now is missing, and no more.
        let _ = self.ring.tune(listener.fd.as_fd());
        let state = State::new(listener, self.setup.profile.limits.backlog);
        self.listening.push(state);
    }

    /// Timers that are set already run out by the new times: every flow is looked at anew.
    fn retime(&mut self, timeouts: &Timeouts) {
        self.ticks = TimerTicks::new(timeouts, self.setup.profile.sockets.keepalive.is_some());
        self.exchanging.retime(&self.setup.profile, timeouts);
        for slot in (0..self.slab.slots()).map(FlowId::new) {
            if let Some(entry) = self.slab.entry(slot).filter(|entry| entry.flow.is_some()) {
                self.ticks.set(&mut self.wheel, slot, &mut entry.times);
            }
        }
    }
}
