// SPDX-License-Identifier: Apache-2.0
//! A single-threaded io_uring: multishot accept and receive into shared buffers, plain sends.
//!
//! A connection's number is its place in the ring's own descriptor table, where that pays. Just
//! enough for a generator that is not the bottleneck. Sends point into memory that never moves: the
//! shared buffers, or the outgoing bytes, which live as long as the engine.
#![expect(unsafe_code, reason = "requests carry pointers")]

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use io_uring::types::BufRingEntry;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use socket2::SockAddr;

/// The ring, its buffers, and the addresses that connects point to.
pub(crate) struct Engine {
    io: IoUring,
    buffer_bytes: u32,
    buffer_count: u16,
    buffers: Vec<u8>,
    enters: u64,
    entries: Vec<BufRingEntry>,
    /// Buffers that the kernel has.
    free: u16,
    offset: usize,
    outgoing: Vec<u8>,
    tail: u16,
    to: Box<SockAddr>,
}

/// One completion.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) buffer: Option<u16>,
    pub(crate) connection: usize,
    pub(crate) kind: Kind,
    pub(crate) more: bool,
    pub(crate) result: i32,
}

/// What a request was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Kind {
    Accept = 1,
    Connect = 2,
    Receive = 3,
    Send = 4,
    Close = 5,
    Shutdown = 6,
}

/// How a request names its socket.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Socket {
    /// By descriptor.
    Descriptor(RawFd),
    /// By its place in the ring's table: no lookup, no reference count.
    Place(usize),
}

impl Socket {
    fn number(self) -> types::Fd {
        types::Fd(match self {
            Socket::Descriptor(fd) => fd,
            Socket::Place(place) => RawFd::try_from(place).unwrap_or(-1),
        })
    }

    const fn flags(self) -> squeue::Flags {
        match self {
            Socket::Descriptor(_) => squeue::Flags::empty(),
            Socket::Place(_) => squeue::Flags::FIXED_FILE,
        }
    }
}

impl Engine {
    /// `to` is where connects go; `outgoing` is what can be sent; `message` bytes fit a
    /// buffer, as far as that is sensible; so many `places` for connections are in the table.
    pub(crate) fn open(
        to: SocketAddr,
        outgoing: Vec<u8>,
        message: usize,
        places: u32,
    ) -> Result<Engine> {
        let io = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(16384)
            .build(4096)
            .context("set up io_uring (Linux 6.1 or newer, and not forbidden by seccomp)")?;
        let (buffer_bytes, buffer_count) = buffers_for(message);
        let room = usize::from(buffer_count) + PAGE_ENTRIES;
        let mut entries: Vec<BufRingEntry> = Vec::with_capacity(room);
        // The ring must begin at a page: leave room to begin anywhere in the first one.
        let start = entries.as_ptr().align_offset(4096);
        anyhow::ensure!(start <= PAGE_ENTRIES, "the buffer ring cannot be aligned");
        let address = entries.as_mut_ptr().wrapping_add(start) as u64;
        // SAFETY: the entries are ours, aligned to a page, and live as long as the ring.
        unsafe { io.submitter().register_buf_ring_with_flags(address, buffer_count, 0, 0) }
            .context("register the buffers")?;
        io.submitter().register_files_sparse(places).with_context(|| {
            format!("make a table of {places} descriptors (`ulimit -n` must allow it)")
        })?;
        let mut engine = Engine {
            io,
            buffer_bytes,
            buffer_count,
            buffers: vec![0; usize::from(buffer_count) * buffer_bytes as usize],
            enters: 0,
            entries,
            free: 0,
            offset: start,
            outgoing,
            tail: 0,
            to: Box::new(to.into()),
        };
        (0..buffer_count).for_each(|buffer| engine.recycle(buffer));
        Ok(engine)
    }

    /// Each connection takes a free place of the table.
    pub(crate) fn accept(&mut self, listener: RawFd) {
        let accept = opcode::AcceptMulti::new(types::Fd(listener)).allocate_file_index(true);
        self.push(accept.build(), Kind::Accept, 0);
    }

    /// Puts a socket into the place of its number.
    pub(crate) fn adopt(&mut self, connection: usize, fd: RawFd) -> Result<()> {
        let place = u32::try_from(connection)?;
        self.io.submitter().register_files_update(place, &[fd]).context("register a socket")?;
        Ok(())
    }

    /// Empties a place; the socket is closed with it if nobody else has it.
    pub(crate) fn close(&mut self, connection: usize) {
        let place = types::Fixed(u32::try_from(connection).unwrap_or(u32::MAX));
        let close = opcode::Close::new(place).build().flags(squeue::Flags::SKIP_SUCCESS);
        self.push(close, Kind::Close, connection);
    }

    pub(crate) fn connect(&mut self, connection: usize, socket: Socket) {
        let (address, bytes) = (self.to.as_ptr().cast(), self.to.len());
        let connect = opcode::Connect::new(socket.number(), address, bytes).build();
        self.push(connect.flags(socket.flags()), Kind::Connect, connection);
    }

    pub(crate) fn receive(&mut self, connection: usize, socket: Socket) {
        let receive = opcode::RecvMulti::new(socket.number(), 0).build();
        // The builder has set a flag of its own.
        let flags = socket.flags() | squeue::Flags::BUFFER_SELECT;
        self.push(receive.flags(flags), Kind::Receive, connection);
    }

    /// One receive: nothing is in flight after its completion.
    pub(crate) fn receive_once(&mut self, connection: usize, socket: Socket) {
        let bytes = self.buffer_bytes;
        let receive = opcode::Recv::new(socket.number(), std::ptr::null_mut(), bytes)
            .buf_group(0)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT | socket.flags());
        self.push(receive, Kind::Receive, connection);
    }

    /// Sends `bytes` of the outgoing ones, those that begin at `from`.
    pub(crate) fn send_outgoing(
        &mut self,
        connection: usize,
        socket: Socket,
        from: usize,
        bytes: usize,
    ) {
        let part = self.outgoing.get(from..from + bytes).unwrap_or_default();
        let (address, bytes) = (part.as_ptr(), u32::try_from(part.len()).unwrap_or(0));
        self.send(connection, socket, address, bytes);
    }

    /// Outgoing bytes, to be written while no send of them is in flight.
    pub(crate) fn outgoing(&mut self, from: usize, bytes: usize) -> &mut [u8] {
        self.outgoing.get_mut(from..from + bytes).unwrap_or_default()
    }

    pub(crate) const fn outgoing_bytes(&self) -> usize {
        self.outgoing.len()
    }

    /// What was received into `buffer`, until that is recycled.
    pub(crate) fn received(&self, buffer: u16, bytes: usize) -> &[u8] {
        let from = usize::from(buffer) * self.buffer_bytes as usize;
        self.buffers.get(from..from + bytes).unwrap_or_default()
    }

    /// The same, to be changed before it is sent back.
    pub(crate) fn received_mut(&mut self, buffer: u16, bytes: usize) -> &mut [u8] {
        let from = usize::from(buffer) * self.buffer_bytes as usize;
        self.buffers.get_mut(from..from + bytes).unwrap_or_default()
    }

    /// No more will be sent: FIN follows what was.
    pub(crate) fn shut_down(&mut self, connection: usize, socket: Socket) {
        let shutdown = opcode::Shutdown::new(socket.number(), libc::SHUT_WR).build();
        self.push(shutdown.flags(socket.flags()), Kind::Shutdown, connection);
    }

    /// Breaks a connection of the table: everything in flight ends, and who still sends is reset.
    pub(crate) fn abort(&mut self, connection: usize) {
        let number = Socket::Place(connection);
        let shutdown = opcode::Shutdown::new(number.number(), libc::SHUT_RDWR).build();
        self.push(shutdown.flags(number.flags()), Kind::Shutdown, connection);
    }

    /// Buffers that the kernel has and nobody here holds.
    pub(crate) const fn free(&self) -> u16 {
        self.free
    }

    /// Times the kernel was entered.
    pub(crate) const fn enters(&self) -> u64 {
        self.enters
    }

    /// Sends what was received into `buffer`.
    pub(crate) fn send_buffer(
        &mut self,
        connection: usize,
        socket: Socket,
        buffer: u16,
        bytes: u32,
    ) {
        let place = usize::from(buffer) * self.buffer_bytes as usize;
        self.send(connection, socket, self.buffers.as_ptr().wrapping_add(place), bytes);
    }

    /// Gives a buffer back to the kernel.
    pub(crate) fn recycle(&mut self, buffer: u16) {
        let address =
            self.buffers.as_ptr().wrapping_add(usize::from(buffer) * self.buffer_bytes as usize)
                as u64;
        let base = self.entries.as_mut_ptr().wrapping_add(self.offset);
        let place = base.wrapping_add(usize::from(self.tail & (self.buffer_count - 1)));
        // SAFETY: the place lies in the reserved room; the kernel reads it only below the tail,
        // and the tail's own two bytes (in entry 0) are not touched by the setters.
        let entry = unsafe { &mut *place };
        entry.set_addr(address);
        entry.set_len(self.buffer_bytes);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        self.free += 1;
        // SAFETY: `base` is the first entry of the registered ring.
        let tail = unsafe { BufRingEntry::tail(base) }.cast::<AtomicU16>();
        // SAFETY: two aligned bytes of ours that the kernel only reads.
        unsafe { (*tail).store(self.tail, Ordering::Release) };
    }

    /// Submits, waits so long for something to happen, and brings every completion.
    pub(crate) fn turn(&mut self, events: &mut Vec<Event>, patience: Duration) -> Result<()> {
        self.enters += 1;
        match self.enter(patience) {
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY)
                ) => {}
            result => drop(result.context("enter the ring")?),
        }
        events.clear();
        events.extend(self.io.completion().map(|entry| Event {
            buffer: cqueue::buffer_select(entry.flags()),
            connection: (entry.user_data() >> 8) as usize,
            kind: match entry.user_data() & 0xff {
                1 => Kind::Accept,
                2 => Kind::Connect,
                3 => Kind::Receive,
                4 => Kind::Send,
                5 => Kind::Close,
                _ => Kind::Shutdown,
            },
            more: cqueue::more(entry.flags()),
            result: entry.result(),
        }));
        let taken = events.iter().filter(|event| event.buffer.is_some()).count();
        self.free = self.free.saturating_sub(u16::try_from(taken).unwrap_or(u16::MAX));
        Ok(())
    }

    /// Not to wait is not to wait for no time at all: that would set a timer, which on a virtual
    /// machine costs more than an exchange does.
    fn enter(&mut self, patience: Duration) -> std::io::Result<usize> {
        if patience.is_zero() {
            let pending = u32::try_from(self.io.submission().len()).unwrap_or(u32::MAX);
            // SAFETY: no argument is passed, so no pointer is read.
            return unsafe {
                self.io.submitter().enter::<libc::sigset_t>(pending, 0, GETEVENTS, None)
            };
        }
        let patience = types::Timespec::from(patience);
        let arguments = types::SubmitArgs::new().timespec(&patience);
        self.io.submitter().submit_with_args(1, &arguments)
    }

    fn send(&mut self, connection: usize, socket: Socket, address: *const u8, bytes: u32) {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let send = opcode::Send::new(socket.number(), address, bytes).flags(flags).build();
        self.push(send.flags(socket.flags()), Kind::Send, connection);
    }

    fn push(&mut self, entry: squeue::Entry, kind: Kind, connection: usize) {
        let entry = entry.user_data((connection as u64) << 8 | kind as u64);
        // SAFETY: pointers lead to `buffers`, `outgoing` or `to`, which live as long as the ring
        // and never move.
        while unsafe { self.io.submission().push(&entry) }.is_err() {
            let _ = self.io.submit();
        }
    }
}

/// Size and number (a power of two) of buffers for messages of this size: together they should fit
/// a cache. Not the size of a page: what lies a power of two apart shares a few sets of a cache.
fn buffers_for(message: usize) -> (u32, u16) {
    match message {
        0..=192 => (192, 2048),
        193..=4096 => (4160, 1024),
        _ => (64 << 10, 32),
    }
}

/// `IORING_ENTER_GETEVENTS`: also runs what the kernel has deferred to this thread.
const GETEVENTS: u32 = 1;
/// Entries in a page, for alignment.
const PAGE_ENTRIES: usize = 4096 / size_of::<BufRingEntry>();
