// SPDX-License-Identifier: Apache-2.0
//! A worker that accepts for another one which does not turn.

use std::sync::Arc;

use super::accept::State;
use super::doors::Lent;
use super::turn::Worker;

impl Worker {
    /// Takes who waits there, as at its own listeners of the same addresses.
    pub(super) fn help(&mut self, lent: Vec<Lent>) {
        let backlog = self.setup.profile.limits.backlog;
        for Lent { addr, fd, place } in lent.into_iter().filter(|_| self.drain_until.is_none()) {
            let own = self.listening.index_of(place, addr);
            let own = own.and_then(|index| self.listening.states.get(index));
            if let Some(state) = own.map(|own| own.lent(Arc::new(fd), backlog)) {
                self.listening.push(state);
            }
        }
    }

    /// The other one turns again: who waits now is served by either.
    pub(super) fn stop_helping(&mut self) {
        for index in 0..self.listening.states.len() {
            if self.listening.states.get(index).is_some_and(State::is_lent) {
                self.retire_listener(index);
            }
        }
    }
}
