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

use super::registries::{Facades, Registries};
use super::tracking::Counts;
use crate::capture::{Losses, Part};
use crate::metrics::{Counter, Counters, Denied, Origin, Outcome};
use crate::op::{CloseReason, Fall, Relay};
use crate::ring::Fallback;
use crate::takeover::{FacadeRow, RegistryRow};

/// The counters of all workers as text.
pub(super) fn render(counters: &[&Counters], extra: Extra) -> String {
    let mut totals = Totals::sum(counters);
    totals.families.extend([
        fallbacks(&Sum(counters), &extra.fallbacks),
        hook_losses(&extra.losses),
        queues(),
        rules_lost(&extra.rules_lost),
    ]);
    totals.families.extend(tracking(extra.counted));
    let mut registry = Registry::with_prefix("weir");
    registry.register_collector(Box::new(totals));
    registry.register_collector(Box::new(Registries(extra.registries)));
    registry.register_collector(Box::new(Facades(extra.facade)));
    let mut text = String::new();
    // Writing to a string cannot fail; what a collector could not say would be missing.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

/// What is counted elsewhere than in the workers.
#[derive(Debug, Default)]
pub(super) struct Extra {
    /// By the rules of the capture.
    pub(super) counted: Counts,
    /// If there is one.
    pub(super) facade: Option<FacadeRow>,
    /// What the kernel lacks, once for each worker that found out.
    pub(super) fallbacks: Vec<Fallback>,
    /// At each connect hook.
    pub(super) losses: Losses,
    /// Of takeover.
    pub(super) registries: Vec<RegistryRow>,
    /// Parts of the capture that others took away.
    pub(super) rules_lost: Vec<(Part, u64)>,
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
            relay_changes(&sum),
            denied(&sum),
            requests(&sum),
        ];
        families.extend(SINGLE.map(|(name, help, pick)| Family {
            help,
            name,
            series: vec![(Vec::new(), sum.of(pick))],
        }));
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
    let mut series = Vec::new();
    for direction in ["forward", "inbound", "outbound"] {
        let origins = || Origin::ALL.into_iter().filter(|one| one.direction() == direction);
        for relay in Relay::ALL {
            let moved = origins().map(|origin| {
                sum.of(|counters| &counters.bytes_to_upstream[relay as usize][origin as usize])
                    + sum.of(|c| &c.bytes_to_downstream[relay as usize][origin as usize])
            });
            let labels = vec![("direction", direction), ("relay", relay.label())];
            series.push((labels, moved.sum()));
        }
    }
    Family { help: "Bytes handed to sockets", name: "bytes", series }
}

fn relay_changes(sum: &Sum<'_>) -> Family {
    let series = Relay::ALL.map(|relay| {
        let count = sum.of(|counters| &counters.relay_changes[relay as usize]);
        (vec![("to", relay.label())], count)
    });
    let help = "Times a direction changed its relay, by the one it took";
    Family { help, name: "relay_changes", series: series.into() }
}

/// What each worker found lacking at its start, and what directions fell back from since.
fn fallbacks(sum: &Sum<'_>, list: &[Fallback]) -> Family {
    let falls = Fall::ALL.map(|fall| {
        let from = fall.from().label();
        let labels = vec![("from", from), ("to", "copy"), ("reason", fall.label())];
        (labels, sum.of(|counters| &counters.falls[fall as usize]))
    });
    let mut series: Vec<(Vec<(&str, &str)>, u64)> = falls.into();
    for fallback in list {
        let labels = vec![("from", fallback.from), ("to", fallback.to), ("reason", "kernel")];
        match series.iter_mut().find(|(other, _)| *other == labels) {
            Some((_, count)) => *count += 1,
            None => series.push((labels, 1)),
        }
    }
    Family { help: "A slower way was taken", name: "fallback", series }
}

fn hook_losses(losses: &Losses) -> Family {
    let series = [
        ("clash", losses.record_clash),
        ("full", losses.records_full),
        ("overruled", losses.overruled),
        ("passed", losses.passed),
        ("refused", losses.refused),
        ("storage", losses.storage),
    ];
    let series = series.map(|(reason, count)| (vec![("reason", reason)], count));
    let help = "Connects that the hook wanted and did not bring to weir";
    Family { help, name: "connect_unrecorded", series: series.into() }
}

fn rules_lost(parts: &[(Part, u64)]) -> Family {
    let series = parts.iter().map(|(part, count)| (vec![("part", part.label())], *count));
    let help = "Times a part of the capture was found removed or changed";
    Family { help, name: "rules_lost", series: series.collect() }
}

/// What the rules counted, and what connection tracking lost.
fn tracking(Counts { dropped, rules: counts }: Counts) -> [Family; 4] {
    let single = |name, help, count| Family { help, name, series: vec![(Vec::new(), count)] };
    [
        single(
            "conntrack_dropped",
            "Packets dropped in the network namespaces of captures because connection tracking was full",
            dropped,
        ),
        single("loops_refused", "Dials of weir that somebody's rule led back to it", counts.looped),
        single(
            "outbound_no_room",
            "Outbound connections that tproxy let go directly, because no more can be remembered",
            counts.no_room,
        ),
        single(
            "redirect_port_rewritten",
            "Redirected clients whose port the kernel changed to tell two of them apart",
            counts.port_rewritten,
        ),
    ]
}

/// Of the whole network namespace, others' listeners included: the kernel counts no finer.
fn queues() -> Family {
    let text = std::fs::read_to_string("/proc/net/netstat").unwrap_or_default();
    let count = listen_overflows(&text).unwrap_or_default();
    let help = "Connections dropped in this network namespace because an accept queue was full";
    Family { help, name: "accept_queue_overflows", series: vec![(Vec::new(), count)] }
}

/// The file has lines in pairs: names, then values.
fn listen_overflows(netstat: &str) -> Option<u64> {
    let mut lines = netstat.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let index = names.split(' ').position(|name| name == "ListenOverflows")?;
    values.split(' ').nth(index)?.parse().ok()
}

fn requests(sum: &Sum<'_>) -> Family {
    let series = Outcome::ALL.map(|outcome| {
        let count = sum.of(|counters| &counters.requests[outcome as usize]);
        (vec![("outcome", outcome.label())], count)
    });
    let help = "Requests of the shared outbound port, by what became of them";
    Family { help, name: "requests", series: series.into() }
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

/// One counter of many.
type Pick = fn(&Counters) -> &Counter;

/// Counters without labels: name, help, which.
const SINGLE: [(&str, &str, Pick); 9] = [
    ("accept_paused", "Times accept had to pause", |c| &c.accept_paused),
    ("buffers_exhausted", "Times a direction had to wait for a buffer", |c| &c.buffers_exhausted),
    ("completions_stale", "Completions of an earlier life of a slot, dropped", |c| {
        &c.completions_stale
    }),
    ("connects_retried", "Connects that failed and were made again to another endpoint", |c| {
        &c.connects_retried
    }),
    (
        "endpoints_ejected",
        "Times a worker put an endpoint that it could not reach out of use",
        |c| &c.endpoints_ejected,
    ),
    ("ring_enters", "io_uring_enter calls", |c| &c.ring_enters),
    ("ring_completions", "Completions handled", |c| &c.ring_completions),
    ("ring_overflows", "Turns that found the completion queue full", |c| &c.ring_overflows),
    ("worker_stalls", "Times a worker did not run and another accepted for it", |c| &c.stalls),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn overflows_are_found_by_their_name() {
        let text = "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 7 9\nIpExt: InNoRoutes\nIpExt: 0\n";
        assert_eq!(listen_overflows(text), Some(7));
        assert_eq!(listen_overflows(""), None);
    }

    const DOCS: &str = include_str!("../../docs/OPERATING.md");

    /// Names in the table of metrics, as it begins its rows: several may share one.
    fn documented() -> BTreeSet<String> {
        let rows = DOCS.lines().filter(|line| line.starts_with("| `weir_"));
        let cells = rows.filter_map(|row| row.split(" | ").next());
        let names = cells.flat_map(|cell| cell.split('`').filter(|word| word.starts_with("weir_")));
        names.map(|name| name.split('{').next().unwrap_or(name).to_owned()).collect()
    }

    #[test]
    fn every_metric_is_documented_and_every_documented_one_is_there() {
        let text = render(&[&Counters::default()], Extra::default());
        let mut there = BTreeSet::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            there.insert(if kind == "counter" { format!("{name}_total") } else { name.to_owned() });
        }
        assert!(there.len() > 20, "{text}");
        assert_eq!(there, documented());
    }

    #[test]
    fn every_word_of_a_label_is_documented() {
        const TUNING: &str = include_str!("../../docs/TUNING.md");
        let row = |name: &str| {
            let begin = format!("| `{name}{{");
            let row = DOCS.lines().find(|line| line.starts_with(&begin));
            row.unwrap_or_else(|| panic!("{name} has no row")).to_owned()
        };
        let lacks = |text: &str, words: Vec<&str>| -> Vec<String> {
            let lacks = |word: &&str| !text.contains(&format!("`{word}`"));
            words.into_iter().filter(lacks).map(str::to_owned).collect()
        };
        let none: Vec<String> = Vec::new();
        for (name, words) in [
            ("weir_flows_closed_total", CloseReason::ALL.map(CloseReason::label).to_vec()),
            ("weir_denied_total", Denied::ALL.map(Denied::label).to_vec()),
            ("weir_relay_changes_total", Relay::ALL.map(Relay::label).to_vec()),
            ("weir_requests_total", Outcome::ALL.map(Outcome::label).to_vec()),
            ("weir_rules_lost_total", Part::ALL.map(Part::label).to_vec()),
        ] {
            assert_eq!(lacks(&row(name), words), none, "{name}");
        }

        assert_eq!(lacks(TUNING, Fall::ALL.map(Fall::label).to_vec()), none);
    }

    #[test]
    fn each_fallback_is_counted_with_its_labels() {
        let fallback = Fallback { from: "receive_limit", since: "6.17", to: "receive_cancel" };
        let extra = Extra { fallbacks: vec![fallback; 2], ..Extra::default() };
        let text = render(&[], extra);
        let line =
            "weir_fallback_total{from=\"receive_limit\",to=\"receive_cancel\",reason=\"kernel\"} 2";
        assert!(text.lines().any(|other| other == line), "{text}");
    }
}
