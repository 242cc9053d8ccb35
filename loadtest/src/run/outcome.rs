// SPDX-License-Identifier: Apache-2.0
//! What came of a load: counts, latencies, errors by kind, and how they went over time.
//!
//! Latencies are nanoseconds inside, microseconds outside. Nothing counts before `begin`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::steal::Steal;
use crate::compare::statistics::median;
use crate::watch::Watched;

/// Counts while a load runs.
pub(crate) struct Recorder {
    began: Option<Instant>,
    bytes: u64,
    done: u64,
    errors: [u64; ErrorKind::ALL.len()],
    interval: Histogram<u64>,
    interval_bytes: u64,
    interval_done: u64,
    interval_errors: u64,
    interval_until: Instant,
    intervals: Vec<Interval>,
    latency: Histogram<u64>,
    steal: Steal,
    took: Duration,
}

/// What went wrong with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ErrorKind {
    /// The answer was not what was sent.
    Corrupted,
    /// FIN came where an answer was due.
    Ended,
    /// Any other errno.
    Other,
    /// No socket or no source port was left.
    OutOfPorts,
    /// Nobody listens.
    Refused,
    /// RST.
    Reset,
    /// No answer in time.
    TimedOut,
    /// Not the protocol that was expected.
    Unknown,
}

/// The outcome, as it is printed.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Outcome {
    /// What of an open loop was due at the end and not done.
    pub(crate) behind: u64,
    pub(crate) bytes_per_second: f64,
    /// Of the stretches in which the CPUs were ours.
    #[serde(default)]
    pub(crate) calm: Calm,
    pub(crate) connections: usize,
    pub(crate) engine: String,
    pub(crate) errors: u64,
    pub(crate) errors_by_kind: BTreeMap<String, u64>,
    pub(crate) generator: Generator,
    pub(crate) interrupted: bool,
    pub(crate) intervals: Vec<Interval>,
    pub(crate) kind: String,
    /// Pairs of a latency in microseconds (an upper bound within 1 %) and how often it was.
    pub(crate) latency_histogram_us: Vec<(f64, u64)>,
    pub(crate) latency_us: Latency,
    pub(crate) per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rate_wanted: Option<f64>,
    pub(crate) seconds: f64,
    pub(crate) size: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) watched: Option<Watched>,
    /// Anonymous memory of the watched process that came for each connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) watched_bytes_per_connection: Option<f64>,
}

/// The same without the stretches in which a hypervisor had a CPU of this load: medians of the
/// others, so that a hiccup of the machine in one of them decides nothing.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Calm {
    pub(crate) bytes_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    /// 0 if no stretch has enough exchanges to say.
    pub(crate) p99_us: f64,
    pub(crate) per_second: f64,
    pub(crate) seconds: f64,
}

/// What the load itself cost.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Generator {
    /// CPU time of the generator; with `--serve` the server's too.
    pub(crate) cpu_seconds: f64,
    /// Part of it that went by in looking whether something has come.
    pub(crate) idle_spin_seconds: f64,
    /// Times a ring was entered.
    pub(crate) ring_enters: u64,
}

/// Quantiles in microseconds.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Latency {
    pub(crate) max: f64,
    pub(crate) mean: f64,
    pub(crate) min: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p99_9: f64,
}

/// A stretch of the load.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Interval {
    pub(crate) bytes: u64,
    pub(crate) done: u64,
    pub(crate) errors: u64,
    /// The CPUs were ours all the time.
    #[serde(default)]
    pub(crate) is_calm: bool,
    pub(crate) p50_us: f64,
    #[serde(default)]
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    /// Seconds from the begin of the measurement to the end of this stretch.
    pub(crate) until: f64,
}

impl Recorder {
    /// `cpus` are those that this load needs for itself.
    pub(crate) fn new(cpus: &[usize]) -> Result<Recorder> {
        let histogram = || Histogram::new_with_bounds(1, LATENCY_NANOS_MAX, 3);
        Ok(Recorder {
            began: None,
            bytes: 0,
            done: 0,
            errors: [0; ErrorKind::ALL.len()],
            interval: histogram()?,
            interval_bytes: 0,
            interval_done: 0,
            interval_errors: 0,
            interval_until: Instant::now(),
            intervals: Vec::new(),
            latency: histogram()?,
            steal: Steal::of(cpus),
            took: Duration::ZERO,
        })
    }

    /// From now on everything counts.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.began = Some(now);
        self.interval_until = now + INTERVAL;
        self.steal.more();
    }

    /// To be called often: closes a stretch when its time is over.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.began.is_some() && now >= self.interval_until {
            self.roll(now);
            self.interval_until = now + INTERVAL;
        }
    }

    /// Nothing counts any more.
    pub(crate) fn end(&mut self, now: Instant) {
        if let Some(began) = self.began {
            self.took = now - began;
            self.roll(now);
            self.began = None;
        }
    }

    pub(crate) fn bytes(&mut self, bytes: u64) {
        if self.began.is_some() {
            self.interval_bytes += bytes;
        }
    }

    /// An exchange is done that should have begun at `began`.
    pub(crate) fn done(&mut self, began: Instant, now: Instant) {
        let Some(begin) = self.began else { return };
        self.interval_done += 1;
        // What was under way when the measurement began was held up by its beginning.
        if began >= begin {
            let nanos = now.saturating_duration_since(began).as_nanos();
            self.interval.saturating_record(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
    }

    /// Errors count from the start: a load that cannot begin has failed.
    pub(crate) fn error(&mut self, kind: ErrorKind) {
        self.errors[kind as usize] += 1;
        self.interval_errors += 1;
    }

    pub(crate) fn errors(&self) -> u64 {
        self.errors.iter().sum()
    }

    pub(crate) fn outcome(&self) -> Outcome {
        let seconds = self.took.as_secs_f64();
        let named = ErrorKind::ALL.into_iter().map(|kind| (kind, self.errors[kind as usize]));
        let errors_by_kind = named.filter(|(_, count)| *count > 0);
        Outcome {
            bytes_per_second: ratio(self.bytes, seconds),
            calm: calm(&self.intervals),
            errors: self.errors(),
            errors_by_kind: errors_by_kind
                .map(|(kind, count)| (kind.word().to_owned(), count))
                .collect(),
            intervals: self.intervals.clone(),
            latency_histogram_us: coarse(&self.latency),
            latency_us: latency(&self.latency),
            per_second: ratio(self.done, seconds),
            seconds,
            ..Outcome::default()
        }
    }

    fn roll(&mut self, now: Instant) {
        let began = self.began.unwrap_or(now);
        self.intervals.push(Interval {
            bytes: self.interval_bytes,
            done: self.interval_done,
            errors: self.interval_errors,
            is_calm: !self.steal.more(),
            p50_us: micros(self.interval.value_at_quantile(0.5)),
            p90_us: micros(self.interval.value_at_quantile(0.9)),
            p99_us: micros(self.interval.value_at_quantile(0.99)),
            until: (now - began).as_secs_f64(),
        });
        // Equal bounds, so that the sum always fits.
        let _ = self.latency.add(&self.interval);
        self.bytes += self.interval_bytes;
        self.done += self.interval_done;
        self.interval.reset();
        self.interval_bytes = 0;
        self.interval_done = 0;
        self.interval_errors = 0;
    }
}

impl ErrorKind {
    pub(crate) const ALL: [ErrorKind; 8] = [
        ErrorKind::Corrupted,
        ErrorKind::Ended,
        ErrorKind::Other,
        ErrorKind::OutOfPorts,
        ErrorKind::Refused,
        ErrorKind::Reset,
        ErrorKind::TimedOut,
        ErrorKind::Unknown,
    ];

    /// What an errno of a socket says; 0 is FIN.
    pub(crate) const fn of(errno: i32) -> ErrorKind {
        match errno {
            0 => ErrorKind::Ended,
            libc::EADDRNOTAVAIL | libc::EADDRINUSE | libc::EMFILE => ErrorKind::OutOfPorts,
            libc::ECONNREFUSED => ErrorKind::Refused,
            libc::ECONNRESET | libc::EPIPE => ErrorKind::Reset,
            libc::ETIMEDOUT => ErrorKind::TimedOut,
            _ => ErrorKind::Other,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            ErrorKind::Corrupted => "corrupted",
            ErrorKind::Ended => "ended",
            ErrorKind::Other => "other",
            ErrorKind::OutOfPorts => "out_of_ports",
            ErrorKind::Refused => "refused",
            ErrorKind::Reset => "reset",
            ErrorKind::TimedOut => "timed_out",
            ErrorKind::Unknown => "unknown_protocol",
        }
    }
}

/// What the calm stretches say together; the last one may be too short to say anything.
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn calm(intervals: &[Interval]) -> Calm {
    let before = std::iter::once(0.0).chain(intervals.iter().map(|interval| interval.until));
    let spans =
        intervals.iter().zip(before).map(|(interval, before)| (interval, interval.until - before));
    let calm: Vec<(&Interval, f64)> = spans
        .filter(|(interval, span)| interval.is_calm && *span > INTERVAL.as_secs_f64() / 2.0)
        .collect();
    let each = |of: &dyn Fn(&Interval, f64) -> f64| -> f64 {
        median(&calm.iter().map(|(interval, span)| of(interval, *span)).collect::<Vec<_>>())
    };
    let known = |interval: &&(&Interval, f64)| interval.0.done >= ENOUGH_FOR_P99;
    let p99: Vec<f64> = calm.iter().filter(known).map(|(interval, _)| interval.p99_us).collect();
    Calm {
        bytes_per_second: each(&|interval, span| interval.bytes as f64 / span),
        p50_us: each(&|interval, _| interval.p50_us),
        p90_us: each(&|interval, _| interval.p90_us),
        p99_us: median(&p99),
        per_second: each(&|interval, span| interval.done as f64 / span),
        seconds: calm.iter().map(|(_, span)| span).sum(),
    }
}

/// Within 1 %, so that it can be written down.
fn coarse(histogram: &Histogram<u64>) -> Vec<(f64, u64)> {
    let Ok(mut coarse) = Histogram::<u64>::new_with_bounds(1, LATENCY_NANOS_MAX, 2) else {
        return Vec::new();
    };
    for step in histogram.iter_recorded() {
        coarse.saturating_record_n(step.value_iterated_to(), step.count_at_value());
    }
    let steps = coarse.iter_recorded();
    steps.map(|step| (micros(step.value_iterated_to()), step.count_at_value())).collect()
}

fn latency(histogram: &Histogram<u64>) -> Latency {
    let at = |quantile| micros(histogram.value_at_quantile(quantile));
    let is_empty = histogram.is_empty();
    Latency {
        max: micros(histogram.max()),
        mean: histogram.mean() / NANOS_PER_MICRO,
        min: if is_empty { 0.0 } else { micros(histogram.min()) },
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        p99_9: at(0.999),
    }
}

#[expect(clippy::cast_precision_loss, reason = "latencies stay far below 2^52 ns")]
fn micros(nanos: u64) -> f64 {
    (nanos as f64 / 10.0).round() / (NANOS_PER_MICRO / 10.0)
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn ratio(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

/// So many exchanges have five beyond their 99th percentile.
pub(crate) const ENOUGH_FOR_P99: u64 = 500;
/// What takes longer counts as this.
const LATENCY_NANOS_MAX: u64 = 60_000_000_000;
const NANOS_PER_MICRO: f64 = 1000.0;
/// A stretch: long enough that its quantiles mean something.
const INTERVAL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::{ENOUGH_FOR_P99, Interval, calm};

    #[test]
    fn stretches_that_others_had_do_not_count() {
        let stretch = |number: u32, done, is_calm, p99_us| Interval {
            done,
            is_calm,
            p99_us,
            until: f64::from(number) / 10.0,
            ..Interval::default()
        };
        let mut list = vec![
            stretch(1, 1000, true, 50.0),
            stretch(2, 400, false, 9000.0),
            stretch(3, 1100, true, 52.0),
            stretch(4, 1050, true, 51.0),
        ];
        // Too short to say anything.
        list.push(Interval { done: 1, until: 0.41, ..list[0].clone() });
        let known = calm(&list);
        assert!((known.per_second - 10_500.0).abs() < 1.0, "{known:?}");
        assert!((known.p99_us - 51.0).abs() < 0.1, "{known:?}");
        assert!((known.seconds - 0.3).abs() < 0.001, "{known:?}");
        list.iter_mut().for_each(|stretch| stretch.done = ENOUGH_FOR_P99 - 1);
        assert!(calm(&list).p99_us.abs() < 0.001, "too few to know");
        assert!(calm(&[]).seconds.abs() < 0.001);
    }
}
