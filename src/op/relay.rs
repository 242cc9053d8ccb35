// SPDX-License-Identifier: Apache-2.0
//! How the bytes of a direction move, and why a better way was left: the words of counters and of
//! `weir flows`.

use super::{Errno, Side};

/// How the bytes of one direction move.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Relay {
    /// Through provided buffers.
    Copy = 0,
    /// Within the kernel.
    Sockmap = 1,
    /// Through a pipe.
    Splice = 2,
}

/// Why a direction that was promoted, or was about to be, went back to copy.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Fall {
    /// The kernel forwards no more: the peer is behind, or the socket's send buffer half full.
    Backlog = 0,
    /// No descriptor: the limit on spliced flows, or the process's own, is reached.
    Descriptors = 1,
    /// The socket cannot be spliced.
    Invalid = 2,
    /// No room for another flow that the kernel forwards.
    Pairs = 3,
    /// No pipe: the budget, or the kernel's for this user, is used up.
    Pipes = 4,
    /// The kernel does not forward between these sockets: FIN has come, or one is of another kind.
    Refused = 5,
    /// The socket has bytes that do not come out this way, as at an urgent mark.
    Stuck = 6,
}

/// Which directions the kernel forwards.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Joined {
    /// From downstream to upstream.
    pub from_downstream: bool,
    /// From upstream to downstream.
    pub from_upstream: bool,
}

impl Joined {
    /// Whether the kernel reads the socket of this side.
    #[must_use]
    pub const fn reads(self, from: Side) -> bool {
        match from {
            Side::Downstream => self.from_downstream,
            Side::Upstream => self.from_upstream,
        }
    }
}

impl Relay {
    /// Every value, in the order of the discriminants.
    pub const ALL: [Relay; 3] = [Relay::Copy, Relay::Sockmap, Relay::Splice];

    /// How many there are.
    pub const COUNT: usize = Relay::ALL.len();

    /// The label value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Relay::Copy => "copy",
            Relay::Sockmap => "sockmap",
            Relay::Splice => "splice",
        }
    }
}

impl Fall {
    /// Every value, in the order of the discriminants.
    pub const ALL: [Fall; 7] = [
        Fall::Backlog,
        Fall::Descriptors,
        Fall::Invalid,
        Fall::Pairs,
        Fall::Pipes,
        Fall::Refused,
        Fall::Stuck,
    ];

    /// How many there are.
    pub const COUNT: usize = Fall::ALL.len();

    /// The label value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Fall::Backlog => "backlog",
            Fall::Descriptors => "descriptors",
            Fall::Invalid => "invalid",
            Fall::Pairs => "pairs",
            Fall::Pipes => "pipes",
            Fall::Refused => "refused",
            Fall::Stuck => "stuck",
        }
    }

    /// The relay that was left, or not taken.
    #[must_use]
    pub const fn from(self) -> Relay {
        match self {
            Fall::Backlog | Fall::Pairs | Fall::Refused => Relay::Sockmap,
            Fall::Descriptors | Fall::Invalid | Fall::Pipes | Fall::Stuck => Relay::Splice,
        }
    }

    /// What a pipe that could not be filled means, if it means that another way must be taken.
    pub(crate) const fn of_fill(errno: Errno) -> Option<Fall> {
        match errno.0 {
            22 => Some(Fall::Invalid),               // EINVAL
            12 | 23 | 24 | 105 => Some(Fall::Pipes), // ENOMEM, ENFILE, EMFILE, ENOBUFS
            _ => None,
        }
    }
}
