// SPDX-License-Identifier: Apache-2.0
//! `on_exit: closed` for what nft takes: a second table that refuses what weir would have taken and
//! has not.
//!
//! It belongs to nobody, so it outlives weir. While weir takes traffic nothing meets it: a connection
//! that was given to our listener, or carries a mark of ours, is left alone. It looks at SYNs only;
//! the connect hook guards itself.

use std::fmt::Write as _;
use std::process::{Command, Stdio};

use super::nft;
use super::plan::{Inbound, Netfilter, Plan};
use super::tproxy::{left_alone, taken};
use super::{CaptureError, MARK_MASK, OUTBOUND_MARK, OWN_MARK, STEER_MARK};
use crate::capture::nft::elements::ports;

/// The table in the kernel, as it was listed when it was made.
#[derive(Debug)]
pub(super) struct Guard {
    listed: String,
    text: String,
}

impl Guard {
    /// Makes the table, in place of one that is there; one transaction.
    pub(super) fn install(text: String) -> Result<Guard, CaptureError> {
        nft::change("install the nft table that refuses", &text)?;
        let listed = listed().unwrap_or_default();
        Ok(Guard { listed, text })
    }

    /// To be made by `mend`.
    pub(super) const fn absent(text: String) -> Guard {
        Guard { listed: String::new(), text }
    }

    /// Nobody has removed or changed it.
    pub(super) fn stands(&self) -> bool {
        listed().is_some_and(|now| now == self.listed)
    }

    /// Makes it again.
    pub(super) fn mend(&mut self) -> Result<(), CaptureError> {
        *self = Guard::install(self.text.clone())?;
        Ok(())
    }
}

/// What the kernel lists, without counts; `None` if the table is not there.
pub(super) fn listed() -> Option<String> {
    let words = ["-s", "list", "table", "inet", TABLE];
    let output = Command::new("nft").args(words).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The table goes, if it is there.
pub(super) fn remove() -> Result<(), CaptureError> {
    match listed() {
        Some(_) => nft::change("remove the nft table that refuses", &format!("{UNDO}\n")),
        None => Ok(()),
    }
}

/// The transaction that makes the table; `None` if nothing that nft takes shall be refused.
pub(super) fn text(plan: &Plan) -> Result<Option<String>, CaptureError> {
    let outbound: Vec<&Netfilter> = plan.netfilter().filter(|one| !one.leaves).collect();
    let inbound = plan.inbound.iter().find(|inbound| !inbound.leaves);
    if !plan.closed || inbound.is_none() && outbound.is_empty() {
        return Ok(None);
    }
    let mut chains = Chains::default();
    if let Some(inbound) = inbound {
        chains.add("inbound", None, &refused(inbound, &plan.own_ports));
        let rules = [
            format!("socket mark & {MARK_MASK:#x} == {OWN_MARK:#x} return"),
            format!("iif != lo {SYN} fib daddr type local jump inbound"),
        ];
        chains.add("input", Some("type filter hook input priority -10"), &rules);
        if inbound.any_destination {
            let rule = format!("{SYN} jump inbound");
            chains.add("forward", Some("type filter hook forward priority -10"), &[rule]);
        }
    }
    let ours = format!("{{ {OWN_MARK:#x}, {STEER_MARK:#x}, {OUTBOUND_MARK:#x} }}");
    let mut output = vec![format!("meta mark & {MARK_MASK:#x} == {ours} return")];
    for (index, one) in outbound.iter().enumerate() {
        chains.add(&format!("outbound_{index}"), None, &taken(one, REFUSE)?);
        output.push(format!("{SYN} fib daddr type != local jump outbound_{index}"));
    }
    if !outbound.is_empty() {
        chains.add("output", Some("type filter hook output priority 0"), &output);
    }
    let Chains(chains) = chains;
    Ok(Some(format!("table inet {TABLE}\n{UNDO}\ntable inet {TABLE} {{\n{chains}}}\n")))
}

fn refused(inbound: &Inbound, own_ports: &[u16]) -> Vec<String> {
    let mut rules = left_alone(inbound, own_ports);
    let family = if inbound.listen.is_ipv4() { "meta nfproto ipv4 " } else { "" };
    rules.push(format!("{family}tcp dport {} {REFUSE}", ports(&inbound.include)));
    rules
}

/// The inside of a table.
#[derive(Default)]
struct Chains(String);

impl Chains {
    fn add(&mut self, name: &str, head: Option<&str>, rules: &[String]) {
        let head = head.map(|head| format!("\t\t{head}; policy accept;\n")).unwrap_or_default();
        let rules: String = rules.iter().map(|rule| format!("\t\t{rule}\n")).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "\tchain {name} {{\n{head}{rules}\t}}");
    }
}

/// Its name, in the family inet.
pub(super) const TABLE: &str = "weir_guard";
/// A command of nft.
pub(super) const UNDO: &str = "delete table inet weir_guard";
const SYN: &str = "tcp flags & (syn | ack) == syn";
const REFUSE: &str = "counter reject with tcp reset";
