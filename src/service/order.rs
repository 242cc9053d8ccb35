// SPDX-License-Identifier: Apache-2.0
//! Orders made in advance, so that choosing by weight or by hash is one look into a list.

use std::net::SocketAddr;

/// Members in turn, each as often as its weight says, as evenly spread as can be.
///
/// The smooth weighted round robin of nginx, played through once.
pub(super) fn turns(weights: &[u16]) -> Box<[u16]> {
    let weights = reduced(weights);
    let total: i64 = weights.iter().sum();
    let mut credits = vec![0i64; weights.len()];
    let turn = |_| {
        for (credit, weight) in credits.iter_mut().zip(&weights) {
            *credit += weight;
        }
        let best = (0..credits.len()).rev().max_by_key(|index| credits[*index])?;
        credits[best] -= total;
        u16::try_from(best).ok()
    };
    (0..total).filter_map(turn).collect()
}

/// Maglev's table (NSDI 2016): each member fills places in an order of its own until all are full,
/// so that a member that goes or comes moves hardly any place of the others.
pub(super) fn places(members: &[(SocketAddr, u16)]) -> Box<[u16]> {
    let heaviest = members.iter().map(|(_, weight)| u32::from(*weight)).max().unwrap_or(0);
    if heaviest == 0 {
        return Box::default();
    }
    let size = size_for(members.len());
    let mut fillers: Vec<Filler> =
        members.iter().map(|member| Filler::new(*member, size)).collect();
    let mut places = vec![u16::MAX; usize::try_from(size).unwrap_or(0)];
    let mut left = size;
    while left > 0 {
        for (index, filler) in (0u16..).zip(&mut fillers) {
            filler.credit += filler.weight;
            if left == 0 || filler.credit < heaviest {
                continue;
            }
            filler.credit -= heaviest;
            while let Some(place) = filler.next(size).and_then(|at| places.get_mut(at)) {
                if *place == u16::MAX {
                    *place = index;
                    left -= 1;
                    break;
                }
            }
        }
    }
    places.into_boxed_slice()
}

/// A member on its way through the places.
struct Filler {
    credit: u32,
    position: u64,
    step: u64,
    weight: u32,
}

impl Filler {
    fn new((addr, weight): (SocketAddr, u16), size: u64) -> Filler {
        let hash = super::key_of(addr.ip()) ^ mix(u64::from(addr.port()));
        Filler {
            credit: 0,
            position: mix(hash) % size,
            step: mix(hash ^ STEP_SALT) % (size - 1) + 1,
            weight: u32::from(weight),
        }
    }

    /// The next place this member would like; all of them come, because `size` is prime.
    fn next(&mut self, size: u64) -> Option<usize> {
        let place = self.position;
        self.position = (place + self.step) % size;
        usize::try_from(place).ok()
    }
}

/// Spreads the bits of a number over all of it (splitmix64).
pub(super) const fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// The same proportions in a list that is not too long; who weighs anything keeps a turn.
fn reduced(weights: &[u16]) -> Vec<i64> {
    let divisor = weights.iter().copied().map(u64::from).fold(0, greatest_common_divisor).max(1);
    let total = weights.iter().map(|weight| u64::from(*weight) / divisor).sum::<u64>();
    let most = TURNS_MAX.max(weights.len() as u64 * 2);
    let share = |weight: u64| {
        if total <= most || weight == 0 { weight } else { (weight * most / total).max(1) }
    };
    let shares = weights.iter().map(|weight| share(u64::from(*weight) / divisor));
    shares.map(|share| i64::try_from(share).unwrap_or(1)).collect()
}

const fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// A hundred places a member keep the shares within about one per cent.
fn size_for(members: usize) -> u64 {
    let wanted = members as u64 * 100;
    PRIMES.into_iter().find(|prime| *prime >= wanted).unwrap_or(PRIMES[PRIMES.len() - 1])
}

/// Of a weighted list: proportions to a thousandth.
const TURNS_MAX: u64 = 1024;
const PRIMES: [u64; 6] = [1021, 4093, 16_381, 65_521, 262_139, 1_048_573];
const STEP_SALT: u64 = 0x5bd1_e995_9d1b_54a5;
