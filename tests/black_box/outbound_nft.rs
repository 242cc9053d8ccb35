// SPDX-License-Identifier: Apache-2.0
//! Outbound by nft, tproxy and redirect: every way to dial is taken, what was dialled is what is
//! reached, and nothing else is touched.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

use crate::harness::{Cgroup, Net, Place, Weir, check, echo, send, until};
use crate::outbound::{PRELUDE, Rig, greet};

const MODES: [&str; 2] = ["tproxy", "redirect"];

fn rig(mode: &str, more: &str) -> Rig {
    let cgroup = Cgroup::new();
    let config = format!(
        "workers: 2\noutbound: {{ capture: {mode}, workload: {{ cgroup: {} }}{more} }}",
        cgroup.path
    );
    let net = Net::new();
    Rig::with(net, cgroup, &config)
}

/// Entries for each flow: none, or one for each leg.
fn entries(mode: &str, flows: usize) -> usize {
    if mode == "redirect" { 2 * flows } else { 0 }
}

fn tracked(net: &Net) -> usize {
    net.conntrack().lines().count()
}

/// TP8, TP10: IPv4, IPv6, IPv4 through an IPv6 socket; plain, bound, non-blocking and fast open. The
/// application sees the name that it dialled.
#[test]
fn every_way_to_dial_is_taken_and_looks_direct() {
    for mode in MODES {
        let rig = rig(mode, "");
        let v4 = "10.98.2.2 80 10.98.2.2:80";
        let ways = [
            ("plain", "dial(V4, ('10.98.2.2', 80))", v4),
            ("v6", "dial(V6, ('fd98:2::2', 80))", "fd98:2::2 80 [fd98:2::2]:80"),
            ("mapped", "dial(V6, ('::ffff:10.98.2.2', 80))", "::ffff:10.98.2.2 80 10.98.2.2:80"),
            ("bound", "dial(V4, ('10.98.2.2', 80), lambda s: s.bind(('10.98.1.1', 45000)))", v4),
            (
                "non-blocking",
                "import select\ns = socket.socket(V4)\ns.setblocking(False)\n\
                 assert s.connect_ex(('10.98.2.2', 80)) == 115\nselect.select([], [s], [], 20)\n\
                 assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0\nhear(s)",
                v4,
            ),
            (
                "fast open",
                "s = socket.socket(V4)\ns.sendto(b'x', 0x20000000, ('10.98.2.2', 80))\nhear(s)",
                v4,
            ),
            (
                "mptcp",
                "s = socket.socket(V4, socket.SOCK_STREAM, 262)\ns.connect(('10.98.2.2', 80))\nhear(s)",
                v4,
            ),
        ];
        for (count, (way, script, expected)) in (1..).zip(ways) {
            assert_eq!(rig.says(script), expected, "{mode}: {way}");
            assert_eq!(rig.weir.opened(), count, "{mode}: {way} was taken");
        }
        let labels = ["direction=\"outbound\"", &format!("capture=\"{mode}\"")];
        assert_eq!(rig.weir.metric("weir_flows_opened_total", &labels), 7);
        assert_eq!(tracked(&rig.net), entries(mode, 7), "{mode}");
        rig.end();
    }
}

/// What is left out, this host itself, UDP and other cgroups pass untouched.
#[test]
fn what_is_not_asked_for_passes_untouched() {
    for mode in MODES {
        let rig = rig(mode, ", exclude: { cidrs: [\"fd98:2::/64\"], ports: [81] }");
        greet(rig.net.listen(Place::Node, "[::]:9000"));
        let script = "dial(V4, ('10.98.2.2', 81)); dial(V6, ('fd98:2::2', 80))\n\
                      dial(V4, ('127.0.0.1', 9000)); dial(V4, ('10.98.1.1', 9000))";
        assert_eq!(
            rig.says(script),
            "10.98.2.2 81 10.98.2.2:81\nfd98:2::2 80 [fd98:2::2]:80\n\
             127.0.0.1 9000 [::ffff:127.0.0.1]:9000\n10.98.1.1 9000 [::ffff:10.98.1.1]:9000"
        );
        let udp = "s = socket.socket(V4, socket.SOCK_DGRAM)\ns.connect(('10.98.2.2', 53))\n\
                   s.send(b'x')\nprint(*s.getpeername())";
        assert_eq!(rig.says(udp), "10.98.2.2 53");
        let mut outside = rig.net.connect(Place::Node, "10.98.2.2:80");
        outside.read_exact(&mut [0; 12]).unwrap();
        drop(outside);
        assert_eq!(rig.weir.opened(), 0, "{mode}");
        until("direct connections are gone", || rig.net.sockets().is_empty());
        rig.end();
    }
}

/// Only the networks and ports that are asked for are taken; a prefix of one family says nothing
/// about the other.
#[test]
fn only_what_is_included_is_taken() {
    for mode in MODES {
        let rig = rig(mode, ", include: { cidrs: [\"10.98.0.0/16\", \"10.98.2.2\"], ports: [80] }");
        rig.says("dial(V4, ('10.98.2.2', 81)); dial(V6, ('fd98:2::2', 80))");
        assert_eq!(rig.weir.opened(), 0, "{mode}");
        rig.says("dial(V4, ('10.98.2.2', 80)); dial(V6, ('::ffff:10.98.2.2', 80))");
        assert_eq!(rig.weir.opened(), 2, "{mode}");
        until("direct connections are gone", || rig.net.sockets().is_empty());
        rig.end();
    }
}

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

/// Connections of before weir's time, and clients of a server in the workload, are not disturbed.
#[test]
fn other_connections_of_the_workload_are_left_alone() {
    for mode in MODES {
        let (net, cgroup) = (Net::new(), Cgroup::new());
        echo(net.listen(Place::Server, "10.98.2.2:90"));
        let script = format!(
            "{PRELUDE}
old = socket.create_connection(('10.98.2.2', 90)); old.settimeout(20)
door = socket.create_server(('', 7000))
print('here', flush=True)
sys.stdin.readline()
for i in range(3):
    old.sendall(b'old'); assert old.recv(3, socket.MSG_WAITALL) == b'old'
    s, _ = door.accept(); s.settimeout(20)
    s.sendall(s.recv(1000)); assert s.recv(1) == b''; s.close()
print('well', flush=True)"
        );
        let mut workload = cgroup.command(&net, Place::Node, &["python3", "-c", &script]);
        workload.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut workload = workload.spawn().unwrap();
        let mut said = BufReader::new(workload.stdout.take().unwrap()).lines();
        assert_eq!(said.next().unwrap().unwrap(), "here");
        let config = format!(
            "workers: 1\noutbound: {{ capture: {mode}, workload: {{ cgroup: {} }} }}",
            cgroup.path
        );
        let weir = Weir::run(&net, &config);
        workload.stdin.take().unwrap().write_all(b"go\n").unwrap();
        for seed in 0..3 {
            let mut client = net.connect(Place::Client, "10.98.1.1:7000");
            send(&mut client, seed, 500).unwrap();
            check(&mut client, seed, 500);
        }
        assert_eq!(said.next().unwrap().unwrap(), "well", "{mode}");
        assert!(workload.wait().unwrap().success());
        assert_eq!(weir.opened(), 0);
        until("direct connections are gone", || net.sockets().is_empty());
        weir.end(&net);
    }
}

/// However a connection ends, both sides hear of it and nothing lingers: the kernel says the last words
/// of a closed connection with a socket of its own, which has no cgroup.
#[test]
fn every_end_is_heard_on_the_other_side() {
    for mode in MODES {
        let rig = rig(mode, "");
        let servers = rig.net.listen(Place::Server, "10.98.2.2:90");
        let dial = "import struct\ns = socket.create_connection(('10.98.2.2', 90), 20)\n";
        let reset = "s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n";
        let ways = [
            ("closes first", "s.recv(1)\ns.close()", "finished"),
            ("resets", &format!("s.recv(1)\n{reset}s.close()"), "downstream_reset"),
            ("half-closes", "s.shutdown(1)\nassert len(s.makefile().read()) == 100001", "finished"),
        ];
        for (way, script, reason) in ways {
            let server = std::thread::spawn({
                let servers = servers.try_clone().unwrap();
                move || {
                    let (mut stream, _) = servers.accept().unwrap();
                    stream.write_all(b"x").unwrap();
                    let ended = stream.read_to_end(&mut Vec::new());
                    // Late words: to a workload that has gone, or that has said it all.
                    let _ = stream.write_all(&[b'y'; 100_000]);
                    ended.is_ok()
                }
            });
            rig.says(&format!("{dial}{script}"));
            assert_eq!(server.join().unwrap(), way != "resets", "{mode}: {way}");
            let before = rig.weir.closed(reason) + rig.weir.closed("downstream_reset");
            until(way, || rig.weir.active() == 0);
            assert!(before <= 4 && rig.weir.closed("half_closed_timeout") == 0, "{mode}: {way}");
            until("nothing lingers", || rig.net.sockets().is_empty());
        }
        assert_eq!(rig.weir.opened(), 3);
        rig.end();
    }
}

/// TP9, RD2: who dials the capture port is refused and counted, tracked or not; weir never dials itself.
#[test]
fn direct_dials_are_refused_and_counted() {
    for mode in MODES {
        let rig = rig(mode, "");
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

/// A thousand at a time to different places, and each one gets where it meant to go.
#[test]
fn thousand_connects_at_once_reach_what_they_dialled() {
    for mode in MODES {
        let rig = rig(mode, "");
        let script = "
wanted = [(V4, '10.98.2.2', 80), (V4, '10.98.2.2', 81), (V6, 'fd98:2::2', 80), (V6, '::ffff:10.98.2.2', 81)]
sockets = []
for i in range(1000):
    family, ip, port = wanted[i % 4]
    s = socket.socket(family); s.setblocking(False); s.connect_ex((ip, port)); sockets.append((s, ip, port))
for s, ip, port in sockets:
    s.setblocking(True); s.settimeout(30)
    said = s.makefile().readline().strip()
    ip = ip.replace('::ffff:', '')
    expected = f'[{ip}]:{port}' if ':' in ip else f'{ip}:{port}'
    assert said == expected, (said, expected)
print('all', flush=True)
sys.stdin.readline()";
        let script = format!("{PRELUDE}\n{script}");
        let mut workload = rig.cgroup.command(&rig.net, Place::Node, &["python3", "-c", &script]);
        workload.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut workload = workload.spawn().unwrap();
        let mut said = BufReader::new(workload.stdout.take().unwrap()).lines();
        assert_eq!(said.next().unwrap().unwrap(), "all", "{mode}");
        assert_eq!((rig.weir.opened(), rig.weir.denied("unknown_destination")), (1000, 0));
        assert_eq!(tracked(&rig.net), entries(mode, 1000), "{mode}");
        drop(workload.stdin.take());
        workload.wait().unwrap();
        rig.end();
    }
}

/// Short connections in a row leave nothing, and tproxy tracks none of them.
#[test]
fn short_connections_in_a_row_leave_nothing() {
    for mode in MODES {
        let rig = rig(mode, "");
        let script = "
for i in range(300):
    dial(V4, ('10.98.2.2', 80)).close(); dial(V6, ('fd98:2::2', 81)).close()";
        assert_eq!(rig.says(script).lines().count(), 600);
        if mode == "tproxy" {
            assert_eq!(rig.net.conntrack(), "");
        }
        assert_eq!(rig.weir.opened(), 600);
        rig.end();
    }
}

/// A FIN of weir's that is lost comes again, and its answer finds its way even if weir ends meanwhile.
#[test]
fn last_acks_are_awaited_at_the_end() {
    let rig = rig("tproxy", "");
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

/// One source port for one destination after the other, as fast as it goes: no old state is met.
#[test]
fn reused_source_port_reaches_the_new_destination() {
    for mode in MODES {
        let rig = rig(mode, "");
        let script = "
import struct
def before(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.bind(('10.98.2.1', 41000))
for i in range(400):
    dial(V4, ('10.98.2.2', 80 + i % 2), before).close()";
        let heard = rig.says(script);
        for (index, line) in heard.lines().enumerate() {
            let port = 80 + index % 2;
            assert_eq!(line, format!("10.98.2.2 {port} 10.98.2.2:{port}"), "{mode}");
        }
        assert_eq!(heard.lines().count(), 400);
        rig.end();
    }
}

/// TP6: marks are masked: an application's own bits are its own on every packet.
#[test]
fn bits_of_others_in_a_mark_survive() {
    let rig = rig("tproxy", "");
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
    let rig = rig("tproxy", "");
    rig.net.run(Place::Node, &["ip", "-4", "rule", "del", "lookup", "133"]);
    let rules = || rig.net.run(Place::Node, &["ip", "-4", "rule"]);
    until("the rule is back", || rules().contains("lookup 133"));
    rig.net.run(Place::Node, &["nft", "flush", "ruleset"]);
    assert_eq!(rig.says("dial(V4, ('10.98.2.2', 80))"), "10.98.2.2 80 10.98.2.2:80");
    assert_eq!(rig.weir.opened(), 1);
    rig.end();
}

/// A workload's cgroup that is made anew is taken up again, and flows that are open stay open.
#[test]
fn cgroup_made_anew_is_taken_up() {
    for mode in MODES {
        let rig = rig(mode, "");
        let directory = rig.cgroup.directory().to_owned();
        std::fs::remove_dir(&directory).unwrap();
        until("it is said", || rig.weir.log().contains("the workload's cgroup is gone"));
        assert!(!rig.weir.ask("/readyz").unwrap().starts_with("HTTP/1.0 200"));
        std::fs::create_dir(&directory).unwrap();
        until("it is taken up", || rig.weir.ask("/readyz").unwrap().starts_with("HTTP/1.0 200"));
        until("and taken", || {
            rig.says("dial(V4, ('10.98.2.2', 80))");
            rig.weir.opened() > 0
        });
        until("direct connections are gone", || rig.net.sockets().is_empty());
        rig.end();
    }
}

/// Killed, weir leaves the workload connected, and of its own only what no packet meets, which is
/// removed with it dead, twice if need be.
#[test]
fn killed_weir_leaves_the_workload_connected() {
    for mode in MODES {
        let Rig { cgroup, net, weir } = rig(mode, "");
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
