// SPDX-License-Identifier: Apache-2.0
//! What to take, for one network namespace.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use crate::bpf::HookPlan;
use crate::sys::cgroup;

/// What to take.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Plan {
    /// What would be taken is refused when we are gone.
    pub closed: bool,
    /// Traffic to the workload: what is taken, and what leaves.
    pub inbound: Vec<Inbound>,
    /// Traffic from workloads, each in its own way; what leaves comes last.
    pub outbound: Vec<Outbound>,
    /// Ports of ours: never taken.
    pub own_ports: Vec<u16>,
}

/// Traffic to the workload.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Inbound {
    /// Also destinations that are not of this host, which it would forward (`Tproxy`).
    pub any_destination: bool,
    /// Left alone; wins over `include`.
    pub exclude: Vec<RangeInclusive<u16>>,
    /// Taken.
    pub include: Vec<RangeInclusive<u16>>,
    /// The workload sees the client's address, so its replies must be led back to us.
    pub keep_source: bool,
    /// Nothing more is taken; what was taken goes on.
    pub leaves: bool,
    /// Where a listener waits; under `Tproxy` a transparent one.
    pub listen: SocketAddr,
    /// By which means.
    pub way: Way,
}

/// Traffic from a workload.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outbound {
    /// Its connects, by the eBPF hook.
    Connect(HookPlan),
    /// Its packets, by nft.
    Netfilter(Netfilter),
}

/// Traffic from a workload, taken by nft. Destinations of this host are never taken.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Netfilter {
    /// Destinations to leave alone; wins over `include`.
    pub exclude: Vec<IpNet>,
    /// Destination ports to leave alone.
    pub exclude_ports: Vec<RangeInclusive<u16>>,
    /// Flows that may be open at a time: room for as many is made where they must be remembered.
    pub flows_max: u32,
    /// How long a flow of which one direction has ended may be silent.
    pub half_closed: Duration,
    /// Destinations to take.
    pub include: Vec<IpNet>,
    /// Destination ports to take.
    pub include_ports: Vec<RangeInclusive<u16>>,
    /// Nothing more is taken; what was taken goes on.
    pub leaves: bool,
    /// Where listeners wait, on 127.0.0.1 and ::1; under `Tproxy` transparent ones.
    pub port: u16,
    /// By which means.
    pub way: Way,
    /// Whose; `None` for everything in the namespace but our own traffic.
    pub workload: Option<Workload>,
}

/// How nft takes traffic.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// REDIRECT: the destination is rewritten and asked for at accept.
    Redirect,
    /// TPROXY: nothing is rewritten and nothing tracked.
    Tproxy,
}

/// Whose traffic.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Workload {
    /// Below these cgroups, given relative to the cgroup v2 mount.
    Cgroups(Vec<PathBuf>),
    /// Of this user id.
    Uid(u32),
}

impl Plan {
    /// The outbound parts that nft takes.
    pub(super) fn netfilter(&self) -> impl Iterator<Item = &Netfilter> {
        self.outbound.iter().filter_map(|outbound| match outbound {
            Outbound::Connect(_) => None,
            Outbound::Netfilter(netfilter) => Some(netfilter),
        })
    }

    /// The outbound parts that the connect hook takes.
    pub(super) fn hooks(&self) -> impl Iterator<Item = &HookPlan> {
        self.outbound.iter().filter_map(|outbound| match outbound {
            Outbound::Connect(hook) => Some(hook),
            Outbound::Netfilter(_) => None,
        })
    }

    /// The numbers of the cgroups that nft was told, in the plan's order.
    pub(super) fn cgroups(&self) -> Vec<Option<u64>> {
        let paths = self.netfilter().flat_map(|one| match &one.workload {
            Some(Workload::Cgroups(paths)) => paths.as_slice(),
            _ => &[],
        });
        paths.map(|path| cgroup::number(path)).collect()
    }

    pub(super) fn takes_any_destination(&self) -> bool {
        self.inbound.iter().any(|inbound| inbound.any_destination)
    }

    pub(super) fn keeps_source(&self) -> bool {
        self.inbound.iter().any(|inbound| inbound.keep_source)
    }

    /// nft rewrites a destination somewhere, which needs connection tracking.
    #[must_use]
    pub fn redirects(&self) -> bool {
        self.ways().any(|way| way == Way::Redirect)
    }

    /// Something is taken past connection tracking.
    pub(super) fn avoids_tracking(&self) -> bool {
        self.hooks().next().is_some() || self.ways().any(|way| way == Way::Tproxy)
    }

    fn ways(&self) -> impl Iterator<Item = Way> {
        let inbound = self.inbound.iter().map(|inbound| inbound.way);
        inbound.chain(self.netfilter().map(|one| one.way))
    }
}
