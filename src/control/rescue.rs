// SPDX-License-Identifier: Apache-2.0
//! Connections that wait for a worker which does not turn are given to another one.
//!
//! The kernel spreads connections over the workers' sockets by a hash and knows nothing of how a worker
//! is: who falls on one that its host keeps from running (a real-time thread, a debugger, a page from a
//! slow disk) would wait as long as that lasts. Its open flows do; newcomers need not.

use std::time::{Duration, Instant};

use crate::worker::Handle;

/// All workers, as they were at the last look.
pub(super) struct Rescue {
    look_at: Instant,
    watched: Vec<Watched>,
}

#[derive(Clone, Default)]
struct Watched {
    enters: u64,
    /// Accepts for it.
    helper: Option<usize>,
    /// It has not turned since then, and somebody waits.
    stuck_since: Option<Instant>,
}

impl Rescue {
    pub(super) fn new(workers: usize) -> Rescue {
        Rescue { look_at: Instant::now(), watched: vec![Watched::default(); workers] }
    }

    /// As often as anybody likes.
    pub(super) fn look(&mut self, workers: &[Handle]) {
        let now = Instant::now();
        if now < self.look_at {
            return;
        }
        self.look_at = now + LOOK_EVERY;
        for (index, worker) in workers.iter().enumerate() {
            let Some(watched) = self.watched.get_mut(index) else { return };
            let enters = worker.counters().ring_enters.value();
            let turns = enters != std::mem::replace(&mut watched.enters, enters);
            // Who has paused does so on purpose.
            let is_stuck = !turns && worker.is_accepting() && worker.has_waiting();
            watched.stuck_since = is_stuck.then(|| watched.stuck_since.unwrap_or(now));
            if turns && let Some(helper) = watched.helper {
                if self.release(helper, workers) {
                    tracing::info!(worker = index, "it runs again");
                }
            } else if self.needs_help(index, now) {
                self.help(index, workers);
            }
        }
    }

    fn needs_help(&self, index: usize, now: Instant) -> bool {
        let watched = self.watched.get(index);
        let since = watched.and_then(|watched| watched.stuck_since);
        since.is_some_and(|since| now - since >= STUCK_AFTER)
    }

    /// By the next one that seems well. One that has helped before and left somebody waiting is not.
    fn help(&mut self, index: usize, workers: &[Handle]) {
        let (count, before) = (workers.len(), self.watched.get(index).and_then(|one| one.helper));
        let well = |at: &usize| {
            let is_well = |one: &Watched| one.helper.is_none() && one.stuck_since.is_none();
            Some(*at) != before && self.watched.get(*at).is_some_and(is_well)
        };
        let mut others = (1..count).map(|step| (index + step) % count).filter(well);
        let helper = others.find_map(|at| Some((at, workers.get(at)?)));
        let (Some((at, helper)), Some(worker)) = (helper, workers.get(index)) else { return };
        if before.is_some_and(|before| !self.release(before, workers)) || !helper.help(worker) {
            return;
        }
        if let Some(watched) = self.watched.get_mut(index) {
            (watched.helper, watched.stuck_since) = (Some(at), None);
        }
        worker.counters().stalls.add(1);
        tracing::warn!(
            worker = index,
            "it does not run, and connections wait for it: worker {at} takes them; its own flows stand \
             still (what keeps the thread weir-w{index} from its CPU?)"
        );
    }

    /// It accepts for itself only; whoever else it helped is found again. False if it must be asked again.
    fn release(&mut self, helper: usize, workers: &[Handle]) -> bool {
        let is_told = workers.get(helper).is_some_and(Handle::stop_helping);
        let helped = self.watched.iter_mut().filter(|one| is_told && one.helper == Some(helper));
        helped.for_each(|one| one.helper = None);
        is_told
    }
}

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Longer than a turn under any load; short enough for clients not to give up.
const STUCK_AFTER: Duration = Duration::from_millis(300);
