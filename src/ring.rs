// SPDX-License-Identifier: Apache-2.0
//! This core's io_uring: the only road to the kernel while bytes move.
//!
//! A thin layer: each function puts one request (or one chain) into the submission queue, and
//! `turn` brings completions back. Knows slots and buffers, never what a flow is about.
//!
//! Slots: the descriptor table has `2 × flows_max` places. The lower half is for accepted
//! sockets, the upper half for dialled ones: the upstream of slot `s` lives in `flows_max + s`,
//! so that a flow's number is all anybody needs.
#![deny(clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "hot path")]
#![expect(unsafe_code, reason = "pushes requests that carry pointers")]

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};

use crate::op::{BufferId, FlowId, Kind, Pool, Segment, Side, Token};

use buffers::Buffers;
use scratch::Scratch;
use spin::Spin;

pub use dial::DialOptions;
pub use probe::Features;
pub use setup::{RingError, Setup};
pub use turn::{Batch, Event};

mod buffers;
mod dial;
mod probe;
mod scratch;
mod setup;
mod spin;
mod turn;

/// One io_uring with its descriptor table and buffers. Belongs to the thread that opened it.
///
/// Field order is drop order: the kernel lets go of the ring before its memory is unmapped.
pub struct Ring {
    io: IoUring,
    small: Buffers,
    bulk: Buffers,
    dial: Box<DialOptions>,
    enters: u64,
    features: Features,
    flows_max: u32,
    scratch: Scratch,
    spin: Spin,
}

/// What an accepted connection becomes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AcceptInto {
    /// A descriptor of the process, for `Ring::adopt` after its addresses were read.
    Descriptors,
    /// A slot in the lower half of the table, chosen by the kernel.
    Slots,
}

impl Ring {
    /// What this kernel can do, found out by trying.
    #[must_use]
    pub const fn features(&self) -> &Features {
        &self.features
    }

    /// `io_uring_enter` calls so far.
    #[must_use]
    pub const fn enters(&self) -> u64 {
        self.enters
    }

    /// Accepts one connection. Without a free slot for it the kernel would accept it all the same
    /// and drop it (`io_accept` in io_uring/net.c), so ask only when there is one.
    pub fn accept_one(&mut self, token: Token, listener: BorrowedFd<'_>, into: AcceptInto) {
        let fd = types::Fd(listener.as_raw_fd());
        let accept = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut());
        let accept = match into {
            AcceptInto::Descriptors => accept.flags(libc::SOCK_CLOEXEC),
            AcceptInto::Slots => accept.file_index(Some(types::DestinationSlot::auto_target())),
        };
        self.push(accept.build().user_data(token.raw()));
    }

    /// Accepts until cancelled or failed; each connection is an event of its own. There must be
    /// slots for as many as the listener's queue can hold: see `accept_one`.
    pub fn accept_many(&mut self, token: Token, listener: BorrowedFd<'_>, into: AcceptInto) {
        let accept = opcode::AcceptMulti::new(types::Fd(listener.as_raw_fd()))
            .allocate_file_index(into == AcceptInto::Slots)
            .flags(libc::SOCK_CLOEXEC * i32::from(into == AcceptInto::Descriptors));
        self.push(accept.build().user_data(token.raw()));
    }

    /// Moves an accepted connection into a slot of our choice and gives its descriptor back.
    pub fn adopt(&mut self, slot: FlowId, fd: OwnedFd) {
        self.reserve(1);
        let number = self.scratch.keep_descriptor(fd);
        let Ok(offset) = i32::try_from(slot.slot()) else { return };
        let update = opcode::FilesUpdate::new(number, 1).offset(offset).build();
        self.push_quiet(update);
    }

    /// Receives into buffers of `pool` until `credit_bytes` have come, EOF, error, cancel, or
    /// `ENOBUFS` for an empty pool. On kernels before 6.17 the credit does not end it: cancel.
    pub fn receive(&mut self, token: Token, side: Side, credit_bytes: u32, pool: Pool) {
        let fd = self.socket(token.flow(), side);
        let mut receive = opcode::RecvMulti::new(fd, pool as u16).build().user_data(token.raw());
        if self.features.receive_limit {
            limit_receive(&mut receive, credit_bytes);
        }
        self.push(receive);
    }

    /// Sends the segments, at most `SEGMENTS_PER_SEND_MAX`, in order, waiting for room in the
    /// socket: the completion comes when all are taken or none can be any more.
    pub fn send(&mut self, token: Token, to: Side, mut segments: impl Iterator<Item = Segment>) {
        let fd = self.socket(token.flow(), to);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let Some(first) = segments.next() else { return };
        let first_address = self.address(first);
        let Some(second) = segments.next() else {
            let send = opcode::Send::new(fd, first_address, first.len).flags(flags);
            return self.push(send.build().user_data(token.raw()));
        };
        self.reserve(1);
        let (small, bulk) = (&self.small, &self.bulk);
        let vectors = [first, second].into_iter().chain(segments).map(|segment| libc::iovec {
            iov_base: pool_of(small, bulk, segment.buffer)
                .address(segment.buffer)
                .wrapping_add(segment.offset as usize)
                .cast(),
            iov_len: segment.len as usize,
        });
        let message = self.scratch.message(vectors);
        let send = opcode::SendMsg::new(fd, message).flags(flags.cast_unsigned());
        self.push(send.build().user_data(token.raw()));
    }

    /// Sends FIN.
    ///
    /// `IORING_OP_SHUTDOWN` always runs on a kernel worker thread (`REQ_F_FORCE_ASYNC` in
    /// io_uring/net.c), so where the kernel can lend us a descriptor for the slot, shutdown(2) is
    /// called on that as soon as it comes.
    pub fn shutdown(&mut self, token: Token, side: Side) {
        let fd = self.socket(token.flow(), side);
        let request = if self.features.descriptor_install {
            opcode::FixedFdInstall::new(fd, 0).build()
        } else {
            opcode::Shutdown::new(fd, libc::SHUT_WR).build()
        };
        self.push(request.user_data(token.raw()));
    }

    /// Gives a socket back: with FIN, or with RST. Says nothing when done.
    pub fn close(&mut self, flow: FlowId, side: Side, reset: bool) {
        let fd = self.socket(flow, side);
        self.reserve(2);
        if reset {
            let linger: *const libc::linger = &raw const RESET_ON_CLOSE;
            let set = opcode::SetSockOpt::new(
                fd,
                libc::SOL_SOCKET.cast_unsigned(),
                libc::SO_LINGER.cast_unsigned(),
                linger.cast(),
                LINGER_BYTES,
            );
            self.push_quiet(set.build());
        }
        self.push_quiet(opcode::Close::new(fd).build());
    }

    /// Asks a request to end early; its own event says whether it did.
    pub fn cancel(&mut self, target: Token) {
        self.push_quiet(opcode::AsyncCancel::new(target.raw()).build());
    }

    /// Makes an event with `token` whenever the eventfd is rung.
    pub fn arm_mailbox(&mut self, token: Token, bell: BorrowedFd<'_>) {
        let poll = opcode::PollAdd::new(types::Fd(bell.as_raw_fd()), POLLIN).multi(true);
        self.push(poll.build().user_data(token.raw()));
    }

    /// Gives a buffer back to its pool; the kernel sees it in the next turn.
    pub fn recycle(&mut self, buffer: BufferId) {
        if self.small.owns(buffer) {
            self.small.recycle(buffer);
        } else {
            self.bulk.recycle(buffer);
        }
    }

    /// Buffers of a pool that nobody holds.
    #[must_use]
    pub fn free(&self, pool: Pool) -> u16 {
        match pool {
            Pool::Bulk => self.bulk.free(),
            Pool::Small => self.small.free(),
        }
    }

    /// Dials `to`, from `from` if the upstream shall see another address than ours.
    ///
    /// One linked chain: socket, options, bind, connect. Every step carries the same token and
    /// reports only failure, and a step that fails silences those behind it (`REQ_F_SKIP_LINK_CQES`
    /// in io_uring/io_uring.c), so exactly one event comes: the first failure, or the connect's.
    pub fn dial(&mut self, token: Token, to: SocketAddr, from: Option<SocketAddr>) {
        let (flow, upper) = (token.flow(), self.flows_max);
        let Ok(slot) = types::DestinationSlot::try_from_slot_target(upper + flow.slot()) else {
            return;
        };
        self.reserve(DIAL_STEPS_MAX);
        let fd = self.socket(flow, Side::Upstream);
        let domain = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let socket = opcode::Socket::new(domain, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        self.push_link(token, socket.file_index(Some(slot)).build());
        for step in 0..self.dial.count() {
            let Some(option) = self.dial.option(step, from) else { continue };
            self.push_link(token, option.request(fd));
        }
        if let Some(from) = from {
            let (address, bytes) = self.scratch.address(from);
            self.push_link(token, opcode::Bind::new(fd, address, bytes).build());
        }
        let (address, bytes) = self.scratch.address(to);
        self.push(opcode::Connect::new(fd, address, bytes).build().user_data(token.raw()));
    }

    fn push_link(&mut self, token: Token, entry: Entry) {
        self.push(entry.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS).user_data(token.raw()));
    }

    fn push_quiet(&mut self, entry: Entry) {
        self.push(entry.flags(Flags::SKIP_SUCCESS).user_data(QUIET.raw()));
    }

    fn push(&mut self, entry: Entry) {
        self.reserve(1);
        // SAFETY: every pointer in the entry leads to a buffer of ours (mapped for as long as the
        // ring lives), to `scratch` (kept until the entry was submitted, and the kernel copies
        // what it reads there while submitting: IORING_FEAT_SUBMIT_STABLE, checked in `setup`),
        // to `dial`, or to a static.
        let pushed = unsafe { self.io.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "room was reserved");
    }

    /// Makes room for a chain of `entries`, which must not be torn apart by a submit.
    fn reserve(&mut self, entries: usize) {
        let room = {
            let queue = self.io.submission();
            queue.capacity() - queue.len()
        };
        if room < entries || !self.scratch.has_room(entries) {
            self.submit();
        }
    }

    fn socket(&self, flow: FlowId, side: Side) -> types::Fixed {
        match side {
            Side::Downstream => types::Fixed(flow.slot()),
            Side::Upstream => types::Fixed(self.flows_max + flow.slot()),
        }
    }

    fn address(&self, segment: Segment) -> *const u8 {
        pool_of(&self.small, &self.bulk, segment.buffer)
            .address(segment.buffer)
            .wrapping_add(segment.offset as usize)
    }
}

fn pool_of<'a>(small: &'a Buffers, bulk: &'a Buffers, buffer: BufferId) -> &'a Buffers {
    if small.owns(buffer) { small } else { bulk }
}

/// Ends a multishot receive after so many bytes: field `optlen` of the request, since 6.17
/// (`io_recvmsg_prep_setup` in io_uring/net.c). The crate has no name for it yet.
fn limit_receive(receive: &mut Entry, bytes: u32) {
    let raw = (&raw mut *receive).cast::<u8>().wrapping_add(OPTLEN_OFFSET);
    // SAFETY: an entry is the 64 bytes of `struct io_uring_sqe` and nothing else (asserted
    // below), and bytes 44 to 48 are `optlen` there; any four bytes are a valid `u32`.
    unsafe { raw.cast::<u32>().write_unaligned(bytes) };
}

const _: () = assert!(size_of::<Entry>() == 64);

/// Place of `optlen` in `struct io_uring_sqe` (linux/io_uring.h).
const OPTLEN_OFFSET: usize = 44;
/// `POLLIN`, as the request wants it.
const POLLIN: u32 = 1;
/// Only failures of a request with this token make an event, and nobody waits for them.
const QUIET: Token = Token::new(Kind::Quiet, FlowId::new(0), 0);
/// Socket, at most eleven options, bind, connect.
const DIAL_STEPS_MAX: usize = 14;
const LINGER_BYTES: u32 = 8;
const _: () = assert!(size_of::<libc::linger>() == LINGER_BYTES as usize);
/// Closing sends RST (socket(7)). Static, because the kernel may read it late.
static RESET_ON_CLOSE: libc::linger = libc::linger { l_onoff: 1, l_linger: 0 };
