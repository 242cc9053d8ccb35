// SPDX-License-Identifier: Apache-2.0
//! Outbound by the connect hook alone: its records, what its workload sees of failures, and its end.

use std::collections::HashMap;
use std::io::Read;
use std::process::Stdio;

use weir::addr::Downstream;
use weir::bpf::{ConnectHook, Filters, HookPlan};

use crate::harness::{Cgroup, Net, Place, Weir, config_file, rounds, said, until, weir};
use crate::outbound::{PRELUDE, Rig, config};

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

/// CH8: an upstream that refuses, cannot be reached or does not answer: the application sees success
/// first, and then a reset; what it was is counted.
#[test]
fn failed_upstreams_show_as_resets() {
    let rig = Rig::new("connect", "");
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
        config("connect", &cgroup, "")
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
    let Rig { cgroup, net, weir } = Rig::new("connect", "");
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
        let weir =
            running.take().unwrap_or_else(|| Weir::run(&net, &config("connect", &cgroup, "")));
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
    let rig = Rig::new("connect", "");
    let other = Net::new();
    let second = Weir::run(&other, &config("connect", &rig.cgroup, ""));
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
