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

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};

use crate::op::{BufferId, FlowId, Kind, Pool, Request, Segment, Side, Token};
use crate::sys::socket;

use buffers::Buffers;
use cancels::Cancels;
use headers::Headers;
use pipes::{Pipes, Step};
use scratch::Scratch;
use spin::Spin;
use turn::{Again, CANCEL, DESCRIPTOR};

pub use dial::{DialFrom, DialOptions, Marks};
pub use pipes::{SpliceLimits, Spliced};
pub(crate) use probe::is_withheld;
pub use probe::{Fallback, Features};
pub use setup::{RingError, Setup};
pub use turn::{Batch, Event};

mod buffers;
mod cancels;
mod dial;
mod headers;
mod pipes;
mod probe;
mod scratch;
mod setup;
mod spin;
mod splice;
#[cfg(test)]
mod tests;
mod turn;

/// One io_uring with its descriptor table and buffers. Belongs to the thread that opened it.
///
/// Field order is drop order: the kernel lets go of the ring before its memory is unmapped.
pub struct Ring {
    io: IoUring,
    small: Buffers,
    bulk: Buffers,
    headers: Headers,
    dial: Box<DialOptions>,
    name: Box<libc::sockaddr_storage>,
    again: Vec<Again>,
    /// Events that need no kernel.
    answers: Vec<Event>,
    broken: Option<RingError>,
    cancels: Cancels,
    /// Events may gather for as long.
    coalesce: Duration,
    /// A dial was pushed and not submitted yet.
    dialling: bool,
    enters: u64,
    features: Features,
    flows_max: u32,
    overflows: u64,
    pipes: Pipes,
    scratch: Scratch,
    /// `None` where nobody wants to know.
    sleeps: Option<u64>,
    spin: Spin,
    steps: VecDeque<(Token, Step)>,
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

    /// Gives a listener the options that its accepted sockets shall inherit.
    ///
    /// # Errors
    ///
    /// As at the start.
    pub fn tune(&self, listener: BorrowedFd<'_>) -> Result<(), RingError> {
        self.dial.tune(listener)
    }

    /// `io_uring_enter` calls so far.
    #[must_use]
    pub const fn enters(&self) -> u64 {
        self.enters
    }

    /// From now on sleeps are counted, which takes a syscall before each.
    pub const fn count_sleeps(&mut self) {
        self.sleeps = Some(0);
    }

    /// Turns that had nothing to do and slept until something came, since they are counted.
    #[must_use]
    pub const fn sleeps(&self) -> u64 {
        match self.sleeps {
            Some(sleeps) => sleeps,
            None => 0,
        }
    }

    /// Turns that found the completion queue full. The kernel keeps what had no room, so nothing is
    /// lost; but it is slow, and requests for many events end, to be armed again: a larger
    /// `ring.completions` is wanted.
    #[must_use]
    pub const fn overflows(&self) -> u64 {
        self.overflows
    }

    /// Accepts one connection. Without a free slot for it the kernel would accept it all the same
    /// and drop it (`io_accept` in io_uring/net.c), so ask only when there is one.
    pub fn accept_one(&mut self, token: Token, listener: BorrowedFd<'_>, into: AcceptInto) {
        self.push(accept(listener, into).user_data(token.raw()));
    }

    /// As `accept_one`, but EAGAIN where nobody waits: the listener's `O_NONBLOCK` says nothing to
    /// the ring.
    pub fn accept_waiting(&mut self, token: Token, listener: BorrowedFd<'_>, into: AcceptInto) {
        let mut accept = accept(listener, into);
        write_field(&mut accept, IOPRIO_OFFSET, IORING_ACCEPT_DONTWAIT);
        self.push(accept.user_data(token.raw()));
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
        let Ok(offset) = i32::try_from(slot.slot()) else { return };
        if !self.reserve(1) {
            return;
        }
        let number = self.scratch.keep_descriptor(fd);
        let update = opcode::FilesUpdate::new(number, 1).offset(offset).build();
        self.push_quiet(update);
    }

    /// Receives into buffers of `pool` until `credit_bytes` have come (the last buffer may exceed
    /// them), EOF, error, cancel, or `ENOBUFS` for an empty pool. On kernels before 6.17 the
    /// credit does not end it: cancel.
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
        if !self.reserve(1) {
            return;
        }
        let (small, bulk, headers) = (&self.small, &self.bulk, &self.headers);
        let vectors = [first, second].into_iter().chain(segments).map(|segment| libc::iovec {
            iov_base: address_of(small, bulk, headers, segment).cast(),
            iov_len: segment.len as usize,
        });
        let message = self.scratch.message(vectors);
        let send = opcode::SendMsg::new(fd, message).flags(flags.cast_unsigned());
        self.push(send.build().user_data(token.raw()));
    }

    /// Sends FIN.
    ///
    /// `IORING_OP_SHUTDOWN` always runs on a kernel worker thread (`REQ_F_FORCE_ASYNC` in
    /// io_uring/net.c): about 95 µs for one alone, against 4 µs where the kernel can lend us a
    /// descriptor for the slot, on which shutdown(2) is called as soon as it comes.
    pub fn shutdown(&mut self, token: Token, side: Side) {
        if !self.features.descriptor_install {
            return self.shut_down_slowly(token);
        }
        debug_assert!(token.kind() == Some(Kind::of(Request::Shutdown(side))));
        let fd = self.socket(token.flow(), side);
        let lend = opcode::FixedFdInstall::new(fd, 0).build();
        self.push(lend.user_data(token.raw() | DESCRIPTOR));
    }

    /// Says how many milliseconds ago the kernel last sent bytes on the socket, for the first time or
    /// again. Needs `descriptor_install`: the ring's own getsockopt knows no option of TCP
    /// (`io_uring_cmd_getsockopt` in io_uring/cmd_net.c).
    pub fn ask_last_sent(&mut self, token: Token, side: Side) {
        debug_assert!(token.kind() == Some(Kind::LastSent));
        let lend = opcode::FixedFdInstall::new(self.socket(token.flow(), side), 0).build();
        self.push(lend.user_data(token.raw() | DESCRIPTOR));
    }

    /// FIN by a kernel thread.
    fn shut_down_slowly(&mut self, token: Token) {
        let upstream = token.kind() == Some(Kind::ShutdownUpstream);
        let side = if upstream { Side::Upstream } else { Side::Downstream };
        let fd = self.socket(token.flow(), side);
        let request = opcode::Shutdown::new(fd, libc::SHUT_WR).build();
        self.push(request.user_data(token.raw()));
    }

    /// Gives a socket back: with FIN, or with RST. Says nothing when done. The option and the
    /// close are not linked: a slot must be freed even if its socket takes no option any more. What
    /// the flow was lent goes first, because a socket closes with its last descriptor.
    pub fn close(&mut self, flow: FlowId, side: Side, reset: bool) {
        self.pipes.release(flow);
        let fd = self.socket(flow, side);
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

    /// Has the kernel ask the peer now and then whether it still lives, as the profile says. For
    /// sockets that have lasted a while: it costs four options and a timer.
    pub fn keep_alive(&mut self, flow: FlowId, side: Side) {
        let fd = self.socket(flow, side);
        for index in 0..self.dial.count() {
            let Some(option) = self.dial.lasting(index) else { continue };
            let request = option.request(fd);
            self.push_quiet(request);
        }
    }

    /// Ends a request early; its own event, which still comes, says whether it did. A cancel that
    /// comes too soon for the kernel is repeated. Only for requests that are in flight.
    pub fn cancel(&mut self, target: Token) {
        if self.cancels.begin(target) {
            self.push_cancel(target);
        }
    }

    fn push_cancel(&mut self, target: Token) {
        let cancel = opcode::AsyncCancel::new(target.raw()).build().flags(Flags::SKIP_SUCCESS);
        self.push(cancel.user_data(target.raw() | CANCEL));
    }

    /// The peer of a socket in its slot. For lists that people ask for: it costs a syscall or two.
    pub fn peer_name(&mut self, flow: FlowId, side: Side) -> Option<SocketAddr> {
        let fd = self.socket(flow, side);
        self.name.ss_family = 0;
        self.read_name(fd, SOCKADDR_IN_BYTES)?;
        if i32::from(self.name.ss_family) == libc::AF_INET6 {
            self.read_name(fd, SOCKADDR_IN6_BYTES)?;
        }
        socket::address_of(&self.name)
    }

    /// Runs within the submit, as every socket command does. The kernel refuses to write less than
    /// was asked for (`SO_PEERNAME` in net/core/sock.c), hence the length.
    fn read_name(&mut self, fd: types::Fixed, bytes: u32) -> Option<()> {
        let into: *mut libc::sockaddr_storage = &raw mut *self.name;
        let level = libc::SOL_SOCKET.cast_unsigned();
        let mut get =
            opcode::SetSockOpt::new(fd, level, SO_PEERNAME, into.cast_const().cast(), bytes)
                .build();
        write_field(&mut get, CMD_OP_OFFSET, SOCKET_URING_OP_GETSOCKOPT);
        self.push_quiet(get);
        self.enter(0, None).ok()
    }

    /// Makes an event with `token` whenever the eventfd is rung.
    pub fn arm_mailbox(&mut self, token: Token, bell: BorrowedFd<'_>) {
        let poll = opcode::PollAdd::new(types::Fd(bell.as_raw_fd()), POLLIN).multi(true);
        self.push(poll.build().user_data(token.raw()));
    }

    /// Makes one event with `token` when there is something to read, or nothing will come any more.
    pub fn poll_once(&mut self, token: Token, fd: BorrowedFd<'_>) {
        let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), POLLIN);
        self.push(poll.build().user_data(token.raw()));
    }

    /// Gives a buffer back to its pool; the kernel sees it in the next turn.
    pub fn recycle(&mut self, buffer: BufferId) {
        if self.small.owns(buffer) {
            self.small.recycle(buffer);
        } else if self.bulk.owns(buffer) {
            self.bulk.recycle(buffer);
        } else {
            self.headers.recycle(buffer);
        }
    }

    /// A copy of `text` to be sent before a flow's bytes; `None` while too many are on their way.
    /// It comes home by `recycle`.
    pub fn lend_header(&mut self, text: &[u8]) -> Option<Segment> {
        self.headers.lend(text)
    }

    /// A header can be lent just now.
    #[must_use]
    pub fn has_header(&self) -> bool {
        self.headers.has_free()
    }

    /// What was received; empty if no buffer reaches so far.
    #[must_use]
    pub fn bytes(&self, segment: Segment) -> &[u8] {
        if segment.offset + segment.len > self.bytes_of(segment.buffer) {
            return &[];
        }
        // SAFETY: so many bytes of the buffer are in one of our mappings, which live as long as the
        // ring and were zeroed at first. The kernel fills only buffers that it was shown: this one is
        // out with a flow, and comes home by `recycle`, which needs `self` for itself.
        unsafe { std::slice::from_raw_parts(self.address(segment), segment.len as usize) }
    }

    /// Copies the bytes of `more` behind `last` in its buffer; false if they do not fit there. Nothing
    /// else may be kept behind `last`.
    pub fn append(&mut self, last: Segment, more: Segment) -> bool {
        let end = last.offset + last.len;
        let fits = end + more.len <= self.bytes_of(last.buffer)
            && more.offset + more.len <= self.bytes_of(more.buffer)
            && last.buffer != more.buffer;
        if fits {
            let (from, to) = (self.address(more), self.address(Segment { offset: end, ..last }));
            // SAFETY: both ranges lie in their buffers, which are two, and both are out with a flow:
            // the kernel reads of them only what it was told to send, which ends at `last`.
            unsafe { to.cast_mut().copy_from_nonoverlapping(from, more.len as usize) };
        }
        fits
    }

    fn bytes_of(&self, buffer: BufferId) -> u32 {
        [self.small.bytes_of(buffer), self.bulk.bytes_of(buffer), self.headers.bytes_of(buffer)]
            .into_iter()
            .flatten()
            .next()
            .unwrap_or(0)
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
    pub fn dial(&mut self, token: Token, to: SocketAddr, from: Option<DialFrom>) {
        let (flow, upper) = (token.flow(), self.flows_max);
        let Ok(slot) = types::DestinationSlot::try_from_slot_target(upper + flow.slot()) else {
            return;
        };
        if !self.reserve(self.dial.count() + DIAL_STEPS_MAX) {
            return;
        }
        self.dialling = true;
        let fd = self.socket(flow, Side::Upstream);
        let domain = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let socket = opcode::Socket::new(domain, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        self.push_link(token, socket.file_index(Some(slot)).build());
        for step in 0..self.dial.count() {
            let Some(option) = self.dial.option(step, from) else { continue };
            self.push_link(token, option.request(fd));
        }
        if let Some(from) = from {
            let (address, bytes) = self.scratch.address(from.addr);
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
        // Not merely `reserve(1)`: what the entry points to is in `scratch` already, may have filled
        // it, and a submit would clear it.
        if self.io.submission().is_full() && !self.reserve(1) {
            return;
        }
        // SAFETY: every pointer in the entry leads to a buffer of ours (mapped for as long as the
        // ring lives), to `scratch`, to `dial` or `name`, which are boxed and dropped after the
        // ring, or to a static. What is in `scratch` stays until the entry was submitted, because
        // whoever put it there had reserved a place in the queue, so that no submit came between;
        // and the kernel copies it while submitting (IORING_FEAT_SUBMIT_STABLE, checked in `setup`).
        let pushed = unsafe { self.io.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "room was reserved");
    }

    fn socket(&self, flow: FlowId, side: Side) -> types::Fixed {
        match side {
            Side::Downstream => types::Fixed(flow.slot()),
            Side::Upstream => types::Fixed(self.flows_max + flow.slot()),
        }
    }

    fn address(&self, segment: Segment) -> *const u8 {
        address_of(&self.small, &self.bulk, &self.headers, segment)
    }
}

fn address_of(small: &Buffers, bulk: &Buffers, headers: &Headers, segment: Segment) -> *mut u8 {
    let buffer = segment.buffer;
    let first = if small.owns(buffer) {
        small.address(buffer)
    } else if bulk.owns(buffer) {
        bulk.address(buffer)
    } else {
        headers.address(buffer)
    };
    first.wrapping_add(segment.offset as usize)
}

/// Ends a multishot receive after so many bytes: field `optlen` of the request, since 6.17
/// (`io_recvmsg_prep_setup` in io_uring/net.c). The crate has no name for it yet.
fn limit_receive(receive: &mut Entry, bytes: u32) {
    write_field(receive, OPTLEN_OFFSET, bytes);
}

fn accept(listener: BorrowedFd<'_>, into: AcceptInto) -> Entry {
    let fd = types::Fd(listener.as_raw_fd());
    let accept = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut());
    match into {
        AcceptInto::Descriptors => accept.flags(libc::SOCK_CLOEXEC).build(),
        AcceptInto::Slots => accept.file_index(Some(types::DestinationSlot::auto_target())).build(),
    }
}

/// Writes a field of a request for which the crate has no name.
fn write_field<T: Field>(entry: &mut Entry, offset: usize, value: T) {
    debug_assert!(offset + size_of::<T>() <= size_of::<Entry>());
    let raw = (&raw mut *entry).cast::<u8>().wrapping_add(offset);
    // SAFETY: an entry is the 64 bytes of `struct io_uring_sqe` and nothing else (asserted
    // below), all offsets in use lie within, and any bytes are valid there.
    unsafe { raw.cast::<T>().write_unaligned(value) };
}

/// What fields of a request are made of.
trait Field: Copy {}
impl Field for u16 {}
impl Field for u32 {}

const _: () = assert!(size_of::<Entry>() == 64);

/// Place of `optlen` in `struct io_uring_sqe` (linux/io_uring.h).
const OPTLEN_OFFSET: usize = 44;
/// Place of `ioprio` in it, where an accept has its flags.
const IOPRIO_OFFSET: usize = 2;
/// `IORING_ACCEPT_DONTWAIT`, since 6.10.
const IORING_ACCEPT_DONTWAIT: u16 = 1 << 1;
/// Place of `cmd_op` in it.
const CMD_OP_OFFSET: usize = 8;
/// `SOCKET_URING_OP_GETSOCKOPT`: laid out as its sibling that sets.
const SOCKET_URING_OP_GETSOCKOPT: u32 = 2;
/// asm-generic/socket.h; the same everywhere that this crate's ring runs.
const SO_PEERNAME: u32 = 28;
const SOCKADDR_IN_BYTES: u32 = 16;
const SOCKADDR_IN6_BYTES: u32 = 28;
const _: () = assert!(size_of::<libc::sockaddr_in>() == SOCKADDR_IN_BYTES as usize);
const _: () = assert!(size_of::<libc::sockaddr_in6>() == SOCKADDR_IN6_BYTES as usize);
/// `POLLIN`, as the request wants it.
const POLLIN: u32 = 1;
/// Only failures of a request with this token make an event, and nobody waits for them.
const QUIET: Token = Token::new(Kind::Quiet, FlowId::new(0), 0);
/// Socket, bind, connect: the steps besides the options.
const DIAL_STEPS_MAX: usize = 3;
const LINGER_BYTES: u32 = 8;
const _: () = assert!(size_of::<libc::linger>() == LINGER_BYTES as usize);
/// Closing sends RST (socket(7)). Static, because the kernel may read it late.
static RESET_ON_CLOSE: libc::linger = libc::linger { l_onoff: 1, l_linger: 0 };
