// SPDX-License-Identifier: Apache-2.0
//! A worker's listeners as the control thread knows them: enough to let another worker accept for it.
//!
//! Invariant: nothing here keeps a listener open.

#![expect(clippy::disallowed_types, reason = "no worker comes here, and nobody waits inside")]

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{Alteration, Change, Listener};
use crate::sys::socket;

/// Of one worker.
#[derive(Debug)]
pub(super) struct Doors(Mutex<Vec<Door>>);

/// One listener.
#[derive(Debug)]
struct Door {
    addr: SocketAddr,
    fd: Weak<OwnedFd>,
    place: u32,
}

/// A listener of a worker that does not turn, for one that does.
#[derive(Debug)]
pub(super) struct Lent {
    /// Where it listens: the other worker has a listener of its own there.
    pub(super) addr: SocketAddr,
    /// The socket, once more.
    pub(super) fd: OwnedFd,
    /// The number of its place.
    pub(super) place: u32,
}

impl Doors {
    pub(super) fn new(listeners: &[Listener]) -> Doors {
        Doors(Mutex::new(listeners.iter().filter_map(Door::of).collect()))
    }

    /// The worker is asked to go on otherwise.
    pub(super) fn follow(&self, change: &Change) {
        let mut doors = self.lock();
        doors.retain(|door| door.fd.strong_count() > 0);
        for Alteration { addr, from, place, .. } in &change.alter {
            let altered = |door: &&mut Door| (door.addr, door.place) == (*addr, *from);
            doors.iter_mut().filter(altered).for_each(|door| door.place = place.number);
        }
        doors.extend(change.add.iter().filter_map(Door::of));
    }

    /// Somebody waits at one of them.
    pub(super) fn has_waiting(&self) -> bool {
        let waits = |fd: Arc<OwnedFd>| socket::waiting(fd.as_fd()).is_ok_and(|count| count > 0);
        self.lock().iter().any(|door| door.fd.upgrade().is_some_and(waits))
    }

    /// All of them once more, as far as descriptors are left.
    pub(super) fn lend(&self) -> Vec<Lent> {
        let lend = |door: &Door| {
            let fd = door.fd.upgrade()?.try_clone().ok()?;
            Some(Lent { addr: door.addr, fd, place: door.place })
        };
        self.lock().iter().filter_map(lend).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Door>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Door {
    fn of(listener: &Listener) -> Option<Door> {
        let addr = socket::local_name(listener.fd.as_fd()).ok()?;
        Some(Door { addr, fd: Arc::downgrade(&listener.fd), place: listener.place.number })
    }
}
