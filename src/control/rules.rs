// SPDX-License-Identifier: Apache-2.0
//! `weir rules`: what a config changes in the kernel, and what of ours is there, with or without a
//! running weir.

use std::io::ErrorKind;

use serde::Serialize;

use super::places::Place;
use super::{RunError, start};
use crate::capture::{self, CaptureError, Left, Rule};
use crate::config::Config;

/// What is asked for and what is there.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// A running weir holds the rules of this network namespace.
    pub held: bool,
    /// Of ours, there now, and not asked for.
    pub others: Vec<Left>,
    /// Asked for by the config.
    pub wanted: Vec<Rule>,
}

/// What `config` asks for, and how it is now.
///
/// # Errors
///
/// A workload's cgroup or network namespace is not there, or a program that we need is missing.
pub fn show(config: &Config) -> Result<Shown, RunError> {
    let wanted = steps(config)?;
    let (held, left) = match capture::leftovers() {
        Ok(left) => (false, left),
        Err(CaptureError::Held) => (true, Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let is_wanted = |left: &Left| wanted.iter().any(|rule| rule.undo.contains(&left.undo));
    let others = left.into_iter().filter(|left| !is_wanted(left)).collect();
    Ok(Shown { held, others, wanted })
}

/// What `config` asks for, step by step; where a workload lives elsewhere, by way of nsenter(1).
///
/// # Errors
///
/// As `show`.
pub fn steps(config: &Config) -> Result<Vec<Rule>, RunError> {
    let mut all = Vec::new();
    for place in Place::all(config)? {
        let Some(plan) = place.plan(config) else { continue };
        let rules = place.within(|| plan.rules())??;
        all.extend(rules.into_iter().map(|rule| elsewhere(&place, rule)));
    }
    Ok(all)
}

/// A step as it is taken from where we are.
fn elsewhere(place: &Place, rule: Rule) -> Rule {
    let Some(prefix) = place.prefix().filter(|_| rule.by_hand) else { return rule };
    Rule {
        apply: format!("{prefix}{}", rule.apply),
        undo: format!("{prefix}{}", rule.undo),
        what: format!("{} (workload {})", rule.what, place.name()),
        ..rule
    }
}

/// What was removed, or would be, and where that was refused.
#[derive(Debug, Default)]
pub struct Cleared {
    /// Of ours.
    pub found: Vec<Left>,
    /// By network namespace: a running weir holds the rules, or it cannot be entered.
    pub refused: Vec<RunError>,
}

/// Removes what of ours is left here and where the workloads of `config` live, or only says what it
/// is. A place that is refused keeps none of the others. A network namespace that is no more has
/// nothing left.
#[must_use]
pub fn clear(config: Option<&Config>, dry_run: bool) -> Cleared {
    let clear = || if dry_run { capture::leftovers() } else { capture::clear() };
    let mut cleared = Cleared::default();
    match clear() {
        Ok(found) => cleared.found = found,
        Err(error) => cleared.refused.push(error.into()),
    }
    let workloads = config.iter().flat_map(|config| &config.workloads);
    for captured in workloads.filter(|captured| captured.is_elsewhere()) {
        let entered =
            Place::elsewhere(captured.clone()).and_then(|place| Ok((place.within(clear)??, place)));
        match entered {
            Ok((found, place)) => {
                cleared.found.extend(found.into_iter().map(|left| left_elsewhere(&place, left)));
            }
            Err(RunError::Namespace { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error) => cleared.refused.push(error),
        }
    }
    cleared
}

/// What was left in another network namespace, as it is seen from where we are.
fn left_elsewhere(place: &Place, Left { undo, what }: Left) -> Left {
    let prefix = place.prefix().unwrap_or_default();
    Left { undo: format!("{prefix}{undo}"), what: format!("{what} (workload {})", place.name()) }
}

/// Makes what can stand without a running weir, and says what it was.
///
/// # Errors
///
/// Traffic cannot be captured here, or a running weir holds the rules.
pub fn apply(config: &Config) -> Result<Vec<String>, RunError> {
    let mut done = Vec::new();
    for (place, prepared) in start::prepare(config)? {
        if let Some(prepared) = prepared {
            done.extend(place.within(|| prepared.apply())??);
        }
    }
    Ok(done)
}
