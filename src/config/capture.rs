// SPDX-License-Identifier: Apache-2.0
//! The `inbound` and `outbound` keys of a config.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};

use ipnet::IpNet;

use super::claims::{Claim, address};
use super::workloads::Scope;
use super::{
    Destinations, Inbound, InboundCapture, Outbound, OutboundCapture, Ports, ProxyProtocol, Reach,
    SourceAddress, Workload,
};
use crate::addr::join_ports;
use crate::yaml::{Kind, Mistakes, Node, Section, parsed};

pub(super) fn inbound(
    node: Node,
    scope: &Scope,
    claims: &mut Vec<Claim>,
    mistakes: &mut Mistakes,
) -> Option<Inbound> {
    let place = node.place;
    let mut section = Section::open(Some(node), &scope.key("inbound"), mistakes);
    let inbound = Inbound {
        capture: section.word("capture", &INBOUND, mistakes).unwrap_or(InboundCapture::Tproxy),
        destinations: section.word("destinations", &REACH, mistakes).unwrap_or(Reach::Local),
        listen: address(&mut section, "listen", mistakes).unwrap_or(INBOUND_LISTEN),
        ports: ports(section.section("ports", mistakes), mistakes),
        proxy_protocol: section
            .word("proxy_protocol", &PROXY_PROTOCOL, mistakes)
            .unwrap_or(ProxyProtocol::Off),
        source: section.word("source", &SOURCE, mistakes).unwrap_or(SourceAddress::Keep),
        source_ports: source_ports(&mut section, mistakes).unwrap_or(SOURCE_PORTS),
    };
    if inbound.capture == InboundCapture::Redirect && !inbound.listen.ip().is_unspecified() {
        let text = format!(
            "`{}`: redirect leads to the address of whatever interface a packet came through: \
             listen on [::] or 0.0.0.0",
            inbound.listen
        );
        mistakes.add(place, &section.path("listen"), text);
    }
    if inbound.capture == InboundCapture::Redirect && inbound.destinations == Reach::Any {
        mistakes.add(place, &section.path("destinations"), "any needs capture tproxy");
    }
    let claim = Claim::new(&scope.key("inbound"), place, inbound.listen);
    claims.push(claim.within(&scope.namespace));
    section.finish(mistakes);
    Some(inbound)
}

pub(super) fn outbound(
    node: Node,
    scope: &Scope,
    claims: &mut Vec<Claim>,
    mistakes: &mut Mistakes,
) -> Option<Outbound> {
    let place = node.place;
    let mut section = Section::open(Some(node), &scope.key("outbound"), mistakes);
    let capture = section.word("capture", &OUTBOUND, mistakes).unwrap_or(OutboundCapture::Connect);
    let listen = address(&mut section, "listen", mistakes).unwrap_or(OUTBOUND_LISTEN);
    let whose = section.section("workload", mistakes);
    let workload = scope.whose(workload(whose, mistakes), capture, (&section, mistakes));
    let include = destinations(section.section("include", mistakes), true, mistakes);
    let exclude = destinations(section.section("exclude", mistakes), false, mistakes);
    if !listen.ip().is_loopback() {
        let text = format!("`{listen}`: must be a loopback address, as 127.0.0.1:15001");
        mistakes.add(place, &section.path("listen"), text);
    }
    match (capture, &workload) {
        (OutboundCapture::Connect, Some(Workload::Uid(_))) => {
            let text = "capture connect needs a cgroup, not a uid";
            mistakes.add(place, &section.path("workload"), text);
        }
        (OutboundCapture::Connect, None) => {
            let text = "capture connect needs one: `workload: { cgroup: /path }`, relative to the \
                        cgroup v2 mount";
            mistakes.add(place, &section.path("workload"), text);
        }
        (OutboundCapture::Redirect | OutboundCapture::Tproxy, Some(Workload::Cgroups(paths)))
            if paths.iter().any(|path| is_root(path)) =>
        {
            let text = "the cgroup / is everybody, and rules cannot name it: leave `workload` out \
                        for everything in the network namespace but weir's own traffic";
            mistakes.add(place, &section.path("workload"), text);
        }
        _ => {}
    }
    for ip in LOOPBACK {
        let claim = Claim::new(&scope.key("outbound"), place, SocketAddr::new(ip, listen.port()));
        claims.push(claim.within(&scope.namespace));
    }
    section.finish(mistakes);
    Some(Outbound { capture, exclude, include, listen, workload })
}

/// The mount itself, however it is written.
fn is_root(cgroup: &Path) -> bool {
    let mut names = cgroup.components();
    !names.any(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
}

/// A range that is worth walking; by default below the usual ephemeral ports.
fn source_ports(section: &mut Section, mistakes: &mut Mistakes) -> Option<RangeInclusive<u16>> {
    let path = section.path("source_ports");
    let node = section.take("source_ports")?;
    let range = port_range(&node, &path, mistakes)?;
    if range.len() < SOURCE_PORTS_MIN {
        let text = format!("{}must hold at least {SOURCE_PORTS_MIN} ports", node.said());
        mistakes.add(node.place, &path, text);
    }
    Some(range)
}

fn workload(mut section: Section, mistakes: &mut Mistakes) -> Option<Workload> {
    let place = section.place();
    let path = section.path("cgroup").replace(".cgroup", "");
    let cgroups = cgroups(&mut section, mistakes);
    let uid = section.number("uid", 0..=u32::MAX - 1, mistakes);
    section.finish(mistakes);
    match (cgroups, uid) {
        (Some(_), Some(_)) => {
            mistakes.add(place, &path, "must be a cgroup or a uid, not both");
            None
        }
        (Some(paths), None) => Some(Workload::Cgroups(paths)),
        (None, uid) => uid.map(Workload::Uid),
    }
}

/// One path, or a list of different ones.
fn cgroups(section: &mut Section, mistakes: &mut Mistakes) -> Option<Vec<PathBuf>> {
    let (path, place) = (section.path("cgroup"), section.place());
    let nodes = section.list("cgroup")?;
    let mut paths: Vec<PathBuf> = Vec::with_capacity(nodes.len());
    for node in &nodes {
        let Some(cgroup) = parsed::<PathBuf>(node, &path, "a path", mistakes) else { continue };
        if paths.contains(&cgroup) {
            mistakes.add(node.place, &path, format!("{}is named twice", node.said()));
        }
        paths.push(cgroup);
    }
    if nodes.is_empty() {
        mistakes.add(place, &path, "must name at least one cgroup");
    }
    Some(paths)
}

fn destinations(mut section: Section, all: bool, mistakes: &mut Mistakes) -> Destinations {
    let path = section.path("cidrs");
    let cidrs = match section.list("cidrs") {
        None if all => EVERYWHERE.iter().filter_map(|text| text.parse().ok()).collect(),
        None => Vec::new(),
        Some(nodes) => nodes.iter().filter_map(|node| network(node, &path, mistakes)).collect(),
    };
    let ports = port_list(&mut section, "ports", all, mistakes);
    section.finish(mistakes);
    Destinations { cidrs, ports }
}

/// A network, or a single address.
fn network(node: &Node, path: &str, mistakes: &mut Mistakes) -> Option<IpNet> {
    if let Some(ip) = node.text().and_then(|text| text.parse().ok()) {
        return Some(IpNet::from(std::net::IpAddr::to_canonical(&ip)));
    }
    parsed::<IpNet>(node, path, "a network (`10.0.0.0/8`, `fd00::/8`) or an address", mistakes)
        .map(|network| network.trunc())
}

fn ports(mut section: Section, mistakes: &mut Mistakes) -> Ports {
    let include = port_list(&mut section, "include", true, mistakes);
    let exclude = port_list(&mut section, "exclude", false, mistakes);
    section.finish(mistakes);
    Ports { exclude, include }
}

/// `all`, a port, a range, or a list of them; `all` decides what nothing means.
fn port_list(
    section: &mut Section,
    key: &'static str,
    all: bool,
    mistakes: &mut Mistakes,
) -> Vec<RangeInclusive<u16>> {
    let path = section.path(key);
    let place = section.place();
    let Some(nodes) = section.list(key) else {
        return if all { vec![ALL_PORTS] } else { Vec::new() };
    };
    if all && nodes.is_empty() {
        mistakes.add(place, &path, "is empty, so nothing would be taken: leave it out for all");
    }
    let ranges = nodes.iter().filter_map(|node| port_range(node, &path, mistakes)).collect();
    join_ports(ranges)
}

fn port_range(node: &Node, path: &str, mistakes: &mut Mistakes) -> Option<RangeInclusive<u16>> {
    let number = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
    let range = match (&node.kind, node.text()) {
        (Kind::Scalar(_), Some("all")) => Some(ALL_PORTS),
        (Kind::Scalar(_), Some(text)) => {
            let (start, end) = text.split_once('-').unwrap_or((text, text));
            number(start).zip(number(end)).map(|(start, end)| start..=end)
        }
        _ => None,
    };
    let range = range.filter(|range| !range.is_empty());
    if range.is_none() {
        let text = format!("{}must be all, a port (80) or a range (\"8000-8100\")", node.said());
        mistakes.add(node.place, path, text);
    }
    range
}

const ALL_PORTS: RangeInclusive<u16> = 1..=65_535;
const EVERYWHERE: [&str; 2] = ["0.0.0.0/0", "::/0"];
const INBOUND: [(&str, InboundCapture); 2] =
    [("redirect", InboundCapture::Redirect), ("tproxy", InboundCapture::Tproxy)];
const INBOUND_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED), 15_006);
/// Where weir waits for captured connects.
pub(super) const LOOPBACK: [std::net::IpAddr; 2] = [
    std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
    std::net::IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
];
const OUTBOUND: [(&str, OutboundCapture); 3] = [
    ("connect", OutboundCapture::Connect),
    ("redirect", OutboundCapture::Redirect),
    ("tproxy", OutboundCapture::Tproxy),
];
const OUTBOUND_LISTEN: SocketAddr = SocketAddr::new(LOOPBACK[0], 15_001);
const PROXY_PROTOCOL: [(&str, ProxyProtocol); 3] =
    [("off", ProxyProtocol::Off), ("v1", ProxyProtocol::V1), ("v2", ProxyProtocol::V2)];
const REACH: [(&str, Reach); 2] = [("any", Reach::Any), ("local", Reach::Local)];
const SOURCE: [(&str, SourceAddress); 2] =
    [("keep", SourceAddress::Keep), ("own", SourceAddress::Own)];
/// Below the ephemeral range of Linux (32768 to 60999), above what services usually listen on.
const SOURCE_PORTS: RangeInclusive<u16> = 10_240..=32_767;
/// Each worker has its own part of them.
const SOURCE_PORTS_MIN: usize = 64;
