// SPDX-License-Identifier: Apache-2.0
//! The `takeover` key of a config, and the file of a `file` registry.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use super::claims::{ADDRESS, Claim};
use super::service;
use crate::service::{Endpoint, Manner};
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
    /// At least one; the first that knows an address decides about its weight.
    pub registries: Vec<Registry>,
    /// Wanted from the start.
    pub services: Vec<Wanted>,
}

/// Where services are kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Registry {
    /// Which one.
    pub kind: RegistryKind,
    /// Unique; in logs and tables.
    pub name: String,
}

/// A kind of registry, with what it needs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RegistryKind {
    /// A YAML file, looked at again whenever it changes. Read only.
    File(PathBuf),
    /// In the config itself; what local applications publish is added while weir runs.
    Static(Vec<Named>),
}

/// A service that is wanted from the start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// An address of its own: whatever comes there is for this service, and nothing is read.
    pub listen: Option<SocketAddr>,
    /// As its registry calls it.
    pub name: String,
}

/// A service as a static registry or a file holds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Named {
    /// Where it lives.
    pub endpoints: Vec<Endpoint>,
    /// As its registry calls it.
    pub name: String,
    /// What its consumers are told, as `v=4.0&p=1`.
    pub parameters: String,
}

/// The services of a registry's file.
///
/// # Errors
///
/// Every mistake in the text.
pub fn registry_file(file: &str, text: &str) -> Result<Vec<Named>, Mistakes> {
    Section::document(file, text, named)
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
    let registries = registries(&mut section, directory, mistakes);
    let services = wanted(&mut section, claims, mistakes);
    section.finish(mistakes);
    Takeover { advertise, api, app_port, inbound, manner, outbound, registries, services }
}

/// What a registry may hold: never loopback, a wildcard, or an address of one link only.
fn can_be_reached(ip: IpAddr) -> bool {
    let is_link_local = match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(ip.is_unspecified() || ip.to_canonical().is_loopback() || is_link_local || ip.is_multicast())
}

fn registries(
    section: &mut Section,
    directory: Option<&Path>,
    mistakes: &mut Mistakes,
) -> Vec<Registry> {
    let items = section.list("registries").unwrap_or_default();
    let mut names = BTreeSet::new();
    let mut registries = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let (place, path) = (item.place, format!("takeover.registries[{index}]"));
        let mut section = Section::open(Some(item), &path, mistakes);
        let name = section.parsed::<String>("name", "a word", mistakes);
        let name = name.unwrap_or_else(|| format!("registry-{index}"));
        let kind = section.word("kind", &KINDS, mistakes).unwrap_or(Kind::Static);
        let file = section.parsed::<PathBuf>("path", "a path", mistakes);
        let services = named(&mut section, mistakes);
        section.finish(mistakes);
        if !names.insert(name.clone()) {
            mistakes.add(place, &path, format!("the name {name} is taken"));
        }
        let kind = match (kind, file) {
            (Kind::File, Some(file)) => {
                RegistryKind::File(directory.unwrap_or(Path::new("")).join(file))
            }
            (Kind::File, None) => {
                mistakes.add(place, &path, "a registry of kind file needs a `path`");
                continue;
            }
            (Kind::Static, None) => RegistryKind::Static(services),
            (Kind::Static, Some(_)) => {
                mistakes.add(place, &path, "only a registry of kind file has a `path`");
                continue;
            }
        };
        registries.push(Registry { kind, name });
    }
    if registries.is_empty() && mistakes.is_empty() {
        let kind = RegistryKind::Static(Vec::new());
        registries.push(Registry { kind, name: "main".to_owned() });
    }
    registries
}

fn named(section: &mut Section, mistakes: &mut Mistakes) -> Vec<Named> {
    let path = section.path("services");
    let items = section.list("services").unwrap_or_default();
    let mut found: Vec<Named> = Vec::with_capacity(items.len());
    for item in items {
        let place = item.place;
        let mut section = Section::open(Some(item), &path, mistakes);
        let name = service_name(&mut section, mistakes);
        let parameters = section.parsed::<String>("parameters", "text as `v=4.0&p=1`", mistakes);
        let endpoints = service::endpoints(&mut section, mistakes).unwrap_or_default();
        section.finish(mistakes);
        let Some(name) = name else { continue };
        if found.iter().any(|other| other.name == name) {
            mistakes.add(place, &path, format!("the service {name} is there twice"));
        }
        found.push(Named { endpoints, name, parameters: parameters.unwrap_or_default() });
    }
    found
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

fn service_name(section: &mut Section, mistakes: &mut Mistakes) -> Option<String> {
    let (place, path, is_there) = (section.place(), section.path("name"), section.has("name"));
    let name = section.parsed::<String>("name", "a name", mistakes);
    let is_right = name.as_deref().is_some_and(is_service_name);
    if !is_there || (name.is_some() && !is_right) {
        mistakes.add(place, &path, "must be a name of at most 512 letters, without `/` and spaces");
    }
    name.filter(|_| is_right)
}

/// A name that can stand in a registry's path, in a table and in a log.
#[must_use]
pub fn is_service_name(name: &str) -> bool {
    let is_letter = |letter: char| !letter.is_control() && !letter.is_whitespace() && letter != '/';
    !name.is_empty() && name.len() <= 512 && name.chars().all(is_letter) && name != ".."
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    Static,
}

const KINDS: [(&str, Kind); 2] = [("file", Kind::File), ("static", Kind::Static)];
/// What the SDKs of SOFA expect unless they are told otherwise.
const API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 13_330);
const APP_PORT: u16 = 12_200;
const INBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 12_201);
/// The SDKs of SOFA dial this port whatever they are told.
const OUTBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 12_220);
