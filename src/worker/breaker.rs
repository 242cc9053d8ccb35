// SPDX-License-Identifier: Apache-2.0
//! Where no port was free to dial from a moment ago, nobody tries again for a while.
//!
//! A dial that finds no port costs the kernel a walk over all of them, and every client that is
//! refused comes again at once: without a pause, exhaustion would eat the core.
//! Invariant: forgets at will (another pair in the same place), never refuses a pair that did not
//! fail itself. Nothing is allocated after `new`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::wheel::Clock;

/// The pairs that failed last.
#[derive(Debug)]
pub(super) struct Breaker {
    /// The last moment at which any pair is refused: beyond it nothing is looked at.
    latest: u32,
    places: Box<[Option<Tripped>]>,
}

#[derive(Clone, Copy, Debug)]
struct Tripped {
    pair: Pair,
    until: u32,
}

/// Who dials whom.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Pair {
    /// `None` for an address of ours.
    pub(super) from: Option<IpAddr>,
    pub(super) to: SocketAddr,
}

impl Breaker {
    pub(super) fn new() -> Breaker {
        Breaker { latest: 0, places: vec![None; PLACES].into_boxed_slice() }
    }

    /// No port was free for `pair` at the tick `now`.
    pub(super) fn trip(&mut self, pair: Pair, now: u32) {
        let until = now.saturating_add(Clock::ticks(PAUSE));
        self.latest = until;
        if let Some(place) = self.places.get_mut(index(pair)) {
            *place = Some(Tripped { pair, until });
        }
    }

    /// Whether to refuse `pair` without trying.
    pub(super) fn refuses(&self, pair: Pair, now: u32) -> bool {
        now < self.latest
            && self
                .places
                .get(index(pair))
                .copied()
                .flatten()
                .is_some_and(|tripped| tripped.pair == pair && now < tripped.until)
    }
}

fn index(pair: Pair) -> usize {
    let mut hasher = DefaultHasher::new();
    pair.hash(&mut hasher);
    usize::try_from(hasher.finish() % PLACES as u64).unwrap_or(0)
}

const PLACES: usize = 256;
/// Ports come back one by one; a tenth of a second keeps the tries rare and the recovery quick.
const PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pair_that_failed_is_refused_for_a_while_and_no_other() {
        let mut breaker = Breaker::new();
        let pair = |port| Pair { from: None, to: SocketAddr::from(([10, 0, 0, 1], port)) };
        breaker.trip(pair(80), 1000);
        let pause = Clock::ticks(PAUSE);
        assert!(breaker.refuses(pair(80), 1000) && breaker.refuses(pair(80), 999 + pause));
        assert!(!breaker.refuses(pair(80), 1000 + pause));
        let others = (0..10_000).filter(|port| breaker.refuses(pair(*port), 1000));
        assert_eq!(others.collect::<Vec<_>>(), [80]);
        let from = Some(IpAddr::from([10, 0, 0, 9]));
        assert!(!breaker.refuses(Pair { from, ..pair(80) }, 1000));
    }
}
