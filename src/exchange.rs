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
use std::mem;
use std::time::Instant;

use callbacks::Callbacks;
use guard::Guard;
use legs::Legs;
use refusal::{Failure, Text};
use socket::{Held, Socket, Wanted};
use speech::{Mark, Reading};

use crate::metrics::Outcome;
use crate::op::{CloseReason, Completion, Errno, FlowId, Op, Segment, Side};
use crate::service::{EndpointId, Picker, ServiceId};
use crate::wire::Stop;
use crate::wire::detect::Protocol;

pub use legs::Line;
pub use naming::{Guest, guest};
pub use pieces::{Pieces, Queue};
pub use rules::Rules;

mod answers;
mod callbacks;
mod ending;
mod guard;
mod legs;
mod losses;
mod naming;
mod pieces;
mod refusal;
mod requests;
mod rules;
mod runs;
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
    callbacks: Callbacks,
    /// The service of the last request that was there whole: mostly the next one's too.
    called: Option<ServiceId>,
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
    /// The downstream has said that it asks no more.
    has_asked_last: bool,
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
    /// That frame is the last of `asked`.
    uploads: bool,
}

/// A request without an answer.
#[derive(Clone, Copy, Debug)]
struct Asked {
    due: Option<u32>,
    endpoint: EndpointId,
    failure: Option<Failure>,
    leg: usize,
    mark: Mark,
    /// For its answer, from its own last byte on.
    span: Option<u32>,
    /// Bytes that went into its leg before it.
    starts_at: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Closed(CloseReason),
    Closing(CloseReason),
    /// All was said; the downstream has not ended yet.
    Lingering,
    Living,
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

impl Exchange {
    /// A downstream in slot `head` that speaks `protocol`; `key` is the hash of its address. A `spent`
    /// exchange lends its memory.
    pub fn open<H: Host>(
        (head, protocol, key): (FlowId, Protocol, u64),
        spent: Option<&mut Exchange>,
        means: &mut Means<'_, H>,
    ) -> Exchange {
        let take = |Exchange { asked, callbacks, legs, .. }: &mut Exchange| {
            (mem::take(asked), mem::take(callbacks), mem::take(legs))
        };
        let (asked, callbacks, legs) = spent.map(take).unwrap_or_default();
        let mut exchange = Exchange {
            active: means.now,
            alarm: means.rules.idle.map(|idle| means.now.wrapping_add(idle)),
            asked,
            callbacks,
            called: None,
            client: Socket::new(Side::Downstream),
            drains: false,
            failures: 0,
            floor: None,
            guard: (protocol == Protocol::Http2).then(Box::default),
            hanging: None,
            has_asked_last: false,
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
            uploads: false,
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
        match self.state {
            State::Living => match taken.and_then(|()| self.turn(means)) {
                Ok(()) => {}
                Err(CloseReason::Finished) if !self.client.has_ended() => self.linger(means),
                Err(reason) => self.close(reason, means),
            },
            State::Lingering => self.go_on_lingering(taken, means),
            State::Closing(_) | State::Closed(_) => {}
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
            Completion::ShutDown { side, .. } => side == Side::Downstream,
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
            Completion::ShutDown { result, .. } => {
                self.client.finished();
                result.map_err(|_| gone)?;
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
            Completion::Expired(_) if self.state == State::Lingering => Err(CloseReason::Finished),
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
            // What nobody understands is answered, after all before it.
            Reading::Rest => self.client.has_ended() && self.to.is_some(),
            // What is there is taken, unless its rest will never come.
            Reading::Between if self.client.has_ended() => {
                is_idle && (self.client.inbox.is_empty() || self.hanging.is_some())
            }
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
        let pieces_max = means.rules.pieces_max;
        let ops = self.client.next(held, Wanted { bytes: self.needed, pieces_max }, means);
        ops.into_iter().flatten().for_each(|op| means.wish(self.head, op));
        for (_, leg) in self.legs.iter_mut().filter(|(_, leg)| leg.is_open()) {
            let held = Held::default().and(self.client.outbox).and(leg.socket.inbox);
            let pieces_max = if leg.has_to_wait() { WAITING_MAX } else { pieces_max };
            let wanted = Wanted { bytes: leg.needed, pieces_max };
            let ops = leg.socket.next(held, wanted, means);
            ops.into_iter().flatten().for_each(|op| means.wish(leg.slot, op));
        }
    }

    /// Frames of our own for the downstream, only between two others; false if that must wait.
    fn say<H: Host>(&mut self, text: Text, means: &mut Means<'_, H>) -> bool {
        let has_said = means.say(text, &mut self.client.outbox);
        if !has_said {
            self.look_again(means);
        }
        has_said
    }

    /// Others have what is needed now: it will be free soon.
    fn look_again<H: Host>(&mut self, means: &Means<'_, H>) {
        self.set_alarm(means.now.wrapping_add(1));
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

    /// Puts a frame of our own behind what waits in `queue`; false if there is no room for it now, or
    /// enough waits there already: what one reader does not read must not be missing elsewhere.
    fn say(&mut self, text: Text, queue: &mut Queue) -> bool {
        if queue.count() >= SAYS_BEHIND_MAX || !self.pieces.can_divide() {
            return false;
        }
        let segment = self.host.write(text.as_bytes());
        segment.is_some_and(|segment| queue.take_in(segment, self.pieces).is_ok())
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
        if needed > self.scratch.len().min(self.rules.window_bytes as usize) {
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

/// Our own words are said only where fewer pieces than that wait.
const SAYS_BEHIND_MAX: u32 = 8;
/// Pieces held of a leg whose frames cannot go on: whoever keeps it waiting needs some too.
const WAITING_MAX: u32 = 4;
/// The leg of a request that has failed.
const NOWHERE: usize = usize::MAX;
/// A year: keeps differences of ticks well inside an `i32`.
const TICKS_MAX: u32 = 365 * 24 * 3600 / 16 * 1000;
// errno(3); the same on every architecture that Linux runs io_uring on.
const EAGAIN: i32 = 11;
const ECANCELED: i32 = 125;
const EINTR: i32 = 4;
const ENOBUFS: i32 = 105;
