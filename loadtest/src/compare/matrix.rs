// SPDX-License-Identifier: Apache-2.0
//! The matrix itself: every target under every workload, A B C A B C, round after round.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::figures;
use super::lab::Lab;
use super::programs::{self, Common, Started};
use super::progress::{Left, Progress};
use super::result::Comparison;
use super::select::Workload;
use crate::run::Kind;
use crate::run::outcome::Outcome;
use crate::signals::is_interrupted;
use crate::{near, watch};

/// Rounds, and places of the target and the workload.
type Steps = VecDeque<(u32, (usize, usize))>;

/// How to measure.
pub(super) struct Plan {
    pub(super) common: Common,
    pub(super) generator_cpu: usize,
    pub(super) out: PathBuf,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    /// After that nothing is measured again.
    pub(super) until: Instant,
    pub(super) with_syscalls: bool,
}

/// Measures until all is done or somebody interrupts; what was measured is in the file after every
/// round and at the end. As far as there is time, moments in which the host has moved our CPUs apart
/// are waited out, and what was disturbed is measured again.
pub(super) fn measure(
    plan: &Plan,
    lab: &mut Lab,
    targets: &mut [Started],
    workloads: &[Workload],
    comparison: &mut Comparison,
) -> Result<()> {
    let idle: Vec<u64> = targets.iter().map(|target| target.site.sockets().unwrap_or(0)).collect();
    let cells = cells(targets, workloads, comparison);
    ensure!(!cells.is_empty(), "no target can have as many flows as any workload has");
    let rounds = (1..=plan.rounds).flat_map(|round| cells.iter().map(move |cell| (round, *cell)));
    let mut steps: Steps = rounds.collect();
    let first_ones = u32::try_from(steps.len())?;
    let each = Duration::from_secs_f64(plan.seconds + WARMUP_SECONDS);
    let mut progress = Progress::new(first_ones, each, plan.until);
    let mut nearest = f64::INFINITY;
    while !is_interrupted() {
        let is_repeat = progress.done() >= first_ones;
        if steps.is_empty() {
            steps = disturbed(comparison, targets, workloads);
        }
        let is_enough = progress.done() >= REPEATS_MAX * first_ones || Instant::now() > plan.until;
        let Some((round, (place, index))) = steps.pop_front() else { break };
        if is_repeat && is_enough {
            break;
        }
        let (workload, target) = (&workloads[index], &mut targets[place]);
        let turn = if is_repeat { "disturbed, again".to_owned() } else { format!("round {round}") };
        progress.begin(left(&steps, is_repeat, comparison)?);
        let before = once_near(plan, target, workload, &mut nearest, &mut progress);
        progress.say(format!("{turn}: {}, {workload}", target.about.name));
        let began = Instant::now();
        let measured = afresh(plan, lab, target, workload)
            .and_then(|()| one(plan, target, workload))
            .with_context(|| format!("{} under {workload}", target.about.name));
        match measured {
            Ok(outcome) => {
                let apart = before.max(distance(plan, target, workload, &mut nearest));
                figures::keep(comparison, target, workload, round, apart, outcome);
            }
            // Cut short: no figure.
            Err(_) if is_interrupted() => {}
            Err(error) => {
                let text = format!("{error:#}");
                progress.warn(&text);
                comparison.warnings.push(text);
            }
        }
        settle(target, idle[place]);
        progress.step(began.elapsed());
        figures::mark(comparison, nearest);
        if (progress.done() as usize).is_multiple_of(cells.len()) {
            comparison.write(&plan.out)?;
        }
    }
    figures::gather(comparison);
    Ok(())
}

/// The steps, and one more that was just taken from them.
fn left(steps: &Steps, is_repeat: bool, comparison: &Comparison) -> Result<Left> {
    let count = u32::try_from(steps.len())? + 1;
    if is_repeat {
        return Ok(Left { again: count, first: 0 });
    }
    let rounds = comparison.cells.iter().flat_map(|cell| &cell.rounds);
    let again = u32::try_from(rounds.filter(|round| round.was_disturbed).count())?;
    Ok(Left { again, first: count })
}

/// Waits, as long as there is time for it, until the CPUs are as near as they can be; how near they
/// are.
fn once_near(
    plan: &Plan,
    target: &Started,
    workload: &Workload,
    nearest: &mut f64,
    progress: &mut Progress,
) -> f64 {
    let since = Instant::now();
    loop {
        let apart = distance(plan, target, workload, nearest);
        let is_over = progress.patience().is_zero() || is_interrupted();
        if !near::is_far(apart, *nearest) || is_over {
            return apart;
        }
        progress.wait(since);
        std::thread::sleep(near::LOOK_EVERY);
    }
}

/// Of the CPUs that a measurement needs; nothing if that is one, or where nobody is busy.
fn distance(plan: &Plan, target: &Started, workload: &Workload, nearest: &mut f64) -> f64 {
    let other = target.cpus.first().filter(|_| workload.kind != Kind::Idle);
    let found = other.and_then(|other| near::between(plan.generator_cpu, *other));
    let found = found.filter(|found| *found > 0.0);
    *nearest = found.unwrap_or(*nearest).min(*nearest);
    found.unwrap_or(0.0)
}

/// What is worth to be measured again, in the order of its rounds.
fn disturbed(comparison: &Comparison, targets: &[Started], workloads: &[Workload]) -> Steps {
    let mut steps = Vec::new();
    for cell in &comparison.cells {
        let place = targets.iter().position(|target| target.about.name == cell.target);
        let index = workloads.iter().position(|workload| workload.name == cell.workload);
        let (Some(place), Some(index)) = (place, index) else { continue };
        let rounds = cell.rounds.iter().filter(|round| round.was_disturbed);
        steps.extend(rounds.map(|round| (round.number, (index, place))));
    }
    steps.sort_unstable();
    steps.into_iter().map(|(round, (index, place))| (round, (place, index))).collect()
}

/// Places of targets and workloads, in the order of a round: every target in turn under a workload.
/// Who cannot have as many flows is left out aloud.
fn cells(
    targets: &[Started],
    workloads: &[Workload],
    comparison: &mut Comparison,
) -> Vec<(usize, usize)> {
    let mut cells = Vec::new();
    for (index, workload) in workloads.iter().enumerate() {
        for (place, target) in targets.iter().enumerate() {
            match target.flows_max.filter(|most| *most < workload.connections) {
                None => cells.push((place, index)),
                Some(most) => {
                    let name = &target.about.name;
                    let text = format!(
                        "left out {name} under {workload}: it may have {most} flows \
                         (descriptors: two a flow, of a process or of each worker)"
                    );
                    eprintln!("warning: {text}");
                    comparison.warnings.push(text);
                }
            }
        }
    }
    cells
}

/// What an idle flow costs shows only in a forwarder that has no memory of earlier ones.
/// Nor does any figure hang on connections that were tracked before.
fn afresh(plan: &Plan, lab: &mut Lab, target: &mut Started, workload: &Workload) -> Result<()> {
    if workload.kind == Kind::Idle {
        *target = programs::run(lab, &plan.common, target.clone())?;
    }
    target.site.forget_tracked()
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
    let cpus = std::iter::once(&plan.generator_cpu).chain(&target.cpus);
    say("watch-cpu", cpus.map(usize::to_string).collect::<Vec<_>>().join(","));
    if workload.reset {
        words.push("--reset".to_owned());
    }
    words
}

/// Tries it, before all is measured without.
pub(super) fn can_count_syscalls() -> Result<()> {
    let is_there = programs::find("perf").is_some();
    ensure!(is_there, "--syscalls: perf is not installed: apt-get install linux-perf");
    let attempt = ["stat", "-x,", "-e", SYSCALL_EVENT, "--", "true"];
    let output = Command::new("perf").args(attempt).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "--syscalls: perf cannot count {SYSCALL_EVENT} here (needs root): {}",
        said.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim()
    );
    Ok(())
}

/// Counts the forwarder's system calls for the middle of the measurement, in parts of a second.
fn syscall_counter(plan: &Plan, target: &Started) -> Option<(std::process::Child, f64)> {
    let family = watch::family(target.pid.filter(|_| plan.with_syscalls)?);
    let pids = family.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let seconds = plan.seconds / 2.0;
    let mut command = Command::new("sh");
    let wait = WARMUP_SECONDS + plan.seconds / 4.0 + 0.1;
    let script = format!(
        "sleep {wait:.2}; exec perf stat -x, -e {SYSCALL_EVENT} -p {pids} -- sleep {seconds:.2}"
    );
    command.args(["-c", &script]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    Some((command.spawn().ok()?, seconds))
}

/// System calls a second.
fn counted((child, seconds): (std::process::Child, f64)) -> Option<f64> {
    let output = child.wait_with_output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = text.lines().find(|line| line.contains(SYSCALL_EVENT))?;
    Some(line.split(',').next()?.parse::<f64>().ok()? / seconds)
}

/// The sockets of the last load go first: who still closes is no forwarder at rest.
fn settle(target: &Started, idle: u64) {
    let until = Instant::now() + SETTLE_MAX;
    while Instant::now() < until && target.site.sockets().is_ok_and(|sockets| sockets > idle) {
        std::thread::sleep(LOOK_EVERY);
    }
}

const LOOK_EVERY: Duration = Duration::from_millis(5);
/// To open thousands of connections, and to be slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// All measurements in the end, as a multiple of those that are wanted.
const REPEATS_MAX: u32 = 2;
const SETTLE_MAX: Duration = Duration::from_secs(3);
const SYSCALL_EVENT: &str = "raw_syscalls:sys_enter";
pub(super) const SYSCALLS: &str = "syscalls_per_second";
pub(super) const WARMUP_SECONDS: f64 = 0.15;
