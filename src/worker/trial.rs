// SPDX-License-Identifier: Apache-2.0
//! Whether splicing pays here: tried, not guessed.
//!
//! Splice spares this worker two copies of every byte. But pages that a sender on this host has
//! filled come back to it late and cold, and its own cost can rise by as much; then bulk is slower
//! spliced than copied, and no address or load tells which. So `auto` compares: short windows with
//! and without splice, in turns, and keeps the faster way for a while; the same verdict again keeps
//! it twice as long. Splice wins unless copy is clearly faster, because it leaves more of this core
//! to others. Pure: reads no clock, is told what it is.

use std::time::Duration;

use crate::flow::Promotion;

/// What was tried and found.
#[derive(Debug)]
pub(super) struct Trial {
    hold: Duration,
    phase: Phase,
    /// Bytes and time of all windows of this trial: with splice, with copy.
    tried: [Sum; 2],
    verdict: Promotion,
    window: Window,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// The verdict is in force at least until then.
    Resting { until: Duration },
    /// The window of this number; in odd ones nothing is spliced.
    Trying { number: u8 },
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    bytes: u64,
    time: Duration,
}

/// When it began, and what the worker had moved then.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    began: Duration,
    moved_bytes: u64,
}

impl Trial {
    pub(super) fn new() -> Trial {
        Trial {
            hold: HOLD_FIRST,
            phase: Phase::Resting { until: Duration::ZERO },
            tried: [Sum::default(); 2],
            verdict: Promotion::Bulk,
            window: Window::default(),
        }
    }

    /// What directions shall do from now on. `moved_bytes` is a count that only grows; it is asked
    /// for only when a window is over.
    pub(super) fn judge(&mut self, now: Duration, moved_bytes: impl FnOnce() -> u64) -> Promotion {
        let took = now.saturating_sub(self.window.began);
        if took >= WINDOW {
            let moved_bytes = moved_bytes();
            let bytes = moved_bytes - self.window.moved_bytes;
            self.window = Window { began: now, moved_bytes };
            self.phase = self.next(now, Sum { bytes, time: took });
        }
        match self.phase {
            Phase::Resting { .. } => self.verdict,
            Phase::Trying { number } if number % 2 == 0 => Promotion::Bulk,
            Phase::Trying { .. } => Promotion::Never,
        }
    }

    /// A window is over.
    fn next(&mut self, now: Duration, sum: Sum) -> Phase {
        match self.phase {
            // A worker that slept has no bulk: what it measured says nothing.
            _ if sum.time > WINDOW * 2 || sum.bytes < WINDOW_BYTES_MIN => self.rest(now),
            Phase::Resting { until } if now >= until => {
                self.tried = [Sum::default(); 2];
                Phase::Trying { number: 0 }
            }
            Phase::Resting { .. } => self.phase,
            Phase::Trying { number } => {
                // The first two see the change of path, and the peers' windows adapt.
                let tried = self.tried.get_mut(usize::from(number % 2)).filter(|_| number > 1);
                if let Some(tried) = tried {
                    tried.bytes += sum.bytes;
                    tried.time += sum.time;
                }
                let is_even = number > 1 && number % 2 == 1;
                if number + 1 < WINDOWS && !(is_even && self.is_splice_far_ahead()) {
                    return Phase::Trying { number: number + 1 };
                }
                self.conclude();
                Phase::Resting { until: now + self.hold }
            }
        }
    }

    /// No trial now: as soon as there is bulk again.
    fn rest(&self, now: Duration) -> Phase {
        match self.phase {
            Phase::Resting { until } => Phase::Resting { until },
            Phase::Trying { .. } => Phase::Resting { until: now },
        }
    }

    /// As many windows of each have been tried, and more without splice would only cost.
    fn is_splice_far_ahead(&self) -> bool {
        let [splice, copy] = self.tried.map(Sum::bytes_per_second);
        splice > copy.saturating_add(copy / 100 * FAR_PERCENT)
    }

    fn conclude(&mut self) {
        let [splice, copy] = self.tried.map(Sum::bytes_per_second);
        let copy_wins = copy > splice.saturating_add(splice / 100 * CLEARLY_PERCENT);
        let verdict = if copy_wins { Promotion::Never } else { Promotion::Bulk };
        self.hold =
            if verdict == self.verdict { (self.hold * 2).min(HOLD_MAX) } else { HOLD_FIRST };
        self.verdict = verdict;
    }
}

impl Sum {
    fn bytes_per_second(self) -> u64 {
        let micros = self.time.as_micros().max(1);
        u64::try_from(u128::from(self.bytes) * 1_000_000 / micros).unwrap_or(u64::MAX)
    }
}

/// Long against a change of path and a round trip, short against a transfer worth the trial.
const WINDOW: Duration = Duration::from_millis(30);
/// Four of each kind, in turns, so that what changes meanwhile touches both alike.
const WINDOWS: u8 = 8;
/// About 270 MB/s: below, a core has time enough either way, and splice takes less of it.
const WINDOW_BYTES_MIN: u64 = 8 << 20;
/// Rates of single trials differ by a few per cent.
const CLEARLY_PERCENT: u64 = 6;
/// More than a single window of each may be apart by chance.
const FAR_PERCENT: u64 = 20;
/// A trial takes a quarter of a second: an eighth of this.
const HOLD_FIRST: Duration = Duration::from_secs(2);
const HOLD_MAX: Duration = Duration::from_secs(64);

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with these rates in bytes per millisecond, for so long; the time with splice, in
    /// percent.
    fn spliced_percent(splice: u64, copy: u64, seconds: u64) -> u64 {
        let (mut trial, mut moved, mut spliced) = (Trial::new(), 0, 0);
        let millis = seconds * 1000;
        for now in 0..millis {
            let promotion = trial.judge(Duration::from_millis(now), || moved);
            let splices = promotion == Promotion::Bulk;
            moved += if splices { splice } else { copy };
            spliced += u64::from(splices);
        }
        spliced * 100 / millis
    }

    #[test]
    fn faster_way_is_kept_for_nearly_all_the_time() {
        assert!(spliced_percent(3_000_000, 4_000_000, 60) < 8);
        assert!(spliced_percent(4_000_000, 2_000_000, 60) > 95);
    }

    #[test]
    fn splice_wins_where_both_are_as_fast() {
        assert!(spliced_percent(1_000_000, 1_000_000, 60) > 95);
        assert!(spliced_percent(1_000_000, 1_040_000, 60) > 95);
    }

    #[test]
    fn trial_ends_early_where_splice_is_far_ahead() {
        assert!(spliced_percent(4_000_000, 2_000_000, 1) > 93);
        assert!(spliced_percent(2_300_000, 2_000_000, 1) < 90);
    }

    #[test]
    fn without_bulk_nothing_is_tried() {
        assert_eq!(spliced_percent(100_000, 200_000, 60), 100);
    }

    #[test]
    fn change_of_the_host_is_noticed() {
        let mut trial = Trial::new();
        let mut moved = 0;
        let mut verdicts = Vec::new();
        for now in 0..60_000 {
            let promotion = trial.judge(Duration::from_millis(now), || moved);
            let faster = if now < 20_000 { Promotion::Never } else { Promotion::Bulk };
            moved += if promotion == faster { 2_000_000 } else { 1_000_000 };
            if now % 19_999 == 0 {
                verdicts.push(promotion);
            }
        }
        let (never, bulk) = (Promotion::Never, Promotion::Bulk);
        assert_eq!((verdicts.get(1), verdicts.get(3)), (Some(&never), Some(&bulk)));
    }
}
