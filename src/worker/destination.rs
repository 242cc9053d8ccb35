// SPDX-License-Identifier: Apache-2.0
//! Where an accepted connection goes, and from which address it is dialled.
//!
//! Invariant: a destination is read or recorded, never guessed; what would loop goes nowhere.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use super::accept::Listening;
use super::breaker::Pair;
use super::slab::Peers;
use super::turn::Worker;
use super::{Route, Source};
use crate::addr::{Downstream, OriginalDst};
use crate::config::Balance;
use crate::metrics::Denied;
use crate::op::{Errno, FlowId, Kind, Side, Timer, Token};
use crate::sys::socket;

/// Where an accepted connection goes.
pub(super) struct Destination {
    pub(super) endpoint: u16,
    pub(super) original_dst: Option<SocketAddr>,
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
            Route::Endpoints { .. } => return self.endpoint(listener),
            Route::Recorded(records) => (records.take(downstream), false),
            Route::Socket { source, .. } => {
                (socket::local_name(fd).ok().map(OriginalDst::new), *source != Source::Own)
            }
        };
        let dst = dst.ok_or(Denied::UnknownDestination)?.addr();
        if self.setup.own_ports.forbids(dst) {
            let is_direct = dst.port() == state.port;
            return Err(if is_direct { Denied::Direct } else { Denied::OwnPort });
        }
        let from = keeps.then_some(downstream.addr());
        self.refuse_tripped(Pair { from: from.map(|from| from.ip()), to: dst })?;
        let source = from.map(|from| self.source_of(listener, from, dst)).transpose()?;
        Ok(Destination { endpoint: 0, original_dst: Some(dst), source, upstream: dst })
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

    /// The next endpoint of a plain listener.
    pub(super) fn endpoint(&mut self, listener: u16) -> Result<Destination, Denied> {
        let chosen = self.listening.pick(listener).ok_or(Denied::UnknownDestination)?;
        let destination = Destination {
            endpoint: chosen.0,
            original_dst: None,
            source: None,
            upstream: chosen.1,
        };
        let tripped = self.refuse_tripped(Pair { from: None, to: destination.upstream });
        tripped.inspect_err(|_| self.listening.unpick(listener, destination.endpoint))?;
        Ok(destination)
    }

    fn refuse_tripped(&self, pair: Pair) -> Result<(), Denied> {
        if self.breaker.refuses(pair, self.clock.now()) { Err(Denied::SourcePorts) } else { Ok(()) }
    }

    /// Dials again from another port if the one chosen is still taken, as one that lingers in
    /// TIME_WAIT is; false if the failure is the flow's to see.
    pub(super) fn redial(&mut self, slot: FlowId, errno: Errno) -> bool {
        let Some(entry) = self.slab.entry(slot) else { return false };
        let is_taken = matches!(errno.0, libc::EADDRINUSE | libc::EADDRNOTAVAIL);
        if !is_taken || entry.times.timer != Some(Timer::Connect) {
            return false;
        }
        let Peers { listener, source: old, upstream, .. } = entry.peers;
        let old = old.filter(|_| entry.redials < REDIALS_MAX);
        let new = old.and_then(|old| self.listening.choose_source(listener, old.ip(), upstream));
        let (Some(old), Some(new)) = (old, new) else {
            let from = entry.peers.source.map(|source| source.ip());
            self.breaker.trip(Pair { from, to: upstream }, self.clock.now());
            return false;
        };
        self.listening.source_ports.leave(old, upstream);
        entry.redials += 1;
        entry.peers.source = Some(new);
        let token = Token::new(Kind::Connect, slot, entry.generation);
        self.ring.close(slot, Side::Upstream, true);
        self.ring.dial(token, upstream, Some(new));
        true
    }
}

impl Listening {
    /// The next endpoint of a plain listener, counted.
    fn pick(&mut self, listener: u16) -> Option<(u16, SocketAddr)> {
        let state = self.states.get_mut(usize::from(listener))?;
        let Route::Endpoints { balance, endpoints } = &state.route else { return None };
        let chosen = match balance {
            Balance::RoundRobin => state.next_endpoint % endpoints.len(),
            Balance::LeastFlows => least(&state.endpoint_flows, state.next_endpoint)?,
        };
        state.next_endpoint = chosen + 1;
        *state.endpoint_flows.get_mut(chosen)? += 1;
        Some((u16::try_from(chosen).ok()?, *endpoints.get(chosen)?))
    }

    /// An address of the client to dial from, if this listener's upstreams shall see the client.
    fn choose_source(
        &mut self,
        listener: u16,
        client: IpAddr,
        to: SocketAddr,
    ) -> Option<SocketAddr> {
        let Some(Route::Socket { source: Source::Keep(range), .. }) =
            self.states.get(usize::from(listener)).map(|state| &state.route)
        else {
            return None;
        };
        self.source_ports.choose(range, client, to)
    }
}

/// The index of the smallest count; among equals the first from `start` on.
fn least(counts: &[u32], start: usize) -> Option<usize> {
    (0..counts.len())
        .map(|step| (start + step) % counts.len())
        .min_by_key(|index| counts.get(*index).copied())
}

/// Ports tried for one flow; each is a connect that fails at once.
const REDIALS_MAX: u8 = 32;
