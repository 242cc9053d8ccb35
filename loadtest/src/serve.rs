// SPDX-License-Identifier: Apache-2.0
//! The server behind the forwarder: what it does with a connection is its kind.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use socket2::{Domain, Protocol, Type};

use crate::arguments::{self, Serve};
use crate::engine::{self, Engine, Event, Socket};
use crate::{bolt, http, place, words};

mod tokio_uring;

/// What to do with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    /// Send back what comes
    Echo,
    /// Read to the end, then send as many bytes as came, and FIN
    HalfDuplex,
    /// Answer HTTP/1.1 requests with a body of `--size` bytes
    Http,
    /// Read and forget
    Sink,
    /// Send back what comes, but read no faster than `--read-rate`
    Slow,
    /// Send as fast as it goes, from the first byte that comes until the peer is gone
    Source,
}

/// An accepted connection. Its number is free again once nothing is in flight for it.
struct Connection {
    ended: bool,
    http: http::Reader,
    is_open: bool,
    /// It waits for its time.
    is_held: bool,
    /// Answers, or bytes, still to be sent (`half-duplex`, `http`).
    owed: u64,
    queue: VecDeque<(u16, u32)>,
    received: u64,
    receiving: bool,
    seed: Option<u64>,
    sending: bool,
    sent: u64,
}

/// A listener and its connections.
pub(crate) struct Server {
    arguments: Serve,
    /// By their place in the ring's table.
    connections: Vec<Connection>,
    /// Connections that are held, until then.
    due: BinaryHeap<Reverse<(Instant, usize)>>,
    engine: Engine,
    events: Vec<Event>,
    listener: socket2::Socket,
    /// Receives that found no buffer; asked for again when one is back.
    starved: VecDeque<usize>,
}

/// Serves until the process is ended.
pub(crate) fn serve(arguments: &Serve) -> Result<()> {
    if let Some(cpu) = arguments.place.cpu {
        place::pin(cpu)?;
    }
    if let Some(namespace) = &arguments.place.netns {
        place::enter(namespace)?;
    }
    if arguments.place.engine == arguments::Engine::TokioUring {
        return tokio_uring::serve(arguments);
    }
    let mut server = Server::open(arguments)?;
    loop {
        server.turn(PATIENCE)?;
    }
}

pub(crate) fn listen(arguments: &Serve) -> Result<socket2::Socket> {
    let domain = Domain::for_address(arguments.listen);
    let socket = socket2::Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(name) = &arguments.congestion {
        socket.set_tcp_congestion(name.as_bytes()).with_context(|| format!("choose {name}"))?;
    }
    // A ring that was killed a moment ago gives its ports back a little later.
    let until = Instant::now() + Duration::from_secs(1);
    while let Err(error) = socket.bind(&arguments.listen.into()) {
        if error.kind() != std::io::ErrorKind::AddrInUse || Instant::now() > until {
            return Err(error).with_context(|| advice(arguments.listen.port()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    socket.listen(4096)?;
    Ok(socket)
}

fn advice(port: u16) -> String {
    format!("the address is not free, or not ours: `ss -ltnp sport = :{port}` says who has it")
}

impl Server {
    /// Listens and accepts from the first turn on.
    pub(crate) fn open(arguments: &Serve) -> Result<Server> {
        let listener =
            listen(arguments).with_context(|| format!("listen on {}", arguments.listen))?;
        let size = arguments.size.unwrap_or(match arguments.kind {
            // Many at once, or large ones in pieces.
            Kind::Echo => 4096,
            _ => 64 << 10,
        });
        ensure!(size <= SIZE_MAX, "--size must be at most {SIZE_MAX}");
        let places = place::descriptors_max().min(PLACES_MAX);
        let outgoing = match arguments.kind {
            Kind::Http => http::answer(size),
            _ if arguments.check => vec![0; CHECKED_BYTES * places as usize],
            _ => vec![b'Z'; SOURCE_BYTES],
        };
        let mut server = Server {
            arguments: arguments.clone(),
            connections: (0..places).map(|_| Connection::new()).collect(),
            due: BinaryHeap::new(),
            engine: Engine::open(arguments.listen, outgoing, size, places)?,
            events: Vec::new(),
            listener,
            starved: VecDeque::new(),
        };
        server.engine.accept(server.listener.as_raw_fd());
        Ok(server)
    }

    /// Does what there is to do; waits so long for it if there is nothing. Whether there was.
    pub(crate) fn turn(&mut self, patience: Duration) -> Result<bool> {
        let mut events = std::mem::take(&mut self.events);
        self.engine.turn(&mut events, self.patience(patience))?;
        let listener = self.listener.as_raw_fd();
        for event in &events {
            self.take(*event, listener);
        }
        let is_busy = !events.is_empty();
        self.events = events;
        self.wake();
        self.feed();
        Ok(is_busy)
    }

    /// Lets as many of those who found no buffer try again as there are buffers now: more would
    /// only find out once more, which costs as much as an exchange.
    fn feed(&mut self) {
        for _ in 0..self.engine.free() {
            let Some(connection) = self.starved.pop_front() else { return };
            self.receive(connection);
        }
    }

    /// Times the kernel was entered.
    pub(crate) const fn enters(&self) -> u64 {
        self.engine.enters()
    }

    fn patience(&self, patience: Duration) -> Duration {
        let left = |Reverse((at, _)): &Reverse<(Instant, usize)>| {
            at.saturating_duration_since(Instant::now())
        };
        self.due.peek().map_or(patience, |first| patience.min(left(first)))
    }

    fn take(&mut self, event: Event, listener: RawFd) {
        match event.kind {
            engine::Kind::Accept => {
                if let Ok(place) = usize::try_from(event.result) {
                    self.connections[place] = Connection { is_open: true, ..Connection::new() };
                    self.receive(place);
                }
                if !event.more {
                    self.engine.accept(listener);
                }
            }
            engine::Kind::Receive => self.received(event),
            engine::Kind::Send => self.sent(event),
            engine::Kind::Connect | engine::Kind::Close | engine::Kind::Shutdown => {}
        }
    }

    fn receive(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        let is_able = connection.is_open && !connection.ended && !connection.receiving;
        match self.arguments.kind {
            Kind::Slow if is_able && !connection.is_held => {
                connection.receiving = true;
                self.engine.receive_once(index, Socket::Place(index));
            }
            Kind::Slow => {}
            _ if is_able => {
                connection.receiving = true;
                self.engine.receive(index, Socket::Place(index));
            }
            _ => {}
        }
    }

    fn received(&mut self, event: Event) {
        let index = event.connection;
        self.connections[index].receiving = event.more;
        match (event.buffer, u32::try_from(event.result)) {
            (Some(buffer), Ok(bytes @ 1..)) => self.look(index, buffer, bytes),
            (Some(buffer), _) => self.engine.recycle(buffer),
            (None, _) if event.result == -libc::ENOBUFS => self.starved.push_back(index),
            (None, _) => self.ended(index),
        }
        if !event.more && event.result > 0 {
            self.receive(index);
        }
        self.go_on(index);
    }

    /// The peer will send no more.
    fn ended(&mut self, index: usize) {
        self.connections[index].ended = true;
        if self.arguments.kind == Kind::Source {
            self.connections[index].owed = 0;
        }
    }

    /// Takes what came: keeps it to be sent back, or only its number.
    fn look(&mut self, index: usize, buffer: u16, bytes: u32) {
        let connection = &mut self.connections[index];
        if connection.ended {
            return self.engine.recycle(buffer);
        }
        let chunk = self.engine.received(buffer, bytes as usize);
        let seed = *connection
            .seed
            .get_or_insert_with(|| chunk.first_chunk().map_or(0, |first| words::seed_of(*first)));
        let is_right = !self.arguments.check || words::are_right(chunk, seed, connection.received);
        connection.received += u64::from(bytes);
        match self.arguments.kind {
            Kind::Echo | Kind::Slow => {
                if let Some(frame) = self.arguments.bolt {
                    let came_before = connection.received - u64::from(bytes);
                    let chunk = self.engine.received_mut(buffer, bytes as usize);
                    bolt::answer(chunk, came_before, frame);
                }
                connection.queue.push_back((buffer, bytes));
                self.hold(index, bytes);
                return;
            }
            Kind::Sink | Kind::HalfDuplex if !is_right => {
                eprintln!("flow {seed}: wrong bytes, within the first {}", connection.received);
                self.give_up(index);
            }
            Kind::HalfDuplex => connection.owed = connection.received,
            Kind::Http => match connection.http.take(chunk) {
                Ok(asked) => {
                    connection.owed += u64::from(asked);
                    self.hold(index, bytes);
                }
                Err(http::Unknown) => self.give_up(index),
            },
            Kind::Source => connection.owed = u64::MAX,
            Kind::Sink => {}
        }
        self.engine.recycle(buffer);
    }

    /// Whoever may not be answered at once, or not be read at once.
    fn hold(&mut self, index: usize, bytes: u32) {
        let pause = match self.arguments.kind {
            Kind::Slow => {
                Duration::from_secs_f64(f64::from(bytes)).div_f64(rate(self.arguments.read_rate))
            }
            _ => self.arguments.delay,
        };
        if !pause.is_zero() {
            self.connections[index].is_held = true;
            self.due.push(Reverse((Instant::now() + pause, index)));
        }
    }

    fn wake(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((at, index))) = self.due.peek().copied() {
            if at > now {
                return;
            }
            self.due.pop();
            self.connections[index].is_held = false;
            self.receive(index);
            self.go_on(index);
        }
    }

    /// Ends it with RST, which nobody takes for a good end.
    fn give_up(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        connection.ended = true;
        connection.owed = 0;
        self.engine.abort(index);
    }

    fn sent(&mut self, event: Event) {
        let index = event.connection;
        let connection = &mut self.connections[index];
        connection.sending = false;
        let bytes = u64::try_from(event.result).unwrap_or(0);
        connection.sent += bytes;
        if event.result < 0 {
            connection.ended = true;
            connection.owed = 0;
        }
        match self.arguments.kind {
            Kind::Echo | Kind::Slow => {
                if let Some((buffer, _)) = connection.queue.pop_front() {
                    self.engine.recycle(buffer);
                }
            }
            Kind::Http => connection.owed = connection.owed.saturating_sub(1),
            Kind::HalfDuplex => connection.owed = connection.owed.saturating_sub(bytes),
            Kind::Source if connection.ended => connection.owed = 0,
            Kind::Sink | Kind::Source => {}
        }
        self.go_on(index);
    }

    /// Sends what is next, or lets go of a connection with nothing left to do.
    fn go_on(&mut self, index: usize) {
        self.answer(index);
        let connection = &mut self.connections[index];
        let is_busy = connection.sending || connection.receiving || connection.is_held;
        if connection.ended && !is_busy && connection.owed == 0 {
            for (buffer, _) in connection.queue.drain(..) {
                self.engine.recycle(buffer);
            }
            if std::mem::take(&mut connection.is_open) {
                self.engine.close(index);
            }
        }
    }

    fn answer(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        let is_due = match self.arguments.kind {
            Kind::Slow => true,
            Kind::HalfDuplex => connection.ended,
            _ => !connection.is_held,
        };
        if connection.sending || !connection.is_open || !is_due {
            return;
        }
        if let Some((buffer, bytes)) = connection.queue.front() {
            connection.sending = true;
            self.engine.send_buffer(index, Socket::Place(index), *buffer, *bytes);
            return;
        }
        if connection.owed == 0 {
            return;
        }
        connection.sending = true;
        let socket = Socket::Place(index);
        if self.arguments.kind == Kind::Http {
            let bytes = self.engine.outgoing_bytes();
            self.engine.send_outgoing(index, socket, 0, bytes);
            return;
        }
        let unit = if self.arguments.check { CHECKED_BYTES } else { SOURCE_BYTES };
        let bytes = usize::try_from(connection.owed).map_or(unit, |owed| owed.min(unit));
        let mut from = 0;
        if self.arguments.check {
            from = index * CHECKED_BYTES;
            let seed = connection.seed.unwrap_or(0);
            words::fill(self.engine.outgoing(from, bytes), seed, connection.sent);
        }
        self.engine.send_outgoing(index, socket, from, bytes);
    }
}

impl Connection {
    const fn new() -> Connection {
        Connection {
            ended: false,
            http: http::Reader::new(),
            is_open: false,
            is_held: false,
            owed: 0,
            queue: VecDeque::new(),
            received: 0,
            receiving: false,
            seed: None,
            sending: false,
            sent: 0,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "no reader is that fast")]
fn rate(bytes: u64) -> f64 {
    bytes.max(1) as f64
}

/// Words of one send, each connection's own: 512 MB of addresses at most, memory as far as used.
const CHECKED_BYTES: usize = 16 << 10;
/// So often somebody looks whether there is something else to do.
const PATIENCE: Duration = Duration::from_millis(10);
/// Connections at a time, if the process may have as many descriptors.
const PLACES_MAX: u32 = 32_768;
const SIZE_MAX: usize = 16 << 20;
/// One send of a source.
const SOURCE_BYTES: usize = 256 << 10;
