// SPDX-License-Identifier: Apache-2.0
//! The server behind the forwarder: echo, sink or source.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use clap::ValueEnum;
use socket2::{Domain, Protocol, Socket, Type};

use crate::Serve;
use crate::engine::{self, Engine, Event};

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
    fd: Option<OwnedFd>,
    queue: VecDeque<(u16, u32)>,
    receiving: bool,
    sending: bool,
}

struct Server {
    connections: Vec<Connection>,
    engine: Engine,
    free: Vec<usize>,
    kind: Kind,
    /// Receives that found no buffer; asked for again when one is back.
    starved: Vec<usize>,
}

/// Serves until the process is ended.
pub(crate) fn serve(arguments: &Serve) -> Result<()> {
    let listener = listen(arguments).with_context(|| format!("listen on {}", arguments.listen))?;
    let mut server = Server {
        connections: Vec::new(),
        engine: Engine::open(arguments.listen, SOURCE_BYTES)?,
        free: Vec::new(),
        kind: arguments.kind,
        starved: Vec::new(),
    };
    server.engine.accept(listener.as_raw_fd());
    let mut events = Vec::new();
    loop {
        server.engine.turn(&mut events)?;
        for event in &events {
            server.take(*event, listener.as_raw_fd());
        }
        for connection in std::mem::take(&mut server.starved) {
            server.receive(connection);
        }
    }
}

fn listen(arguments: &Serve) -> Result<Socket> {
    let domain = Domain::for_address(arguments.listen);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(name) = &arguments.congestion {
        socket.set_tcp_congestion(name.as_bytes()).with_context(|| format!("choose {name}"))?;
    }
    socket.bind(&arguments.listen.into())?;
    socket.listen(4096)?;
    Ok(socket)
}

impl Server {
    fn take(&mut self, event: Event, listener: RawFd) {
        match event.kind {
            engine::Kind::Accept => {
                if event.result >= 0 {
                    self.accepted(engine::accepted(event.result));
                }
                if !event.more {
                    self.engine.accept(listener);
                }
            }
            engine::Kind::Receive => self.received(event),
            engine::Kind::Send => self.sent(event),
            engine::Kind::Connect => {}
        }
    }

    fn accepted(&mut self, fd: OwnedFd) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.connections.push(Connection::default());
            self.connections.len() - 1
        });
        self.connections[index] = Connection { fd: Some(fd), ..Connection::default() };
        self.receive(index);
    }

    fn receive(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        if let (Some(fd), false, false) = (&connection.fd, connection.ended, connection.receiving) {
            connection.receiving = true;
            self.engine.receive(index, fd.as_raw_fd());
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
                    let fd = connection.fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
                    self.engine.send_pattern(index, fd, SOURCE_BYTES);
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
                let fd = connection.fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
                self.engine.send_pattern(index, fd, SOURCE_BYTES);
            }
            Kind::Source | Kind::Sink => {}
        }
        self.go_on(index);
    }

    /// Sends what is next, or lets go of a connection with nothing left to do.
    fn go_on(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        if let (false, Some((buffer, bytes)), Some(fd)) =
            (connection.sending, connection.queue.front(), &connection.fd)
        {
            connection.sending = true;
            self.engine.send_buffer(index, fd.as_raw_fd(), *buffer, *bytes);
        }
        if connection.ended && !connection.sending && !connection.receiving {
            for (buffer, _) in connection.queue.drain(..) {
                self.engine.recycle(buffer);
            }
            if connection.fd.take().is_some() {
                self.free.push(index);
            }
        }
    }
}

/// One send of a source.
const SOURCE_BYTES: usize = 256 << 10;
