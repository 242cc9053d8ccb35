// SPDX-License-Identifier: Apache-2.0
//! `weir tune`: the profiles, and the sysctls that they want of this host.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Failure, Output, ShowAs, print, profile_of};
use crate::control::shown;
use crate::profile::Profile;
use crate::tune::{self, Left, Step, TuneError, Tuning, Verdict};

#[derive(Debug, Subcommand)]
pub(super) enum TuneVerb {
    /// Set the sysctls that a profile wants; `off` puts them back
    Apply {
        /// A shipped profile, or a path ending in .yaml
        profile: String,
        #[command(flatten)]
        change: Change,
    },
    /// List the shipped profiles
    List {
        /// How to show it
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Put back the sysctls that `apply` has changed; harmless where it has not
    Off {
        #[command(flatten)]
        change: Change,
    },
    /// Say which profile a measurement speaks for, and why
    Recommend {
        /// What `weir-loadtest compare --profiles` wrote
        result: PathBuf,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Print a profile, every key filled in
    Show {
        /// A shipped profile, or a path ending in .yaml
        profile: String,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "yaml")]
        output: ShowAs,
    },
    /// Compare the sysctls that a profile wants with this host; exit with 1 if they differ
    Verify {
        /// A shipped profile, or a path ending in .yaml
        profile: String,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
}

/// How to change sysctls.
#[derive(Debug, clap::Args)]
pub(super) struct Change {
    /// Print the steps and their undo, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// How to show it
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    /// Where it is noted what was before; below /run/weir if not said
    #[arg(long, value_name = "PATH")]
    state: Option<PathBuf>,
}

pub(super) fn run(verb: TuneVerb) -> Result<(), Failure> {
    match verb {
        TuneVerb::Apply { profile, change } => apply(&profile_of(&profile)?, change),
        TuneVerb::List { output } => list(output),
        TuneVerb::Off { change } => off(change),
        TuneVerb::Recommend { result, output } => recommend(&result, output),
        TuneVerb::Show { profile, output } => {
            let shown = shown::profile(&profile_of(&profile)?);
            print(&match output {
                ShowAs::Json => format!("{shown:#}\n"),
                ShowAs::Yaml => shown::yaml(&shown),
            })
        }
        TuneVerb::Verify { profile, output } => verify(&profile_of(&profile)?, output),
    }
}

fn list(output: Output) -> Result<(), Failure> {
    let profiles: Vec<Profile> = Profile::names().into_iter().filter_map(Profile::named).collect();
    let json = profiles.iter().map(|one| json!({ "name": one.name, "summary": one.summary }));
    let rows = profiles.iter().map(|one| format!("{:<12} {}\n", one.name, one.summary));
    show(output, &json.collect::<Value>(), || rows.collect())
}

fn verify(profile: &Profile, output: Output) -> Result<(), Failure> {
    let rows = Tuning::of_host(None).verify(profile).map_err(failed)?;
    show(output, &rows, || {
        let mut table = format!("  {:<40} {:<16} {:<16}\n", "SYSCTL", "WANTED", "NOW");
        for row in &rows {
            let mark = if row.met { '\u{221a}' } else { '\u{d7}' };
            // Writing to a string cannot fail.
            let _ = writeln!(table, "{mark} {:<40} {:<16} {:<16}", row.name, row.wanted, row.now);
        }
        table
    })?;
    match rows.iter().filter(|row| !row.met).count() {
        0 => Ok(()),
        differ => Err(Failure::Failed(format!(
            "{differ} of {} sysctls are not as {} wants them (`weir tune apply {}`)",
            rows.len(),
            profile.name,
            profile.name,
        ))),
    }
}

fn recommend(result: &Path, output: Output) -> Result<(), Failure> {
    let said = tune::recommend(result).map_err(|error| Failure::Failed(error.to_string()))?;
    show(output, &said, || {
        let mut table =
            format!("{:<22} {:<20} {:<28} AGAINST BALANCED\n", "WORKLOAD", "BY", "BEST");
        for verdict in &said.verdicts {
            let gain = |(name, gain): (&String, &f64)| format!("{name} {gain:.2}");
            let others = verdict.gains.iter().filter(|(name, _)| *name != "balanced");
            let gains: Vec<String> = others.map(gain).collect();
            let (best, gains) = (verdict.best.join(" = "), gains.join(", "));
            let (workload, figure) = (&verdict.workload, &verdict.figure);
            // Writing to a string cannot fail.
            let _ = writeln!(table, "{workload:<22} {figure:<20} {best:<28} {gains}");
        }
        let is_best = |best: &&Verdict| best.best.contains(&said.profile);
        let points = said.verdicts.iter().filter(is_best).count();
        let (profile, all) = (&said.profile, said.verdicts.len());
        let _ = writeln!(
            table,
            "\n{profile}: the best, or not to be told from the best, under {points} of {all} workloads"
        );
        table
    })
}

fn apply(profile: &Profile, change: Change) -> Result<(), Failure> {
    let tuning = Tuning::of_host(change.state);
    let steps = if change.dry_run { tuning.steps(profile) } else { tuning.apply(profile) };
    let steps = steps.map_err(failed)?;
    show(change.output, &steps, || match steps.is_empty() {
        true => format!("every sysctl is as {} wants it\n", profile.name),
        false => script(&steps),
    })
}

fn off(change: Change) -> Result<(), Failure> {
    let tuning = Tuning::of_host(change.state);
    let undone = if change.dry_run { tuning.undo_steps() } else { tuning.off() };
    let (steps, left) = undone.map_err(failed)?;
    show(change.output, &json!({ "steps": steps, "left": left }), || {
        let mut text = match steps.is_empty() {
            true => "nothing to put back\n".to_owned(),
            false => script(&steps),
        };
        for Left { name, now } in &left {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# {name} is {now}: somebody else has changed it since; left");
        }
        text
    })
}

/// The steps as commands, each with its undo; runnable by hand.
fn script(steps: &[Step]) -> String {
    let line = |Step { before, name, value }: &Step| {
        format!("sysctl -w {name}='{value}'   # undo: sysctl -w {name}='{before}'\n")
    };
    steps.iter().map(line).collect()
}

fn show(
    output: Output,
    json: &impl Serialize,
    table: impl FnOnce() -> String,
) -> Result<(), Failure> {
    match output {
        Output::Json => {
            let json = serde_json::to_string(json);
            print(&format!("{}\n", json.map_err(|error| Failure::Failed(error.to_string()))?))
        }
        Output::Table => print(&table()),
    }
}

fn failed(error: TuneError) -> Failure {
    match error {
        TuneError::Read { .. } | TuneError::Write { .. } => Failure::Preflight(error.to_string()),
        TuneError::State { .. } => Failure::Failed(error.to_string()),
    }
}
