// SPDX-License-Identifier: Apache-2.0
//! Which profile a measurement speaks for, and why: reads what `weir-loadtest compare --profiles`
//! wrote.
//!
//! A difference counts only if every round agrees on it and it is large enough to matter. The
//! profile that is best, or not to be told from the best, under most workloads is recommended;
//! among equals the default.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::profile::Profile;

/// What a measurement says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recommendation {
    /// The profile to take.
    pub profile: String,
    /// One for each workload, as measured.
    pub verdicts: Vec<Verdict>,
}

/// How the profiles did under one workload.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The best, then all that cannot be told from it.
    pub best: Vec<String>,
    /// What was compared: `per_second`, `p50_us`, …
    pub figure: String,
    /// How many times better each profile is than `balanced`; above 1 is better.
    pub gains: BTreeMap<String, f64>,
    /// `pingpong-64`, …
    pub workload: String,
}

/// Why a result says nothing about profiles.
#[derive(Debug, thiserror::Error)]
pub enum RecommendError {
    /// It is no result.
    #[error("{path}: {said} (it must be a result of `weir-loadtest compare`)")]
    NoResult {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        said: String,
    },
    /// It holds one profile, or does not hold the default.
    #[error(
        "{path}: compares no profiles with balanced (measure with `weir-loadtest compare --modes \
         forward --peers none --profiles all`)"
    )]
    OneProfile {
        /// The file.
        path: PathBuf,
    },
}

/// As `weir-loadtest compare` writes it; what is not needed here is passed over.
#[derive(Deserialize)]
struct Comparison {
    cells: Vec<Cell>,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    #[serde(default)]
    profile: String,
}

#[derive(Deserialize)]
struct Cell {
    rounds: Vec<Round>,
    target: String,
    unit: String,
    workload: String,
}

#[derive(Deserialize)]
struct Round {
    figures: BTreeMap<String, f64>,
    number: u32,
    #[serde(default)]
    was_disturbed: bool,
}

/// A figure by the number of its round: those of one round were measured side by side.
type Values = BTreeMap<u32, f64>;

/// Reads a result and judges it.
///
/// # Errors
///
/// The file is no result, or compares no profiles.
pub fn recommend(path: &Path) -> Result<Recommendation, RecommendError> {
    let failed = |said: String| RecommendError::NoResult { path: path.to_owned(), said };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let comparison = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
    judge(&comparison).ok_or_else(|| RecommendError::OneProfile { path: path.to_owned() })
}

fn judge(comparison: &Comparison) -> Option<Recommendation> {
    let profiles: BTreeMap<&str, &str> = comparison
        .targets
        .iter()
        .filter(|target| !target.profile.is_empty())
        .map(|target| (target.name.as_str(), target.profile.as_str()))
        .collect();
    let mut workloads: Vec<&str> = Vec::new();
    for cell in &comparison.cells {
        if !workloads.contains(&cell.workload.as_str()) {
            workloads.push(&cell.workload);
        }
    }
    let mut verdicts: Vec<Verdict> = Vec::new();
    for workload in workloads {
        let first = comparison.cells.iter().find(|cell| cell.workload == workload);
        let figures = first.map_or(&[][..], figures).iter();
        verdicts
            .extend(figures.filter_map(|figure| verdict(comparison, &profiles, workload, *figure)));
    }
    let mut names = Profile::names();
    names.sort_by_key(|name| *name != DEFAULT);
    let points = |name: &str| {
        verdicts.iter().filter(|verdict| verdict.best.iter().any(|best| best == name)).count()
    };
    // The first of the best: `max_by_key` would take the last.
    let profile = names.into_iter().rev().max_by_key(|name| points(name))?;
    (!verdicts.is_empty()).then(|| Recommendation { profile: profile.to_owned(), verdicts })
}

/// `None` if the workload was not measured with `balanced` and another profile.
fn verdict(
    comparison: &Comparison,
    profiles: &BTreeMap<&str, &str>,
    workload: &str,
    (name, more_is_better): (&str, bool),
) -> Option<Verdict> {
    let cells = comparison.cells.iter().filter(|cell| cell.workload == workload);
    let mut values: BTreeMap<&str, Values> = BTreeMap::new();
    for cell in cells {
        let Some(profile) = profiles.get(cell.target.as_str()) else { continue };
        let value = |round: &&Round| Some((round.number, *round.figures.get(name)?));
        values.entry(profile).or_default().extend(counted(cell).iter().filter_map(value));
    }
    let base = values.get(DEFAULT).filter(|base| !base.is_empty())?;
    let gain = |of: &Values, to: &Values| gains(of, to, more_is_better);
    let gains: BTreeMap<String, f64> = values
        .iter()
        .map(|(profile, values)| ((*profile).to_owned(), median(gain(values, base))))
        .collect();
    let first = gains.iter().max_by(|a, b| a.1.total_cmp(b.1)).map(|(name, _)| name.clone())?;
    let best_values = values.get(first.as_str())?;
    let is_as_good = |profile: &str| {
        let worse = values.get(profile).map(|values| gain(best_values, values));
        worse.is_none_or(|ratios| !is_difference(&ratios))
    };
    let others = gains.keys().filter(|name| **name != first && is_as_good(name));
    let best = [&first].into_iter().chain(others).cloned().collect();
    let is_comparison = gains.len() > 1;
    is_comparison.then(|| Verdict {
        best,
        figure: name.to_owned(),
        gains,
        workload: workload.to_owned(),
    })
}

/// The rounds that were not disturbed, if there are enough to tell.
fn counted(cell: &Cell) -> Vec<&Round> {
    let calm: Vec<&Round> = cell.rounds.iter().filter(|round| !round.was_disturbed).collect();
    if calm.len() >= CALM_MIN { calm } else { cell.rounds.iter().collect() }
}

/// What a workload is about, and whether more of it is better.
fn figures(cell: &Cell) -> &'static [(&'static str, bool)] {
    match cell.unit.as_str() {
        // Where others are the bottleneck, all that a forwarder can do better is to cost less.
        "GB" => &[("bytes_per_second", true), ("forwarder_cpu_us_per_unit", false)],
        "flow" => &[("user_bytes_per_flow", false)],
        // An open loop fixes the rate: what is left is how long an answer takes, and at what price.
        // The median, because the tail of a second is the machine's.
        _ if cell.workload.contains('@') => {
            &[("p50_us", false), ("forwarder_cpu_us_per_unit", false)]
        }
        // One connection waits for every answer.
        _ if cell.workload.ends_with("-1") => &[("p50_us", false)],
        _ => &[("per_second", true)],
    }
}

/// Round by round, how many times better.
fn gains(of: &Values, to: &Values, more_is_better: bool) -> Vec<f64> {
    let pairs = of.iter().filter_map(|(round, of)| Some((*of, *to.get(round)?)));
    let pairs = pairs.filter(|(of, to)| *of > 0.0 && *to > 0.0);
    pairs.map(|(of, to)| if more_is_better { of / to } else { to / of }).collect()
}

/// Every round agrees that it is better, and by enough.
fn is_difference(ratios: &[f64]) -> bool {
    !ratios.is_empty()
        && ratios.iter().all(|ratio| *ratio > 1.0)
        && median(ratios.to_vec()) > MATTERS
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(1.0)
}

/// Fewer calm rounds than this say less than all of them.
const CALM_MIN: usize = 2;
/// What others are compared with, and what is taken where nothing speaks for another.
const DEFAULT: &str = "balanced";
/// Less than this is within what two runs of the same differ by.
const MATTERS: f64 = 1.05;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// One workload: the values of each round, by profile.
    struct Measured<'a> {
        workload: &'a str,
        figure: &'a str,
        profiles: &'a [(&'a str, [f64; 3])],
    }

    fn measured<'a>(
        workload: &'a str,
        figure: &'a str,
        profiles: &'a [(&'a str, [f64; 3])],
    ) -> Measured<'a> {
        Measured { workload, figure, profiles }
    }

    fn result(all: &[Measured<'_>]) -> Comparison {
        let mut made = json!({ "cells": [], "targets": [{ "name": "haproxy" }] });
        for name in Profile::names() {
            let target = json!({ "name": format!("forward/{name}"), "profile": name });
            made["targets"].as_array_mut().unwrap().push(target);
        }
        for Measured { workload, figure, profiles } in all {
            for (profile, values) in *profiles {
                let round =
                    |(number, value)| json!({ "figures": { *figure: value }, "number": number });
                let rounds: Vec<_> = (1..).zip(values).map(round).collect();
                made["cells"].as_array_mut().unwrap().push(json!({
                    "target": format!("forward/{profile}"),
                    "workload": workload,
                    "unit": if figure.starts_with("bytes") { "GB" } else { "request" },
                    "rounds": rounds,
                }));
            }
        }
        serde_json::from_value(made).unwrap()
    }

    #[test]
    fn profile_that_wins_in_every_round_is_recommended() {
        let faster = [("balanced", [90.0, 92.0, 88.0]), ("latency", [52.0, 50.0, 55.0])];
        let judged = judge(&result(&[measured("pingpong-1", "p50_us", &faster)])).unwrap();
        assert_eq!(judged.profile, "latency");
        assert_eq!(judged.verdicts[0].best, ["latency"]);
        assert!(judged.verdicts[0].gains["latency"] > 1.5);
    }

    #[test]
    fn default_is_kept_where_rounds_disagree() {
        let mixed = [("balanced", [100.0, 110.0, 100.0]), ("latency", [120.0, 100.0, 130.0])];
        let judged = judge(&result(&[measured("pingpong-64", "per_second", &mixed)])).unwrap();
        assert_eq!(judged.profile, "balanced");
        assert_eq!(judged.verdicts[0].best, ["latency", "balanced"]);
        let near = [("balanced", [100.0, 100.0, 100.0]), ("latency", [102.0, 103.0, 101.0])];
        let judged = judge(&result(&[measured("pingpong-64", "per_second", &near)])).unwrap();
        assert_eq!(judged.profile, "balanced", "too little to matter");
    }

    #[test]
    fn an_open_loop_is_judged_by_its_answers_and_by_their_price() {
        let waits = [("balanced", [34.0, 33.0, 34.0]), ("latency", [18.0, 19.0, 18.0])];
        let costs = [("balanced", [36.0, 36.0, 36.0]), ("latency", [48.0, 49.0, 48.0])];
        let mut result = result(&[measured("pingpong-64@20000", "p50_us", &waits)]);
        for (cell, (_, costs)) in result.cells.iter_mut().zip(costs) {
            for (round, cost) in cell.rounds.iter_mut().zip(costs) {
                round.figures.insert("forwarder_cpu_us_per_unit".to_owned(), cost);
            }
        }
        let judged = judge(&result).unwrap();
        let best: Vec<&str> = judged.verdicts.iter().map(|it| it.best[0].as_str()).collect();
        assert_eq!(best, ["latency", "balanced"]);
    }

    #[test]
    fn bulk_that_is_as_fast_is_judged_by_its_price() {
        let same = [("balanced", [50.0, 51.0, 50.0]), ("throughput", [50.0, 50.0, 51.0])];
        let mut result = result(&[measured("bulk-8", "bytes_per_second", &same)]);
        for (cell, costs) in result.cells.iter_mut().zip([[127.0, 126.0, 128.0], [105.0; 3]]) {
            for (round, cost) in cell.rounds.iter_mut().zip(costs) {
                round.figures.insert("forwarder_cpu_us_per_unit".to_owned(), cost);
            }
        }
        let judged = judge(&result).unwrap();
        assert_eq!((judged.profile.as_str(), judged.verdicts.len()), ("throughput", 2));
    }

    #[test]
    fn disturbed_rounds_do_not_decide() {
        let faster = [("balanced", [90.0, 92.0, 30.0]), ("latency", [52.0, 50.0, 55.0])];
        let mut result = result(&[measured("pingpong-1", "p50_us", &faster)]);
        let balanced = result.cells.iter_mut().find(|cell| cell.target == "forward/balanced");
        balanced.unwrap().rounds[2].was_disturbed = true;
        assert_eq!(judge(&result).unwrap().profile, "latency");
    }

    #[test]
    fn most_workloads_decide() {
        let bulk = [("balanced", [30.0, 31.0, 30.0]), ("throughput", [40.0, 41.0, 42.0])];
        let small = [("balanced", [90.0, 91.0, 90.0]), ("throughput", [95.0, 70.0, 92.0])];
        let judged = judge(&result(&[
            measured("bulk-1", "bytes_per_second", &bulk),
            measured("bulk-8", "bytes_per_second", &bulk),
            measured("pingpong-64", "per_second", &small),
        ]));
        assert_eq!(judged.unwrap().profile, "throughput");
        assert_eq!(judge(&result(&[])), None);
        let alone = [("balanced", [90.0, 91.0, 90.0])];
        assert_eq!(judge(&result(&[measured("pingpong-64", "per_second", &alone)])), None);
    }
}
