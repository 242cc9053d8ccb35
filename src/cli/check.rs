// SPDX-License-Identifier: Apache-2.0
//! `weir check`: what works here, what does not, and the one thing to do about it.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use super::{Failure, Output, print, run};
use crate::control::check::{self, Finding, Outcome};
use crate::sys::signals;

pub(super) fn check(file: Option<&Path>, output: Output, strict: bool) -> Result<(), Failure> {
    let config = file.map(run::load).transpose()?;
    // What is tried in must go, whoever wants the end.
    signals::catch().map_err(|error| Failure::Failed(format!("check: {error}")))?;
    let findings = check::run(config.as_ref());
    if signals::is_interrupted() {
        return Err(Failure::Interrupted);
    }
    match output {
        Output::Json => {
            let json = serde_json::to_string(&findings);
            let json = json.map_err(|error| Failure::Failed(error.to_string()))?;
            print(&format!("{json}\n"))?;
        }
        Output::Table => print(&table(&findings))?,
    }
    let count = |outcome| findings.iter().filter(|finding| finding.outcome == outcome).count();
    match (count(Outcome::Fails), count(Outcome::Warns)) {
        (0, 0) => Ok(()),
        (0, warnings) if strict => Err(Failure::Warned(format!("check: {warnings} warnings"))),
        (0, _) => Ok(()),
        (failures, _) => Err(Failure::Preflight(format!("check: {failures} will not work here"))),
    }
}

/// Joins `cgroup` and dials.
pub(super) fn dial(cgroup: &Path, to: SocketAddr) -> Result<(), Failure> {
    check::dial(cgroup, to).map_err(Failure::Failed)
}

/// A group is a head, a line, and its findings; what does not work is followed by the one thing to do.
fn table(findings: &[Finding]) -> String {
    let mut text = String::new();
    let mut group = "";
    for Finding { cure, group: of, outcome, what } in findings {
        if *of != group {
            group = of;
            let gap = if text.is_empty() { "" } else { "\n" };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{gap}{group}\n{}", "-".repeat(group.len()));
        }
        let _ = writeln!(text, "{} {what}", mark(*outcome));
        if *outcome != Outcome::Works {
            let _ = writeln!(text, "    {cure}");
        }
    }
    let worst = findings.iter().map(|finding| finding.outcome).min().unwrap_or(Outcome::Works);
    let _ = writeln!(text, "\nall in all: {}", mark(worst));
    text
}

const fn mark(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Fails => "\u{d7}",
        Outcome::Warns => "\u{203c}",
        Outcome::Works => "\u{221a}",
    }
}
