// SPDX-License-Identifier: Apache-2.0
//! A comparison as text: tables for people, sentences for the hurried.

use std::fmt::Write as _;

use super::result::{Cell, Comparison, Figure, figure};
use super::statistics::{Estimate, NEGLIGIBLE, Verdict};

/// One table of a workload, ready to be drawn in any way.
pub(crate) struct Table {
    pub(crate) head: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
    pub(crate) workload: String,
}

/// A table a workload; `baseline` is what ratios are to.
pub(crate) fn tables(comparison: &Comparison, baseline: &str) -> Vec<Table> {
    let workloads = comparison.workloads().into_iter();
    workloads.map(|workload| table(comparison, workload, baseline)).collect()
}

fn table(comparison: &Comparison, workload: &str, baseline: &str) -> Table {
    let cells: Vec<&Cell> =
        comparison.cells.iter().filter(|cell| cell.workload == workload).collect();
    let unit = cells.first().map_or("", |cell| cell.unit.as_str());
    let first = cells.first().map_or("per_second", |cell| cell.first_figure());
    let figures: Vec<&Figure> = columns(unit)
        .iter()
        .filter_map(|name| figure(name))
        .filter(|figure| cells.iter().any(|cell| cell.median(figure.name).is_some()))
        .collect();
    let mut head = vec!["target".to_owned()];
    for figure in &figures {
        head.push(heading(figure, unit));
        if figure.name == first && unit != "flow" {
            head.extend(["spread".to_owned(), format!("against {baseline}")]);
        }
    }
    let rows = cells.iter().map(|cell| {
        let mut row = vec![cell.target.clone()];
        for figure in &figures {
            let value = cell.median(figure.name);
            row.push(value.map_or_else(|| "-".to_owned(), |value| shown(value, figure, unit)));
            if figure.name == first && unit != "flow" {
                row.push(format!("{:.0} %", cell.spread(figure.name) * 100.0));
                let ratio = comparison.ratio(cell, baseline, figure.name);
                row.push(
                    ratio.map_or_else(|| "-".to_owned(), |ratio| in_words(&ratio, NEGLIGIBLE)),
                );
            }
        }
        row
    });
    Table { head, rows: rows.collect(), workload: workload.to_owned() }
}

/// The columns of a workload's table.
pub(crate) fn columns(unit: &str) -> Vec<&'static str> {
    let first: &[&str] = match unit {
        "GB" => &["bytes_per_second"],
        "flow" => &["user_bytes_per_flow", "slab_bytes_per_flow", "conntrack_per_flow", "errors"],
        _ => &["per_second", "p50_us", "p90_us", "p99_us", "p99_9_us", "max_us"],
    };
    // An idle flow moves nothing that could be counted.
    let costs: &[&str] = if unit == "flow" { &[] } else { &COSTS };
    [first, costs].concat()
}

/// CPU of a gigabyte is told in seconds.
fn is_cpu_of_bulk(figure: &Figure, unit: &str) -> bool {
    unit == "GB" && figure.heading.ends_with("CPU µs")
}

pub(super) fn heading(figure: &Figure, unit: &str) -> String {
    if is_cpu_of_bulk(figure, unit) {
        return figure.heading.replace("µs", "s/GB");
    }
    if figure.heading.ends_with("CPU µs") || figure.name.ends_with("per_unit") {
        return format!("{}/{unit}", figure.heading);
    }
    figure.heading.to_owned()
}

/// A value in the unit of its column.
pub(crate) fn shown(value: f64, figure: &Figure, unit: &str) -> String {
    if is_cpu_of_bulk(figure, unit) {
        return format!("{:.3}", value / 1e6);
    }
    // Thousands of what a request has parts of.
    let is_many = unit == "GB" && figure.name.ends_with("per_unit");
    grouped(value * figure.factor, if is_many { 0 } else { figure.decimals })
}

/// With a thin mark between thousands.
fn grouped(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_once('.').map_or((text.as_str(), ""), |(a, b)| (a, b));
    let digits = whole.trim_start_matches('-');
    let mut parts: Vec<&str> = Vec::new();
    let mut end = digits.len();
    while end > 3 {
        parts.push(&digits[end - 3..end]);
        end -= 3;
    }
    parts.push(&digits[..end]);
    parts.reverse();
    let sign = if whole.starts_with('-') { "-" } else { "" };
    let point = if rest.is_empty() { "" } else { "." };
    format!("{sign}{}{point}{rest}", parts.join(","))
}

/// A ratio as people say it: `× 1.45 (1.40 to 1.51)`, or that there is none.
pub(crate) fn in_words(ratio: &Estimate, negligible: f64) -> String {
    let Estimate { high, low, value, .. } = ratio;
    match ratio.verdict(negligible) {
        Verdict::Unknown => format!("× {value:.2} (too few rounds to tell)"),
        Verdict::NoDifference => format!("no difference ({low:.2} to {high:.2})"),
        Verdict::Higher | Verdict::Lower => format!("× {value:.2} ({low:.2} to {high:.2})"),
    }
}

/// The tables, for a terminal.
pub(crate) fn text(comparison: &Comparison, baseline: &str) -> String {
    let mut text = String::new();
    for table in tables(comparison, baseline) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n{}", table.workload);
        text.push_str(&aligned(&narrow(table)));
    }
    text
}

/// Without what is told in the report only, and without what is nothing everywhere.
fn narrow(mut table: Table) -> Table {
    let is_quiet = |table: &Table, column: usize| match table.head[column].as_str() {
        "p90 µs" | "max µs" | "forwarder %" | "generator %" => true,
        "conntrack/flow" | "fallbacks" | "retransmits" => {
            table.rows.iter().all(|row| matches!(row[column].as_str(), "0" | "0.0" | "-"))
        }
        _ => false,
    };
    for column in (0..table.head.len()).rev() {
        if is_quiet(&table, column) {
            table.head.remove(column);
            table.rows.iter_mut().for_each(|row| drop(row.remove(column)));
        }
    }
    table
}

/// In columns, words left and numbers right; long headings in several lines.
pub(super) fn aligned(table: &Table) -> String {
    let mut text = String::new();
    let length = |cell: &String| cell.chars().count();
    let width = |column: usize| {
        table.rows.iter().filter_map(|row| row.get(column)).map(length).max().unwrap_or(0)
    };
    let heads = table.head.iter().enumerate();
    let heads: Vec<Vec<String>> =
        heads.map(|(column, head)| wrapped(head, width(column))).collect();
    let widths: Vec<usize> = heads
        .iter()
        .enumerate()
        .map(|(column, lines)| lines.iter().map(length).max().unwrap_or(0).max(width(column)))
        .collect();
    let height = heads.iter().map(Vec::len).max().unwrap_or(0);
    let head = (0..height).map(|line| {
        // The last lines of all are side by side.
        let of = |lines: &Vec<String>| {
            let above = height - lines.len();
            line.checked_sub(above).and_then(|own| lines.get(own)).cloned().unwrap_or_default()
        };
        heads.iter().map(of).collect::<Vec<_>>()
    });
    for row in head.collect::<Vec<_>>().iter().chain(&table.rows) {
        let mut line = String::from(" ");
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - length(cell));
            let is_word = column == 0 || table.head[column].starts_with("against");
            line.push(' ');
            line.push_str(&if is_word { format!("{cell}{pad}") } else { format!("{pad}{cell}") });
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A heading in lines as long as its longest word, or as `least` if that is longer.
fn wrapped(head: &str, least: usize) -> Vec<String> {
    let parts = |word: &'_ str| match word.find('/').filter(|at| *at > 0) {
        Some(at) => vec![word[..at].to_owned(), word[at..].to_owned()],
        None => vec![word.to_owned()],
    };
    let words: Vec<String> = head.split_inclusive(' ').flat_map(parts).collect();
    let length = |text: &str| text.trim_end().chars().count();
    let longest = words.iter().map(|word| length(word)).max().unwrap_or(0);
    let most = longest.max(least).max(HEADING_MIN);
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if length(&format!("{line}{word}")) <= most => line.push_str(&word),
            _ => lines.push(word),
        }
    }
    lines.iter().map(|line| line.trim_end().to_owned()).collect()
}

/// What the comparison says, in sentences.
pub(crate) fn summary(comparison: &Comparison, baseline: &str) -> Vec<String> {
    let mut sentences = Vec::new();
    for workload in comparison.workloads() {
        let cells = comparison.cells.iter().filter(|cell| cell.workload == workload);
        let cells: Vec<&Cell> = cells.filter(|cell| cell.target != "direct").collect();
        let Some(first) = cells.first() else { continue };
        let name = first.first_figure();
        let Some(figure) = figure(name) else { continue };
        let best = cells.iter().filter_map(|cell| Some((*cell, cell.median(name)?)));
        let order = |one: &(&Cell, f64), other: &(&Cell, f64)| one.1.total_cmp(&other.1);
        let best = if figure.is_better_high { best.max_by(order) } else { best.min_by(order) };
        let Some((best, value)) = best else { continue };
        let unit = match name {
            "user_bytes_per_flow" => " B of user memory a flow",
            "bytes_per_second" => " Gbit/s",
            "p50_us" => " µs in the median",
            _ => "/s",
        };
        let value = shown(value, figure, &best.unit);
        let mut sentence =
            format!("{workload}: {} is first of the forwarders with {value}{unit}", best.target);
        let rivals = cells.iter().filter(|cell| cell.target != best.target);
        let equals: Vec<&str> = rivals
            .filter(|cell| {
                let ratio = comparison.ratio(cell, &best.target, name);
                ratio.is_some_and(|ratio| ratio.verdict(NEGLIGIBLE) == Verdict::NoDifference)
            })
            .map(|cell| cell.target.as_str())
            .collect();
        if !equals.is_empty() {
            let _ = write!(sentence, "; no difference to {}", equals.join(", "));
        }
        if let Some(ratio) = comparison.ratio(best, baseline, name) {
            let _ = write!(sentence, "; against {baseline}: {}", in_words(&ratio, NEGLIGIBLE));
        }
        sentences.push(format!("{sentence}."));
    }
    let disturbed = comparison.cells.iter().flat_map(|cell| &cell.rounds);
    let disturbed = disturbed.filter(|round| round.was_disturbed).count();
    if disturbed > 0 {
        let all: usize = comparison.cells.iter().map(|cell| cell.rounds.len()).sum();
        sentences.push(format!(
            "{disturbed} of {all} measurements were disturbed, by other load or by a host that moved the CPUs \
             apart; where a cell has two others, only those count."
        ));
    }
    sentences
}

/// Shorter headings are not worth a second line.
const HEADING_MIN: usize = 7;
/// What moving bytes costs.
const COSTS: [&str; 10] = [
    "forwarder_cpu_us_per_unit",
    "system_cpu_us_per_unit",
    "forwarder_busy",
    "generator_busy",
    "enters_per_unit",
    "syscalls_per_unit",
    "conntrack_per_flow",
    "retransmits",
    "fallbacks",
    "errors",
];

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::{grouped, summary, text, wrapped};
    use crate::compare::result::{Cell, Comparison, Round, TargetAbout};

    pub(in super::super) fn comparison(rates: &[(&str, [f64; 5])]) -> Comparison {
        let cell = |(target, rates): &(&str, [f64; 5])| Cell {
            rounds: (1..)
                .zip(rates)
                .map(|(number, rate)| Round {
                    figures: BTreeMap::from([("per_second".to_owned(), *rate)]),
                    number,
                    ..Round::default()
                })
                .collect(),
            target: (*target).to_owned(),
            unit: "request".to_owned(),
            workload: "pingpong-64".to_owned(),
            ..Cell::default()
        };
        let about = |(name, _): &(&str, [f64; 5])| TargetAbout {
            name: (*name).to_owned(),
            ..TargetAbout::default()
        };
        Comparison {
            cells: rates.iter().map(cell).collect(),
            targets: rates.iter().map(about).collect(),
            ..Comparison::default()
        }
    }

    pub(in super::super) const FAST: [f64; 5] = [100.0, 101.0, 99.0, 102.0, 98.0];
    pub(in super::super) const SLOW: [f64; 5] = [50.0, 50.5, 49.5, 51.0, 49.0];

    #[test]
    fn who_is_first_is_said_and_who_is_equal() {
        let all = comparison(&[
            ("direct", FAST.map(|rate| rate * 3.0)),
            ("a", FAST),
            ("b", FAST),
            ("c", SLOW),
        ]);
        let sentences = summary(&all, "direct").join(" ");
        assert!(sentences.contains("first of the forwarders with 100/s"), "{sentences}");
        assert!(sentences.contains("no difference to"), "{sentences}");
        assert!(sentences.contains("against direct: × 0.33"), "{sentences}");
        assert!(
            text(&all, "direct").contains("no difference")
                || text(&all, "a").contains("no difference")
        );
    }

    #[test]
    fn long_headings_take_several_lines() {
        assert_eq!(wrapped("forwarder CPU µs/request", 5), ["forwarder", "CPU µs", "/request"]);
        assert_eq!(wrapped("slab B", 3), ["slab B"]);
        assert_eq!(wrapped("against forward/auto", 21), ["against forward/auto"]);
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(1_234_567.0, 0), "1,234,567");
        assert_eq!(grouped(-999.5, 1), "-999.5");
        assert_eq!(grouped(1000.25, 2), "1,000.25");
    }
}
