// SPDX-License-Identifier: Apache-2.0
//! The matrix itself: every target under every workload, A B C A B C, round after round.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::lab::Lab;
use super::programs::{self, Common, Started};
use super::result::{Cell, Comparison, Round};
use super::select::Workload;
use crate::run::Kind;
use crate::run::outcome::Outcome;
use crate::signals::is_interrupted;
use crate::watch;

/// How to measure.
pub(super) struct Plan {
    pub(super) common: Common,
    pub(super) generator_cpu: usize,
    pub(super) out: PathBuf,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    pub(super) with_syscalls: bool,
}

/// Measures until all is done or somebody interrupts; what was measured is in the file after every
/// round and at the end.
pub(super) fn measure(
    plan: &Plan,
    lab: &mut Lab,
    targets: &mut [Started],
    workloads: &[Workload],
    comparison: &mut Comparison,
) -> Result<()> {
    let total = plan.rounds as usize * targets.len() * workloads.len();
    let mut repeats_left = total / REPEATS_PART;
    let bar = progress(total as u64);
    let idle: Vec<u64> = targets.iter().map(|target| target.site.sockets().unwrap_or(0)).collect();
    for round in 1..=plan.rounds {
        for workload in workloads {
            for (target, idle) in targets.iter_mut().zip(&idle) {
                bar.set_message(format!("round {round}: {}, {workload}", target.about.name));
                if is_interrupted() {
                    bar.abandon();
                    comparison.write(&plan.out)?;
                    return Ok(());
                }
                let measured = undisturbed(plan, lab, target, workload, *idle, &mut repeats_left)
                    .with_context(|| format!("{} under {workload}", target.about.name));
                match measured {
                    Ok(outcome) => keep(comparison, target, workload, round, outcome),
                    // Cut short: no figure.
                    Err(_) if is_interrupted() => {}
                    Err(error) => {
                        let text = format!("{error:#}");
                        bar.suspend(|| eprintln!("warning: {text}"));
                        comparison.warnings.push(text);
                    }
                }
                settle(target, *idle);
                bar.inc(1);
                if bar.is_hidden() {
                    say(&bar);
                }
            }
        }
        comparison.write(&plan.out)?;
    }
    bar.finish_and_clear();
    Ok(())
}

/// One measurement; it is repeated, whatever came of it, when somebody else had much of a CPU.
fn undisturbed(
    plan: &Plan,
    lab: &mut Lab,
    target: &mut Started,
    workload: &Workload,
    idle: u64,
    repeats_left: &mut usize,
) -> Result<Outcome> {
    loop {
        afresh(plan, lab, target, workload)?;
        let outcome = one(plan, target, workload)?;
        if others(&outcome) <= DISTURBED_CPUS || *repeats_left == 0 || is_interrupted() {
            return Ok(outcome);
        }
        *repeats_left -= 1;
        settle(target, idle);
    }
}

/// CPUs that others had meanwhile.
fn others(outcome: &Outcome) -> f64 {
    outcome.watched.as_ref().map_or(0.0, |watched| watched.others_seconds / outcome.seconds)
}

/// What an idle flow costs shows only in a forwarder that has no memory of earlier ones.
fn afresh(plan: &Plan, lab: &mut Lab, target: &mut Started, workload: &Workload) -> Result<()> {
    if workload.kind == Kind::Idle {
        *target = programs::run(lab, &plan.common, target.clone())?;
    }
    Ok(())
}

fn progress(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let shape = "{wide_bar} {pos}/{len}  {msg}  about {eta} left";
    // The template is a constant, and right.
    if let Ok(style) = ProgressStyle::with_template(shape) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Where nobody sees a bar: a line for every tenth.
fn say(bar: &ProgressBar) {
    let (done, total) = (bar.position(), bar.length().unwrap_or(1));
    if done * 10 / total != (done - 1) * 10 / total {
        eprintln!("{done} of {total} measured, about {} s left", bar.eta().as_secs());
    }
}

/// One measurement, by a generator of its own.
fn one(plan: &Plan, target: &Started, workload: &Workload) -> Result<Outcome> {
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command.arg("run").args(words(plan, target, workload));
    // Ctrl-C is for us; we pass it on.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().context("start the generator")?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let counter = syscall_counter(plan, target);
    let waiter = std::thread::spawn(move || child.wait_with_output());
    let until = Instant::now() + Duration::from_secs_f64(plan.seconds) + PATIENCE;
    while !waiter.is_finished() {
        if is_interrupted() || Instant::now() > until {
            // It may have ended just now.
            let _ = kill(pid, Signal::SIGKILL);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let Ok(output) = waiter.join() else { bail!("wait for the generator") };
    let output = output.context("wait for the generator")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    ensure!(!output.stdout.is_empty(), "the generator ended with {}: {said}", output.status);
    let mut outcome: Outcome = serde_json::from_slice(&output.stdout)?;
    ensure!(outcome.seconds > 0.0, "nothing was measured: {said}");
    if let (Some(counter), Some(watched)) = (counter, &mut outcome.watched) {
        watched.metrics.extend(counted(counter).map(|count| (SYSCALLS.to_owned(), count)));
    }
    Ok(outcome)
}

/// The arguments of `run`.
fn words(plan: &Plan, target: &Started, workload: &Workload) -> Vec<String> {
    let mut words = Vec::new();
    let mut say = |key: &str, value: String| words.extend([format!("--{key}"), value]);
    let is_idle = workload.kind == Kind::Idle;
    say("kind", workload.kind.word());
    say("connections", workload.connections.to_string());
    say("size", workload.sizes().to_owned());
    say("churn", workload.churn().to_string());
    say("duration", if is_idle { "0.2".to_owned() } else { format!("{:.3}", plan.seconds) });
    say("warmup", WARMUP_SECONDS.to_string());
    say("cpu", plan.generator_cpu.to_string());
    say("to", target.to.to_string());
    say("serve", target.server.to_string());
    say("output", "json".to_owned());
    if let Some(rate) = workload.rate {
        say("rate", rate.to_string());
    }
    for (key, path) in [
        ("netns", &target.client_in),
        ("serve-netns", &target.server_in),
        ("cgroup", &target.cgroup),
        ("watch-socket", &target.socket),
    ] {
        if let Some(path) = path {
            say(key, path.display().to_string());
        }
    }
    if let Some(pid) = target.pid {
        say("watch-pid", pid.to_string());
    }
    if workload.reset {
        words.push("--reset".to_owned());
    }
    words
}

/// Counts the forwarder's system calls for the middle of the measurement, in parts of a second.
fn syscall_counter(plan: &Plan, target: &Started) -> Option<(std::process::Child, f64)> {
    let family = watch::family(target.pid.filter(|_| plan.with_syscalls)?);
    let pids = family.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let seconds = plan.seconds / 2.0;
    let mut command = Command::new("sh");
    let wait = WARMUP_SECONDS + plan.seconds / 4.0 + 0.1;
    let script = format!(
        "sleep {wait:.2}; exec perf stat -x, -e raw_syscalls:sys_enter -p {pids} -- sleep {seconds:.2}"
    );
    command.args(["-c", &script]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    Some((command.spawn().ok()?, seconds))
}

/// System calls a second.
fn counted((child, seconds): (std::process::Child, f64)) -> Option<f64> {
    let output = child.wait_with_output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = text.lines().find(|line| line.contains("raw_syscalls"))?;
    Some(line.split(',').next()?.parse::<f64>().ok()? / seconds)
}

/// The sockets of the last load go first: who still closes is no forwarder at rest.
fn settle(target: &Started, idle: u64) {
    let until = Instant::now() + SETTLE_MAX;
    while Instant::now() < until && target.site.sockets().is_ok_and(|sockets| sockets > idle) {
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Adds a round to its cell.
fn keep(
    comparison: &mut Comparison,
    target: &Started,
    workload: &Workload,
    number: u32,
    mut outcome: Outcome,
) {
    let histogram = std::mem::take(&mut outcome.latency_histogram_us);
    let figures = figures(target, workload, &outcome);
    let was_disturbed = others(&outcome) > DISTURBED_CPUS;
    let round = Round { figures, number, outcome, was_disturbed };
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
    let cell = &mut comparison.cells[place];
    merge(&mut cell.histogram_us, &histogram);
    cell.rounds.push(round);
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
    let latency = &outcome.latency_us;
    let seconds = outcome.seconds;
    is("errors", outcome.errors as f64);
    is("conntrack_entries", watched.conntrack_entries as f64);
    is("retransmits", watched.retransmits as f64);
    is("others_cpu", others(outcome));
    let units = match workload.unit() {
        "GB" => {
            is("bytes_per_second", outcome.bytes_per_second);
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
            is("per_second", outcome.per_second);
            is("p50_us", latency.p50);
            is("p90_us", latency.p90);
            is("p99_us", latency.p99);
            is("p99_9_us", latency.p99_9);
            is("max_us", latency.max);
            outcome.per_second * seconds
        }
    };
    if units <= 0.0 {
        return figures;
    }
    let generator = &outcome.generator;
    let useful = generator.cpu_seconds - generator.idle_spin_seconds;
    let system = useful + watched.cpu_seconds + watched.kernel_threads_seconds;
    is("system_cpu_us_per_unit", system * 1e6 / units);
    if target.pid.is_some() {
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

/// CPUs of others from which on a round counts as disturbed.
const DISTURBED_CPUS: f64 = 0.1;
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// To open thousands of connections, and to be slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// One in so many measurements may be repeated.
pub(super) const REPEATS_PART: usize = 6;
const SETTLE_MAX: Duration = Duration::from_secs(3);
const SYSCALLS: &str = "syscalls_per_second";
pub(super) const WARMUP_SECONDS: f64 = 0.15;

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
