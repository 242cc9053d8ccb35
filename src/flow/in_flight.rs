// SPDX-License-Identifier: Apache-2.0
//! What a flow has asked for and not yet heard of. Invariant: at most one request of each kind.

use crate::op::{Op, Request, Side};

/// The set of requests in flight.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct InFlight(u16);

impl InFlight {
    /// What may wait for a peer. The FIN, a descriptor and a step of a pipe never do.
    pub(super) const CANCELLABLE: [Request; 9] = [
        Request::Await(Side::Downstream),
        Request::Await(Side::Upstream),
        Request::Connect,
        Request::Receive(Side::Downstream),
        Request::Receive(Side::Upstream),
        Request::Send(Side::Downstream),
        Request::Send(Side::Upstream),
        Request::Watch(Side::Downstream),
        Request::Watch(Side::Upstream),
    ];

    const fn bit(request: Request) -> u16 {
        match request {
            Request::Connect => 1,
            Request::Receive(side) => 2 << side as u8,
            Request::Send(side) => 8 << side as u8,
            Request::Shutdown(side) => 32 << side as u8,
            Request::Await(side) => 128 << side as u8,
            Request::Install(side) => 512 << side as u8,
            Request::Splice(side) => 2048 << side as u8,
            Request::Watch(side) => 8192 << side as u8,
        }
    }

    pub(super) const fn contains(self, request: Request) -> bool {
        self.0 & InFlight::bit(request) != 0
    }

    pub(super) fn insert(&mut self, request: Request) {
        self.0 |= InFlight::bit(request);
    }

    pub(super) fn remove(&mut self, request: Request) {
        self.0 &= !InFlight::bit(request);
    }
}

impl Op {
    /// The request that this operation puts in flight.
    pub(super) const fn begins(self) -> Option<Request> {
        match self {
            Op::Await { from, .. } => Some(Request::Await(from)),
            Op::Connect => Some(Request::Connect),
            Op::Install(side) => Some(Request::Install(side)),
            Op::Receive { side, .. } => Some(Request::Receive(side)),
            Op::Send { from, .. } => Some(Request::Send(from)),
            Op::Shutdown(side) => Some(Request::Shutdown(side)),
            Op::Splice { from, .. } => Some(Request::Splice(from)),
            Op::Watch(side) => Some(Request::Watch(side)),
            Op::AwaitBuffers(_)
            | Op::AwaitDrained(_)
            | Op::Cancel(_)
            | Op::Close { .. }
            | Op::Join
            | Op::Pass(_)
            | Op::Uninstall => None,
        }
    }
}
