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

use half::{Half, Path, Target};
use in_flight::InFlight;
use sockmap::{Bond, Talk};
use splice::Broken;

use crate::op::{
    CloseReason, Completion, Errno, Fall, Op, Pool, Relay, Request, Segment, Side, Timer,
};
use crate::profile::{self, RelayMode};

pub use ops::Ops;
pub use segments::{Queue, Segments};
pub use sockmap::Forwarding;

mod copy;
mod half;
mod in_flight;
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
mod sockmap;
mod splice;

/// A pair of joined sockets.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    bond: Bond,
    fall: Option<Fall>,
    from_downstream: Half,
    from_upstream: Half,
    in_flight: InFlight,
    /// Bytes of our own that go upstream first and are nobody's.
    lead_bytes: u32,
    /// Sides whose descriptor is lent, one bit each.
    lent: u8,
    state: State,
    /// Sides whose FIN a watch has told of, one bit each.
    stirred: u8,
    talk: Talk,
}

/// What every flow of a worker goes by; from the profile.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rules {
    /// A direction that has moved this many bytes may use bulk buffers.
    pub bulk_after_bytes: u64,
    /// Average bytes a receive must bring for its direction to count as bulky.
    pub bulk_segment_bytes: u32,
    /// Which flows are given to the kernel, and whether any is now; `None` for none ever.
    pub forwarding: Option<Forwarding>,
    /// Bytes that a pipe may hold.
    pub pipe_bytes: u32,
    /// Buffers one direction may hold before its receive is cancelled; at least 2.
    pub segments_max: u16,
    /// Which directions are spliced; may change while flows live.
    pub splice: Promotion,
    /// Bytes that a direction must have moved by copy to be promoted.
    pub splice_after_bytes: u64,
    /// Average bytes a receive into bulk buffers must bring for that.
    pub splice_bulk_read_bytes: u32,
    /// Average bytes a receive into small buffers must bring for that.
    pub splice_read_bytes: u32,
    /// Average bytes a step must take for its direction to stay spliced.
    pub splice_short_bytes: u32,
    /// Bytes one direction may hold; at least 2.
    pub window_bytes: u32,
}

/// What can be done here besides copy.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Can {
    /// The kernel forwards, and does it right.
    pub forward: bool,
    /// The kernel splices without waiting, and there are descriptors for it.
    pub splice: bool,
}

/// Which directions are promoted to a faster path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Promotion {
    /// All, from the first byte on.
    Always,
    /// Those that have proved bulky, as long as they stay so.
    Bulk,
    /// None.
    Never,
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
            bond: Bond::Apart,
            fall: None,
            from_downstream: Half::new(Target::Unconnected),
            from_upstream: Half::new(Target::Open),
            in_flight: InFlight::default(),
            lead_bytes: lead.map_or(0, |lead| lead.len),
            lent: 0,
            state: State::Connecting,
            stirred: 0,
            talk: Talk::new(),
        };
        if let Some(lead) = lead {
            flow.from_downstream.copying.push(segments, lead);
        }
        flow.request(Op::Connect, ops);
        flow.drive(Side::Downstream, rules, ops);
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
        if let Err(reason) = self.take(completion, rules, segments, ops) {
            return self.close(reason, segments, ops);
        }
        match completion {
            Completion::Deaf => {}
            Completion::Connected(_) | Completion::Installed { .. } | Completion::Joined(_) => {
                Side::BOTH.into_iter().for_each(|from| self.drive(from, rules, ops));
            }
            _ => self.drive(completion.half(), rules, ops),
        }
        self.gather(rules, ops);
        self.watch(completion == Completion::Deaf, ops);
        self.lend(ops);
        self.finish(segments, ops);
    }

    /// Notes what a completion says; an error ends the flow.
    fn take(
        &mut self,
        completion: Completion,
        rules: &Rules,
        segments: &mut Segments,
        ops: &mut Ops,
    ) -> Result<(), CloseReason> {
        match completion {
            Completion::Received { side, result, .. } => match result {
                Ok(Some(segment)) => self.received(side, segment, rules, segments),
                Ok(None) => self.half(side).ended(),
                Err(Errno(ENOBUFS)) => self.starve(side, ops),
                Err(Errno(ECANCELED | EAGAIN | EINTR)) => {}
                Err(_) => return Err(CloseReason::reset_by(side)),
            },
            Completion::Sent { from, result } => match result {
                Ok(bytes) => self.sent(from, segments, bytes),
                Err(Errno(EAGAIN | EINTR)) => self.half(from).copying.ended_send(),
                Err(_) => return Err(CloseReason::reset_by(from.other())),
            },
            Completion::Spliced { drained, filled, from } => {
                if let Ok(bytes @ 1..) = filled {
                    self.talk.hear(from, bytes, rules);
                }
                let half = self.half(from);
                half.moved_bytes += u64::from(drained.unwrap_or(0));
                half.source_ended |= filled == Ok(0);
                self.fall = half.splicing.stepped(filled, drained, rules).map_err(|end| {
                    CloseReason::reset_by(if end == Broken::Source { from } else { from.other() })
                })?;
            }
            Completion::Ready { from } => self.half(from).splicing.ready(),
            Completion::Installed { side, result: Ok(()) } => self.lent |= bit(side),
            Completion::Installed { result: Err(_), .. } => {
                self.fall = Some(Fall::Descriptors);
                Side::BOTH.into_iter().for_each(|from| self.half(from).stay());
                self.stay_apart();
            }
            Completion::Joined(result) => self.joined(result),
            Completion::Stirred { side, is_broken, .. } => self.stirred(side, is_broken)?,
            Completion::Forwarded { bytes, from, stopped } => {
                self.forwarded(from, bytes, stopped);
            }
            Completion::Drained { from, result: Ok(passed) } => self.half(from).drained(passed),
            Completion::Drained { from, result: Err(_) } => {
                return Err(CloseReason::reset_by(from.other()));
            }
            Completion::Connected(Ok(())) => {
                self.state = State::Relaying;
                self.from_downstream.target = Target::Open;
            }
            Completion::Connected(Err(errno)) => return Err(CloseReason::of_connect(errno)),
            Completion::ShutDown { result: Ok(()), .. } => {}
            Completion::ShutDown { side, result: Err(_) } => {
                return Err(CloseReason::reset_by(side));
            }
            Completion::BuffersFree(side) => self.half(side).copying.feed(),
            Completion::Deaf => {}
            Completion::Expired(timer) => return Err(timer.into()),
            Completion::Expelled(reason) => return Err(reason),
        }
        Ok(())
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

    /// A reset of one of the sides would go unnoticed: nothing is in flight that waits for it, as
    /// where its reader has stalled or its FIN has come. A short while of it costs nothing; say
    /// `Completion::Deaf` when it lasts.
    #[must_use]
    pub fn is_deaf(&self) -> bool {
        Side::BOTH.into_iter().any(|side| self.wants_watch(side))
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
            Side::Downstream => self.from_downstream.copying.queue,
            Side::Upstream => self.from_upstream.copying.queue,
        }
    }

    /// How the bytes read from `from` move now.
    #[must_use]
    pub const fn relay(&self, from: Side) -> Relay {
        match from {
            Side::Downstream => self.from_downstream.relay(),
            Side::Upstream => self.from_upstream.relay(),
        }
    }

    /// Why the last step left a better path, or could not take it; once.
    pub fn take_fall(&mut self) -> Option<Fall> {
        self.fall.take()
    }

    fn half(&mut self, from: Side) -> &mut Half {
        match from {
            Side::Downstream => &mut self.from_downstream,
            Side::Upstream => &mut self.from_upstream,
        }
    }

    fn wants_watch(&self, side: Side) -> bool {
        let (half, is_connected) = match side {
            Side::Downstream => (&self.from_downstream, true),
            Side::Upstream => (&self.from_upstream, self.state == State::Relaying),
        };
        let lives = matches!(self.state, State::Connecting | State::Relaying);
        lives && is_connected && half.is_deaf() && !self.in_flight.contains(Request::Watch(side))
    }

    /// Has sides watched that were deaf for long, from now to the end: that costs less than to begin
    /// and end it with each pause. So are both that the kernel reads or writes: nobody in user space
    /// would find out.
    fn watch(&mut self, was_deaf: bool, ops: &mut Ops) {
        let is_joined = self.bond == Bond::Joined;
        if !is_joined && !was_deaf {
            return;
        }
        for side in Side::BOTH {
            let is_watched = self.in_flight.contains(Request::Watch(side));
            if is_joined && !is_watched || was_deaf && self.wants_watch(side) {
                self.request(Op::Watch(side), ops);
            }
        }
    }

    fn is_half_closed(&self) -> bool {
        self.from_downstream.source_ended != self.from_upstream.source_ended
    }

    /// Notes that a request has ended, whatever came of it.
    fn land(&mut self, completion: Completion) {
        let Some(request) = completion.ends() else { return };
        self.in_flight.remove(request);
        if let Request::Receive(side) = request {
            self.half(side).copying.received();
        }
    }

    fn request(&mut self, op: Op, ops: &mut Ops) {
        if let Some(request) = op.begins() {
            self.in_flight.insert(request);
        }
        ops.push(op);
    }

    fn received(&mut self, side: Side, segment: Segment, rules: &Rules, segments: &mut Segments) {
        self.talk.hear(side, segment.len, rules);
        let half = self.half(side);
        if matches!(half.path, Path::Landed(_)) {
            half.mark += u64::from(segment.len);
        }
        half.copying.push(segments, segment);
    }

    /// The socket took so many bytes.
    fn sent(&mut self, from: Side, segments: &mut Segments, bytes: u32) {
        let lead = if from == Side::Downstream { bytes.min(self.lead_bytes) } else { 0 };
        self.lead_bytes -= lead;
        let half = self.half(from);
        half.moved_bytes += u64::from(bytes - lead);
        half.copying.sent(segments, bytes);
    }

    /// A pool is empty: a bulky direction takes small buffers, a small one waits its turn.
    fn starve(&mut self, side: Side, ops: &mut Ops) {
        if !self.half(side).copying.starve() {
            ops.push(Op::AwaitBuffers(side));
        }
    }

    /// Takes the path that serves the direction best, and starts whatever it can do now.
    fn drive(&mut self, from: Side, rules: &Rules, ops: &mut Ops) {
        let (relaying, lent) = (self.state == State::Relaying, self.is_lent());
        while relaying && self.half(from).steer(rules, lent) {}
        while let Some(op) = self.half(from).next_op(from, rules) {
            self.request(op, ops);
        }
    }

    /// The descriptors of both sides are here.
    fn is_lent(&self) -> bool {
        self.lent == BOTH_LENT
    }

    /// Asks for descriptors as soon as one direction wants them, gives them back after the last.
    fn lend(&mut self, ops: &mut Ops) {
        let wants = |half: &Half| matches!(half.path, Path::Joining | Path::Leaving | Path::Splice);
        let wanted = wants(&self.from_downstream) || wants(&self.from_upstream);
        if !wanted && self.lent == 0 {
            return;
        }
        let mut asked = false;
        for side in Side::BOTH {
            let is_here = self.lent & bit(side) != 0;
            if wanted && !is_here && !self.in_flight.contains(Request::Install(side)) {
                self.request(Op::Install(side), ops);
            }
            asked |= self.in_flight.contains(Request::Install(side));
        }
        if !wanted && !asked && self.lent != 0 {
            self.lent = 0;
            ops.push(Op::Uninstall);
        }
    }

    /// Passes FIN on where everything before it was sent; closes when both directions are done.
    ///
    /// The last FIN needs no request of its own: closing the sockets sends it.
    fn finish(&mut self, segments: &mut Segments, ops: &mut Ops) {
        if !self.from_downstream.source_ended && !self.from_upstream.source_ended {
            return;
        }
        let done = |half: &Half| half.is_flushed() || half.target == Target::Ended;
        if done(&self.from_downstream) && done(&self.from_upstream) {
            return self.close(CloseReason::Finished, segments, ops);
        }
        for from in Side::BOTH {
            // What looks like FIN on a broken connection must not pass for one.
            let is_doubtful = self.half(from.other()).copying.is_doubtful();
            if self.half(from).is_flushed() && !is_doubtful {
                self.half(from).target = Target::Ended;
                self.request(Op::Shutdown(from.other()), ops);
            }
        }
    }

    /// Ends the flow, with a reset on both sides unless it has finished.
    fn close(&mut self, reason: CloseReason, segments: &mut Segments, ops: &mut Ops) {
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
        segments.clear(&mut self.from_downstream.copying.queue);
        segments.clear(&mut self.from_upstream.copying.queue);
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
            Completion::Installed { side, .. } => Some(Request::Install(side)),
            Completion::Ready { from } => Some(Request::Await(from)),
            Completion::Received { side, more: false, .. } => Some(Request::Receive(side)),
            Completion::Sent { from, .. } => Some(Request::Send(from)),
            Completion::ShutDown { side, .. } => Some(Request::Shutdown(side)),
            Completion::Spliced { from, .. } => Some(Request::Splice(from)),
            Completion::Stirred { side, more: false, .. } => Some(Request::Watch(side)),
            _ => None,
        }
    }

    /// The direction that has something new to do, named by the side it reads from.
    const fn half(self) -> Side {
        match self {
            Completion::BuffersFree(side)
            | Completion::Received { side, .. }
            | Completion::Stirred { side, .. } => side,
            Completion::Drained { from, .. }
            | Completion::Forwarded { from, .. }
            | Completion::Ready { from }
            | Completion::Sent { from, .. }
            | Completion::Spliced { from, .. } => from,
            _ => Side::Downstream,
        }
    }
}

impl Rules {
    /// As the profile says, as far as `can` goes.
    #[must_use]
    pub fn new(profile: &profile::Profile, can: Can) -> Rules {
        let profile::Profile { buffers, relay, .. } = profile;
        let full = |bytes: u32| bytes / 100 * relay.splice_fullness_percent;
        Rules {
            bulk_after_bytes: relay.bulk_after_bytes,
            bulk_segment_bytes: buffers.small_bytes / 2,
            forwarding: match relay.mode {
                RelayMode::Auto if can.forward && relay.sockmap_after_messages > 0 => {
                    Some(Forwarding {
                        after_messages: relay.sockmap_after_messages,
                        message_bytes_max: relay.sockmap_message_bytes_max,
                        pays: false,
                    })
                }
                RelayMode::Sockmap if can.forward => Some(Forwarding::ALWAYS),
                _ => None,
            },
            pipe_bytes: relay.pipe_bytes.min(relay.window_bytes),
            segments_max: relay.segments_max.max(2),
            splice: match relay.mode {
                RelayMode::Auto if can.splice => Promotion::Bulk,
                RelayMode::Splice if can.splice => Promotion::Always,
                _ => Promotion::Never,
            },
            splice_after_bytes: relay.splice_after_bytes,
            splice_bulk_read_bytes: full(buffers.bulk_bytes),
            splice_read_bytes: full(buffers.small_bytes),
            splice_short_bytes: relay.splice_short_bytes,
            window_bytes: relay.window_bytes.max(2),
        }
    }
}

const fn bit(side: Side) -> u8 {
    1 << side as u8
}

const BOTH_LENT: u8 = bit(Side::Downstream) | bit(Side::Upstream);
// errno(3); the same on every architecture that Linux runs io_uring on.
const EAGAIN: i32 = 11;
const ECANCELED: i32 = 125;
const EINTR: i32 = 4;
const ENOBUFS: i32 = 105;

const _: () = assert!(size_of::<Flow>() <= 128, "a flow must fit two cache lines");
const _: () = assert!(Pool::Small as u8 != Pool::Bulk as u8);
