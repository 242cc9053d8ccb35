// SPDX-License-Identifier: Apache-2.0
//! `weir check`: what works here, what does not, and the one thing to do about it.

use std::fmt::Write as _;
use std::path::Path;

use super::{Failure, Output, print, run};
use crate::control::check::{self, Finding, Outcome};

pub(super) fn check(file: Option<&Path>, output: Output, strict: bool) -> Result<(), Failure> {
    let config = file.map(run::load).transpose()?;
    let findings = check::run(config.as_ref());
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

fn table(findings: &[Finding]) -> String {
    let mut text = String::new();
    let mut group = "";
    for finding in findings {
        if finding.group != group {
            group = finding.group;
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{group}");
        }
        let mark = match finding.outcome {
            Outcome::Fails => "\u{d7}",
            Outcome::Warns => "!",
            Outcome::Works => "\u{221a}",
        };
        let _ = writeln!(text, "  {mark} {}", finding.what);
        if finding.outcome != Outcome::Works {
            let _ = writeln!(text, "      {}", finding.cure);
        }
    }
    text
}
