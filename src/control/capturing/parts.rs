// SPDX-License-Identifier: Apache-2.0
//! Parts of what is captured: one direction of one workload, by one means, at one listener.
//!
//! A part is told from others by these three, and not by its workload's name. While it is captured it
//! may change in everything else.

use std::net::SocketAddr;

use crate::config::{Captured, Inbound, InboundCapture, Outbound, OutboundCapture};

/// What a part is known by.
#[derive(Eq, PartialEq)]
enum Key {
    Inbound(InboundCapture, SocketAddr),
    Outbound(OutboundCapture, SocketAddr),
}

/// The parts of `all` that are not among `others`, each once.
pub(super) fn without(all: &[Captured], others: &[Captured]) -> Vec<Captured> {
    let others: Vec<Key> = others.iter().flat_map(keys).collect();
    let mut left: Vec<Captured> = Vec::new();
    for part in all.iter().flat_map(split) {
        let is_among =
            |key: Key| others.contains(&key) || left.iter().flat_map(keys).any(|one| one == key);
        if !keys(&part).any(is_among) {
            left.push(part);
        }
    }
    left
}

/// Each direction by itself.
fn split(whole: &Captured) -> impl Iterator<Item = Captured> + use<> {
    let inbound = whole.inbound.is_some().then(|| Captured { outbound: None, ..whole.clone() });
    let outbound = whole.outbound.is_some().then(|| Captured { inbound: None, ..whole.clone() });
    inbound.into_iter().chain(outbound)
}

fn keys(captured: &Captured) -> impl Iterator<Item = Key> + use<> {
    let inbound = |inbound: &Inbound| Key::Inbound(inbound.capture, inbound.listen);
    let outbound = |outbound: &Outbound| Key::Outbound(outbound.capture, outbound.listen);
    let inbound = captured.inbound.as_ref().map(inbound);
    inbound.into_iter().chain(captured.outbound.as_ref().map(outbound))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn captured(text: &str) -> Vec<Captured> {
        Config::parse("weir.yaml", None, text).unwrap().workloads
    }

    #[test]
    fn a_part_is_told_by_direction_means_and_listener() {
        let old = captured("inbound: {}\noutbound: { workload: { cgroup: /a } }\n");
        let same = captured("inbound: { source: own }\noutbound: { workload: { cgroup: /b } }\n");
        assert_eq!(without(&old, &same), []);
        let moved = captured("inbound: {}\noutbound: { capture: tproxy }\n");
        let gone = without(&old, &moved);
        assert_eq!(gone.len(), 1);
        assert_eq!((&gone[0].inbound, &gone[0].outbound), (&None, &old[0].outbound));
        assert_eq!(without(&[gone.clone(), gone.clone()].concat(), &[]), gone, "each once");
    }
}
