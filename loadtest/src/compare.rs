// SPDX-License-Identifier: Apache-2.0
//! `compare`: builds a lab, runs the matrix, keeps and shows what it found.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail, ensure};

use crate::arguments::{Compare, Output};
use crate::threshold::{Figures, Threshold};
use crate::{Exit, Usage, place, print, signals};

use lab::Lab;
use machine::Machine;
use matrix::{Plan, WARMUP_SECONDS};
use programs::{Common, Started};
use result::Comparison;
use select::{Selection, Target, Way};

mod difference;
mod figures;
mod lab;
mod machine;
mod matrix;
mod programs;
mod progress;
pub(crate) mod result;
pub(crate) mod select;
pub(crate) mod shown;
pub(crate) mod statistics;
mod tracking;

/// Compares targets on this host, or two results.
pub(crate) fn compare(arguments: &Compare) -> Result<Exit> {
    match arguments.results.as_slice() {
        [] => here(arguments),
        [old, new] => results(arguments, old, new),
        [_, ..] => {
            let text = "name two results to compare, the older first; or none, to measure here";
            Err(Usage(text.to_owned()).into())
        }
    }
}

fn results(arguments: &Compare, old: &Path, new: &Path) -> Result<Exit> {
    let (old, new) = (Comparison::read(old)?, Comparison::read(new)?);
    print(&difference::difference(&old, &new));
    judge(&arguments.threshold, &new)
}

fn here(arguments: &Compare) -> Result<Exit> {
    let mut selection = wanted(arguments)?;
    signals::catch()?;
    let is_loopback = !nix::unistd::geteuid().is_root();
    let mut warnings = Vec::new();
    if is_loopback {
        without_root(arguments, &mut selection, &mut warnings)?;
    }
    let cpus = place::allowed_cpus();
    let generator_cpu = arguments.generator_cpu.unwrap_or(cpus[0]);
    let forwarder_cpu = arguments.forwarder_cpu.unwrap_or(cpus[1 % cpus.len()]);
    let machine = Machine::look(&arguments.congestion, generator_cpu, forwarder_cpu);
    warnings.extend(machine.warnings(is_loopback));
    for warning in &warnings {
        eprintln!("warning: {warning}");
    }
    if machine.is_too_busy() && !arguments.force {
        bail!(
            "others keep {:.2} CPUs busy: end them first, or say --force to measure all the same",
            machine.others_cpu
        );
    }
    let mut lab = Lab::new(is_loopback)?;
    let common = Common {
        congestion: arguments.congestion.clone(),
        forwarder_cpus: forwarder_cpus(&cpus, generator_cpu, forwarder_cpu),
        is_tracked: arguments.tracking,
        weir: weir(arguments, &selection)?,
    };
    let began = Instant::now();
    let mut started = start_all(&mut lab, &common, &selection, &mut warnings)?;
    let seconds = seconds_each(arguments, started.len(), &selection, began);
    let mut comparison = Comparison {
        command: std::env::args().collect(),
        format: result::FORMAT.to_owned(),
        machine,
        seconds_each: seconds,
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        targets: started.iter().map(|started| started.about.clone()).collect(),
        warnings,
        ..Comparison::default()
    };
    let plan = Plan {
        common,
        generator_cpu,
        out: arguments.out.clone(),
        rounds: arguments.rounds,
        seconds,
        until: began + Duration::from_secs_f64(arguments.budget),
        with_syscalls: arguments.syscalls,
    };
    let measured =
        matrix::measure(&plan, &mut lab, &mut started, &selection.workloads, &mut comparison);
    comparison.is_partial = signals::is_interrupted() || measured.is_err();
    comparison.took_seconds = began.elapsed().as_secs_f64();
    comparison.write(&arguments.out)?;
    measured?;
    drop(lab);
    let is_empty = comparison.cells.is_empty() && !comparison.is_partial;
    ensure!(!is_empty, "nothing could be measured: the warnings say why");
    finish(arguments, &comparison)
}

/// What was asked for, and that it can be had.
fn wanted(arguments: &Compare) -> Result<Selection> {
    let selection = arguments.selection().map_err(Usage::of)?;
    check(arguments, &selection).map_err(Usage::of)?;
    Comparison::can_write(&arguments.out)?;
    if arguments.syscalls {
        matrix::can_count_syscalls()?;
    }
    Ok(selection)
}

/// What would be found out after all was measured, said before.
fn check(arguments: &Compare, selection: &Selection) -> Result<()> {
    if let Some(name) = &arguments.baseline {
        let names: Vec<&str> = selection.targets.iter().map(|it| it.name.as_str()).collect();
        let hint = select::nearest(name, &names);
        let known = names.join(", ");
        ensure!(
            names.contains(&name.as_str()),
            "--baseline {name}: no such target{hint} (there are {known})"
        );
    }
    let allowed = place::allowed_cpus();
    for (option, cpu) in
        [("--generator-cpu", arguments.generator_cpu), ("--forwarder-cpu", arguments.forwarder_cpu)]
    {
        let is_ours = cpu.is_none_or(|cpu| allowed.contains(&cpu));
        ensure!(is_ours, "{option}: only CPUs {allowed:?} are allowed here");
    }
    enough_descriptors(selection, place::descriptors_max())
}

/// The forwarder's CPU, then those that nobody has, then the generator's.
fn forwarder_cpus(allowed: &[usize], generator: usize, forwarder: usize) -> Vec<usize> {
    let free = allowed.iter().copied().filter(|cpu| *cpu != forwarder && *cpu != generator);
    let mut list: Vec<usize> = std::iter::once(forwarder).chain(free).collect();
    if generator != forwarder {
        list.push(generator);
    }
    list
}

/// What works without privilege: everything that is a plain forwarder, over the host's loopback.
fn without_root(
    arguments: &Compare,
    selection: &mut Selection,
    warnings: &mut Vec<String>,
) -> Result<()> {
    ensure!(!arguments.tracking, "--tracking: needs root, for network namespaces of our own");
    let is_plain = |way| matches!(way, Way::Direct | Way::Forward | Way::Peer(_));
    let needs_root = |target: &Target| !is_plain(target.way);
    let refused: Vec<&str> = selection
        .targets
        .iter()
        .filter(|target| target.is_named && needs_root(target))
        .map(|target| target.name.as_str())
        .collect();
    let refused = refused.join(", ");
    if !refused.is_empty() {
        bail!(
            "{refused}: capture needs root; without it direct, forward and peers work, over loopback"
        );
    }
    warnings.push(
        "without root there is no lab of namespaces: all is measured over the host's loopback, \
         without captures"
            .to_owned(),
    );
    selection.targets.retain(|target| !needs_root(target));
    Ok(())
}

/// Client and server each have a table of descriptors, one for each connection.
fn enough_descriptors(selection: &Selection, most: u32) -> Result<()> {
    for workload in &selection.workloads {
        let needed = workload.connections as u64 + DESCRIPTORS_SPARE;
        ensure!(
            needed <= u64::from(most),
            "{workload} needs {needed} descriptors a process, and {most} are allowed: `ulimit -n`"
        );
    }
    Ok(())
}

fn weir(arguments: &Compare, selection: &Selection) -> Result<std::path::PathBuf> {
    let is_needed = |target: &Target| !matches!(target.way, Way::Direct | Way::Peer(_));
    if selection.targets.iter().any(is_needed) {
        return programs::find_weir(arguments.weir.as_deref());
    }
    Ok(std::path::PathBuf::new())
}

/// Whoever cannot be started is left out aloud; who was asked for by name is an error.
fn start_all(
    lab: &mut Lab,
    common: &Common,
    selection: &Selection,
    warnings: &mut Vec<String>,
) -> Result<Vec<Started>> {
    let mut list = Vec::new();
    for target in &selection.targets {
        match programs::start(lab, common, target) {
            Ok(started) => list.push(started),
            Err(error) if target.is_named || signals::is_interrupted() => {
                bail!("{}: {error:#}", target.name)
            }
            Err(error) => {
                lab.end(&target.name);
                let text = format!("left out {}: {error:#}", target.name);
                eprintln!("warning: {text}");
                warnings.push(text);
            }
        }
    }
    ensure!(!list.is_empty(), "nothing is left to compare");
    Ok(list)
}

/// So long that all fits the time, if nothing is said.
#[expect(clippy::cast_precision_loss, reason = "hundreds of cells")]
fn seconds_each(arguments: &Compare, targets: usize, selection: &Selection, began: Instant) -> f64 {
    if let Some(seconds) = arguments.seconds {
        return seconds;
    }
    let cells = (targets * selection.workloads.len()) as f64 * f64::from(arguments.rounds);
    let left = arguments.budget * FIRST_ONES_PART - began.elapsed().as_secs_f64();
    (left / cells - WARMUP_SECONDS - OVERHEAD_SECONDS).clamp(SECONDS_MIN, SECONDS_MAX)
}

fn finish(arguments: &Compare, comparison: &Comparison) -> Result<Exit> {
    // Who was to be the baseline and could not be started was left out aloud.
    let asked = arguments.baseline.as_ref();
    let asked = asked.filter(|name| comparison.targets.iter().any(|it| it.name == **name));
    let baseline = asked.cloned().unwrap_or_else(|| comparison.baseline());
    match arguments.output {
        Output::Json => print(&format!("{}\n", serde_json::to_string(comparison)?)),
        Output::Table => {
            print(&shown::text(comparison, &baseline));
            print(&format!("\n{}\n", shown::summary(comparison, &baseline).join("\n")));
        }
    }
    let out = arguments.out.display();
    eprintln!("kept in {out}; `weir-loadtest report {out}` makes a page of it");
    if comparison.is_partial {
        eprintln!("interrupted: the lab is removed, and what was measured so far is kept");
        return Ok(Exit::Interrupted);
    }
    judge(&arguments.threshold, comparison)
}

/// Thresholds hold for every cell that has such a figure.
pub(crate) fn judge(thresholds: &[Threshold], comparison: &Comparison) -> Result<Exit> {
    let mut exit = Exit::Fine;
    for cell in &comparison.cells {
        let figures = figures(cell);
        let missed = thresholds.iter().filter(|threshold| threshold.is_about(&figures));
        for text in missed.filter_map(|threshold| threshold.missed(&figures)) {
            eprintln!("{} under {}: {text}", cell.target, cell.workload);
            exit = Exit::ThresholdMissed;
        }
    }
    Ok(exit)
}

fn figures(cell: &result::Cell) -> Figures {
    let median = |name: &str| cell.median(name).unwrap_or(f64::NAN);
    Figures {
        bytes_per_second: median("bytes_per_second"),
        errors: cell.values("errors").iter().sum(),
        max_us: median("max_us"),
        mean_us: f64::NAN,
        p50_us: median("p50_us"),
        p90_us: median("p90_us"),
        p99_us: median("p99_us"),
        p99_9_us: median("p99_9_us"),
        per_second: median("per_second"),
    }
}

/// For files, listeners and rings.
const DESCRIPTORS_SPARE: u64 = 200;
/// What of the time is for measuring everything once; the rest is to wait for calm moments, and to do
/// again what was disturbed.
const FIRST_ONES_PART: f64 = 0.65;
/// To start a generator, to open connections, to let them go.
const OVERHEAD_SECONDS: f64 = 0.15;
const SECONDS_MAX: f64 = 10.0;
/// Below this a cell says nothing.
const SECONDS_MIN: f64 = 0.25;
