// SPDX-License-Identifier: Apache-2.0
//! Whether to look for work a little longer before sleeping.
//!
//! A sleeping vCPU costs tens of microseconds to wake, on both sides. Spinning pays only while
//! events come closer together than that; so the last waits decide, and a quiet ring sleeps.

use std::time::Duration;

/// Adaptive: spins only while recent waits were short.
#[derive(Debug)]
pub(super) struct Spin {
    /// Moving average of recent waits.
    wait: Duration,
    window: Duration,
}

impl Spin {
    pub(super) const fn new(window: Duration) -> Spin {
        Spin { wait: Duration::ZERO, window }
    }

    /// How long to spin now; `None` for not at all.
    pub(super) fn window(&self) -> Option<Duration> {
        (self.is_on() && self.wait <= self.window * WAIT_FACTOR).then_some(self.window)
    }

    /// Spinning is on at all.
    pub(super) const fn is_on(&self) -> bool {
        !self.window.is_zero()
    }

    /// A wait, spun or slept, took this long.
    pub(super) fn waited(&mut self, took: Duration) {
        let took = took.min(self.window * WAIT_FACTOR * 4);
        self.wait = (self.wait * 7 + took) / 8;
    }
}

/// A sleep that ends after this many windows includes the wake-up itself: spinning would have
/// found the event within about one window.
const WAIT_FACTOR: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spins_while_waits_are_short_and_sleeps_when_they_are_long() {
        let mut spin = Spin::new(Duration::from_micros(20));
        assert!(spin.window().is_some());
        (0..100).for_each(|_| spin.waited(Duration::from_millis(5)));
        assert_eq!(spin.window(), None);
        (0..100).for_each(|_| spin.waited(Duration::from_micros(30)));
        assert_eq!(spin.window(), Some(Duration::from_micros(20)));
        assert_eq!(Spin::new(Duration::ZERO).window(), None);
    }
}
