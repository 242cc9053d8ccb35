// SPDX-License-Identifier: Apache-2.0
//! A flow: a pair of joined sockets, as a pure state machine.

pub use reason::CloseReason;

mod reason;
