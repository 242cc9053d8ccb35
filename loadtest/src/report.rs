// SPDX-License-Identifier: Apache-2.0
//! `report`: a result as a page, as tables, as data for other programs.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::arguments::Report;
use crate::compare::result::{Comparison, FIGURES};
use crate::compare::{self, shown};
use crate::{Exit, print};

mod fortio;
mod html;

/// What to make of a result.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Format {
    /// A line for each figure of each round
    Csv,
    /// For viewers of fortio's results
    Fortio,
    /// One file that needs no network
    Html,
    /// All that is known
    Json,
    /// Tables
    Markdown,
}

/// Writes the report, and holds it against thresholds.
pub(crate) fn report(arguments: &Report) -> Result<Exit> {
    let comparison = Comparison::read(&arguments.result)?;
    let baseline = arguments.baseline.clone().unwrap_or_else(|| comparison.baseline());
    let is_known = comparison.targets.iter().any(|target| target.name == baseline);
    ensure!(is_known, "--baseline {baseline}: the result has no such target");
    let text = match arguments.format {
        Format::Csv => csv(&comparison),
        Format::Fortio => fortio::render(&comparison)?,
        Format::Html => html::render(&comparison, &baseline)?,
        Format::Json => format!("{}\n", serde_json::to_string_pretty(&comparison)?),
        Format::Markdown => markdown(&comparison, &baseline),
    };
    let out = arguments.out.clone().or_else(|| {
        // A page on a terminal is of no use.
        (arguments.format == Format::Html).then(|| arguments.result.with_extension("html"))
    });
    match out.filter(|path| path.as_os_str() != "-") {
        Some(path) => {
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            eprintln!("wrote {}", path.display());
        }
        None => print(&text),
    }
    compare::judge(&arguments.threshold, &comparison)
}

fn csv(comparison: &Comparison) -> String {
    let mut text = String::from("workload,target,connections,unit,round,figure,value\n");
    for cell in &comparison.cells {
        for (number, round) in cell.rounds.iter().enumerate() {
            let known = FIGURES
                .iter()
                .filter_map(|figure| Some((figure.name, round.figures.get(figure.name)?)));
            for (name, value) in known {
                // Writing to a string cannot fail; words are our own, and have no commas.
                let _ = writeln!(
                    text,
                    "{},{},{},{},{},{name},{value}",
                    cell.workload,
                    cell.target,
                    cell.connections,
                    cell.unit,
                    number + 1,
                );
            }
        }
    }
    text
}

fn markdown(comparison: &Comparison, baseline: &str) -> String {
    let mut text = String::from("# Comparison\n\n");
    // Writing to a string cannot fail.
    for sentence in shown::summary(comparison, baseline) {
        let _ = writeln!(text, "- {sentence}");
    }
    for warning in &comparison.warnings {
        let _ = writeln!(text, "- Warning: {warning}");
    }
    for table in shown::tables(comparison, baseline) {
        let _ = writeln!(text, "\n## {}\n", table.workload);
        let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
        let rule: Vec<String> = table
            .head
            .iter()
            .enumerate()
            .map(|(column, _)| if column == 0 { "---" } else { "---:" }.to_owned())
            .collect();
        let _ = writeln!(text, "{}\n{}", line(&table.head), line(&rule));
        for row in &table.rows {
            let _ = writeln!(text, "{}", line(row));
        }
    }
    let _ = writeln!(text, "\n## Made by\n\n```\n{}\n```\n", comparison.command.join(" "));
    for (name, value) in html::environment(comparison) {
        let _ = writeln!(text, "- {name}: {value}");
    }
    text
}
