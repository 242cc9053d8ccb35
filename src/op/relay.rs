// SPDX-License-Identifier: Apache-2.0
//! How the bytes of a direction move, and why a better way was left: the words of counters and of
//! `weir flows`.

use super::Errno;

/// How the bytes of one direction move.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Relay {
    /// Through provided buffers.
    Copy = 0,
    /// Through a pipe.
    Splice = 1,
}

/// Why a direction that was promoted, or was about to be, went back to copy.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum Fall {
    /// No descriptor: the limit on spliced flows, or the process's own, is reached.
    Descriptors = 0,
    /// The socket cannot be spliced.
    Invalid = 1,
    /// No pipe: the budget, or the kernel's for this user, is used up.
    Pipes = 2,
    /// The socket has bytes that do not come out this way, as at an urgent mark.
    Stuck = 3,
}

impl Relay {
    /// Every value, in the order of the discriminants.
    pub const ALL: [Relay; 2] = [Relay::Copy, Relay::Splice];

    /// How many there are.
    pub const COUNT: usize = Relay::ALL.len();

    /// The label value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Relay::Copy => "copy",
            Relay::Splice => "splice",
        }
    }
}

impl Fall {
    /// Every value, in the order of the discriminants.
    pub const ALL: [Fall; 4] = [Fall::Descriptors, Fall::Invalid, Fall::Pipes, Fall::Stuck];

    /// How many there are.
    pub const COUNT: usize = Fall::ALL.len();

    /// The label value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Fall::Descriptors => "descriptors",
            Fall::Invalid => "invalid",
            Fall::Pipes => "pipes",
            Fall::Stuck => "stuck",
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
