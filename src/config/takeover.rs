// SPDX-License-Identifier: Apache-2.0
//! The `takeover` key of a config.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use super::claims::{ADDRESS, Claim};
use super::registry::{Registry, registries, service_name};
use super::service;
use crate::service::Manner;
use crate::yaml::{Mistakes, Node, Section};

/// Traffic that comes because the service registry says so.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Takeover {
    /// The address of this host that the registry gets; `None` if nothing is published.
    pub advertise: Option<IpAddr>,
    /// Where applications say what they provide and what they call; on loopback.
    pub api: SocketAddr,
    /// Where a provider listens that does not say so.
    pub app_port: u16,
    /// Where calls to this host's provider arrive; the registry holds its port.
    pub inbound: SocketAddr,
    /// How endpoints of services are chosen.
    pub manner: Manner,
    /// Where applications send their calls, all services together; on loopback.
    pub outbound: SocketAddr,
    /// After a registry has forgotten this host, so long calls still arrive and are served.
    pub propagation: Duration,
    /// At least one; the first that knows an address decides about its weight.
    pub registries: Vec<Registry>,
    /// Wanted from the start.
    pub services: Vec<Wanted>,
}

/// A service that is wanted from the start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// An address of its own: whatever comes there is for this service, and nothing is read.
    pub listen: Option<SocketAddr>,
    /// As its registry calls it.
    pub name: String,
}

pub(super) fn takeover(
    node: Node,
    directory: Option<&Path>,
    claims: &mut Vec<Claim>,
    mistakes: &mut Mistakes,
) -> Takeover {
    let place = node.place;
    let mut section = Section::open(Some(node), "takeover", mistakes);
    let mut address = |key, default| {
        let addr = section.parsed(key, ADDRESS, mistakes).unwrap_or(default);
        claims.push(Claim::new(&format!("takeover.{key}"), place, addr));
        addr
    };
    let api = address("api", API);
    let inbound = address("inbound", INBOUND);
    let outbound = address("outbound", OUTBOUND);
    for (path, addr) in [("takeover.api", api), ("takeover.outbound", outbound)] {
        if !addr.ip().is_loopback() {
            mistakes.add(place, path, format!("`{addr}`: must be a loopback address"));
        }
    }
    let advertise = section.parsed::<IpAddr>("advertise", "an IP address", mistakes);
    if let Some(ip) = advertise.filter(|ip| !can_be_reached(*ip)) {
        let text = format!("`{ip}`: no other host reaches it; say the address of this host");
        mistakes.add(place, "takeover.advertise", text);
    }
    let advertise = advertise.or(Some(inbound.ip()).filter(|ip| can_be_reached(*ip)));
    let app_port = section.number("app_port", 1..=u16::MAX, mistakes).unwrap_or(APP_PORT);
    if app_port == inbound.port() {
        mistakes.add(place, "takeover.app_port", "is the port of takeover.inbound: it would loop");
    }
    let manner = service::manner(&mut section, mistakes);
    let propagation = section.number("propagation_ms", 0..=PROPAGATION_MS_MAX, mistakes);
    let propagation = Duration::from_millis(propagation.unwrap_or(PROPAGATION_MS));
    let registries = registries(&mut section, directory, mistakes);
    let services = wanted(&mut section, claims, mistakes);
    section.finish(mistakes);
    Takeover {
        advertise,
        api,
        app_port,
        inbound,
        manner,
        outbound,
        propagation,
        registries,
        services,
    }
}

/// What a registry may hold: never loopback, a wildcard, or an address of one link only.
fn can_be_reached(ip: IpAddr) -> bool {
    let is_link_local = match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(ip.is_unspecified() || ip.to_canonical().is_loopback() || is_link_local || ip.is_multicast())
}

fn wanted(section: &mut Section, claims: &mut Vec<Claim>, mistakes: &mut Mistakes) -> Vec<Wanted> {
    let items = section.list("services").unwrap_or_default();
    let mut found: Vec<Wanted> = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let (place, path) = (item.place, format!("takeover.services[{index}]"));
        let mut section = Section::open(Some(item), &path, mistakes);
        let name = service_name(&mut section, mistakes);
        let listen = section.parsed::<SocketAddr>("listen", ADDRESS, mistakes);
        section.finish(mistakes);
        let Some(name) = name else { continue };
        if found.iter().any(|other| other.name == name) {
            mistakes.add(place, &path, format!("the service {name} is there twice"));
        }
        claims.extend(listen.map(|listen| Claim::new(&path, place, listen)));
        found.push(Wanted { listen, name });
    }
    found
}

/// What the SDKs of SOFA expect unless they are told otherwise.
const API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 13_330);
const APP_PORT: u16 = 12_200;
const INBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 12_201);
/// The SDKs of SOFA dial this port whatever they are told.
const OUTBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 12_220);
/// What consumers need to hear of it, and then some.
const PROPAGATION_MS: u64 = 5_000;
const PROPAGATION_MS_MAX: u64 = 60_000;
