// SPDX-License-Identifier: Apache-2.0
//! What the admin listener says, as JSON: stable names, for programs.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::takeover::Source;
use crate::worker::FlowRow;

/// The answer to `/status`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Status {
    /// Workers with every accept armed.
    pub accepting: usize,
    /// Stopped accepting; flows are ending.
    pub draining: bool,
    /// Open flows.
    pub flows: u64,
    /// Of the running weir.
    pub pid: u32,
    /// In force.
    pub profile: String,
    /// Every worker accepts and capture is in place.
    pub ready: bool,
    /// Of the running weir.
    pub version: String,
    /// How many there are.
    pub workers: usize,
}

/// An endpoint, as `/endpoints` lists it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct EndpointView {
    /// What is dialled.
    pub address: String,
    /// Workers that do not use it just now, because they could not reach it.
    pub ejected_by: usize,
    /// Open, of all workers.
    pub flows: u64,
    /// The registry it is from; empty if it stands in the config.
    #[serde(default)]
    pub registry: String,
    /// Whose endpoint it is.
    pub service: String,
    /// `in_use`, `ejected` (by a worker), `unhealthy` (by active checks) or `drained` (weight 0).
    pub state: String,
    /// Its share of flows.
    pub weight: u16,
    /// Where it stands; empty if nobody said.
    pub zone: String,
}

/// A service, as `/services` lists it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ServiceView {
    /// How an endpoint is chosen.
    pub balance: String,
    /// How many it has.
    pub endpoints: usize,
    /// Open, of all endpoints.
    pub flows: u64,
    /// Endpoints that every worker uses.
    pub in_use: usize,
    /// Unique.
    pub name: String,
    /// Registries that have said something of it.
    #[serde(default)]
    pub sources: Vec<SourceView>,
}

/// What a registry has to do with a service.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct SourceView {
    /// Since it said so; absent if it was in an earlier life of weir.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// How many endpoints it is believed to know.
    pub endpoints: usize,
    /// Its name.
    pub registry: String,
    /// Its own count of changes.
    pub revision: u64,
    /// `heard`, `kept` (on disk, from an earlier life), `doubted_empty` or `doubted_drop` (it says
    /// otherwise now and is not believed).
    pub state: String,
}

impl From<Source> for SourceView {
    fn from(source: Source) -> SourceView {
        let state = match (source.doubt, source.age) {
            (Some(reason), _) => format!("doubted_{}", reason.word()),
            (None, Some(_)) => "heard".to_owned(),
            (None, None) => "kept".to_owned(),
        };
        SourceView {
            age_ms: source.age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            endpoints: source.providers,
            registry: source.registry,
            revision: source.revision,
            state,
        }
    }
}

/// A flow, as `/flows` lists it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct FlowView {
    /// Since accept.
    pub age_ms: u128,
    /// Handed to the sockets since accept.
    pub bytes: Bytes,
    /// How it came: `tproxy`, `redirect`, `connect` or `none`.
    pub capture: String,
    /// `inbound`, `outbound` or `forward`.
    pub direction: String,
    /// The peer that dialled; absent where it is not known.
    pub downstream: Option<String>,
    /// Unique while the process lives.
    pub id: u64,
    /// Since a byte last moved.
    pub idle_ms: u128,
    /// Where the application meant to go; absent for a plain listener.
    pub original_dst: Option<String>,
    /// The path of each direction.
    pub relay: Relays,
    /// What was dialled.
    pub upstream: String,
    /// Whose it is; absent for a workload without a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
}

/// Bytes of each direction.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Bytes {
    /// Handed to the downstream socket.
    pub to_downstream: u64,
    /// Handed to the upstream socket.
    pub to_upstream: u64,
}

/// The relay of each direction.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Relays {
    /// How bytes reach the downstream.
    pub to_downstream: String,
    /// How bytes reach the upstream.
    pub to_upstream: String,
}

impl From<FlowRow> for FlowView {
    fn from(row: FlowRow) -> FlowView {
        let text = |addr: SocketAddr| addr.to_string();
        FlowView {
            age_ms: row.age.as_millis(),
            bytes: Bytes {
                to_downstream: row.bytes_to_downstream,
                to_upstream: row.bytes_to_upstream,
            },
            capture: row.origin.capture().to_owned(),
            direction: row.origin.direction().to_owned(),
            downstream: row.downstream.map(text),
            id: row.id,
            idle_ms: row.idle.as_millis(),
            original_dst: row.original_dst.map(text),
            relay: Relays {
                to_downstream: row.relay_to_downstream.label().to_owned(),
                to_upstream: row.relay_to_upstream.label().to_owned(),
            },
            upstream: text(row.upstream),
            workload: Some(row.workload.as_ref())
                .filter(|name| !name.is_empty())
                .map(str::to_owned),
        }
    }
}
