// SPDX-License-Identifier: Apache-2.0
//! How fast and how big: the checked profile that the rest of weir reads.
//!
//! `profile/raw.rs` holds the YAML as written. A `Profile` in hand is proof that every value is in
//! range and that the relations between values hold.

use std::collections::BTreeMap;
use std::time::Duration;

/// Everything that decides speed and size. Made only by parsing.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Memory for bytes on their way.
    pub buffers: Buffers,
    /// What a worker may hold at most.
    pub limits: Limits,
    /// File name without `.yaml`, or the path as given.
    pub name: String,
    /// How bytes move.
    pub relay: Relay,
    /// The worker's io_uring.
    pub ring: Ring,
    /// Options for every socket of a flow.
    pub sockets: Sockets,
    /// One line for people.
    pub summary: String,
    /// Sysctls this profile wants; only `weir tune` reads them.
    pub sysctls: BTreeMap<String, String>,
    /// After how long something ends.
    pub timeouts: Timeouts,
}

/// The two pools of provided buffers of one worker.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Buffers {
    /// Buffers in the bulk pool; a power of two.
    pub bulk_count: u16,
    /// Size of one; a multiple of 4096.
    pub bulk_bytes: u32,
    /// Buffers in the small pool; a power of two. `bulk_count + small_count` is at most 32768.
    pub small_count: u16,
    /// Size of one; a multiple of 4096.
    pub small_bytes: u32,
}

/// What one worker may hold at most (`flows_max`, `connects_pending_max` and
/// `flows_per_source_max` are for the process; a worker gets its share).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Length of a listener's accept queue (`listen(2)`; the kernel caps it at `somaxconn`).
    pub backlog: u32,
    /// Upstream connects in flight; more downstreams wait in the accept queue.
    pub connects_pending_max: u32,
    /// Flows at a time; more wait in the accept queue.
    pub flows_max: u32,
    /// Flows at a time from one address, 0 for no limit; more are reset.
    pub flows_per_source_max: u32,
}

/// The worker's io_uring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ring {
    /// Completion entries; a power of two, at least twice `entries`.
    pub completions: u32,
    /// Submission entries; a power of two.
    pub entries: u32,
    /// Longest time a worker spins for work before it sleeps; zero never spins.
    pub spin: Duration,
}

/// How bytes move.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Relay {
    /// A direction that has moved this many bytes uses bulk buffers.
    pub bulk_after_bytes: u64,
    /// Which relay.
    pub mode: RelayMode,
    /// Most buffers one direction may hold; its receive is paused above it.
    pub segments_max: u16,
    /// Most bytes one direction may hold in user space.
    pub window_bytes: u32,
}

/// Which relay moves the bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RelayMode {
    /// The best one for what the flow does.
    Auto,
    /// Provided buffers.
    Copy,
    /// In the kernel, by eBPF.
    Sockmap,
    /// Through a pipe, zero copy.
    Splice,
}

/// Options for every socket of a flow.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sockets {
    /// `SO_BUSY_POLL`; zero leaves the system's.
    pub busy_poll: Duration,
    /// `TCP_CONGESTION`; `None` leaves the system's.
    pub congestion: Option<String>,
    /// `None` leaves keepalive off.
    pub keepalive: Option<Keepalive>,
    /// `TCP_NODELAY`.
    pub nodelay: bool,
    /// `SO_RCVBUF`; 0 leaves the kernel's own tuning on.
    pub receive_buffer_bytes: u32,
    /// `SO_SNDBUF`; 0 leaves the kernel's own tuning on.
    pub send_buffer_bytes: u32,
    /// `TCP_USER_TIMEOUT`; zero leaves it off.
    pub user_timeout: Duration,
}

/// Keepalive probes on both sockets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection is dead.
    pub probes: u32,
}

/// After how long something ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Timeouts {
    /// The upstream has not answered the SYN.
    pub connect: Duration,
    /// Flows still open this long after drain began are reset.
    pub drain: Duration,
    /// One direction has ended and the other is silent.
    pub half_closed: Duration,
    /// No byte in either direction; zero for never.
    pub idle: Duration,
}
