// SPDX-License-Identifier: Apache-2.0
//! `weir rules`: what capture changes in the kernel, to see, to run by hand, to remove.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use super::run::load;
use super::{Failure, Output, RulesVerb, print};
use crate::capture::{Kind, Left, Rule, State};
use crate::control::rules::{self, Cleared, Shown};

pub(super) fn run(verb: RulesVerb) -> Result<(), Failure> {
    match verb {
        RulesVerb::Apply { config, dry_run: true, output } => steps(&config, output),
        RulesVerb::Apply { config, dry_run: false, output } => apply(&config, output),
        RulesVerb::Clear { config, dry_run, output } => clear(config.as_deref(), dry_run, output),
        RulesVerb::Show { config, output } => show(&config, output),
    }
}

fn show(file: &Path, output: Output) -> Result<(), Failure> {
    let shown = rules::show(&load(file)?)?;
    print(&match output {
        Output::Json => json(&shown)?,
        Output::Table => table(&shown),
    })
}

/// Every step of a `weir run`, as a script: run as it is, it makes them; the undo stands in comments.
fn steps(file: &Path, output: Output) -> Result<(), Failure> {
    let steps = rules::steps(&load(file)?)?;
    print(&match output {
        Output::Json => json(&steps)?,
        Output::Table => script(&steps),
    })
}

fn apply(file: &Path, output: Output) -> Result<(), Failure> {
    let done = rules::apply(&load(file)?)?;
    print(&match output {
        Output::Json => json(&done)?,
        Output::Table if done.is_empty() => NOTHING_STANDS.to_owned(),
        Output::Table => lines(done.iter().map(String::as_str)),
    })
}

fn clear(file: Option<&Path>, dry_run: bool, output: Output) -> Result<(), Failure> {
    let config = file.map(load).transpose()?;
    let Cleared { found, refused } = rules::clear(config.as_ref(), dry_run);
    print(&match output {
        Output::Json => json(&found)?,
        Output::Table if found.is_empty() && refused.is_empty() => NOTHING_IS_LEFT.to_owned(),
        Output::Table if dry_run => lines(found.iter().map(|left| left.undo.as_str())),
        Output::Table => found.iter().fold(String::new(), |mut text, Left { what, .. }| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "removed {what}");
            text
        }),
    })?;
    if refused.is_empty() {
        return Ok(());
    }
    let refused: Vec<String> = refused.iter().map(ToString::to_string).collect();
    Err(Failure::Preflight(format!("rules: {}", refused.join("\nrules: "))))
}

fn script(steps: &[Rule]) -> String {
    let mut text = String::from(HEAD);
    for (number, Rule { apply, what, .. }) in (1..).zip(steps) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n# {number}. {what}\n{apply}");
    }
    text.push_str("\n# To undo it all:\n");
    for Rule { undo, .. } in steps.iter().rev() {
        let _ = writeln!(text, "#   {}", undo.trim_start_matches("# "));
    }
    text
}

fn table(shown: &Shown) -> String {
    let mut text = format!("{:<8} {:<10} {}\n", "KIND", "NOW", "ASKED FOR");
    for Rule { kind, now, what, .. } in &shown.wanted {
        let kind = match kind {
            Kind::Bpf => "bpf",
            Kind::Ip => "ip",
            Kind::Nft => "nft",
            Kind::Sysctl => "sysctl",
        };
        let now = match now {
            State::Held => "held",
            State::Missing => "missing",
            State::Stands => "stands",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{kind:<8} {now:<10} {what}");
    }
    for Left { what, .. } in &shown.others {
        let _ = writeln!(text, "{:<8} {:<10} {what}", "-", "left over");
    }
    let by = if shown.held { "a running weir holds these rules" } else { "no weir runs here" };
    let _ = writeln!(text, "\n{by}");
    text
}

fn lines<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    lines.fold(String::new(), |text, line| text + line + "\n")
}

fn json(value: &impl Serialize) -> Result<String, Failure> {
    let text = serde_json::to_string(value).map_err(|error| Failure::Failed(error.to_string()))?;
    Ok(text + "\n")
}

const HEAD: &str = "\
# What `weir run` changes in this network namespace, in this order. It makes `table inet weir` with
# `flags owner` as well, so that the table goes when weir goes, however it goes. Made by hand it leads
# traffic to weir's ports whether or not a weir runs; the next `weir run` takes its place.
";
const NOTHING_IS_LEFT: &str = "nothing of weir is left here\n";
const NOTHING_STANDS: &str = "nothing of this config can stand without a running weir: `weir run` makes it all, and takes it along\n";
