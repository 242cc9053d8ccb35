// SPDX-License-Identifier: Apache-2.0
//! The client: puts load on an address for a while and counts what came of it.
//!
//! Closed loop: every connection waits for its answer before it asks again. Open loop (`--rate`):
//! exchanges are due at their times whatever the answers do, and a latency counts from when its
//! exchange was due, so that a stall is not omitted from the figures.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use nix::time::{ClockId, clock_gettime};

use crate::arguments::{Engine, Output, Run, Serve};
use crate::serve::{self, Server};
use crate::threshold::Figures;
use crate::watch::{Memory, Watch};
use crate::{Exit, bolt, place, print, signals};

use client::Client;
use outcome::Outcome;

mod client;
pub(crate) mod outcome;
mod pace;
pub(crate) mod sizes;
mod steal;
mod tokio_uring;

/// What to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    /// Ask once to start a source, then read as fast as it goes
    Bulk,
    /// Connect, exchange one message, close; again and again
    Connections,
    /// Connect, send a message and FIN, then read the answer to its end
    HalfClose,
    /// Exchange HTTP/1.1 requests and answers on connections that stay
    Http,
    /// Connect, and hold the connections without a word
    Idle,
    /// Exchange messages on connections that stay
    Pingpong,
    /// Send to a sink as fast as it goes
    Upload,
}

impl Kind {
    /// Each exchange has a connection of its own.
    const fn is_short(self) -> bool {
        matches!(self, Kind::Connections | Kind::HalfClose)
    }

    /// Bytes, and not exchanges, are what counts.
    const fn is_stream(self) -> bool {
        matches!(self, Kind::Bulk | Kind::Upload)
    }

    /// The server that this load wants.
    const fn server(self) -> serve::Kind {
        match self {
            Kind::Bulk => serve::Kind::Source,
            Kind::HalfClose => serve::Kind::HalfDuplex,
            Kind::Http => serve::Kind::Http,
            Kind::Connections | Kind::Idle | Kind::Pingpong => serve::Kind::Echo,
            Kind::Upload => serve::Kind::Sink,
        }
    }

    pub(crate) fn word(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Runs, and prints the outcome.
pub(crate) fn run(arguments: &Run) -> Result<Exit> {
    check(arguments)?;
    signals::catch()?;
    if let Some(cpu) = arguments.place.cpu {
        place::pin(cpu)?;
    }
    if let Some(cgroup) = &arguments.cgroup {
        place::join(cgroup)?;
    }
    let mut watch = Watch::new(arguments.watch_pid.clone(), arguments.watch_socket.clone());
    let memory = watch.memory()?;
    let server = arguments.serve.map(|listen| server(arguments, listen)).transpose()?;
    if server.is_some() {
        watch.add_this_namespace();
    }
    if let Some(namespace) = &arguments.place.netns {
        place::enter(namespace)?;
    }
    // Once, if both are in the same.
    if server.is_none() || arguments.place.netns.is_some() {
        watch.add_this_namespace();
    }
    let outcome = match arguments.place.engine {
        Engine::Ring => Client::open(arguments, server)?.measure(watch, memory)?,
        Engine::TokioUring => tokio_uring::measure(arguments, watch, memory)?,
    };
    print(&match arguments.output {
        Output::Json => format!("{}\n", serde_json::to_string(&outcome)?),
        Output::Table => table(&outcome),
    });
    judge(arguments, &outcome)
}

/// What cannot be, said before anything is done.
fn check(arguments: &Run) -> Result<()> {
    let kind = arguments.kind;
    ensure!(arguments.connections > 0, "--connections must be above 0");
    if arguments.rate.is_some() && (kind.is_stream() || kind == Kind::Idle) {
        bail!("--rate is for exchanges, and --kind {} has none", kind.word());
    }
    if arguments.rate.is_some() && !arguments.think.is_zero() {
        bail!("--think is for the closed loop: leave it out, or --rate");
    }
    if let Some(frame) = arguments.bolt {
        let is_plain = kind == Kind::Pingpong && !arguments.check;
        ensure!(is_plain, "--bolt is for --kind pingpong, without --check");
        let fits = frame >= bolt::FRAME_BYTES_MIN && arguments.size.largest().is_multiple_of(frame);
        ensure!(fits, "--bolt must be at least {} and divide --size", bolt::FRAME_BYTES_MIN);
    }
    if arguments.check && matches!(kind, Kind::Http | Kind::Idle) {
        bail!("--check needs messages of its own, and --kind {} has none", kind.word());
    }
    if arguments.place.engine == Engine::TokioUring {
        let is_there = matches!(kind, Kind::Bulk | Kind::Connections | Kind::Pingpong);
        ensure!(is_there, "--engine tokio-uring knows bulk, connections and pingpong only");
        let is_plain = arguments.rate.is_none() && !arguments.check && arguments.serve.is_none();
        ensure!(is_plain, "--rate, --check and --serve need --engine ring");
    }
    Ok(())
}

/// The server that this load wants.
fn server(arguments: &Run, listen: std::net::SocketAddr) -> Result<Server> {
    if let Some(namespace) = &arguments.serve_netns {
        place::enter(namespace)?;
    }
    Server::open(&Serve {
        bolt: arguments.bolt,
        check: arguments.check,
        congestion: arguments.congestion.clone(),
        delay: Duration::ZERO,
        kind: arguments.kind.server(),
        listen,
        place: arguments.place.clone(),
        read_rate: 0,
        // An upload comes in large pieces, whatever the size of a message.
        size: (arguments.kind != Kind::Upload).then(|| arguments.size.largest()),
    })
}

/// The exit code, with its reason on stderr.
fn judge(arguments: &Run, outcome: &Outcome) -> Result<Exit> {
    if arguments.kind != Kind::Idle && outcome.per_second == 0.0 && outcome.bytes_per_second == 0.0
    {
        let kinds: Vec<&str> = outcome.errors_by_kind.keys().map(String::as_str).collect();
        let kinds = kinds.join(", ");
        bail!("nothing got through to {} ({} errors: {kinds})", arguments.to, outcome.errors);
    }
    if outcome.interrupted {
        eprintln!("interrupted after {:.1} s: the figures are of that time", outcome.seconds);
        return Ok(Exit::Interrupted);
    }
    if let Some(wanted) = arguments.rate.filter(|wanted| outcome.per_second < wanted * 0.99) {
        let reached = outcome.per_second;
        eprintln!("warning: {wanted} exchanges a second were due and {reached:.0} done");
    }
    let figures = Figures::of(outcome);
    let missed: Vec<String> =
        arguments.threshold.iter().filter_map(|threshold| threshold.missed(&figures)).collect();
    missed.iter().for_each(|text| eprintln!("{text}"));
    Ok(if missed.is_empty() { Exit::Fine } else { Exit::ThresholdMissed })
}

/// What a person wants to know first.
fn table(outcome: &Outcome) -> String {
    let mut text = String::new();
    let latency = &outcome.latency_us;
    let head = format!(
        "{}, {} connections, {} B, {:.1} s",
        outcome.kind, outcome.connections, outcome.size, outcome.seconds
    );
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{head}");
    if outcome.per_second > 0.0 {
        let _ = writeln!(text, "  rate     {:>12.0} /s", outcome.per_second);
        for (name, value) in [
            ("p50", latency.p50),
            ("p90", latency.p90),
            ("p99", latency.p99),
            ("p99.9", latency.p99_9),
            ("max", latency.max),
        ] {
            let _ = writeln!(text, "  {name:<8} {value:>12.1} µs");
        }
    }
    if outcome.bytes_per_second > 0.0 {
        let _ = writeln!(text, "  received {:>12.1} MB/s", outcome.bytes_per_second / 1e6);
    }
    let _ = writeln!(text, "  errors   {:>12}", outcome.errors);
    for (kind, count) in &outcome.errors_by_kind {
        let _ = writeln!(text, "    {kind:<16} {count}");
    }
    if let Some(bytes) = outcome.watched_bytes_per_connection {
        let _ = writeln!(text, "  memory   {bytes:>12.0} B a connection of the watched process");
    }
    if let Some(watched) = &outcome.watched {
        let _ = writeln!(text, "  watched  {:>12.3} s of CPU", watched.cpu_seconds);
    }
    text
}

/// CPU time of this thread.
fn thread_cpu() -> Duration {
    // The clock exists on every Linux.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// Memory that came for each connection.
#[expect(clippy::cast_precision_loss, reason = "bytes stay far below 2^52")]
fn each(bytes: i64, connections: usize) -> f64 {
    bytes as f64 / connections.max(1) as f64
}

/// What the outcome says besides its counts.
fn about(arguments: &Run, outcome: Outcome) -> Outcome {
    let engine = arguments.place.engine.to_possible_value();
    Outcome {
        connections: arguments.connections,
        engine: engine.map_or_else(String::new, |value| value.get_name().to_owned()),
        interrupted: signals::is_interrupted(),
        kind: arguments.kind.word(),
        rate_wanted: arguments.rate,
        size: arguments.size.to_string(),
        ..outcome
    }
}

/// A reading at the begin, for the difference at the end.
struct Window {
    begin: crate::watch::Reading,
    cpu: Duration,
    memory: Memory,
    watch: Watch,
}

impl Window {
    fn open(mut watch: Watch, memory: Memory) -> Window {
        let begin = watch.read();
        Window { begin, cpu: thread_cpu(), memory, watch }
    }

    /// Completes the outcome; `cpu` is this thread's at the end.
    fn close(mut self, arguments: &Run, cpu: Duration, outcome: Outcome) -> Result<Outcome> {
        let mut outcome = about(arguments, outcome);
        outcome.generator.cpu_seconds = cpu.saturating_sub(self.cpu).as_secs_f64();
        let end = self.watch.read();
        let watched = self.watch.difference(&self.begin, &end, &self.memory)?;
        if arguments.kind == Kind::Idle && !arguments.watch_pid.is_empty() {
            outcome.watched_bytes_per_connection =
                Some(each(watched.user_bytes, arguments.connections));
        }
        outcome.watched = Some(watched);
        Ok(outcome)
    }
}
