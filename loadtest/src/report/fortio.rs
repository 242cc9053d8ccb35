// SPDX-License-Identifier: Apache-2.0
//! Results in the shape that fortio's viewers read: one object a cell, durations in seconds.

use anyhow::Result;
use serde_json::{Value, json};

use crate::compare::result::{Cell, Comparison};

/// An array with an object for every cell that has latencies.
pub(super) fn render(comparison: &Comparison) -> Result<String> {
    let cells = comparison.cells.iter().filter(|cell| !cell.histogram_us.is_empty());
    let objects: Vec<Value> = cells.map(|cell| object(comparison, cell)).collect();
    Ok(format!("{}\n", serde_json::to_string_pretty(&objects)?))
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn object(comparison: &Comparison, cell: &Cell) -> Value {
    let count: u64 = cell.histogram_us.iter().map(|(_, count)| count).sum();
    let seconds: f64 = cell.rounds.iter().map(|round| round.outcome.seconds).sum();
    let sum: f64 = cell.histogram_us.iter().map(|(value, count)| value * *count as f64).sum();
    let average = sum / count.max(1) as f64;
    let squares =
        cell.histogram_us.iter().map(|(value, count)| (value - average).powi(2) * *count as f64);
    let deviation = (squares.sum::<f64>() / count.max(1) as f64).sqrt();
    let ends = (cell.histogram_us.first(), cell.histogram_us.last());
    let errors: f64 = cell.values("errors").iter().sum();
    json!({
        "RunType": "TCP",
        "Labels": format!("{} {}", cell.target, cell.workload),
        "StartTime": comparison.started,
        "RequestedQPS": "max",
        "RequestedDuration": format!("{seconds:.3}s"),
        "ActualQPS": count as f64 / seconds.max(f64::EPSILON),
        "ActualDuration": (seconds * 1e9).round(),
        "NumThreads": cell.connections,
        "DurationHistogram": {
            "Count": count,
            "Min": seconds_of(ends.0.map_or(0.0, |(value, _)| *value)),
            "Max": seconds_of(ends.1.map_or(0.0, |(value, _)| *value)),
            "Sum": seconds_of(sum),
            "Avg": seconds_of(average),
            "StdDev": seconds_of(deviation),
            "Data": data(cell, count),
            "Percentiles": PERCENTILES.map(|percent| json!({
                "Percentile": percent,
                "Value": seconds_of(at(cell, count, percent)),
            })),
        },
        "ErrorsDurationHistogram": { "Count": errors },
    })
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn data(cell: &Cell, count: u64) -> Vec<Value> {
    let (mut seen, mut start) = (0, 0.0);
    let mut list = Vec::new();
    for (end, number) in &cell.histogram_us {
        seen += number;
        list.push(json!({
            "Start": seconds_of(start),
            "End": seconds_of(*end),
            "Percent": 100.0 * seen as f64 / count as f64,
            "Count": number,
        }));
        start = *end;
    }
    list
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn at(cell: &Cell, count: u64, percent: f64) -> f64 {
    let mut seen = 0;
    for (value, number) in &cell.histogram_us {
        seen += number;
        if seen as f64 >= count as f64 * percent / 100.0 {
            return *value;
        }
    }
    0.0
}

fn seconds_of(micros: f64) -> f64 {
    micros / 1e6
}

const PERCENTILES: [f64; 5] = [50.0, 75.0, 90.0, 99.0, 99.9];
