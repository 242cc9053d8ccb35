// SPDX-License-Identifier: Apache-2.0
//! The client: puts load on an address for a while and counts what came of it.
//!
//! Closed loop: every connection waits for its answer before it asks again.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use crate::engine::{self, Engine, Event};
use crate::serve::{self, Server};
use crate::{Run, Serve};

/// What to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    /// Ask once to start a source, then read as fast as it goes
    Bulk,
    /// Connect, exchange one message, close; again and again
    Connections,
    /// Connect, and hold the connections without a word
    Idle,
    /// Exchange messages on connections that stay
    Pingpong,
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Outcome {
    bytes_per_second: f64,
    connections: usize,
    errors: u64,
    latency_us: Latency,
    per_second: f64,
    seconds: f64,
    size: usize,
    /// Anonymous memory of the watched process that came for each connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    watched_bytes_per_connection: Option<f64>,
}

#[derive(Debug, Default, Serialize)]
struct Latency {
    max: u64,
    p50: u64,
    p90: u64,
    p99: u64,
    p99_9: u64,
}

struct Client<'a> {
    arguments: &'a Run,
    bytes: u64,
    counting: bool,
    done: u64,
    engine: Engine,
    errors: u64,
    latency: Histogram<u64>,
    server: Option<Server>,
    slots: Vec<Slot>,
}

struct Slot {
    began: Instant,
    closing: bool,
    in_flight: u32,
    missing: usize,
    socket: Option<Socket>,
    stands: bool,
}

/// Runs and prints the outcome as JSON.
pub(crate) fn run(arguments: &Run) -> Result<()> {
    if arguments.size == 0 || arguments.connections == 0 {
        bail!("--size and --connections must be above 0");
    }
    let message = if arguments.kind == Kind::Bulk { usize::MAX } else { arguments.size };
    let places = u32::try_from(arguments.connections)?;
    let before = arguments.watch_pid.map(anonymous_bytes).transpose()?;
    let mut client = Client {
        arguments,
        bytes: 0,
        counting: false,
        done: 0,
        engine: Engine::open(arguments.to, arguments.size, message, places)?,
        errors: 0,
        latency: Histogram::new_with_bounds(1, 60_000_000, 3)?,
        server: arguments.serve.map(|listen| server(arguments, listen)).transpose()?,
        slots: Vec::new(),
    };
    for index in 0..arguments.connections {
        client.slots.push(Slot::new());
        client.connect(index)?;
    }
    client.turn_for(arguments.warmup)?;
    client.counting = true;
    let began = Instant::now();
    client.turn_for(arguments.duration)?;
    let mut outcome = client.outcome(began.elapsed());
    if let (Some(pid), Some(before)) = (arguments.watch_pid, before) {
        let grown = anonymous_bytes(pid)?.saturating_sub(before);
        outcome.watched_bytes_per_connection = Some(ratio(grown, client.standing()));
    }
    println_json(&outcome)?;
    if arguments.kind == Kind::Idle {
        let standing = client.standing();
        ensure!(standing == u64::from(places), "{standing} of {places} connections stand");
    } else if client.done == 0 && client.bytes == 0 {
        bail!("nothing got through to {} ({} errors)", arguments.to, client.errors);
    }
    Ok(())
}

/// The server that this load wants.
fn server(arguments: &Run, listen: SocketAddr) -> Result<Server> {
    let kind = match arguments.kind {
        Kind::Bulk => serve::Kind::Source,
        _ => serve::Kind::Echo,
    };
    let congestion = arguments.congestion.clone();
    Server::open(&Serve { listen, kind, size: arguments.size, congestion })
}

/// Resident memory that belongs to user space alone (proc_pid_smaps(5)).
fn anonymous_bytes(pid: u32) -> Result<u64> {
    let place = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&place).with_context(|| format!("read {place}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let kilobytes = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kilobytes.with_context(|| format!("no Anonymous in {place}"))? * 1024)
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn ratio(one: u64, other: u64) -> f64 {
    one as f64 / other.max(1) as f64
}

#[expect(clippy::print_stdout, reason = "the outcome is what the command is for")]
fn println_json(outcome: &Outcome) -> Result<()> {
    println!("{}", serde_json::to_string(outcome)?);
    Ok(())
}

impl Slot {
    fn new() -> Slot {
        Slot {
            began: Instant::now(),
            closing: false,
            in_flight: 0,
            missing: 0,
            socket: None,
            stands: false,
        }
    }
}

impl Client<'_> {
    fn turn_for(&mut self, span: Duration) -> Result<()> {
        let until = Instant::now() + span;
        let mut events = Vec::new();
        while Instant::now() < until {
            if let Some(server) = &mut self.server {
                server.turn(false)?;
            }
            self.engine.turn(&mut events, self.server.is_none())?;
            for event in &events {
                self.take(*event)?;
            }
        }
        Ok(())
    }

    fn connect(&mut self, index: usize) -> Result<()> {
        let domain = Domain::for_address(self.arguments.to);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))
            .context("make a socket (is the descriptor limit too low for --connections?)")?;
        socket.set_tcp_nodelay(true)?;
        if let Some(name) = &self.arguments.congestion {
            socket.set_tcp_congestion(name.as_bytes()).with_context(|| format!("choose {name}"))?;
        }
        if self.arguments.reset {
            socket.set_linger(Some(Duration::ZERO))?;
        }
        if self.arguments.kind != Kind::Connections {
            self.engine.adopt(index, socket.as_raw_fd())?;
        }
        self.slots[index] = Slot { in_flight: 1, socket: Some(socket), ..Slot::new() };
        self.engine.connect(index, self.socket(index));
        Ok(())
    }

    /// Sockets that stay have a place in the table; for others it would cost a syscall each.
    fn socket(&self, index: usize) -> engine::Socket {
        if self.arguments.kind != Kind::Connections {
            return engine::Socket::Place(index);
        }
        let socket = self.slots[index].socket.as_ref();
        engine::Socket::Descriptor(socket.map_or(-1, AsRawFd::as_raw_fd))
    }

    /// Connections that are open.
    fn standing(&self) -> u64 {
        self.slots.iter().filter(|slot| slot.stands).count() as u64
    }

    fn take(&mut self, event: Event) -> Result<()> {
        let index = event.connection;
        let slot = &mut self.slots[index];
        slot.in_flight -= u32::from(!event.more);
        if let Some(buffer) = event.buffer {
            self.engine.recycle(buffer);
        }
        let failed = event.result < 0 || (event.kind == engine::Kind::Receive && event.result == 0);
        if slot.closing {
            return self.reopen(index);
        }
        if event.kind == engine::Kind::Receive && event.result == -libc::ENOBUFS {
            self.listen(index);
            return Ok(());
        }
        if failed {
            self.errors += 1;
            return self.end(index);
        }
        match event.kind {
            engine::Kind::Connect => {
                self.listen(index);
                self.slots[index].stands = true;
                if self.arguments.kind != Kind::Idle {
                    self.ask(index);
                }
            }
            engine::Kind::Receive => return self.received(index, event),
            engine::Kind::Accept | engine::Kind::Close | engine::Kind::Send => {}
        }
        Ok(())
    }

    fn ask(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.in_flight += 1;
        slot.missing = self.arguments.size;
        if self.arguments.kind == Kind::Pingpong {
            slot.began = Instant::now();
        }
        self.engine.send_pattern(index, self.socket(index), self.arguments.size);
    }

    fn received(&mut self, index: usize, event: Event) -> Result<()> {
        let bytes = usize::try_from(event.result).unwrap_or(0);
        let slot = &mut self.slots[index];
        self.bytes += if self.counting { bytes as u64 } else { 0 };
        slot.missing = slot.missing.saturating_sub(bytes);
        let is_whole = slot.missing == 0;
        if !(event.more || is_whole && self.arguments.kind == Kind::Connections) {
            self.listen(index);
        }
        if self.arguments.kind == Kind::Bulk || !is_whole {
            return Ok(());
        }
        if self.counting {
            self.done += 1;
            let micros = self.slots[index].began.elapsed().as_micros();
            self.latency.saturating_record(u64::try_from(micros).unwrap_or(u64::MAX));
        }
        if self.arguments.kind == Kind::Connections {
            return self.end(index);
        }
        self.ask(index);
        Ok(())
    }

    fn listen(&mut self, index: usize) {
        self.slots[index].in_flight += 1;
        let socket = self.socket(index);
        if self.arguments.kind == Kind::Connections {
            self.engine.receive_once(index, socket);
        } else {
            self.engine.receive(index, socket);
        }
    }

    /// Ends a connection; the next one takes its place once nothing is in flight.
    fn end(&mut self, index: usize) -> Result<()> {
        let slot = &mut self.slots[index];
        slot.closing = true;
        slot.stands = false;
        if let Some(socket) = slot.socket.as_ref().filter(|_| slot.in_flight > 0) {
            // Wakes what is in flight, so that the socket can be closed for good.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        self.reopen(index)
    }

    fn reopen(&mut self, index: usize) -> Result<()> {
        if self.slots[index].in_flight == 0 {
            self.connect(index)?;
        }
        Ok(())
    }

    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
    fn outcome(&self, took: Duration) -> Outcome {
        let seconds = took.as_secs_f64();
        let at = |quantile| self.latency.value_at_quantile(quantile);
        Outcome {
            bytes_per_second: self.bytes as f64 / seconds,
            connections: self.arguments.connections,
            errors: self.errors,
            latency_us: Latency {
                max: self.latency.max(),
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
                p99_9: at(0.999),
            },
            per_second: self.done as f64 / seconds,
            seconds,
            size: self.arguments.size,
            watched_bytes_per_connection: None,
        }
    }
}
