// SPDX-License-Identifier: Apache-2.0
//! The operations that one step of a flow asks for: a list with a fixed room.

use crate::op::Op;

/// What a step asked for, in order.
#[derive(Clone, Debug)]
pub struct Ops {
    len: u8,
    list: [Op; Ops::MAX],
}

impl Ops {
    /// The most one step can ask for: nine cancels and two closes.
    pub const MAX: usize = 11;

    /// Nothing asked yet.
    #[must_use]
    pub const fn new() -> Ops {
        Ops { len: 0, list: [Op::Connect; Ops::MAX] }
    }

    /// Adds one. Room for every step's worst case is proved by the simulation.
    pub fn push(&mut self, op: Op) {
        debug_assert!(usize::from(self.len) < Ops::MAX, "a step asked for too much");
        if let Some(place) = self.list.get_mut(usize::from(self.len)) {
            *place = op;
            self.len += 1;
        }
    }

    /// Takes all of them out, in the order they were asked for.
    pub fn drain(&mut self) -> impl Iterator<Item = Op> + '_ {
        let asked = std::mem::take(&mut self.len);
        self.list.iter().take(usize::from(asked)).copied()
    }
}

impl Default for Ops {
    fn default() -> Ops {
        Ops::new()
    }
}
