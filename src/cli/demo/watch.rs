// SPDX-License-Identifier: Apache-2.0
//! The running weir of the demo, looked at from outside: counters, flows, conntrack.

use std::path::Path;
use std::time::{Duration, Instant};

use super::lab::{Lab, Place};
use crate::control::client::{Answer, ask};
use crate::control::view::FlowView;
use crate::sys::signals::is_interrupted;

/// What the counters said at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub(super) bytes: [f64; 2],
    pub(super) opened: [f64; 2],
}

/// The largest that was seen while watching.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) conntrack: u64,
    pub(super) flows: usize,
    pub(super) sample: Vec<FlowView>,
}

/// Prints a line twice a second until `seconds` are over.
pub(super) fn live(lab: &Lab, socket: &Path, seconds: u64, say: &mut dyn FnMut(&str)) -> Seen {
    let mut seen = Seen::default();
    let began = Instant::now();
    let mut last = (Instant::now(), totals(socket));
    say(&format!(
        "{:>6}  {:>10} {:>13}  {:>10} {:>13}  {:>9}",
        "second", "in: flows", "MB/s", "out: flows", "MB/s", "conntrack"
    ));
    while began.elapsed() < Duration::from_secs(seconds) && !is_interrupted() {
        std::thread::sleep(LINE_EVERY);
        let flows = flows(socket);
        let now = (Instant::now(), totals(socket));
        let span = (now.0 - last.0).as_secs_f64();
        let rate = |index: usize| (now.1.bytes[index] - last.1.bytes[index]) / span / 1e6;
        let open = |word: &str| flows.iter().filter(|flow| flow.direction == word).count();
        let conntrack = conntrack(lab);
        say(&format!(
            "{:>6.1}  {:>10} {:>13.0}  {:>10} {:>13.0}  {:>9}",
            began.elapsed().as_secs_f64(),
            open("inbound"),
            rate(0),
            open("outbound"),
            rate(1),
            conntrack
        ));
        seen.conntrack = seen.conntrack.max(conntrack);
        seen.flows = seen.flows.max(flows.len());
        if seen.sample.is_empty() && open("inbound") > 0 && open("outbound") > 0 {
            let first = |word: &str| flows.iter().find(|flow| flow.direction == word).cloned();
            seen.sample = ["inbound", "outbound"].into_iter().filter_map(first).collect();
        }
        last = now;
    }
    seen
}

/// Flows opened and bytes moved, inbound and outbound.
pub(super) fn totals(socket: &Path) -> Totals {
    let text = ask(socket, "GET", "/metrics").and_then(Answer::body);
    let text = text.unwrap_or_default();
    let sum = |name: &str, direction: &str| {
        let of = |line: &str| line.starts_with(name) && line.contains(direction);
        let lines = text.lines().filter(|line| of(line));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    let both = |name: &str| [sum(name, "\"inbound\""), sum(name, "\"outbound\"")];
    Totals { bytes: both("weir_bytes_total"), opened: both("weir_flows_opened_total") }
}

/// Entries in the node's connection tracking table.
pub(super) fn conntrack(lab: &Lab) -> u64 {
    let path = "/proc/sys/net/netfilter/nf_conntrack_count";
    let count = lab.output(Place::Node, &["cat", path]).unwrap_or_default();
    count.trim().parse().unwrap_or_default()
}

fn flows(socket: &Path) -> Vec<FlowView> {
    let answer = ask(socket, "GET", "/flows");
    answer.and_then(|answer| answer.json()).unwrap_or_default()
}

const LINE_EVERY: Duration = Duration::from_millis(500);
