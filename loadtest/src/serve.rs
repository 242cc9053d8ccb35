// SPDX-License-Identifier: Apache-2.0
//! The server behind the forwarder: echo, sink or source.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use socket2::{Domain, Protocol, Type};

use crate::Serve;
use crate::engine::{self, Engine, Event, Socket};

/// What to do with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    /// Send back what comes
    Echo,
    /// Read and forget
    Sink,
    /// Send as fast as it goes, from the first byte that comes until the peer is gone
    Source,
}

/// An accepted connection. Its number is free again once nothing is in flight for it.
#[derive(Default)]
struct Connection {
    ended: bool,
    is_open: bool,
    queue: VecDeque<(u16, u32)>,
    receiving: bool,
    sending: bool,
}

/// A listener and its connections.
pub(crate) struct Server {
    /// By their place in the ring's table.
    connections: Vec<Connection>,
    engine: Engine,
    events: Vec<Event>,
    kind: Kind,
    listener: socket2::Socket,
    /// Receives that found no buffer; asked for again when one is back.
    starved: Vec<usize>,
}

/// Serves until the process is ended.
pub(crate) fn serve(arguments: &Serve) -> Result<()> {
    let mut server = Server::open(arguments)?;
    loop {
        server.turn(true)?;
    }
}

fn listen(arguments: &Serve) -> Result<socket2::Socket> {
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
            return Err(error.into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    socket.listen(4096)?;
    Ok(socket)
}

impl Server {
    /// Listens and accepts from the first turn on.
    pub(crate) fn open(arguments: &Serve) -> Result<Server> {
        let listener =
            listen(arguments).with_context(|| format!("listen on {}", arguments.listen))?;
        let mut server = Server {
            connections: (0..PLACES).map(|_| Connection::default()).collect(),
            engine: Engine::open(arguments.listen, SOURCE_BYTES, arguments.size, PLACES)?,
            events: Vec::new(),
            kind: arguments.kind,
            listener,
            starved: Vec::new(),
        };
        server.engine.accept(server.listener.as_raw_fd());
        Ok(server)
    }

    /// Does what there is to do; `wait` for it if there is nothing.
    pub(crate) fn turn(&mut self, wait: bool) -> Result<()> {
        let mut events = std::mem::take(&mut self.events);
        self.engine.turn(&mut events, wait)?;
        let listener = self.listener.as_raw_fd();
        for event in &events {
            self.take(*event, listener);
        }
        self.events = events;
        for connection in std::mem::take(&mut self.starved) {
            self.receive(connection);
        }
        Ok(())
    }

    fn take(&mut self, event: Event, listener: RawFd) {
        match event.kind {
            engine::Kind::Accept => {
                if let Ok(place) = usize::try_from(event.result) {
                    self.connections[place] = Connection { is_open: true, ..Connection::default() };
                    self.receive(place);
                }
                if !event.more {
                    self.engine.accept(listener);
                }
            }
            engine::Kind::Receive => self.received(event),
            engine::Kind::Send => self.sent(event),
            engine::Kind::Connect | engine::Kind::Close => {}
        }
    }

    fn receive(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        if connection.is_open && !connection.ended && !connection.receiving {
            connection.receiving = true;
            self.engine.receive(index, Socket::Place(index));
        }
    }

    fn received(&mut self, event: Event) {
        let index = event.connection;
        let connection = &mut self.connections[index];
        connection.receiving = event.more;
        match (event.buffer, u32::try_from(event.result)) {
            (Some(buffer), Ok(bytes @ 1..)) if self.kind == Kind::Echo => {
                connection.queue.push_back((buffer, bytes));
            }
            (Some(buffer), _) => {
                self.engine.recycle(buffer);
                if self.kind == Kind::Source && !connection.sending {
                    connection.sending = true;
                    self.engine.send_pattern(index, Socket::Place(index), SOURCE_BYTES);
                }
            }
            (None, _) if event.result == -libc::ENOBUFS => self.starved.push(index),
            (None, _) => connection.ended = true,
        }
        if !event.more && event.result > 0 {
            self.receive(index);
        }
        self.go_on(index);
    }

    fn sent(&mut self, event: Event) {
        let index = event.connection;
        let connection = &mut self.connections[index];
        connection.sending = false;
        connection.ended |= event.result < 0;
        match self.kind {
            Kind::Echo => {
                if let Some((buffer, _)) = connection.queue.pop_front() {
                    self.engine.recycle(buffer);
                }
            }
            Kind::Source if !connection.ended => {
                connection.sending = true;
                self.engine.send_pattern(index, Socket::Place(index), SOURCE_BYTES);
            }
            Kind::Source | Kind::Sink => {}
        }
        self.go_on(index);
    }

    /// Sends what is next, or lets go of a connection with nothing left to do.
    fn go_on(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        if let (false, Some((buffer, bytes))) = (connection.sending, connection.queue.front()) {
            connection.sending = true;
            self.engine.send_buffer(index, Socket::Place(index), *buffer, *bytes);
        }
        if connection.ended && !connection.sending && !connection.receiving {
            for (buffer, _) in connection.queue.drain(..) {
                self.engine.recycle(buffer);
            }
            if std::mem::take(&mut connection.is_open) {
                self.engine.close(index);
            }
        }
    }
}

/// Connections at a time; a process here may have 20,000 descriptors.
const PLACES: u32 = 16_384;
/// One send of a source.
const SOURCE_BYTES: usize = 256 << 10;
