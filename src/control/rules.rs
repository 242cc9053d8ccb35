// SPDX-License-Identifier: Apache-2.0
//! `weir rules`: what a config changes in the kernel, and what of ours is there, with or without a
//! running weir.

use serde::Serialize;

use super::capturing;
use crate::capture::{self, CaptureError, Left, Plan, Rule};
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
/// A workload's cgroup is not there, or a program that we need is missing.
pub fn show(config: &Config) -> Result<Shown, CaptureError> {
    let wanted = steps(config)?;
    let (held, left) = match capture::leftovers() {
        Ok(left) => (false, left),
        Err(CaptureError::Held) => (true, Vec::new()),
        Err(error) => return Err(error),
    };
    let is_wanted = |left: &Left| wanted.iter().any(|rule| rule.undo.contains(&left.undo));
    let others = left.into_iter().filter(|left| !is_wanted(left)).collect();
    Ok(Shown { held, others, wanted })
}

/// What `config` asks for, step by step.
///
/// # Errors
///
/// As `show`.
pub fn steps(config: &Config) -> Result<Vec<Rule>, CaptureError> {
    capturing::plan(config).as_ref().map_or(Ok(Vec::new()), Plan::rules)
}

/// Makes what can stand without a running weir, and says what it was.
///
/// # Errors
///
/// Traffic cannot be captured here, or a running weir holds the rules.
pub fn apply(config: &Config) -> Result<Vec<String>, CaptureError> {
    match capturing::plan(config) {
        Some(plan) => plan.prepare()?.apply(),
        None => Ok(Vec::new()),
    }
}
