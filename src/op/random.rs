// SPDX-License-Identifier: Apache-2.0
//! Numbers for simulations, each list of them from a seed.

/// xorshift64*: small, and the same everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..4 {
            random.below(2);
        }
        random
    }

    /// From 0 to `limit`, not included.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % limit
    }

    /// True so often; never for 0.
    pub(crate) fn one_in(&mut self, chance: u64) -> bool {
        chance > 0 && self.below(chance) == 0
    }
}
