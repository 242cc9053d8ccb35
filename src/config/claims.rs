// SPDX-License-Identifier: Apache-2.0
//! Addresses that a config claims: no two things may listen in one place.

use std::net::SocketAddr;

use super::Namespace;
use crate::addr::canonical;
use crate::yaml::{Mistakes, Node, Place, Section, parsed};

/// An address that something of ours shall listen on.
pub(super) struct Claim {
    addr: SocketAddr,
    namespace: Namespace,
    path: String,
    place: Place,
}

impl Claim {
    pub(super) fn new(path: &str, place: Place, addr: SocketAddr) -> Claim {
        Claim { addr, namespace: Namespace::Own, path: path.to_owned(), place }
    }

    /// In another network namespace, where addresses are others.
    pub(super) fn within(self, namespace: &Namespace) -> Claim {
        Claim { namespace: namespace.clone(), ..self }
    }
}

/// Every two claims that cannot both be had.
pub(super) fn overlaps(claims: &[Claim], mistakes: &mut Mistakes) {
    for (index, claim) in claims.iter().enumerate() {
        for other in claims.iter().take(index) {
            let same = other.namespace == claim.namespace;
            if same && other.path != claim.path && overlap(other.addr, claim.addr) {
                let text = format!("listens where {} does ({})", other.path, other.addr);
                mistakes.add(claim.place, &claim.path, text);
            }
        }
    }
}

/// An endpoint of a plain listener, and where it is named.
pub(super) struct Dial {
    pub(super) addr: SocketAddr,
    pub(super) path: String,
    pub(super) place: Place,
}

/// Every endpoint that is one of our own listeners, as far as a config can tell: which other addresses
/// are of this host is asked at the start.
pub(super) fn loops(claims: &[Claim], dials: &[Dial], mistakes: &mut Mistakes) {
    for Dial { addr, path, place } in dials {
        let is_reached = |claim: &&Claim| {
            let (ip, dst) = (claim.addr.ip(), canonical(*addr));
            claim.namespace == Namespace::Own
                && claim.addr.port() == dst.port()
                && (ip == dst.ip() || dst.ip().is_loopback() || dst.ip().is_unspecified())
        };
        if let Some(claim) = claims.iter().find(is_reached) {
            let text = format!("`{addr}`: is a port of this weir ({}): it would loop", claim.path);
            mistakes.add(*place, path, text);
        }
    }
}

/// The address under `key`: somewhere one can listen or dial, so never port 0.
pub(super) fn address(
    section: &mut Section,
    key: &'static str,
    mistakes: &mut Mistakes,
) -> Option<SocketAddr> {
    let path = section.path(key);
    address_of(&section.take(key)?, &path, mistakes)
}

/// As `address`, of a node.
pub(super) fn address_of(node: &Node, path: &str, mistakes: &mut Mistakes) -> Option<SocketAddr> {
    let addr = parsed::<SocketAddr>(node, path, ADDRESS, mistakes)?;
    if addr.port() == 0 {
        mistakes.add(node.place, path, format!("{}must have a port above 0", node.said()));
    }
    Some(addr)
}

/// Both cannot be bound: `[::]` takes IPv4 too.
pub(crate) fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let covers = |wide: SocketAddr, narrow: SocketAddr| {
        wide.ip().is_unspecified() && (wide.is_ipv6() || narrow.is_ipv4())
    };
    one.port() == other.port()
        && one.port() != 0
        && (one.ip() == other.ip() || covers(one, other) || covers(other, one))
}

/// What an address must look like, for messages.
pub(super) const ADDRESS: &str = "an address with port (`127.0.0.1:80` or `[::1]:80`)";
