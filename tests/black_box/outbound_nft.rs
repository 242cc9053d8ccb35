// SPDX-License-Identifier: Apache-2.0
//! Outbound by nft alone, tproxy and redirect: workloads that are no cgroup, ports of weir's own, and the
//! rules' end.

use std::io::Read;

use crate::harness::{Cgroup, Net, Place, until};
use crate::outbound::{PRELUDE, Rig};

const MODES: [&str; 2] = ["tproxy", "redirect"];

/// A workload may be a user, or everything in the namespace but weir's own traffic.
#[test]
fn workload_may_be_a_user_or_everybody() {
    for mode in MODES {
        for (workload, flows) in [(", workload: { uid: 65534 }", 1), ("", 2)] {
            let config = format!("workers: 1\noutbound: {{ capture: {mode}{workload} }}");
            let rig = Rig::with(Net::new(), Cgroup::new(), &config);
            // Bytes that are still to be sent when the user's socket is nobody's any more arrive, too.
            let script = "os.setuid(65534)\ns = dial(V4, ('10.98.2.2', 80)); s.sendall(b'x' * 60)";
            assert_eq!(rig.says(script), "10.98.2.2 80 10.98.2.2:80");
            let mut root = rig.net.connect(Place::Node, "10.98.2.2:80");
            root.read_exact(&mut [0; 12]).unwrap();
            drop(root);
            assert_eq!(rig.weir.opened(), flows, "{mode}{workload}");
            until("direct connections are gone", || rig.net.sockets().is_empty());
            rig.end();
        }
    }
}

/// TP9, RD2: who dials the capture port is refused and counted, tracked or not; weir never dials itself.
#[test]
fn direct_dials_are_refused_and_counted() {
    for mode in MODES {
        let rig = Rig::new(mode, "");
        let dial = |family: &str, ip: &str| {
            let script = format!(
                "s = socket.socket({family})\ntry:\n    s.connect(('{ip}', 15001))\n    s.recv(1)\n\
                 except ConnectionResetError:\n    print('reset')"
            );
            assert_eq!(rig.says(&script), "reset");
        };
        dial("V4", "127.0.0.1");
        dial("V6", "::1");
        dial("V6", "::ffff:127.0.0.1");
        assert_eq!(rig.weir.denied("direct"), 3, "{mode}");
        rig.net.run(
            Place::Node,
            &[
                "nft",
                "table ip quiet { chain c { type filter hook output priority -310; notrack; }; }",
            ],
        );
        dial("V4", "127.0.0.1");
        let reason = if mode == "redirect" { "unknown_destination" } else { "direct" };
        assert_eq!(rig.weir.denied(reason), if mode == "redirect" { 1 } else { 4 });
        rig.net.run(Place::Node, &["nft", "delete table ip quiet"]);
        rig.end();
    }
}

/// A FIN of weir's that is lost comes again, and its answer finds its way even if weir ends meanwhile.
#[test]
fn last_acks_are_awaited_at_the_end() {
    let rig = Rig::new("tproxy", "");
    // The first three FINs that weir sends to each port of the workload: the fourth comes after 1.4 s.
    let lossy = "table inet lossy {
        set one { type inet_service; size 999; flags dynamic; }
        set two { type inet_service; size 999; flags dynamic; }
        set three { type inet_service; size 999; flags dynamic; }
        counter lost { }
        chain lose {
            tcp dport != @one add @one { tcp dport } counter name lost drop
            tcp dport != @two add @two { tcp dport } counter name lost drop
            tcp dport != @three add @three { tcp dport } counter name lost drop
        }
        chain c {
            type filter hook input priority 0;
            iifname lo tcp sport { 80, 81 } tcp flags & fin == fin jump lose
        }
    }";
    rig.net.run(Place::Node, &["nft", lossy]);
    rig.says("dial(V4, ('10.98.2.2', 80)).close(); dial(V6, ('fd98:2::2', 81)).close()");
    let lost = || {
        let listed = rig.net.run(Place::Node, &["nft", "list", "counter", "inet", "lossy", "lost"]);
        listed.split("packets ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
    };
    until("the flows have ended", || rig.weir.active() == 0);
    until("FINs are lost", || lost() != "0");
    rig.end();
}

/// TP6: marks are masked: an application's own bits are its own on every packet.
#[test]
fn bits_of_others_in_a_mark_survive() {
    let rig = Rig::new("tproxy", "");
    let count = "table inet tenant { chain c { type filter hook output priority 0; \
                 tcp dport 80 meta mark & 0xfffff000 == 0xab000 counter; \
                 tcp dport 80 meta mark & 0xfffff000 != 0xab000 meta mark & 0xfff != 0x539 counter; }; }";
    rig.net.run(Place::Node, &["nft", count]);
    let script =
        "dial(V4, ('10.98.2.2', 80), lambda s: s.setsockopt(socket.SOL_SOCKET, 36, 0xab000))";
    assert_eq!(rig.says(script), "10.98.2.2 80 10.98.2.2:80");
    assert_eq!(rig.weir.opened(), 1);
    until("the flow has ended", || rig.weir.active() == 0);
    let listed = rig.net.run(Place::Node, &["nft", "list", "table", "inet", "tenant"]);
    let counted: Vec<&str> = listed.lines().filter(|line| line.contains("counter")).collect();
    assert!(!counted[0].contains("packets 0 ") && counted[1].contains("packets 0 "), "{listed}");
    rig.net.run(Place::Node, &["nft", "delete table inet tenant"]);
    rig.end();
}

/// TP4, TP11: a rule that somebody removed is put back, and a flush of all tables does no harm.
#[test]
fn removed_rule_is_put_back_and_a_flush_does_no_harm() {
    let rig = Rig::new("tproxy", "");
    rig.net.run(Place::Node, &["ip", "-4", "rule", "del", "lookup", "133"]);
    let rules = || rig.net.run(Place::Node, &["ip", "-4", "rule"]);
    until("the rule is back", || rules().contains("lookup 133"));
    rig.net.run(Place::Node, &["nft", "flush", "ruleset"]);
    assert_eq!(rig.says("dial(V4, ('10.98.2.2', 80))"), "10.98.2.2 80 10.98.2.2:80");
    assert_eq!(rig.weir.opened(), 1);
    rig.end();
}

/// Killed, weir leaves the workload connected, and of its own only what no packet meets, which is
/// removed with it dead, twice if need be.
#[test]
fn killed_weir_leaves_the_workload_connected() {
    for mode in MODES {
        let Rig { cgroup, net, weir } = Rig::new(mode, "");
        weir.kill();
        let script = format!("{PRELUDE}\ndial(V4, ('10.98.2.2', 80)); dial(V6, ('fd98:2::2', 80))");
        until("the workload dials directly", || {
            cgroup.output(&net, &["python3", "-c", &script]).status.success()
        });
        let removed = || net.within(Place::Node, || weir::capture::clear().unwrap().len());
        assert_eq!(removed() > 0, mode == "tproxy");
        assert_eq!(removed(), 0);
        until("nothing is left", || net.is_clean());
    }
}

/// A capture of everything never takes what weir itself dials: one flow is one flow.
#[test]
fn own_dials_are_never_taken_again() {
    for mode in MODES {
        let config = format!(
            "workers: 1\noutbound: {{ capture: {mode} }}\n\
             forward: [{{ listen: \"127.0.0.1:7000\", endpoints: [\"10.98.2.2:80\"] }}]"
        );
        let rig = Rig::with(Net::new(), Cgroup::new(), &config);
        assert_eq!(rig.says("dial(V4, ('127.0.0.1', 7000))"), "127.0.0.1 7000 10.98.2.2:80");
        assert_eq!(rig.weir.metric("weir_flows_opened_total", &["direction=\"outbound\""]), 0);
        assert_eq!(rig.says("dial(V4, ('10.98.2.2', 80))"), "10.98.2.2 80 10.98.2.2:80");
        assert_eq!(rig.weir.opened(), 2, "{mode}");
        rig.end();
    }
}
