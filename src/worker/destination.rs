// SPDX-License-Identifier: Apache-2.0
//! Where an accepted connection goes, and from which address it is dialled.
//!
//! Invariant: a destination is read or recorded, never guessed; what would loop goes nowhere.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use super::Route;
use super::turn::Worker;
use crate::addr::{Downstream, OriginalDst};
use crate::config::{Balance, SourceAddress};
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
        let (dst, source) = match &state.route {
            Route::Endpoints { .. } => {
                return self.endpoint(listener).ok_or(Denied::UnknownDestination);
            }
            Route::Recorded(records) => (records.take(downstream), SourceAddress::Own),
            Route::Socket { source, .. } => {
                (socket::local_name(fd).ok().map(OriginalDst::new), *source)
            }
        };
        let dst = dst.ok_or(Denied::UnknownDestination)?.addr();
        if self.setup.own_ports.forbids(dst) {
            let is_direct = dst.port() == state.port;
            return Err(if is_direct { Denied::Direct } else { Denied::OwnPort });
        }
        let source = match source {
            SourceAddress::Keep => Some(self.source_of(downstream)?),
            SourceAddress::Own => None,
        };
        Ok(Destination { endpoint: 0, original_dst: Some(dst), source, upstream: dst })
    }

    /// The client's address, with a port that is free on both sides.
    fn source_of(&mut self, downstream: Downstream) -> Result<SocketAddr, Denied> {
        let client = downstream.addr();
        let ports = &mut self.listening.source_ports;
        let source = ports.choose(client.ip()).ok_or(Denied::SourcePorts)?;
        ports.enter(client);
        Ok(source)
    }

    /// The next endpoint of a plain listener.
    pub(super) fn endpoint(&mut self, listener: u16) -> Option<Destination> {
        let state = self.listening.states.get_mut(usize::from(listener))?;
        let Route::Endpoints { balance, endpoints } = &state.route else { return None };
        let chosen = match balance {
            Balance::RoundRobin => state.next_endpoint % endpoints.len(),
            Balance::LeastFlows => least(&state.endpoint_flows, state.next_endpoint)?,
        };
        state.next_endpoint = chosen + 1;
        *state.endpoint_flows.get_mut(chosen)? += 1;
        Some(Destination {
            endpoint: u16::try_from(chosen).ok()?,
            original_dst: None,
            source: None,
            upstream: *endpoints.get(chosen)?,
        })
    }

    /// Dials again from another port if the one chosen is still taken, as one that lingers in
    /// TIME_WAIT is; false if the failure is the flow's to see.
    pub(super) fn redial(&mut self, slot: FlowId, errno: Errno) -> bool {
        let Some(entry) = self.slab.entry(slot) else { return false };
        let is_taken = matches!(errno.0, libc::EADDRINUSE | libc::EADDRNOTAVAIL);
        let is_waiting = entry.times.timer == Some(Timer::Connect);
        let Some(old) = entry.peers.source.filter(|_| is_taken && is_waiting) else { return false };
        if entry.redials == REDIALS_MAX {
            return false;
        }
        let ports = &mut self.listening.source_ports;
        let Some(source) = ports.choose(old.ip()) else { return false };
        ports.leave(old);
        entry.redials += 1;
        entry.peers.source = Some(source);
        let (upstream, token) =
            (entry.peers.upstream, Token::new(Kind::Connect, slot, entry.generation));
        self.ring.close(slot, Side::Upstream, true);
        self.ring.dial(token, upstream, Some(source));
        true
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
