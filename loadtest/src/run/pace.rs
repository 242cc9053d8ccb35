// SPDX-License-Identifier: Apache-2.0
//! When exchanges of an open loop are due.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A steady rate; what was due and could not be begun yet waits in line.
pub(super) struct Pace {
    line: VecDeque<Instant>,
    /// Those due since `start`, in the line or begun.
    number: u64,
    per_second: f64,
    start: Instant,
}

impl Pace {
    pub(super) fn new(per_second: f64, now: Instant) -> Pace {
        Pace { line: VecDeque::new(), number: 0, per_second, start: now }
    }

    /// Forgets what waits.
    pub(super) fn restart(&mut self, now: Instant) {
        *self = Pace::new(self.per_second, now);
    }

    /// When the next one is due that does not wait yet.
    #[expect(clippy::cast_precision_loss, reason = "numbers stay far below 2^52")]
    pub(super) fn next(&self) -> Instant {
        self.start + Duration::from_secs_f64(self.number as f64 / self.per_second)
    }

    /// Lines up what is due. The line is bounded: nobody gets through any more when it is full.
    pub(super) fn line_up(&mut self, now: Instant) {
        while self.line.len() < LINE_MAX && self.next() <= now {
            self.line.push_back(self.next());
            self.number += 1;
        }
    }

    /// When the first in line was due.
    pub(super) fn take(&mut self) -> Option<Instant> {
        self.line.pop_front()
    }

    pub(super) fn waiting(&self) -> usize {
        self.line.len()
    }
}

const LINE_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Pace;

    #[test]
    fn a_stall_does_not_move_when_exchanges_were_due() {
        let start = Instant::now();
        let mut pace = Pace::new(1000.0, start);
        pace.line_up(start + Duration::from_millis(5));
        let due = (0..6).map(|millis| Some(start + Duration::from_millis(millis)));
        assert!(due.eq((0..6).map(|_| pace.take())));
        assert_eq!(pace.take(), None);
        assert_eq!(pace.next(), start + Duration::from_millis(6));
    }
}
