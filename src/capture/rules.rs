// SPDX-License-Identifier: Apache-2.0
//! What a plan changes in the kernel, step by step and by hand, and what of ours is there now.
//!
//! Looks and, where it is asked to, removes or makes what can stand without a running weir. Never
//! touches what a running one holds, nor anything of others.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::guard::{self, Guard};
use super::nft;
use super::plan::Plan;
use super::{ACCEPT_MARK, CaptureError, Prepared, accepts_marks, route};
use crate::bpf::{self, ConnectHook, HookPlan};

/// One change to the kernel that a plan asks for.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Rule {
    /// What makes it, for a shell; a comment where only a running weir can.
    pub apply: String,
    /// `apply` and `undo` can be run by hand.
    pub by_hand: bool,
    /// Which part of the kernel is changed.
    pub kind: Kind,
    /// How it is now.
    pub now: State,
    /// What undoes it, for a shell.
    pub undo: String,
    /// What is changed.
    pub what: String,
}

/// A part of the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Programs on a cgroup.
    Bpf,
    /// Policy routing.
    Ip,
    /// A table of the packet filter.
    Nft,
    /// A setting, which weir asks for and never changes.
    Sysctl,
}

/// Whether a change is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A running weir holds it.
    Held,
    /// It is not there.
    Missing,
    /// It is there, and nobody holds it.
    Stands,
}

/// Something of ours that is in the kernel, whoever asked for it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Left {
    /// What removes it, for a shell.
    pub undo: String,
    /// What it is.
    pub what: String,
}

impl Plan {
    /// Every change that this plan asks for, in the order in which it is made; undone in reverse.
    ///
    /// # Errors
    ///
    /// A workload's cgroup is not there, or `ip` is missing.
    pub fn rules(&self) -> Result<Vec<Rule>, CaptureError> {
        let table = table();
        let held = table == State::Held;
        let mut rules = Vec::new();
        if self.keeps_source() {
            rules.push(mark_accept());
        }
        for step in self.ip_steps() {
            let now = match step.stands()? {
                true if held => State::Held,
                true => State::Stands,
                false => State::Missing,
            };
            let (apply, undo) = (format!("ip {}", step.apply), format!("ip {}", step.undo));
            let what = step.undo.replace(" del ", " ");
            rules.push(Rule { apply, by_hand: true, kind: Kind::Ip, now, undo, what });
        }
        rules.push(Rule {
            apply: by_nft(&self.nft_text()?.replace("\tflags owner\n", "")),
            by_hand: true,
            kind: Kind::Nft,
            now: table,
            undo: "nft delete table inet weir".to_owned(),
            what: "table inet weir".to_owned(),
        });
        for hook in self.hooks() {
            rules.extend(programs(hook, held)?);
        }
        if let Some(text) = guard::text(self)? {
            rules.push(Rule {
                apply: by_nft(&text),
                by_hand: true,
                kind: Kind::Nft,
                now: if guard::listed().is_some() { State::Stands } else { State::Missing },
                undo: format!("nft {}", guard::UNDO),
                what: format!("table inet {}", guard::TABLE),
            });
        }
        Ok(rules)
    }
}

impl Prepared {
    /// Makes what stands without a running weir and changes nothing that it would not change: the
    /// way of marked packets and, for a plan that is `closed`, what refuses traffic until a weir
    /// runs. Says what that was.
    ///
    /// # Errors
    ///
    /// A running weir holds the rules here, or a step was refused; what was done here before it is
    /// undone.
    pub fn apply(self) -> Result<Vec<String>, CaptureError> {
        refuse_held()?;
        let Prepared { mut hooks, plan, .. } = self;
        let mut done: Vec<String> =
            plan.ip_steps().into_iter().map(|step| format!("ip {}", step.apply)).collect();
        let routes = route::Routes::install(&plan.marks())?;
        if plan.closed {
            hooks.iter_mut().try_for_each(ConnectHook::attach)?;
            let new = bpf::settle(&hooks)?;
            if !hooks.is_empty() {
                done.push("bpf: connects that would be taken are refused".to_owned());
            }
            if let Some(text) = guard::text(&plan)? {
                if let Err(error) = Guard::install(text) {
                    new.undo();
                    return Err(error);
                }
                done.push(format!("nft: table inet {} refuses what would be taken", guard::TABLE));
            }
        }
        // They stay.
        std::mem::forget(routes);
        Ok(done)
    }
}

/// What of ours is in this network namespace, and can be removed because no weir holds it.
///
/// # Errors
///
/// A running weir holds the rules here, or `ip` is missing.
pub fn leftovers() -> Result<Vec<Left>, CaptureError> {
    refuse_held()?;
    let mut all = Vec::new();
    for (is_there, name) in
        [(table() == State::Stands, "weir"), (guard::listed().is_some(), guard::TABLE)]
    {
        if is_there {
            let what = format!("table inet {name}");
            all.push(Left { undo: format!("nft delete {what}"), what });
        }
    }
    for pinned in bpf::pinned()? {
        let undo = format!("rm {}", pinned.path.display());
        all.push(Left { undo, what: format!("pinned link {}", pinned.path.display()) });
    }
    for undo in route::standing()? {
        all.push(Left { what: undo.replace(" del ", " "), undo: format!("ip {undo}") });
    }
    Ok(all)
}

/// Removes what of ours is in this network namespace, and says what it was. Asked again, it finds
/// nothing.
///
/// # Errors
///
/// A running weir holds the rules here, or a step was refused.
pub fn clear() -> Result<Vec<Left>, CaptureError> {
    let all = leftovers()?;
    // What refuses or leads traffic goes before what it is led by.
    if table() == State::Stands {
        nft::change("remove the nft table", "delete table inet weir\n")?;
    }
    guard::remove()?;
    bpf::unpin()?;
    route::clear()?;
    Ok(all)
}

/// A weir that was killed a moment ago is still being torn down by the kernel: that needs a moment.
fn refuse_held() -> Result<(), CaptureError> {
    let deadline = Instant::now() + TORN_DOWN_WITHIN;
    while table() == State::Held {
        if Instant::now() >= deadline {
            return Err(CaptureError::Held);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// How the table is; one that a running weir made says so (`flags owner`, nft(8)).
pub(super) fn table() -> State {
    let words = ["-t", "list", "table", "inet", "weir"];
    match Command::new("nft").args(words).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => {
            let is_owned = String::from_utf8_lossy(&output.stdout).contains("flags owner");
            if is_owned { State::Held } else { State::Stands }
        }
        _ => State::Missing,
    }
}

fn mark_accept() -> Rule {
    let set = |value| format!("sysctl -w {ACCEPT_MARK}={value}");
    let accepts = accepts_marks();
    Rule {
        apply: if accepts { format!("# {ACCEPT_MARK} is 1 already") } else { set(1) },
        by_hand: !accepts,
        kind: Kind::Sysctl,
        now: if accepts { State::Stands } else { State::Missing },
        undo: if accepts { "# nothing to undo".to_owned() } else { set(0) },
        what: ACCEPT_MARK.to_owned(),
    }
}

/// The hook's programs, one entry for each cgroup. No shell can make them: they hang by descriptors
/// of a running weir, and do nothing until it has filled their maps. A shell can let go of them.
fn programs(hook: &HookPlan, held: bool) -> Result<Vec<Rule>, CaptureError> {
    let pinned = bpf::pinned()?;
    let rule = |path: &std::path::PathBuf| {
        let (number, programs) = bpf::programs_on(path)?;
        let pins: Vec<String> = pinned
            .iter()
            .filter(|pinned| pinned.cgroup == number)
            .map(|pinned| pinned.path.display().to_string())
            .collect();
        let now = match (programs.is_empty(), held) {
            (true, _) => State::Missing,
            (false, true) => State::Held,
            (false, false) => State::Stands,
        };
        Ok(Rule {
            apply: format!(
                "# not by hand, only `weir run` can: programs {} on cgroup {} (to see them: `bpftool \
                 cgroup tree`)",
                bpf::PROGRAMS.join(", "),
                path.display()
            ),
            by_hand: false,
            kind: Kind::Bpf,
            now,
            undo: match (pins.is_empty(), now) {
                (true, State::Missing) => "# they go with weir".to_owned(),
                (true, _) => detach(&bpf::numbers_on(path)?),
                (false, _) => format!("rm {}", pins.join(" ")),
            },
            what: format!("programs on cgroup {}", path.display()),
        })
    };
    hook.cgroups.iter().map(rule).collect()
}

/// What lets go of these programs, for a shell: a running weir holds their links on.
fn detach(programs: &[u32]) -> String {
    let ids: Vec<String> = programs.iter().map(u32::to_string).collect();
    format!(
        "bpftool link show | awk '/: cgroup +prog ({}) /{{sub(\":\", \"\", $1); print $1}}' | xargs -r -n 1 \
         bpftool link detach id",
        ids.join("|")
    )
}

fn by_nft(text: &str) -> String {
    format!("nft -f - <<'RULES'\n{text}RULES")
}

/// Whether connection tracking's table is nearly full: entries and how many there may be.
#[must_use]
pub fn conntrack_use() -> Option<(u64, u64)> {
    let number = |name: &str| {
        let text =
            fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?;
        text.trim().parse().ok()
    };
    Some((number("count")?, number("max")?))
}

/// Far more than the kernel needs.
const TORN_DOWN_WITHIN: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(20);
