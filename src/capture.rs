// SPDX-License-Identifier: Apache-2.0
//! Placeholder for the types that the worker names.

use std::net::SocketAddr;

use crate::addr::{Downstream, OriginalDst};

/// Own ports.
#[derive(Debug, Default)]
pub struct OwnPorts {}

impl OwnPorts {
    /// Whether dialling `dst` would reach ourselves.
    #[must_use]
    pub fn forbids(&self, dst: SocketAddr) -> bool {
        let _ = dst;
        false
    }
}

/// What the connect hook recorded.
#[derive(Debug)]
pub struct Records {}

impl Records {
    /// Where this connection meant to go; forgets it.
    #[must_use]
    pub fn take(&self, downstream: Downstream) -> Option<OriginalDst> {
        let _ = downstream;
        None
    }
}
