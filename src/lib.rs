// SPDX-License-Identifier: Apache-2.0
//! weir, the forwarding dataplane of a service mesh node.
//!
//! Modules in the order in which a connection meets them:
//!
//! ```text
//!              how it gets here   one per core:      what to do        how it
//!                                 the event loop     next              is done
//!  downstream ─▶ capture ───────▶ worker ──────────▶ flow ─────Op────▶ ring ─▶ upstream
//! ```
//!
//! A flow is pure: it answers completions with operations and touches no descriptor. The ring is
//! the only road to the kernel while bytes move. The control thread never makes a worker wait.

pub mod addr;
pub mod capture;
pub mod worker;

pub mod exchange;
pub mod flow;
pub mod op;
pub mod ring;
pub mod service;
pub mod wire;

pub mod bpf;
pub mod sys;

pub mod config;
pub mod metrics;
pub mod profile;
pub mod yaml;

#[cfg(feature = "control")]
pub mod cli;
#[cfg(feature = "control")]
pub mod control;
#[cfg(feature = "control")]
pub mod log;
#[cfg(feature = "control")]
pub mod takeover;
#[cfg(feature = "control")]
pub mod tune;
