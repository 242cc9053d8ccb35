// SPDX-License-Identifier: Apache-2.0
//! How fast and how big: the checked profile that the rest of weir reads.
//!
//! `profile/read.rs` turns YAML into it. A `Profile` in hand is proof that every value is in
//! range and that the relations between values hold.

use std::collections::BTreeMap;
use std::time::Duration;

pub use sysctl::Wanted;
#[cfg(feature = "control")]
pub(crate) use sysctl::fields;

mod read;
mod sysctl;

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
    /// Sysctls this profile wants, by name; only `weir tune` reads them.
    pub sysctls: BTreeMap<String, Wanted>,
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

/// What one worker may hold at most (all but `backlog` are for the process; a worker gets its
/// share).
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
    /// Pipes at a time; a spliced direction that finds none left goes back to copy.
    pub pipes_max: u32,
    /// Flows that the kernel forwards at a time; more stay with copy.
    pub sockmap_flows_max: u32,
    /// Flows with a spliced direction at a time; more stay with copy.
    pub spliced_flows_max: u32,
}

/// The worker's io_uring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ring {
    /// Longest time a sleeping worker lets events gather before it wakes for them; zero wakes for
    /// the first.
    pub coalesce: Duration,
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
    /// Bytes a pipe may hold; a power of two, because pipes are made of so many pages.
    pub pipe_bytes: u32,
    /// Most buffers one direction may hold; its receive is paused above it.
    pub segments_max: u16,
    /// A flow in which as many small messages have come in turn may be given to the kernel; 0:
    /// `auto` gives none.
    pub sockmap_after_messages: u32,
    /// Bytes a peer may be behind what the kernel has forwarded to it.
    pub sockmap_credit_bytes: u32,
    /// How large those messages may be.
    pub sockmap_message_bytes_max: u32,
    /// A direction that has moved this many bytes may be spliced.
    pub splice_after_bytes: u64,
    /// How full its reads must be on average for that.
    pub splice_fullness_percent: u32,
    /// A spliced direction whose steps take less on average goes back to copy.
    pub splice_short_bytes: u32,
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
    /// An answer to a request of the shared outbound port that does not say how long it waits; zero
    /// for never.
    pub request: Duration,
}

impl Profile {
    /// The names of the shipped profiles.
    #[must_use]
    pub fn names() -> Vec<&'static str> {
        SHIPPED.iter().map(|(name, _)| *name).collect()
    }
}

/// What a key is worth that nobody sets; the shipped `balanced` says the same and why.
impl Default for Profile {
    fn default() -> Profile {
        Profile {
            buffers: Buffers {
                bulk_count: 64,
                bulk_bytes: 64 << 10,
                small_count: 2048,
                small_bytes: 16 << 10,
            },
            limits: Limits {
                backlog: 4096,
                connects_pending_max: 4096,
                flows_max: 9_000,
                flows_per_source_max: 0,
                pipes_max: 256,
                sockmap_flows_max: 9_000,
                spliced_flows_max: 1024,
            },
            name: "balanced".to_owned(),
            relay: Relay {
                bulk_after_bytes: 128 << 10,
                mode: RelayMode::Auto,
                pipe_bytes: 1 << 20,
                segments_max: 64,
                sockmap_after_messages: 0,
                sockmap_credit_bytes: 256 << 10,
                sockmap_message_bytes_max: 4096,
                splice_after_bytes: 1 << 20,
                splice_fullness_percent: 50,
                splice_short_bytes: 16 << 10,
                window_bytes: 256 << 10,
            },
            ring: Ring {
                coalesce: Duration::ZERO,
                completions: 8192,
                entries: 1024,
                spin: Duration::from_micros(20),
            },
            sockets: Sockets {
                busy_poll: Duration::ZERO,
                congestion: None,
                keepalive: Some(Keepalive {
                    idle: Duration::from_secs(60),
                    interval: Duration::from_secs(10),
                    probes: 6,
                }),
                nodelay: true,
                receive_buffer_bytes: 0,
                send_buffer_bytes: 0,
                user_timeout: Duration::ZERO,
            },
            summary: "for most nodes".to_owned(),
            sysctls: BTreeMap::from([("net.core.somaxconn".to_owned(), Wanted::AtLeast(4096))]),
            timeouts: Timeouts {
                connect: Duration::from_secs(5),
                drain: Duration::from_secs(30),
                half_closed: Duration::from_secs(55),
                idle: Duration::from_secs(3600),
                request: Duration::from_secs(60),
            },
        }
    }
}

impl RelayMode {
    /// The word for each mode.
    pub const WORDS: [(&'static str, RelayMode); 4] = [
        ("auto", RelayMode::Auto),
        ("copy", RelayMode::Copy),
        ("sockmap", RelayMode::Sockmap),
        ("splice", RelayMode::Splice),
    ];
}

/// The profiles in `tuning/`, as they ship.
const SHIPPED: [(&str, &str); 4] = [
    ("balanced", include_str!("../tuning/balanced.yaml")),
    ("latency", include_str!("../tuning/latency.yaml")),
    ("many-flows", include_str!("../tuning/many-flows.yaml")),
    ("throughput", include_str!("../tuning/throughput.yaml")),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_profile_reads_and_balanced_says_the_defaults() {
        for name in Profile::names() {
            assert_eq!(Profile::named(name).map(|profile| profile.name), Some(name.to_owned()));
        }
        assert_eq!(Profile::named("balanced"), Some(Profile::default()));
    }

    #[test]
    fn every_mistake_is_shown_at_its_place() {
        let text = "ring:\n  entires: 64\n  spin_us: fast\nrelay: { mode: spice }\nlimits: { flows_max: 0 }\n";
        let mistakes = Profile::parse("p.yaml", "p", text).unwrap_err().to_string();
        let heads: Vec<&str> = mistakes.lines().filter(|line| line.starts_with("p.yaml")).collect();
        assert_eq!(
            heads,
            [
                "p.yaml:2:3: ring.entires: unknown key; did you mean `entries`?",
                "p.yaml:3:12: ring.spin_us: `fast`: must be a number from 0 to 10000",
                "p.yaml:4:16: relay.mode: `spice`: must be auto, copy, sockmap or splice; did you mean `splice`?",
                "p.yaml:5:22: limits.flows_max: `0`: must be a number from 1 to 10000000",
            ]
        );
    }
}
