// SPDX-License-Identifier: Apache-2.0
//! What spliced flows need besides the ring: real descriptors of their sockets, and pipes.
//!
//! Everything is bounded: flows with descriptors, pipes in all, and pipes kept in reserve. A pipe
//! belongs to a direction only while it holds bytes of it; one that cannot be emptied is closed
//! and never used again. Nothing is allocated after `new`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::op::{FlowId, Side};
use crate::sys::pipe::{self, Pipe};
use crate::sys::socket;

/// The descriptors and pipes of one worker.
#[derive(Debug)]
pub(super) struct Pipes {
    /// Index into `lent` by flow, `NONE` for most.
    places: Vec<u32>,
    lent: Vec<Lent>,
    free: Vec<u32>,
    /// Empty pipes, last in, first out.
    reserve: Vec<Pipe>,
    /// Pipes that may still be made.
    budget: u32,
    pipe_bytes: u32,
}

/// What a flow holds while one of its directions is spliced.
#[derive(Debug, Default)]
struct Lent {
    /// By the side that the direction reads from.
    pipes: [Option<Pipe>; 2],
    sockets: [Option<OwnedFd>; 2],
}

/// How many bytes one worker may splice at a time, and for how many flows.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SpliceLimits {
    /// Flows with descriptors of their own.
    pub flows_max: u32,
    /// Size of a pipe.
    pub pipe_bytes: u32,
    /// Pipes.
    pub pipes_max: u32,
}

/// What came of one step: bytes or a negated errno, as the kernel says it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Spliced {
    /// Out of the pipe.
    pub drained: i32,
    /// Into the pipe.
    pub filled: i32,
}

impl Pipes {
    pub(super) fn new(flows: u32, limits: SpliceLimits) -> Pipes {
        let flows_max = limits.flows_max.min(flows);
        Pipes {
            budget: limits.pipes_max,
            free: (0..flows_max).rev().collect(),
            lent: (0..flows_max).map(|_| Lent::default()).collect(),
            pipe_bytes: limits.pipe_bytes,
            places: vec![NONE; flows as usize],
            reserve: Vec::with_capacity(limits.pipes_max.min(RESERVE_MAX) as usize),
        }
    }

    /// A place for the flow's descriptors; false if there is none left.
    pub(super) fn admit(&mut self, flow: FlowId) -> bool {
        let Some(place) = self.places.get_mut(flow.index()) else { return false };
        if *place == NONE {
            *place = self.free.pop().unwrap_or(NONE);
        }
        *place != NONE
    }

    /// Keeps a descriptor that the ring has lent for a socket of an admitted flow.
    pub(super) fn keep(&mut self, flow: FlowId, side: Side, socket: OwnedFd) -> i32 {
        let Some(lent) = self.lent(flow) else { return -libc::EMFILE };
        if let Some(place) = lent.sockets.get_mut(side as usize) {
            *place = Some(socket);
        }
        0
    }

    /// The descriptors of both sides, if both are here.
    pub(super) fn sockets(&self, flow: FlowId) -> Option<[BorrowedFd<'_>; 2]> {
        let lent = self.lent.get(*self.places.get(flow.index())? as usize)?;
        let [Some(downstream), Some(upstream)] = &lent.sockets else { return None };
        Some([downstream.as_fd(), upstream.as_fd()])
    }

    /// Gives everything of the flow back: descriptors, and pipes with the bytes in them.
    pub(super) fn release(&mut self, flow: FlowId) {
        let Some(place) = self.places.get_mut(flow.index()) else { return };
        let index = std::mem::replace(place, NONE);
        let Some(lent) = self.lent.get_mut(index as usize) else { return };
        let Lent { pipes, .. } = std::mem::take(lent);
        self.budget += pipes.iter().flatten().fold(0, |count, _| count + 1);
        self.free.push(index);
    }

    /// One step, of three calls at most: fill the pipe, then empty it. Never waits.
    pub(super) fn step(&mut self, step: Step) -> Spliced {
        let none = Spliced { drained: -libc::EAGAIN, filled: -libc::EAGAIN };
        let from = step.from as usize;
        let is_lent = |lent: &mut Lent| lent.sockets.iter().all(Option::is_some);
        if !self.lent(step.flow).is_some_and(is_lent) {
            return none;
        }
        let held = self.lent(step.flow).and_then(|lent| lent.pipes.get_mut(from)?.take());
        let pipe = match held.map_or_else(|| self.take(), Ok) {
            Ok(pipe) => pipe,
            Err(errno) => return Spliced { filled: -errno, ..none },
        };
        let Some(lent) = self.lent(step.flow) else { return none };
        let [Some(downstream), Some(upstream)] = &lent.sockets else { return none };
        let (source, target) = match step.from {
            Side::Downstream => (downstream, upstream),
            Side::Upstream => (upstream, downstream),
        };
        let (spliced, left) = run(step, &pipe, source.as_fd(), target.as_fd());
        if left == 0 {
            self.put(pipe);
        } else if let Some(place) = lent.pipes.get_mut(from) {
            *place = Some(pipe);
        }
        spliced
    }

    fn lent(&mut self, flow: FlowId) -> Option<&mut Lent> {
        let index = *self.places.get(flow.index())?;
        self.lent.get_mut(index as usize)
    }

    /// An empty pipe, or why there is none.
    fn take(&mut self) -> Result<Pipe, i32> {
        if let Some(pipe) = self.reserve.pop() {
            return Ok(pipe);
        }
        self.budget = self.budget.checked_sub(1).ok_or(libc::ENOBUFS)?;
        Pipe::open(self.pipe_bytes).map_err(|error| {
            self.budget += 1;
            error.raw_os_error().unwrap_or(libc::ENOBUFS)
        })
    }

    fn put(&mut self, pipe: Pipe) {
        if self.reserve.len() < self.reserve.capacity() {
            self.reserve.push(pipe);
        } else {
            self.budget += 1;
        }
    }
}

/// A step that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) flow: FlowId,
    pub(super) from: Side,
    pub(super) held_bytes: u32,
    pub(super) room_bytes: u32,
}

/// What came of it, and the bytes that stay in the pipe.
fn run(step: Step, pipe: &Pipe, source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> (Spliced, u32) {
    let mut spliced = Spliced { drained: -libc::EAGAIN, filled: -libc::EAGAIN };
    if step.room_bytes > 0 {
        spliced.filled = fill(pipe, source, step.room_bytes);
    }
    let held = step.held_bytes + u32::try_from(spliced.filled).unwrap_or(0);
    if held > 0 {
        spliced.drained = drain(pipe, target, held);
    }
    (spliced, held.saturating_sub(u32::try_from(spliced.drained).unwrap_or(0)))
}

/// At an urgent mark splice(2) takes nothing, and says EOF there once FIN has come, although bytes
/// wait behind the mark (`tcp_splice_read` in net/ipv4/tcp.c looks at `SOCK_DONE`). So an EOF must
/// be confirmed by who passes such marks.
fn fill(pipe: &Pipe, source: BorrowedFd<'_>, room: u32) -> i32 {
    match outcome(pipe::fill(pipe, source, room)) {
        0 => match socket::is_at_end(source) {
            Ok(true) => 0,
            Ok(false) => -libc::EAGAIN,
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        },
        filled => filled,
    }
}

/// splice(2) swallows the error that cuts it short, and with it the only sign that the connection
/// broke: the next receive on that socket would look like FIN. So a short one is asked again.
fn drain(pipe: &Pipe, target: BorrowedFd<'_>, held: u32) -> i32 {
    let first = outcome(pipe::drain(pipe, target, held));
    let Ok(moved @ 1..) = u32::try_from(first) else { return first };
    if moved >= held {
        return first;
    }
    match outcome(pipe::drain(pipe, target, held - moved)) {
        more @ 0.. => first + more,
        again if again == -libc::EAGAIN || again == -libc::EINTR => first,
        broken => broken,
    }
}

fn outcome(moved: std::io::Result<u32>) -> i32 {
    match moved {
        Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
    }
}

const NONE: u32 = u32::MAX;
/// Empty pipes kept for the next who needs one; making one takes three syscalls.
const RESERVE_MAX: u32 = 64;
