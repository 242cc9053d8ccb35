// SPDX-License-Identifier: Apache-2.0
//! Conditions that a result must meet, as `p99<2ms`.

use std::fmt;
use std::str::FromStr;

use crate::run::outcome::Outcome;

/// One condition.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Threshold {
    bound: f64,
    metric: Metric,
    order: Order,
    text: String,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Metric {
    Bytes,
    Errors,
    Max,
    Mean,
    P50,
    P90,
    P99,
    P99_9,
    Rate,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Order {
    Above,
    AtLeast,
    AtMost,
    Below,
    Equal,
}

/// The figures that conditions are about.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) bytes_per_second: f64,
    pub(crate) errors: f64,
    pub(crate) max_us: f64,
    pub(crate) mean_us: f64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p99_9_us: f64,
    pub(crate) per_second: f64,
}

impl Threshold {
    /// Nothing if it holds, else how it does not.
    pub(crate) fn missed(&self, figures: &Figures) -> Option<String> {
        let (value, unit) = self.value(figures);
        let holds = match self.order {
            Order::Above => value > self.bound,
            Order::AtLeast => value >= self.bound,
            Order::AtMost => value <= self.bound,
            Order::Below => value < self.bound,
            Order::Equal => (value - self.bound).abs() < f64::EPSILON,
        };
        (!holds).then(|| format!("threshold {self} is missed: it is {value:.1}{unit}"))
    }

    /// Whether these figures have the one that this is about.
    pub(crate) fn is_about(&self, figures: &Figures) -> bool {
        !self.value(figures).0.is_nan()
    }

    const fn value(&self, figures: &Figures) -> (f64, &'static str) {
        match self.metric {
            Metric::Bytes => (figures.bytes_per_second, " B/s"),
            Metric::Errors => (figures.errors, ""),
            Metric::Max => (figures.max_us, " µs"),
            Metric::Mean => (figures.mean_us, " µs"),
            Metric::P50 => (figures.p50_us, " µs"),
            Metric::P90 => (figures.p90_us, " µs"),
            Metric::P99 => (figures.p99_us, " µs"),
            Metric::P99_9 => (figures.p99_9_us, " µs"),
            Metric::Rate => (figures.per_second, "/s"),
        }
    }
}

impl Figures {
    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
    pub(crate) fn of(outcome: &Outcome) -> Figures {
        let latency = &outcome.latency_us;
        Figures {
            bytes_per_second: outcome.bytes_per_second,
            errors: outcome.errors as f64,
            max_us: latency.max,
            mean_us: latency.mean,
            p50_us: latency.p50,
            p90_us: latency.p90,
            p99_us: latency.p99,
            p99_9_us: latency.p99_9,
            per_second: outcome.per_second,
        }
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Threshold, String> {
        let wrong =
            |what: &str| format!("`{text}`: {what}, as `p99<2ms`, `rate>=10000`, `errors=0`");
        let at = text.find(['<', '>', '=']).ok_or_else(|| wrong("must compare"))?;
        let (name, rest) = text.split_at(at);
        let known = METRICS.map(|(word, _)| word).join(", ");
        let metric = METRICS.iter().find(|(word, _)| *word == name.trim());
        let metric = metric.ok_or_else(|| wrong(&format!("must begin with one of {known}")))?.1;
        let (order, value) = ORDERS
            .iter()
            .find_map(|(sign, order)| Some((*order, rest.strip_prefix(sign)?)))
            .ok_or_else(|| wrong("must compare"))?;
        let (digits, unit) = value.trim().split_at(digits(value.trim()));
        let factor = match (metric, unit) {
            (Metric::Rate | Metric::Errors, "") | (Metric::Bytes, "" | "B/s") => 1.0,
            (Metric::Bytes, "MB/s") => 1e6,
            (Metric::Bytes, "GB/s") => 1e9,
            (Metric::Bytes | Metric::Errors | Metric::Rate, _) => return Err(wrong(UNIT)),
            (_, "us" | "µs") => 1.0,
            (_, "ms") => 1e3,
            (_, "s") => 1e6,
            _ => return Err(wrong(UNIT)),
        };
        let bound: f64 = digits.parse().map_err(|_| wrong("must end with a number"))?;
        Ok(Threshold { bound: bound * factor, metric, order, text: text.to_owned() })
    }
}

fn digits(text: &str) -> usize {
    text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len())
}

const METRICS: [(&str, Metric); 9] = [
    ("bytes", Metric::Bytes),
    ("errors", Metric::Errors),
    ("max", Metric::Max),
    ("mean", Metric::Mean),
    ("p50", Metric::P50),
    ("p90", Metric::P90),
    ("p99", Metric::P99),
    ("p99.9", Metric::P99_9),
    ("rate", Metric::Rate),
];
const UNIT: &str = "must have a unit that fits";
/// Longer signs first.
const ORDERS: [(&str, Order); 5] = [
    ("<=", Order::AtMost),
    (">=", Order::AtLeast),
    ("<", Order::Below),
    (">", Order::Above),
    ("=", Order::Equal),
];

#[cfg(test)]
mod tests {
    use super::{Figures, Threshold};

    #[test]
    fn conditions_hold_or_say_how_they_do_not() {
        let figures = Figures { p99_us: 1500.0, per_second: 10.0, ..Figures::default() };
        let missed = |text: &str| {
            let threshold: Result<Threshold, _> = text.parse();
            threshold.map(|threshold| threshold.missed(&figures))
        };
        assert_eq!(missed("p99<2ms"), Ok(None));
        assert_eq!(missed("p99 <= 1500us"), Ok(None));
        assert_eq!(missed("errors=0"), Ok(None));
        let text = "threshold p99<1ms is missed: it is 1500.0 µs".to_owned();
        assert_eq!(missed("p99<1ms"), Ok(Some(text)));
        assert!(missed("rate>10").is_ok_and(|missed| missed.is_some()));
        for nonsense in ["p98<1ms", "p99", "p99<", "p99<2", "rate>3ms", "p99<2km"] {
            assert!(missed(nonsense).is_err(), "{nonsense}");
        }
    }
}
