// SPDX-License-Identifier: Apache-2.0
//! The limit of flows for each address that they come from.

use std::collections::HashMap;
use std::net::IpAddr;

/// Open flows by the address they come from; counts only when there is a limit.
pub(super) struct Sources {
    flows: HashMap<IpAddr, u32>,
    max: u32,
}

impl Sources {
    pub(super) fn new(max: u32, flows_max: u32) -> Sources {
        let room = if max == 0 { 0 } else { flows_max as usize * 2 };
        Sources { flows: HashMap::with_capacity(room), max }
    }

    /// Counts one more flow from `source`; false if it has too many already.
    pub(super) fn enter(&mut self, source: IpAddr) -> bool {
        if self.max == 0 {
            return true;
        }
        let flows = self.flows.entry(source).or_insert(0);
        let fits = *flows < self.max;
        *flows += u32::from(fits);
        fits
    }

    pub(super) fn leave(&mut self, source: IpAddr) {
        if let Some(flows) = self.flows.get_mut(&source) {
            *flows -= 1;
            if *flows == 0 {
                self.flows.remove(&source);
            }
        }
    }
}
