// SPDX-License-Identifier: Apache-2.0
//! The way to us: packets with certain marks are local, whatever their address.
//!
//! One rule for each mark and one route, in each family, through iproute2. After kill -9 they stay,
//! and no packet meets them: only our sockets and our nft table make those marks. The next start takes
//! them over, and `clear` removes them.

use std::io;
use std::process::{Command, Stdio};

use super::{CaptureError, FOREIGN_MARK, MARK_MASK, OUTBOUND_MARK, ROUTE_TABLE, STEER_MARK};
use crate::sys::{netns, process};

/// Rules and routes. Dropping it removes them.
#[derive(Debug)]
pub(super) struct Routes {
    marks: Vec<u32>,
}

/// A change by `ip`, and what undoes it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Step {
    /// Arguments of `ip`.
    pub apply: String,
    /// Arguments of `ip`.
    pub undo: String,
}

/// Nobody else's routes are in our table.
pub(super) fn preflight() -> Result<(), CaptureError> {
    for family in families() {
        let listed = show(&format!("{family} route show table {ROUTE_TABLE}"))?;
        // A table that was never used is an error to `ip`, and as good as an empty one.
        let foreign = listed.lines().find(|line| !line.starts_with("local default dev lo"));
        if let Some(route) = foreign {
            return Err(CaptureError::TableTaken { route: route.to_owned(), table: ROUTE_TABLE });
        }
    }
    Ok(())
}

/// What leads packets with `marks` to us.
pub(super) fn steps(marks: &[u32]) -> Vec<Step> {
    let mut steps = Vec::new();
    for family in families() {
        let route = format!("local default dev lo table {ROUTE_TABLE}");
        steps.push(Step {
            apply: format!("{family} route replace {route}"),
            undo: format!("{family} route del {route}"),
        });
        let rules = marks.iter().flat_map(|mark| {
            let mark = format!("fwmark {mark:#x}/{MARK_MASK:#x}");
            let lead = format!("{mark} lookup {ROUTE_TABLE}");
            // Where packets keep their mark when the kernel asks for the way back to their source
            // (`src_valid_mark`), as if it sent from lo, that way must not lead to us, or they are
            // martians. A rule that is added later comes first.
            let way_back = format!("iif lo {mark} goto {MAIN_RULE}");
            [Some(lead), mark.contains(&format!("{FOREIGN_MARK:#x}")).then_some(way_back)]
        });
        steps.extend(rules.flatten().map(|rule| Step {
            apply: format!("{family} rule add {rule}"),
            undo: format!("{family} rule del {rule}"),
        }));
    }
    steps
}

/// What would undo the steps of any weir that stand.
pub(super) fn standing() -> Result<Vec<String>, CaptureError> {
    let mut standing = Vec::new();
    for Step { undo, .. } in steps(&MARKS).into_iter().rev() {
        if stands(&undo)? {
            standing.push(undo);
        }
    }
    Ok(standing)
}

/// Removes what a killed weir has left, and says what that was. Asked again, it finds nothing.
pub(super) fn clear() -> Result<Vec<String>, CaptureError> {
    let mut removed = Vec::new();
    for Step { undo, .. } in steps(&MARKS).into_iter().rev() {
        // Until there is none: weirs that were killed in turn may have added a rule each.
        while stands(&undo)? && change(&undo).is_ok() {
            removed.push(format!("ip {undo}"));
        }
    }
    Ok(removed)
}

impl Routes {
    /// Adds what is not there yet; undoes it all if a step fails.
    pub(super) fn install(marks: Vec<u32>) -> Result<Routes, CaptureError> {
        let routes = Routes { marks };
        for Step { apply, undo } in steps(&routes.marks) {
            if !stands(&undo)? {
                change(&apply)?;
            }
            process::made(&apply);
        }
        Ok(routes)
    }

    /// Nobody has removed them.
    pub(super) fn stand(&self) -> bool {
        steps(&self.marks).iter().all(|step| stands(&step.undo).is_ok_and(|stands| stands))
    }
}

impl Drop for Routes {
    fn drop(&mut self) {
        for Step { undo, .. } in steps(&self.marks).into_iter().rev() {
            // What is gone already needs no removing.
            let _ = show(&undo);
        }
    }
}

/// Whether there is what `undo` would remove.
pub(super) fn stands(undo: &str) -> Result<bool, CaptureError> {
    let asked = undo.replace(" del ", " show ").replace("lookup", "table");
    let asked = asked.replace("local default", "default type local");
    // Where it goes to is not to be asked for; its mark and interface say enough.
    let asked = asked.replace(&format!(" goto {MAIN_RULE}"), "");
    Ok(!show(&asked)?.trim().is_empty())
}

fn families() -> impl Iterator<Item = &'static str> {
    let v6 = netns::has_ipv6();
    ["-4", "-6"].into_iter().take(1 + usize::from(v6))
}

/// What `ip` answers; nothing if it was refused.
fn show(arguments: &str) -> Result<String, CaptureError> {
    let output = command(arguments).stderr(Stdio::null()).output().map_err(missing)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn change(arguments: &str) -> Result<(), CaptureError> {
    let output = command(arguments).output().map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let step = format!("ip {arguments}");
    let is_down = said.contains("is not up") || said.contains("is down");
    let cure = if is_down { " (`ip link set lo up`)" } else { " (needs CAP_NET_ADMIN)" };
    Err(CaptureError::Refused { cure, said, step })
}

fn command(arguments: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(arguments.split(' ')).stdin(Stdio::null());
    command
}

fn missing(source: io::Error) -> CaptureError {
    CaptureError::Missing { package: "iproute2", program: "ip", source }
}

/// Every mark that any weir leads to itself.
const MARKS: [u32; 3] = [STEER_MARK, OUTBOUND_MARK, FOREIGN_MARK];
/// The preference of the rule for the main table, where the kernel puts it.
const MAIN_RULE: u32 = 32_766;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_names_its_undo() {
        let steps = steps(&[STEER_MARK]);
        assert_eq!(steps[0].apply, "-4 route replace local default dev lo table 133");
        assert_eq!(steps[0].undo, "-4 route del local default dev lo table 133");
        assert_eq!(steps[1].apply, "-4 rule add fwmark 0x53a/0xfff lookup 133");
        assert_eq!(steps[1].undo, "-4 rule del fwmark 0x53a/0xfff lookup 133");
    }
}
