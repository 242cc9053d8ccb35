// SPDX-License-Identifier: Apache-2.0
//! What a comparison found, as it is kept in a file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::machine::Machine;
use super::statistics::{Estimate, median, of_one, ratio_of_pairs, spread};
use crate::run::outcome::Outcome;

/// The whole file.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Comparison {
    /// The command line that made it.
    pub(crate) command: Vec<String>,
    pub(crate) cells: Vec<Cell>,
    pub(crate) format: String,
    /// It was ended before its time.
    pub(crate) is_partial: bool,
    pub(crate) machine: Machine,
    pub(crate) seconds_each: f64,
    /// Seconds since 1970.
    pub(crate) started: u64,
    pub(crate) targets: Vec<TargetAbout>,
    pub(crate) took_seconds: f64,
    pub(crate) warnings: Vec<String>,
}

/// What a target was.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct TargetAbout {
    /// Its command, and its config.
    pub(crate) config: String,
    pub(crate) name: String,
    /// Empty for what is not weir's.
    #[serde(default)]
    pub(crate) profile: String,
    pub(crate) version: String,
}

/// One target under one workload.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Cell {
    pub(crate) connections: usize,
    /// The latencies of all rounds together, in µs.
    pub(crate) histogram_us: Vec<(f64, u64)>,
    pub(crate) rounds: Vec<Round>,
    pub(crate) target: String,
    pub(crate) unit: String,
    pub(crate) workload: String,
}

/// One measurement.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Round {
    /// Nanoseconds that a cache line took from the generator's CPU to the forwarder's and back, the
    /// longer of before and after; 0 if only one of them is used.
    #[serde(default)]
    pub(crate) distance_ns: f64,
    /// The part of it that others had.
    #[serde(default)]
    pub(crate) disturbance: f64,
    /// Every figure by its name.
    pub(crate) figures: BTreeMap<String, f64>,
    /// Which round it was: pairs are of the same one.
    pub(crate) number: u32,
    pub(crate) outcome: Outcome,
    /// Others had much of it, or the host had moved the CPUs apart.
    pub(crate) was_disturbed: bool,
}

/// Figures and how they are shown: name, heading, factor, decimals, whether more is better.
pub(crate) struct Figure {
    pub(crate) decimals: usize,
    pub(crate) factor: f64,
    pub(crate) heading: &'static str,
    pub(crate) is_better_high: bool,
    pub(crate) name: &'static str,
}

impl Comparison {
    pub(crate) fn read(path: &Path) -> Result<Comparison> {
        let name = path.display();
        let text = fs::read(path).with_context(|| format!("read {name}"))?;
        let comparison: Comparison = serde_json::from_slice(&text)
            .with_context(|| format!("{name} is no result of `weir-loadtest compare`"))?;
        let format = &comparison.format;
        ensure!(format == FORMAT, "{name} has the format {format:?}, and {FORMAT:?} is known");
        Ok(comparison)
    }

    /// That it can be written there, before hours of work; an older one stays as it is.
    pub(crate) fn can_write(path: &Path) -> Result<()> {
        let beside = path.with_extension("json.new");
        let made = fs::write(&beside, "").and_then(|()| fs::remove_file(&beside));
        made.with_context(|| format!("--out {}: cannot write there", path.display()))
    }

    /// Whole or not at all: a reader never sees half a file.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let beside = path.with_extension("json.new");
        let text = serde_json::to_string(self)?;
        fs::write(&beside, text).with_context(|| format!("write {}", beside.display()))?;
        fs::rename(&beside, path).with_context(|| format!("write {}", path.display()))
    }

    pub(crate) fn cell(&self, target: &str, workload: &str) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.target == target && cell.workload == workload)
    }

    /// Workloads in the order in which they were measured.
    pub(crate) fn workloads(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !names.contains(&cell.workload.as_str()) {
                names.push(&cell.workload);
            }
        }
        names
    }

    /// What everything is held against, if nothing is said: the way without a forwarder.
    pub(crate) fn baseline(&self) -> String {
        let named = |name: &str| self.targets.iter().find(|target| target.name == name);
        let target = named("direct").or_else(|| self.targets.first());
        target.map(|target| target.name.clone()).unwrap_or_default()
    }

    /// The ratio of a figure to the baseline's, by pairs of rounds.
    pub(crate) fn ratio(&self, cell: &Cell, baseline: &str, figure: &str) -> Option<Estimate> {
        let base = self.cell(baseline, &cell.workload)?;
        if base.target == cell.target {
            return None;
        }
        let (of, to): (Vec<f64>, Vec<f64>) = cell.pairs(base, figure).into_iter().unzip();
        (!of.is_empty()).then(|| ratio_of_pairs(&of, &to))
    }
}

impl Cell {
    /// The rounds that count: those that were not disturbed, if there are enough to tell.
    fn counted(&self) -> Vec<&Round> {
        let calm: Vec<&Round> = self.rounds.iter().filter(|round| !round.was_disturbed).collect();
        if calm.len() >= CALM_MIN { calm } else { self.rounds.iter().collect() }
    }

    /// A figure of every round that counts and has it.
    pub(crate) fn values(&self, figure: &str) -> Vec<f64> {
        let rounds = self.counted().into_iter();
        rounds.filter_map(|round| round.figures.get(figure).copied()).collect()
    }

    /// A figure of every round that has it in both cells.
    pub(crate) fn pairs(&self, other: &Cell, figure: &str) -> Vec<(f64, f64)> {
        let of = |round: &Round| round.figures.get(figure).copied();
        let others = other.counted();
        let twin = |round: &Round| others.iter().find(|twin| twin.number == round.number);
        let rounds = self.counted().into_iter();
        rounds.filter_map(|round| Some((of(round)?, of(twin(round)?)?))).collect()
    }

    pub(crate) fn median(&self, figure: &str) -> Option<f64> {
        let values = self.values(figure);
        (!values.is_empty()).then(|| median(&values))
    }

    pub(crate) fn spread(&self, figure: &str) -> f64 {
        spread(&self.values(figure))
    }

    pub(crate) fn estimate(&self, figure: &str) -> Estimate {
        of_one(&self.values(figure))
    }

    /// Whether a figure says something of a forwarder. A closed loop of many connections is always
    /// full: its high quantiles tell in which order the queue was served, and move with every breath
    /// of the machine; latency is for one connection, and for an open loop.
    pub(crate) fn tells(&self, figure: &str) -> bool {
        let is_tail = matches!(figure, "p90_us" | "p99_us" | "p99_9_us" | "max_us");
        !is_tail || self.connections == 1 || self.workload.contains('@')
    }

    /// The figure that this workload is about.
    pub(crate) fn first_figure(&self) -> &'static str {
        match self.unit.as_str() {
            "GB" => "bytes_per_second",
            "flow" => "user_bytes_per_flow",
            // Where the rate is given, it decides nothing.
            _ if self.workload.contains('@') => "p50_us",
            _ => "per_second",
        }
    }
}

/// The known figure of that name.
pub(crate) fn figure(name: &str) -> Option<&'static Figure> {
    FIGURES.iter().find(|figure| figure.name == name)
}

const fn known(
    name: &'static str,
    heading: &'static str,
    factor: f64,
    decimals: usize,
    is_better_high: bool,
) -> Figure {
    Figure { decimals, factor, heading, is_better_high, name }
}

/// Everything that is measured, in the order of tables.
pub(crate) const FIGURES: [Figure; 20] = [
    known("per_second", "rate /s", 1.0, 0, true),
    known("bytes_per_second", "Gbit/s", 8e-9, 2, true),
    known("p50_us", "p50 µs", 1.0, 1, false),
    known("p90_us", "p90 µs", 1.0, 1, false),
    known("p99_us", "p99 µs", 1.0, 1, false),
    known("p99_9_us", "p99.9 µs", 1.0, 1, false),
    known("max_us", "max µs", 1.0, 0, false),
    known("forwarder_cpu_us_per_unit", "forwarder CPU µs", 1.0, 2, false),
    known("system_cpu_us_per_unit", "system CPU µs", 1.0, 2, false),
    known("forwarder_busy", "forwarder %", 100.0, 0, false),
    known("generator_busy", "generator %", 100.0, 0, false),
    known("enters_per_unit", "ring enters", 1.0, 3, false),
    known("syscalls_per_unit", "syscalls", 1.0, 2, false),
    known("user_bytes_per_flow", "user B", 1.0, 0, false),
    known("slab_bytes_per_flow", "slab B", 1.0, 0, false),
    known("conntrack_per_flow", "conntrack/flow", 1.0, 1, false),
    known("retransmits", "retransmits", 1.0, 0, false),
    known("fallbacks", "fallbacks", 1.0, 0, false),
    known("errors", "errors", 1.0, 0, false),
    known("others_cpu", "others' CPU", 1.0, 2, false),
];
/// Fewer calm rounds than this say less than all of them.
const CALM_MIN: usize = 2;
pub(crate) const FORMAT: &str = "weir-loadtest-compare/1";
