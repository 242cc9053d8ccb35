// SPDX-License-Identifier: Apache-2.0
//! The nft table: its text, and a table that lives as long as we do.
//!
//! One text serves check, dry run and install: `draft` collects the rules of every way of capture,
//! `table` owns what was installed.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use super::plan::{Plan, Way, Workload};
use super::rules::{self, State};
use super::{
    CaptureError, MARK_MASK, OWN_MARK, RuleCounts, SOCKET_MARK, SOCKET_MARK_MASK, STEER_MARK,
    connect, redirect, tproxy,
};
use crate::sys::cgroup;

pub(super) use draft::{Draft, Hook};
pub(super) use table::Table;

mod draft;
pub(super) mod elements;
mod table;

/// The rules of a plan. `accepts_marks`: the workload's sockets inherit the mark of what reaches
/// them.
pub(super) fn draft(plan: &Plan, accepts_marks: bool) -> Result<Draft, CaptureError> {
    let mut draft = Draft::default();
    leave_untracked(&mut draft, plan);
    let by = |way: Way| plan.netfilter().filter(|one| one.way == way).collect::<Vec<_>>();
    let alone = plan.inbound.len() == 1;
    for inbound in &plan.inbound {
        match inbound.way {
            Way::Redirect => redirect::inbound(&mut draft, inbound, &plan.own_ports),
            Way::Tproxy => {
                let own_ports = &plan.own_ports;
                tproxy::inbound(&mut draft, (inbound, alone), own_ports, accepts_marks);
            }
        }
    }
    tproxy::outbound(&mut draft, &by(Way::Tproxy))?;
    redirect::outbound(&mut draft, &by(Way::Redirect))?;
    for hook in plan.hooks() {
        connect::untracked(&mut draft, hook);
    }
    Ok(draft)
}

/// Packets of sockets that belong to flows taken past connection tracking, and of those that dial
/// under a client's address.
///
/// Every packet of ours meets these rules, so they are of what nft decides fastest: no set, no
/// counter. What our sockets send over loopback arrives as it left, with its mark and untracked, and
/// is let through before a socket is looked up for it, which costs more than all else together.
fn leave_untracked(draft: &mut Draft, plan: &Plan) {
    let any_of_ours = format!("meta mark & {SOCKET_MARK_MASK:#x} == {SOCKET_MARK:#x}");
    if plan.avoids_tracking() {
        draft.rule(Hook::Prerouting, format!("iif lo {any_of_ours} accept"));
        draft.rule(
            Hook::Prerouting,
            format!(
                "meta l4proto tcp socket mark & {MARK_MASK:#x} == {OWN_MARK:#x} counter notrack accept"
            ),
        );
        draft.rule(Hook::Output, format!("{any_of_ours} notrack accept"));
    } else if plan.keeps_source() {
        let steered = format!("meta mark & {MARK_MASK:#x} == {STEER_MARK:#x}");
        draft.rule(Hook::Output, format!("{steered} notrack accept"));
    }
}

/// The beginnings of the rules that are for `workload` alone, each with a space at its end if there
/// is anything to say.
pub(super) fn matching(workload: Option<&Workload>) -> Result<Vec<String>, CaptureError> {
    let below = |path: &PathBuf| {
        cgroup::open(path)?;
        let (level, path) = cgroup::as_nft_wants_it(path)?;
        Ok(format!("socket cgroupv2 level {level} \"{path}\" "))
    };
    match workload {
        None => Ok(vec![String::new()]),
        Some(Workload::Uid(uid)) => Ok(vec![format!("meta skuid {uid} ")]),
        Some(Workload::Cgroups(paths)) => paths.iter().map(below).collect(),
    }
}

/// Does what `text` says, in one transaction.
pub(super) fn change(step: &str, text: &str) -> Result<(), CaptureError> {
    let output = nft(&["-f", "-"], text)?;
    if output.status.success() {
        return Ok(());
    }
    Err(refused(step, &String::from_utf8_lossy(&output.stderr)))
}

/// What the table's counters have counted; `None` if there is no table to be asked.
pub(super) fn counts() -> Option<RuleCounts> {
    let listed = Command::new("nft")
        .args(["list", "counters", "table", "inet", "weir"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let listed = String::from_utf8_lossy(&listed.stdout);
    Some(RuleCounts {
        looped: packets(&listed, redirect::LOOPED),
        no_room: packets(&listed, tproxy::NO_ROOM),
        port_rewritten: packets(&listed, redirect::REWRITTEN),
    })
}

/// As nft lists it: `counter NAME {`, and in the next line `packets N bytes N`.
fn packets(listed: &str, name: &str) -> u64 {
    let rest = listed.split_once(&format!("counter {name} {{")).map(|(_, rest)| rest);
    let number = rest.and_then(|rest| rest.split_whitespace().nth(1));
    number.and_then(|number| number.parse().ok()).unwrap_or_default()
}

/// Whether the kernel would take `text`, without a change.
pub(super) fn check(text: &str) -> Result<(), CaptureError> {
    let output = nft(&["-c", "-f", "-"], text)?;
    if output.status.success() {
        return Ok(());
    }
    Err(refused("check the nft table", &String::from_utf8_lossy(&output.stderr)))
}

/// The transaction that makes the table. One that a hand has made from our own steps goes with it; one
/// that a running weir holds is not ours to remove, and is in the way.
pub(super) fn making(draft: &Draft) -> Result<String, CaptureError> {
    let before = match rules::table() {
        State::Held => return Err(CaptureError::Held),
        State::Missing => "",
        State::Stands => "delete table inet weir\n",
    };
    Ok(format!("{before}{}", draft.table()))
}

/// As `check`, where our table is there already: only its owner may name it.
pub(super) fn check_beside(draft: &Draft) -> Result<(), CaptureError> {
    check(&draft.table().replacen("table inet weir ", "table inet weir_next ", 1))
}

fn nft(arguments: &[&str], text: &str) -> Result<Output, CaptureError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut input) = child.stdin.take() {
        // If it stops reading, it says why.
        let _ = input.write_all(text.as_bytes());
    }
    child.wait_with_output().map_err(missing)
}

fn missing(source: io::Error) -> CaptureError {
    CaptureError::Missing { package: "nftables", program: "nft", source }
}

fn refused(step: &str, said: &str) -> CaptureError {
    let cure = match said {
        said if said.contains("Operation not permitted") => {
            " (needs CAP_NET_ADMIN; and a table `inet weir` of another running weir in this \
             network namespace is in the way: `nft list tables`)"
        }
        said if said.contains("No such file or directory") => {
            " (the kernel lacks nft tproxy, socket or fib: CONFIG_NFT_TPROXY, CONFIG_NFT_SOCKET, \
             CONFIG_NFT_FIB_INET)"
        }
        _ => "",
    };
    let said = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason was given");
    CaptureError::Refused { cure, said: said.to_owned(), step: step.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Inbound;
    use super::*;

    fn inbound(listen: &str, way: Way) -> String {
        let inbound = Inbound {
            any_destination: false,
            exclude: vec![22..=22],
            include: vec![1..=65_535],
            keep_source: true,
            leaves: false,
            listen: listen.parse().unwrap(),
            way,
        };
        let plan =
            Plan { inbound: vec![inbound], own_ports: vec![15_020, 15_006], ..Plan::default() };
        draft(&plan, true).unwrap().table()
    }

    #[test]
    fn own_ports_are_left_alone_even_if_everything_is_taken() {
        let expected = "\t\ttcp dport { 22, 15006, 15020 } return\n\
                        \t\ttcp dport { 1-65535 } tproxy to :15006 counter notrack accept\n";
        let text = inbound("[::]:15006", Way::Tproxy);
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn counters_are_read_by_name() {
        let listed = "table inet weir {\n\tcounter a {\n\t\tpackets 7 bytes 420\n\t}\n\tcounter \
                      ab {\n\t\tpackets 3 bytes 9\n\t}\n}\n";
        assert_eq!([packets(listed, "a"), packets(listed, "ab"), packets(listed, "b")], [7, 3, 0]);
    }

    #[test]
    fn listener_of_one_family_takes_that_family_only() {
        let to = |listen| inbound(listen, Way::Tproxy);
        assert!(to("0.0.0.0:15006").contains("tproxy ip to :15006"));
        assert!(to("10.0.0.1:15006").contains("tproxy ip to 10.0.0.1:15006"));
        assert!(to("[fd00::1]:15006").contains("tproxy ip6 to [fd00::1]:15006"));
        let text = inbound("0.0.0.0:15006", Way::Redirect);
        assert!(
            text.contains("meta nfproto ipv4 tcp dport { 1-65535 } counter redirect to :15006")
        );
    }
}
