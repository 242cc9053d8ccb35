// SPDX-License-Identifier: Apache-2.0
//! One core's thread: THE loop that joins ring and flows.
//!
//! A turn: enter the ring, hand each completion to its flow, carry the flow's operations back to
//! the ring, then timers and mailbox. Invariants: the loop never waits for anything but its ring,
//! allocates nothing after start, and never touches a payload byte.

#![deny(clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "hot path")]

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::bpf::sockmap::Sockmap;
use crate::capture::{OwnPorts, Records, SourcePorts};
use crate::config::ProxyProtocol;
use crate::flow::{Can, Ops, Rules, Segments};
use crate::metrics::{Counters, Origin};
use crate::op::Relay;
use crate::profile::{Profile, RelayMode, Timeouts};
use crate::ring::{self, Batch, DialOptions, Features, Marks, Ring, RingError, SpliceLimits};
use crate::service::{Balance, Picker, ServiceId, Tally, Update};
use crate::sys::netns::Netns;
use crate::sys::{process, socket};

use accept::Listening;
use breaker::Breaker;
use doors::Doors;
use exchanging::Exchanging;
use mailbox::{Letter, Mailbox};
use peek::Peeking;
use slab::Slab;
use sockmap::Forwarded;
use timers::TimerTicks;
use trial::Trial;
use turn::Worker;
use waking::Waking;
use wheel::{Clock, Wheel};

mod accept;
mod breaker;
mod change;
mod destination;
mod doors;
mod exchanging;
mod help;
mod loops;
mod mailbox;
mod peek;
mod places;
mod proxy_header;
mod slab;
mod sockmap;
mod sources;
#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests;
mod timers;
mod trial;
mod turn;
mod waking;
mod wheel;

/// What a worker starts with.
#[derive(Debug)]
pub struct Setup {
    /// The CPU to run on; `None` leaves it to the scheduler.
    pub cpu: Option<usize>,
    /// Where the process was started.
    pub home: Arc<Place>,
    /// Which of how many, from 0.
    pub index: u16,
    /// Sockets that already listen.
    pub listeners: Vec<Listener>,
    /// Of upstream sockets; none where nothing is captured.
    pub marks: Option<Marks>,
    /// How fast and how big.
    pub profile: Arc<Profile>,
    /// To begin with; more may come later.
    pub services: Update,
    /// This worker's part of the process's limits.
    pub share: Share,
    /// Has passed its test; `None` where flows stay in user space.
    pub sockmap: Option<Sockmap>,
    /// For listeners whose upstreams see the client's address.
    pub source_ports: SourcePorts,
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
    /// Pipes at a time.
    pub pipes_max: u32,
    /// Flows that the kernel forwards at a time.
    pub sockmap_flows_max: u32,
    /// Flows with a spliced direction at a time.
    pub spliced_flows_max: u32,
}

/// A listening socket and what its connections are for.
#[derive(Debug)]
pub struct Listener {
    /// Listens already, with `SO_REUSEPORT` when there is more than one worker. Shared only in passing.
    pub fd: Arc<OwnedFd>,
    /// Where it listens and its upstreams are dialled.
    pub place: Arc<Place>,
    /// The header that upstreams get first. Only where the original destination is known.
    pub proxy_protocol: ProxyProtocol,
    /// Where its connections go.
    pub route: Route,
    /// Whose connections they are, in `weir flows`; empty for a workload without a name.
    pub workload: Arc<str>,
}

/// A network namespace in which listeners live and their upstreams are dialled.
#[derive(Debug, Default)]
pub struct Place {
    /// How to get there; `None` only where a process lives in one place.
    pub netns: Option<Arc<Netns>>,
    /// Unique in a process; 0 for where it was started.
    pub number: u32,
    /// What must never be dialled there.
    pub own_ports: OwnPorts,
}

/// Where a listener's connections go.
#[derive(Clone, Debug)]
pub enum Route {
    /// To an endpoint of the service that its first request names.
    Named,
    /// To where the connect hook recorded that the connection meant to go.
    Recorded(Arc<Records>),
    /// To where the connection meant to go before the kernel rewrote it (`SO_ORIGINAL_DST`), as
    /// under redirect.
    Rewritten {
        /// `InboundRedirect` or `OutboundRedirect`.
        origin: Origin,
        /// Whose address the upstream sees.
        source: Source,
    },
    /// To an endpoint of this service.
    Service {
        /// As the service has it: some ways to choose must know who dialled.
        balance: Balance,
        /// Which.
        id: ServiceId,
        /// `Forward`, or one of takeover's.
        origin: Origin,
    },
    /// To the accepted socket's own address (`getsockname`), as under tproxy.
    Socket {
        /// Some are not of this host.
        any_destination: bool,
        /// `InboundTproxy` or `OutboundTproxy`.
        origin: Origin,
        /// Whose address the upstream sees.
        source: Source,
    },
}

/// What a running worker shall do otherwise.
#[derive(Debug)]
pub struct Change {
    /// Listeners that it has not had yet.
    pub add: Vec<Listener>,
    /// Listeners that go on in another way; flows that are open go on as they began.
    pub alter: Vec<Alteration>,
    /// Listeners that end once those who wait in their queues are served, by the number of their place.
    pub retire: Vec<(u32, SocketAddr)>,
    /// For every flow, those that are open too.
    pub timeouts: Timeouts,
}

/// How a listener goes on.
#[derive(Debug)]
pub struct Alteration {
    /// Where it listens.
    pub addr: SocketAddr,
    /// The number of the place in which it has been until now.
    pub from: u32,
    /// The network namespace that it is in, perhaps with other own ports or another number.
    pub place: Arc<Place>,
    /// See `Listener`.
    pub proxy_protocol: ProxyProtocol,
    /// `None` for as before.
    pub route: Option<Route>,
    /// Whose flows it brings; empty if nobody's by name.
    pub workload: Arc<str>,
}

/// Whose address an upstream sees.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Source {
    /// The client's, with a port of this range.
    Keep(RangeInclusive<u16>),
    /// Ours.
    Own,
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
    /// How bytes reach the downstream socket now.
    pub relay_to_downstream: Relay,
    /// How bytes reach the upstream socket now.
    pub relay_to_upstream: Relay,
    /// What was dialled.
    pub upstream: SocketAddr,
    /// Of a workload with a name; empty otherwise.
    pub workload: Arc<str>,
}

/// A running worker, as the control thread sees it. Dropping it does not stop the worker.
#[derive(Debug)]
pub struct Handle {
    counters: Arc<Counters>,
    doors: Doors,
    features: Features,
    index: u16,
    mailbox: Arc<Mailbox>,
    thread: JoinHandle<Result<(), RingError>>,
}

impl Handle {
    /// Every listener has an accept armed.
    #[must_use]
    pub fn is_accepting(&self) -> bool {
        self.mailbox.accepting.load(Ordering::Acquire)
    }

    /// The revision of the table of services that it goes by.
    #[must_use]
    pub fn services_revision(&self) -> u64 {
        self.mailbox.revision()
    }

    /// The thread has ended, by drain or failure.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Read only; a counter may lag by one turn.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What this worker's kernel can do.
    #[must_use]
    pub const fn features(&self) -> &Features {
        &self.features
    }

    /// Stop accepting, let flows end, reset what is left after `within`, then end the thread.
    /// Asked again, the earlier end wins. False if the worker has too much to read just now: ask
    /// again.
    #[must_use]
    pub fn drain(&self, within: Duration) -> bool {
        self.mailbox.send(Letter::Drain(within))
    }

    /// Asks what the worker knows about each endpoint; as `flows`.
    #[must_use]
    pub fn endpoints(&self) -> mpsc::Receiver<Vec<Tally>> {
        let (to, from) = mpsc::channel();
        self.mailbox.send(Letter::Endpoints(to));
        from
    }

    /// There is room for a change and a table of services in its mailbox.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.mailbox.has_room(2)
    }

    /// Goes on otherwise. Lost if there is no room.
    pub fn change(&self, change: Change) {
        self.doors.follow(&change);
        self.mailbox.send(Letter::Change(Box::new(change)));
    }

    /// Somebody waits at one of its listeners.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        self.doors.has_waiting()
    }

    /// Accepts for `other`, too, until `stop_helping`. False if there is no room in its mailbox.
    #[must_use]
    pub fn help(&self, other: &Handle) -> bool {
        self.mailbox.send(Letter::Help(other.doors.lend()))
    }

    /// Accepts for itself only. False if there is no room in its mailbox.
    #[must_use]
    pub fn stop_helping(&self) -> bool {
        self.mailbox.send(Letter::StopHelping)
    }

    /// The workload in this place is gone: its listeners are closed and its flows reset.
    /// False if the worker has too much to read just now: ask again.
    #[must_use]
    pub fn leave(&self, place: u32) -> bool {
        self.mailbox.send(Letter::Leave(place))
    }

    /// Hands over a new table of services, and frees what the worker had before the last one.
    /// False if its mailbox is full: it goes on with what it has.
    pub fn update(&self, services: Update) -> bool {
        self.mailbox.empty_waste();
        self.mailbox.send(Letter::Services(services))
    }

    /// Asks for a list of the flows; it comes through the channel, or the channel closes. Never
    /// wait for it in the control thread without a time limit.
    #[must_use]
    pub fn flows(&self) -> mpsc::Receiver<Vec<FlowRow>> {
        let (to, from) = mpsc::channel();
        self.mailbox.send(Letter::Flows(to));
        from
    }

    /// Waits for the thread and says how it ended.
    ///
    /// # Errors
    ///
    /// What stopped the loop.
    pub fn join(self) -> Result<(), WorkerError> {
        let index = self.index;
        match self.thread.join() {
            Ok(result) => result.map_err(|source| WorkerError::Ring { index, source }),
            Err(_) => Err(WorkerError::Panicked { index }),
        }
    }
}

/// Why a worker could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A bug.
    #[error("worker {index} panicked")]
    Panicked {
        /// Which worker.
        index: u16,
    },
    /// The CPU is not one this process may use.
    #[error("worker {index}: CPU {cpu} is not one this process may use (see `taskset -p`)")]
    Pin {
        /// The CPU asked for.
        cpu: usize,
        /// Which worker.
        index: u16,
    },
    /// Its ring.
    #[error("{source}")]
    Ring {
        /// Which worker.
        index: u16,
        /// Why there is no ring, or no more.
        source: RingError,
    },
    /// The thread or its mailbox could not be made.
    #[error("start worker {index}: {source} (is a limit of threads or descriptors reached?)")]
    Thread {
        /// Which worker.
        index: u16,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Starts a worker; returns once its ring is open, or with the reason why it is not. It accepts
/// soon after: see `Handle::is_accepting`.
///
/// # Errors
///
/// The ring is refused, the CPU is not ours, or there is no thread to be had.
pub fn spawn(setup: Setup) -> Result<Handle, WorkerError> {
    let index = setup.index;
    let failed = |source| WorkerError::Thread { index, source };
    let mailbox = Arc::new(Mailbox::new(socket::bell().map_err(failed)?));
    let counters = Arc::new(Counters::default());
    let doors = Doors::new(&setup.listeners);
    let (ready, opened) = mpsc::sync_channel(1);
    let (own_mailbox, own_counters) = (Arc::clone(&mailbox), Arc::clone(&counters));
    let run = move || {
        let mut worker = match Worker::start(setup, own_mailbox, own_counters) {
            Ok(worker) => worker,
            Err(error) => return report(&ready, Err(error)),
        };
        report(&ready, Ok(*worker.ring.features()))?;
        if ring::is_withheld(&format!("worker{index}")) {
            return Err(RingError::Enter { source: io::ErrorKind::Other.into() });
        }
        worker.run()
    };
    let thread = Builder::new().name(format!("weir-w{index}")).spawn(run).map_err(failed)?;
    match opened.recv() {
        Ok(Ok(features)) => Ok(Handle { counters, doors, features, index, mailbox, thread }),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(WorkerError::Panicked { index }),
    }
}

/// Tells `spawn` how the start went. Only if `spawn` is gone there is nobody to tell.
fn report(
    ready: &mpsc::SyncSender<Result<Features, WorkerError>>,
    result: Result<Features, WorkerError>,
) -> Result<(), RingError> {
    let _ = ready.send(result);
    Ok(())
}

impl Worker {
    fn start(
        mut setup: Setup,
        mailbox: Arc<Mailbox>,
        counters: Arc<Counters>,
    ) -> Result<Worker, WorkerError> {
        let index = setup.index;
        if let Some(cpu) = setup.cpu.filter(|cpu| !process::pin_thread(*cpu)) {
            return Err(WorkerError::Pin { cpu, index });
        }
        process::block_signals().map_err(|source| WorkerError::Thread { index, source })?;
        let profile = Arc::clone(&setup.profile);
        let Share { flows_max, pipes_max, spliced_flows_max, .. } = setup.share;
        let pipe_bytes = profile.relay.pipe_bytes;
        let splice = SpliceLimits { flows_max: spliced_flows_max, pipe_bytes, pipes_max };
        let dial = DialOptions::new(&profile.sockets, setup.marks);
        let (buffers, ring) = (&profile.buffers, &profile.ring);
        let headers = headers_max(&setup.share);
        let tuned = setup.listeners.iter().try_for_each(|listener| dial.tune(listener.fd.as_fd()));
        let mut ring = tuned
            .and_then(|()| {
                Ring::open(ring::Setup { buffers, dial, flows_max, headers, ring, splice })
            })
            .map_err(|source| WorkerError::Ring { index, source })?;
        let listening = Listening::new(&mut setup);
        let services = Picker::new(std::mem::take(&mut setup.services), index);
        mailbox.set_revision(services.table().revision);
        let sockmap = setup.sockmap.take();
        let can = Can {
            forward: sockmap.is_some() && spliced_flows_max > 0,
            splice: ring.features().splice && spliced_flows_max > 0 && pipes_max > 0,
        };
        let is_auto = profile.relay.mode == RelayMode::Auto;
        let waking = (can.forward && is_auto).then(|| {
            ring.count_sleeps();
            Waking::default()
        });
        Ok(Worker {
            batch: Batch::new(),
            breaker: Breaker::new(),
            clock: Clock::start(),
            drain_until: None,
            exchanging: Exchanging::new(
                &profile,
                if listening.has_named() { flows_max } else { 0 },
                headers,
            ),
            forwarded: sockmap.map(|sockmap| Forwarded::new(sockmap, flows_max)),
            inside: setup.home.number,
            mailbox,
            ops: Ops::new(),
            peeking: Peeking::new(if listening.has_named() { flows_max } else { 0 }),
            ring,
            rules: Rules::new(&profile, can),
            segments: Segments::new(
                profile.buffers.small_count + profile.buffers.bulk_count + headers,
            ),
            services,
            slab: Slab::new(flows_max, listening.hands_out_slots()),
            listening,
            starved: VecDeque::with_capacity(flows_max as usize * 2),
            ticks: TimerTicks::new(&profile.timeouts, profile.sockets.keepalive.is_some()),
            trial: (can.splice && is_auto).then(Trial::new),
            waking,
            wheel: Wheel::new(flows_max),
            counters,
            setup,
        })
    }
}

/// A header is on its way while its flow connects, and hardly longer: new sockets have room for it.
fn headers_max(share: &Share) -> u16 {
    u16::try_from(share.connects_pending_max).map_or(HEADERS_MAX, |max| max.min(HEADERS_MAX))
}

/// Half of all buffer ids are left to headers, and a quarter is enough: 2 MiB, if ever touched.
const HEADERS_MAX: u16 = 16_384;
