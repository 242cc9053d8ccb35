// SPDX-License-Identifier: Apache-2.0
//! Few rounds, honest intervals: medians of pairs, and the exact chance that an interval is right.
//!
//! Nothing is assumed of how the noise is spread but that it has no side. With n rounds there is a
//! limit to how sure one can be: five give 93.75 %.

use serde::{Deserialize, Serialize};

/// A value and where it lies.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(crate) struct Estimate {
    /// The chance that the interval holds the true value, from 0 to 1; 0 with a single round.
    pub(crate) confidence: f64,
    pub(crate) high: f64,
    pub(crate) low: f64,
    pub(crate) value: f64,
}

/// What a comparison says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    Higher,
    Lower,
    NoDifference,
    /// Too few rounds to say.
    Unknown,
}

/// The middle of a list; of an even one, of the two middle ones.
pub(crate) fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values.to_vec());
    match (sorted.len() / 2, sorted.len() % 2) {
        (_, _) if sorted.is_empty() => 0.0,
        (middle, 1) => sorted[middle],
        (middle, _) => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// How far apart the extremes are, in parts of the median.
pub(crate) fn spread(values: &[f64]) -> f64 {
    let sorted = sorted(values.to_vec());
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else { return 0.0 };
    let median = median(values);
    if median == 0.0 { 0.0 } else { (last - first) / median }
}

/// The Hodges–Lehmann estimate of one sample: the median of all averages of two values, with the
/// interval that the signed-rank test gives.
pub(crate) fn of_one(values: &[f64]) -> Estimate {
    let mut averages = Vec::new();
    for (index, one) in values.iter().enumerate() {
        averages.extend(values[index..].iter().map(|other| f64::midpoint(*one, *other)));
    }
    interval(sorted(averages), &signed_ranks(values.len()))
}

/// The ratio of pairs that were measured next to each other.
pub(crate) fn ratio_of_pairs(of: &[f64], to: &[f64]) -> Estimate {
    let pairs = of.iter().zip(to).filter(|(of, to)| **of > 0.0 && **to > 0.0);
    exponential(of_one(&pairs.map(|(of, to)| (of / to).ln()).collect::<Vec<_>>()))
}

/// The ratio of two samples that do not belong together in pairs: the median of all quotients, with
/// the interval that the rank-sum test gives.
pub(crate) fn ratio_of_samples(of: &[f64], to: &[f64]) -> Estimate {
    let logs = |values: &[f64]| -> Vec<f64> {
        values.iter().filter(|value| **value > 0.0).map(|value| value.ln()).collect()
    };
    let (of, to) = (logs(of), logs(to));
    let differences = of.iter().flat_map(|of| to.iter().map(move |to| of - to)).collect();
    exponential(interval(sorted(differences), &rank_sums(of.len(), to.len())))
}

impl Estimate {
    /// Whether this ratio is one; what is less than `negligible` is no difference to anybody.
    pub(crate) fn verdict(&self, negligible: f64) -> Verdict {
        if self.confidence < CONFIDENCE_WANTED {
            return Verdict::Unknown;
        }
        match (self.value - 1.0).abs() > negligible {
            true if self.low > 1.0 => Verdict::Higher,
            true if self.high < 1.0 => Verdict::Lower,
            _ => Verdict::NoDifference,
        }
    }
}

/// The interval between the k-th smallest and the k-th largest of what was paired, where `chances`
/// says how likely each rank statistic is.
#[expect(clippy::cast_precision_loss, reason = "tens of rounds")]
fn interval(sorted: Vec<f64>, chances: &[u64]) -> Estimate {
    if sorted.len() < 2 {
        let value = sorted.first().copied().unwrap_or(0.0);
        return Estimate { confidence: 0.0, high: value, low: value, value };
    }
    let total: u64 = chances.iter().sum();
    let mut below = chances.first().copied().unwrap_or(0);
    let mut rank = 0;
    while rank + 1 < sorted.len() / 2 {
        let next = below + chances.get(rank + 1).copied().unwrap_or(0);
        if 1.0 - 2.0 * next as f64 / (total as f64) < CONFIDENCE_WANTED {
            break;
        }
        below = next;
        rank += 1;
    }
    Estimate {
        confidence: 1.0 - 2.0 * below as f64 / total as f64,
        high: sorted[sorted.len() - 1 - rank],
        low: sorted[rank],
        value: median(&sorted),
    }
}

fn exponential(estimate: Estimate) -> Estimate {
    let Estimate { confidence, high, low, value } = estimate;
    Estimate { confidence, high: high.exp(), low: low.exp(), value: value.exp() }
}

/// In how many of the 2^n sign patterns the signed-rank statistic has each value.
fn signed_ranks(rounds: usize) -> Vec<u64> {
    let rounds = rounds.min(ROUNDS_MAX);
    let mut ways = vec![1_u64];
    for rank in 1..=rounds {
        let mut next = vec![0; ways.len() + rank];
        for (sum, count) in ways.iter().enumerate() {
            next[sum] += count;
            next[sum + rank] += count;
        }
        ways = next;
    }
    ways
}

/// In how many arrangements the rank-sum statistic of two samples has each value.
fn rank_sums(one: usize, other: usize) -> Vec<u64> {
    let (one, other) = (one.min(SAMPLES_MAX), other.min(SAMPLES_MAX));
    // ways[n][u]: arrangements of n of the first and all so far of the second.
    let mut table = vec![vec![vec![1_u64]; other + 1]; one + 1];
    for first in 1..=one {
        for second in 1..=other {
            let mut ways = vec![0; first * second + 1];
            for (sum, count) in table[first][second - 1].iter().enumerate() {
                ways[sum] += count;
            }
            for (sum, count) in table[first - 1][second].iter().enumerate() {
                ways[sum + second] += count;
            }
            table[first][second] = ways;
        }
    }
    table[one][other].clone()
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// An interval is made no wider than this asks; without as much nothing is claimed. For pairs that
/// takes five rounds.
const CONFIDENCE_WANTED: f64 = 0.90;
/// Differences below this decide nothing.
pub(crate) const NEGLIGIBLE: f64 = 0.02;
/// Nor do these between two runs: two of the same are as far apart.
pub(crate) const NEGLIGIBLE_BETWEEN_RUNS: f64 = 0.05;
/// Above these the exact counts would not fit.
const ROUNDS_MAX: usize = 60;
const SAMPLES_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::{
        NEGLIGIBLE, Verdict, median, of_one, rank_sums, ratio_of_pairs, ratio_of_samples,
        signed_ranks, spread,
    };

    fn near(one: f64, other: f64) -> bool {
        (one - other).abs() < 1e-9
    }

    #[test]
    fn medians_and_spreads() {
        assert!(near(median(&[3.0, 1.0, 2.0]), 2.0));
        assert!(near(median(&[4.0, 1.0, 2.0, 3.0]), 2.5));
        assert!(near(median(&[]), 0.0));
        assert!(near(spread(&[9.0, 10.0, 11.0]), 0.2));
    }

    #[test]
    fn the_counts_of_rank_statistics_are_those_of_the_tables() {
        assert_eq!(signed_ranks(3), [1, 1, 1, 2, 1, 1, 1]);
        assert_eq!(signed_ranks(5).iter().sum::<u64>(), 32);
        assert_eq!(rank_sums(2, 2), [1, 1, 2, 1, 1]);
        assert_eq!(rank_sums(5, 5).iter().sum::<u64>(), 252);
    }

    #[test]
    fn five_rounds_allow_the_interval_between_the_extremes() {
        let estimate = of_one(&[1.0, 2.0, 3.0, 4.0, 100.0]);
        assert!(near(estimate.confidence, 0.9375), "{estimate:?}");
        assert!(near(estimate.low, 1.0) && near(estimate.high, 100.0), "{estimate:?}");
        assert!(near(estimate.value, 3.0), "{estimate:?}");
        // More rounds allow to leave extremes out.
        let many: Vec<f64> = (1..=10).map(f64::from).collect();
        let estimate = of_one(&many);
        assert!(estimate.low > 1.0 && estimate.confidence >= 0.9, "{estimate:?}");
    }

    #[test]
    fn equal_is_no_difference_and_few_rounds_say_nothing() {
        let base = [100.0, 101.0, 99.0, 100.5, 99.5];
        let twice = base.map(|value| value * 2.0);
        assert_eq!(ratio_of_pairs(&twice, &base).verdict(NEGLIGIBLE), Verdict::Higher);
        assert_eq!(ratio_of_pairs(&base, &twice).verdict(NEGLIGIBLE), Verdict::Lower);
        assert_eq!(ratio_of_pairs(&base, &base).verdict(NEGLIGIBLE), Verdict::NoDifference);
        let noisy = [100.0, 90.0, 115.0, 85.0, 120.0];
        assert_eq!(ratio_of_pairs(&noisy, &base).verdict(NEGLIGIBLE), Verdict::NoDifference);
        let little = base.map(|value| value * 1.01);
        assert_eq!(ratio_of_pairs(&little, &base).verdict(NEGLIGIBLE), Verdict::NoDifference);
        assert_eq!(ratio_of_pairs(&[2.0], &[1.0]).verdict(NEGLIGIBLE), Verdict::Unknown);
        assert_eq!(ratio_of_pairs(&twice[..4], &base[..4]).verdict(NEGLIGIBLE), Verdict::Unknown);
        assert_eq!(ratio_of_samples(&twice, &base).verdict(NEGLIGIBLE), Verdict::Higher);
        assert_eq!(ratio_of_samples(&noisy, &base).verdict(NEGLIGIBLE), Verdict::NoDifference);
    }
}
