// SPDX-License-Identifier: Apache-2.0
//! Splice without the ring's own splice: the ring waits, `splice(2)` moves, never waiting.
//!
//! `IORING_OP_SPLICE` always hops to a kernel thread (`io_splice_prep` in io_uring/splice.c forces
//! it), which costs up to twice the CPU. So a step is run here, on this core's thread, a bounded
//! number of them a turn, and its outcome is handed to the worker like an event.

use std::os::fd::BorrowedFd;

use io_uring::opcode;

use super::pipes::{Spliced, Step};
use super::{Event, POLLIN, Ring};
use crate::op::{FlowId, Readiness, Side, Token};

impl Ring {
    /// Lends a descriptor of a socket in its slot; kept until `uninstall` or `close`.
    /// The event says 0, or `EMFILE` where the limit on spliced flows is reached.
    pub fn install(&mut self, token: Token, side: Side) {
        if !self.pipes.admit(token.flow()) {
            let (buffer, more, result) = (None, false, -libc::EMFILE);
            return self.answers.push(Event { buffer, more, result, token });
        }
        let lend = opcode::FixedFdInstall::new(self.socket(token.flow(), side), 0).build();
        self.push(lend.user_data(token.raw()));
    }

    /// Gives back the descriptors of both sides, and whatever pipes they fill.
    pub fn uninstall(&mut self, flow: FlowId) {
        self.pipes.release(flow);
    }

    /// Makes an event when the socket is readable or writable, or broken.
    pub fn await_ready(&mut self, token: Token, side: Side, readiness: Readiness) {
        let events = match readiness {
            Readiness::Readable => POLLIN | POLLRDHUP,
            Readiness::Writable => POLLOUT,
        };
        let poll = opcode::PollAdd::new(self.socket(token.flow(), side), events).build();
        self.push(poll.user_data(token.raw()));
    }

    /// The descriptors of both sides, if they are lent.
    #[must_use]
    pub fn lent(&self, flow: FlowId) -> Option<[BorrowedFd<'_>; 2]> {
        self.pipes.sockets(flow)
    }

    /// Makes an event, with the events of poll(2) as its result, whenever FIN has come on the
    /// socket or its connection broke. The kernel adds all that is not said here.
    pub fn watch(&mut self, token: Token, side: Side) {
        let fd = self.socket(token.flow(), side);
        let poll = opcode::PollAdd::new(fd, POLLRDHUP).multi(true);
        self.push(poll.build().user_data(token.raw()));
    }

    /// Asks for one step of the pipe that is filled from `from`: at most `room_bytes` into it, then
    /// as much out of it as the other side takes.
    pub fn splice(&mut self, token: Token, from: Side, held_bytes: u32, room_bytes: u32) {
        let step = Step { flow: token.flow(), from, held_bytes, room_bytes };
        self.steps.push_back((token, step));
    }

    /// Runs the step that waits longest. Call it a bounded number of times a turn: what is left
    /// keeps the next turn from sleeping.
    pub fn next_spliced(&mut self) -> Option<(Token, Spliced)> {
        let (token, step) = self.steps.pop_front()?;
        let mut spliced = self.pipes.step(step);
        // A send whose completion was not read yet may have taken the socket's error with it, and
        // then a reset looks like EOF: not to be trusted before the queue is read.
        if spliced.filled == 0 && !self.io.completion().is_empty() {
            spliced.filled = -libc::EAGAIN;
        }
        Some((token, spliced))
    }

    /// Something waits that the kernel does not know of.
    pub(super) fn has_work(&self) -> bool {
        !(self.steps.is_empty() && self.answers.is_empty())
    }
}

/// `POLLOUT` and `POLLRDHUP`, as the request wants them (poll(2)).
const POLLOUT: u32 = 4;
const POLLRDHUP: u32 = 0x2000;
