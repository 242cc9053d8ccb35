// SPDX-License-Identifier: Apache-2.0
//! Which port to dial from under a client's address.
//!
//! The workload's socket of such a flow has the same address pair as one of the client's own
//! connections, except for this port. So it must be a port that no live connection of the client
//! has, now or later: it comes from a range below the usual ephemeral ports, a worker takes only
//! its own part of the range, and ports seen in use are passed over.
//! No lock; workers share only counters.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

/// How many live connections have a client's address and port, by their hash; shared by all
/// workers. Two addresses that share a place cost a port, never a mistake.
#[derive(Debug)]
pub struct PortCounts {
    places: Box<[AtomicU16]>,
}

/// One worker's way to choose.
#[derive(Clone, Debug)]
pub struct SourcePorts {
    counts: Arc<PortCounts>,
    next: u16,
    step: u16,
}

impl PortCounts {
    /// All zero.
    #[must_use]
    pub fn new() -> Arc<PortCounts> {
        let places = (0..PLACES).map(|_| AtomicU16::new(0)).collect();
        Arc::new(PortCounts { places })
    }

    fn place(&self, addr: SocketAddr) -> Option<&AtomicU16> {
        let mut hasher = DefaultHasher::new();
        (addr.ip(), addr.port()).hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % PLACES).ok()?;
        self.places.get(index)
    }
}

impl SourcePorts {
    /// For worker `index` of `workers`.
    #[must_use]
    pub fn new(counts: Arc<PortCounts>, index: u16, workers: u16) -> SourcePorts {
        SourcePorts { counts, next: RANGE.start() + index, step: workers.max(1) }
    }

    /// Counts a connection that a client made from `addr`.
    pub fn enter(&self, addr: SocketAddr) {
        if let Some(place) = self.counts.place(addr) {
            place.fetch_add(1, Relaxed);
        }
    }

    /// The connection from `addr`, the client's or ours, has ended.
    pub fn leave(&self, addr: SocketAddr) {
        if let Some(place) = self.counts.place(addr) {
            place.fetch_sub(1, Relaxed);
        }
    }

    /// A port to dial from as `client`, counted; `None` if none of the next few is free. One after
    /// the other, so that a port rests as long as possible before it is used again.
    pub fn choose(&mut self, client: IpAddr) -> Option<SocketAddr> {
        for _ in 0..TRIES {
            let addr = SocketAddr::new(client, self.advance());
            let place = self.counts.place(addr)?;
            if place.fetch_add(1, Relaxed) == 0 {
                return Some(addr);
            }
            place.fetch_sub(1, Relaxed);
        }
        None
    }

    fn advance(&mut self) -> u16 {
        let port = self.next;
        let next = port.saturating_add(self.step);
        let first = RANGE.start() + (port - RANGE.start()) % self.step;
        self.next = if RANGE.contains(&next) { next } else { first };
        port
    }
}

/// Below the ephemeral range of Linux (32768 to 60999), above what services usually listen on.
const RANGE: RangeInclusive<u16> = 10_240..=32_767;
/// 128 KiB; with 20,000 live connections a third of the tries is passed over.
const PLACES: u64 = 65_536;
/// Ports looked at before giving up; bounds the work of one accept.
const TRIES: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    #[test]
    fn two_workers_never_choose_the_same_port() {
        let counts = PortCounts::new();
        let mut workers: Vec<_> =
            (0..2).map(|index| SourcePorts::new(Arc::clone(&counts), index, 2)).collect();
        let mut seen = HashSet::new();
        for _ in 0..5_000 {
            for worker in &mut workers {
                assert!(seen.insert(worker.choose(CLIENT).unwrap()));
            }
        }
    }

    #[test]
    fn port_of_a_live_connection_of_the_client_is_passed_over() {
        let mut ports = SourcePorts::new(PortCounts::new(), 0, 1);
        let taken = SocketAddr::new(CLIENT, *RANGE.start());
        ports.enter(taken);
        assert_ne!(ports.choose(CLIENT), Some(taken));
        ports.leave(taken);
        ports.next = *RANGE.start();
        assert_eq!(ports.choose(CLIENT), Some(taken));
    }

    #[test]
    fn range_is_walked_round_and_exhaustion_is_said() {
        let mut ports = SourcePorts::new(PortCounts::new(), 1, 2);
        let all = RANGE.len() / 2;
        let chosen: HashSet<_> =
            std::iter::from_fn(|| ports.choose(CLIENT)).take(all * 4).collect();
        assert!(chosen.len() > all / 2 && chosen.len() <= all, "{}", chosen.len());
        assert!(chosen.iter().all(|addr| addr.port() % 2 == 1));
        assert_eq!(ports.choose(CLIENT), None);
    }
}
