// SPDX-License-Identifier: Apache-2.0
//! A hashed timer wheel: one timer a slot, set and cleared in constant time.
//!
//! Coarse on purpose: a tick is 16 ms, and a timer may run out up to a tick late, never early.
//! Longer timers than one turn of the wheel are looked at once a turn. Allocates nothing after
//! start.

use std::time::{Duration, Instant};

/// One timer for each of a fixed number of slots.
#[derive(Debug)]
pub(super) struct Wheel {
    heads: Box<[u32]>,
    links: Vec<Link>,
    /// The last tick that was looked at.
    looked_at: u32,
    /// One bit a bucket: it holds a timer.
    occupied: [u64; BUCKETS / 64],
}

/// Ticks since the worker began; wraps after two years.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    began: Instant,
    elapsed: Duration,
    now: u32,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    deadline: u32,
    next: u32,
    previous: u32,
}

impl Clock {
    pub(super) fn start() -> Clock {
        Clock { began: Instant::now(), elapsed: Duration::ZERO, now: 0 }
    }

    /// Reads the clock; once a turn.
    pub(super) fn read(&mut self) {
        self.elapsed = self.began.elapsed();
        let ticks = self.elapsed.as_millis() / u128::from(TICK_MS);
        self.now = u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or(0);
    }

    pub(super) const fn now(&self) -> u32 {
        self.now
    }

    /// Since the worker began, finer than in ticks.
    pub(super) const fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// The same as an instant, a tick behind at most.
    pub(super) fn instant(&self) -> Instant {
        self.began + Clock::span(self.now)
    }

    /// Ticks that last at least as long as `span`.
    pub(super) fn ticks(span: Duration) -> u32 {
        let ticks = span.as_millis().div_ceil(u128::from(TICK_MS));
        u32::try_from(ticks).unwrap_or(TICKS_MAX).clamp(1, TICKS_MAX)
    }

    /// How long `ticks` last.
    pub(super) fn span(ticks: u32) -> Duration {
        Duration::from_millis(u64::from(ticks) * TICK_MS)
    }
}

impl Wheel {
    /// For slots below `slots`.
    pub(super) fn new(slots: u32) -> Wheel {
        Wheel {
            heads: vec![NONE; BUCKETS].into_boxed_slice(),
            links: Vec::with_capacity(slots as usize),
            looked_at: 0,
            occupied: [0; BUCKETS / 64],
        }
    }

    /// Sets the timer of `slot` to run out at `deadline`; replaces the one that was set. One that lies
    /// in the past runs out at the next look: its own bucket would be looked at a turn later.
    pub(super) fn set(&mut self, slot: u32, deadline: u32) {
        let next = self.looked_at.wrapping_add(1);
        let is_late = deadline.wrapping_sub(next).cast_signed() < 0;
        let deadline = if is_late { next } else { deadline };
        self.clear(slot);
        while self.links.len() <= slot as usize {
            self.links.push(Link::UNSET);
        }
        let bucket = bucket(deadline);
        let Some(head) = self.heads.get_mut(bucket) else { return };
        let next = std::mem::replace(head, slot);
        if let Some(link) = self.links.get_mut(slot as usize) {
            *link = Link { deadline, next, previous: NONE };
        }
        if let Some(link) = self.links.get_mut(next as usize) {
            link.previous = slot;
        }
        self.mark(bucket, true);
    }

    /// Clears the timer of `slot`, if one is set.
    pub(super) fn clear(&mut self, slot: u32) {
        let Some(link) = self.links.get_mut(slot as usize) else { return };
        let Link { deadline, next, previous } = std::mem::replace(link, Link::UNSET);
        if previous == UNSET {
            return;
        }
        if let Some(link) = self.links.get_mut(next as usize) {
            link.previous = previous;
        }
        if let Some(link) = self.links.get_mut(previous as usize) {
            link.next = next;
        } else if let Some(head) = self.heads.get_mut(bucket(deadline)) {
            *head = next;
            if next == NONE {
                self.mark(bucket(deadline), false);
            }
        }
    }

    /// A slot whose timer has run out, cleared; call until `None`.
    pub(super) fn expired(&mut self, now: u32) -> Option<u32> {
        while now.wrapping_sub(self.looked_at).cast_signed() >= 0 {
            let mut slot = self.heads.get(bucket(self.looked_at)).copied().unwrap_or(NONE);
            while let Some(link) = self.links.get(slot as usize) {
                if now.wrapping_sub(link.deadline).cast_signed() >= 0 {
                    self.clear(slot);
                    return Some(slot);
                }
                slot = link.next;
            }
            if self.looked_at == now {
                return None;
            }
            self.looked_at = self.looked_at.wrapping_add(1);
        }
        None
    }

    /// Ticks from `now` until a timer may run out; `None` when none is set.
    pub(super) fn next(&self, now: u32) -> Option<u32> {
        let start = bucket(now);
        for step in 0..=self.occupied.len() {
            let index = (start / 64 + step) % self.occupied.len();
            let mut word = self.occupied.get(index).copied().unwrap_or(0);
            if step == 0 {
                word &= u64::MAX << (start % 64);
            }
            if word != 0 {
                let found = index * 64 + word.trailing_zeros() as usize;
                let ahead = (found + BUCKETS - start) % BUCKETS;
                return u32::try_from(ahead).ok().map(|ticks| ticks.max(1));
            }
        }
        None
    }

    fn mark(&mut self, bucket: usize, on: bool) {
        if let Some(word) = self.occupied.get_mut(bucket / 64) {
            let bit = 1 << (bucket % 64);
            *word = if on { *word | bit } else { *word & !bit };
        }
    }
}

impl Link {
    const UNSET: Link = Link { deadline: 0, next: NONE, previous: UNSET };
}

const fn bucket(tick: u32) -> usize {
    tick as usize % BUCKETS
}

/// Length of a tick; bounds how late a timer can be.
const TICK_MS: u64 = 16;
/// The longest timer, a year: keeps `now - deadline` well inside an `i32`.
const TICKS_MAX: u32 = 365 * 24 * 3600 / 16 * 1000;
/// One turn of the wheel takes 16 s; a longer timer is looked at once a turn.
const BUCKETS: usize = 1024;
/// No slot.
const NONE: u32 = u32::MAX;
/// The timer is not set.
const UNSET: u32 = u32::MAX - 1;

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;

    /// One turn of the wheel, in ticks.
    const TURN: u32 = 1024;

    fn drain(wheel: &mut Wheel, now: u32) -> Vec<u32> {
        let mut slots: Vec<u32> = std::iter::from_fn(|| wheel.expired(now)).collect();
        slots.sort_unstable();
        slots
    }

    #[test]
    fn runs_out_at_its_tick_and_not_before() {
        let mut wheel = Wheel::new(8);
        wheel.set(3, 10);
        wheel.set(4, 10);
        wheel.set(5, 10 + TURN);
        wheel.clear(4);
        assert_eq!(wheel.next(0), Some(10));
        assert_eq!(drain(&mut wheel, 9), Vec::<u32>::new());
        assert_eq!(drain(&mut wheel, 10), [3]);
        assert_eq!(drain(&mut wheel, 9 + TURN), Vec::<u32>::new());
        assert_eq!(drain(&mut wheel, 10 + TURN), [5]);
        assert_eq!(wheel.next(2000), None);
    }

    #[test]
    fn set_in_the_past_it_runs_out_at_the_next_tick() {
        let mut wheel = Wheel::new(8);
        assert_eq!(drain(&mut wheel, 500), Vec::<u32>::new());
        wheel.set(3, 100);
        assert_eq!(wheel.next(500), Some(1));
        assert_eq!(drain(&mut wheel, 501), [3]);
    }

    #[test]
    fn agrees_with_a_list_of_deadlines() {
        let mut random = 7u32;
        let mut next = |below: u32| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 8) % below
        };
        let mut wheel = Wheel::new(64);
        let mut model = [None; 64];
        let mut now = 0;
        for _ in 0..20_000 {
            let slot = next(64);
            match next(4) {
                0 => {
                    wheel.clear(slot);
                    model[slot as usize] = None;
                }
                1 => now += next(40),
                _ => {
                    let deadline = now + 1 + next(3000);
                    wheel.set(slot, deadline);
                    model[slot as usize] = Some(deadline);
                }
            }
            let due: Vec<u32> = (0..64)
                .filter(|slot| model[*slot as usize].is_some_and(|deadline| deadline <= now))
                .collect();
            due.iter().for_each(|slot| model[*slot as usize] = None);
            assert_eq!(drain(&mut wheel, now), due);
        }
    }
}
