// SPDX-License-Identifier: Apache-2.0
//! Which port to dial from under a client's address.
//!
//! The workload's socket of such a flow has the same address pair as one of the client's own
//! connections, except for this port. So it must be a port that no live connection of the client to
//! the same destination has, now or later: it comes from a range below the usual ephemeral ports, a
//! worker takes only its own part of the range, and ports seen in use are passed over.
//! No lock; workers share only counters.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

/// How many live connections have a client's address and port and a destination, by their hash;
/// shared by all workers. Two that share a place cost a port, never a mistake.
#[derive(Debug)]
pub struct PortCounts {
    places: Box<[AtomicU16]>,
}

/// One worker's way to choose.
#[derive(Clone, Debug)]
pub struct SourcePorts {
    counts: Arc<PortCounts>,
    index: u16,
    turn: u32,
    workers: u16,
}

impl PortCounts {
    /// All zero.
    #[must_use]
    pub fn new() -> Arc<PortCounts> {
        let places = (0..PLACES).map(|_| AtomicU16::new(0)).collect();
        Arc::new(PortCounts { places })
    }

    fn place(&self, from: SocketAddr, to: SocketAddr) -> Option<&AtomicU16> {
        let mut hasher = DefaultHasher::new();
        (from.ip(), from.port(), to).hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % PLACES).ok()?;
        self.places.get(index)
    }
}

impl SourcePorts {
    /// For worker `index` of `workers`.
    #[must_use]
    pub fn new(counts: Arc<PortCounts>, index: u16, workers: u16) -> SourcePorts {
        SourcePorts { counts, index, turn: 0, workers: workers.max(1) }
    }

    /// Counts a connection that a client made.
    pub fn enter(&self, from: SocketAddr, to: SocketAddr) {
        if let Some(place) = self.counts.place(from, to) {
            place.fetch_add(1, Relaxed);
        }
    }

    /// The connection, the client's or ours, has ended.
    pub fn leave(&self, from: SocketAddr, to: SocketAddr) {
        if let Some(place) = self.counts.place(from, to) {
            place.fetch_sub(1, Relaxed);
        }
    }

    /// A port of `range` to dial `to` from as `client`, counted; `None` if none of the next few is
    /// free. One after the other, so that a port rests as long as possible before it is used again.
    pub fn choose(
        &mut self,
        range: &RangeInclusive<u16>,
        client: IpAddr,
        to: SocketAddr,
    ) -> Option<SocketAddr> {
        let own = self.own_ports(range);
        for _ in 0..own.min(TRIES) {
            let from = SocketAddr::new(client, self.advance(range, own)?);
            let place = self.counts.place(from, to)?;
            if place.fetch_add(1, Relaxed) == 0 {
                return Some(from);
            }
            place.fetch_sub(1, Relaxed);
        }
        None
    }

    /// Ports of `range` that are this worker's: every `workers`-th, from `index` on.
    fn own_ports(&self, range: &RangeInclusive<u16>) -> u32 {
        let all = u32::from(range.end().saturating_sub(*range.start())) + 1;
        all.saturating_sub(u32::from(self.index)).div_ceil(u32::from(self.workers))
    }

    fn advance(&mut self, range: &RangeInclusive<u16>, own: u32) -> Option<u16> {
        let step = self.turn % own;
        self.turn = self.turn.wrapping_add(1);
        let offset = u32::from(self.index) + step * u32::from(self.workers);
        u16::try_from(u32::from(*range.start()) + offset).ok()
    }
}

/// 128 KiB; with 20,000 live connections a third of the tries is passed over.
const PLACES: u64 = 65_536;
/// Ports looked at before giving up; bounds the work of one accept.
const TRIES: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const RANGE: RangeInclusive<u16> = 10_240..=32_767;

    fn door(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 2], port))
    }

    #[test]
    fn two_workers_never_choose_the_same_port() {
        let counts = PortCounts::new();
        let mut workers: Vec<_> =
            (0..2).map(|index| SourcePorts::new(Arc::clone(&counts), index, 2)).collect();
        let mut seen = HashSet::new();
        for _ in 0..5_000 {
            for worker in &mut workers {
                assert!(seen.insert(worker.choose(&RANGE, CLIENT, door(80)).unwrap()));
            }
        }
    }

    #[test]
    fn port_of_a_live_connection_of_the_client_is_passed_over() {
        let mut ports = SourcePorts::new(PortCounts::new(), 0, 1);
        let taken = SocketAddr::new(CLIENT, *RANGE.start());
        ports.enter(taken, door(80));
        assert_ne!(ports.choose(&RANGE, CLIENT, door(80)), Some(taken));
        ports.turn = 0;
        assert_eq!(ports.choose(&RANGE, CLIENT, door(81)), Some(taken), "another destination");
        ports.leave(taken, door(80));
        ports.turn = 0;
        assert_eq!(ports.choose(&RANGE, CLIENT, door(80)), Some(taken));
    }

    #[test]
    fn range_is_walked_round_and_exhaustion_is_said() {
        for (index, workers, range) in [(1, 2, RANGE), (2, 3, 65_500..=65_535), (0, 1, 9..=9)] {
            let mut ports = SourcePorts::new(PortCounts::new(), index, workers);
            let all = (range.len() - usize::from(index)).div_ceil(usize::from(workers));
            let chosen: HashSet<_> = std::iter::from_fn(|| ports.choose(&range, CLIENT, door(80)))
                .take(all * 4)
                .collect();
            assert!(chosen.len() > all / 2 && chosen.len() <= all, "{}", chosen.len());
            let is_own = |from: &SocketAddr| {
                range.contains(&from.port()) && (from.port() - range.start()) % workers == index
            };
            assert!(chosen.iter().all(is_own));
            assert_eq!(ports.choose(&range, CLIENT, door(80)), None);
        }
        let mut late = SourcePorts::new(PortCounts::new(), 5, 8);
        assert_eq!(late.choose(&(7..=9), CLIENT, door(80)), None, "no port is left for it");
    }
}
