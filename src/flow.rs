// SPDX-License-Identifier: Apache-2.0
//! A flow: a pair of joined sockets, as a pure state machine.
//!
//! Takes a completion, answers with the next operations. Holds no descriptor, reads no clock,
//! makes no syscall, so that every order of events can be replayed from a seed. What always holds:
//!
//! - FIN is passed on only after every byte before it was taken by the kernel; a reset is passed
//!   on as a reset.
//! - At most one request of each kind is in flight, and a socket is closed only when none is.
//! - The upstream socket is closed first: with the downstream's slot the flow's name is free again.
#![deny(clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "hot path")]

use half::{Half, Receive, Send};

use crate::op::{CloseReason, Completion, Errno, Op, Pool, Request, Segment, Side, Timer};

pub use ops::Ops;
pub use segments::{Queue, Segments};

mod half;
mod ops;
mod segments;
#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may panic"
)]
mod simulation;

/// A pair of joined sockets.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    from_downstream: Half,
    from_upstream: Half,
    in_flight: InFlight,
    state: State,
}

/// What every flow of a worker goes by; from the profile.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rules {
    /// A direction that has moved this many bytes may use bulk buffers.
    pub bulk_after_bytes: u64,
    /// Average bytes a receive must bring for its direction to count as bulky.
    pub bulk_segment_bytes: u32,
    /// Buffers one direction may hold before its receive is cancelled; at least 2.
    pub segments_max: u16,
    /// Bytes one direction may hold; at least 2.
    pub window_bytes: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Both sockets were given back.
    Closed(CloseReason),
    /// Waiting for what is in flight to end.
    Closing(CloseReason),
    /// The upstream has not answered yet; the downstream may send already.
    Connecting,
    /// Both sockets are connected.
    Relaying,
}

/// The set of requests in flight.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct InFlight(u8);

impl Flow {
    /// A flow whose downstream was just accepted: dial, and listen to what it has to say. `lead`
    /// goes upstream before anything else and counts as nobody's bytes.
    pub fn open(
        lead: Option<Segment>,
        rules: &Rules,
        segments: &mut Segments,
        ops: &mut Ops,
    ) -> Flow {
        let mut flow = Flow {
            from_downstream: Half::new(Send::Unconnected),
            from_upstream: Half::new(Send::Idle),
            in_flight: InFlight::default(),
            state: State::Connecting,
        };
        if let Some(lead) = lead {
            flow.from_downstream.lead(segments, lead);
        }
        flow.request(Op::Connect, ops);
        flow.pump(Side::Downstream, rules, ops);
        flow
    }

    /// One thing happened: what now?
    pub fn step(
        &mut self,
        completion: Completion,
        rules: &Rules,
        segments: &mut Segments,
        ops: &mut Ops,
    ) {
        self.land(completion);
        if matches!(self.state, State::Closing(_) | State::Closed(_)) {
            discard(completion, segments);
            self.finish_closing(segments, ops);
            return;
        }
        match completion {
            Completion::Received { side, result, .. } => match result {
                Ok(Some(segment)) => self.half(side).push(segments, segment),
                Ok(None) => self.half(side).receive = Receive::Ended,
                Err(Errno(ENOBUFS)) => self.starve(side, ops),
                Err(Errno(ECANCELED | EAGAIN | EINTR)) => {}
                Err(_) => return self.abort(CloseReason::reset_by(side), segments, ops),
            },
            Completion::Sent { from, result } => match result {
                Ok(bytes) if self.half(from).sent(segments, bytes) => {}
                // The error that cut it short was swallowed, and the next receive on that socket
                // would look like FIN (`sk_stream_error` in net/core/stream.c takes `sk_err`).
                Ok(_) => return self.abort(CloseReason::reset_by(from.other()), segments, ops),
                Err(Errno(EAGAIN | EINTR)) => self.half(from).send = Send::Idle,
                Err(_) => return self.abort(CloseReason::reset_by(from.other()), segments, ops),
            },
            Completion::Connected(Ok(())) => self.relay(rules, ops),
            Completion::Connected(Err(errno)) => {
                return self.abort(CloseReason::of_connect(errno), segments, ops);
            }
            Completion::ShutDown { result: Ok(()), .. } => {}
            Completion::ShutDown { side, result: Err(_) } => {
                return self.abort(CloseReason::reset_by(side), segments, ops);
            }
            Completion::BuffersFree(side) => self.feed(side),
            Completion::Expired(timer) => return self.abort(timer.into(), segments, ops),
            Completion::Expelled(reason) => return self.abort(reason, segments, ops),
        }
        self.pump(completion.half(), rules, ops);
        self.finish(segments, ops);
    }

    /// Which timer applies now; `None` once the flow is on its way out.
    #[must_use]
    pub fn timer(&self) -> Option<Timer> {
        match self.state {
            State::Closed(_) | State::Closing(_) => None,
            State::Connecting => Some(Timer::Connect),
            State::Relaying if self.is_half_closed() => Some(Timer::HalfClosed),
            State::Relaying => Some(Timer::Idle),
        }
    }

    /// Why the flow ended, once both sockets were given back.
    #[must_use]
    pub const fn closed(&self) -> Option<CloseReason> {
        match self.state {
            State::Closed(reason) => Some(reason),
            _ => None,
        }
    }

    /// The upstream has not answered yet.
    #[must_use]
    pub fn is_connecting(&self) -> bool {
        self.in_flight.contains(Request::Connect)
    }

    /// Bytes read from `from` that the other side's socket has taken; without the lead.
    #[must_use]
    pub const fn moved_bytes(&self, from: Side) -> u64 {
        match from {
            Side::Downstream => self.from_downstream.moved_bytes,
            Side::Upstream => self.from_upstream.moved_bytes,
        }
    }

    /// What was read from `from` and waits to be sent; `Op::Send` means its head.
    #[must_use]
    pub const fn queue(&self, from: Side) -> Queue {
        match from {
            Side::Downstream => self.from_downstream.queue,
            Side::Upstream => self.from_upstream.queue,
        }
    }

    fn half(&mut self, from: Side) -> &mut Half {
        match from {
            Side::Downstream => &mut self.from_downstream,
            Side::Upstream => &mut self.from_upstream,
        }
    }

    fn is_half_closed(&self) -> bool {
        (self.from_downstream.receive == Receive::Ended)
            != (self.from_upstream.receive == Receive::Ended)
    }

    /// Notes that a request has ended, whatever came of it.
    fn land(&mut self, completion: Completion) {
        let Some(request) = completion.ends() else { return };
        self.in_flight.remove(request);
        if let Request::Receive(side) = request {
            self.half(side).receive = Receive::Idle;
        }
    }

    fn request(&mut self, op: Op, ops: &mut Ops) {
        if let Some(request) = op.begins() {
            self.in_flight.insert(request);
        }
        ops.push(op);
    }

    fn relay(&mut self, rules: &Rules, ops: &mut Ops) {
        self.state = State::Relaying;
        self.from_downstream.send = Send::Idle;
        self.pump(Side::Upstream, rules, ops);
    }

    /// A pool is empty: a bulky direction takes small buffers, a small one waits its turn.
    fn starve(&mut self, side: Side, ops: &mut Ops) {
        let half = self.half(side);
        if !half.retreat() {
            half.receive = Receive::Starved;
            ops.push(Op::AwaitBuffers(side));
        }
    }

    fn feed(&mut self, side: Side) {
        let half = self.half(side);
        if half.receive == Receive::Starved {
            half.receive = Receive::Idle;
        }
    }

    /// Starts whatever the direction that reads from `side` can do now.
    fn pump(&mut self, side: Side, rules: &Rules, ops: &mut Ops) {
        if let Some(op) = self.half(side).next_send(side) {
            self.request(op, ops);
        }
        if let Some(op) = self.half(side).next_receive(side, rules) {
            self.request(op, ops);
        }
    }

    /// Passes FIN on where everything before it was sent; closes when both directions are done.
    ///
    /// The last FIN needs no request of its own: closing the sockets sends it.
    fn finish(&mut self, segments: &mut Segments, ops: &mut Ops) {
        let done = |half: &Half| half.is_flushed() || half.send == Send::Ended;
        if done(&self.from_downstream) && done(&self.from_upstream) {
            self.state = State::Closing(CloseReason::Finished);
            return self.finish_closing(segments, ops);
        }
        for from in Side::BOTH {
            if self.half(from).is_flushed() {
                self.half(from).send = Send::Ended;
                self.request(Op::Shutdown(from.other()), ops);
            }
        }
    }

    /// Ends the flow with a reset on both sides.
    fn abort(&mut self, reason: CloseReason, segments: &mut Segments, ops: &mut Ops) {
        self.state = State::Closing(reason);
        for request in InFlight::CANCELLABLE {
            if self.in_flight.contains(request) {
                ops.push(Op::Cancel(request));
            }
        }
        self.finish_closing(segments, ops);
    }

    fn finish_closing(&mut self, segments: &mut Segments, ops: &mut Ops) {
        let State::Closing(reason) = self.state else { return };
        if self.in_flight != InFlight::default() {
            return;
        }
        segments.clear(&mut self.from_downstream.queue);
        segments.clear(&mut self.from_upstream.queue);
        let reset = reason != CloseReason::Finished;
        ops.push(Op::Close { side: Side::Upstream, reset });
        ops.push(Op::Close { side: Side::Downstream, reset });
        self.state = State::Closed(reason);
    }
}

/// A closing flow wants no more bytes, but their buffer must go home.
fn discard(completion: Completion, segments: &mut Segments) {
    if let Completion::Received { result: Ok(Some(Segment { buffer, .. })), .. } = completion {
        segments.free(buffer);
    }
}

impl From<Timer> for CloseReason {
    fn from(timer: Timer) -> CloseReason {
        match timer {
            Timer::Connect => CloseReason::ConnectTimeout,
            Timer::HalfClosed => CloseReason::HalfClosedTimeout,
            Timer::Idle => CloseReason::IdleTimeout,
        }
    }
}

impl Completion {
    /// The request that this completion is the last word of.
    const fn ends(self) -> Option<Request> {
        match self {
            Completion::Connected(_) => Some(Request::Connect),
            Completion::Received { side, more: false, .. } => Some(Request::Receive(side)),
            Completion::Sent { from, .. } => Some(Request::Send(from)),
            Completion::ShutDown { side, .. } => Some(Request::Shutdown(side)),
            _ => None,
        }
    }

    /// The direction that has something new to do, named by the side it reads from.
    const fn half(self) -> Side {
        match self {
            Completion::BuffersFree(side) | Completion::Received { side, .. } => side,
            Completion::Sent { from, .. } => from,
            _ => Side::Downstream,
        }
    }
}

impl Op {
    /// The request that this operation puts in flight.
    const fn begins(self) -> Option<Request> {
        match self {
            Op::Connect => Some(Request::Connect),
            Op::Receive { side, .. } => Some(Request::Receive(side)),
            Op::Send { from, .. } => Some(Request::Send(from)),
            Op::Shutdown(side) => Some(Request::Shutdown(side)),
            Op::AwaitBuffers(_) | Op::Cancel(_) | Op::Close { .. } => None,
        }
    }
}

impl InFlight {
    /// All but the FIN, which never blocks.
    const CANCELLABLE: [Request; 5] = [
        Request::Connect,
        Request::Receive(Side::Downstream),
        Request::Receive(Side::Upstream),
        Request::Send(Side::Downstream),
        Request::Send(Side::Upstream),
    ];

    const fn bit(request: Request) -> u8 {
        match request {
            Request::Connect => 1,
            Request::Receive(side) => 2 << side as u8,
            Request::Send(side) => 8 << side as u8,
            Request::Shutdown(side) => 32 << side as u8,
        }
    }

    const fn contains(self, request: Request) -> bool {
        self.0 & InFlight::bit(request) != 0
    }

    fn insert(&mut self, request: Request) {
        self.0 |= InFlight::bit(request);
    }

    fn remove(&mut self, request: Request) {
        self.0 &= !InFlight::bit(request);
    }
}

impl Rules {
    /// As the profile says; `small_bytes` is the size of a small buffer.
    #[must_use]
    pub fn new(relay: &crate::profile::Relay, small_bytes: u32) -> Rules {
        Rules {
            bulk_after_bytes: relay.bulk_after_bytes,
            bulk_segment_bytes: small_bytes / 2,
            segments_max: relay.segments_max.max(2),
            window_bytes: relay.window_bytes.max(2),
        }
    }
}

// errno(3); the same on every architecture that Linux runs io_uring on.
const EAGAIN: i32 = 11;
const ECANCELED: i32 = 125;
const EINTR: i32 = 4;
const ENOBUFS: i32 = 105;

const _: () = assert!(size_of::<Flow>() <= 128, "a flow must fit two cache lines");
const _: () = assert!(Pool::Small as u8 != Pool::Bulk as u8);
