// SPDX-License-Identifier: Apache-2.0
//! What upstreams have asked of one downstream, and who gets the answer.
//!
//! Invariant: an id stands for one leg until the downstream has answered, even when that leg is gone,
//! so that a late answer never reaches another one.

use super::NOWHERE;

/// Whether an upstream may ask.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Turn {
    /// Too many wait for an answer.
    Full,
    /// Another one has asked under this id.
    Taken,
    /// It may, and is remembered.
    Yours,
}

/// What waits for an answer of the downstream.
#[derive(Debug, Default)]
pub(super) struct Callbacks {
    list: Vec<Callback>,
}

#[derive(Clone, Copy, Debug)]
struct Callback {
    id: u64,
    leg: usize,
}

impl Callbacks {
    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    /// `leg` asks under this id.
    pub(super) fn ask(&mut self, id: u64, leg: usize) -> Turn {
        match self.list.iter().find(|one| one.id == id) {
            Some(one) if one.leg == leg => Turn::Yours,
            Some(_) => Turn::Taken,
            None if self.list.len() >= CALLBACKS_MAX => Turn::Full,
            None => {
                self.list.push(Callback { id, leg });
                Turn::Yours
            }
        }
    }

    /// The leg that gets the answer.
    pub(super) fn answered(&mut self, id: u64) -> Option<usize> {
        let at = self.list.iter().position(|one| one.id == id)?;
        Some(self.list.swap_remove(at).leg).filter(|leg| *leg != NOWHERE)
    }

    /// Answers for this leg go nowhere any more.
    pub(super) fn leave(&mut self, leg: usize) {
        self.list.iter_mut().filter(|one| one.leg == leg).for_each(|one| one.leg = NOWHERE);
    }
}

/// Of one downstream; what it never answers counts as long as its connection lasts.
const CALLBACKS_MAX: usize = 64;
