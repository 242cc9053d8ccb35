// SPDX-License-Identifier: Apache-2.0
//! Exchanges in a worker: their completions in, their wishes out.
//!
//! An exchange lives in the slot of its downstream, where its first upstream has its place too. Each
//! further upstream takes a slot of its own, so that all of them count as flows do.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use super::FlowRow;
use super::slab::{Part, Peers, Slab};
use super::turn::Worker;
use super::wheel::Clock;
use crate::addr::Downstream;
use crate::exchange::{Exchange, Host, Line, Means, Pieces, Rules, Wish};
use crate::metrics::{Counters, Origin, Outcome};
use crate::op::{
    BufferId, CloseReason, Completion, FlowId, Kind, Op, Relay, Request, Segment, Side, Timer,
    Token,
};
use crate::profile::{Profile, Timeouts};
use crate::ring::Ring;
use crate::service::{EndpointId, key_of};
use crate::wire::detect::Protocol;

/// The exchanges of one worker, by slot.
pub(super) struct Exchanging {
    pieces: Pieces,
    places: Vec<Place>,
    rules: Rules,
    scratch: Box<[u8]>,
    /// Ended ones, whose memory the next ones use.
    #[expect(clippy::vec_box, reason = "a place takes the whole box over")]
    spent: Vec<Box<Exchange>>,
    wishes: Vec<Wish>,
}

#[derive(Default)]
struct Place {
    alarm: Option<u32>,
    exchange: Option<Box<Exchange>>,
}

/// What an exchange may ask of its worker while it thinks.
struct Hosting<'a> {
    counters: &'a Counters,
    now: u32,
    origin: Origin,
    ring: &'a mut Ring,
    slab: &'a mut Slab,
}

impl Exchanging {
    /// For so many slots; for none where no listener needs it.
    pub(super) fn new(profile: &Profile, slots: u32, headers: u16) -> Exchanging {
        let buffers = profile.buffers.small_count + profile.buffers.bulk_count + headers;
        let is_used = slots > 0;
        let pieces = if is_used { u32::from(buffers) * PIECES_PER_BUFFER } else { 0 };
        let mut places = Vec::new();
        places.resize_with(slots as usize, Place::default);
        Exchanging {
            pieces: Pieces::new(buffers, pieces),
            places,
            rules: Rules::new(profile, Clock::span(1)),
            scratch: vec![0; if is_used { SCRATCH_BYTES } else { 0 }].into_boxed_slice(),
            spent: Vec::new(),
            wishes: Vec::with_capacity(WISHES_MAX),
        }
    }

    pub(super) fn take_freed(&mut self) -> Option<BufferId> {
        self.pieces.take_freed()
    }

    /// Goes on with other timeouts.
    pub(super) fn retime(&mut self, profile: &Profile, timeouts: &Timeouts) {
        let profile = Profile { timeouts: *timeouts, ..profile.clone() };
        self.rules = Rules::new(&profile, Clock::span(1));
    }
}

impl Worker {
    /// A connection whose requests say where they go becomes an exchange.
    pub(super) fn begin_exchange(
        &mut self,
        slot: FlowId,
        fd: OwnedFd,
        listener: u16,
        downstream: Downstream,
        protocol: Protocol,
    ) {
        let peers = Peers {
            downstream: Some(downstream.addr()),
            endpoint: EndpointId::NONE,
            listener,
            original_dst: None,
            service: None,
            source: None,
            upstream: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        };
        if self.slab.claim_part(slot, Part::Head, peers, self.clock.now()).is_none() {
            return;
        }
        self.began(listener);
        self.counters.flows_active.add(1);
        self.ring.adopt(slot, fd);
        // Those who call services by request call for long.
        self.ring.keep_alive(slot, Side::Downstream);
        let (mut home, key) = (self.exchanging.spent.pop(), key_of(downstream.addr().ip()));
        let who = (slot, protocol, key);
        let exchange =
            self.with_means(listener, |means| Exchange::open(who, home.as_deref_mut(), means));
        if let Some(place) = self.exchanging.places.get_mut(slot.index()) {
            place.exchange = Some(match home {
                Some(mut home) => {
                    *home = exchange;
                    home
                }
                None => Box::new(exchange),
            });
        }
        self.carry_wishes(slot);
        self.settle_exchange(slot);
    }

    /// One completion for one exchange.
    pub(super) fn step_exchange(&mut self, head: FlowId, slot: FlowId, completion: Completion) {
        if let Completion::Connected(result) = completion {
            self.listening.connect_ended();
            if result.is_ok() {
                self.ring.keep_alive(slot, Side::Upstream);
            }
        }
        self.drive_exchange(head, |exchange, means| exchange.step(slot, completion, means));
    }

    fn drive_exchange(
        &mut self,
        head: FlowId,
        act: impl FnOnce(&mut Exchange, &mut Means<'_, Hosting<'_>>),
    ) {
        let Some(listener) = self.slab.entry(head).map(|entry| entry.peers.listener) else {
            return;
        };
        let place = self.exchanging.places.get_mut(head.index());
        let Some(mut exchange) = place.and_then(|place| place.exchange.take()) else { return };
        self.with_means(listener, |means| act(&mut exchange, means));
        if let Some(place) = self.exchanging.places.get_mut(head.index()) {
            place.exchange = Some(exchange);
        }
        self.carry_wishes(head);
        self.settle_exchange(head);
    }

    fn with_means<T>(
        &mut self,
        listener: u16,
        act: impl FnOnce(&mut Means<'_, Hosting<'_>>) -> T,
    ) -> T {
        let origin = self.listening.origin(listener);
        let (instant, now) = (self.clock.instant(), self.clock.now());
        let (counters, ring, slab) = (&*self.counters, &mut self.ring, &mut self.slab);
        let Exchanging { pieces, rules, scratch, wishes, .. } = &mut self.exchanging;
        act(&mut Means {
            host: &mut Hosting { counters, now, origin, ring, slab },
            instant,
            now,
            picker: &mut self.services,
            pieces,
            rules,
            scratch,
            wishes,
        })
    }

    /// Takes what an exchange wants to the ring.
    fn carry_wishes(&mut self, head: FlowId) {
        let mut wishes = std::mem::take(&mut self.exchanging.wishes);
        for Wish { op, slot } in wishes.drain(..) {
            self.carry_wish(head, slot, op);
        }
        self.exchanging.wishes = wishes;
    }

    fn carry_wish(&mut self, head: FlowId, slot: FlowId, op: Op) {
        let Some(entry) = self.slab.entry(slot) else { return };
        let (generation, listener) = (entry.generation, entry.peers.listener);
        let token = |request| Token::new(Kind::of(request), slot, generation);
        match op {
            Op::AwaitBuffers(side) => {
                self.counters.buffers_exhausted.add(1);
                if entry.queue_for_buffers(side) {
                    self.starved.push_back((slot, side));
                }
            }
            Op::Cancel(request) => self.ring.cancel(token(request)),
            Op::Close { side, reset } => {
                self.ring.close(slot, side, reset);
                if slot != head && self.line(head, slot).is_none() {
                    self.slab.release(slot);
                }
            }
            Op::Connect => {
                let Some(line) = self.line(head, slot) else { return };
                self.listening.connect_began();
                // Where the namespace cannot be entered, the dial that follows finds no way.
                let _ = self.enter(listener);
                self.ring.dial(token(Request::Connect), line.addr, None);
            }
            Op::Receive { side, credit_bytes, pool } => {
                self.ring.receive(token(Request::Receive(side)), side, credit_bytes, pool);
            }
            Op::Send { from, segments } => {
                let place = self.exchanging.places.get(head.index());
                let Some(exchange) = place.and_then(|place| place.exchange.as_ref()) else {
                    return;
                };
                let queue = self.exchanging.pieces.iter(exchange.outbox(slot, from));
                let queue = queue.take(usize::from(segments));
                self.ring.send(token(Request::Send(from)), from.other(), queue);
            }
            Op::Shutdown(side) => self.ring.shutdown(token(Request::Shutdown(side)), side),
            _ => {}
        }
    }

    /// The leg in `slot`, if it is still one.
    fn line(&self, head: FlowId, slot: FlowId) -> Option<Line> {
        let exchange = self.exchanging.places.get(head.index())?.exchange.as_ref()?;
        exchange.lines().find(|line| line.slot == slot)
    }

    /// Keeps the timer in step; lets go of an exchange that has closed.
    fn settle_exchange(&mut self, head: FlowId) {
        let Some(place) = self.exchanging.places.get_mut(head.index()) else { return };
        let Some(exchange) = place.exchange.as_ref() else { return };
        if let Some(reason) = exchange.closed() {
            place.alarm = None;
            let spent = place.exchange.take();
            self.exchanging.spent.extend(spent);
            let Some(peers) = self.slab.entry(head).map(|entry| entry.peers) else { return };
            self.wheel.clear(head.slot());
            self.slab.release(head);
            self.counters.flows_active.sub(1);
            if let Some(counter) = self.counters.flows_closed.get(reason as usize) {
                counter.add(1);
            }
            return self.listening.flow_ended(&peers);
        }
        let alarm = exchange.alarm();
        if alarm != place.alarm {
            place.alarm = alarm;
            match alarm {
                Some(at) => self.wheel.set(head.slot(), at),
                None => self.wheel.clear(head.slot()),
            }
        }
    }

    /// The timer of an exchange has run out; false if the slot is no exchange's own.
    pub(super) fn is_alarmed(&mut self, slot: FlowId) -> bool {
        let is_head = self.slab.is_head(slot);
        if is_head {
            if let Some(place) = self.exchanging.places.get_mut(slot.index()) {
                place.alarm = None;
            }
            self.step_exchange(slot, slot, Completion::Expired(Timer::Idle));
        }
        is_head
    }

    /// No exchange takes new requests; each ends once it has answered those it has.
    pub(super) fn drain_exchanges(&mut self) {
        for slot in (0..self.exchanging.slots()).map(FlowId::new) {
            self.drive_exchange(slot, |exchange, means| exchange.drain(means));
        }
    }

    /// All of them, at the end of a drain.
    pub(super) fn expel_exchanges(&mut self) {
        for slot in (0..self.exchanging.slots()).map(FlowId::new) {
            if self.slab.is_head(slot) {
                self.step_exchange(slot, slot, Completion::Expelled(CloseReason::Drained));
            }
        }
    }

    /// Each upstream connection of an exchange is a line of `weir flows`.
    pub(super) fn exchange_rows(&self) -> impl Iterator<Item = FlowRow> + '_ {
        let heads = (0..self.exchanging.slots()).map(FlowId::new);
        let places = heads.zip(&self.exchanging.places);
        let all = places.filter_map(|(head, place)| Some((head, place.exchange.as_ref()?)));
        all.flat_map(move |(head, exchange)| {
            exchange.lines().filter_map(move |line| {
                let (now, head) = (self.clock.now(), self.slab.look(head)?);
                let leg = self.slab.look(line.slot)?;
                Some(FlowRow {
                    age: Clock::span(now.wrapping_sub(leg.times.opened)),
                    bytes_to_downstream: line.heard,
                    bytes_to_upstream: line.sent,
                    downstream: head.peers.downstream,
                    id: self.row_id(line.slot, leg.generation),
                    idle: Clock::span(now.wrapping_sub(exchange.active())),
                    origin: self.listening.origin(head.peers.listener),
                    original_dst: None,
                    relay_to_downstream: Relay::Copy,
                    relay_to_upstream: Relay::Copy,
                    upstream: line.addr,
                    workload: self.listening.workload(head.peers.listener),
                })
            })
        })
    }
}

impl Exchanging {
    fn slots(&self) -> u32 {
        u32::try_from(self.places.len()).unwrap_or(0)
    }
}

impl Host for Hosting<'_> {
    fn append(&mut self, last: Segment, more: Segment) -> bool {
        self.ring.append(last, more)
    }

    fn bytes(&self, segment: Segment) -> &[u8] {
        self.ring.bytes(segment)
    }

    fn count(&mut self, outcome: Outcome) {
        if let Some(counter) = self.counters.requests.get(outcome as usize) {
            counter.add(1);
        }
    }

    fn ejected(&mut self) {
        self.counters.endpoints_ejected.add(1);
    }

    fn moved(&mut self, from: Side, bytes: u32) {
        self.counters.moved(self.origin, from, Relay::Copy, u64::from(bytes));
    }

    fn slot(&mut self, head: FlowId) -> Option<FlowId> {
        let peers = self.slab.entry(head)?.peers;
        let slot = self.slab.reserve()?;
        self.slab.claim_part(slot, Part::Leg(head), peers, self.now)?;
        Some(slot)
    }

    fn write(&mut self, text: &[u8]) -> Option<Segment> {
        self.ring.lend_header(text)
    }
}

/// A buffer of requests for several upstreams is so many pieces on average, at most.
const PIECES_PER_BUFFER: u32 = 4;
/// The longest head, with room for what the buffers hold behind it.
const SCRATCH_BYTES: usize = 96 * 1024;
/// What one step may want: a few operations for each socket.
const WISHES_MAX: usize = 128;
