// SPDX-License-Identifier: Apache-2.0
//! Why a flow ended: the word in counters, logs and `weir flows`.

use super::{Errno, Side};

/// Why a flow ended.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum CloseReason {
    /// The upstream could not be dialled, for a reason without a word of its own.
    ConnectFailed,
    /// The upstream answered the SYN with RST.
    ConnectRefused,
    /// The upstream did not answer in time.
    ConnectTimeout,
    /// No route to the upstream.
    ConnectUnreachable,
    /// The downstream sent RST, or its connection broke.
    DownstreamReset,
    /// Still open when the time to drain was over.
    Drained,
    /// Both directions ended with FIN.
    Finished,
    /// One direction ended and the other stayed silent.
    HalfClosedTimeout,
    /// No byte moved for too long.
    IdleTimeout,
    /// We ran out of something: source ports, memory.
    LocalLimit,
    /// What a side said breaks its protocol, and nobody knows where its next frame begins.
    ProtocolError,
    /// The kernel lost the thread of what it forwards: reset, rather than go on with a hole.
    RelayBroken,
    /// The upstream sent RST, or its connection broke.
    UpstreamReset,
    /// The network namespace that it lived in is no more.
    WorkloadGone,
}

impl CloseReason {
    /// Every value, in the order of the discriminants.
    pub const ALL: [CloseReason; 14] = [
        CloseReason::ConnectFailed,
        CloseReason::ConnectRefused,
        CloseReason::ConnectTimeout,
        CloseReason::ConnectUnreachable,
        CloseReason::DownstreamReset,
        CloseReason::Drained,
        CloseReason::Finished,
        CloseReason::HalfClosedTimeout,
        CloseReason::IdleTimeout,
        CloseReason::LocalLimit,
        CloseReason::ProtocolError,
        CloseReason::RelayBroken,
        CloseReason::UpstreamReset,
        CloseReason::WorkloadGone,
    ];

    /// How many there are.
    pub const COUNT: usize = CloseReason::ALL.len();

    /// The label value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            CloseReason::ConnectFailed => "connect_failed",
            CloseReason::ConnectRefused => "connect_refused",
            CloseReason::ConnectTimeout => "connect_timeout",
            CloseReason::ConnectUnreachable => "connect_unreachable",
            CloseReason::DownstreamReset => "downstream_reset",
            CloseReason::Drained => "drained",
            CloseReason::Finished => "finished",
            CloseReason::HalfClosedTimeout => "half_closed_timeout",
            CloseReason::IdleTimeout => "idle_timeout",
            CloseReason::LocalLimit => "local_limit",
            CloseReason::ProtocolError => "protocol_error",
            CloseReason::RelayBroken => "relay_broken",
            CloseReason::UpstreamReset => "upstream_reset",
            CloseReason::WorkloadGone => "workload_gone",
        }
    }

    /// The flow never had an upstream.
    #[must_use]
    pub const fn is_connect_failure(self) -> bool {
        matches!(
            self,
            CloseReason::ConnectFailed
                | CloseReason::ConnectRefused
                | CloseReason::ConnectTimeout
                | CloseReason::ConnectUnreachable
                | CloseReason::LocalLimit
        )
    }

    /// What a failed connect means (connect(2)).
    pub(crate) const fn of_connect(errno: Errno) -> CloseReason {
        match errno.0 {
            111 => CloseReason::ConnectRefused,           // ECONNREFUSED
            110 => CloseReason::ConnectTimeout,           // ETIMEDOUT
            101 | 113 => CloseReason::ConnectUnreachable, // ENETUNREACH, EHOSTUNREACH
            // ENOMEM, ENFILE, EMFILE, EADDRINUSE, EADDRNOTAVAIL, ENOBUFS
            12 | 23 | 24 | 98 | 99 | 105 => CloseReason::LocalLimit,
            _ => CloseReason::ConnectFailed,
        }
    }

    /// What a broken connection on `side` means.
    pub(crate) const fn reset_by(side: Side) -> CloseReason {
        match side {
            Side::Downstream => CloseReason::DownstreamReset,
            Side::Upstream => CloseReason::UpstreamReset,
        }
    }
}
