// SPDX-License-Identifier: Apache-2.0
//! The words that flow and ring share: `Op` goes in, `Completion` comes out, `Token` joins them.
//!
//! Plain data, no behaviour beyond packing. Nothing here names a descriptor: a flow says "my
//! downstream socket", and only the ring knows in which slot of its table that socket lives.

use std::io;

pub use reason::CloseReason;
pub use relay::{Fall, Joined, Relay};

#[cfg(test)]
pub(crate) mod random;
mod reason;
mod relay;

/// Which of a flow's two sockets: the one that was accepted or the one that was dialled.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Side {
    /// Accepted by us.
    Downstream = 0,
    /// Dialled by us.
    Upstream = 1,
}

impl Side {
    /// Both sides, in the order of their discriminants.
    pub const BOTH: [Side; 2] = [Side::Downstream, Side::Upstream];

    /// The side that bytes read from this one are written to.
    #[must_use]
    pub const fn other(self) -> Side {
        match self {
            Side::Downstream => Side::Upstream,
            Side::Upstream => Side::Downstream,
        }
    }
}

/// A flow's place in its worker's slab; also the ring slot of its downstream socket.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct FlowId(u32);

impl FlowId {
    /// Flows one worker can name: `Token` has this much room.
    pub const COUNT_MAX: u32 = 1 << 24;

    /// Keeps the low 24 bits of `index`.
    #[must_use]
    pub const fn new(index: u32) -> FlowId {
        FlowId(index & (FlowId::COUNT_MAX - 1))
    }

    /// The index into the slab.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The same as the ring counts slots.
    #[must_use]
    pub const fn slot(self) -> u32 {
        self.0
    }
}

/// A buffer of this worker's provided-buffer rings. Ids are unique over both pools.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BufferId(pub u16);

/// The two pools of provided buffers.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Pool {
    /// Few large buffers for directions that have proved bulky.
    Bulk = 1,
    /// Many small buffers, where every direction starts.
    Small = 0,
}

/// Bytes in a provided buffer, waiting to be sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Where the bytes are.
    pub buffer: BufferId,
    /// First unsent byte, counted from the start of the buffer.
    pub offset: u32,
    /// Unsent bytes; never 0.
    pub len: u32,
}

/// What a flow asks of the ring. Every variant but `AwaitBuffers` becomes one or more requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Op {
    /// Say `Completion::Ready` when the direction that reads from `from` can go on.
    Await {
        /// The half, named by the side it reads from.
        from: Side,
        /// What it waits for.
        readiness: Readiness,
    },
    /// Say `Completion::BuffersFree` when the pool has room again; replaces an armed receive.
    AwaitBuffers(Side),
    /// Say `Completion::Drained` when everything that the kernel has forwarded from this side is in
    /// the other side's socket.
    AwaitDrained(Side),
    /// End the named request early. Its own completion still comes; the cancel has none.
    Cancel(Request),
    /// Give the socket back. Valid only with no request of that side in flight.
    Close {
        /// Whose socket.
        side: Side,
        /// Send RST instead of FIN (`SO_LINGER` 0).
        reset: bool,
    },
    /// Make the upstream socket, set its options, bind if asked, and connect it.
    Connect,
    /// Lend a real descriptor of this side's socket; kept until `Uninstall` or `Close`.
    Install(Side),
    /// Let the kernel forward in both directions; needs the descriptors of both sides, and nothing
    /// queued or in flight. `Completion::Joined` says whether it does.
    Join,
    /// Have the kernel leave to user space what comes from this side. Before anything is received.
    Pass(Side),
    /// Receive until `credit_bytes` have come, EOF, error, or the pool is empty.
    Receive {
        /// From whose socket.
        side: Side,
        /// Bytes after which the request ends by itself; above 0.
        credit_bytes: u32,
        /// Whose buffers to fill.
        pool: Pool,
    },
    /// Send the first `segments` queued segments, read from `from`, to the other side's socket.
    Send {
        /// The half whose queue is meant, named by the side it reads from.
        from: Side,
        /// Segments to send, from the head of that queue; at least 1.
        segments: u16,
    },
    /// Send FIN on this side's socket.
    Shutdown(Side),
    /// Move bytes from the socket of `from` through its pipe to the other side's socket, without
    /// waiting. Needs the descriptors of both sides.
    Splice {
        /// The half, named by the side it reads from.
        from: Side,
        /// Bytes that its pipe holds already.
        held_bytes: u32,
        /// Bytes to take from the socket at most; 0 only empties the pipe.
        room_bytes: u32,
    },
    /// Give back the descriptors of both sides.
    Uninstall,
    /// Say `Completion::Stirred` whenever FIN has come on this side's socket, or it broke.
    Watch(Side),
}

/// What a direction can wait for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Readiness {
    /// The socket it reads from has bytes, EOF or an error.
    Readable,
    /// The socket it writes to has room, or an error.
    Writable,
}

/// Segments in one send: the kernel keeps 8 `iovec`s for free (`UIO_FASTIOV`), above that one
/// allocation serves 32 as well as 9.
pub const SEGMENTS_PER_SEND_MAX: u16 = 32;

/// A request that can be in flight for a flow: at most one of each kind.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Request {
    /// The wait of the direction that reads from this side.
    Await(Side),
    /// The open chain.
    Connect,
    /// The descriptor of this side's socket.
    Install(Side),
    /// The receive on this side's socket.
    Receive(Side),
    /// The send of what was read from this side.
    Send(Side),
    /// The FIN on this side's socket.
    Shutdown(Side),
    /// The step of the pipe that is filled from this side.
    Splice(Side),
    /// The watch over this side's socket.
    Watch(Side),
}

/// An errno, as the kernel gave it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Errno(pub i32);

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.0)
    }
}

/// Which timer ran out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Timer {
    /// The upstream did not answer in time.
    Connect,
    /// One direction ended and the other stayed silent.
    HalfClosed,
    /// No byte moved in either direction.
    Idle,
}

/// What became of a request, or what else happened to a flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Completion {
    /// The pool has buffers again (answers `Op::AwaitBuffers`).
    BuffersFree(Side),
    /// The open chain ended.
    Connected(Result<(), Errno>),
    /// The flow has had a deaf side for a while: see `Flow::is_deaf`.
    Deaf,
    /// Everything that the kernel has forwarded from `from` is in the other side's socket.
    Drained {
        /// The half, named by the side it reads from.
        from: Side,
        /// Bytes that the kernel has left to user space so far. An error: that socket is gone.
        result: Result<u64, Errno>,
    },
    /// Control wants the flow gone now.
    Expelled(CloseReason),
    /// A timer ran out.
    Expired(Timer),
    /// The kernel has forwarded bytes.
    Forwarded {
        /// So many since it was last said.
        bytes: u64,
        /// The half, named by the side it reads from.
        from: Side,
        /// Why it leaves to user space what comes now, if it does.
        stopped: Option<Fall>,
    },
    /// There is a descriptor for `side`, or there is none to be had.
    Installed {
        /// Whose socket.
        side: Side,
        /// `EMFILE`: the limit on spliced flows, or the process's on descriptors, is reached.
        result: Result<(), Errno>,
    },
    /// The kernel forwards, or does not (answers `Op::Join`).
    Joined(Result<Joined, Fall>),
    /// The direction that reads from `from` can go on, or should look what is wrong.
    Ready {
        /// The half, named by the side it reads from.
        from: Side,
    },
    /// The receive on `side` brought bytes (`Ok(Some)`), EOF (`Ok(None)`) or failed.
    Received {
        /// Whose socket.
        side: Side,
        /// `ENOBUFS`: the pool was empty. `ECANCELED`: a cancel won.
        result: Result<Option<Segment>, Errno>,
        /// More completions of the same request will follow.
        more: bool,
    },
    /// The send of what was read from `from` ended after so many bytes.
    Sent {
        /// The half, named by the side it reads from.
        from: Side,
        /// Bytes the kernel took, perhaps fewer than were asked; an error if the connection broke.
        result: Result<u32, Errno>,
    },
    /// FIN was sent on `side`, or could not be.
    ShutDown {
        /// Whose socket.
        side: Side,
        /// `ENOTCONN`: the peer had reset it.
        result: Result<(), Errno>,
    },
    /// A step of the pipe that is filled from `from`.
    Spliced {
        /// Bytes that came out of the pipe and into the other side's socket. `EAGAIN`: nothing
        /// did, because the pipe is empty or the socket is full.
        drained: Result<u32, Errno>,
        /// Bytes that came from the socket into the pipe, 0 for EOF. `EAGAIN`: the socket is empty
        /// or the pipe full, or nothing was asked for. `EMFILE`, `ENFILE`, `ENOBUFS`: there is no
        /// pipe to be had. `EINVAL`: this socket cannot be spliced.
        filled: Result<u32, Errno>,
        /// The half, named by the side it reads from.
        from: Side,
    },
    /// FIN has come on `side`, or its connection broke.
    Stirred {
        /// It broke.
        is_broken: bool,
        /// More completions of the same request will follow.
        more: bool,
        /// Whose socket.
        side: Side,
    },
}

/// `user_data` of a request: what it was, for which flow, and of which life of that flow's slot.
///
/// Layout: kind in bits 56..64, flow in 32..56, generation in 0..32. A completion whose generation
/// is not the slot's present one is stale and dropped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Token(u64);

impl Token {
    /// Packs the three.
    #[must_use]
    pub const fn new(kind: Kind, flow: FlowId, generation: u32) -> Token {
        Token((kind as u64) << 56 | (flow.0 as u64) << 32 | generation as u64)
    }

    /// As it came out of a completion.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Token {
        Token(raw)
    }

    /// As the ring wants it.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// What the request was; `None` if the token is not one of ours.
    #[must_use]
    pub const fn kind(self) -> Option<Kind> {
        Kind::from_raw((self.0 >> 56) as u8)
    }

    /// For which flow (or listener, for `Kind::Accept`).
    #[must_use]
    pub const fn flow(self) -> FlowId {
        FlowId::new((self.0 >> 32) as u32)
    }

    /// Of which life of its slot.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is meant")]
    pub const fn generation(self) -> u32 {
        self.0 as u32
    }
}

/// What a request was for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Kind {
    /// A listener's accept; `flow` is the listener's index.
    Accept = 1,
    /// A cancel, a close, or a step of the open chain before `connect`: only failures report.
    Quiet = 2,
    /// The last step of the open chain.
    Connect = 3,
    /// Receive from downstream.
    ReceiveDownstream = 4,
    /// Receive from upstream.
    ReceiveUpstream = 5,
    /// Send what was read from downstream.
    SendDownstream = 6,
    /// Send what was read from upstream.
    SendUpstream = 7,
    /// FIN to downstream.
    ShutdownDownstream = 8,
    /// FIN to upstream.
    ShutdownUpstream = 9,
    /// A bell rang: the mailbox's (`flow` 0) or sockmap's (`flow` 1).
    Mailbox = 10,
    /// A descriptor of the downstream socket.
    InstallDownstream = 11,
    /// A descriptor of the upstream socket.
    InstallUpstream = 12,
    /// The direction that reads from downstream waits.
    AwaitDownstream = 13,
    /// The direction that reads from upstream waits.
    AwaitUpstream = 14,
    /// A step of the pipe filled from downstream.
    SpliceDownstream = 15,
    /// A step of the pipe filled from upstream.
    SpliceUpstream = 16,
    /// A connection that is no flow yet may be looked at; `flow` is its slot.
    Peek = 17,
    /// The watch over the downstream socket.
    WatchDownstream = 18,
    /// The watch over the upstream socket.
    WatchUpstream = 19,
    /// How long ago something was last sent on one of the flow's sockets.
    LastSent = 20,
}

impl Kind {
    /// The request a flow means, as a kind.
    #[must_use]
    pub const fn of(request: Request) -> Kind {
        match request {
            Request::Await(Side::Downstream) => Kind::AwaitDownstream,
            Request::Await(Side::Upstream) => Kind::AwaitUpstream,
            Request::Connect => Kind::Connect,
            Request::Install(Side::Downstream) => Kind::InstallDownstream,
            Request::Install(Side::Upstream) => Kind::InstallUpstream,
            Request::Receive(Side::Downstream) => Kind::ReceiveDownstream,
            Request::Receive(Side::Upstream) => Kind::ReceiveUpstream,
            Request::Send(Side::Downstream) => Kind::SendDownstream,
            Request::Send(Side::Upstream) => Kind::SendUpstream,
            Request::Shutdown(Side::Downstream) => Kind::ShutdownDownstream,
            Request::Shutdown(Side::Upstream) => Kind::ShutdownUpstream,
            Request::Splice(Side::Downstream) => Kind::SpliceDownstream,
            Request::Splice(Side::Upstream) => Kind::SpliceUpstream,
            Request::Watch(Side::Downstream) => Kind::WatchDownstream,
            Request::Watch(Side::Upstream) => Kind::WatchUpstream,
        }
    }

    /// The side in the kind's name; downstream for kinds without one.
    #[must_use]
    pub const fn side(self) -> Side {
        match self {
            Kind::AwaitUpstream
            | Kind::InstallUpstream
            | Kind::ReceiveUpstream
            | Kind::SendUpstream
            | Kind::ShutdownUpstream
            | Kind::SpliceUpstream
            | Kind::WatchUpstream => Side::Upstream,
            _ => Side::Downstream,
        }
    }

    const fn from_raw(raw: u8) -> Option<Kind> {
        Some(match raw {
            1 => Kind::Accept,
            2 => Kind::Quiet,
            3 => Kind::Connect,
            4 => Kind::ReceiveDownstream,
            5 => Kind::ReceiveUpstream,
            6 => Kind::SendDownstream,
            7 => Kind::SendUpstream,
            8 => Kind::ShutdownDownstream,
            9 => Kind::ShutdownUpstream,
            10 => Kind::Mailbox,
            11 => Kind::InstallDownstream,
            12 => Kind::InstallUpstream,
            13 => Kind::AwaitDownstream,
            14 => Kind::AwaitUpstream,
            15 => Kind::SpliceDownstream,
            16 => Kind::SpliceUpstream,
            17 => Kind::Peek,
            18 => Kind::WatchDownstream,
            19 => Kind::WatchUpstream,
            20 => Kind::LastSent,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_gives_back_what_it_was_made_of() {
        let token = Token::new(Kind::SendUpstream, FlowId::new(0x00ab_cdef), 0xdead_beef);
        assert_eq!(token.kind(), Some(Kind::SendUpstream));
        assert_eq!(token.flow(), FlowId::new(0x00ab_cdef));
        assert_eq!(token.generation(), 0xdead_beef);
        assert_eq!(Token::from_raw(0).kind(), None);
    }
}
