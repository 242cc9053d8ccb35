// SPDX-License-Identifier: Apache-2.0
//! The way to us: packets with certain marks are local, whatever their address.
//!
//! One rule for each mark and one route, in each family, through iproute2. After kill -9 they stay,
//! and no packet meets them: only our sockets and our nft table make those marks. The next start takes
//! them over, and `clear` removes them. The same route of somebody else serves as well, and is left.

use std::io;
use std::process::{Command, Stdio};

use super::{CaptureError, FOREIGN_MARK, MARK_MASK, OUTBOUND_MARK, ROUTE_TABLE, STEER_MARK};
use crate::sys::{netns, process};

/// Rules and routes. Dropping it removes them.
#[derive(Debug, Default)]
pub(super) struct Routes {
    marks: Vec<u32>,
}

/// A change by `ip`, and what undoes it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Step {
    /// Arguments of `ip`.
    pub apply: String,
    /// Arguments of `ip` that show what would do, whoever made it.
    show: String,
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
    for family in families().filter(|_| !marks.is_empty()) {
        let route = format!("local default dev lo table {ROUTE_TABLE} proto {PROTOCOL}");
        steps.push(Step {
            apply: format!("{family} route replace {route}"),
            show: format!("{family} route show type local default dev lo table {ROUTE_TABLE}"),
            undo: format!("{family} route del {route}"),
        });
        let rules = marks.iter().flat_map(|&number| {
            let mark = format!("fwmark {number:#x}/{MARK_MASK:#x}");
            let lead =
                (format!("{mark} lookup {ROUTE_TABLE}"), format!("{mark} table {ROUTE_TABLE}"));
            // Where packets keep their mark when the kernel asks for the way back to their source
            // (`src_valid_mark`), as if it sent from lo, that way must not lead to us, or they are
            // martians. A rule that is added later comes first.
            // Where it goes to is not to be asked for; its mark and interface say enough.
            let way_back = (format!("iif lo {mark} goto {MAIN_RULE}"), format!("iif lo {mark}"));
            [Some(lead), (number == FOREIGN_MARK).then_some(way_back)]
        });
        steps.extend(rules.flatten().map(|(rule, asked)| Step {
            apply: format!("{family} rule add {rule}"),
            show: format!("{family} rule show {asked}"),
            undo: format!("{family} rule del {rule}"),
        }));
    }
    steps
}

/// What would undo the steps of any weir that stand.
pub(super) fn standing() -> Result<Vec<String>, CaptureError> {
    let mut standing = Vec::new();
    for step in steps(&MARKS).into_iter().rev() {
        if step.is_ours()? {
            standing.push(step.undo);
        }
    }
    Ok(standing)
}

/// Removes what a killed weir has left, and says what that was. Asked again, it finds nothing.
pub(super) fn clear() -> Result<Vec<String>, CaptureError> {
    let mut removed = Vec::new();
    for step in steps(&MARKS).into_iter().rev() {
        // Until there is none: weirs that were killed in turn may have added a rule each.
        while step.is_ours()? && change(&step.undo).is_ok() {
            removed.push(format!("ip {}", step.undo));
        }
    }
    Ok(removed)
}

impl Step {
    /// It is there, or something as good.
    pub(super) fn stands(&self) -> Result<bool, CaptureError> {
        Ok(!show(&self.show)?.trim().is_empty())
    }

    /// True if it was made just now.
    fn make_unless(&self, stands: bool) -> Result<bool, CaptureError> {
        if !stands {
            change(&self.apply)?;
        }
        Ok(!stands)
    }

    /// It is there, and its undo would remove it.
    fn is_ours(&self) -> Result<bool, CaptureError> {
        let shown = show(&self.show)?;
        let is_route = self.undo.contains(" route ");
        Ok(shown.lines().any(|line| !is_route || line.contains(&format!("proto {PROTOCOL} "))))
    }
}

impl Routes {
    /// Adds what is not there yet; a step that fails undoes those before it.
    pub(super) fn install(marks: &[u32]) -> Result<Routes, CaptureError> {
        let mut routes = Routes::default();
        routes.put(marks)?;
        Ok(routes)
    }

    /// Leads packets with `marks` here as well, and puts back what is missing for them. A step that
    /// fails undoes those before it, and nothing else.
    pub(super) fn put(&mut self, marks: &[u32]) -> Result<(), CaptureError> {
        let mut done: Vec<String> = Vec::new();
        for step in steps(marks) {
            match step.stands().and_then(|stands| step.make_unless(stands)) {
                Ok(true) => done.push(step.undo),
                Ok(false) => {}
                Err(error) => {
                    done.iter().rev().for_each(|undo| remove(undo));
                    return Err(error);
                }
            }
            process::made(&step.apply);
        }
        let new = marks.iter().filter(|mark| !self.marks.contains(mark));
        let new: Vec<u32> = new.copied().collect();
        self.marks.extend(new);
        Ok(())
    }

    /// Nobody has removed them.
    pub(super) fn stand(&self) -> bool {
        steps(&self.marks).iter().all(|step| step.stands().is_ok_and(|stands| stands))
    }
}

impl Drop for Routes {
    fn drop(&mut self) {
        steps(&self.marks).iter().rev().for_each(|step| remove(&step.undo));
    }
}

/// What is gone already, or is not ours, needs no removing.
fn remove(undo: &str) {
    let _ = show(undo);
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
/// Marks routes as ours (`rtm_protocol`, rtnetlink(7)): the number of our table, which nobody else uses.
const PROTOCOL: u32 = ROUTE_TABLE;
/// The preference of the rule for the main table, where the kernel puts it.
const MAIN_RULE: u32 = 32_766;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_names_its_undo() {
        let steps = steps(&[STEER_MARK]);
        assert_eq!(steps[0].apply, "-4 route replace local default dev lo table 133 proto 133");
        assert_eq!(steps[0].undo, "-4 route del local default dev lo table 133 proto 133");
        assert_eq!(steps[1].apply, "-4 rule add fwmark 0x53a/0xfff lookup 133");
        assert_eq!(steps[1].undo, "-4 rule del fwmark 0x53a/0xfff lookup 133");
    }
}
