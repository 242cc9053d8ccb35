// SPDX-License-Identifier: Apache-2.0
//! The workers' counters in the OpenMetrics text format.
//!
//! Sums over the workers at the moment of asking; nothing is kept. Labels are words of fixed
//! lists, so the number of series is bounded.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::metrics::{Counter, Counters, Denied, Origin};
use crate::op::CloseReason;

/// The counters of all workers as text.
pub(super) fn render(counters: &[&Counters]) -> String {
    let mut registry = Registry::with_prefix("weir");
    registry.register_collector(Box::new(Totals::sum(counters)));
    let mut text = String::new();
    // Writing to a string cannot fail; what a collector could not say would be missing.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

/// Adds up one counter of every worker.
struct Sum<'a>(&'a [&'a Counters]);

impl Sum<'_> {
    fn of(&self, pick: impl Fn(&Counters) -> &Counter) -> u64 {
        self.0.iter().map(|counters| pick(counters).value()).sum()
    }
}

/// What is exposed, summed.
#[derive(Debug)]
struct Totals {
    families: Vec<Family>,
    flows_active: i64,
}

#[derive(Debug)]
struct Family {
    help: &'static str,
    name: &'static str,
    series: Vec<(Vec<(&'static str, &'static str)>, u64)>,
}

impl Totals {
    fn sum(counters: &[&Counters]) -> Totals {
        let sum = Sum(counters);
        let single = |name, help, pick: fn(&Counters) -> &Counter| Family {
            help,
            name,
            series: vec![(Vec::new(), sum.of(pick))],
        };
        let mut families = vec![
            by_origin(&sum),
            by_reason("flows_closed", "Flows that ended, by reason", &sum, |_| true),
            by_reason(
                "connect_failed",
                "Flows whose upstream could not be dialled",
                &sum,
                CloseReason::is_connect_failure,
            ),
            bytes(&sum),
            denied(&sum),
        ];
        families.push(single("accept_paused", "Times accept had to pause", |c| &c.accept_paused));
        families.push(single(
            "buffers_exhausted",
            "Times a direction had to wait for a buffer",
            |c| &c.buffers_exhausted,
        ));
        families.push(single(
            "completions_stale",
            "Completions of an earlier life of a slot, dropped",
            |c| &c.completions_stale,
        ));
        families.push(single("ring_enters", "io_uring_enter calls", |c| &c.ring_enters));
        families.push(single("ring_completions", "Completions handled", |c| &c.ring_completions));
        let active = sum.of(|c| &c.flows_active);
        Totals { families, flows_active: i64::try_from(active).unwrap_or(i64::MAX) }
    }
}

fn by_origin(sum: &Sum<'_>) -> Family {
    let series = Origin::ALL.map(|origin| {
        let labels = vec![("direction", origin.direction()), ("capture", origin.capture())];
        (labels, sum.of(|counters| &counters.flows_opened[origin as usize]))
    });
    Family { help: "Flows that began", name: "flows_opened", series: series.into() }
}

fn by_reason(
    name: &'static str,
    help: &'static str,
    sum: &Sum<'_>,
    belongs: fn(CloseReason) -> bool,
) -> Family {
    let series = CloseReason::ALL.into_iter().filter(|reason| belongs(*reason)).map(|reason| {
        let count = sum.of(|counters| &counters.flows_closed[reason as usize]);
        (vec![("reason", reason.label())], count)
    });
    Family { help, name, series: series.collect() }
}

/// `direction` is the one of the traffic as the workload sees it, both ways of a flow together.
fn bytes(sum: &Sum<'_>) -> Family {
    let series = ["forward", "inbound", "outbound"].map(|direction| {
        let moved = Origin::ALL.into_iter().filter(|origin| origin.direction() == direction).map(
            |origin| {
                sum.of(|counters| &counters.bytes_to_upstream[origin as usize])
                    + sum.of(|counters| &counters.bytes_to_downstream[origin as usize])
            },
        );
        (vec![("direction", direction), ("relay", "copy")], moved.sum())
    });
    Family { help: "Bytes handed to sockets", name: "bytes", series: series.into() }
}

fn denied(sum: &Sum<'_>) -> Family {
    let series = Denied::ALL.map(|reason| {
        let count = sum.of(|counters| &counters.denied[reason as usize]);
        (vec![("reason", reason.label())], count)
    });
    Family { help: "Connections turned away", name: "denied", series: series.into() }
}

impl Collector for Totals {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for Family { help, name, series } in &self.families {
            let kind = ConstCounter::new(0u64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, count) in series {
                let counter = ConstCounter::new(*count);
                if labels.is_empty() {
                    // An encoder ends with its metric; a family without labels has just one.
                    counter.encode(family)?;
                    break;
                }
                counter.encode(family.encode_family(labels)?)?;
            }
        }
        let active = ConstGauge::new(self.flows_active);
        let kind = active.metric_type();
        active.encode(encoder.encode_descriptor(
            "flows_active",
            "Flows open now",
            None,
            kind,
        )?)?;
        let build = ConstGauge::new(1i64);
        let mut family =
            encoder.encode_descriptor("build_info", "Always 1", None, build.metric_type())?;
        let labels = vec![("version", env!("CARGO_PKG_VERSION"))];
        build.encode(family.encode_family(&labels)?)
    }
}

/// Of the OpenMetrics text format.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
