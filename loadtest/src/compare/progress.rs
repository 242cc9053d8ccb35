// SPDX-License-Identifier: Apache-2.0
//! How far a comparison is and how long it still takes, as a bar or, where nobody sees one, in lines.
//!
//! Only measuring tells how long measuring takes: a wait for calm moments is over when it is over, and
//! says nothing of the next one. What waits and repeats may take is bounded by the budget.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

/// Told at every step, shown all the time.
pub(super) struct Progress {
    bar: ProgressBar,
    began: Instant,
    /// When it ends as far as is known, in milliseconds from the beginning; the bar counts down to it.
    end_ms: Arc<AtomicU64>,
    forecast: Forecast,
    /// A wait was told since the last line.
    is_wait_told: bool,
    left: Left,
    /// After that nothing is waited for and nothing measured again.
    until: Instant,
}

/// Measurements that are still to do.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Left {
    /// Of what was disturbed: as long as there is time.
    pub(super) again: u32,
    /// Of what was not measured yet: in any case.
    pub(super) first: u32,
}

/// Time by what was measured so far.
#[derive(Clone, Copy, Debug)]
struct Forecast {
    done: u32,
    /// A guess that serves until something was measured.
    each: Duration,
    spent: Duration,
}

impl Progress {
    pub(super) fn new(steps: u32, each: Duration, until: Instant) -> Progress {
        let end_ms = Arc::new(AtomicU64::new(0));
        let (began, end) = (Instant::now(), end_ms.clone());
        let left = move |_: &ProgressState, text: &mut dyn std::fmt::Write| {
            let end = began + Duration::from_millis(end.load(Ordering::Relaxed));
            // Who cannot be written to is not looked at.
            let _ = text.write_str(&shown(end.saturating_duration_since(Instant::now())));
        };
        let bar = ProgressBar::new(steps.into());
        // The template is a constant, and right.
        if let Ok(style) = ProgressStyle::with_template(SHAPE) {
            bar.set_style(style.with_key("left", left));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        let forecast = Forecast { done: 0, each, spent: Duration::ZERO };
        let left = Left { again: 0, first: steps };
        Progress { bar, began, end_ms, forecast, is_wait_told: false, left, until }
    }

    /// Something is about to be measured, the first of what is left.
    pub(super) fn begin(&mut self, left: Left) {
        self.left = left;
        self.bar.set_length(u64::from(self.forecast.done + left.first + left.again));
        self.expect();
    }

    /// It is being measured.
    pub(super) fn say(&self, what: String) {
        self.bar.set_message(what);
    }

    /// How long may be waited, so that there is still time for all that has to be measured.
    pub(super) fn patience(&self) -> Duration {
        self.budget().saturating_sub(self.forecast.of(self.left.first))
    }

    /// The CPUs are far from each other; a line if that lasts and nobody sees the bar.
    pub(super) fn wait(&mut self, since: Instant) {
        self.bar.set_message(WAITING);
        self.expect();
        if since.elapsed() > WAIT_TOLD_AFTER && !self.is_wait_told && self.bar.is_hidden() {
            self.is_wait_told = true;
            eprintln!("{WAITING}, {} at most", shown(self.patience()));
        }
    }

    /// One more was measured in that time; where nobody sees the bar, a line for every tenth.
    pub(super) fn step(&mut self, took: Duration) {
        match &mut self.left {
            Left { first: 0, again } => *again = again.saturating_sub(1),
            Left { first, .. } => *first -= 1,
        }
        self.forecast.done += 1;
        self.forecast.spent += took;
        self.bar.inc(1);
        self.expect();
        let (done, all) = (self.bar.position(), self.bar.length().unwrap_or(1).max(1));
        if self.bar.is_hidden() && done * 10 / all != (done - 1) * 10 / all {
            self.is_wait_told = false;
            let left = shown(self.forecast.left(self.left, self.budget()));
            eprintln!("{done} of {all} measured, about {left} left");
        }
    }

    /// Measurements that were done, repeated ones included.
    pub(super) const fn done(&self) -> u32 {
        self.forecast.done
    }

    pub(super) fn warn(&self, text: &str) {
        self.bar.suspend(|| eprintln!("warning: {text}"));
    }

    fn expect(&self) {
        let end = self.began.elapsed() + self.forecast.left(self.left, self.budget());
        self.end_ms.store(u64::try_from(end.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn budget(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Forecast {
    /// What so many measurements take.
    fn of(&self, steps: u32) -> Duration {
        let each = self.spent.checked_div(self.done).unwrap_or(self.each);
        each.saturating_mul(steps)
    }

    /// Of what was not measured yet as much will be disturbed as of what was.
    fn left(&self, Left { again, first }: Left, budget: Duration) -> Duration {
        let again = again + again.saturating_mul(first).checked_div(self.done).unwrap_or(0);
        let must = self.of(first);
        (must + self.of(again)).min(budget.max(must))
    }
}

/// As people say it.
fn shown(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..=MINUTES_FROM => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}

const MINUTES_FROM: u64 = 180;
const SHAPE: &str = "{wide_bar} {pos}/{len}  {msg}  about {left} left";
const WAITING: &str = "waiting for the CPUs to be near each other";
/// Shorter waits are not worth a line.
const WAIT_TOLD_AFTER: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Forecast, Left, Progress, shown};

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn time_left_is_that_of_measuring_and_no_more_than_the_budget() {
        let none = Forecast { done: 0, each: seconds(1), spent: Duration::ZERO };
        let some = Forecast { done: 10, spent: seconds(20), ..none };
        for (forecast, first, again, budget, left) in [
            (none, 100, 0, 170, 100), // A guess, as long as nothing is known.
            (some, 50, 0, 170, 100),
            (some, 50, 2, 170, 124), // Two of the first ten, so ten more of fifty.
            (some, 50, 50, 170, 170), // Repeats end with the budget,
            (some, 50, 50, 30, 100), // what was never measured does not.
            (some, 0, 50, 30, 30),
            (some, 0, 0, 30, 0),
        ] {
            let known = forecast.left(Left { again, first }, seconds(budget));
            assert_eq!(known, seconds(left), "{forecast:?} {first} {again} {budget}");
        }
    }

    #[test]
    fn a_wait_moves_the_end_once_and_leaves_time_for_what_must_be_measured() {
        let mut progress = Progress::new(10, seconds(2), Instant::now() + seconds(60));
        let patience = progress.patience();
        assert!(patience > seconds(39) && patience <= seconds(40), "{patience:?}");
        // However long a wait was, only what was measured counts.
        progress.wait(Instant::now());
        progress.step(seconds(4));
        let patience = progress.patience();
        assert!(patience > seconds(23) && patience <= seconds(24), "{patience:?}");
        progress.begin(Left { again: 0, first: 100 });
        assert!(progress.patience().is_zero());
    }

    #[test]
    fn minutes_are_said_where_seconds_say_too_much() {
        assert_eq!(shown(Duration::from_millis(900)), "0 s");
        assert_eq!(shown(seconds(180)), "180 s");
        assert_eq!(shown(seconds(181)), "4 min");
    }
}
