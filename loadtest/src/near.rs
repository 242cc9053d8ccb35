// SPDX-License-Identifier: Apache-2.0
//! How far two CPUs are from each other: the time that a cache line takes there and back.
//!
//! A hypervisor moves virtual CPUs as it likes. Within a cache they share a line comes back after a
//! tenth of a microsecond, from another one after half of one, and everything that passes from the
//! generator to a forwarder gets dearer with it: the same forwarder loses a third of its rate. That
//! is not seen as stolen time, nor by who measures on one CPU only.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::arguments::Near;
use crate::{Exit, place, print};

/// For scripts that measure by themselves.
pub(crate) fn near(arguments: &Near) -> Result<Exit> {
    let [one, other] = arguments.cpus[..] else { bail!("--cpus: name two CPUs, as 0,1") };
    let until = Instant::now() + arguments.wait;
    let enough = arguments.nearest.map_or(0.0, |nearest| nearest * FAR);
    let nearest = least(one, other, enough, until);
    let Some(nearest) = nearest else { bail!("others keep CPU {one} or {other} busy") };
    print(&format!("{nearest:.0}\n"));
    let is_missed = arguments.nearest.is_some() && nearest > enough;
    Ok(if is_missed { Exit::ThresholdMissed } else { Exit::Fine })
}

/// The least distance seen until it was enough or the time was over.
fn least(one: usize, other: usize, enough: f64, until: Instant) -> Option<f64> {
    let mut least = None;
    loop {
        if let Some(distance) = between(one, other) {
            least = Some(least.map_or(distance, |least: f64| least.min(distance)));
        }
        if least.is_some_and(|least| least <= enough) || Instant::now() >= until {
            return least;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Whether CPUs are so much further apart than they can be that figures tell it.
pub(crate) fn is_far(distance_ns: f64, nearest_ns: f64) -> bool {
    distance_ns > nearest_ns * FAR
}

/// Nanoseconds of a round trip; nothing if one of them has no time for us.
pub(crate) fn between(one: usize, other: usize) -> Option<f64> {
    if one == other {
        return Some(0.0);
    }
    let ball = Ball(AtomicU32::new(0));
    std::thread::scope(|scope| {
        let far = scope.spawn(|| place::pin(other).is_ok() && ball.play(1).is_some());
        let near = scope.spawn(|| place::pin(one).ok().and_then(|()| ball.play(0)));
        let took = near.join().ok().flatten();
        // Who could not play made the other give up.
        far.join().is_ok_and(|played| played).then_some(took).flatten()
    })
    .map(|took| took.as_secs_f64() * 1e9 / f64::from(TRIPS))
}

/// Whose turn it is: even numbers are the first one's. A line of its own.
#[repr(align(128))]
struct Ball(AtomicU32);

impl Ball {
    /// Waits for our turn and passes the ball on, again and again; the time of all but the first
    /// trips, in which the other may still have to wake up.
    fn play(&self, parity: u32) -> Option<Duration> {
        let give_up = Instant::now() + PATIENCE;
        let mut began = Instant::now();
        for trip in 0..TRIPS + FIRST_TRIPS {
            if trip == FIRST_TRIPS {
                began = Instant::now();
            }
            let mut looks = 0_u32;
            loop {
                let seen = self.0.load(Ordering::Acquire);
                if seen % 2 == parity {
                    self.0.store(seen + 1, Ordering::Release);
                    break;
                }
                looks += 1;
                if looks.is_multiple_of(LOOKS) && Instant::now() > give_up {
                    return None;
                }
            }
        }
        Some(began.elapsed())
    }
}

/// Times further apart than the nearest that was seen. Noise is two thirds of that; another cache is
/// seven times as far.
pub(crate) const FAR: f64 = 3.0;
const FIRST_TRIPS: u32 = 500;
/// Between two looks of who waits.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Looks between two at the clock.
const LOOKS: u32 = 4096;
const PATIENCE: Duration = Duration::from_millis(50);
/// A few tenths of a millisecond.
const TRIPS: u32 = 2500;

#[cfg(test)]
mod tests {
    use super::between;
    use crate::place::allowed_cpus;

    #[test]
    fn a_line_comes_back() {
        assert!(between(0, 0).is_some_and(|distance| distance < 1.0));
        if let [one, other, ..] = allowed_cpus()[..] {
            // On a busy machine nobody may have the time.
            let distance = between(one, other);
            assert!(distance.is_none_or(|distance| distance > 1.0), "{distance:?}");
        }
        assert_eq!(between(0, 1_000_000), None);
    }
}
