// SPDX-License-Identifier: Apache-2.0
//! Counters: written by one worker each, summed by whoever scrapes.
//!
//! A counter has one writer, so adding is a relaxed load and store: no locked instruction, no
//! sharing of cache lines between workers. Never named per address: bounded cardinality.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::op::{CloseReason, Fall, Relay, Side};

/// A number that only its worker changes.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; call it only from the owning worker.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Takes away; for gauges. Call it only from the owning worker.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }

    /// The value just now.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Sets a gauge; call it only from the owning worker.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }
}

/// How a flow came to weir: label values `direction` and `capture`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Origin {
    /// A plain listener.
    Forward,
    /// Inbound, nft REDIRECT.
    InboundRedirect,
    /// Inbound, from the service registry.
    InboundTakeover,
    /// Inbound, nft TPROXY.
    InboundTproxy,
    /// Outbound, eBPF hook on `connect()`.
    OutboundConnect,
    /// Outbound, nft REDIRECT.
    OutboundRedirect,
    /// Outbound, from the service registry.
    OutboundTakeover,
    /// Outbound, nft TPROXY over loopback.
    OutboundTproxy,
}

impl Origin {
    /// From a workload, to somewhere else.
    #[must_use]
    pub const fn is_outbound(self) -> bool {
        matches!(
            self,
            Origin::OutboundConnect
                | Origin::OutboundRedirect
                | Origin::OutboundTakeover
                | Origin::OutboundTproxy
        )
    }

    /// Every value, in the order of the discriminants.
    pub const ALL: [Origin; 8] = [
        Origin::Forward,
        Origin::InboundRedirect,
        Origin::InboundTakeover,
        Origin::InboundTproxy,
        Origin::OutboundConnect,
        Origin::OutboundRedirect,
        Origin::OutboundTakeover,
        Origin::OutboundTproxy,
    ];

    /// The `direction` label.
    #[must_use]
    pub const fn direction(self) -> &'static str {
        match self {
            Origin::Forward => "forward",
            Origin::InboundRedirect | Origin::InboundTakeover | Origin::InboundTproxy => "inbound",
            _ => "outbound",
        }
    }

    /// The `capture` label.
    #[must_use]
    pub const fn capture(self) -> &'static str {
        match self {
            Origin::Forward => "none",
            Origin::InboundRedirect | Origin::OutboundRedirect => "redirect",
            Origin::InboundTproxy | Origin::OutboundTproxy => "tproxy",
            Origin::OutboundConnect => "connect",
            Origin::InboundTakeover | Origin::OutboundTakeover => "takeover",
        }
    }
}

/// Why a connection was turned away before it became a flow: label `reason` of `weir_denied_total`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Denied {
    /// Dialled straight to a capture port.
    Direct,
    /// It has gone round, from us to others and back.
    Looped,
    /// The workload's network namespace cannot be entered.
    Namespace,
    /// The service has no endpoint that may be dialled.
    NoEndpoint,
    /// The client did not say in time what it wants.
    NoRequest,
    /// The destination is one of our own ports: it would loop.
    OwnPort,
    /// Too many flows from one address.
    SourceLimit,
    /// No port is free to dial from.
    SourcePorts,
    /// Nobody recorded where it meant to go.
    UnknownDestination,
    /// What the client said names no service that is known here.
    UnknownService,
}

impl Denied {
    /// Every value, in the order of the discriminants.
    pub const ALL: [Denied; 10] = [
        Denied::Direct,
        Denied::Looped,
        Denied::Namespace,
        Denied::NoEndpoint,
        Denied::NoRequest,
        Denied::OwnPort,
        Denied::SourceLimit,
        Denied::SourcePorts,
        Denied::UnknownDestination,
        Denied::UnknownService,
    ];

    /// The label value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Denied::Direct => "direct",
            Denied::Looped => "looped",
            Denied::Namespace => "namespace",
            Denied::NoEndpoint => "no_endpoint",
            Denied::NoRequest => "no_request",
            Denied::OwnPort => "own_port",
            Denied::SourceLimit => "source_limit",
            Denied::SourcePorts => "source_ports",
            Denied::UnknownDestination => "unknown_destination",
            Denied::UnknownService => "unknown_service",
        }
    }
}

/// What became of a request on the shared outbound port: label `outcome` of `weir_requests_total`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Outcome {
    /// Its service has answered.
    Answered,
    /// It could not be read.
    Bad,
    /// Its upstream was lost before the answer.
    Broken,
    /// No endpoint of its service could be reached.
    NoEndpoint,
    /// It was passed on, and wants no answer.
    OneWay,
    /// Its connection belongs to another service (HTTP/2): it ends, rather than reach the wrong one.
    OtherService,
    /// Too many upstreams at once for its connection.
    Overload,
    /// No answer came in time.
    Timeout,
    /// Its service is not known here.
    UnknownService,
}

impl Outcome {
    /// Every value, in the order of the discriminants.
    pub const ALL: [Outcome; 9] = [
        Outcome::Answered,
        Outcome::Bad,
        Outcome::Broken,
        Outcome::NoEndpoint,
        Outcome::OneWay,
        Outcome::OtherService,
        Outcome::Overload,
        Outcome::Timeout,
        Outcome::UnknownService,
    ];

    /// The label value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Outcome::Answered => "answered",
            Outcome::Bad => "bad",
            Outcome::Broken => "broken",
            Outcome::NoEndpoint => "no_endpoint",
            Outcome::OneWay => "one_way",
            Outcome::OtherService => "other_service",
            Outcome::Overload => "overload",
            Outcome::Timeout => "timeout",
            Outcome::UnknownService => "unknown_service",
        }
    }
}

/// One worker's counters. Shared with the control thread, which only reads, but for `stalls`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Times accept was paused: descriptors, flow table or pending connects ran out.
    pub accept_paused: Counter,
    /// Times a pool was empty and a direction had to wait.
    pub buffers_exhausted: Counter,
    /// Bytes read from downstream and handed to upstream, by relay and origin.
    pub bytes_to_upstream: [[Counter; Origin::ALL.len()]; Relay::COUNT],
    /// Bytes read from upstream and handed to downstream, by relay and origin.
    pub bytes_to_downstream: [[Counter; Origin::ALL.len()]; Relay::COUNT],
    /// Completions of an earlier life of a slot, dropped.
    pub completions_stale: Counter,
    /// Connections turned away, by reason.
    pub denied: [Counter; Denied::ALL.len()],
    /// Connects that failed and were made again to another endpoint.
    pub connects_retried: Counter,
    /// Times an endpoint that could not be reached was put out of use.
    pub endpoints_ejected: Counter,
    /// Times a direction could not be spliced, or no more, by reason.
    pub falls: [Counter; Fall::COUNT],
    /// Flows open now.
    pub flows_active: Counter,
    /// Flows that ended, by reason.
    pub flows_closed: [Counter; CloseReason::COUNT],
    /// Flows that began, by origin.
    pub flows_opened: [Counter; Origin::ALL.len()],
    /// Times a direction changed its relay, by the one it took.
    pub relay_changes: [Counter; Relay::COUNT],
    /// Requests of the shared outbound port, by what became of them.
    pub requests: [Counter; Outcome::ALL.len()],
    /// `io_uring_enter` calls.
    pub ring_enters: Counter,
    /// Completions handled.
    pub ring_completions: Counter,
    /// Turns that found the completion queue full.
    pub ring_overflows: Counter,
    /// Times the worker did not turn while connections waited, and another one took them.
    pub stalls: Counter,
}

impl Counters {
    /// Counts bytes read from `from` that were handed to the other side's socket.
    pub fn moved(&self, origin: Origin, from: Side, relay: Relay, bytes: u64) {
        let by_relay = match from {
            Side::Downstream => &self.bytes_to_upstream,
            Side::Upstream => &self.bytes_to_downstream,
        };
        if let Some(counter) = by_relay.get(relay as usize).and_then(|all| all.get(origin as usize))
        {
            counter.add(bytes);
        }
    }

    /// Bytes handed to sockets so far, in all relays.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let all = self.bytes_to_upstream.iter().chain(&self.bytes_to_downstream);
        all.flatten().map(Counter::value).sum()
    }

    /// Counts that a direction has changed its relay, if it has.
    pub fn changed(&self, before: Relay, after: Relay) {
        if let Some(counter) = self.relay_changes.get(after as usize).filter(|_| before != after) {
            counter.add(1);
        }
    }

    /// Counts why a direction could not be spliced, or no more.
    pub fn fell(&self, fall: Option<Fall>) {
        if let Some(counter) = fall.and_then(|fall| self.falls.get(fall as usize)) {
            counter.add(1);
        }
    }
}
