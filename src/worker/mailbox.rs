// SPDX-License-Identifier: Apache-2.0
//! Letters from the control thread to a worker: a bounded queue and an eventfd that rings.
//!
//! The worker never waits here; a full mailbox makes the sender drop its letter and say so.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use super::FlowRow;

/// What control can ask of a worker.
#[derive(Debug)]
pub(super) enum Letter {
    /// Stop accepting; reset what is left after this long.
    Drain(Duration),
    /// List the flows.
    Flows(mpsc::Sender<Vec<FlowRow>>),
}

/// Shared by a worker and its handle.
#[derive(Debug)]
pub(super) struct Mailbox {
    /// Every listener has an accept armed.
    pub(super) accepting: AtomicBool,
    bell: OwnedFd,
    letters: ArrayQueue<Letter>,
}

impl Mailbox {
    pub(super) fn new(bell: OwnedFd) -> Mailbox {
        Mailbox { accepting: AtomicBool::new(false), bell, letters: ArrayQueue::new(LETTERS_MAX) }
    }

    /// Puts a letter in and rings; false if the box is full.
    pub(super) fn send(&self, letter: Letter) -> bool {
        let taken = self.letters.push(letter).is_ok();
        let _ = nix::unistd::write(&self.bell, &1u64.to_ne_bytes());
        taken
    }

    pub(super) fn take(&self) -> Option<Letter> {
        self.letters.pop()
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    pub(super) fn set_accepting(&self, accepting: bool) {
        self.accepting.store(accepting, Ordering::Release);
    }
}

/// Letters that may wait; a worker reads them every turn.
const LETTERS_MAX: usize = 16;
