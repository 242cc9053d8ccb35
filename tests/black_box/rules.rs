// SPDX-License-Identifier: Apache-2.0
//! Rules: seen before they are made, made as a whole, watched, and gone when they shall be.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use weir::capture::{Netfilter, Outbound, Plan, Way, Workload};

use crate::harness::{
    Bpffs, Cgroup, Net, Place, Weir, check, config_file, echo, run, said, send, until, weir,
};
use crate::hook::foreign;
use crate::outbound::{says, servers};

const WORKLOAD: &str = "[::]:8000";

/// Inbound with the client's address kept: a table, a rule and a route in each family.
fn node() -> Net {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    echo(net.listen(Place::Node, WORKLOAD));
    net
}

fn rules(net: &Net, words: &[&str]) -> Output {
    net.output(Place::Node, &[&[weir(), "rules"], words].concat())
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What is there of ours, by whoever.
fn kernel(net: &Net) -> String {
    let words =
        ["nft list tables; ip -4 rule; ip -6 rule; ip route show table 133 2>/dev/null || true"];
    net.run(Place::Node, &["sh", "-c", words[0]])
}

fn visit(net: &Net) {
    let mut stream = net.connect(Place::Client, "10.98.1.1:8000");
    send(&mut stream, 1, 1000).unwrap();
    check(&mut stream, 1, 1000);
}

/// LC9: what a killed weir leaves is removed without one, once and again; others' tables stay.
#[test]
fn clear_needs_no_weir_and_may_be_asked_twice() {
    let net = node();
    let before = kernel(&net);
    assert_eq!(out(&rules(&net, &["clear"])), "nothing of weir is left here\n", "a clean host");
    let weir = Weir::run(&net, "inbound: {}");
    let refused = rules(&net, &["clear"]);
    assert_eq!(refused.status.code(), Some(4));
    assert_eq!(
        String::from_utf8_lossy(&refused.stdout),
        "",
        "it does not say that nothing is left"
    );
    assert!(said(&refused).contains("a running weir holds the rules"), "{}", said(&refused));
    weir.kill();
    let planned = out(&rules(&net, &["clear", "--dry-run"]));
    assert!(planned.contains("ip -4 rule del fwmark 0x53a/0xfff lookup 133\n"), "{planned}");
    let removed = out(&rules(&net, &["clear"]));
    assert_eq!(removed.lines().count(), planned.lines().count(), "{removed}");
    assert_eq!(out(&rules(&net, &["clear", "-o", "json"])), "[]\n");
    assert_eq!(kernel(&net), before);
}

/// What is shown agrees with what is there: before, while weir runs, and after it was killed.
#[test]
fn show_tells_what_is_there_from_what_is_asked_for() {
    let net = node();
    let cgroup = Cgroup::new();
    let place = TempDir::new().unwrap();
    let text = format!("inbound: {{}}\noutbound: {{ workload: {{ cgroup: {} }} }}", cgroup.path);
    let file = config_file(&place, &text);
    let now = || -> (Vec<String>, bool, usize) {
        let shown = out(&rules(&net, &["show", "-c", file.to_str().unwrap(), "-o", "json"]));
        let shown: Value = serde_json::from_str(&shown).unwrap();
        let wanted = shown["wanted"].as_array().unwrap();
        let wanted = wanted.iter().map(|rule| {
            format!("{} {}", rule["kind"].as_str().unwrap(), rule["now"].as_str().unwrap())
        });
        (
            wanted.collect(),
            shown["held"].as_bool().unwrap(),
            shown["others"].as_array().unwrap().len(),
        )
    };
    let like = |ip: &str, nft: &str, bpf: &str| {
        let mut list = vec!["sysctl stands".to_owned()];
        list.extend(vec![format!("ip {ip}"); 4]);
        list.extend([format!("nft {nft}"), format!("bpf {bpf}")]);
        list
    };
    assert_eq!(now(), (like("missing", "missing", "missing"), false, 0));
    let weir = Weir::run(&net, &text);
    assert_eq!(now(), (like("held", "held", "held"), true, 0));
    let table = out(&rules(&net, &["show", "-c", file.to_str().unwrap()]));
    assert!(table.contains("nft      held       table inet weir\n"), "{table}");
    weir.kill();
    until("the hook is gone", || !cgroup.programs().contains("weir"));
    assert_eq!(now(), (like("stands", "missing", "missing"), false, 0));
    // Of a config that asks for less, they are left over.
    fs::write(&file, "forward: [{ listen: \"127.0.0.1:1\", endpoints: [\"127.0.0.1:2\"] }]")
        .unwrap();
    assert_eq!(now(), (vec![], false, 4));
    rules(&net, &["clear"]);
    assert!(net.is_clean());
}

/// The printed steps, run by hand, take traffic; the printed undo leaves nothing.
#[test]
fn printed_steps_work_by_hand() {
    let net = node();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=0");
    let before = kernel(&net);
    let place = TempDir::new().unwrap();
    let file = config_file(&place, "inbound: { ports: { include: [8000] } }");
    let words = ["apply", "--dry-run", "-c", file.to_str().unwrap()];
    let script = out(&rules(&net, &words));
    assert_eq!(kernel(&net), before, "a dry run changes nothing");
    let by_hand = |script: &str| net.run(Place::Node, &["sh", "-ec", script]);
    by_hand(&script);
    // Somebody waits where weir would.
    let listener = "
import socket
s = socket.socket(socket.AF_INET6); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.IPPROTO_IPV6, 75, 1); s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
s.bind(('::', 15006)); s.listen(); print('ready', flush=True)
c, _ = s.accept(); print(*c.getsockname()[:2], flush=True)";
    let mut command = net.command(Place::Node, "timeout");
    let mut child = command
        .args(["30", "python3", "-c", listener])
        .stdout(fs::File::create(place.path().join("out")).unwrap())
        .spawn()
        .unwrap();
    let heard = || fs::read_to_string(place.path().join("out")).unwrap();
    until("somebody waits", || heard().contains("ready"));
    drop(net.connect(Place::Client, "10.98.1.1:8000"));
    until("the connection is taken", || heard().contains("::ffff:10.98.1.1 8000"));
    child.wait().unwrap();
    assert_eq!(net.run(Place::Node, &["sysctl", "-n", "net.ipv4.tcp_fwmark_accept"]), "1\n");
    let undo = script.split_once("# To undo it all:\n").unwrap().1;
    by_hand(&undo.replace("#   ", ""));
    assert_eq!(kernel(&net), before);
    assert_eq!(net.run(Place::Node, &["sysctl", "-n", "net.ipv4.tcp_fwmark_accept"]), "0\n");
    visit(&net);
    // As JSON the same steps; `clear` removes what a hand has made as well.
    let json = out(&rules(&net, &[&words[..], &["-o", "json"]].concat()));
    let steps: Vec<Value> = serde_json::from_str(&json).unwrap();
    for step in steps.iter().filter(|step| step["by_hand"] == true && step["kind"] != "sysctl") {
        by_hand(step["apply"].as_str().unwrap());
    }
    assert_ne!(kernel(&net), before);
    out(&rules(&net, &["clear"]));
    assert_eq!(kernel(&net), before);
    // A weir takes the place of what a hand has made.
    by_hand(&script);
    let weir = Weir::run(&net, "inbound: { ports: { include: [8000] } }");
    visit(&net);
    weir.end(&net);
}

/// What cannot be made by hand is said so; the programs of a running weir can be let go of by the line
/// that is printed.
#[test]
fn printed_undo_of_programs_works_by_hand() {
    let (net, cgroup) = (Net::new(), Cgroup::new());
    let config = format!("workers: 1\noutbound: {{ workload: {{ cgroup: {} }} }}", cgroup.path);
    let weir = Weir::run(&net, &config);
    let place = TempDir::new().unwrap();
    let file = config_file(&place, &config);
    let words = ["rules", "show", "-o", "json", "-c", file.to_str().unwrap()];
    let shown: Value = serde_json::from_str(&out(&rules(&net, &words[1..]))).unwrap();
    let steps = shown["wanted"].as_array().unwrap();
    let programs = steps.iter().find(|step| step["kind"] == "bpf").unwrap();
    assert_eq!(programs["by_hand"], false);
    assert!(programs["apply"].as_str().unwrap().starts_with("# not by hand"), "{programs}");
    assert!(cgroup.programs().contains("weir_connect4"));
    run(&["sh", "-c", programs["undo"].as_str().unwrap()]);
    assert!(!cgroup.programs().contains("weir_"), "{}", cgroup.programs());
    weir.end(&net);
}

/// Without a running weir `apply` leads no traffic to a port where nobody waits.
#[test]
fn apply_changes_no_traffic_of_an_open_config() {
    let net = node();
    let before = kernel(&net);
    let place = TempDir::new().unwrap();
    let file = config_file(&place, "inbound: {}");
    let words = ["apply", "-c", file.to_str().unwrap()];
    assert_eq!(out(&rules(&net, &words)).lines().count(), 4, "two families, a route and a rule");
    assert_eq!(out(&rules(&net, &words)).lines().count(), 4, "and again");
    visit(&net);
    let weir = Weir::run(&net, "inbound: {}");
    visit(&net);
    assert_eq!(weir.opened(), 1);
    assert_eq!(rules(&net, &words).status.code(), Some(4), "they are held");
    weir.end(&net);
    assert_eq!(kernel(&net), before);
}

/// LC7, CH1, `on_exit: closed`: what would be taken is refused before weir runs, after it was killed
/// and after it ended; what is left out passes; `clear` opens.
#[test]
fn closed_node_refuses_until_weir_runs() {
    let (net, cgroup, bpffs) = (node(), Cgroup::new(), Bpffs::new());
    servers(&net);
    echo(net.listen(Place::Node, "[::]:8001"));
    let text = format!(
        "on_exit: closed\ninbound: {{ ports: {{ exclude: [8001] }} }}\noutbound: {{ workload: {{ cgroup: {} }} }}",
        cgroup.path
    );
    let place = TempDir::new().unwrap();
    let file = config_file(&place, &text);
    let run = |words: &[&str]| {
        out(&bpffs.command(&net, Place::Node, weir()).arg("rules").args(words).output().unwrap())
    };
    let dial = "
try: dial(V4, ('10.98.2.2', 80))
except ConnectionRefusedError: print('refused')";
    let is_closed = || {
        for addr in ["10.98.1.1:8000", "[fd98:1::1]:8000"] {
            let error = net.try_connect(Place::Client, addr).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{addr}");
        }
        assert_eq!(says(&cgroup, &net, dial), "refused");
        drop(net.connect(Place::Client, "10.98.1.1:8001"));
    };
    let is_served = || {
        visit(&net);
        assert_eq!(says(&cgroup, &net, dial), "10.98.2.2 80 10.98.2.2:80");
    };
    is_served();
    let done = run(&["apply", "-c", file.to_str().unwrap()]);
    assert!(done.contains("table inet weir_guard") && done.contains("bpf"), "{done}");
    is_closed();
    for is_killed in [true, false] {
        let weir = Weir::run_as(bpffs.command(&net, Place::Node, weir()), &text);
        is_served();
        assert_eq!(weir.opened(), 2);
        if is_killed {
            weir.kill();
            until("the table is gone", || !kernel(&net).contains("inet weir\n"));
        } else {
            until("every flow has ended", || weir.active() == 0);
            weir.end_closed(&net);
        }
        is_closed();
    }
    let removed = run(&["clear"]);
    assert!(removed.contains("removed table inet weir_guard") && removed.contains("weir_connect6"));
    assert_eq!(run(&["clear"]), "nothing of weir is left here\n");
    is_served();
    assert!(net.is_clean() && bpffs.pins(&net).is_empty() && !cgroup.programs().contains("weir"));
}

/// LC7, `on_exit: closed` for what nft takes outbound, in both ways: the workload's connects are refused
/// without a weir; what is left out, and everybody else, pass.
#[test]
fn closed_outbound_by_nft_refuses_the_workload_alone() {
    for way in [Way::Tproxy, Way::Redirect] {
        let (net, cgroup, other) = (node(), Cgroup::new(), Cgroup::new());
        servers(&net);
        let netfilter = Netfilter {
            exclude: vec![],
            exclude_ports: vec![81..=81],
            flows_max: 100,
            half_closed: Duration::from_secs(30),
            include: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
            include_ports: vec![1..=65_535],
            leaves: false,
            port: 15_001,
            way,
            workload: Some(Workload::Cgroups(vec![cgroup.path.clone().into()])),
        };
        let outbound = vec![Outbound::Netfilter(netfilter)];
        let plan = Plan { closed: true, outbound, ..Plan::default() };
        net.within(Place::Node, || plan.prepare().unwrap().apply().unwrap());
        let script = "
for family, ip, port in (V4, '10.98.2.2', 80), (V6, 'fd98:2::2', 80), (V4, '10.98.2.2', 81):
    try: dial(family, (ip, port))
    except ConnectionRefusedError: print('refused')";
        let passes = "10.98.2.2 81 10.98.2.2:81";
        assert_eq!(says(&cgroup, &net, script), format!("refused\nrefused\n{passes}"));
        assert!(!says(&other, &net, script).contains("refused"));
        out(&rules(&net, &["clear"]));
        assert!(!says(&cgroup, &net, script).contains("refused"));
    }
}

/// A directory before all others in PATH in which `program` fails when called with `word` for the
/// `turn`-th time, and is the real one otherwise.
fn failing(place: &Path, program: &str, word: &str, turn: u32) -> PathBuf {
    let directory = place.join(format!("{program}-{turn}"));
    fs::create_dir(&directory).unwrap();
    let path = directory.join(program);
    let (count, real) = (directory.join("count"), format!("/usr/sbin/{program}"));
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' {word} '*) echo x >>{0}; \
         [ $(wc -l <{0}) = {turn} ] && {{ echo 'refused by the test' >&2; exit 2; }};; esac\n\
         exec {real} \"$@\"\n",
        count.display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    directory
}

/// LC6: whichever step is refused, what was done before it is undone, and weir says which it was.
#[test]
fn refused_step_undoes_those_before_it() {
    let net = node();
    let cgroup = Cgroup::new();
    let before = kernel(&net);
    let place = TempDir::new().unwrap();
    let config = format!("inbound: {{}}\noutbound: {{ workload: {{ cgroup: {} }} }}", cgroup.path);
    let file = config_file(&place, &config);
    let start = |path: &Path| {
        let path = format!("{}:{}", path.display(), std::env::var("PATH").unwrap());
        let mut command = net.command(Place::Node, "timeout");
        command.args(["20", weir(), "run", "-c", file.to_str().unwrap()]);
        let output = command.env("PATH", path).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{}", said(&output));
        assert_eq!(kernel(&net), before, "{}", said(&output));
        assert!(!cgroup.programs().contains("weir"));
        said(&output)
    };
    for (program, word, turns) in
        [("ip", "replace", 1..=2), ("ip", "add", 1..=2), ("nft", "-i", 1..=1)]
    {
        for turn in turns {
            let directory = TempDir::new().unwrap();
            let text = start(&failing(directory.path(), program, word, turn));
            assert!(text.contains("refused by the test"), "{program} {word} {turn}: {text}");
        }
    }
    // The kernel takes at most 64 programs of a kind on a cgroup: the last but one is refused.
    let full = foreign(cgroup.directory(), "10.0.0.1:1", "10.0.0.1:1", 64);
    let text = start(Path::new("/nowhere"));
    assert!(text.contains("attach weir_connect4"), "{text}");
    drop(full);
    Weir::run(&net, &config).end(&net);
    assert_eq!(kernel(&net), before);
}

/// TP11, TP4: what others remove or change is back within 2 s, and said; flushing everything does
/// not touch what a running weir owns.
#[test]
fn removed_rules_are_back_within_two_seconds() {
    let net = node();
    let weir = Weir::run(&net, "on_exit: closed\ninbound: {}");
    let rule = "fwmark 0x53a/0xfff lookup 133";
    let edits = [
        ("guard", "nft flush ruleset".to_owned(), "nft list table inet weir_guard".to_owned()),
        ("routes", format!("ip rule del {rule}"), format!("ip rule | grep '{rule}'")),
        (
            "routes",
            "ip route flush table 133".to_owned(),
            "ip route show table 133 | grep local".to_owned(),
        ),
        (
            "guard",
            "nft flush chain inet weir_guard input".to_owned(),
            "nft list chain inet weir_guard input | grep jump".to_owned(),
        ),
    ];
    for (part, edit, look) in edits {
        let began = Instant::now();
        net.run(Place::Node, &["sh", "-c", &edit]);
        assert!(kernel(&net).contains("table inet weir\n"), "nobody else can remove it");
        until("it is back", || net.output(Place::Node, &["sh", "-c", &look]).status.success());
        assert!(began.elapsed() < Duration::from_secs(2), "{edit}: {:?}", began.elapsed());
        until("it is counted", || {
            weir.metric("weir_rules_lost_total", &[&format!("part=\"{part}\"")]) > 0
        });
    }
    assert!(weir.log().contains("was gone or changed: capture is in place again"));
    visit(&net);
    assert_eq!(weir.opened(), 1);
    until("every flow has ended", || weir.active() == 0);
    let mut weir = weir;
    weir.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(weir.wait().code(), Some(0));
    out(&rules(&net, &["clear"]));
    until("the node is clean", || net.is_clean());
}

/// LC6, RD3: somebody else's route to loopback in the same table, as Istio has it, serves weir too, and
/// is there when weir is gone.
#[test]
fn same_route_of_others_serves_and_stays() {
    let net = node();
    let shown = || net.run(Place::Node, &["ip", "route", "show", "table", "133"]);
    net.run(Place::Node, &["ip", "route", "add", "local", "default", "dev", "lo", "table", "133"]);
    let before = shown();
    let weir = Weir::run(&net, "inbound: {}");
    visit(&net);
    assert_eq!((weir.opened(), shown()), (1, before.clone()));
    weir.end(&net);
    let weir = Weir::run(&net, "inbound: {}");
    weir.kill();
    out(&rules(&net, &["clear"]));
    assert_eq!(shown(), before);
    until("the node is clean", || net.is_clean());
}

/// TP11 by policy: weir only says what is missing and is not ready, until somebody puts it back.
#[test]
fn alarm_leaves_edits_to_others() {
    let net = node();
    let weir = Weir::run(&net, "on_change: alarm\ninbound: {}");
    let is_ready = || weir.ask("/readyz").unwrap().starts_with("HTTP/1.0 200");
    let rule = |verb| {
        let words = ["ip", "rule", verb, "fwmark", "0x53a/0xfff", "lookup", "133"];
        net.run(Place::Node, &words);
    };
    rule("del");
    let began = Instant::now();
    until("it is said", || weir.log().contains("on_change says alarm"));
    assert!(began.elapsed() < Duration::from_secs(2) && !is_ready(), "{:?}", began.elapsed());
    assert!(!net.run(Place::Node, &["ip", "-4", "rule"]).contains("0x53a"), "nothing is put back");
    rule("add");
    until("weir is ready again", is_ready);
    weir.end(&net);
}

/// TP6: marks of ours do not leave the bits that are ours: another tenant's bits survive, and
/// nothing that is only forwarded ever carries a mark of ours.
#[test]
fn other_bits_of_the_mark_are_others() {
    let net = node();
    echo(net.listen(Place::Server, "10.98.2.2:9000"));
    let others = "table inet tenant {
        counter leaked { }
        counter lost { }
        chain early { type filter hook prerouting priority -400; iifname client meta mark set meta mark or 0x70000; }
        chain late { type filter hook input priority 50; iifname client meta mark and 0x70000 != 0x70000 counter name lost; }
        chain forward { type filter hook forward priority 0; meta mark and 0xfff != 0 counter name leaked; }
    }";
    net.run(Place::Node, &["nft", others]);
    net.set(Place::Node, "net.ipv4.ip_forward=1");
    net.run(Place::Client, &["ip", "route", "add", "10.98.2.0/24", "via", "10.98.1.1"]);
    net.run(Place::Server, &["ip", "route", "add", "10.98.1.0/24", "via", "10.98.2.1"]);
    let weir = Weir::run(&net, "inbound: { source: own }");
    visit(&net);
    let mut through = net.connect(Place::Client, "10.98.2.2:9000");
    send(&mut through, 2, 1000).unwrap();
    check(&mut through, 2, 1000);
    drop(through);
    assert_eq!(weir.opened(), 1, "what is forwarded is not ours to take");
    for name in ["leaked", "lost"] {
        let counter = net.run(Place::Node, &["nft", "list", "counter", "inet", "tenant", name]);
        assert!(counter.contains("packets 0"), "{name}: {counter}");
    }
    weir.end(&net);
}
