// SPDX-License-Identifier: Apache-2.0
//! Named sets of endpoints, and how one of them is chosen.
//!
//! The control thread writes a `Directory`; what workers read is a `Table` made from it, which
//! never changes: a new one comes by mail, and the old one goes back to be freed. Each worker
//! chooses with a `Picker` of its own, which knows only what that worker has seen. Nothing here
//! waits, and choosing allocates nothing.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

pub use directory::Directory;
pub use pick::{Pick, Picker, Tally, Update};
pub use table::{Member, Service, Table};

mod directory;
mod order;
mod pick;
mod table;
#[cfg(test)]
mod tests;

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Balance {
    /// The same endpoint for the same client address, as long as it is there.
    ConsistentHash,
    /// The one with the fewest open flows of this worker, by weight.
    LeastFlows,
    /// Of two taken at random the one with fewer open flows, by weight.
    RandomTwo,
    /// One after the other; a weight is only on or off.
    RoundRobin,
    /// One after the other, each as often as its weight says.
    Weighted,
}

impl Balance {
    /// The words of a config.
    pub const WORDS: [(&str, Balance); 5] = [
        ("consistent_hash", Balance::ConsistentHash),
        ("least_flows", Balance::LeastFlows),
        ("random_two", Balance::RandomTwo),
        ("round_robin", Balance::RoundRobin),
        ("weighted", Balance::Weighted),
    ];

    /// The word of a config.
    #[must_use]
    pub fn word(self) -> &'static str {
        let found = Balance::WORDS.iter().find(|(_, balance)| *balance == self);
        found.map_or("", |(word, _)| word)
    }
}

/// An address a service lives at, as a config or a registry names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint {
    /// What is dialled.
    pub addr: SocketAddr,
    /// Since when it runs, where its registry says so: its slow start counts from here.
    pub started: Option<Instant>,
    /// Its share of flows, 100 being usual; 0 drains it.
    pub weight: u16,
    /// Where it stands; empty if nobody said.
    pub zone: Box<str>,
}

impl Endpoint {
    /// At `addr`, with the usual weight.
    #[must_use]
    pub fn new(addr: SocketAddr) -> Endpoint {
        Endpoint { addr, started: None, weight: Endpoint::WEIGHT, zone: "".into() }
    }

    /// What an endpoint weighs if nobody says.
    pub const WEIGHT: u16 = 100;
    /// The most one may weigh.
    pub const WEIGHT_MAX: u16 = 10_000;
}

/// What a service goes by, endpoints apart.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Manner {
    /// How one is chosen.
    pub balance: Balance,
    /// Whether active checks decide about its endpoints.
    pub check: Option<Check>,
    /// An endpoint that joins or comes back takes this long to get its full share; 0 for at once.
    pub slow_start: Duration,
    /// Endpoints of this zone come first; empty for no preference.
    pub zone: Box<str>,
}

impl Manner {
    /// As a service goes that asks for nothing but `balance`.
    #[must_use]
    pub fn of(balance: Balance) -> Manner {
        Manner { balance, check: None, slow_start: Duration::ZERO, zone: "".into() }
    }
}

/// Looking at endpoints although no flow goes there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Check {
    /// How often.
    pub interval: Duration,
    /// What counts as in order.
    pub kind: CheckKind,
}

/// What an endpoint must do to be in order; the later ones ask for more.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum CheckKind {
    /// It accepts connections.
    Tcp,
    /// It answers a heartbeat of SOFABolt.
    Bolt,
    /// It answers a heartbeat of Dubbo.
    Dubbo,
}

impl CheckKind {
    /// The words of a config.
    pub const WORDS: [(&str, CheckKind); 3] =
        [("bolt", CheckKind::Bolt), ("dubbo", CheckKind::Dubbo), ("tcp", CheckKind::Tcp)];

    /// The word of a config.
    #[must_use]
    pub fn word(self) -> &'static str {
        let found = CheckKind::WORDS.iter().find(|(_, kind)| *kind == self);
        found.map_or("", |(word, _)| word)
    }
}

/// A service, for as long as the directory knows its name.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServiceId {
    /// Which life of the index: who still holds the id of a service that went finds nobody.
    generation: u32,
    index: u32,
}

/// An endpoint of one service, for as long as it stays in it. Other services may have the same
/// address: they have other ids for it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct EndpointId {
    /// Which life of the slot: a flow of an endpoint that went finds nobody.
    generation: u32,
    slot: u32,
}

impl EndpointId {
    /// For flows that have no endpoint: nobody is found under it.
    pub const NONE: EndpointId = EndpointId { generation: 0, slot: u32::MAX };
}

/// The hash of a client's address, for `Balance::ConsistentHash`.
#[must_use]
pub fn key_of(ip: IpAddr) -> u64 {
    match ip.to_canonical() {
        IpAddr::V4(ip) => order::mix(u64::from(ip.to_bits())),
        IpAddr::V6(ip) => {
            ip.segments().into_iter().fold(0, |hash, part| order::mix(hash ^ u64::from(part)))
        }
    }
}
