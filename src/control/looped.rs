// SPDX-License-Identifier: Apache-2.0
//! Loops through others, said aloud: workers notice and end them.

use std::time::{Duration, Instant};

use crate::metrics::Denied;
use crate::worker::Handle;

/// Connections that came round, and when that may be said again.
pub(super) struct Looped {
    quiet_until: Instant,
    told: u64,
}

impl Looped {
    pub(super) fn new() -> Looped {
        Looped { quiet_until: Instant::now(), told: 0 }
    }

    /// What is new, once a minute at most: whoever connects makes it happen.
    pub(super) fn say(&mut self, workers: &[Handle]) {
        let count = |worker: &Handle| worker.counters().denied[Denied::Looped as usize].value();
        let count: u64 = workers.iter().map(count).sum();
        if count == self.told || Instant::now() < self.quiet_until {
            return;
        }
        tracing::warn!(
            connections = count - self.told,
            "a loop through others: what weir dials for a listener comes back to it, and is reset (see \
             to where its endpoint, or the destination that it captures, leads in the end: another weir \
             or a balancer may point here)"
        );
        (self.told, self.quiet_until) = (count, Instant::now() + QUIET);
    }
}

const QUIET: Duration = Duration::from_mins(1);
