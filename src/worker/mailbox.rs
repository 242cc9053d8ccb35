// SPDX-License-Identifier: Apache-2.0
//! Letters from the control thread to a worker: a bounded queue and an eventfd that rings.
//!
//! The worker never waits here; a full mailbox makes the sender drop its letter and say so.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use super::doors::Lent;
use super::{Change, FlowRow};
use crate::service::{Tally, Update};

/// What control can ask of a worker.
#[derive(Debug)]
pub(super) enum Letter {
    /// Go on otherwise.
    Change(Box<Change>),
    /// Stop accepting; reset what is left after this long.
    Drain(Duration),
    /// Say what is known about each endpoint.
    Endpoints(mpsc::Sender<Vec<Tally>>),
    /// Accept for another worker.
    Help(Vec<Lent>),
    /// List the flows.
    Flows(mpsc::Sender<Vec<FlowRow>>),
    /// The workload in this place is gone: end its listeners and flows.
    Leave(u32),
    /// Go on with these services.
    Services(Update),
    /// The other worker turns again.
    StopHelping,
}

/// Shared by a worker and its handle.
#[derive(Debug)]
pub(super) struct Mailbox {
    /// Every listener has an accept armed.
    pub(super) accepting: AtomicBool,
    bell: OwnedFd,
    letters: ArrayQueue<Letter>,
    /// Of the table of services in force.
    revision: AtomicU64,
    /// What the worker has no use for any more; the control thread frees it.
    waste: ArrayQueue<Update>,
}

impl Mailbox {
    pub(super) fn new(bell: OwnedFd) -> Mailbox {
        let (letters, waste) = (ArrayQueue::new(LETTERS_MAX), ArrayQueue::new(WASTE_MAX));
        let (accepting, revision) = (AtomicBool::new(false), AtomicU64::new(0));
        Mailbox { accepting, bell, letters, revision, waste }
    }

    /// Puts a letter in and rings; false if the box is full.
    pub(super) fn send(&self, letter: Letter) -> bool {
        let taken = self.letters.push(letter).is_ok();
        let _ = nix::unistd::write(&self.bell, &1u64.to_ne_bytes());
        taken
    }

    pub(super) fn has_room(&self, letters: usize) -> bool {
        self.letters.capacity() - self.letters.len() >= letters
    }

    pub(super) fn take(&self) -> Option<Letter> {
        self.letters.pop()
    }

    /// From the worker: to be freed by somebody who has the time.
    pub(super) fn throw_away(&self, old: Update) {
        // There is room: control empties it before each letter. If not, it is freed here.
        let _ = self.waste.push(old);
    }

    /// Frees what the worker has thrown away.
    pub(super) fn empty_waste(&self) {
        while self.waste.pop().is_some() {}
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// From the worker: it goes by this table from now on.
    pub(super) fn set_revision(&self, revision: u64) {
        self.revision.store(revision, Ordering::Release);
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    pub(super) fn set_accepting(&self, accepting: bool) {
        self.accepting.store(accepting, Ordering::Release);
    }
}

/// Letters that may wait; a worker reads them every turn.
const LETTERS_MAX: usize = 16;
/// All letters of a full box, and one more.
const WASTE_MAX: usize = LETTERS_MAX + 1;
