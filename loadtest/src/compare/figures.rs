// SPDX-License-Identifier: Apache-2.0
//! From what a generator saw to what is shown: figures of a measurement, measurements of a cell.

use std::collections::BTreeMap;

use super::matrix::SYSCALLS;
use super::programs::Started;
use super::result::{Cell, Comparison, Round};
use super::select::Workload;
use crate::near;
use crate::run::outcome::{ENOUGH_FOR_P99, Outcome};

/// Adds a round to its cell. Of one that was measured again the better one counts, whatever came of
/// it.
pub(super) fn keep(
    comparison: &mut Comparison,
    target: &Started,
    workload: &Workload,
    number: u32,
    distance_ns: f64,
    outcome: Outcome,
) {
    let figures = figures(target, workload, &outcome);
    let disturbance = disturbance(&outcome);
    let round = Round { disturbance, distance_ns, figures, number, outcome, ..Round::default() };
    let name = &target.about.name;
    let place = comparison
        .cells
        .iter()
        .position(|cell| cell.target == *name && cell.workload == workload.name);
    let place = place.unwrap_or_else(|| {
        comparison.cells.push(Cell {
            connections: workload.connections,
            target: name.clone(),
            unit: workload.unit().to_owned(),
            workload: workload.name.clone(),
            ..Cell::default()
        });
        comparison.cells.len() - 1
    });
    let rounds = &mut comparison.cells[place].rounds;
    let badness =
        |round: &Round| (round.distance_ns / near::FAR).max(round.disturbance / DISTURBED);
    match rounds.iter_mut().find(|other| other.number == number) {
        Some(other) if badness(other) <= badness(&round) => {}
        Some(other) => *other = round,
        None => rounds.push(round),
    }
}

/// Marks what was disturbed, now that is known how near the CPUs can be.
pub(super) fn mark(comparison: &mut Comparison, nearest_ns: f64) {
    for round in comparison.cells.iter_mut().flat_map(|cell| &mut cell.rounds) {
        round.was_disturbed =
            round.disturbance > DISTURBED || near::is_far(round.distance_ns, nearest_ns);
    }
}

/// Once all is measured: the latencies of a cell are those of its rounds.
pub(super) fn gather(comparison: &mut Comparison) {
    for cell in &mut comparison.cells {
        cell.rounds.sort_by_key(|round| round.number);
        for round in &mut cell.rounds {
            let histogram = std::mem::take(&mut round.outcome.latency_histogram_us);
            merge(&mut cell.histogram_us, &histogram);
        }
    }
}

/// The part of a measurement that others had: of the time by a hypervisor, of a CPU by processes.
fn disturbance(outcome: &Outcome) -> f64 {
    let lost = match outcome.seconds {
        // An idle load takes no time.
        seconds if seconds < SECONDS_MIN => 0.0,
        seconds => 1.0 - outcome.calm.seconds / seconds,
    };
    lost.max(others(outcome) / OTHERS_CPUS * DISTURBED)
}

/// CPUs that others had meanwhile.
fn others(outcome: &Outcome) -> f64 {
    outcome.watched.as_ref().map_or(0.0, |watched| watched.others_seconds / outcome.seconds)
}

/// Adds one histogram to another; both are sorted, and have the same steps.
fn merge(all: &mut Vec<(f64, u64)>, more: &[(f64, u64)]) {
    for (value, count) in more {
        match all.binary_search_by(|(other, _)| other.total_cmp(value)) {
            Ok(place) => all[place].1 += count,
            Err(place) => all.insert(place, (*value, *count)),
        }
    }
}

/// Everything that the tables show.
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn figures(target: &Started, workload: &Workload, outcome: &Outcome) -> BTreeMap<String, f64> {
    let mut figures = BTreeMap::new();
    let mut is = |name: &str, value: f64| figures.insert(name.to_owned(), value);
    let watched = outcome.watched.clone().unwrap_or_default();
    let (calm, latency) = (&outcome.calm, &outcome.latency_us);
    let seconds = outcome.seconds;
    // Where there was hardly a calm moment, that one says less than all of them.
    let is_calm = calm.seconds >= seconds * (1.0 - DISTURBED);
    is("errors", outcome.errors as f64);
    is("conntrack_per_flow", tracked_per_flow(workload, outcome));
    is("retransmits", watched.retransmits as f64);
    is("others_cpu", others(outcome));
    let units = match workload.unit() {
        "GB" => {
            is(
                "bytes_per_second",
                if is_calm { calm.bytes_per_second } else { outcome.bytes_per_second },
            );
            outcome.bytes_per_second * seconds / 1e9
        }
        "flow" => {
            let flows = workload.connections as f64;
            is("slab_bytes_per_flow", watched.slab_bytes as f64 / flows);
            if target.pid.is_some() {
                is("user_bytes_per_flow", watched.user_bytes as f64 / flows);
            }
            return figures;
        }
        _ => {
            let done = outcome.per_second * seconds;
            for (name, of_calm, of_all, enough) in [
                ("per_second", calm.per_second, outcome.per_second, 1),
                ("p50_us", calm.p50_us, latency.p50, 1),
                ("p90_us", calm.p90_us, latency.p90, ENOUGH_FOR_P99 / 10),
                ("p99_us", calm.p99_us, latency.p99, ENOUGH_FOR_P99),
                ("p99_9_us", 0.0, latency.p99_9, ENOUGH_FOR_P99 * 10),
                ("max_us", 0.0, latency.max, 1),
            ] {
                // Exchanges that outlast the measurement are counted, and have no latency.
                if done >= enough as f64 && of_all > 0.0 {
                    is(name, if is_calm && of_calm > 0.0 { of_calm } else { of_all });
                }
            }
            done
        }
    };
    if units <= 0.0 {
        return figures;
    }
    let generator = &outcome.generator;
    let useful = generator.cpu_seconds - generator.idle_spin_seconds;
    let system = useful + watched.cpu_seconds + watched.kernel_threads_seconds;
    is("system_cpu_us_per_unit", system * 1e6 / units);
    is("generator_busy", useful / seconds);
    if target.pid.is_some() {
        is("forwarder_busy", watched.cpu_seconds / seconds);
        is("forwarder_cpu_us_per_unit", watched.cpu_seconds * 1e6 / units);
    }
    if target.socket.is_some() {
        let metric = |name: &str| watched.metrics.get(name).copied().unwrap_or(0.0);
        is("enters_per_unit", metric("weir_ring_enters_total") / units);
        let fallbacks =
            watched.metrics.iter().filter(|(name, _)| name.starts_with("weir_fallback"));
        is("fallbacks", fallbacks.map(|(_, count)| count).fold(0.0, |sum, count| sum + count));
    }
    if let Some(a_second) = watched.metrics.get(SYSCALLS) {
        is("syscalls_per_unit", a_second * seconds / units);
    }
    figures
}

/// Entries of connection tracking, which are all of this load.
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn tracked_per_flow(workload: &Workload, outcome: &Outcome) -> f64 {
    let Some(watched) = &outcome.watched else { return 0.0 };
    let done = outcome.per_second * outcome.seconds;
    let replaced = match (workload.unit(), workload.churn()) {
        ("connection", _) => done,
        (_, 0) => return watched.conntrack_entries as f64 / workload.connections as f64,
        (_, exchanges) => done / f64::from(exchanges),
    };
    if replaced > 0.0 { watched.conntrack_added as f64 / replaced } else { 0.0 }
}

/// A measurement is disturbed if others had more of it.
const DISTURBED: f64 = 0.4;
/// CPUs that others may have.
const OTHERS_CPUS: f64 = 0.1;
/// In less there is no stretch.
const SECONDS_MIN: f64 = 0.25;

#[cfg(test)]
mod tests {
    use super::merge;

    #[test]
    fn histograms_of_rounds_become_one() {
        let mut all = vec![(1.0, 2), (3.0, 1)];
        merge(&mut all, &[(2.0, 5), (3.0, 4), (9.0, 1)]);
        assert_eq!(all, [(1.0, 2), (2.0, 5), (3.0, 5), (9.0, 1)]);
    }
}
