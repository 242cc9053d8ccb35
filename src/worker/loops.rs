// SPDX-License-Identifier: Apache-2.0
//! Loops through others: of two weirs that point at each other, each dials what the other accepts,
//! and one connection comes round until nobody has room for more.
//!
//! Plain TCP carries nothing by which a connection could be known again. But in a loop each arrival is
//! the consequence of a dial of ours: who stops accepting, and so dialling, for a moment sees arrivals
//! stop, where those of clients would go on to come and wait. A listener that has got many more flows
//! is tested so, several times over, and the last proof is that nothing has ever come back on them. What
//! waits then is reset, and the reset goes all the way round.
//! Invariant: nobody is turned away on suspicion; until the test is over clients merely wait, for a
//! fraction of a second.

use std::os::fd::AsFd;
use std::time::Duration;

use super::turn::Worker;
use super::wheel::Clock;
use crate::op::{FlowId, Side};
use crate::sys::socket;

/// What is known of one listener.
#[derive(Clone, Debug)]
pub(super) struct LoopWatch {
    /// Connections since the worker began; wraps.
    arrived: u32,
    phase: Phase,
}

#[derive(Clone, Debug)]
enum Phase {
    /// Nothing is suspected as long as there are fewer flows.
    Calm { suspect_at: u32 },
    /// Arrivals are counted.
    Counting { began: Duration, from: u32, test: Test },
    /// It does not accept.
    Paused { test: Test, until: Duration, waiting_max: u32 },
    /// What arrives next has come round.
    Cutting { left: u32, until: Duration },
}

/// Since a test began.
#[derive(Clone, Copy, Debug)]
struct Test {
    arrived: u32,
    began: Duration,
    rounds: u32,
}

/// Every round of a test says that there is a loop.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Suspicion {
    arrived: u32,
    since: Duration,
    waiting: u32,
}

impl Worker {
    /// Looks at every listener; once a turn.
    pub(super) fn watch_loops(&mut self) {
        let now = self.clock.elapsed();
        for index in 0..self.listening.states.len() {
            let Some(state) = self.listening.states.get_mut(index) else { return };
            let (fd, flows) = (&state.fd, state.flows);
            let waiting =
                || fd.as_ref().and_then(|fd| socket::waiting(fd.as_fd()).ok()).unwrap_or(0);
            let Some(suspicion) = state.loops.look(now, flows, waiting) else { continue };
            let is_loop = self.silent(index, suspicion.since) >= most_of(suspicion.arrived);
            if let Some(state) = self.listening.states.get_mut(index) {
                state.loops.judge(is_loop, suspicion, now, flows);
            }
        }
    }

    /// Open flows of a listener that began since then, and on which nothing has come back.
    fn silent(&mut self, listener: usize, since: Duration) -> u32 {
        let since = Clock::ticks(since).saturating_sub(1);
        let mut count = 0;
        for slot in (0..self.slab.slots()).map(FlowId::new) {
            let Some(entry) = self.slab.entry(slot) else { continue };
            let is_silent =
                entry.flow.as_ref().is_some_and(|flow| flow.moved_bytes(Side::Upstream) == 0);
            let is_its = usize::from(entry.peers.listener) == listener;
            count += u32::from(is_silent && is_its && entry.times.opened >= since);
        }
        count
    }
}

impl LoopWatch {
    pub(super) const fn new() -> LoopWatch {
        LoopWatch { arrived: 0, phase: Phase::Calm { suspect_at: FLOWS_MIN } }
    }

    /// Counts a connection; true if it has come round.
    pub(super) const fn arrives(&mut self) -> bool {
        self.arrived = self.arrived.wrapping_add(1);
        match &mut self.phase {
            Phase::Cutting { left, .. } if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }

    pub(super) const fn is_paused(&self) -> bool {
        matches!(self.phase, Phase::Paused { .. })
    }

    /// How long nobody needs to look; `None` for ever.
    pub(super) fn patience(&self, now: Duration) -> Option<Duration> {
        match self.phase {
            Phase::Calm { .. } | Phase::Counting { .. } => None,
            Phase::Paused { until, .. } | Phase::Cutting { until, .. } => {
                Some(until.saturating_sub(now).max(PAUSE_MIN / 4))
            }
        }
    }

    fn look(
        &mut self,
        now: Duration,
        flows: u32,
        waiting: impl FnOnce() -> u32,
    ) -> Option<Suspicion> {
        let fresh = Test { arrived: self.arrived, began: now, rounds: 0 };
        match self.phase {
            Phase::Calm { suspect_at } if flows >= suspect_at => self.count(now, fresh),
            Phase::Counting { began, from, test } => {
                let took = now.saturating_sub(began);
                if self.arrived.wrapping_sub(from) >= ARRIVALS {
                    self.pause(now, took, test);
                } else if took > COUNT_WITHIN {
                    self.calm(flows);
                }
            }
            Phase::Paused { test, until, waiting_max } if now >= until => {
                let waiting = waiting();
                let rounds = test.rounds + 1;
                if waiting == 0 || waiting > waiting_max {
                    self.calm(flows);
                } else if rounds < ROUNDS {
                    self.count(now, Test { rounds, ..test });
                } else {
                    let arrived = self.arrived.wrapping_sub(test.arrived);
                    return Some(Suspicion { arrived, since: test.began, waiting });
                }
            }
            Phase::Cutting { left, until } if left == 0 || now >= until => self.calm(0),
            Phase::Calm { .. } | Phase::Paused { .. } | Phase::Cutting { .. } => {}
        }
        None
    }

    fn judge(&mut self, is_loop: bool, suspicion: Suspicion, now: Duration, flows: u32) {
        if is_loop {
            self.phase = Phase::Cutting { left: suspicion.waiting, until: now + CUT_WITHIN };
        } else {
            self.calm(flows);
        }
    }

    const fn calm(&mut self, flows: u32) {
        self.phase = Phase::Calm { suspect_at: flows.saturating_add(FLOWS_MIN) };
    }

    const fn count(&mut self, now: Duration, test: Test) {
        self.phase = Phase::Counting { began: now, from: self.arrived, test };
    }

    /// For a part of the time that the arrivals took: of those that are nobody's consequence, a
    /// quarter of what is to be expected comes in any case.
    fn pause(&mut self, now: Duration, took: Duration, test: Test) {
        let pause = (took / 4).clamp(PAUSE_MIN, PAUSE_MAX);
        let expected = u128::from(ARRIVALS) * pause.as_micros() / took.as_micros().max(1);
        let waiting_max = u32::try_from(expected / 4).unwrap_or(ARRIVALS).clamp(1, ARRIVALS);
        self.phase = Phase::Paused { test, until: now + pause, waiting_max };
    }
}

/// Of the connections that came during a test; some may be honest.
const fn most_of(count: u32) -> u32 {
    count - count / 4
}

/// More flows than at the last test before there is another one: a test costs clients a wait.
const FLOWS_MIN: u32 = 256;
/// Enough that a quarter of them in a pause is no chance.
const ARRIVALS: u32 = 128;
/// A loop that is slower needs minutes to do harm, and timeouts are at work.
const COUNT_WITHIN: Duration = Duration::from_secs(1);
/// Longer than a connection takes once round, on one host or a few.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// Chance does not repeat itself.
const ROUNDS: u32 = 3;
/// What waits is accepted within a turn.
const CUT_WITHIN: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of a test in which, for each dial, `caused` connections arrive at once, and others by
    /// themselves every so many microseconds.
    fn outcome(caused: bool, every_us: u64) -> Option<Suspicion> {
        let (mut watch, mut waiting, mut flows) = (LoopWatch::new(), 0, 0);
        let mut suspicion = None;
        for us in (0..4_000_000u64).step_by(50) {
            let comes = if every_us > 0 && us % every_us == 0 { 1 } else { 0 };
            let comes = comes + u32::from(caused && (!watch.is_paused() || waiting == 0));
            waiting += comes;
            if !watch.is_paused() {
                for _ in 0..std::mem::take(&mut waiting) {
                    watch.arrives();
                    flows += 1;
                }
            }
            suspicion = suspicion.or(watch.look(Duration::from_micros(us), flows, || waiting));
        }
        suspicion
    }

    #[test]
    fn arrivals_that_stop_with_our_dials_are_a_loop_and_others_are_none() {
        let suspicion = outcome(true, 0).expect("a loop is noticed");
        assert!(suspicion.arrived < ARRIVALS * (ROUNDS + 1) && suspicion.waiting == 1);
        assert!(outcome(true, 20_000).is_some(), "with others in between");
        for every_us in [50, 100, 1000, 5000, 20_000] {
            assert_eq!(outcome(false, every_us), None, "{every_us}");
        }
    }

    #[test]
    fn what_has_come_round_is_cut_and_no_more() {
        let mut watch = LoopWatch::new();
        let suspicion = Suspicion { arrived: 400, since: Duration::ZERO, waiting: 2 };
        watch.judge(true, suspicion, Duration::ZERO, 700);
        assert_eq!([watch.arrives(), watch.arrives(), watch.arrives()], [true, true, false]);
        watch.judge(false, suspicion, Duration::ZERO, 700);
        assert!(!watch.arrives() && !watch.is_paused());
    }
}
