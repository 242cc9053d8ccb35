// SPDX-License-Identifier: Apache-2.0
//! Connections that say first what they are: they wait here until it is known, and become flows or
//! exchanges then.
//!
//! The bytes are only peeked at and stay in the socket: they are read then as if nobody had looked,
//! whatever its relay. A connection that waits holds a slot, so there are never more than flows.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::turn::Worker;
use super::wheel::Clock;
use crate::addr::Downstream;
use crate::exchange::{Guest, guest};
use crate::metrics::Denied;
use crate::op::{FlowId, Kind, Token};
use crate::ring::Event;
use crate::service::{ServiceId, Table, key_of};
use crate::sys::socket;
use crate::wire::Stop;
use crate::wire::detect::Protocol;

/// The connections that wait, by slot.
pub(super) struct Peeking {
    buffer: Box<[u8]>,
    count: u32,
    places: Vec<Place>,
}

#[derive(Default)]
struct Place {
    generation: u32,
    waiting: Option<Waiting>,
}

struct Waiting {
    downstream: Downstream,
    fd: OwnedFd,
    listener: u16,
    /// Bytes that all looks together have seen.
    looked_at: usize,
    /// Bytes that must have come before it is worth looking again.
    needed: usize,
}

/// What a look has shown.
enum Look {
    /// Turn it away.
    Deny(Denied),
    /// Nobody is left.
    Gone,
    /// It is for this one.
    Named(ServiceId),
    /// Each of its requests says itself where it goes.
    Requests(Protocol),
    /// More must come.
    Wait,
}

impl Worker {
    /// Takes a connection in; the first bytes will say where it goes.
    pub(super) fn wait_for_request(&mut self, listener: u16, downstream: Downstream, fd: OwnedFd) {
        let Some(slot) = self.slab.reserve() else { return };
        let waiting = Waiting { downstream, fd, listener, looked_at: 0, needed: 1 };
        self.peeking.enter(slot, waiting);
        let deadline = self.clock.now().wrapping_add(Clock::ticks(REQUEST_WITHIN));
        self.wheel.set(slot.slot(), deadline);
        self.listen_to(slot);
    }

    fn listen_to(&mut self, slot: FlowId) {
        if let Some((token, waiting)) = self.peeking.of(slot) {
            self.ring.poll_once(token, waiting.fd.as_fd());
        }
    }

    /// Something came, or the client has gone.
    pub(super) fn heard(&mut self, event: Event) {
        let slot = event.token.flow();
        if self.peeking.of(slot).is_none_or(|(token, _)| token != event.token) {
            // Whoever was given up is expected to say so.
            let is_stale = event.result != -libc::ECANCELED;
            return self.counters.completions_stale.add(u64::from(is_stale));
        }
        match self.peeking.look(slot, self.services.table()) {
            Look::Wait => self.listen_to(slot),
            Look::Gone => drop(self.stop_waiting(slot, None)),
            Look::Deny(why) => drop(self.stop_waiting(slot, Some(why))),
            Look::Named(service) => self.serve_named(slot, service),
            Look::Requests(protocol) => self.serve_requests(slot, protocol),
        }
    }

    fn serve_requests(&mut self, slot: FlowId, protocol: Protocol) {
        let Some(waiting) = self.peeking.leave(slot) else { return };
        self.wheel.clear(slot.slot());
        let Waiting { downstream, fd, listener, .. } = waiting;
        let _ = socket::set_low_water(fd.as_fd(), 1);
        self.begin_exchange(slot, fd, listener, downstream, protocol);
    }

    fn serve_named(&mut self, slot: FlowId, service: ServiceId) {
        let Some((_, waiting)) = self.peeking.of(slot) else { return };
        let (listener, key) = (waiting.listener, key_of(waiting.downstream.addr().ip()));
        let entered = self.enter(listener);
        match entered.and_then(|()| self.endpoint_of(service, key)) {
            Ok(destination) => {
                let Some(waiting) = self.peeking.leave(slot) else { return };
                self.wheel.clear(slot.slot());
                let Waiting { downstream, fd, .. } = waiting;
                // The flow's own receives are not to wait for more than a byte.
                let _ = socket::set_low_water(fd.as_fd(), 1);
                self.begin(slot, fd, listener, downstream, destination);
            }
            Err(why) => drop(self.stop_waiting(slot, Some(why))),
        }
    }

    /// Its time is over; false if nobody waits in this slot.
    pub(super) fn is_given_up(&mut self, slot: FlowId) -> bool {
        let Some((token, _)) = self.peeking.of(slot) else { return false };
        self.ring.cancel(token);
        self.stop_waiting(slot, Some(Denied::NoRequest)).is_some()
    }

    /// All of them, at the end of a drain.
    pub(super) fn give_up_waiting(&mut self) {
        for slot in 0..self.peeking.slots() {
            self.is_given_up(FlowId::new(slot));
        }
    }

    fn stop_waiting(&mut self, slot: FlowId, why: Option<Denied>) -> Option<OwnedFd> {
        let Waiting { downstream, fd, .. } = self.peeking.leave(slot)?;
        self.wheel.clear(slot.slot());
        self.slab.give_back(slot);
        self.listening.sources_leave(downstream);
        if let Some(why) = why {
            self.deny(why, &fd);
        }
        Some(fd)
    }
}

impl Peeking {
    /// For so many slots; for none where no listener needs it.
    pub(super) fn new(slots: u32) -> Peeking {
        let bytes = if slots == 0 { 0 } else { PEEK_BYTES_MAX };
        let mut places = Vec::new();
        places.resize_with(slots as usize, Place::default);
        Peeking { buffer: vec![0; bytes].into_boxed_slice(), count: 0, places }
    }

    /// Nobody waits.
    pub(super) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn slots(&self) -> u32 {
        u32::try_from(self.places.len()).unwrap_or(0)
    }

    fn enter(&mut self, slot: FlowId, waiting: Waiting) {
        let Some(place) = self.places.get_mut(slot.index()) else { return };
        place.generation = place.generation.wrapping_add(1);
        place.waiting = Some(waiting);
        self.count += 1;
    }

    fn leave(&mut self, slot: FlowId) -> Option<Waiting> {
        let waiting = self.places.get_mut(slot.index())?.waiting.take()?;
        self.count -= 1;
        Some(waiting)
    }

    fn of(&self, slot: FlowId) -> Option<(Token, &Waiting)> {
        let place = self.places.get(slot.index())?;
        let token = Token::new(Kind::Peek, slot, place.generation);
        place.waiting.as_ref().map(|waiting| (token, waiting))
    }

    fn look(&mut self, slot: FlowId, table: &Table) -> Look {
        let Peeking { buffer, places, .. } = self;
        let waiting = places.get_mut(slot.index()).and_then(|place| place.waiting.as_mut());
        let Some(waiting) = waiting else { return Look::Gone };
        let len = match socket::peek(waiting.fd.as_fd(), buffer) {
            Ok(0) => return Look::Gone,
            Ok(len) => len,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Look::Wait,
            Err(_) => return Look::Gone,
        };
        match guest(buffer.get(..len).unwrap_or_default(), table) {
            Ok(Guest::Requests(protocol)) => Look::Requests(protocol),
            Ok(Guest::Connection(Some(service))) => Look::Named(service),
            Ok(Guest::Connection(None)) | Err(Stop::Bad(_) | Stop::NotMine) => {
                Look::Deny(Denied::UnknownService)
            }
            // Readable below the low-water mark: no more will come.
            Err(Stop::NeedMore(_)) if len < waiting.needed => Look::Deny(Denied::NoRequest),
            Err(Stop::NeedMore(needed)) if needed > PEEK_BYTES_MAX => {
                Look::Deny(Denied::UnknownService)
            }
            Err(Stop::NeedMore(_)) if waiting.is_worn_out(len) => Look::Deny(Denied::NoRequest),
            Err(Stop::NeedMore(needed)) => {
                waiting.needed = needed;
                match socket::set_low_water(waiting.fd.as_fd(), needed) {
                    Ok(()) => Look::Wait,
                    Err(_) => Look::Gone,
                }
            }
        }
    }
}

impl Waiting {
    /// Each look begins at the first byte: who sends a long request byte by byte would cost more than
    /// a hundred others.
    fn is_worn_out(&mut self, len: usize) -> bool {
        self.looked_at += len;
        self.looked_at > LOOKS_BYTES_MAX
    }
}

/// From accept to the end of what names the service.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// The longest of what the parsers may ask for, and room behind it.
const PEEK_BYTES_MAX: usize = 96 * 1024;
/// Of all looks at one connection: room for the longest request in some forty pieces, and for one of
/// 2,000 bytes in as many.
const LOOKS_BYTES_MAX: usize = 4 << 20;
