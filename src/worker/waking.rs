// SPDX-License-Identifier: Apache-2.0
//! Whether the worker is woken for what comes: then the kernel serves small talk better.
//!
//! What the kernel forwards costs it one of its own threads, twice for each exchange; what it spares
//! is the worker's sleep and waking in between, tens of microseconds each. A worker that is busy, or
//! that spins until the next message, does not sleep: it takes what has come together, and is faster
//! than the kernel. So a flow is given to the kernel only where waking is most of its cost. Pure.

/// What was counted, up to the last sample.
#[derive(Debug, Default)]
pub(super) struct Waking {
    completions: u64,
    is_often: bool,
    sleeps: u64,
}

impl Waking {
    /// Whether it is now; both counts only grow.
    pub(super) fn judge(&mut self, completions: u64, sleeps: u64) -> bool {
        let came = completions - self.completions;
        if came >= SAMPLE_COMPLETIONS {
            self.is_often = (sleeps - self.sleeps) * COMPLETIONS_PER_SLEEP_MAX >= came;
            (self.completions, self.sleeps) = (completions, sleeps);
        }
        self.is_often
    }
}

/// Sixty-four exchanges through copy.
const SAMPLE_COMPLETIONS: u64 = 256;
/// An exchange has four: so it is a worker that sleeps before every second exchange, or more often.
const COMPLETIONS_PER_SLEEP_MAX: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_that_sleeps_for_each_message_is_told_from_one_that_does_not() {
        let mut waking = Waking::default();
        assert!(!waking.judge(255, 200), "nothing is known yet");
        assert!(waking.judge(512, 256), "one connection, which waits for each answer");
        assert!(waking.judge(600, 256), "the last sample holds until the next is full");
        assert!(!waking.judge(1024, 300), "many connections: a dozen completions each time");
        assert!(waking.judge(1280, 332));
    }
}
