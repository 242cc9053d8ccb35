// SPDX-License-Identifier: Apache-2.0
//! How connections get in: arming and pausing accept, finding where each one wants to go.
//!
//! Invariants: a connection the kernel handed over is served or reset, never forgotten; an own
//! port is never dialled; nobody accepts while descriptors, flows or pending connects are short.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::destination::Destination;
use super::proxy_header::Header;
use super::slab::Peers;
use super::sources::Sources;
use super::turn::Worker;
use super::wheel::Clock;
use super::{Listener, Place, Route, Setup};
use crate::addr::{Downstream, OriginalDst};
use crate::capture::SourcePorts;
use crate::metrics::{Denied, Origin};
use crate::op::{FlowId, Kind, Segment, Side, Token};
use crate::ring::{AcceptInto, Event};
use crate::service::Balance;
use crate::sys::socket;

pub(super) use state::State;
use state::{Accept, Fate};

mod state;

/// The listeners of one worker, and what decides whether they may accept.
pub(super) struct Listening {
    connects_pending: u32,
    into: AcceptInto,
    /// Accepted where no slot was free; served as slots come free.
    parked: VecDeque<(u16, OwnedFd)>,
    retry_at: Option<u32>,
    pub(super) source_ports: SourcePorts,
    sources: Sources,
    pub(super) states: Vec<State>,
}

impl Worker {
    /// Arms what should accept, or asks it to stop; at the end of every turn.
    pub(super) fn arm_listeners(&mut self) {
        self.serve_parked();
        let into = self.listening.into;
        let (may, many) = (self.may_accept(), self.has_room_for_queues());
        let room = self.setup.share.flows_max - self.slab.occupied();
        let mut ones = self.listening.ones();
        for index in 0..self.listening.states.len() {
            let Some(state) = self.listening.states.get_mut(index) else { return };
            let Some(fd) = state.fd.as_ref().map(AsFd::as_fd) else { continue };
            if state.fate != Fate::Serves {
                continue;
            }
            let paused = state.loops.is_paused();
            match (state.accept, may && !paused) {
                (Accept::Idle, true) if many => {
                    state.accept = Accept::Many;
                    self.ring.accept_many(token(index), fd, into);
                }
                (Accept::Idle, true) if ones < room => {
                    state.accept = Accept::One;
                    ones += 1;
                    self.ring.accept_one(token(index), fd, into);
                }
                (Accept::Many, goes) if !goes || !many => {
                    state.accept = Accept::Cancelled;
                    self.counters.accept_paused.add(u64::from(!may));
                    self.ring.cancel(token(index));
                }
                (Accept::One, false) if paused || into == AcceptInto::Descriptors => {
                    state.accept = Accept::Cancelled;
                    self.ring.cancel(token(index));
                }
                _ => {}
            }
        }
        self.mailbox.set_accepting(self.drain_until.is_none() && self.listening.is_armed());
    }

    /// No more connections after those that the kernel has handed over already.
    pub(super) fn stop_listening(&mut self) {
        for index in 0..self.listening.states.len() {
            let Some(state) = self.listening.states.get_mut(index) else { return };
            if matches!(state.accept, Accept::Many | Accept::One) {
                state.accept = Accept::Cancelled;
                self.ring.cancel(token(index));
            } else if state.accept == Accept::Idle {
                state.end();
            }
        }
    }

    /// No more connections of this listener, not even those that wait.
    pub(super) fn close_listener(&mut self, index: usize) {
        let Some(state) = self.listening.states.get_mut(index) else { return };
        state.fate = Fate::Closes;
        match state.accept {
            Accept::Many | Accept::One | Accept::Last => {
                state.accept = Accept::Cancelled;
                self.ring.cancel(token(index));
            }
            Accept::Idle => state.end(),
            Accept::Cancelled | Accept::Over => {}
        }
    }

    /// No more connections of this listener but those that wait.
    pub(super) fn retire_listener(&mut self, index: usize) {
        let Some(state) = self.listening.states.get_mut(index) else { return };
        state.fate = Fate::Drains;
        match state.accept {
            Accept::Many | Accept::One => {
                state.accept = Accept::Cancelled;
                self.ring.cancel(token(index));
            }
            Accept::Idle => self.accept_rest(index, 0),
            Accept::Cancelled | Accept::Last | Accept::Over => {}
        }
    }

    /// An accept brought a connection, an error, or its end.
    pub(super) fn accepted(&mut self, index: usize, event: Event) {
        let now = self.clock.now();
        if !event.more {
            self.accept_ended(index, event.result);
        }
        let Ok(listener) = u16::try_from(index) else { return };
        match u32::try_from(event.result) {
            Ok(slot) if self.listening.into == AcceptInto::Slots => {
                self.serve_slot(FlowId::new(slot), listener);
            }
            Ok(_) => {
                self.serve(listener, socket::accepted(event.result));
            }
            Err(_) if matches!(-event.result, libc::ECANCELED | libc::EINTR | libc::EAGAIN) => {}
            // Aborted while it waited in the queue: the next one is as good.
            Err(_) if -event.result == libc::ECONNABORTED => {}
            Err(_) => {
                self.counters.accept_paused.add(1);
                self.listening.retry_at = Some(now.saturating_add(Clock::ticks(ACCEPT_RETRY)));
            }
        }
    }

    fn accept_ended(&mut self, index: usize, result: i32) {
        let Some(state) = self.listening.states.get_mut(index) else { return };
        match (state.fate, self.drain_until) {
            (Fate::Closes, _) => state.end(),
            (Fate::Drains, _) | (Fate::Serves, Some(_)) => self.accept_rest(index, result),
            (Fate::Serves, None) => state.accept = Accept::Idle,
        }
    }

    /// Draining: whoever the kernel has connected already is still let in, then the door is shut.
    fn accept_rest(&mut self, index: usize, result: i32) {
        // The connection that `result` may stand for has no slot in the count yet.
        let has_room = self.slab.occupied() + 1 < self.setup.share.flows_max;
        let into = self.listening.into;
        let Some(state) = self.listening.states.get_mut(index) else { return };
        let is_empty = state.accept == Accept::Last && result < 0;
        let Some(fd) = state.fd.as_ref().filter(|_| !is_empty && has_room && state.rest > 0) else {
            return state.end();
        };
        state.accept = Accept::Last;
        state.rest -= 1;
        self.ring.accept_waiting(token(index), fd.as_fd(), into);
    }

    fn may_accept(&mut self) -> bool {
        let now = self.clock.now();
        if self.listening.retry_at.is_some_and(|at| at <= now) {
            self.listening.retry_at = None;
        }
        self.drain_until.is_none()
            && self.listening.retry_at.is_none()
            && self.listening.parked.is_empty()
            && self.slab.occupied() < self.setup.share.flows_max
            && self.listening.connects_pending < self.setup.share.connects_pending_max
    }

    /// Every connection that waits in an accept queue could be taken at once: only then may the
    /// kernel accept on its own, because what has no slot is dropped. A descriptor needs none.
    fn has_room_for_queues(&self) -> bool {
        let queued = u64::from(self.setup.profile.limits.backlog) * 2 + BATCH_MAX;
        let listeners = self.listening.states.len() as u64;
        let room = u64::from(self.setup.share.flows_max - self.slab.occupied());
        self.listening.into == AcceptInto::Descriptors || room > queued * listeners
    }

    /// A plain listener's connection: the kernel has put it into `slot` already.
    fn serve_slot(&mut self, slot: FlowId, listener: u16) {
        if let Some(denied) = self.listening.denies(listener) {
            self.count_denied(denied);
            return self.ring.close(slot, Side::Downstream, true);
        }
        let key = self.key_in(slot, listener);
        let Destination { endpoint, service, upstream, .. } = match self.service_of(listener, key) {
            Ok(destination) => destination,
            Err(denied) => {
                self.count_denied(denied);
                return self.ring.close(slot, Side::Downstream, true);
            }
        };
        self.began(listener);
        let peers = Peers {
            downstream: None,
            endpoint,
            listener,
            original_dst: None,
            service,
            source: None,
            upstream,
        };
        self.open(slot, peers, None);
    }

    fn serve_parked(&mut self) {
        while self.has_room() {
            let Some((listener, fd)) = self.listening.parked.pop_front() else { return };
            self.serve(listener, fd);
        }
    }

    /// A connection that we hold by descriptor, because its addresses matter.
    fn serve(&mut self, listener: u16, fd: OwnedFd) {
        if !self.has_room() {
            return self.listening.parked.push_back((listener, fd));
        }
        if let Some(denied) = self.listening.denies(listener) {
            return self.deny(denied, &fd);
        }
        let Ok(downstream) = socket::peer_name(fd.as_fd()).map(Downstream::new) else {
            return; // It was reset while it waited: nobody is left to answer.
        };
        if !self.listening.sources.enter(downstream.addr().ip()) {
            return self.deny(Denied::SourceLimit, &fd);
        }
        if self.listening.is_named(listener) {
            return self.wait_for_request(listener, downstream, fd);
        }
        let entered = self.enter(listener);
        let destination = entered.and_then(|()| self.destination(listener, downstream, fd.as_fd()));
        let destination = match destination {
            Ok(destination) => destination,
            Err(denied) => {
                self.listening.sources.leave(downstream.addr().ip());
                return self.deny(denied, &fd);
            }
        };
        let Some(slot) = self.slab.reserve() else { return };
        self.begin(slot, fd, listener, downstream, destination);
    }

    /// A connection whose destination is known becomes a flow.
    pub(super) fn begin(
        &mut self,
        slot: FlowId,
        fd: OwnedFd,
        listener: u16,
        downstream: Downstream,
        destination: Destination,
    ) {
        self.began(listener);
        self.ring.adopt(slot, fd);
        let Destination { endpoint, original_dst, service, source, upstream } = destination;
        let lead = original_dst.and_then(|dst| self.header(listener, downstream, dst));
        let downstream = Some(downstream.addr());
        let peers =
            Peers { downstream, endpoint, listener, original_dst, service, source, upstream };
        self.open(slot, peers, lead);
    }

    /// A connection can become a flow: it may need a header too.
    fn has_room(&self) -> bool {
        self.slab.has_free() && self.ring.has_header()
    }

    /// What the upstream is told first, if its listener says so.
    fn header(
        &mut self,
        listener: u16,
        from: Downstream,
        original_dst: SocketAddr,
    ) -> Option<Segment> {
        let state = self.listening.states.get(usize::from(listener))?;
        let to = OriginalDst::new(original_dst);
        let header = Header::new(state.proxy_protocol, from, to)?;
        self.ring.lend_header(header.bytes())
    }

    pub(super) fn began(&mut self, listener: u16) {
        if let Some(state) = self.listening.states.get_mut(usize::from(listener)) {
            state.flows += 1;
        }
        let origin = self.listening.origin(listener) as usize;
        if let Some(counter) = self.counters.flows_opened.get(origin) {
            counter.add(1);
        }
    }

    pub(super) fn deny(&mut self, why: Denied, fd: &OwnedFd) {
        self.count_denied(why);
        // Closing `fd` after this sends RST. If even that fails, closing it sends FIN.
        let _ = socket::set_reset_on_close(fd.as_fd());
    }

    fn count_denied(&self, why: Denied) {
        if let Some(counter) = self.counters.denied.get(why as usize) {
            counter.add(1);
        }
    }
}

impl Listening {
    /// Takes the listeners out of `setup`.
    pub(super) fn new(setup: &mut Setup) -> Listening {
        let into = into(setup);
        let (source_ports, backlog) = (setup.source_ports.clone(), setup.profile.limits.backlog);
        let parked_max = match into {
            AcceptInto::Slots => 0,
            // An accept can hand over no more than the ring has room to say.
            AcceptInto::Descriptors => setup.profile.ring.completions as usize * 2,
        };
        Listening {
            connects_pending: 0,
            into,
            parked: VecDeque::with_capacity(parked_max),
            retry_at: None,
            source_ports,
            sources: Sources::new(setup.share.flows_per_source_max, setup.share.flows_max),
            states: setup.listeners.drain(..).map(|one| State::new(one, backlog)).collect(),
        }
    }

    /// When to try again after an error, in ticks.
    pub(super) const fn retry_at(&self) -> Option<u32> {
        self.retry_at
    }

    pub(super) fn connect_began(&mut self) {
        self.connects_pending += 1;
    }

    pub(super) fn connect_ended(&mut self) {
        self.connects_pending -= 1;
    }

    pub(super) fn flow_ended(&mut self, peers: &Peers) {
        if let Some(state) = self.states.get_mut(usize::from(peers.listener)) {
            state.flows -= 1;
        }
        let Some(downstream) = peers.downstream else { return };
        self.sources.leave(downstream.ip());
        if let Some(source) = peers.source {
            self.source_ports.leave(source, peers.upstream);
            self.source_ports.leave(downstream, peers.upstream);
        }
    }

    /// The listener that serves there.
    pub(super) fn index_of(&self, place: u32, addr: SocketAddr) -> Option<usize> {
        let is_it = |state: &State| state.serves_at(place, addr) && !state.is_lent;
        self.states.iter().position(is_it)
    }

    /// Whether listener `index` lives in `place`.
    pub(super) fn lives_in(&self, index: usize, place: u32) -> bool {
        self.states.get(index).is_some_and(|state| state.place.number == place)
    }

    /// Nothing of `place` is held any more.
    pub(super) fn forget(&mut self, place: u32, home: &Arc<Place>) {
        for state in self.states.iter_mut().filter(|state| state.place.number == place) {
            state.place = Arc::clone(home);
        }
    }

    /// Listeners that are over hold no place but `home`; true if one did.
    pub(super) fn leave_places(&mut self, home: &Arc<Place>) -> bool {
        let left = |state: &&mut State| state.place.number != home.number && state.is_vacant();
        let mut any = false;
        for state in self.states.iter_mut().filter(left) {
            state.place = Arc::clone(home);
            any = true;
        }
        any
    }

    pub(super) fn workload(&self, listener: u16) -> Arc<str> {
        let state = self.states.get(usize::from(listener));
        state.map_or_else(Arc::default, |state| Arc::clone(&state.workload))
    }

    pub(super) fn origin(&self, listener: u16) -> Origin {
        self.states.get(usize::from(listener)).map_or(Origin::Forward, |state| state.origin)
    }

    /// A client that was counted has gone before it was a flow.
    pub(super) fn sources_leave(&mut self, downstream: Downstream) {
        self.sources.leave(downstream.addr().ip());
    }

    /// Its connections say first where they go.
    fn is_named(&self, listener: u16) -> bool {
        let state = self.states.get(usize::from(listener));
        state.is_some_and(|state| matches!(state.route, Route::Named))
    }

    /// Some listener's connections say first where they go.
    pub(super) fn has_named(&self) -> bool {
        self.states.iter().any(|state| matches!(state.route, Route::Named))
    }

    /// Nothing will be accepted any more, and nothing that was accepted waits.
    pub(super) fn is_over(&self) -> bool {
        self.parked.is_empty() && self.states.iter().all(|state| state.accept == Accept::Over)
    }

    /// Whether this worker hands out slots itself.
    pub(super) fn hands_out_slots(&self) -> bool {
        self.into == AcceptInto::Descriptors
    }

    /// Counts a connection, and says why it cannot be served: it has gone round in a loop, or came
    /// for a workload that is gone.
    fn denies(&mut self, listener: u16) -> Option<Denied> {
        let state = self.states.get_mut(usize::from(listener))?;
        if state.fate == Fate::Closes {
            return Some(Denied::Namespace);
        }
        state.loops.arrives().then_some(Denied::Looped)
    }

    /// One more listener, in the place of one that is over if there is one.
    pub(super) fn push(&mut self, state: State) {
        match self.vacant() {
            Some(vacant) => *vacant = state,
            None => self.states.push(state),
        }
    }

    /// A listener that is over, and of which nobody knows any more.
    fn vacant(&mut self) -> Option<&mut State> {
        let parked = &self.parked;
        let is_known = |index| parked.iter().any(|(listener, _)| usize::from(*listener) == index);
        let mut states = self.states.iter_mut().enumerate();
        let vacant = states.find(|(index, state)| state.is_vacant() && !is_known(*index));
        vacant.map(|(_, state)| state)
    }

    /// How long no listener needs to be looked at for a loop.
    pub(super) fn looping(&self, now: Duration) -> Option<Duration> {
        self.states.iter().filter_map(|state| state.loops.patience(now)).min()
    }

    fn is_armed(&self) -> bool {
        let mut serving = self.states.iter().filter(|state| state.fate == Fate::Serves);
        serving.all(|state| {
            matches!(state.accept, Accept::Many | Accept::One) || state.loops.is_paused()
        })
    }

    fn ones(&self) -> u32 {
        let ones = self.states.iter().filter(|state| state.accept == Accept::One);
        u32::try_from(ones.count()).unwrap_or(u32::MAX)
    }
}

/// Slots where nobody needs to look at the socket; descriptors where its addresses decide.
fn into(setup: &Setup) -> AcceptInto {
    let plain = |listener: &Listener| match listener.route {
        Route::Service { balance, .. } => balance != Balance::ConsistentHash,
        _ => false,
    };
    if setup.share.flows_per_source_max == 0 && setup.listeners.iter().all(plain) {
        AcceptInto::Slots
    } else {
        AcceptInto::Descriptors
    }
}

fn token(index: usize) -> Token {
    Token::new(Kind::Accept, FlowId::new(u32::try_from(index).unwrap_or(u32::MAX)), 0)
}

/// Connections whose events the worker has not seen yet: one turn's worth.
const BATCH_MAX: u64 = 256;
/// After EMFILE or ENFILE: long enough not to spin, short enough not to be noticed.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
