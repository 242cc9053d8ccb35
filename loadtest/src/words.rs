// SPDX-License-Identifier: Apache-2.0
//! Payload that tells loss, doubling, reordering and mixing apart: every 8-byte word carries its
//! flow's seed and its own position.

/// Writes the bytes of flow `seed` that begin at `position`; the first and the last word may be cut.
pub(crate) fn fill(chunk: &mut [u8], seed: u64, position: u64) {
    let mut position = position;
    let mut rest = chunk;
    while !rest.is_empty() {
        let word = word(seed, position);
        let cut = usize::try_from(position % 8).unwrap_or(0);
        let len = (8 - cut).min(rest.len());
        let (part, others) = rest.split_at_mut(len);
        part.copy_from_slice(&word[cut..cut + len]);
        position += len as u64;
        rest = others;
    }
}

/// Whether these are the bytes of flow `seed` that begin at `position`.
pub(crate) fn are_right(chunk: &[u8], seed: u64, position: u64) -> bool {
    let mut position = position;
    let mut rest = chunk;
    while !rest.is_empty() {
        let word = word(seed, position);
        let cut = usize::try_from(position % 8).unwrap_or(0);
        let len = (8 - cut).min(rest.len());
        let (part, others) = rest.split_at(len);
        if *part != word[cut..cut + len] {
            return false;
        }
        position += len as u64;
        rest = others;
    }
    true
}

/// The seed that the first word of a flow carries.
pub(crate) fn seed_of(first: [u8; 8]) -> u64 {
    u64::from_le_bytes(first) >> POSITION_BITS
}

/// Seeds have 24 bits; positions wrap after 8 TB of one flow.
fn word(seed: u64, position: u64) -> [u8; 8] {
    ((seed << POSITION_BITS) ^ (position / 8)).to_le_bytes()
}

const POSITION_BITS: u32 = 40;

#[cfg(test)]
mod tests {
    use super::{are_right, fill, seed_of};

    #[test]
    fn what_was_filled_in_pieces_is_right_as_a_whole() {
        let mut whole = [0; 100];
        fill(&mut whole[..13], 7, 0);
        fill(&mut whole[13..], 7, 13);
        assert!(are_right(&whole, 7, 0));
        assert!(are_right(&whole[9..70], 7, 9));
        let first = whole.first_chunk().copied().unwrap_or_default();
        assert_eq!(seed_of(first), 7);
    }

    #[test]
    fn loss_doubling_reordering_and_mixing_are_seen() {
        let mut flow = [0; 256];
        fill(&mut flow, 9, 0);
        assert!(!are_right(&flow[8..], 9, 0), "eight bytes lost");
        assert!(!are_right(&flow[..64], 9, 64), "a part came twice");
        assert!(!are_right(&flow, 10, 0), "bytes of another flow");
        flow.swap(3, 11);
        assert!(are_right(&flow, 9, 0), "equal bytes may change places");
        flow.swap(0, 8);
        assert!(!are_right(&flow, 9, 0), "two bytes changed places");
    }
}
