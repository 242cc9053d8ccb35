// SPDX-License-Identifier: Apache-2.0
//! Outbound connect hook: every way to dial is taken, what was dialled is what is reached.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::{Output, Stdio};
use std::thread::JoinHandle;

use weir::addr::Downstream;
use weir::bpf::{ConnectHook, Filters, HookPlan};

use crate::harness::{Cgroup, Net, Place, Weir, config_file, rounds, said, until, weir};

/// A workload in its cgroup, and servers that say which one they are.
pub(crate) struct Rig {
    pub(crate) cgroup: Cgroup,
    pub(crate) net: Net,
    pub(crate) weir: Weir,
}

impl Rig {
    pub(crate) fn new(more: &str) -> Rig {
        let cgroup = Cgroup::new();
        let config = config(&cgroup, more);
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

pub(crate) fn config(cgroup: &Cgroup, more: &str) -> String {
    format!("workers: 2\noutbound: {{ workload: {{ cgroup: {} }}{more} }}", cgroup.path)
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

/// CH9, and every way to dial: the right server answers, and the socket names what was dialled.
#[test]
fn every_way_to_dial_is_taken_and_looks_direct() {
    let rig = Rig::new("");
    let v4 = "10.98.2.2 80 10.98.2.2:80";
    let ways = [
        ("plain", "dial(V4, ('10.98.2.2', 80))", v4),
        ("v6", "dial(V6, ('fd98:2::2', 80))", "fd98:2::2 80 [fd98:2::2]:80"),
        ("mapped", "dial(V6, ('::ffff:10.98.2.2', 80))", "::ffff:10.98.2.2 80 10.98.2.2:80"),
        ("bound", "dial(V4, ('10.98.2.2', 80), lambda s: s.bind(('10.98.2.1', 0)))", v4),
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
    for (count, (way, script, expected)) in (1..).zip(ways) {
        let heard = rig.says(script);
        assert_eq!(heard, expected, "{way}");
        assert_eq!(rig.weir.opened(), count, "{way} was taken");
    }
    assert_eq!(rig.net.conntrack(), "", "connection tracking saw nothing");
    rig.end();
}

/// What is left out, loopback, UDP and other cgroups pass untouched.
#[test]
fn what_is_not_asked_for_passes_untouched() {
    let rig = Rig::new(", exclude: { cidrs: [\"fd98:2::/64\"], ports: [81] }");
    greet(rig.net.listen(Place::Node, "127.0.0.1:9000"));
    let script =
        "dial(V4, ('10.98.2.2', 81)); dial(V6, ('fd98:2::2', 80)); dial(V4, ('127.0.0.1', 9000))";
    let heard = rig.says(script);
    assert_eq!(
        heard,
        "10.98.2.2 81 10.98.2.2:81\nfd98:2::2 80 [fd98:2::2]:80\n127.0.0.1 9000 127.0.0.1:9000"
    );
    let udp = "s = socket.socket(V4, socket.SOCK_DGRAM)\ns.connect(('10.98.2.2', 53))\nprint(*s.getpeername())";
    assert_eq!(rig.says(udp), "10.98.2.2 53");
    let mut outside = rig.net.connect(Place::Node, "10.98.2.2:80");
    outside.read_exact(&mut [0; 12]).unwrap();
    drop(outside);
    assert_eq!(rig.weir.opened(), 0);
    until("direct connections are gone", || rig.net.sockets().is_empty());
    rig.end();
}

/// A prefix of one family says nothing about the other.
#[test]
fn prefix_of_one_family_leaves_the_other_alone() {
    let rig = Rig::new(", include: { cidrs: [\"::/0\"] }");
    rig.says("dial(V4, ('10.98.2.2', 80)); dial(V6, ('::ffff:10.98.2.2', 80))");
    assert_eq!(rig.weir.opened(), 0);
    rig.says("dial(V6, ('fd98:2::2', 80))");
    assert_eq!(rig.weir.opened(), 1);
    until("direct connections are gone", || rig.net.sockets().is_empty());
    rig.end();
}

/// Only the networks and ports that are asked for are taken.
#[test]
fn only_what_is_included_is_taken() {
    let rig = Rig::new(", include: { cidrs: [\"10.98.2.2\"], ports: [80] }");
    rig.says("dial(V4, ('10.98.2.2', 81)); dial(V6, ('fd98:2::2', 80))");
    assert_eq!(rig.weir.opened(), 0);
    rig.says("dial(V4, ('10.98.2.2', 80)); dial(V6, ('::ffff:10.98.2.2', 80))");
    assert_eq!(rig.weir.opened(), 2);
    until("direct connections are gone", || rig.net.sockets().is_empty());
    rig.end();
}

/// CH6: a thousand at a time to different places, and each one gets where it meant to go.
#[test]
fn thousand_connects_at_once_reach_what_they_dialled() {
    let rig = Rig::new("");
    let script = "
import selectors
wanted = [(V4, '10.98.2.2', 80), (V4, '10.98.2.2', 81), (V6, 'fd98:2::2', 80), (V6, 'fd98:2::2', 81)]
sockets = []
for i in range(1000):
    family, ip, port = wanted[i % 4]
    s = socket.socket(family); s.setblocking(False); s.connect_ex((ip, port)); sockets.append((s, ip, port))
for s, ip, port in sockets:
    s.setblocking(True); s.settimeout(30)
    said = s.makefile().readline().strip()
    expected = f'[{ip}]:{port}' if ':' in ip else f'{ip}:{port}'
    assert said == expected, (said, expected)
print('all')";
    assert_eq!(rig.says(script), "all");
    assert_eq!((rig.weir.opened(), rig.weir.denied("unknown_destination")), (1000, 0));
    rig.end();
}

/// CH6: without room for a record nobody guesses: the connection is nobody's.
#[test]
fn full_table_never_misleads() {
    let net = Net::new();
    let cgroup = Cgroup::new();
    let listener = net.listen(Place::Node, "127.0.0.1:15001");
    let plan = HookPlan {
        cgroups: vec![cgroup.path.clone().into()],
        closed: false,
        filters: Filters {
            include: vec!["0.0.0.0/0".parse().unwrap()],
            include_ports: vec![1..=65_535],
            ..Filters::default()
        },
        own_mark: 0x539,
        own_mark_mask: 0xfff,
        port: 15_001,
        records_max: 64,
    };
    let mut hook = net.within(Place::Node, || ConnectHook::load(&plan)).unwrap();
    hook.attach().unwrap();
    let script = format!(
        "{PRELUDE}
sockets = []
for i in range(300):
    s = socket.socket(V4); s.connect(('10.98.2.2', 1000 + i)); s.sendall(b'%5d' % (1000 + i)); sockets.append(s)
sys.stdin.read()"
    );
    let mut workload = cgroup.command(&net, Place::Node, &["python3", "-c", &script]);
    let mut workload = workload.stdin(Stdio::piped()).spawn().unwrap();
    let mut known = HashMap::new();
    for _ in 0..300 {
        let (mut stream, from) = listener.accept().unwrap();
        let mut meant = [0; 5];
        stream.read_exact(&mut meant).unwrap();
        known.insert(from, (String::from_utf8(meant.to_vec()).unwrap(), stream));
    }
    let records = hook.records();
    let mut found = 0;
    for (from, (meant, _)) in &known {
        if let Some(dst) = records.take(Downstream::new(*from)) {
            assert_eq!(dst.addr().to_string(), format!("10.98.2.2:{}", meant.trim()));
            found += 1;
        }
        assert_eq!(records.take(Downstream::new(*from)), None, "a record is taken once");
    }
    assert_eq!((found, records.losses().records_full), (64, 236));
    drop(workload.stdin.take());
    workload.wait().unwrap();
}

/// CH7: one source port for one destination after the other, as fast as it goes.
#[test]
fn reused_source_port_reaches_the_new_destination() {
    let rig = Rig::new("");
    let script = "
import struct
def before(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.bind(('10.98.2.1', 41000))
for i in range(COUNT):
    dial(V4, ('10.98.2.2', 80 + i % 2), before).close()";
    let count = rounds(2_000, 10_000);
    let heard = rig.says(&script.replace("COUNT", &count.to_string()));
    for (index, line) in heard.lines().enumerate() {
        let port = 80 + index % 2;
        assert_eq!(line, format!("10.98.2.2 {port} 10.98.2.2:{port}"));
    }
    assert_eq!(heard.lines().count() as u64, count);
    rig.end();
}

/// CH8: an upstream that refuses, cannot be reached or does not answer: the application sees success
/// first, and then a reset; what it was is counted.
#[test]
fn failed_upstreams_show_as_resets() {
    let rig = Rig::new("");
    rig.net.run(Place::Node, &["ip", "route", "add", "unreachable", "10.98.3.0/24"]);
    let drop =
        "table inet hole { chain in { type filter hook input priority 0; tcp dport 98 drop; }; }";
    rig.net.run(Place::Server, &["nft", drop]);
    for (to, reason) in [
        ("10.98.2.2', 99", "connect_refused"),
        ("10.98.3.1', 80", "connect_unreachable"),
        ("10.98.2.2', 98", "connect_timeout"),
    ] {
        let script = format!(
            "
try:
    # The reset may come before connect returns.
    s = socket.create_connection(('{to}), 20)
    print('heard', s.recv(1))
except ConnectionResetError:
    print('reset')"
        );
        assert_eq!(rig.says(&script), "reset", "{reason}");
        assert_eq!(rig.weir.closed(reason), 1, "{reason}");
    }
    rig.end();
}

/// TP7: a port of weir itself, dialled by the workload, is refused and counted.
#[test]
fn own_port_is_never_dialled() {
    let net = Net::new();
    let cgroup = Cgroup::new();
    let config = format!(
        "{}\nforward: [{{ listen: \"[::]:7000\", endpoints: [\"10.98.2.2:80\"] }}]",
        config(&cgroup, "")
    );
    let rig = Rig { weir: Weir::run(&net, &config), cgroup, net };
    for (count, (family, ip)) in (1..).zip([("V4", "10.98.1.1"), ("V6", "fd98:1::1")]) {
        let script = format!(
            "s = socket.socket({family})\ntry:\n    s.connect(('{ip}', 7000))\n    s.recv(1)\nexcept ConnectionResetError:\n    print('reset')"
        );
        assert_eq!(rig.says(&script), "reset");
        assert_eq!(rig.weir.denied("own_port"), count);
    }
    // Straight to the capture port: nobody has recorded a destination.
    let script = "s = socket.socket(V4)\ntry:\n    s.connect(('127.0.0.1', 15001))\n    s.recv(1)\nexcept ConnectionResetError:\n    print('reset')";
    assert_eq!(rig.says(script), "reset");
    assert_eq!(rig.weir.denied("unknown_destination"), 1);
    rig.end();
}

/// CH1: killed under load, again and again, weir takes its hook along: the workload dials directly
/// within 100 ms.
#[test]
fn killed_weir_leaves_the_workload_connected() {
    let rounds = rounds(25, 1_000);
    let Rig { cgroup, net, weir } = Rig::new("");
    let dial = "
import time
failed = None
while True:
    try:
        s = socket.create_connection(('10.98.2.2', 80), 5); s.settimeout(5)
        assert s.recv(64) == b'10.98.2.2:80\\n'
        s.close()
        if failed is not None:
            print(int((time.monotonic() - failed) * 1000), flush=True)
        failed = None
    except (OSError, AssertionError):
        # A flow that dies with weir counts from the moment it died.
        failed = failed if failed is not None else time.monotonic()";
    let script = format!("{PRELUDE}{dial}");
    let mut workload = cgroup.command(&net, Place::Node, &["python3", "-c", &script]);
    let mut workload = workload.stdout(Stdio::piped()).spawn().unwrap();
    let mut running = Some(weir);
    for _ in 0..rounds {
        let weir = running.take().unwrap_or_else(|| Weir::run(&net, &config(&cgroup, "")));
        until("the workload dials", || weir.opened() > 20);
        weir.kill();
        until("no program is left", || !cgroup.programs().contains("weir"));
    }
    until("and no rule", || !net.run(Place::Node, &["nft", "list", "tables"]).contains("weir"));
    workload.kill().unwrap();
    let output = workload.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut gaps: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    gaps.sort_unstable();
    // Not every kill meets an open flow. The host may be busy with others: the usual gap counts.
    let usual = gaps.get(gaps.len() / 2).copied().unwrap_or(0);
    let last = gaps.last().copied().unwrap_or(0);
    assert!(usual < 100 && last < 5_000, "{gaps:?}");
}

/// CH3: two weirs, each for its own namespace, hang programs on one cgroup; neither disturbs the
/// other, and what one leaves the other keeps.
#[test]
fn programs_of_others_in_the_cgroup_survive() {
    let rig = Rig::new("");
    let other = Net::new();
    let second = Weir::run(&other, &config(&rig.cgroup, ""));
    let attached = |programs: String| programs.matches("weir_connect4").count();
    assert_eq!(attached(rig.cgroup.programs()), 2);
    assert_eq!(rig.says("dial(V4, ('10.98.2.2', 80))"), "10.98.2.2 80 10.98.2.2:80");
    assert_eq!((rig.weir.opened(), second.opened()), (1, 0));
    second.end(&other);
    assert_eq!(attached(rig.cgroup.programs()), 1);
    assert_eq!(rig.says("dial(V4, ('10.98.2.2', 80))"), "10.98.2.2 80 10.98.2.2:80");
    assert_eq!(rig.weir.opened(), 2);
    rig.end();
}

/// CH5: a cgroup that is not there is named with the cure, and nothing is changed.
#[test]
fn missing_cgroup_is_refused_with_the_cure() {
    let net = Net::new();
    let place = tempfile::TempDir::new().unwrap();
    let config = "outbound: { workload: { cgroup: /weir-test-nowhere } }";
    let file = config_file(&place, config);
    let output = net.output(Place::Node, &[weir(), "run", "-c", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(4));
    let text = said(&output);
    assert!(text.contains("/weir-test-nowhere: No such file") && text.contains("mkdir"), "{text}");
    assert!(net.is_clean());
}

/// CH5: a cgroup that is removed is noticed, and taken up again when it is made anew.
#[test]
fn cgroup_made_anew_is_taken_up() {
    let rig = Rig::new("");
    let directory = rig.cgroup.directory().to_owned();
    std::fs::remove_dir(&directory).unwrap();
    until("it is said", || rig.weir.log().contains("the workload's cgroup is gone"));
    assert!(!rig.weir.ask("/readyz").unwrap().starts_with("HTTP/1.0 200"));
    std::fs::create_dir(&directory).unwrap();
    until("it is taken up", || rig.weir.ask("/readyz").unwrap().starts_with("HTTP/1.0 200"));
    assert_eq!(rig.says("dial(V4, ('10.98.2.2', 80))"), "10.98.2.2 80 10.98.2.2:80");
    assert_eq!(rig.weir.opened(), 1);
    rig.end();
}

/// Nothing of a loaded workload's traffic is tracked, although connection tracking is on.
#[test]
fn nothing_is_tracked_under_load() {
    let rig = Rig::new("");
    let script = "
for i in range(300):
    dial(V4, ('10.98.2.2', 80)).close(); dial(V6, ('fd98:2::2', 81)).close()";
    assert_eq!(rig.says(script).lines().count(), 600);
    assert_eq!(rig.net.conntrack(), "");
    assert_eq!(rig.weir.opened(), 600);
    rig.end();
}
