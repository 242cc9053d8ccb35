// SPDX-License-Identifier: Apache-2.0
//! An exchange: a downstream connection whose requests each go to an endpoint of their own service, as
//! a pure state machine.
//!
//! Each exchange owns its upstream connections (legs), so requests and answers pass unchanged: an id
//! means the same on both sides. Takes a completion, answers with the next operations; holds no
//! descriptor, reads no clock, makes no syscall. What always holds:
//!
//! - A request reaches one leg whole and in one piece, and an answer the downstream likewise: frames
//!   are never mixed, and half a frame that cannot be finished resets whoever got it.
//! - Every request that wants an answer gets exactly one: its service's, or an error in its own
//!   protocol. It is sent to another endpoint only if not one byte of it has gone out.
//! - What is held is bounded: bytes, pieces, requests and legs.
#![deny(clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "hot path")]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use guard::Guard;
use legs::Legs;
use refusal::{Failure, Text};
use socket::{Held, Socket};
use speech::{Mark, Reading};

use crate::metrics::Outcome;
use crate::op::{CloseReason, Completion, Errno, FlowId, Op, Segment, Side};
use crate::profile::Profile;
use crate::service::{EndpointId, Picker};
use crate::wire::Stop;
use crate::wire::detect::Protocol;

pub use legs::Line;
pub use naming::{Guest, guest};
pub use pieces::{Pieces, Queue};

mod answers;
mod guard;
mod legs;
mod losses;
mod naming;
mod pieces;
mod refusal;
mod requests;
#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may panic"
)]
mod simulation;
mod socket;
mod speech;

/// A downstream connection and its legs.
#[derive(Debug)]
pub struct Exchange {
    /// When it is to be looked at, at the latest.
    alarm: Option<u32>,
    active: u32,
    /// Requests without an answer, in the order in which they came.
    asked: VecDeque<Asked>,
    /// What upstreams have asked of the downstream.
    callbacks: Vec<(u64, usize)>,
    client: Socket,
    drains: bool,
    /// Requests in `asked` that have failed.
    failures: usize,
    /// Whose frame is on its way to the downstream.
    floor: Option<usize>,
    head: FlowId,
    /// Of HTTP/2: what its requests have said, and what they are for.
    guard: Option<Box<Guard>>,
    /// Something of the downstream is waiting for its rest since then.
    hanging: Option<u32>,
    /// What comes next may be no request: that depends on an answer.
    is_held: bool,
    /// No request is taken any more: once all is said, it ends.
    is_last: bool,
    key: u64,
    legs: Legs,
    /// Bytes that must be there before it is worth looking at the front of the inbox again.
    needed: u32,
    protocol: Protocol,
    reading: Reading,
    state: State,
    /// Where the rest of the frame goes that is being read; `None` for nowhere.
    to: Option<usize>,
}

/// A request without an answer.
#[derive(Clone, Copy, Debug)]
struct Asked {
    due: Option<u32>,
    endpoint: EndpointId,
    failure: Option<Failure>,
    leg: usize,
    mark: Mark,
    /// Bytes that went into its leg before it.
    starts_at: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Closed(CloseReason),
    Closing(CloseReason),
    Living,
}

/// What every exchange of a worker goes by. Times are ticks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rules {
    /// A leg that has not come about by then is given up.
    pub connect: u32,
    /// From the first byte of a request's head to its last.
    pub head: u32,
    /// Of silence with nothing asked; `None` for never.
    pub idle: Option<u32>,
    /// A leg without requests is closed after it.
    pub leg_idle: u32,
    /// Pieces held of what one socket has brought, and at most that many waiting for one socket.
    pub pieces_max: u32,
    /// For an answer, where the request does not say; `None` for never.
    pub request: Option<u32>,
    /// How long a tick is.
    pub tick_ms: u32,
    /// An answer up to this size is passed on in one go.
    pub whole_bytes_max: u32,
    /// Bytes held of what one socket has brought.
    pub window_bytes: u32,
}

/// What an exchange needs done while it thinks.
pub trait Host {
    /// Copies the bytes of `more` behind `last` in its buffer; false if they do not fit there.
    fn append(&mut self, last: Segment, more: Segment) -> bool;
    /// What was received.
    fn bytes(&self, segment: Segment) -> &[u8];
    /// A request has come to this.
    fn count(&mut self, outcome: Outcome);
    /// An endpoint was put out of use.
    fn ejected(&mut self);
    /// Bytes from one side are with the other's socket.
    fn moved(&mut self, from: Side, bytes: u32);
    /// A free slot for one more leg of the exchange in `head`.
    fn slot(&mut self, head: FlowId) -> Option<FlowId>;
    /// A buffer with our own words; `None` while too many are on their way.
    fn write(&mut self, text: &[u8]) -> Option<Segment>;
}

/// What a step may use.
pub struct Means<'a, H> {
    /// See there.
    pub host: &'a mut H,
    /// Now, to choose endpoints by.
    pub instant: Instant,
    /// Now, in ticks.
    pub now: u32,
    /// The worker's.
    pub picker: &'a mut Picker,
    /// The worker's.
    pub pieces: &'a mut Pieces,
    /// For all exchanges.
    pub rules: &'a Rules,
    /// Room to put a head together in.
    pub scratch: &'a mut [u8],
    /// What shall be done, in order; empty before the step.
    pub wishes: &'a mut Vec<Wish>,
}

/// An operation, and on which flow's socket. The downstream's socket is that of the exchange's own
/// slot; a leg's is the upstream of its slot. With its close a slot is free again, if no leg has it
/// after the step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wish {
    /// What.
    pub op: Op,
    /// Whose.
    pub slot: FlowId,
}

impl Rules {
    /// As the profile says, with ticks of `tick`.
    #[must_use]
    pub fn new(profile: &Profile, tick: Duration) -> Rules {
        let Profile { buffers, relay, timeouts, .. } = profile;
        let ticks = |span: Duration| {
            let ticks = span.as_millis().div_ceil(tick.as_millis().max(1));
            u32::try_from(ticks).unwrap_or(TICKS_MAX).clamp(1, TICKS_MAX)
        };
        let pieces_max = u32::from(relay.segments_max).max(8);
        // What waits for its rest must leave room for the rest, however it comes.
        let whole =
            (relay.window_bytes / 4).min(buffers.small_bytes.saturating_mul(pieces_max / 8));
        Rules {
            connect: ticks(timeouts.connect),
            head: ticks(HEAD_WITHIN),
            idle: (!timeouts.idle.is_zero()).then(|| ticks(timeouts.idle)),
            leg_idle: ticks(LEG_IDLE),
            pieces_max,
            request: (!timeouts.request.is_zero()).then(|| ticks(timeouts.request)),
            tick_ms: u32::try_from(tick.as_millis()).unwrap_or(1).max(1),
            whole_bytes_max: whole.min(WHOLE_BYTES_MAX),
            window_bytes: relay.window_bytes,
        }
    }
}

impl Exchange {
    /// A downstream in slot `head` that speaks `protocol`; `key` is the hash of its address. A `spent`
    /// exchange lends its memory.
    pub fn open<H: Host>(
        (head, protocol, key): (FlowId, Protocol, u64),
        spent: Option<Exchange>,
        means: &mut Means<'_, H>,
    ) -> Exchange {
        let (asked, callbacks, legs) =
            spent.map(|spent| (spent.asked, spent.callbacks, spent.legs)).unwrap_or_default();
        let mut exchange = Exchange {
            active: means.now,
            alarm: means.rules.idle.map(|idle| means.now.wrapping_add(idle)),
            asked,
            callbacks,
            client: Socket::new(Side::Downstream),
            drains: false,
            failures: 0,
            floor: None,
            guard: (protocol == Protocol::Http2).then(Box::default),
            hanging: None,
            head,
            is_held: false,
            is_last: false,
            key,
            legs,
            needed: 0,
            protocol,
            reading: Reading::Between,
            state: State::Living,
            to: None,
        };
        exchange.asked.clear();
        exchange.callbacks.clear();
        exchange.legs.clear();
        exchange.drive(means);
        exchange
    }

    /// One thing happened on a socket of the flow in `slot`: what now?
    pub fn step<H: Host>(
        &mut self,
        slot: FlowId,
        completion: Completion,
        means: &mut Means<'_, H>,
    ) {
        let taken = match self.socket_of(slot, completion) {
            Some(Party::Client) => self.take(completion, means),
            Some(Party::Leg(index)) => self.take_leg(index, completion, means),
            None => self.look(completion, means),
        };
        self.go_on(taken, means);
    }

    /// Takes no new request; ends once nothing is asked any more.
    pub fn drain<H: Host>(&mut self, means: &mut Means<'_, H>) {
        self.drains = true;
        self.go_on(Ok(()), means);
    }

    fn go_on<H: Host>(&mut self, taken: Result<(), CloseReason>, means: &mut Means<'_, H>) {
        if self.state == State::Living
            && let Err(reason) = taken.and_then(|()| self.turn(means))
        {
            self.close(reason, means);
        }
        self.finish_closing(means);
    }

    /// When it wants a step with `Completion::Expired`, in ticks.
    #[must_use]
    pub const fn alarm(&self) -> Option<u32> {
        self.alarm
    }

    /// Why it ended, once every socket was given back.
    #[must_use]
    pub const fn closed(&self) -> Option<CloseReason> {
        match self.state {
            State::Closed(reason) => Some(reason),
            _ => None,
        }
    }

    /// The tick at which something last happened on one of its sockets.
    #[must_use]
    pub const fn active(&self) -> u32 {
        self.active
    }

    /// What waits for a socket; `Op::Send` means its head.
    #[must_use]
    pub fn outbox(&self, slot: FlowId, from: Side) -> Queue {
        match from {
            Side::Upstream => self.client.outbox,
            Side::Downstream => {
                self.legs.find(slot).map_or_else(Queue::new, |(_, leg)| leg.socket.outbox)
            }
        }
    }

    /// Its legs, for whoever shows or dials them.
    pub fn lines(&self) -> impl Iterator<Item = Line> + '_ {
        self.legs.iter().map(|(_, leg)| leg.line())
    }

    fn socket_of(&self, slot: FlowId, completion: Completion) -> Option<Party> {
        let is_client = match completion {
            Completion::BuffersFree(side) | Completion::Received { side, .. } => {
                side == Side::Downstream
            }
            Completion::Sent { from, .. } => from == Side::Upstream,
            Completion::Connected(_) => false,
            _ => return None,
        };
        if is_client {
            return Some(Party::Client);
        }
        self.legs.find(slot).map(|(index, _)| Party::Leg(index))
    }

    /// What happened on the downstream's socket.
    fn take<H: Host>(
        &mut self,
        completion: Completion,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        self.active = means.now;
        let gone = CloseReason::DownstreamReset;
        match completion {
            Completion::Received { result, more, .. } => {
                if !more {
                    self.client.received();
                }
                match result {
                    Ok(Some(segment)) => {
                        let waits = self.reading == Reading::Between;
                        return self.client.store(waits, segment, means);
                    }
                    Ok(None) => self.client.ended(),
                    Err(Errno(ENOBUFS)) => {
                        let op = self.client.starve();
                        means.wish(self.head, op);
                    }
                    Err(Errno(ECANCELED | EAGAIN | EINTR)) => {}
                    Err(_) => return Err(gone),
                }
            }
            Completion::Sent { result, .. } => {
                let bytes = sent(result);
                self.client.sent(bytes.unwrap_or(0), means.pieces);
                means.host.moved(Side::Upstream, bytes.map_err(|_| gone)?);
            }
            _ => self.client.feed(),
        }
        Ok(())
    }

    /// What happened elsewhere.
    fn look<H: Host>(
        &mut self,
        completion: Completion,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        match completion {
            Completion::Expelled(reason) => Err(reason),
            Completion::Expired(_) => self.expire(means),
            _ => Ok(()),
        }
    }

    /// Everything that can go on, goes on.
    fn turn<H: Host>(&mut self, means: &mut Means<'_, H>) -> Result<(), CloseReason> {
        loop {
            let has_asked = self.read_requests(means)?;
            let has_answered = self.pass_answers(means)?;
            let has_lost = self.tend_legs(means)?;
            if !has_asked && !has_answered && !has_lost {
                break;
            }
        }
        if self.guard.as_ref().is_some_and(|guard| guard.is_bound()) && self.legs.is_empty() {
            return Err(CloseReason::UpstreamReset);
        }
        self.drive(means);
        if self.is_done() { Err(CloseReason::Finished) } else { Ok(()) }
    }

    /// All was said and heard.
    fn is_done(&self) -> bool {
        let is_idle = self.asked.is_empty() && self.floor.is_none();
        let is_flushed = self.client.is_flushed();
        let is_over = match self.reading {
            _ if self.guard.is_some() => self.client.has_ended(),
            Reading::Rest => self.client.has_ended(),
            Reading::Between if self.client.has_ended() => is_idle,
            Reading::Between => self.drains && is_idle && self.client.inbox.is_empty(),
            _ => false,
        };
        is_flushed && (self.is_last || (is_over && self.legs.are_flushed()))
    }

    /// Receives and sends, wherever there is room and something to send.
    fn drive<H: Host>(&mut self, means: &mut Means<'_, H>) {
        let mut held = Held::default().and(self.client.inbox);
        for (_, leg) in self.legs.iter() {
            held = held.and(leg.socket.outbox);
        }
        let ops = self.client.next(held, means.rules);
        ops.into_iter().flatten().for_each(|op| means.wish(self.head, op));
        for (_, leg) in self.legs.iter_mut().filter(|(_, leg)| leg.is_open()) {
            let held = Held::default().and(self.client.outbox).and(leg.socket.inbox);
            let ops = leg.socket.next(held, means.rules);
            ops.into_iter().flatten().for_each(|op| means.wish(leg.slot, op));
        }
    }

    /// Frames of our own for the downstream; only between two others.
    fn say<H: Host>(&mut self, text: Text, means: &mut Means<'_, H>) -> Result<(), CloseReason> {
        let segment = means.host.write(text.as_bytes()).ok_or(CloseReason::LocalLimit)?;
        self.client.outbox.take_in(segment, means.pieces)
    }

    /// Ends the exchange: with a reset on all sides, unless all was said.
    fn close<H: Host>(&mut self, reason: CloseReason, means: &mut Means<'_, H>) {
        self.state = State::Closing(reason);
        let cancels = self.client.cancels();
        cancels.into_iter().flatten().for_each(|op| means.wish(self.head, op));
        for (_, leg) in self.legs.iter_mut() {
            leg.begin_close(false, means);
        }
        for asked in self.asked.drain(..) {
            means.picker.ended(asked.endpoint);
        }
    }

    fn finish_closing<H: Host>(&mut self, means: &mut Means<'_, H>) {
        let State::Closing(reason) = self.state else { return };
        let reset = reason != CloseReason::Finished;
        for index in 0..self.legs.len() {
            self.legs.close_quiet(index, reset, means);
        }
        if !self.legs.is_empty() || !self.client.is_quiet() {
            return;
        }
        self.client.clear(means.pieces);
        means.wish(self.head, Op::Close { side: Side::Downstream, reset });
        self.state = State::Closed(reason);
    }

    /// The leg that has got a part of a request, and waits for the rest.
    fn amid(&self) -> Option<usize> {
        self.to.filter(|_| self.reading != Reading::Between)
    }

    fn set_alarm(&mut self, at: u32) {
        let is_sooner = |alarm: u32| at.wrapping_sub(alarm).cast_signed() < 0;
        if self.alarm.is_none_or(is_sooner) {
            self.alarm = Some(at);
        }
    }
}

/// Whose socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Party {
    Client,
    Leg(usize),
}

impl<H: Host> Means<'_, H> {
    fn wish(&mut self, slot: FlowId, op: Op) {
        self.wishes.push(Wish { op, slot });
    }

    /// Reads what stands at the front of `queue`; `parse` sees as much of it as it needs.
    fn read<T>(
        &mut self,
        queue: Queue,
        parse: impl Fn(&[u8], &Picker) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let front = self.pieces.front(queue).ok_or(Stop::NeedMore(1))?;
        let first = parse(self.host.bytes(front), self.picker);
        let Err(Stop::NeedMore(needed)) = first else { return first };
        if needed > self.scratch.len() {
            return Err(Stop::Bad("a head too long"));
        }
        if (queue.bytes() as usize) < needed || queue.count() < 2 {
            return first;
        }
        let mut len = 0;
        for piece in self.pieces.iter(queue) {
            let bytes = self.host.bytes(piece);
            let room = self.scratch.get_mut(len..).unwrap_or_default();
            let fits = bytes.len().min(room.len());
            let (room, bytes) = (room.get_mut(..fits), bytes.get(..fits));
            room.zip(bytes).into_iter().for_each(|(room, bytes)| room.copy_from_slice(bytes));
            len += fits;
        }
        parse(self.scratch.get(..len).unwrap_or_default(), self.picker)
    }
}

impl Socket {
    /// Takes in what was received. What waits for its rest is kept in as few buffers as can be.
    fn store<H: Host>(
        &mut self,
        waits: bool,
        segment: Segment,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        let last = means.pieces.back(self.inbox).filter(|_| waits);
        if last.is_some_and(|last| means.host.append(last, segment)) {
            means.pieces.grow(&mut self.inbox, segment.len);
            means.pieces.free(segment.buffer);
            return Ok(());
        }
        self.inbox.take_in(segment, means.pieces)
    }
}

impl Queue {
    fn take_in(&mut self, segment: Segment, pieces: &mut Pieces) -> Result<(), CloseReason> {
        if pieces.push(self, segment) {
            return Ok(());
        }
        pieces.free(segment.buffer);
        Err(CloseReason::LocalLimit)
    }
}

/// Bytes that the kernel took; an error if the connection broke.
const fn sent(result: Result<u32, Errno>) -> Result<u32, Errno> {
    match result {
        Err(Errno(EAGAIN | EINTR | ECANCELED)) => Ok(0),
        result => result,
    }
}

/// From the first byte of a request to the last that says where it goes.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Below the 90 s after which a Bolt server closes.
const LEG_IDLE: Duration = Duration::from_secs(60);
/// The leg of a request that has failed.
const NOWHERE: usize = usize::MAX;
/// A year: keeps differences of ticks well inside an `i32`.
const TICKS_MAX: u32 = 365 * 24 * 3600 / 16 * 1000;
/// An answer that is passed on whole cannot keep others waiting, nor break in the middle.
const WHOLE_BYTES_MAX: u32 = 64 * 1024;
// errno(3); the same on every architecture that Linux runs io_uring on.
const EAGAIN: i32 = 11;
const ECANCELED: i32 = 125;
const EINTR: i32 = 4;
const ENOBUFS: i32 = 105;
