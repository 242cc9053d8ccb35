// SPDX-License-Identifier: Apache-2.0
//! Where an accepted connection goes, and from which address it is dialled.
//!
//! Invariant: a destination is read or recorded, never guessed; what would loop goes nowhere.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use super::accept::Listening;
use super::breaker::Pair;
use super::slab::{Entry, Peers};
use super::turn::Worker;
use super::{Route, Source};
use crate::addr::{Downstream, OriginalDst};
use crate::metrics::Denied;
use crate::op::{CloseReason, Completion, Errno, FlowId, Kind, Side, Timer, Token};
use crate::ring::DialFrom;
use crate::service::{Balance, EndpointId, Pick, ServiceId, key_of};
use crate::sys::socket;

/// Where an accepted connection goes.
pub(super) struct Destination {
    pub(super) endpoint: EndpointId,
    pub(super) original_dst: Option<SocketAddr>,
    pub(super) service: Option<ServiceId>,
    pub(super) source: Option<SocketAddr>,
    pub(super) upstream: SocketAddr,
}

impl Worker {
    /// Where a connection of `listener` goes, or why it goes nowhere.
    pub(super) fn destination(
        &mut self,
        listener: u16,
        downstream: Downstream,
        fd: BorrowedFd<'_>,
    ) -> Result<Destination, Denied> {
        let Some(state) = self.listening.states.get(usize::from(listener)) else {
            return Err(Denied::UnknownDestination);
        };
        let (dst, keeps) = match &state.route {
            Route::Service { .. } => {
                return self.service_of(listener, key_of(downstream.addr().ip()));
            }
            // Who asks for this one has not read its first request.
            Route::Named => return Err(Denied::UnknownService),
            Route::Recorded(records) => (records.take(downstream), false),
            Route::Rewritten { source, .. } => {
                (socket::original_dst(fd).ok().map(OriginalDst::new), *source != Source::Own)
            }
            Route::Socket { source, .. } => {
                (socket::local_name(fd).ok().map(OriginalDst::new), *source != Source::Own)
            }
        };
        let dst = dst.ok_or(Denied::UnknownDestination)?.addr();
        if state.place.own_ports.forbids(dst) {
            let is_direct = dst.port() == state.port;
            return Err(if is_direct { Denied::Direct } else { Denied::OwnPort });
        }
        if state.origin.is_outbound()
            && let Some(id) = self.services.table().at(dst)
        {
            let endpoint = self.endpoint_of(id, key_of(downstream.addr().ip()))?;
            return Ok(Destination { original_dst: Some(dst), ..endpoint });
        }
        let from = keeps.then_some(downstream.addr());
        self.refuse_tripped(Pair { from: from.map(|from| from.ip()), to: dst })?;
        let source = from.map(|from| self.source_of(listener, from, dst)).transpose()?;
        Ok(Destination {
            endpoint: EndpointId::NONE,
            original_dst: Some(dst),
            service: None,
            source,
            upstream: dst,
        })
    }

    /// The client's address, with a port that is free on both sides.
    fn source_of(
        &mut self,
        listener: u16,
        client: SocketAddr,
        dst: SocketAddr,
    ) -> Result<SocketAddr, Denied> {
        let source = self.listening.choose_source(listener, client.ip(), dst);
        let source = source.ok_or(Denied::SourcePorts)?;
        self.listening.source_ports.enter(client, dst);
        Ok(source)
    }

    /// What a client in a slot hashes to, where that matters. A listener that began with consistent
    /// hashing gets its connections by descriptor, one that a reload has brought to it does not: asking
    /// the ring costs it a syscall or two for each.
    pub(super) fn key_in(&mut self, slot: FlowId, listener: u16) -> u64 {
        let route = self.listening.states.get(usize::from(listener)).map(|state| &state.route);
        match route {
            Some(Route::Service { balance: Balance::ConsistentHash, .. }) => {
                self.ring.peer_name(slot, Side::Downstream).map_or(0, |name| key_of(name.ip()))
            }
            _ => 0,
        }
    }

    /// The next endpoint of a listener's service, for a client whose address hashes to `key`.
    pub(super) fn service_of(&mut self, listener: u16, key: u64) -> Result<Destination, Denied> {
        let state = self.listening.states.get(usize::from(listener));
        let Some(Route::Service { id, .. }) = state.map(|state| &state.route) else {
            return Err(Denied::UnknownDestination);
        };
        self.endpoint_of(*id, key)
    }

    /// The next endpoint of a service.
    pub(super) fn endpoint_of(&mut self, id: ServiceId, key: u64) -> Result<Destination, Denied> {
        let pick = self.services.pick(id, key, self.clock.instant()).ok_or(Denied::NoEndpoint)?;
        let Pick { addr, endpoint, .. } = pick;
        let tripped = self.refuse_tripped(Pair { from: None, to: addr });
        tripped.inspect_err(|_| self.services.ended(endpoint))?;
        let service = Some(id);
        Ok(Destination { endpoint, original_dst: None, service, source: None, upstream: addr })
    }

    fn refuse_tripped(&self, pair: Pair) -> Result<(), Denied> {
        if self.breaker.refuses(pair, self.clock.now()) { Err(Denied::SourcePorts) } else { Ok(()) }
    }

    /// Notes what became of a connect; dials again where that may help: from another port, or to
    /// another endpoint. Not one byte has gone out yet. False if it is the flow's to see.
    pub(super) fn is_redialled(&mut self, slot: FlowId, completion: Completion) -> bool {
        match completion {
            Completion::Connected(Ok(())) => {
                if let Some(entry) = self.slab.entry(slot) {
                    self.services.connected(entry.peers.endpoint);
                }
                false
            }
            Completion::Connected(Err(errno)) => {
                self.is_redialled_from(slot, errno) || self.is_redialled_to(slot, errno)
            }
            Completion::Expired(Timer::Connect) => {
                self.note_failure(slot);
                false
            }
            _ => false,
        }
    }

    /// From another port if the one chosen is still taken, as one that lingers in TIME_WAIT is.
    fn is_redialled_from(&mut self, slot: FlowId, errno: Errno) -> bool {
        let Some(entry) = self.slab.entry(slot) else { return false };
        let is_taken = matches!(errno.0, libc::EADDRINUSE | libc::EADDRNOTAVAIL);
        if !is_taken || entry.times.timer != Some(Timer::Connect) {
            return false;
        }
        let Peers { listener, source: old, upstream, .. } = entry.peers;
        if self.enter(listener).is_err() {
            return false;
        }
        let Some(entry) = self.slab.entry(slot) else { return false };
        let old = old.filter(|_| entry.redials < REDIALS_MAX);
        let new = old.and_then(|old| self.listening.choose_source(listener, old.ip(), upstream));
        let (Some(old), Some(new)) = (old, new) else {
            let from = entry.peers.source.map(|source| source.ip());
            self.breaker.trip(Pair { from, to: upstream }, self.clock.now());
            return false;
        };
        self.listening.source_ports.leave(old, upstream);
        entry.peers.source = Some(new);
        self.redial(slot);
        true
    }

    /// To another endpoint, unless none is in use.
    fn is_redialled_to(&mut self, slot: FlowId, errno: Errno) -> bool {
        let Some(entry) = self.slab.entry(slot) else { return false };
        let (peers, may_redial) = (entry.peers, entry.may_redial());
        let is_local = matches!(CloseReason::of_connect(errno), CloseReason::LocalLimit);
        let Some(id) = peers.service else { return false };
        if is_local || errno.0 == libc::ECANCELED {
            return false;
        }
        self.note_failure(slot);
        if !may_redial || self.enter(peers.listener).is_err() {
            return false;
        }
        let key = peers.downstream.map_or(0, |downstream| key_of(downstream.ip()));
        let Some(pick) = self.services.pick(id, key, self.clock.instant()) else { return false };
        if pick.is_last_resort {
            self.services.ended(pick.endpoint);
            return false;
        }
        self.services.ended(peers.endpoint);
        let Some(entry) = self.slab.entry(slot) else { return false };
        (entry.peers.endpoint, entry.peers.upstream) = (pick.endpoint, pick.addr);
        self.counters.connects_retried.add(1);
        self.redial(slot);
        true
    }

    fn note_failure(&mut self, slot: FlowId) {
        let Some(entry) = self.slab.entry(slot) else { return };
        let is_news = self.services.failed(entry.peers.endpoint, self.clock.instant());
        self.counters.endpoints_ejected.add(u64::from(is_news));
    }

    fn redial(&mut self, slot: FlowId) {
        let Some(entry) = self.slab.entry(slot) else { return };
        entry.redials += 1;
        let Peers { listener, source, upstream, .. } = entry.peers;
        let token = Token::new(Kind::Connect, slot, entry.generation);
        self.ring.close(slot, Side::Upstream, true);
        let from = self.listening.dial_from(listener, source, upstream);
        self.ring.dial(token, upstream, from);
    }
}

impl Listening {
    /// How to dial `to` from `source`. Who is here answers through us; what is abroad is reached by the
    /// ordinary way.
    pub(super) fn dial_from(
        &self,
        listener: u16,
        source: Option<SocketAddr>,
        to: SocketAddr,
    ) -> Option<DialFrom> {
        let route = self.states.get(usize::from(listener)).map(|state| &state.route);
        let any = matches!(route, Some(Route::Socket { any_destination: true, .. }));
        source.map(|addr| DialFrom { abroad: any && !socket::is_local_address(to.ip()), addr })
    }

    /// An address of the client to dial from, if this listener's upstreams shall see the client.
    fn choose_source(
        &mut self,
        listener: u16,
        client: IpAddr,
        to: SocketAddr,
    ) -> Option<SocketAddr> {
        let Some(
            Route::Rewritten { source: Source::Keep(range), .. }
            | Route::Socket { source: Source::Keep(range), .. },
        ) = self.states.get(usize::from(listener)).map(|state| &state.route)
        else {
            return None;
        };
        self.source_ports.choose(range, client, to)
    }
}

impl Entry {
    /// It still waits for its upstream, and was not dialled too often.
    fn may_redial(&self) -> bool {
        self.times.timer == Some(Timer::Connect) && self.redials < REDIALS_MAX
    }
}

/// Ports or endpoints tried for one flow; its connect timer bounds the time.
const REDIALS_MAX: u8 = 32;
