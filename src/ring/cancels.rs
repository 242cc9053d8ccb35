// SPDX-License-Identifier: Apache-2.0
//! Requests that shall end early: which cancels are under way, and which came too soon.
//!
//! The kernel finds a request only while it waits for its socket. On its way from one step to the
//! next (a link of the dial chain, a receive that has yielded) a cancel misses it (`ENOENT`) and
//! the request goes on, perhaps for ever. So a cancel that missed is repeated until the request
//! has had its last event. Costs nothing while no cancel is under way.

use crate::op::{Kind, Token};

/// Cancels under way, one word per flow: the generation above, a bit per kind of request below.
#[derive(Debug)]
pub(super) struct Cancels {
    words: Vec<u64>,
    flows_max: u32,
    open: u32,
}

impl Cancels {
    pub(super) fn new(flows_max: u32) -> Cancels {
        Cancels { words: vec![0; (flows_max + LISTENERS_FIRST) as usize], flows_max, open: 0 }
    }

    /// A cancel of `target` is wanted; false if one is under way already.
    pub(super) fn begin(&mut self, target: Token) -> bool {
        self.make_room(target);
        let Some((word, bit)) = self.place(target) else { return true };
        let is_new = !is_open(*word, bit, target);
        let same_life = generation(*word) == target.generation();
        let (kept, stale) = if same_life { (*word & KINDS, 0) } else { (0, *word & KINDS) };
        *word = u64::from(target.generation()) << 32 | kept | bit;
        self.open = self.open + u32::from(is_new) - stale.count_ones();
        is_new
    }

    /// `target` has had its last event.
    pub(super) fn end(&mut self, target: Token) {
        if self.open == 0 {
            return;
        }
        if let Some((word, bit)) = self.place(target)
            && is_open(*word, bit, target)
        {
            *word &= !bit;
            self.open -= 1;
        }
    }

    /// Whether a cancel of `target` that missed must be repeated.
    pub(super) fn is_open(&mut self, target: Token) -> bool {
        self.place(target).is_some_and(|(word, bit)| is_open(*word, bit, target))
    }

    /// A reload may bring more listeners than there were.
    fn make_room(&mut self, target: Token) {
        let words = (self.flows_max + target.flow().slot()) as usize + 1;
        if target.kind() == Some(Kind::Accept) && self.words.len() < words {
            self.words.resize(words, 0);
        }
    }

    fn place(&mut self, target: Token) -> Option<(&mut u64, u64)> {
        let kind = target.kind()?;
        let number = target.flow().slot();
        let index = if kind == Kind::Accept { self.flows_max + number } else { number };
        Some((self.words.get_mut(index as usize)?, 1 << kind as u8))
    }
}

const fn is_open(word: u64, bit: u64, target: Token) -> bool {
    word & bit != 0 && generation(word) == target.generation()
}

const fn generation(word: u64) -> u32 {
    (word >> 32) as u32
}

const KINDS: u64 = 0xffff_ffff;
/// Listeners of one worker for which there is room at first.
const LISTENERS_FIRST: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::FlowId;

    #[test]
    fn open_until_the_last_event_of_the_same_life() {
        let mut cancels = Cancels::new(4);
        let token = |kind, generation| Token::new(kind, FlowId::new(3), generation);
        assert!(cancels.begin(token(Kind::Connect, 7)));
        assert!(!cancels.begin(token(Kind::Connect, 7)));
        assert!(cancels.begin(token(Kind::ReceiveUpstream, 7)));
        assert!(cancels.begin(token(Kind::Accept, 0)));
        cancels.end(token(Kind::Connect, 6));
        assert!(cancels.is_open(token(Kind::Connect, 7)));
        assert!(!cancels.is_open(token(Kind::Connect, 6)));
        cancels.end(token(Kind::Connect, 7));
        assert!(!cancels.is_open(token(Kind::Connect, 7)));
        assert!(cancels.is_open(token(Kind::ReceiveUpstream, 7)));
        cancels.end(token(Kind::ReceiveUpstream, 7));
        cancels.end(token(Kind::Accept, 0));
        assert_eq!(cancels.open, 0);
        let accept = Token::new(Kind::Accept, FlowId::new(1000), 0);
        assert!(cancels.begin(accept) && cancels.is_open(accept));
        cancels.end(accept);
        assert!(!cancels.is_open(accept));
    }
}
