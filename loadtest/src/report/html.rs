// SPDX-License-Identifier: Apache-2.0
//! One page with everything in it: words, charts, tables, and how to do it again.
//!
//! Without a script it still says all: charts only draw what the tables have.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use crate::compare::result::{Cell, Comparison, FIGURES};
use crate::compare::shown;

/// What the script draws.
#[derive(Serialize)]
struct Data<'a> {
    families: Vec<Family<'a>>,
    targets: Vec<&'a str>,
    workloads: Vec<Part<'a>>,
}

/// Workloads that differ by their connections only.
#[derive(Serialize)]
struct Family<'a> {
    connections: Vec<usize>,
    lines: Vec<Line<'a>>,
    name: &'a str,
}

#[derive(Serialize)]
struct Line<'a> {
    p99: Vec<Option<f64>>,
    rate: Vec<Option<f64>>,
    target: &'a str,
}

#[derive(Serialize)]
struct Part<'a> {
    cells: Vec<Drawn<'a>>,
    name: &'a str,
    unit: &'a str,
}

#[derive(Serialize)]
struct Drawn<'a> {
    /// Median, and the ends of its interval.
    figures: BTreeMap<&'static str, [f64; 3]>,
    histogram: &'a [(f64, u64)],
    /// Rates of all rounds, one after the other.
    intervals: Vec<(f64, f64)>,
    target: &'a str,
}

pub(super) fn render(comparison: &Comparison, baseline: &str) -> Result<String> {
    // A script ends at its end tag, whatever it is inside of.
    let data = serde_json::to_string(&data(comparison))?.replace("</", "<\\/");
    let mut page =
        String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    page.push_str("<title>weir-loadtest: comparison</title>\n");
    // Writing to a string cannot fail.
    let _ = writeln!(page, "<style>{UPLOT_CSS}\n{CSS}</style>\n</head>\n<body>\n<main>");
    head(&mut page, comparison);
    said(&mut page, comparison, baseline);
    workloads(&mut page, comparison, baseline);
    origin(&mut page, comparison);
    let _ =
        writeln!(page, "</main>\n<script type=\"application/json\" id=\"data\">{data}</script>");
    let _ = writeln!(
        page,
        "<script>/*\n{UPLOT_LICENSE}*/\n{UPLOT}</script>\n<script>{SCRIPT}</script>"
    );
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

fn head(page: &mut String, comparison: &Comparison) {
    let rounds = comparison.cells.iter().map(|cell| cell.rounds.len()).max().unwrap_or(0);
    let _ = writeln!(
        page,
        "<header><h1>Forwarders compared</h1><button id=\"theme\">light / dark</button></header>\n\
         <div class=\"quiet\">{}, {} targets, {} workloads, {rounds} interleaved rounds of {:.2} s, \
         {:.0} s in all{}</div>",
        escaped(&date(comparison.started)),
        comparison.targets.len(),
        comparison.workloads().len(),
        comparison.seconds_each,
        comparison.took_seconds,
        if comparison.is_partial { "; interrupted: partial" } else { "" },
    );
    page.push_str("<nav>");
    for workload in comparison.workloads() {
        let name = escaped(workload);
        let _ = write!(page, "<a href=\"#{name}\">{name}</a>");
    }
    page.push_str("<a href=\"#environment\">environment and commands</a></nav>\n");
}

fn said(page: &mut String, comparison: &Comparison, baseline: &str) {
    page.push_str("<h2>In words</h2>\n<div class=\"card summary\"><ul>\n");
    for sentence in shown::summary(comparison, baseline) {
        let _ = writeln!(page, "<li>{}</li>", escaped(&sentence));
    }
    page.push_str("</ul></div>\n");
    if !comparison.warnings.is_empty() {
        page.push_str("<div class=\"card summary warnings\"><ul>\n");
        for warning in &comparison.warnings {
            let _ = writeln!(page, "<li>{}</li>", escaped(warning));
        }
        page.push_str("</ul></div>\n");
    }
    let confidence =
        comparison.cells.iter().map(|cell| cell.estimate(cell.first_figure()).confidence);
    let confidence = confidence.fold(0.0_f64, f64::max) * 100.0;
    let _ = writeln!(
        page,
        "<p class=\"quiet\">Values are medians of the rounds. Intervals hold the true value with {confidence:.0} % \
         confidence (Hodges–Lehmann, from the ranks of the rounds); ratios are of pairs measured next to each other. \
         “No difference”: the interval of the ratio holds 1, or the ratio is within 2 % of it.</p>"
    );
}

fn workloads(page: &mut String, comparison: &Comparison, baseline: &str) {
    if !families(comparison).is_empty() {
        page.push_str(
            "<h2>Scaling by connections</h2>\n<div class=\"grid\" id=\"scaling\"></div>\n",
        );
    }
    for table in shown::tables(comparison, baseline) {
        let name = escaped(&table.workload);
        let _ = writeln!(
            page,
            "<h2 id=\"{name}\">{name}</h2>\n<div class=\"grid\" data-workload=\"{name}\"></div>\n\
             <div class=\"card scroll\"><table><thead><tr>"
        );
        let class = |column: usize| match table.head[column].starts_with("against") {
            true => " class=\"words\"",
            false => "",
        };
        for (column, cell) in table.head.iter().enumerate() {
            let _ = write!(page, "<th{}>{}</th>", class(column), escaped(cell));
        }
        page.push_str("</tr></thead><tbody>\n");
        for row in &table.rows {
            page.push_str("<tr>");
            for (column, cell) in row.iter().enumerate() {
                let _ = write!(page, "<td{}>{}</td>", class(column), escaped(cell));
            }
            page.push_str("</tr>\n");
        }
        page.push_str("</tbody></table></div>\n");
    }
}

/// How to do it again.
fn origin(page: &mut String, comparison: &Comparison) {
    page.push_str("<h2 id=\"environment\">Environment and commands</h2>\n<div class=\"card\"><dl class=\"environment\">\n");
    for (name, value) in environment(comparison) {
        let _ = writeln!(page, "<dt>{name}</dt><dd>{}</dd>", escaped(&value));
    }
    page.push_str("</dl></div>\n<div class=\"card\"><h3>Made by</h3><pre>");
    page.push_str(&escaped(&comparison.command.join(" ")));
    page.push_str("</pre></div>\n<div class=\"card\"><h3>Targets</h3>\n");
    for target in &comparison.targets {
        let _ = writeln!(
            page,
            "<details><summary>{} <span class=\"quiet\">{}</span></summary><pre>{}</pre></details>",
            escaped(&target.name),
            escaped(&target.version),
            escaped(&target.config)
        );
    }
    page.push_str("</div>\n");
}

/// The machine, in pairs of words.
pub(super) fn environment(comparison: &Comparison) -> Vec<(&'static str, String)> {
    let machine = &comparison.machine;
    let [host, inside] = &machine.congestion;
    let or = |text: &str, otherwise: &str| {
        if text.is_empty() { otherwise.to_owned() } else { text.to_owned() }
    };
    vec![
        ("kernel", machine.kernel.clone()),
        (
            "CPU",
            format!(
                "{}, {} allowed{}",
                or(&machine.cpu_model, "unknown"),
                machine.cpus_allowed.len(),
                if machine.is_virtual { ", virtual" } else { "" }
            ),
        ),
        (
            "pinning",
            format!(
                "client and server on CPU {}, forwarder on CPU {}",
                machine.generator_cpu, machine.forwarder_cpu
            ),
        ),
        (
            "memory",
            format!(
                "{:.1} GiB",
                f64::from(u32::try_from(machine.memory_kb >> 10).unwrap_or(u32::MAX)) / 1024.0
            ),
        ),
        ("congestion control", format!("{inside} (the host has {host})")),
        ("governor", or(&machine.governor, "none")),
        ("autogroup", or(&machine.autogroup, "none")),
        ("clock source", or(&machine.clocksource, "unknown")),
        ("descriptors", machine.descriptors_max.to_string()),
        (
            "others before the start",
            format!(
                "{:.2} CPUs; load {}; {}",
                machine.others_cpu, machine.loadavg, machine.pressure
            ),
        ),
        ("weir-loadtest", machine.loadtest.clone()),
    ]
}

fn data(comparison: &Comparison) -> Data<'_> {
    let part = |workload| {
        let cells: Vec<&Cell> =
            comparison.cells.iter().filter(|cell| cell.workload == workload).collect();
        let unit = cells.first().map_or("", |cell| cell.unit.as_str());
        Part { cells: cells.into_iter().map(drawn).collect(), name: workload, unit }
    };
    Data {
        families: families(comparison),
        targets: comparison.targets.iter().map(|target| target.name.as_str()).collect(),
        workloads: comparison.workloads().into_iter().map(part).collect(),
    }
}

fn drawn(cell: &Cell) -> Drawn<'_> {
    let estimate = |name: &'static str| {
        let value = cell.median(name)?;
        let estimate = cell.estimate(name);
        Some((name, [value, estimate.low, estimate.high]))
    };
    Drawn {
        figures: FIGURES.iter().filter_map(|figure| estimate(figure.name)).collect(),
        histogram: &cell.histogram_us,
        intervals: intervals(cell),
        target: &cell.target,
    }
}

/// Exchanges a second, or Gbit/s, in each stretch.
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
fn intervals(cell: &Cell) -> Vec<(f64, f64)> {
    let mut list = Vec::new();
    let mut start = 0.0;
    for round in &cell.rounds {
        let mut before = 0.0;
        for interval in &round.outcome.intervals {
            let span = interval.until - before;
            before = interval.until;
            // The last stretch may be too short to say anything.
            if span < STRETCH_MIN_SECONDS {
                continue;
            }
            let amount = match cell.unit.as_str() {
                "GB" => interval.bytes as f64 * 8e-9,
                _ => interval.done as f64,
            };
            let time = ((start + interval.until) * 20.0).round() / 20.0;
            list.push((time, (amount / span * 100.0).round() / 100.0));
        }
        start += round.outcome.seconds;
    }
    list
}

/// Workloads of which there are at least three that differ by connections only.
fn families(comparison: &Comparison) -> Vec<Family<'_>> {
    let mut names: Vec<&str> = Vec::new();
    for cell in comparison.cells.iter().filter(|cell| cell.median("per_second").is_some()) {
        let name = cell.workload.rsplit_once('-').map_or("", |(name, _)| name);
        if !cell.workload.contains('@') && !names.contains(&name) {
            names.push(name);
        }
    }
    let families = names.into_iter().map(|name| family(comparison, name));
    families.filter(|family| family.connections.len() >= FAMILY_MIN).collect()
}

fn family<'a>(comparison: &'a Comparison, name: &'a str) -> Family<'a> {
    let belongs = |cell: &&Cell| cell.workload.rsplit_once('-').is_some_and(|(own, _)| own == name);
    let mut connections: Vec<usize> =
        comparison.cells.iter().filter(belongs).map(|cell| cell.connections).collect();
    connections.sort_unstable();
    connections.dedup();
    let line = |target: &'a str| {
        let at = |figure: &'static str| {
            let value =
                |count: &usize| comparison.cell(target, &format!("{name}-{count}"))?.median(figure);
            connections.iter().map(value).collect()
        };
        Line { p99: at("p99_us"), rate: at("per_second"), target }
    };
    let lines = comparison.targets.iter().map(|target| line(&target.name)).collect();
    Family { connections, lines, name }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Seconds since 1970 as `2026-11-24 23:05 UTC` (Howard Hinnant's days_from_civil, backwards).
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest % 3600 / 60)
}

const CSS: &str = include_str!("page.css");
const FAMILY_MIN: usize = 3;
const SCRIPT: &str = include_str!("page.js");
const STRETCH_MIN_SECONDS: f64 = 0.05;
const UPLOT: &str = include_str!("../../assets/uplot/uPlot.iife.min.js");
const UPLOT_CSS: &str = include_str!("../../assets/uplot/uPlot.min.css");
const UPLOT_LICENSE: &str = include_str!("../../assets/uplot/LICENSE");

#[cfg(test)]
mod tests {
    use super::{date, escaped};

    #[test]
    fn days_become_dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_826_530), "2000-02-29 12:15 UTC");
        assert_eq!(date(1_798_761_599), "2026-12-31 23:59 UTC");
    }

    #[test]
    fn nothing_of_a_result_becomes_a_tag() {
        assert_eq!(escaped("<script>&\""), "&lt;script&gt;&amp;&quot;");
    }
}
