// SPDX-License-Identifier: Apache-2.0
//! One listener, as the worker that accepts from it has it.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::super::loops::LoopWatch;
use super::super::{Listener, Place, Route};
use crate::addr::canonical;
use crate::config::ProxyProtocol;
use crate::metrics::Origin;
use crate::sys::socket;

/// One listener.
pub(in crate::worker) struct State {
    pub(super) accept: Accept,
    /// Where it listens.
    pub(super) addr: Option<SocketAddr>,
    pub(super) fate: Fate,
    /// Closed once nothing will be accepted any more.
    pub(in crate::worker) fd: Option<Arc<OwnedFd>>,
    /// Open flows that came by it.
    pub(in crate::worker) flows: u32,
    /// Of another worker, which does not turn just now.
    pub(super) is_lent: bool,
    pub(in crate::worker) loops: LoopWatch,
    pub(in crate::worker) origin: Origin,
    /// Where it lives.
    pub(in crate::worker) place: Arc<Place>,
    /// Where it listens: who is accepted for this port was not captured.
    pub(in crate::worker) port: u16,
    pub(in crate::worker) proxy_protocol: ProxyProtocol,
    /// Connections that a drain still takes from the queue, so that it ends even in a storm.
    pub(super) rest: u32,
    pub(in crate::worker) route: Route,
    pub(in crate::worker) workload: Arc<str>,
}

/// What a listener does when its accept ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fate {
    /// It is closed at once.
    Closes,
    /// Who waits is served, and then it is closed.
    Drains,
    /// It accepts again.
    Serves,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Accept {
    /// A request is in flight and asked to end.
    Cancelled,
    /// None in flight.
    Idle,
    /// Draining: a request for what still waits in the queue is in flight.
    Last,
    /// A request for one connection after the other is in flight.
    Many,
    /// A request for one connection is in flight.
    One,
    /// None in flight, and there will be none.
    Over,
}

impl State {
    pub(in crate::worker) fn new(listener: Listener, backlog: u32) -> State {
        let Listener { fd, place, proxy_protocol, route, workload } = listener;
        let origin = match &route {
            Route::Recorded(_) => Origin::OutboundConnect,
            Route::Named => Origin::OutboundTakeover,
            Route::Rewritten { origin, .. }
            | Route::Service { origin, .. }
            | Route::Socket { origin, .. } => *origin,
        };
        let addr = socket::local_name(fd.as_fd()).ok();
        let port = addr.map_or(0, |addr| addr.port());
        State {
            accept: Accept::Idle,
            addr,
            fate: Fate::Serves,
            fd: Some(fd),
            flows: 0,
            is_lent: false,
            loops: LoopWatch::new(),
            origin,
            place,
            port,
            proxy_protocol,
            rest: backlog,
            route,
            workload,
        }
    }

    /// For another worker's socket of the same address.
    pub(in crate::worker) fn lent(&self, fd: Arc<OwnedFd>, backlog: u32) -> State {
        let listener = Listener {
            fd,
            place: Arc::clone(&self.place),
            proxy_protocol: self.proxy_protocol,
            route: self.route.clone(),
            workload: Arc::clone(&self.workload),
        };
        State { is_lent: true, ..State::new(listener, backlog) }
    }

    pub(in crate::worker) const fn is_lent(&self) -> bool {
        self.is_lent
    }

    pub(in crate::worker) fn serves_at(&self, place: u32, addr: SocketAddr) -> bool {
        self.place.number == place
            && self.addr == Some(canonical(addr))
            && self.fate == Fate::Serves
    }

    /// Nothing will come of it any more, and no flow knows it.
    pub(super) fn is_vacant(&self) -> bool {
        self.accept == Accept::Over && self.flows == 0
    }

    /// Closing the socket makes the kernel refuse whoever comes later.
    pub(super) fn end(&mut self) {
        self.accept = Accept::Over;
        self.fd = None;
    }
}
