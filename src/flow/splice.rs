// SPDX-License-Identifier: Apache-2.0
//! The splice path of a direction: from one socket into a pipe, from the pipe into the other.
//!
//! Pure bookkeeping: one step or one wait is in flight, never both, and the bytes in the pipe say
//! which of the two sockets to wait for. A pipe can hold more than its size, because splice moves
//! whole pages, so what may be taken is counted here and not left to the pipe.

use super::{EAGAIN, EINTR, Promotion, Rules};
use crate::op::{Errno, Fall, Op, Readiness, Side};

/// The splice path of one direction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Splicing {
    /// Moving average of what a step took from the socket.
    average_bytes: u32,
    held_bytes: u32,
    state: State,
    wants_out: bool,
    /// Times in a row that the socket was said to be readable and nothing came.
    vain_wakes: u8,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Must wait before the next step.
    Blocked(Readiness),
    /// The next step may come.
    Due,
    /// A step is in flight.
    Stepping,
    /// A wait is in flight.
    Waiting(Readiness),
}

/// Whose connection a step found broken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Broken {
    Source,
    Target,
}

impl Splicing {
    /// Not in use.
    pub(super) const fn new() -> Splicing {
        let (average_bytes, held_bytes) = (0, 0);
        let (state, vain_wakes, wants_out) = (State::Due, 0, false);
        Splicing { average_bytes, held_bytes, state, vain_wakes, wants_out }
    }

    /// With the benefit of the doubt.
    pub(super) const fn begin(rules: &Rules) -> Splicing {
        let average_bytes = rules.splice_short_bytes.saturating_mul(4);
        Splicing { average_bytes, ..Splicing::new() }
    }

    /// The pipe is empty and nothing is in flight.
    pub(super) const fn is_over(&self) -> bool {
        self.held_bytes == 0 && matches!(self.state, State::Blocked(_) | State::Due)
    }

    /// A step or a wait for bytes is in flight, and would tell that the connection broke.
    pub(super) const fn is_listening(&self) -> bool {
        matches!(self.state, State::Stepping | State::Waiting(Readiness::Readable))
    }

    /// Copy would serve better.
    pub(super) const fn wants_out(&self) -> bool {
        self.wants_out
    }

    /// The next step or wait, if none is in flight and there is a point in it.
    pub(super) fn next(&mut self, from: Side, ended: bool, rules: &Rules) -> Option<Op> {
        let takes = !ended && !self.wants_out && rules.splice != Promotion::Never;
        if !takes && self.held_bytes == 0 {
            return None;
        }
        match self.state {
            State::Blocked(readiness) => {
                self.state = State::Waiting(readiness);
                Some(Op::Await { from, readiness })
            }
            State::Due => {
                self.state = State::Stepping;
                let room_bytes = if takes { self.room_bytes(rules) } else { 0 };
                Some(Op::Splice { from, held_bytes: self.held_bytes, room_bytes })
            }
            State::Stepping | State::Waiting(_) => None,
        }
    }

    /// The wait has ended, whatever came of it: the next step finds out.
    pub(super) fn ready(&mut self) {
        self.vain_wakes += u8::from(self.state == State::Waiting(Readiness::Readable));
        self.state = State::Due;
    }

    /// A step has ended: what to wait for, and whether to go on this way.
    pub(super) fn stepped(
        &mut self,
        filled: Result<u32, Errno>,
        drained: Result<u32, Errno>,
        rules: &Rules,
    ) -> Result<Option<Fall>, Broken> {
        let room_bytes = self.room_bytes(rules);
        let came = filled.unwrap_or(0);
        self.held_bytes = (self.held_bytes + came).saturating_sub(drained.unwrap_or(0));
        let is_empty = self.held_bytes == 0;
        self.state = match (is_empty, came == room_bytes) {
            (false, _) => State::Blocked(Readiness::Writable),
            (true, true) => State::Due,
            (true, false) => State::Blocked(Readiness::Readable),
        };
        let is_stuck = is_empty && self.vain_wakes == VAIN_WAKES_MAX;
        if filled.is_ok() {
            self.vain_wakes = 0;
        }
        let fall = match (filled, drained) {
            // A socket that refuses what is in the pipe already leaves no other way out.
            (_, Err(errno)) if !is_transient(errno) => return Err(Broken::Target),
            (Ok(_), _) => None,
            (Err(errno), _) if is_transient(errno) => is_stuck.then_some(Fall::Stuck),
            (Err(errno), _) => Some(Fall::of_fill(errno).ok_or(Broken::Source)?),
        };
        self.wants_out |= fall.is_some() || self.is_short(came, rules);
        Ok(fall)
    }

    fn room_bytes(&self, rules: &Rules) -> u32 {
        rules.pipe_bytes.saturating_sub(self.held_bytes)
    }

    /// Whether the reads have become too short to be worth a pipe.
    fn is_short(&mut self, came: u32, rules: &Rules) -> bool {
        if came > 0 {
            let average = u64::from(self.average_bytes) * 7 + u64::from(came);
            self.average_bytes = u32::try_from(average / 8).unwrap_or(u32::MAX);
        }
        rules.splice == Promotion::Bulk && self.average_bytes < rules.splice_short_bytes
    }
}

const fn is_transient(errno: Errno) -> bool {
    matches!(errno.0, EAGAIN | EINTR)
}

/// The first may be a wake-up that others caused, or an EOF that the ring does not trust yet.
const VAIN_WAKES_MAX: u8 = 2;
