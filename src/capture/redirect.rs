// SPDX-License-Identifier: Apache-2.0
//! REDIRECT: connection tracking rewrites the destination, and remembers the one that was meant.
//!
//! Only the first packet of a connection meets these rules. weir's own dials stay tracked where
//! nothing else is taken, so that other people's translations still hold for them.

use super::nft::elements::ports;
use super::nft::{Draft, Hook};
use super::plan::{Inbound, Netfilter};
use super::tproxy::{left_alone, taken};
use super::{CaptureError, MARK_MASK, OWN_MARK, STEER_MARK};

/// What arrives for a taken port goes to our port on the interface's own address.
pub(super) fn inbound(draft: &mut Draft, inbound: &Inbound, own_ports: &[u16]) {
    let port = inbound.listen.port();
    refuse_loops(draft, port);
    count_rewritten(draft, port);
    // Without a chain of this type the kernel rewrites no more, also what it has begun to.
    draft.keep(Hook::PreroutingNat);
    if inbound.leaves {
        return;
    }
    let mut rules = left_alone(inbound, own_ports);
    let family = if inbound.listen.is_ipv4() { "meta nfproto ipv4 " } else { "" };
    let included = ports(&inbound.include);
    rules.push(format!("{family}tcp dport {included} counter redirect to :{port}"));
    draft.taking("inbound", rules);
    draft.rule(Hook::PreroutingNat, "iif != lo meta l4proto tcp fib daddr type local jump inbound");
}

/// What a workload dials goes to our port on loopback.
pub(super) fn outbound(draft: &mut Draft, list: &[&Netfilter]) -> Result<(), CaptureError> {
    if list.is_empty() {
        return Ok(());
    }
    draft.keep(Hook::OutputNat);
    draft.rule(
        Hook::OutputNat,
        format!("meta mark & {MARK_MASK:#x} == {{ {OWN_MARK:#x}, {STEER_MARK:#x} }} return"),
    );
    for one in list {
        refuse_loops(draft, one.port);
        count_rewritten(draft, one.port);
    }
    for one in list.iter().filter(|one| !one.leaves) {
        let chain = format!("outbound_redirect_{}", one.port);
        draft.taking(&chain, taken(one, &format!("counter redirect to :{}", one.port))?);
        draft.rule(
            Hook::OutputNat,
            format!("meta l4proto tcp fib daddr type != local jump {chain}"),
        );
    }
    Ok(())
}

/// What our own sockets dial must never come back to us, whoever rewrites it.
fn refuse_loops(draft: &mut Draft, port: u16) {
    draft.object(format!("counter {LOOPED} {{ }}"));
    draft.rule(
        Hook::Input,
        format!(
            "tcp dport {port} meta mark & {MARK_MASK:#x} == {{ {OWN_MARK:#x}, {STEER_MARK:#x} }} counter \
             name {LOOPED} reject with tcp reset"
        ),
    );
}

/// Where two clients would look the same after the rewrite, the kernel gives one another source
/// port, and notes that as a translation of the source (`nf_nat_setup_info` in
/// net/netfilter/nf_nat_core.c).
fn count_rewritten(draft: &mut Draft, port: u16) {
    draft.object(format!("counter {REWRITTEN} {{ }}"));
    draft.rule(
        Hook::Input,
        format!("tcp dport {port} ct state new ct status & snat == snat counter name {REWRITTEN}"),
    );
}

/// The nft counter of our own dials that came back.
pub(super) const LOOPED: &str = "looped";
/// The nft counter of clients whose port the kernel changed.
pub(super) const REWRITTEN: &str = "port_rewritten";
