// SPDX-License-Identifier: Apache-2.0
//! Addresses that a config claims: no two things may listen in one place.

use std::net::SocketAddr;

use super::Namespace;
use crate::yaml::{Mistakes, Place};

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

/// Both cannot be bound: `[::]` takes IPv4 too.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let covers = |wide: SocketAddr, narrow: SocketAddr| {
        wide.ip().is_unspecified() && (wide.is_ipv6() || narrow.is_ipv4())
    };
    one.port() == other.port()
        && one.port() != 0
        && (one.ip() == other.ip() || covers(one, other) || covers(other, one))
}

/// What an address must look like, for messages.
pub(super) const ADDRESS: &str = "an address with port (`127.0.0.1:80` or `[::1]:80`)";
