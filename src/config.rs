// SPDX-License-Identifier: Apache-2.0
//! What to capture and where to send it: the checked config that the rest of weir reads.
//!
//! `config/read.rs` turns YAML into it. A `Config` in hand is proof that nothing in it contradicts itself; whether the host can do it is preflight's
//! question.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use ipnet::IpNet;

use crate::profile::Profile;
use crate::service::{Endpoint, Manner};

mod capture;
mod claims;
mod read;
mod registry;
mod service;
mod takeover;
#[cfg(test)]
mod tests;
mod workloads;

#[cfg(feature = "control")]
pub(crate) use claims::overlap;
pub use registry::{
    Credentials, Identity, Layout, Named, Registry, RegistryKind, Scope, Sofa, Tls, Tree,
    is_service_name, registry_file,
};
pub use takeover::{Facade, Protection, Takeover, Wanted};

/// A config to start from, as YAML: both captures, all ports. `weir demo` runs it.
pub const DEFAULT: &str = include_str!("../deploy/weir.yaml");

/// The JSON Schema of a config, for editors.
pub const SCHEMA: &str = include_str!("../deploy/weir.schema.json");

/// Everything a running weir obeys.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where to ask a running weir.
    pub admin: Admin,
    /// Plain listeners with fixed endpoints.
    pub forward: Vec<Forward>,
    /// What happens when somebody else removes or changes rules of ours.
    pub on_change: OnChange,
    /// What captured traffic meets when weir is gone.
    pub on_exit: OnExit,
    /// How fast and how big.
    pub profile: Profile,
    /// Traffic that comes because the service registry says so.
    pub takeover: Option<Takeover>,
    /// How many workers, and where.
    pub workers: Workers,
    /// Whose traffic is captured. What stands at the top of the file comes first, without a name.
    pub workloads: Vec<Captured>,
}

/// A workload whose traffic is captured, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Captured {
    /// Capture of traffic to it.
    pub inbound: Option<Inbound>,
    /// Unique; in logs and tables. Empty for what stands at the top of the file.
    pub name: String,
    /// Where it lives: weir makes its sockets and rules there.
    pub namespace: Namespace,
    /// Capture of traffic from it.
    pub outbound: Option<Outbound>,
}

/// A network namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Namespace {
    /// The one weir is started in.
    Own,
    /// By its file, as in /run/netns.
    Path(PathBuf),
    /// That of a process.
    Process(u32),
}

impl Captured {
    /// In a network namespace other than the one weir is started in.
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        self.namespace != Namespace::Own
    }
}

/// Where to ask a running weir.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Admin {
    /// `/metrics`, `/healthz`, `/readyz`, `/flows`, `/config`; off unless asked for.
    pub http: Option<SocketAddr>,
    /// The Unix socket of the commands; none only for `weir forward`.
    pub socket: Option<PathBuf>,
}

/// A plain listener with fixed endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Forward {
    /// At least one.
    pub endpoints: Vec<Endpoint>,
    /// Where to listen.
    pub listen: SocketAddr,
    /// How an endpoint is chosen.
    pub manner: Manner,
    /// Unique; in logs and tables.
    pub name: String,
}

/// Capture of traffic to the workload.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Inbound {
    /// By which means.
    pub capture: InboundCapture,
    /// Which destinations are taken.
    pub destinations: Reach,
    /// The capture listener; `[::]` takes both families.
    pub listen: SocketAddr,
    /// Destination ports to take.
    pub ports: Ports,
    /// The header that tells the workload who the client is.
    pub proxy_protocol: ProxyProtocol,
    /// Whose address the workload sees.
    pub source: SourceAddress,
    /// Ports to dial the workload from under a client's address.
    pub source_ports: RangeInclusive<u16>,
}

/// Which destinations inbound capture takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reach {
    /// Also those that this host would forward: for a gateway or a node.
    Any,
    /// Addresses of this host.
    Local,
}

/// How inbound traffic is taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InboundCapture {
    /// nft REDIRECT.
    Redirect,
    /// nft TPROXY.
    Tproxy,
}

/// Capture of traffic from the workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Outbound {
    /// By which means.
    pub capture: OutboundCapture,
    /// Destinations to leave alone; wins over `include`.
    pub exclude: Destinations,
    /// Destinations to take.
    pub include: Destinations,
    /// The port weir listens on, on 127.0.0.1 and ::1.
    pub listen: SocketAddr,
    /// Whose traffic; `None` (not under `Connect`) means everything in the namespace.
    pub workload: Option<Workload>,
}

/// How outbound traffic is taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OutboundCapture {
    /// An eBPF hook on `connect()`.
    Connect,
    /// nft REDIRECT.
    Redirect,
    /// nft TPROXY over loopback.
    Tproxy,
}

/// Destinations by address and port.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Destinations {
    /// Networks of both families.
    pub cidrs: Vec<IpNet>,
    /// Sorted, disjoint.
    pub ports: Vec<RangeInclusive<u16>>,
}

/// Ports to take and to leave alone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ports {
    /// Wins over `include`; sorted, disjoint.
    pub exclude: Vec<RangeInclusive<u16>>,
    /// Sorted, disjoint; `1..=65535` for `all`.
    pub include: Vec<RangeInclusive<u16>>,
}

/// The header that tells the workload who the client is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProxyProtocol {
    /// None.
    Off,
    /// Text.
    V1,
    /// Binary.
    V2,
}

/// Whose address the workload sees.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SourceAddress {
    /// The client's.
    Keep,
    /// Ours.
    Own,
}

/// What happens when somebody else removes or changes rules of ours.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnChange {
    /// It is said, and weir is not ready until they are back.
    Alarm,
    /// They are put back.
    Repair,
}

/// What captured traffic meets when weir is gone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnExit {
    /// It is refused.
    Closed,
    /// It flows directly.
    Open,
}

/// Whose outbound traffic is captured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Workload {
    /// Below these cgroups, given relative to the cgroup v2 mount; at least one.
    Cgroups(Vec<PathBuf>),
    /// Of this user id.
    Uid(u32),
}

/// How many workers, and where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Workers {
    /// One on each CPU the process may use.
    Auto,
    /// So many, on the first CPUs the process may use.
    Count(NonZeroU16),
    /// One on each of these CPUs.
    Cpus(Vec<usize>),
}

impl Namespace {
    /// The file that leads to it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match self {
            Namespace::Own => "/proc/self/ns/net".into(),
            Namespace::Path(path) => path.clone(),
            Namespace::Process(pid) => format!("/proc/{pid}/ns/net").into(),
        }
    }
}
