// SPDX-License-Identifier: Apache-2.0
//! Two comparisons, of an older and a newer state, and what that means.

use std::fmt::Write as _;

use super::result::{Cell, Comparison, Figure, figure};
use super::shown::{Table, aligned, heading, in_words, shown};
use super::statistics::{NEGLIGIBLE_BETWEEN_RUNS, Verdict, median, ratio_of_samples};

/// What was counted on the way through all cells.
#[derive(Default)]
struct Counts {
    better: Vec<String>,
    equal: usize,
    /// Of what everything is held against: that shows the machine itself.
    moved: usize,
    unknown: usize,
    worse: Vec<String>,
}

/// A table with a verdict.
pub(crate) fn difference(old: &Comparison, new: &Comparison) -> String {
    let baseline =
        Some(new.baseline()).filter(|name| old.targets.iter().any(|it| it.name == *name));
    let baseline = baseline.as_deref();
    let mut counts = Counts::default();
    let mut rows = Vec::new();
    let mut apart: Vec<(&Figure, Vec<f64>)> = Vec::new();
    for is in &new.cells {
        let Some(was) = old.cell(&is.target, &is.workload) else { continue };
        let compared =
            COMPARED.iter().filter(|name| is.tells(name)).filter_map(|name| figure(name));
        for figure in compared {
            let (before, after) = (was.median(figure.name), is.median(figure.name));
            let (Some(before), Some(after)) = (before, after) else { continue };
            let base = baseline.filter(|base| *base != is.target);
            let of = against(new, is, base, figure.name);
            let ratio = ratio_of_samples(&of, &against(old, was, base, figure.name));
            counts.take(
                figure,
                is,
                ratio.verdict(NEGLIGIBLE_BETWEEN_RUNS),
                baseline == Some(is.target.as_str()),
            );
            if before > 0.0 {
                let distance = (after / before - 1.0).abs();
                match apart.iter_mut().find(|(other, _)| other.name == figure.name) {
                    Some((_, list)) => list.push(distance),
                    None => apart.push((figure, vec![distance])),
                }
            }
            let [before, after] = [before, after].map(|value| shown(value, figure, &is.unit));
            let heading = heading(figure, &is.unit);
            let words = in_words(&ratio, NEGLIGIBLE_BETWEEN_RUNS);
            rows.push(
                [is.workload.clone(), is.target.clone(), heading, before, after, words].to_vec(),
            );
        }
    }
    let head = ["workload", "target", "figure", "old", "new", "new / old"].map(str::to_owned);
    let table = Table { head: head.to_vec(), rows, workload: String::new() };
    let mut text = aligned(&table);
    // Writing to a string cannot fail.
    let _ = writeln!(text, "\n{}", agreement(&apart));
    let _ = writeln!(text, "{}", counts.verdict(baseline));
    text
}

impl Counts {
    fn take(&mut self, figure: &Figure, is: &Cell, verdict: Verdict, is_baseline: bool) {
        let what = format!("{} of {} under {}", figure.heading, is.target, is.workload);
        match (verdict, figure.is_better_high) {
            (Verdict::Higher | Verdict::Lower, _) if is_baseline => self.moved += 1,
            (Verdict::Higher, true) | (Verdict::Lower, false) => self.better.push(what),
            (Verdict::Lower, true) | (Verdict::Higher, false) => self.worse.push(what),
            (Verdict::NoDifference, _) => self.equal += 1,
            (Verdict::Unknown, _) => self.unknown += 1,
        }
    }

    fn verdict(&self, baseline: Option<&str>) -> String {
        let Counts { better, equal, moved, unknown, worse } = self;
        let mut rest = String::new();
        // Writing to a string cannot fail.
        if *unknown > 0 {
            let _ = write!(rest, ", too few rounds to tell in {unknown}");
        }
        if let Some(name) = baseline {
            let _ = write!(rest, " (held against {name} of its own run)");
        }
        if *moved > 0 {
            let _ = write!(rest, "; the machine itself moved in {moved}");
        }
        let better = better.len();
        match (better, worse.len()) {
            (0, 0) => format!("verdict: no difference in {equal} figures{rest}"),
            (_, 0) => {
                format!(
                    "verdict: better in {better}, worse in none, no difference in {equal}{rest}"
                )
            }
            (_, count) => format!(
                "verdict: WORSE in {count} ({}), better in {better}, no difference in {equal}{rest}",
                worse.join("; "),
            ),
        }
    }
}

/// How far apart the medians of two runs are, whatever the reason.
fn agreement(apart: &[(&Figure, Vec<f64>)]) -> String {
    let percent = |part: f64| format!("{:.1} %", part * 100.0);
    let one = |(figure, list): &(&Figure, Vec<f64>)| {
        let most = list.iter().copied().fold(0.0, f64::max);
        format!("{} {} (at most {})", figure.heading, percent(median(list)), percent(most))
    };
    let all = apart.iter().map(one).collect::<Vec<_>>().join(", ");
    format!("the runs are apart, in the median of the cells, by: {all}")
}

/// A figure of every round, in parts of the baseline's in the same round if there is one: absolute
/// figures move with the machine.
fn against(comparison: &Comparison, cell: &Cell, baseline: Option<&str>, name: &str) -> Vec<f64> {
    let values = cell.values(name);
    let base = baseline.and_then(|name| comparison.cell(name, &cell.workload));
    let pairs = base.map(|base| cell.pairs(base, name)).unwrap_or_default();
    if pairs.is_empty() {
        return values;
    }
    pairs.into_iter().map(|(value, base)| value / base).collect()
}

/// What decides between an older and a newer state.
const COMPARED: [&str; 5] = [
    "per_second",
    "bytes_per_second",
    "p99_us",
    "forwarder_cpu_us_per_unit",
    "user_bytes_per_flow",
];

#[cfg(test)]
mod tests {
    use super::difference;
    use crate::compare::shown::tests::{FAST, SLOW, comparison};

    #[test]
    fn an_older_and_a_newer_state_get_a_verdict() {
        let old = comparison(&[("direct", FAST), ("a", FAST)]);
        let same = difference(&old, &old);
        assert!(same.contains("verdict: no difference in 2 figures"), "{same}");
        // The whole machine is slower: that is no difference of `a`.
        let slower = comparison(&[("direct", SLOW), ("a", SLOW)]);
        let text = difference(&old, &slower);
        assert!(
            !text.contains("WORSE") && text.contains("the machine itself moved in 1"),
            "{text}"
        );
        let worse = comparison(&[("direct", FAST), ("a", SLOW)]);
        let text = difference(&old, &worse);
        assert!(text.contains("WORSE in 1 (rate /s of a under pingpong-64)"), "{text}");
    }
}
