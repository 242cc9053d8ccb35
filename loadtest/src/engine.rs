// SPDX-License-Identifier: Apache-2.0
//! A single-threaded io_uring: multishot accept and receive into shared buffers, plain sends.
//!
//! Just enough for a generator that is not the bottleneck. Sends point into memory that never
//! moves: the shared buffers, or one pattern that lives as long as the engine.
#![expect(unsafe_code, reason = "requests carry pointers")]

use std::net::SocketAddr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result};
use io_uring::types::BufRingEntry;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use socket2::SockAddr;

/// The ring, its buffers, and the addresses that connects point to.
pub(crate) struct Engine {
    io: IoUring,
    buffers: Vec<u8>,
    entries: Vec<BufRingEntry>,
    offset: usize,
    pattern: Vec<u8>,
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
}

impl Engine {
    /// `to` is where connects go; `pattern` bytes can be sent at a time.
    pub(crate) fn open(to: SocketAddr, pattern: usize) -> Result<Engine> {
        let io = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(16384)
            .build(4096)
            .context("set up io_uring (Linux 6.1 or newer, and not forbidden by seccomp)")?;
        let mut entries: Vec<BufRingEntry> = Vec::with_capacity(usize::from(COUNT) + PAGE_ENTRIES);
        // The ring must begin at a page: leave room to begin anywhere in the first one.
        let start = entries.as_ptr().align_offset(4096);
        anyhow::ensure!(start <= PAGE_ENTRIES, "the buffer ring cannot be aligned");
        let address = entries.as_mut_ptr().wrapping_add(start) as u64;
        // SAFETY: the entries are ours, aligned to a page, and live as long as the ring.
        unsafe { io.submitter().register_buf_ring_with_flags(address, COUNT, 0, 0) }
            .context("register the buffers")?;
        let mut engine = Engine {
            io,
            buffers: vec![0; usize::from(COUNT) * BYTES as usize],
            entries,
            offset: start,
            pattern: vec![0x5a; pattern],
            tail: 0,
            to: Box::new(to.into()),
        };
        (0..COUNT).for_each(|buffer| engine.recycle(buffer));
        Ok(engine)
    }

    pub(crate) fn accept(&mut self, listener: RawFd) {
        let accept = opcode::AcceptMulti::new(types::Fd(listener)).build();
        self.push(accept, Kind::Accept, 0);
    }

    pub(crate) fn connect(&mut self, connection: usize, fd: RawFd) {
        let (address, bytes) = (self.to.as_ptr().cast(), self.to.len());
        let connect = opcode::Connect::new(types::Fd(fd), address, bytes).build();
        self.push(connect, Kind::Connect, connection);
    }

    pub(crate) fn receive(&mut self, connection: usize, fd: RawFd) {
        let receive = opcode::RecvMulti::new(types::Fd(fd), 0).build();
        self.push(receive, Kind::Receive, connection);
    }

    /// One receive: nothing is in flight after its completion.
    pub(crate) fn receive_once(&mut self, connection: usize, fd: RawFd) {
        let receive = opcode::Recv::new(types::Fd(fd), std::ptr::null_mut(), BYTES)
            .buf_group(0)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT);
        self.push(receive, Kind::Receive, connection);
    }

    /// Sends `bytes` of the pattern.
    pub(crate) fn send_pattern(&mut self, connection: usize, fd: RawFd, bytes: usize) {
        let bytes = bytes.min(self.pattern.len());
        let (address, bytes) = (self.pattern.as_ptr(), u32::try_from(bytes).unwrap_or(0));
        self.send(connection, fd, address, bytes);
    }

    /// Sends what was received into `buffer`.
    pub(crate) fn send_buffer(&mut self, connection: usize, fd: RawFd, buffer: u16, bytes: u32) {
        let address = self.buffers.as_ptr().wrapping_add(usize::from(buffer) * BYTES as usize);
        self.send(connection, fd, address, bytes);
    }

    /// Gives a buffer back to the kernel.
    pub(crate) fn recycle(&mut self, buffer: u16) {
        let address =
            self.buffers.as_ptr().wrapping_add(usize::from(buffer) * BYTES as usize) as u64;
        let base = self.entries.as_mut_ptr().wrapping_add(self.offset);
        let place = base.wrapping_add(usize::from(self.tail & (COUNT - 1)));
        // SAFETY: the place lies in the reserved room; the kernel reads it only below the tail,
        // and the tail's own two bytes (in entry 0) are not touched by the setters.
        let entry = unsafe { &mut *place };
        entry.set_addr(address);
        entry.set_len(BYTES);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: `base` is the first entry of the registered ring.
        let tail = unsafe { BufRingEntry::tail(base) }.cast::<AtomicU16>();
        // SAFETY: two aligned bytes of ours that the kernel only reads.
        unsafe { (*tail).store(self.tail, Ordering::Release) };
    }

    /// Submits, waits up to 10 ms for something, and hands every completion to `take`.
    pub(crate) fn turn(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let patience = types::Timespec::new().nsec(10_000_000);
        let arguments = types::SubmitArgs::new().timespec(&patience);
        match self.io.submitter().submit_with_args(1, &arguments) {
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
                _ => Kind::Send,
            },
            more: cqueue::more(entry.flags()),
            result: entry.result(),
        }));
        Ok(())
    }

    fn send(&mut self, connection: usize, fd: RawFd, address: *const u8, bytes: u32) {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let send = opcode::Send::new(types::Fd(fd), address, bytes).flags(flags).build();
        self.push(send, Kind::Send, connection);
    }

    fn push(&mut self, entry: squeue::Entry, kind: Kind, connection: usize) {
        let entry = entry.user_data((connection as u64) << 8 | kind as u64);
        // SAFETY: pointers lead to `buffers`, `pattern` or `to`, which live as long as the ring
        // and never move.
        while unsafe { self.io.submission().push(&entry) }.is_err() {
            let _ = self.io.submit();
        }
    }
}

/// The descriptor that an accept brought.
pub(crate) fn accepted(number: i32) -> OwnedFd {
    // SAFETY: the kernel made it for the accept whose completion carried it, and each completion
    // is read once, so nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Bytes of a buffer.
const BYTES: u32 = 64 << 10;
/// Buffers; a power of two.
const COUNT: u16 = 256;
/// Entries in a page, for alignment.
const PAGE_ENTRIES: usize = 4096 / size_of::<BufRingEntry>();
