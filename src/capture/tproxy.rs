// SPDX-License-Identifier: Apache-2.0
//! TPROXY: packets are given to our listener as they are.
//!
//! Everything happens before connection tracking, so that nothing taken is tracked; what belongs to
//! a socket of ours is told by that socket's mark.

use std::net::IpAddr;

use super::nft::elements::{destinations, ports};
use super::nft::{Draft, Hook, matching};
use super::plan::{Inbound, Netfilter};
use super::{CaptureError, FOREIGN_MARK, MARK_MASK, OUTBOUND_MARK, OWN_MARK};

/// What arrives for a taken port is given to our listener. `tproxy` finds an established socket
/// first, and leaves alone what belongs to one that is not transparent: the replies to the
/// workload's own connections. The workload's side of a flow over loopback carries the mark that it
/// inherited; where it inherits none (`accepts_marks`), it is told by its ports.
///
/// While one way of capture leaves for another one (not `alone`), connections of both are under way,
/// and connection tracking, which knows those of redirect, has not been asked yet. Then only a SYN is
/// taken, and the rest of a connection told by its socket, also while it is being made.
pub(super) fn inbound(
    draft: &mut Draft,
    (inbound, alone): (&Inbound, bool),
    own_ports: &[u16],
    accepts_marks: bool,
) {
    let port = inbound.listen.port();
    let to = match inbound.listen.ip() {
        ip if ip.is_unspecified() && ip.is_ipv6() => format!("tproxy to :{port}"),
        IpAddr::V4(ip) if ip.is_unspecified() => format!("tproxy ip to :{port}"),
        IpAddr::V4(ip) => format!("tproxy ip to {ip}:{port}"),
        IpAddr::V6(ip) => format!("tproxy ip6 to [{ip}]:{port}"),
    };
    let included = ports(&inbound.include);
    if !inbound.leaves {
        let mut rules = left_alone(inbound, own_ports);
        rules.push(format!("tcp dport {included} {to} counter notrack accept"));
        draft.taking("inbound", rules);
        let which = if alone { "meta l4proto tcp" } else { "tcp flags & (syn | ack) == syn" };
        let jump = format!("iif != lo {which} fib daddr type local jump inbound");
        draft.rule(Hook::Prerouting, jump);
    }
    if inbound.leaves || !alone {
        let ours = "socket transparent 1 fib daddr type local counter notrack accept";
        draft.rule(Hook::Prerouting, format!("iif != lo tcp dport != {port} {ours}"));
    }
    if inbound.any_destination {
        foreign(draft, inbound, own_ports, &to);
    }
    if !accepts_marks {
        draft.rule(Hook::Output, format!("oif lo tcp sport {included} counter notrack accept"));
    }
}

/// What this host would forward is led to us by a mark, and given to our listener. Only a SYN is taken,
/// because nothing here tells the rest of a connection that goes by from one that we took; what
/// belongs to a socket of ours is told by that socket.
fn foreign(draft: &mut Draft, inbound: &Inbound, own_ports: &[u16], to: &str) {
    let lead = format!("meta mark set meta mark & {:#x} | {FOREIGN_MARK:#x}", !MARK_MASK);
    let port = inbound.listen.port();
    // A connection that is being made or has ended has no mark of its own, so it is not asked for. A
    // listener, found by its port alone, is none of these. A SYN that meets an old connection in
    // TIME_WAIT begins a new one: only `tproxy` knows that (`nf_tproxy_handle_time_wait4`).
    draft.first(
        Hook::Prerouting,
        format!(
            "iif != lo tcp dport != {port} tcp flags & (syn | ack) != syn socket transparent 1 fib \
             daddr type unicast {lead} counter notrack accept"
        ),
    );
    if inbound.leaves {
        return;
    }
    let mut rules = left_alone(inbound, own_ports);
    rules.push(format!("tcp dport {} {to} {lead} counter notrack accept", ports(&inbound.include)));
    draft.taking("inbound_foreign", rules);
    draft.rule(
        Hook::Prerouting,
        "iif != lo tcp flags & (syn | ack) == syn fib daddr type unicast jump inbound_foreign",
    );
}

/// Ports that are not taken: what was asked for, and our own.
pub(super) fn left_alone(inbound: &Inbound, own_ports: &[u16]) -> Vec<String> {
    let mut left_alone = inbound.exclude.clone();
    left_alone.extend(own_ports.iter().map(|port| *port..=*port));
    if left_alone.is_empty() {
        return Vec::new();
    }
    vec![format!("tcp dport {} return", ports(&left_alone))]
}

/// Packets that a workload sends to a taken destination are led to loopback by a mark, and given to
/// our listener there.
///
/// Which packets, is remembered by flow, from the SYN on: the last words of a connection are said by
/// the kernel itself, with a socket of its own (`tcp_v4_send_ack` in net/ipv4/tcp_ipv4.c), and so
/// carry no cgroup, no user and no mark of the workload's. A connection for which there is no room
/// goes its own way. Connections of before our time, and replies to those who connect to the
/// workload, are in no set and so never touched.
pub(super) fn outbound(draft: &mut Draft, list: &[&Netfilter]) -> Result<(), CaptureError> {
    let Some(first) = list.first() else { return Ok(()) };
    draft.reroute();
    remember(draft, first);
    draft.chain(
        "steer",
        vec![format!(
            "meta mark set meta mark & {:#x} | {OUTBOUND_MARK:#x} counter notrack accept",
            !MARK_MASK
        )],
    );
    let take = |family: &str, tuple: &str| {
        format!("add @taken{family} {{ {tuple} timeout {CONNECTING_SECONDS}s }} goto steer")
    };
    let mut takes: Vec<String> = TUPLES.iter().map(|(family, to, _)| take(family, to)).collect();
    takes.push(format!("counter name {NO_ROOM}"));
    draft.object(format!("counter {NO_ROOM} {{ }}"));
    draft.chain("take", takes);
    for (family, to) in LOOPBACKS {
        let port = first.port;
        // Before what is let through because it is ours: this mark looks much like those.
        draft.first(
            Hook::Prerouting,
            format!(
                "iif lo meta l4proto tcp meta mark & {MARK_MASK:#x} == {OUTBOUND_MARK:#x} \
                 tproxy {family} to {to}:{port} counter notrack accept"
            ),
        );
    }
    for one in list.iter().filter(|one| !one.leaves) {
        let (chain, take) = (format!("outbound_tproxy_{}", one.port), tell_apart(draft, list, one));
        draft.taking(&chain, taken(one, &format!("goto {take}"))?);
        draft.rule(
            Hook::Output,
            format!("tcp flags & (syn | ack) == syn fib daddr type != local jump {chain}"),
        );
    }
    follow(draft, first);
    Ok(())
}

/// Notes whose a new connection is, where there are several workloads, so that it comes to its own
/// listener; the rest of a connection finds its socket. Says which chain takes it. Sets are named by
/// the listener's port, so that they mean the same after a change.
fn tell_apart(draft: &mut Draft, list: &[&Netfilter], one: &Netfilter) -> String {
    let others = list.iter().filter(|other| !other.leaves && other.port != one.port);
    let others: Vec<u16> = others.map(|other| other.port).collect();
    if others.is_empty() {
        return "take".to_owned();
    }
    let mut rules = Vec::new();
    for ((family, to, _), (word, ip)) in TUPLES.into_iter().zip(LOOPBACKS) {
        let dialled = |port: u16| format!("dialled{family}_{port}");
        // A port that another workload has used a moment ago is this one's now.
        let taken_from =
            others.iter().map(|other| format!("delete @{} {{ {to} }}", dialled(*other)));
        rules.extend(taken_from);
        let own = dialled(one.port);
        draft.object(set(&own, family, one));
        rules.push(format!("add @{own} {{ {to} timeout {CONNECTING_SECONDS}s }}"));
        let port = one.port;
        // Before the rule for all of them.
        draft.first(
            Hook::Prerouting,
            format!(
                "iif lo meta mark & {MARK_MASK:#x} == {OUTBOUND_MARK:#x} tcp flags & (syn | ack) \
                 == syn {to} @{own} tproxy {word} to {ip}:{port} counter notrack accept"
            ),
        );
    }
    rules.push("goto take".to_owned());
    let chain = format!("take_{}", one.port);
    draft.chain(&chain, rules);
    chain
}

/// Sets of the flows that were taken and not ended, and of those that end.
fn remember(draft: &mut Draft, one: &Netfilter) {
    for (family, _, _) in TUPLES {
        for name in ["taken", "closing"] {
            draft.object(set(&format!("{name}{family}"), family, one));
        }
    }
}

/// A set of flows; connections that wait to be accepted are among them.
fn set(name: &str, family: &str, one: &Netfilter) -> String {
    let flows = u64::from(one.flows_max) * 2 + 16_384;
    let address = if family == "4" { "ipv4_addr" } else { "ipv6_addr" };
    format!(
        "set {name} {{ type {address} . inet_service . {address} . inet_service; size {flows}; \
         flags dynamic,timeout; }}"
    )
}

/// What belongs to flows that were taken. What we reset is over at once; what the workload ends is
/// kept for as long as anything may still be said about it.
fn follow(draft: &mut Draft, one: &Netfilter) {
    // The kernel keeps an ended connection for 60 s (`TCP_TIMEWAIT_LEN` in include/net/tcp.h).
    let closing = one.half_closed.as_secs().max(60) + 10;
    for (family, to, back) in TUPLES {
        draft.first(
            Hook::Output,
            format!(
                "meta mark & {MARK_MASK:#x} == {OWN_MARK:#x} tcp flags & rst == rst delete \
                 @taken{family} {{ {back} }}"
            ),
        );
        draft.rule(
            Hook::Output,
            format!(
                "tcp flags & (fin | rst) != 0x0 {to} @taken{family} add @closing{family} {{ {to} \
                 timeout {closing}s }} delete @taken{family} {{ {to} }}"
            ),
        );
        for (name, seconds) in [("taken", OPEN_SECONDS), ("closing", closing)] {
            draft.rule(
                Hook::Output,
                format!(
                    "{to} @{name}{family} update @{name}{family} {{ {to} timeout {seconds}s }} \
                     goto steer"
                ),
            );
        }
    }
}

/// The rules of a taking chain: what is left alone, then what is taken, and of whom.
pub(super) fn taken(one: &Netfilter, verdict: &str) -> Result<Vec<String>, CaptureError> {
    let leave = destinations(&one.exclude).into_iter().map(|to| format!("{to} return"));
    let mut rules: Vec<String> = leave.collect();
    if !one.exclude_ports.is_empty() {
        rules.push(format!("tcp dport {} return", ports(&one.exclude_ports)));
    }
    let included = ports(&one.include_ports);
    for whose in matching(one.workload.as_ref())? {
        let take = |to| format!("{whose}{to} tcp dport {included} {verdict}");
        rules.extend(destinations(&one.include).into_iter().map(take));
    }
    Ok(rules)
}

/// The nft counter of connections that were not taken because no more can be remembered.
pub(super) const NO_ROOM: &str = "no_room";
/// By family: a flow as the workload's packets name it, and as ours do.
const TUPLES: [(&str, &str, &str); 2] = [
    (
        "4",
        "ip saddr . tcp sport . ip daddr . tcp dport",
        "ip daddr . tcp dport . ip saddr . tcp sport",
    ),
    (
        "6",
        "ip6 saddr . tcp sport . ip6 daddr . tcp dport",
        "ip6 daddr . tcp dport . ip6 saddr . tcp sport",
    ),
];
/// Where listeners wait, in the order of `TUPLES`.
const LOOPBACKS: [(&str, &str); 2] = [("ip", "127.0.0.1"), ("ip6", "[::1]")];
/// The kernel gives up a connect after 127 s (`tcp_syn_retries` 6, tcp(7)).
const CONNECTING_SECONDS: u64 = 130;
/// Every packet begins it anew; a flow that is silent for longer is cut.
const OPEN_SECONDS: u64 = 86_400;
