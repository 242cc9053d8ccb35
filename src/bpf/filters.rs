// SPDX-License-Identifier: Apache-2.0
//! Which connects the hook takes, in the maps of its programs: two sets, one of them in force.
//!
//! An update fills the other set and then makes it the one in force, with one store: a connect meets
//! the old filters or the new ones, never a mixture and never none.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, MapData, MapError};
use ipnet::IpNet;

use super::control::Control;
use super::{HookError, map_error, taken};
use crate::sys::process;

/// Which connects to take: by where they go.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Filters {
    /// Destinations to leave alone; wins over `include`.
    pub exclude: Vec<IpNet>,
    /// Destination ports to leave alone.
    pub exclude_ports: Vec<RangeInclusive<u16>>,
    /// Destinations to take; loopback is never taken.
    pub include: Vec<IpNet>,
    /// Destination ports to take.
    pub include_ports: Vec<RangeInclusive<u16>>,
}

/// The maps, and what is in them.
pub(super) struct FilterMaps {
    control: Arc<Control>,
    exclude: Networks,
    include: Networks,
    ports: Array<MapData, u64>,
    /// What each set holds; `None` if it was never in force.
    sets: [Option<Filters>; 2],
}

type Networks = LpmTrie<MapData, NetworkKey, u32>;
/// `struct network` of shared.h after its prefix: set, family, address.
type NetworkKey = [u8; 24];

impl FilterMaps {
    /// Takes the maps out of `bpf`; nothing is in them.
    pub(super) fn take(bpf: &mut Ebpf, control: Arc<Control>) -> Result<FilterMaps, HookError> {
        let mut networks = |name| {
            LpmTrie::try_from(taken(bpf, name)?).map_err(map_error(name)) as Result<Networks, _>
        };
        let (exclude, include) = (networks("exclude_nets")?, networks("include_nets")?);
        let ports = Array::try_from(taken(bpf, "ports")?).map_err(map_error("ports"))?;
        Ok(FilterMaps { control, exclude, include, ports, sets: [None, None] })
    }

    /// From now on connects meet `filters`. If that fails they meet the old ones.
    pub(super) fn update(&mut self, filters: &Filters) -> Result<(), HookError> {
        let set = 1 - self.control.set().min(1);
        let index = usize::from(set == 1);
        if let Some(old) = self.sets[index].replace(filters.clone()) {
            // A program that began before the last update may still read what is about to go.
            if !process::wait_for_programs() {
                std::thread::sleep(PROGRAM_WITHIN);
            }
            for (networks, list) in
                [(&mut self.exclude, &old.exclude), (&mut self.include, &old.include)]
            {
                for network in list {
                    // A network that did not fit in is not there.
                    let _ = networks.remove(&key(set, *network));
                }
            }
        }
        fill("include_nets", &mut self.include, set, &filters.include)?;
        fill("exclude_nets", &mut self.exclude, set, &filters.exclude)?;
        self.fill_ports(set, filters).map_err(map_error("ports"))?;
        self.control.choose(set);
        Ok(())
    }

    fn fill_ports(&mut self, set: u32, filters: &Filters) -> Result<(), MapError> {
        let within = |ranges: &[RangeInclusive<u16>], port: u16| {
            ranges.iter().any(|range| range.contains(&port))
        };
        let is_taken = |port: u16| {
            within(&filters.include_ports, port) && !within(&filters.exclude_ports, port)
        };
        for word in 0..PORT_WORDS {
            let bits = (0..64u16).filter(|bit| is_taken(word * 64 + bit));
            let value = bits.fold(0u64, |value, bit| value | 1 << bit);
            self.ports.set(set * u32::from(PORT_WORDS) + u32::from(word), value, 0)?;
        }
        Ok(())
    }
}

fn fill(
    name: &'static str,
    networks: &mut Networks,
    set: u32,
    list: &[IpNet],
) -> Result<(), HookError> {
    list.iter()
        .try_for_each(|network| networks.insert(&key(set, *network), 1, 0))
        .map_err(map_error(name))
}

fn key(set: u32, network: IpNet) -> Key<NetworkKey> {
    let mut whole = [0; 24];
    whole[..4].copy_from_slice(&set.to_ne_bytes());
    match network.addr() {
        IpAddr::V4(ip) => {
            whole[4..8].copy_from_slice(&4u32.to_ne_bytes());
            whole[8..12].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            whole[4..8].copy_from_slice(&6u32.to_ne_bytes());
            whole[8..].copy_from_slice(&ip.octets());
        }
    }
    Key::new(BITS_BEFORE + u32::from(network.prefix_len()), whole)
}

/// Set and family stand before the address.
const BITS_BEFORE: u32 = 64;
/// 65,536 ports, 64 to a word.
const PORT_WORDS: u16 = 1024;
/// A connect's programs need microseconds.
const PROGRAM_WITHIN: Duration = Duration::from_millis(10);
