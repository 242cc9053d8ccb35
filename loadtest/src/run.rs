// SPDX-License-Identifier: Apache-2.0
//! The client: puts load on an address for a while and counts what came of it.
//!
//! Closed loop: every connection waits for its answer before it asks again.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use crate::Run;
use crate::engine::{self, Engine, Event};

/// What to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    /// Ask once to start a source, then read as fast as it goes
    Bulk,
    /// Connect, exchange one message, close; again and again
    Connections,
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
    slots: Vec<Slot>,
}

struct Slot {
    began: Instant,
    closing: bool,
    in_flight: u32,
    missing: usize,
    socket: Option<Socket>,
}

/// Runs and prints the outcome as JSON.
pub(crate) fn run(arguments: &Run) -> Result<()> {
    if arguments.size == 0 || arguments.connections == 0 {
        bail!("--size and --connections must be above 0");
    }
    let mut client = Client {
        arguments,
        bytes: 0,
        counting: false,
        done: 0,
        engine: Engine::open(arguments.to, arguments.size)?,
        errors: 0,
        latency: Histogram::new_with_bounds(1, 60_000_000, 3)?,
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
    let outcome = client.outcome(began.elapsed());
    println_json(&outcome)?;
    if client.done == 0 && client.bytes == 0 {
        bail!("nothing got through to {} ({} errors)", arguments.to, client.errors);
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the outcome is what the command is for")]
fn println_json(outcome: &Outcome) -> Result<()> {
    println!("{}", serde_json::to_string(outcome)?);
    Ok(())
}

impl Slot {
    fn new() -> Slot {
        Slot { began: Instant::now(), closing: false, in_flight: 0, missing: 0, socket: None }
    }

    fn fd(&self) -> RawFd {
        self.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl Client<'_> {
    fn turn_for(&mut self, span: Duration) -> Result<()> {
        let until = Instant::now() + span;
        let mut events = Vec::new();
        while Instant::now() < until {
            self.engine.turn(&mut events)?;
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
        let slot = &mut self.slots[index];
        *slot = Slot { in_flight: 1, socket: Some(socket), ..Slot::new() };
        self.engine.connect(index, slot.fd());
        Ok(())
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
                self.ask(index);
            }
            engine::Kind::Receive => return self.received(index, event),
            engine::Kind::Accept | engine::Kind::Send => {}
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
        self.engine.send_pattern(index, slot.fd(), self.arguments.size);
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
        let slot = &mut self.slots[index];
        slot.in_flight += 1;
        if self.arguments.kind == Kind::Connections {
            self.engine.receive_once(index, slot.fd());
        } else {
            self.engine.receive(index, slot.fd());
        }
    }

    /// Ends a connection; the next one takes its place once nothing is in flight.
    fn end(&mut self, index: usize) -> Result<()> {
        let slot = &mut self.slots[index];
        slot.closing = true;
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
        }
    }
}
