// SPDX-License-Identifier: Apache-2.0
//! The sockmap relay at start: loaded for each worker, tried once, and only then trusted.

use super::RunError;
use crate::bpf::sockmap::{Sockmap, SockmapError};
use crate::profile::{Profile, RelayMode};
use crate::ring::Fallback;

/// What workers get, and what is to be said about it.
#[derive(Debug, Default)]
pub(super) struct Forwarding {
    /// The relay was to be used where it serves, and cannot be.
    pub(super) fallback: Option<Fallback>,
    /// One for each worker, or none.
    pub(super) sockmaps: Vec<Sockmap>,
}

impl Forwarding {
    /// As the profile asks. A relay named by the user runs or is refused; only `auto` falls back.
    pub(super) fn prepare(
        profile: &Profile,
        flows_max: u32,
        workers: usize,
    ) -> Result<Forwarding, RunError> {
        let mode = profile.relay.mode;
        let wanted = match mode {
            RelayMode::Auto => profile.relay.sockmap_after_messages > 0,
            RelayMode::Sockmap => true,
            _ => false,
        };
        if !wanted || flows_max == 0 {
            return Ok(Forwarding::default());
        }
        match load(profile.relay.sockmap_credit_bytes, flows_max, workers) {
            Ok(sockmaps) => Ok(Forwarding { fallback: None, sockmaps }),
            Err(error) if mode == RelayMode::Sockmap => Err(RunError::Sockmap(error)),
            Err(error) => {
                tracing::warn!(%error, "small messages go through user space, relay sockmap is off");
                let fallback = Fallback { from: "sockmap", since: "6.16", to: "copy" };
                Ok(Forwarding { fallback: Some(fallback), sockmaps: Vec::new() })
            }
        }
    }
}

/// What `weir check` asks: with more bytes than a start has time for.
pub(super) fn prove() -> Result<(), SockmapError> {
    let mut sockmap = Sockmap::load(1, Profile::default().relay.sockmap_credit_bytes)?;
    Ok(sockmap.prove(CHECK_BYTES)?)
}

fn load(credit_bytes: u32, flows: u32, workers: usize) -> Result<Vec<Sockmap>, SockmapError> {
    let load = |_| Sockmap::load(flows, credit_bytes);
    let mut all = (0..workers).map(load).collect::<Result<Vec<_>, _>>()?;
    if let Some(first) = all.first_mut() {
        first.prove(START_BYTES)?;
    }
    Ok(all)
}

/// Each way, in each of four cases; see `Sockmap::prove`.
const START_BYTES: u64 = 256 << 10;
const CHECK_BYTES: u64 = 100 << 20;
