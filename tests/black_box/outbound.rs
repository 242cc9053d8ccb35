// SPDX-License-Identifier: Apache-2.0
//! Outbound, by every means: every way to dial is taken, what was dialled is what is reached, and nothing
//! else is touched.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::{Output, Stdio};
use std::thread::JoinHandle;

use crate::harness::{Cgroup, Net, Place, Weir, check, echo, rounds, said, send, until};

const MODES: [&str; 3] = ["connect", "tproxy", "redirect"];

/// A workload in its cgroup, and servers that say which one they are.
pub(crate) struct Rig {
    pub(crate) cgroup: Cgroup,
    pub(crate) net: Net,
    pub(crate) weir: Weir,
}

impl Rig {
    pub(crate) fn new(mode: &str, more: &str) -> Rig {
        let cgroup = Cgroup::new();
        let config = config(mode, &cgroup, more);
        Rig::with(Net::new(), cgroup, &config)
    }

    /// With a config of the test's own.
    pub(crate) fn with(net: Net, cgroup: Cgroup, config: &str) -> Rig {
        servers(&net);
        let weir = Weir::run(&net, config);
        Rig { cgroup, net, weir }
    }

    pub(crate) fn says(&self, script: &str) -> String {
        says(&self.cgroup, &self.net, script)
    }

    pub(crate) fn end(self) {
        self.weir.end(&self.net);
        assert!(!self.cgroup.programs().contains("weir"), "no program is left");
    }
}

/// Runs a script in the workload; it has `dial`, which prints what `greet` and its own socket say.
pub(crate) fn python(cgroup: &Cgroup, net: &Net, script: &str) -> Output {
    let script = format!("{PRELUDE}\n{script}");
    cgroup.output(net, &["timeout", "60", "python3", "-c", &script])
}

/// What a script that must succeed printed.
pub(crate) fn says(cgroup: &Cgroup, net: &Net, script: &str) -> String {
    let output = python(cgroup, net, script);
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Two ports of both families that greet.
pub(crate) fn servers(net: &Net) {
    for (port, ip) in (80..82).flat_map(|port| Net::SERVER.map(|ip| (port, ip))) {
        let ip: IpAddr = ip.parse().unwrap();
        greet(net.listen(Place::Server, &SocketAddr::new(ip, port).to_string()));
    }
}

pub(crate) fn config(mode: &str, cgroup: &Cgroup, more: &str) -> String {
    let workload = format!("workload: {{ cgroup: {} }}", cgroup.path);
    format!("workers: 2\noutbound: {{ capture: {mode}, {workload}{more} }}")
}

/// Entries for each flow: none, or one for each leg.
fn entries(mode: &str, flows: usize) -> usize {
    if mode == "redirect" { 2 * flows } else { 0 }
}

fn tracked(net: &Net) -> usize {
    net.conntrack().lines().count()
}

/// Says to everybody at which address they were reached, and sends what they say back.
pub(crate) fn greet(listener: TcpListener) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let Ok(addr) = stream.local_addr() else { return };
                // A peer that has gone wants no greeting.
                let _ = stream.write_all(format!("{addr}\n").as_bytes());
                let _ = stream.read(&mut [0; 64]);
            });
        }
    })
}

pub(crate) const PRELUDE: &str = r#"
import socket, sys, os
def hear(s):
    s.settimeout(20)
    name = s.getpeername()
    print(name[0], name[1], s.makefile().readline().strip())
def dial(family, addr, before=lambda s: None):
    s = socket.socket(family, socket.SOCK_STREAM)
    before(s)
    s.connect(addr)
    hear(s)
    return s
V4, V6 = socket.AF_INET, socket.AF_INET6
"#;

/// CH9, TP8, TP10, and every way to dial: the right server answers, the socket names what was dialled, and
/// no more is tracked than was promised.
#[test]
fn every_way_to_dial_is_taken_and_looks_direct() {
    let v4 = "10.98.2.2 80 10.98.2.2:80";
    let ways = [
        ("plain", "dial(V4, ('10.98.2.2', 80))", v4),
        ("v6", "dial(V6, ('fd98:2::2', 80))", "fd98:2::2 80 [fd98:2::2]:80"),
        ("mapped", "dial(V6, ('::ffff:10.98.2.2', 80))", "::ffff:10.98.2.2 80 10.98.2.2:80"),
        ("bound", "dial(V4, ('10.98.2.2', 80), lambda s: s.bind(('10.98.2.1', 0)))", v4),
        ("bound elsewhere", "dial(V4, ('10.98.2.2', 80), lambda s: s.bind(('10.98.1.1', 0)))", v4),
        ("bound to a port", "dial(V4, ('10.98.2.2', 80), lambda s: s.bind(('', 45000)))", v4),
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
        (
            "mptcp v6",
            "s = socket.socket(V6, socket.SOCK_STREAM, 262)\ns.connect(('fd98:2::2', 80))\nhear(s)",
            "fd98:2::2 80 [fd98:2::2]:80",
        ),
        (
            "mptcp mapped",
            "s = socket.socket(V6, socket.SOCK_STREAM, 262)\n\
             s.connect(('::ffff:10.98.2.2', 80))\nhear(s)",
            "::ffff:10.98.2.2 80 10.98.2.2:80",
        ),
    ];
    for mode in MODES {
        let rig = Rig::new(mode, "");
        for (count, (way, script, expected)) in (1..).zip(ways) {
            assert_eq!(rig.says(script), expected, "{mode}: {way}");
            assert_eq!(rig.weir.opened(), count, "{mode}: {way} was taken");
        }
        assert_eq!(tracked(&rig.net), entries(mode, ways.len()), "{mode}");
        rig.end();
    }
}

/// What is left out, loopback, UDP and other cgroups pass untouched; so do, but for the connect hook, which
/// need not know them, this host's other addresses.
#[test]
fn what_is_not_asked_for_passes_untouched() {
    for mode in MODES {
        let rig = Rig::new(mode, ", exclude: { cidrs: [\"fd98:2::/64\"], ports: [81] }");
        greet(rig.net.listen(Place::Node, "[::]:9000"));
        let script = "dial(V4, ('10.98.2.2', 81)); dial(V6, ('fd98:2::2', 80))\n\
                      dial(V4, ('127.0.0.1', 9000))";
        assert_eq!(
            rig.says(script),
            "10.98.2.2 81 10.98.2.2:81\nfd98:2::2 80 [fd98:2::2]:80\n\
             127.0.0.1 9000 [::ffff:127.0.0.1]:9000"
        );
        let here = "10.98.1.1 9000 [::ffff:10.98.1.1]:9000";
        assert_eq!(rig.says("dial(V4, ('10.98.1.1', 9000))"), here);
        let taken = u64::from(mode == "connect");
        let udp = "s = socket.socket(V4, socket.SOCK_DGRAM)\ns.connect(('10.98.2.2', 53))\n\
                   s.send(b'x')\nprint(*s.getpeername())";
        assert_eq!(rig.says(udp), "10.98.2.2 53");
        let mut outside = rig.net.connect(Place::Node, "10.98.2.2:80");
        outside.read_exact(&mut [0; 12]).unwrap();
        drop(outside);
        assert_eq!(rig.weir.opened(), taken, "{mode}");
        until("direct connections are gone", || rig.net.sockets().is_empty());
        rig.end();
    }
}

/// Only the networks and ports that are asked for are taken; a prefix of one family says nothing about the
/// other.
#[test]
fn only_what_is_included_is_taken() {
    let cases = [
        (
            ", include: { cidrs: [\"10.98.0.0/16\", \"10.98.2.2\"], ports: [80] }",
            "dial(V4, ('10.98.2.2', 81)); dial(V6, ('fd98:2::2', 80))",
            "dial(V4, ('10.98.2.2', 80)); dial(V6, ('::ffff:10.98.2.2', 80))",
        ),
        (
            ", include: { cidrs: [\"::/0\"] }",
            "dial(V4, ('10.98.2.2', 80)); dial(V6, ('::ffff:10.98.2.2', 80))",
            "dial(V6, ('fd98:2::2', 80)); dial(V6, ('fd98:2::2', 81))",
        ),
    ];
    for mode in MODES {
        for (include, left, taken) in cases {
            let rig = Rig::new(mode, include);
            rig.says(left);
            assert_eq!(rig.weir.opened(), 0, "{mode}{include}");
            rig.says(taken);
            assert_eq!(rig.weir.opened(), 2, "{mode}{include}");
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
        let config = config(mode, &cgroup, "");
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
        let rig = Rig::new(mode, "");
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

/// CH6: a thousand at a time to different places, and each one gets where it meant to go.
#[test]
fn thousand_connects_at_once_reach_what_they_dialled() {
    for mode in MODES {
        let rig = Rig::new(mode, "");
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

/// Short connections in a row leave nothing, and nothing of them is tracked but by redirect.
#[test]
fn short_connections_in_a_row_leave_nothing() {
    for mode in MODES {
        let rig = Rig::new(mode, "");
        let script = "
for i in range(300):
    dial(V4, ('10.98.2.2', 80)).close(); dial(V6, ('fd98:2::2', 81)).close()";
        assert_eq!(rig.says(script).lines().count(), 600);
        if mode != "redirect" {
            assert_eq!(rig.net.conntrack(), "");
        }
        assert_eq!(rig.weir.opened(), 600);
        rig.end();
    }
}

/// CH7: one source port for one destination after the other, as fast as it goes: no old state is met.
#[test]
fn reused_source_port_reaches_the_new_destination() {
    for mode in MODES {
        let count = if mode == "connect" { rounds(2_000, 10_000) } else { rounds(400, 2_000) };
        let rig = Rig::new(mode, "");
        let script = "
import struct
def before(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.bind(('10.98.2.1', 41000))
for i in range(COUNT):
    dial(V4, ('10.98.2.2', 80 + i % 2), before).close()";
        let heard = rig.says(&script.replace("COUNT", &count.to_string()));
        for (index, line) in heard.lines().enumerate() {
            let port = 80 + index % 2;
            assert_eq!(line, format!("10.98.2.2 {port} 10.98.2.2:{port}"), "{mode}");
        }
        assert_eq!(heard.lines().count() as u64, count);
        rig.end();
    }
}

/// CH5: a workload's cgroup that is made anew is taken up again, and flows that are open stay open.
#[test]
fn cgroup_made_anew_is_taken_up() {
    for mode in MODES {
        let rig = Rig::new(mode, "");
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
