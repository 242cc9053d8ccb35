// SPDX-License-Identifier: Apache-2.0
//! What a config says about a service: its endpoints, and how one of them is chosen.

use std::time::Duration;

use super::claims::{ADDRESS, address, address_of};
use crate::service::{Balance, Check, CheckKind, Endpoint, Manner};
use crate::yaml::{Kind, Mistakes, Node, Place, Section};

/// The keys that say how an endpoint is chosen.
pub(super) fn manner(section: &mut Section, mistakes: &mut Mistakes) -> Manner {
    let balance = section.word("balance", &Balance::WORDS, mistakes);
    let zone = section.parsed::<String>("zone", "a word", mistakes).unwrap_or_default();
    let check = check(section, mistakes);
    let slow_start = section.number("slow_start_ms", 0..=SLOW_START_MS_MAX, mistakes).unwrap_or(0);
    Manner {
        balance: balance.unwrap_or(Balance::RoundRobin),
        check,
        slow_start: Duration::from_millis(slow_start),
        zone: zone.into(),
    }
}

fn check(section: &mut Section, mistakes: &mut Mistakes) -> Option<Check> {
    let (place, path) = (section.place(), section.path("check"));
    let kind = section.word("check", &CheckKind::WORDS, mistakes);
    let interval = section.number("check_interval_ms", 0..=CHECK_MS_MAX, mistakes).unwrap_or(0);
    if interval == 0 && kind.is_some() {
        mistakes.add(place, &path, "nobody looks: say how often with `check_interval_ms`");
    }
    let interval = (interval > 0).then(|| Duration::from_millis(interval));
    interval.map(|interval| Check { interval, kind: kind.unwrap_or(CheckKind::Tcp) })
}

/// The `endpoints` of a section; `None` if the key is not there.
pub(super) fn endpoints(section: &mut Section, mistakes: &mut Mistakes) -> Option<Vec<Endpoint>> {
    let placed = placed_endpoints(section, mistakes)?;
    Some(placed.into_iter().map(|(_, endpoint)| endpoint).collect())
}

/// As `endpoints`, each with its place in the file.
pub(super) fn placed_endpoints(
    section: &mut Section,
    mistakes: &mut Mistakes,
) -> Option<Vec<(Place, Endpoint)>> {
    let path = section.path("endpoints");
    let nodes = section.list("endpoints")?;
    let placed = |node: Node| Some((node.place, endpoint(node, &path, mistakes)?));
    Some(nodes.into_iter().filter_map(placed).collect())
}

/// An address, or a map of an address and what else there is to say about it.
fn endpoint(node: Node, path: &str, mistakes: &mut Mistakes) -> Option<Endpoint> {
    if !matches!(node.kind, Kind::Map(_)) {
        return address_of(&node, path, mistakes).map(Endpoint::new);
    }
    let place = node.place;
    let mut section = Section::open(Some(node), path, mistakes);
    let (addr_path, is_there) = (section.path("addr"), section.has("addr"));
    let addr = address(&mut section, "addr", mistakes);
    if !is_there {
        mistakes.add(place, &addr_path, format!("is missing: must be {ADDRESS}"));
    }
    let weight = section.number("weight", 0..=Endpoint::WEIGHT_MAX, mistakes);
    let zone = section.parsed::<String>("zone", "a word", mistakes).unwrap_or_default();
    section.finish(mistakes);
    let weight = weight.unwrap_or(Endpoint::WEIGHT);
    Some(Endpoint { addr: addr?, started: None, weight, zone: zone.into() })
}

/// An hour: whoever wants to look less often wants no check.
const CHECK_MS_MAX: u64 = 3_600_000;
/// A day.
const SLOW_START_MS_MAX: u64 = 86_400_000;
