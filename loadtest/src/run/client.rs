// SPDX-License-Identifier: Apache-2.0
//! The connections of a load on the raw ring, all in one thread.
//!
//! Invariant: a slot gets a new socket only when nothing of the old one is in flight.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::outcome::{ErrorKind, Outcome, Recorder};
use super::pace::Pace;
use super::{Kind, Window, thread_cpu};
use crate::arguments::Run;
use crate::engine::{self, Engine, Event};
use crate::serve::Server;
use crate::signals::is_interrupted;
use crate::watch::{Memory, Watch};
use crate::{bolt, http, words};

/// The client, and the server if that is in this thread.
pub(super) struct Client<'a> {
    arguments: &'a Run,
    asked: u64,
    /// Slots that have been told to connect, the first ones.
    begun: usize,
    counted_bytes: bool,
    /// Slots that will do something at their time.
    due: BinaryHeap<Reverse<(Instant, usize)>>,
    engine: Engine,
    /// Slots that wait for an exchange to be due (open loop).
    idle: VecDeque<usize>,
    idle_spin: Duration,
    now: Instant,
    pace: Option<Pace>,
    recorder: Recorder,
    server: Option<Server>,
    slots: Vec<Slot>,
    /// Outgoing bytes of a slot; 0 if all send the same.
    stride: usize,
    sweep_at: Instant,
}

/// A place for a connection.
struct Slot {
    /// When the exchange was due, or began.
    began: Instant,
    closing: bool,
    /// Exchanges until it is replaced.
    exchanges_left: u32,
    http: http::Reader,
    in_flight: u32,
    /// In the list of the idle.
    is_idle: bool,
    missing: usize,
    received: u64,
    seed: u64,
    sent: u64,
    /// Of one that does not stay; of others the ring's table has the only one.
    socket: Option<Socket>,
    stands: bool,
    /// An answer is due.
    waits: bool,
}

/// What received bytes are.
enum Look {
    Ended(u32),
    Right,
    Wrong(ErrorKind),
}

impl<'a> Client<'a> {
    /// Opens every connection.
    pub(super) fn open(arguments: &'a Run, server: Option<Server>) -> Result<Client<'a>> {
        let largest = arguments.size.largest();
        let unit = if arguments.kind == Kind::Upload { UPLOAD_BYTES } else { largest };
        let stride = if arguments.check { unit } else { 0 };
        let bytes = stride * arguments.connections;
        ensure!(bytes <= OUTGOING_BYTES_MAX, "--check with so many and so large needs {bytes} B");
        let outgoing = match arguments.kind {
            Kind::Http => http::request(arguments.to),
            _ if arguments.bolt.is_some() => bolt::requests(unit, arguments.bolt.unwrap_or(unit)),
            _ if arguments.check => vec![0; bytes],
            _ => vec![b'Z'; unit],
        };
        let message = if arguments.kind == Kind::Bulk { usize::MAX } else { largest };
        let places = u32::try_from(arguments.connections)?;
        let now = Instant::now();
        let mut client = Client {
            arguments,
            asked: 0,
            begun: 0,
            counted_bytes: arguments.kind != Kind::Upload,
            due: BinaryHeap::new(),
            engine: Engine::open(arguments.to, outgoing, message, places)?,
            idle: VecDeque::new(),
            idle_spin: Duration::ZERO,
            now,
            pace: arguments.rate.map(|rate| Pace::new(rate, now)),
            recorder: Recorder::new(&arguments.watch_cpu)?,
            server,
            slots: Vec::new(),
            stride,
            sweep_at: now + SWEEP_EVERY,
        };
        for index in 0..arguments.connections {
            client.slots.push(Slot::new(arguments.seed + index as u64, now));
        }
        client.begin_some()?;
        Ok(client)
    }

    /// Not all at once: a listener's queue is shorter than thousands of connects.
    fn begin_some(&mut self) -> Result<()> {
        if self.begun == self.slots.len() {
            return Ok(());
        }
        let most = self.standing() + CONNECTS_AT_ONCE;
        while self.begun < self.slots.len().min(most) {
            self.begun += 1;
            self.rest(self.begun - 1)?;
        }
        Ok(())
    }

    /// Waits until all stand, warms up, measures.
    pub(super) fn measure(mut self, watch: Watch, memory: Memory) -> Result<Outcome> {
        let until = Instant::now() + ESTABLISH_MAX;
        self.turn_until(until, |client| client.are_established())?;
        let until = Instant::now() + self.arguments.warmup;
        self.turn_until(until, |_| false)?;
        let window = Window::open(watch, memory);
        let now = Instant::now();
        self.now = now;
        if let Some(pace) = &mut self.pace {
            pace.restart(now);
        }
        self.idle_spin = Duration::ZERO;
        self.recorder.begin(now);
        let enters = self.enters();
        self.turn_until(now + self.arguments.duration, |_| false)?;
        let cpu = thread_cpu();
        self.recorder.end(Instant::now());
        let mut outcome = self.recorder.outcome();
        outcome.generator.idle_spin_seconds = self.idle_spin.as_secs_f64();
        outcome.generator.ring_enters = self.enters() - enters;
        outcome.behind = self.pace.as_ref().map_or(0, |pace| pace.waiting() as u64);
        let outcome = window.close(self.arguments, cpu, outcome)?;
        if self.arguments.kind == Kind::Idle {
            let (standing, all) = (self.standing(), self.slots.len());
            ensure!(standing == all, "{standing} of {all} connections stand");
        }
        Ok(outcome)
    }

    fn turn_until(&mut self, until: Instant, is_over: impl Fn(&Client<'_>) -> bool) -> Result<()> {
        let mut events = Vec::new();
        while self.now < until && !is_over(self) && !is_interrupted() {
            self.turn(&mut events)?;
        }
        Ok(())
    }

    fn turn(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let mut is_busy = false;
        let patience = match &mut self.server {
            Some(server) => {
                is_busy = server.turn(Duration::ZERO)?;
                Duration::ZERO
            }
            None => self.patience(),
        };
        self.engine.turn(events, patience)?;
        let before = std::mem::replace(&mut self.now, Instant::now());
        for event in events.iter() {
            self.take(*event)?;
        }
        self.wake()?;
        self.begin_some()?;
        self.keep_pace()?;
        self.recorder.tick(self.now);
        if self.now >= self.sweep_at {
            self.sweep()?;
        }
        if self.server.is_some() && !is_busy && events.is_empty() {
            self.idle_spin += (self.now - before).min(EMPTY_TURN_MAX);
        }
        Ok(())
    }

    /// How long the kernel may let us sleep. The last stretch before something is due we stay
    /// awake: to be woken may take longer than that.
    fn patience(&self) -> Duration {
        let next = self.due.peek().map(|Reverse((at, _))| *at);
        let next = next.into_iter().chain(self.pace.as_ref().map(Pace::next)).min();
        let left = next.map_or(PATIENCE, |at| at.saturating_duration_since(self.now));
        left.saturating_sub(AWAKE_BEFORE).min(PATIENCE)
    }

    fn are_established(&self) -> bool {
        let has_failed = self.recorder.errors() > 3 * self.slots.len() as u64;
        self.arguments.kind.is_short() || has_failed || self.standing() == self.slots.len()
    }

    /// Connections that are open.
    fn standing(&self) -> usize {
        self.slots.iter().filter(|slot| slot.stands).count()
    }

    fn enters(&self) -> u64 {
        self.engine.enters() + self.server.as_ref().map_or(0, Server::enters)
    }

    /// An empty slot: connects now, or when an exchange is due that needs it.
    fn rest(&mut self, index: usize) -> Result<()> {
        if self.arguments.kind.is_short() && self.pace.is_some() {
            self.be_idle(index);
            return Ok(());
        }
        self.connect(index, self.now)
    }

    fn be_idle(&mut self, index: usize) {
        if !std::mem::replace(&mut self.slots[index].is_idle, true) {
            self.idle.push_back(index);
        }
    }

    fn connect(&mut self, index: usize, began: Instant) -> Result<()> {
        let arguments = self.arguments;
        let domain = Domain::for_address(arguments.to);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))
            .context("make a socket (is the descriptor limit too low for --connections?)")?;
        socket.set_tcp_nodelay(true)?;
        if let Some(name) = &arguments.congestion {
            socket.set_tcp_congestion(name.as_bytes()).with_context(|| format!("choose {name}"))?;
        }
        if arguments.reset {
            socket.set_linger(Some(Duration::ZERO))?;
        }
        let mut socket = Some(socket);
        if !arguments.kind.is_short()
            && let Some(socket) = socket.take()
        {
            self.engine.adopt(index, socket.as_raw_fd())?;
        }
        let old = &self.slots[index];
        self.slots[index] = Slot {
            exchanges_left: if arguments.churn == 0 { u32::MAX } else { arguments.churn },
            in_flight: 1,
            is_idle: old.is_idle,
            socket,
            waits: true,
            ..Slot::new(old.seed + arguments.connections as u64, began)
        };
        self.engine.connect(index, self.socket(index));
        Ok(())
    }

    /// Sockets that stay have a place in the table, and no descriptor, of which there may be fewer;
    /// for others a place would cost a syscall each.
    fn socket(&self, index: usize) -> engine::Socket {
        if !self.arguments.kind.is_short() {
            return engine::Socket::Place(index);
        }
        let socket = self.slots[index].socket.as_ref();
        engine::Socket::Descriptor(socket.map_or(-1, AsRawFd::as_raw_fd))
    }

    fn take(&mut self, event: Event) -> Result<()> {
        let index = event.connection;
        let look = self.look(event);
        let slot = &mut self.slots[index];
        slot.in_flight -= u32::from(!event.more);
        if slot.closing {
            return self.replace(index);
        }
        if event.kind == engine::Kind::Receive && event.result == -libc::ENOBUFS {
            self.listen(index);
            return Ok(());
        }
        let is_end = event.kind == engine::Kind::Receive && event.result == 0;
        if is_end && self.arguments.kind == Kind::HalfClose && slot.missing == 0 && slot.waits {
            return self.answered(index);
        }
        if event.result < 0 || is_end {
            return self.fail(index, ErrorKind::of(-event.result));
        }
        match (event.kind, look) {
            (_, Look::Wrong(kind)) => self.fail(index, kind),
            (engine::Kind::Connect, _) => self.connected(index),
            (engine::Kind::Receive, look) => self.received(index, event, &look),
            (engine::Kind::Send, _) => {
                self.sent(index, event);
                Ok(())
            }
            (engine::Kind::Accept | engine::Kind::Close | engine::Kind::Shutdown, _) => Ok(()),
        }
    }

    /// Looks at what came, and gives its buffer back.
    fn look(&mut self, event: Event) -> Look {
        let Some(buffer) = event.buffer else { return Look::Right };
        let bytes = usize::try_from(event.result).unwrap_or(0);
        let slot = &mut self.slots[event.connection];
        let mut look = Look::Right;
        if self.arguments.kind == Kind::Http {
            let ended = slot.http.take(self.engine.received(buffer, bytes));
            look = ended.map_or(Look::Wrong(ErrorKind::Unknown), Look::Ended);
        }
        if self.arguments.check {
            let chunk = self.engine.received(buffer, bytes);
            if !words::are_right(chunk, slot.seed, slot.received) {
                look = Look::Wrong(ErrorKind::Corrupted);
            }
            slot.received += bytes as u64;
        }
        self.engine.recycle(buffer);
        look
    }

    fn connected(&mut self, index: usize) -> Result<()> {
        if self.arguments.kind != Kind::Upload {
            self.listen(index);
        }
        self.slots[index].stands = true;
        self.slots[index].waits = false;
        match (self.arguments.kind, &self.pace) {
            (Kind::Idle, _) => {}
            (Kind::Connections | Kind::HalfClose, _) => self.ask(index, self.slots[index].began),
            (_, Some(_)) => self.be_idle(index),
            (_, None) => self.ask(index, self.now),
        }
        Ok(())
    }

    fn ask(&mut self, index: usize, began: Instant) {
        let bytes = match self.arguments.kind {
            Kind::Upload => UPLOAD_BYTES,
            _ => self.arguments.size.at(self.asked),
        };
        self.asked += 1;
        let slot = &mut self.slots[index];
        slot.began = began;
        slot.missing = bytes;
        slot.waits = !self.arguments.kind.is_stream();
        self.send(index, bytes);
    }

    fn send(&mut self, index: usize, bytes: usize) {
        let slot = &mut self.slots[index];
        slot.in_flight += 1;
        let mut bytes = bytes;
        if self.stride > 0 {
            words::fill(self.engine.outgoing(index * self.stride, bytes), slot.seed, slot.sent);
        }
        if self.arguments.kind == Kind::Http {
            bytes = self.engine.outgoing_bytes();
        }
        slot.sent += bytes as u64;
        self.engine.send_outgoing(index, self.socket(index), index * self.stride, bytes);
    }

    fn sent(&mut self, index: usize, event: Event) {
        match self.arguments.kind {
            Kind::Upload => {
                self.recorder.bytes(u64::try_from(event.result).unwrap_or(0));
                self.send(index, UPLOAD_BYTES);
            }
            Kind::HalfClose => {
                self.slots[index].in_flight += 1;
                self.engine.shut_down(index, self.socket(index));
            }
            _ => {}
        }
    }

    fn received(&mut self, index: usize, event: Event, look: &Look) -> Result<()> {
        let bytes = usize::try_from(event.result).unwrap_or(0);
        if self.counted_bytes {
            self.recorder.bytes(bytes as u64);
        }
        let kind = self.arguments.kind;
        let slot = &mut self.slots[index];
        let is_too_much = !kind.is_stream() && kind != Kind::Http && bytes > slot.missing;
        slot.missing = slot.missing.saturating_sub(bytes);
        let is_whole = match look {
            Look::Ended(messages) => *messages == 1,
            Look::Right | Look::Wrong(_) => slot.missing == 0 && kind != Kind::Http,
        };
        if is_too_much || matches!(look, Look::Ended(2..)) {
            return self.fail(index, ErrorKind::Unknown);
        }
        if !(event.more || is_whole && kind == Kind::Connections) {
            self.listen(index);
        }
        if kind.is_stream() || kind == Kind::HalfClose || !is_whole {
            return Ok(());
        }
        self.answered(index)
    }

    /// An exchange is done.
    fn answered(&mut self, index: usize) -> Result<()> {
        let slot = &mut self.slots[index];
        self.recorder.done(slot.began, self.now);
        slot.waits = false;
        slot.exchanges_left -= 1;
        if self.arguments.kind.is_short() || slot.exchanges_left == 0 {
            return self.end(index);
        }
        if self.pace.is_some() {
            self.be_idle(index);
        } else if self.arguments.think.is_zero() {
            self.ask(index, self.now);
        } else {
            self.due.push(Reverse((self.now + self.arguments.think, index)));
        }
        Ok(())
    }

    fn listen(&mut self, index: usize) {
        self.slots[index].in_flight += 1;
        let socket = self.socket(index);
        if self.arguments.kind.is_short() {
            self.engine.receive_once(index, socket);
        } else {
            self.engine.receive(index, socket);
        }
    }

    fn fail(&mut self, index: usize, kind: ErrorKind) -> Result<()> {
        self.recorder.error(kind);
        if !self.slots[index].stands {
            // Nobody there: not at once again.
            self.slots[index].closing = true;
            self.due.push(Reverse((self.now + PAUSE, index)));
            return Ok(());
        }
        self.end(index)
    }

    /// Ends a connection; the next one takes its place once nothing is in flight.
    fn end(&mut self, index: usize) -> Result<()> {
        let slot = &mut self.slots[index];
        slot.closing = true;
        slot.stands = false;
        slot.waits = false;
        // Wakes what is in flight, so that the socket can be closed for good.
        match &slot.socket {
            _ if slot.in_flight == 0 => {}
            Some(socket) => drop(socket.shutdown(std::net::Shutdown::Both)),
            None => {
                slot.in_flight += 1;
                self.engine.abort(index);
            }
        }
        self.replace(index)
    }

    fn replace(&mut self, index: usize) -> Result<()> {
        if self.slots[index].in_flight == 0 {
            self.slots[index].socket = None;
            self.rest(index)?;
        }
        Ok(())
    }

    /// Those whose time of thinking, or pause, is over.
    fn wake(&mut self) -> Result<()> {
        while let Some(Reverse((at, index))) = self.due.peek().copied() {
            if at > self.now {
                return Ok(());
            }
            self.due.pop();
            let slot = &self.slots[index];
            if slot.closing {
                self.replace(index)?;
            } else if slot.stands && !slot.waits {
                self.ask(index, self.now);
            }
        }
        Ok(())
    }

    /// Begins what is due, on whoever is idle.
    fn keep_pace(&mut self) -> Result<()> {
        let Some(pace) = &mut self.pace else { return Ok(()) };
        pace.line_up(self.now);
        while let Some(index) = self.idle.pop_front() {
            let slot = &mut self.slots[index];
            let is_short = self.arguments.kind.is_short();
            if !is_short && (!slot.stands || slot.waits) {
                slot.is_idle = false;
                continue;
            }
            let Some(due) = self.pace.as_mut().and_then(Pace::take) else {
                self.idle.push_front(index);
                return Ok(());
            };
            slot.is_idle = false;
            if is_short {
                self.connect(index, due)?;
            } else {
                self.ask(index, due);
            }
        }
        Ok(())
    }

    /// Gives up on those that wait for too long.
    fn sweep(&mut self) -> Result<()> {
        self.sweep_at = self.now + SWEEP_EVERY;
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            let waited = self.now.saturating_duration_since(slot.began);
            if slot.waits && !slot.closing && waited > self.arguments.timeout {
                self.recorder.error(ErrorKind::TimedOut);
                self.end(index)?;
            }
        }
        Ok(())
    }
}

impl Slot {
    const fn new(seed: u64, began: Instant) -> Slot {
        Slot {
            began,
            closing: false,
            exchanges_left: u32::MAX,
            http: http::Reader::new(),
            in_flight: 0,
            is_idle: false,
            missing: 0,
            received: 0,
            seed,
            sent: 0,
            socket: None,
            stands: false,
            waits: false,
        }
    }
}

/// Connects under way while the first connections are made.
const CONNECTS_AT_ONCE: usize = 512;
/// Above the time that a halted CPU takes to wake.
const AWAKE_BEFORE: Duration = Duration::from_micros(100);
/// To look in vain takes less; what took longer was somebody else's turn on the CPU.
const EMPTY_TURN_MAX: Duration = Duration::from_micros(10);
/// Connections that do not stand by then are counted as what they are.
const ESTABLISH_MAX: Duration = Duration::from_secs(10);
/// Words ready to be sent, of all connections.
const OUTGOING_BYTES_MAX: usize = 1 << 30;
/// So often somebody looks whether it is time to end.
const PATIENCE: Duration = Duration::from_millis(10);
/// Before a connect that failed is tried again.
const PAUSE: Duration = Duration::from_millis(10);
const SWEEP_EVERY: Duration = Duration::from_millis(100);
/// One send of an upload.
const UPLOAD_BYTES: usize = 256 << 10;
