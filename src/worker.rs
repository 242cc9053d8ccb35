// SPDX-License-Identifier: Apache-2.0
//! One core's thread: THE loop that joins ring and flows.
//!
//! A turn: enter the ring, hand each completion to its flow, carry the flow's operations back to
//! the ring, then timers and mailbox. Invariants: the loop never waits for anything but its ring,
//! allocates nothing after start, and never touches a payload byte.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::capture::{OwnPorts, Records};
use crate::config::{Balance, SourceAddress};
use crate::metrics::{Counters, Origin};
use crate::profile::Profile;

/// What a worker starts with.
#[derive(Debug)]
pub struct Setup {
    /// The CPU to run on; `None` leaves it to the scheduler.
    pub cpu: Option<usize>,
    /// Which of how many, from 0.
    pub index: u16,
    /// Sockets that already listen.
    pub listeners: Vec<Listener>,
    /// `SO_MARK` of upstream sockets; needs `CAP_NET_ADMIN`.
    pub mark: Option<u32>,
    /// What must never be dialled.
    pub own_ports: Arc<OwnPorts>,
    /// How fast and how big.
    pub profile: Arc<Profile>,
    /// This worker's part of the process's limits.
    pub share: Share,
}

/// One worker's part of the process's limits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Share {
    /// Upstream connects in flight; at least 1.
    pub connects_pending_max: u32,
    /// Flows at a time; at least 1.
    pub flows_max: u32,
    /// Flows at a time from one address; 0 for no limit.
    pub flows_per_source_max: u32,
}

/// A listening socket and what its connections are for.
#[derive(Debug)]
pub struct Listener {
    /// Listens already, with `SO_REUSEPORT` when there is more than one worker.
    pub fd: OwnedFd,
    /// In `weir flows`.
    pub name: Arc<str>,
    /// Where its connections go.
    pub route: Route,
}

/// Where a listener's connections go.
#[derive(Debug)]
pub enum Route {
    /// To one of these, at least one.
    Endpoints {
        /// How one is chosen.
        balance: Balance,
        /// At least one.
        endpoints: Vec<SocketAddr>,
    },
    /// To what the connect hook recorded.
    Recorded(Arc<Records>),
    /// To the accepted socket's own address (`getsockname`), as under tproxy.
    Socket {
        /// `InboundTproxy` or `OutboundTproxy`.
        origin: Origin,
        /// Whose address the upstream sees.
        source: SourceAddress,
    },
}

/// A flow as `weir flows` shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowRow {
    /// Since accept.
    pub age: Duration,
    /// Bytes handed to the downstream socket since accept.
    pub bytes_to_downstream: u64,
    /// Bytes handed to the upstream socket since accept.
    pub bytes_to_upstream: u64,
    /// The peer that dialled; `None` if it is gone already.
    pub downstream: Option<SocketAddr>,
    /// Unique among the process's flows: worker, slot and generation.
    pub id: u64,
    /// Since a byte last moved.
    pub idle: Duration,
    /// How it came.
    pub origin: Origin,
    /// Where the application meant to go; `None` for a plain listener.
    pub original_dst: Option<SocketAddr>,
    /// What was dialled.
    pub upstream: SocketAddr,
}

/// A running worker, as the control thread sees it. Dropping it does not stop the worker.
#[derive(Debug)]
pub struct Handle {
    counters: Arc<Counters>,
}

impl Handle {
    /// Every listener has an accept armed.
    #[must_use]
    pub fn is_accepting(&self) -> bool {
        false
    }

    /// The thread has ended, by drain, stop or failure.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        false
    }

    /// Read only; a counter may lag by one turn.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Stop accepting, let flows end, reset what is left after `within`, then end the thread.
    pub fn drain(&self, within: Duration) {
        let _ = within;
    }

    /// Asks for a list of the flows; it comes through the channel, or the channel closes. Never
    /// wait for it in the control thread without a time limit.
    #[must_use]
    pub fn flows(&self) -> std::sync::mpsc::Receiver<Vec<FlowRow>> {
        std::sync::mpsc::channel().1
    }

    /// Waits for the thread and says how it ended.
    ///
    /// # Errors
    ///
    /// What stopped the loop.
    pub fn join(self) -> Result<(), WorkerError> {
        Ok(())
    }
}

/// Why a worker could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The thread could not be made.
    #[error("start worker {index}: {source} (is a thread limit reached?)")]
    Thread {
        /// Which worker.
        index: u16,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// Starts a worker; returns once its ring is open and every listener accepts, or with the reason
/// why not.
///
/// # Errors
///
/// The ring is refused, or a listener cannot be armed.
pub fn spawn(setup: Setup) -> Result<Handle, WorkerError> {
    let _ = setup;
    Ok(Handle { counters: Arc::default() })
}
