// SPDX-License-Identifier: Apache-2.0
//! What connection tracking means for weir: timers below its own, and losses said aloud.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::capture::{Plan, RuleCounts, conntrack_use};
use crate::profile::Profile;
use crate::sys::conntrack::{self, EntryLife};

/// What the rules and connection tracking counted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Counts {
    pub(super) dropped: u64,
    pub(super) rules: RuleCounts,
}

/// The same, for whoever scrapes.
#[derive(Debug, Default)]
pub(super) struct Counted {
    dropped: AtomicU64,
    looped: AtomicU64,
    no_room: AtomicU64,
    port_rewritten: AtomicU64,
}

/// The sum over every place that there is or was: a counter never goes back.
#[derive(Debug, Default)]
pub(super) struct Tally {
    gone: Counts,
}

/// Losses that were said already.
#[derive(Debug)]
pub(super) struct Losses {
    dropped: u64,
    no_room: u64,
    quiet_until: Instant,
}

/// A redirected flow must not outlive its entries: the next connection from the same port would meet
/// the old socket. Timers that would let it are lowered, and it is said.
pub(super) fn keep_below(profile: &mut Profile, plan: &Plan) {
    if !plan.redirects() {
        return;
    }
    let EntryLife { established, half_closed } = conntrack::entry_life();
    let timeouts = &mut profile.timeouts;
    let most = below(half_closed);
    if timeouts.half_closed > most {
        let (was, now) = (timeouts.half_closed.as_millis(), most.as_millis());
        tracing::warn!(
            "timeouts.half_closed_ms {was} is too long for redirect: {now} is used, because \
             connection tracking forgets half-closed connections after {} s \
             (net.netfilter.nf_conntrack_tcp_timeout_close_wait)",
            half_closed.as_secs()
        );
        timeouts.half_closed = most;
    }
    // Keepalive probes renew the entry of a flow that is merely silent.
    let renewed = profile.sockets.keepalive.is_some_and(|probes| probes.idle < below(established));
    let most = below(established);
    if !renewed && (timeouts.idle.is_zero() || timeouts.idle > most) {
        let (was, now) = (timeouts.idle.as_millis(), most.as_millis());
        tracing::warn!(
            "timeouts.idle_ms {was} is too long for redirect without keepalive: {now} is used, \
             because connection tracking forgets silent connections after {} s \
             (net.netfilter.nf_conntrack_tcp_timeout_established)",
            established.as_secs()
        );
        timeouts.idle = most;
    }
}

/// A timer that runs out before an entry of this life does.
fn below(life: Duration) -> Duration {
    life - MARGIN.min(life / 4)
}

impl Counts {
    /// With what connection tracking dropped in this network namespace.
    pub(super) fn read(rules: RuleCounts) -> Counts {
        Counts { dropped: conntrack::dropped_packets(), rules }
    }

    pub(super) const fn and(self, other: Counts) -> Counts {
        let (one, two) = (self.rules, other.rules);
        Counts {
            dropped: self.dropped + other.dropped,
            rules: RuleCounts {
                looped: one.looped + two.looped,
                no_room: one.no_room + two.no_room,
                port_rewritten: one.port_rewritten + two.port_rewritten,
            },
        }
    }
}

impl Tally {
    /// A place has gone, and had counted so far.
    pub(super) fn leave(&mut self, last: Counts) {
        self.gone = self.gone.and(last);
    }

    /// With what the places that are there have counted.
    pub(super) fn with(&self, living: impl Iterator<Item = Counts>) -> Counts {
        living.fold(self.gone, Counts::and)
    }
}

impl Counted {
    pub(super) fn set(&self, counts: Counts) {
        self.dropped.store(counts.dropped, Relaxed);
        self.looped.store(counts.rules.looped, Relaxed);
        self.no_room.store(counts.rules.no_room, Relaxed);
        self.port_rewritten.store(counts.rules.port_rewritten, Relaxed);
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            dropped: self.dropped.load(Relaxed),
            rules: RuleCounts {
                looped: self.looped.load(Relaxed),
                no_room: self.no_room.load(Relaxed),
                port_rewritten: self.port_rewritten.load(Relaxed),
            },
        }
    }
}

impl Losses {
    /// What was lost before us is not ours to say.
    pub(super) fn new() -> Losses {
        Losses { dropped: conntrack::dropped_packets(), no_room: 0, quiet_until: Instant::now() }
    }

    /// Says what was lost since it was last said, once a minute at most.
    pub(super) fn say(&mut self, workload: &str, plan: &Plan, counts: Counts) {
        if Instant::now() < self.quiet_until {
            return;
        }
        let Counts { dropped, rules: RuleCounts { no_room, .. } } = counts;
        if plan.redirects() && dropped > self.dropped {
            let entries_max = conntrack_use().map_or(0, |(_, most)| most);
            tracing::warn!(
                workload,
                packets = dropped - self.dropped,
                entries_max,
                "connection tracking is full: connections are lost (raise \
                 net.netfilter.nf_conntrack_max, or capture by tproxy or connect, which need no \
                 entries)"
            );
            self.quiet_until = Instant::now() + QUIET;
        }
        if no_room > self.no_room {
            tracing::warn!(
                workload,
                connections = no_room - self.no_room,
                "no room to remember more outbound flows: connections go directly (raise \
                 limits.flows_max)"
            );
            self.quiet_until = Instant::now() + QUIET;
        }
        (self.dropped, self.no_room) = (dropped, no_room);
    }
}

/// Between our timer and the entry's: timers tick, and packets take time.
const MARGIN: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_workload_that_left_had_counted_stays() {
        let of = |dropped| Counts { dropped, ..Counts::default() };
        let mut tally = Tally::default();
        assert_eq!(tally.with([of(3), of(4)].into_iter()), of(7));
        tally.leave(of(4));
        assert_eq!(tally.with([of(5)].into_iter()), of(9));
    }

    #[test]
    fn timer_runs_out_before_the_entry_does() {
        assert_eq!(below(Duration::from_secs(60)), Duration::from_secs(55));
        assert_eq!(below(Duration::from_secs(4)), Duration::from_secs(3));
    }
}
