// SPDX-License-Identifier: Apache-2.0
//! The `takeover` key of a config.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::claims::{self, Claim};
use super::registry::{Registry, RegistryKind, Tree, registries, service_name};
use super::service;
use crate::addr::canonical;
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
    /// A registry for applications that know nothing of weir; `None` if there is none.
    pub facade: Option<Facade>,
    /// Where calls to this host's provider arrive; the registry holds its port.
    pub inbound: SocketAddr,
    /// How endpoints of services are chosen.
    pub manner: Manner,
    /// Where applications send their calls, all services together; on loopback.
    pub outbound: SocketAddr,
    /// After a registry has forgotten this host, so long calls still arrive and are served.
    pub propagation: Duration,
    /// When a registry is not believed at once; `None` if it always is.
    pub protect: Option<Protection>,
    /// At least one; the first that knows an address decides about its weight.
    pub registries: Vec<Registry>,
    /// Wanted from the start.
    pub services: Vec<Wanted>,
    /// A directory for what must outlive this weir; `None` if nothing has to.
    pub state: Option<PathBuf>,
}

/// Where weir is a ZooKeeper to the applications of this host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Facade {
    /// Its address; on loopback.
    pub listen: SocketAddr,
    /// The registry behind it, by its name.
    pub registry: String,
    /// Where that is, and how it is written.
    pub tree: Tree,
}

/// How long a registry is not believed that says nobody is there, or hardly anybody.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Protection {
    /// A large drop is believed once it has lasted so long.
    pub drop_for: Duration,
    /// What is large: more than so much of a list, in one piece.
    pub drop_percent: usize,
    /// An empty list is believed once it has lasted so long and nobody answers.
    pub empty_for: Duration,
}

impl Takeover {
    /// How `service` is protected.
    #[must_use]
    pub fn protection(&self, service: &str) -> Option<&Protection> {
        let mut wanted = self.services.iter();
        let is_off = wanted.any(|wanted| wanted.name == service && !wanted.is_protected);
        self.protect.as_ref().filter(|_| !is_off)
    }
}

/// A service that is wanted from the start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// Where nobody is: a captured connection that was dialled there is for this service.
    pub dialled_at: Option<SocketAddr>,
    /// Whether `protect` is for it, too.
    pub is_protected: bool,
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
        let addr = claims::address(&mut section, key, mistakes).unwrap_or(default);
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
    let protect = protection(&mut section, mistakes);
    let state = section.parsed::<PathBuf>("state", "a path", mistakes);
    let state = state.map(|state| directory.unwrap_or(Path::new("")).join(state));
    let facade = section.take("facade");
    let registries = registries(&mut section, directory, mistakes);
    let facade = facade.and_then(|node| facade_of(node, &registries, claims, mistakes));
    let services = wanted(&mut section, claims, mistakes);
    section.finish(mistakes);
    Takeover {
        advertise,
        api,
        app_port,
        facade,
        inbound,
        manner,
        outbound,
        propagation,
        protect,
        registries,
        services,
        state,
    }
}

fn facade_of(
    node: Node,
    registries: &[Registry],
    claims: &mut Vec<Claim>,
    mistakes: &mut Mistakes,
) -> Option<Facade> {
    let (place, path) = (node.place, "takeover.facade");
    let mut section = Section::open(Some(node), path, mistakes);
    let listen = claims::address(&mut section, "listen", mistakes).unwrap_or(FACADE);
    let name = section.parsed::<String>("registry", "the name of a registry", mistakes);
    section.finish(mistakes);
    claims.push(Claim::new(path, place, listen));
    if !listen.ip().is_loopback() {
        mistakes.add(place, path, format!("`{listen}`: must be a loopback address"));
    }
    let is_it = |one: &&Registry| name.as_ref().is_none_or(|name| *name == one.name);
    let tree = |one: &Registry| match &one.kind {
        RegistryKind::Zookeeper(tree) => Some((one.name.clone(), tree.clone())),
        _ => None,
    };
    let mut found: Vec<(String, Tree)> = registries.iter().filter(is_it).filter_map(tree).collect();
    match (found.len(), found.pop()) {
        (1, Some((registry, Tree { tls: Some(_), .. }))) => {
            let text = "has `tls`, which is not spoken here: it must be another registry";
            mistakes.add(place, path, format!("{registry} {text}"));
            None
        }
        (1, Some((registry, tree))) => Some(Facade { listen, registry, tree }),
        _ => {
            let text = "must say which registry of kind zookeeper it stands for (`registry: NAME`)";
            mistakes.add(place, path, text);
            None
        }
    }
}

/// `off`, or a map of what to do.
fn protection(section: &mut Section, mistakes: &mut Mistakes) -> Option<Protection> {
    let node = section.take("protect");
    if node.as_ref().is_some_and(|node| node.text() == Some("off")) {
        return None;
    }
    let mut section = Section::open(node, &section.path("protect"), mistakes);
    let mut number = |key, range, usual| section.number(key, range, mistakes).unwrap_or(usual);
    let empty = number("empty_ms", 0..=PROTECT_MS_MAX, EMPTY_MS);
    let drop = number("drop_ms", 0..=PROTECT_MS_MAX, DROP_MS);
    let percent = number("drop_percent", 1..=100, DROP_PERCENT);
    section.finish(mistakes);
    Some(Protection {
        drop_for: Duration::from_millis(drop),
        drop_percent: usize::try_from(percent).unwrap_or(100),
        empty_for: Duration::from_millis(empty),
    })
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
        let is_protected = section.word("protect", &SWITCH, mistakes).unwrap_or(true);
        let listen = claims::address(&mut section, "listen", mistakes);
        let dialled_at = claims::address(&mut section, "virtual", mistakes).map(canonical);
        if let Some(addr) = dialled_at.filter(|addr| addr.ip().is_unspecified()) {
            mistakes.add(place, &path, format!("`{addr}`: nobody dials that: say one address"));
        }
        if dialled_at.is_some() && found.iter().any(|other| other.dialled_at == dialled_at) {
            mistakes.add(place, &path, "another service has this `virtual` address");
        }
        section.finish(mistakes);
        let Some(name) = name else { continue };
        if found.iter().any(|other| other.name == name) {
            mistakes.add(place, &path, format!("the service {name} is there twice"));
        }
        claims.extend(listen.map(|listen| Claim::new(&path, place, listen)));
        found.push(Wanted { dialled_at, is_protected, listen, name });
    }
    found
}

/// What the SDKs of SOFA expect unless they are told otherwise.
const API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 13_330);
const APP_PORT: u16 = 12_200;
/// Beside ZooKeeper's own port.
const FACADE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 12_181);
const INBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 12_201);
/// The SDKs of SOFA dial this port whatever they are told.
const OUTBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 12_220);
const SWITCH: [(&str, bool); 2] = [("off", false), ("on", true)];
/// A provider that restarts is back sooner, and so is a registry.
const EMPTY_MS: u64 = 30_000;
const DROP_MS: u64 = 10_000;
const DROP_PERCENT: u64 = 70;
const PROTECT_MS_MAX: u64 = 3_600_000;
/// What consumers need to hear of it, and then some.
const PROPAGATION_MS: u64 = 5_000;
const PROPAGATION_MS_MAX: u64 = 60_000;
