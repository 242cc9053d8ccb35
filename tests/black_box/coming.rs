// SPDX-License-Identifier: Apache-2.0
//! SIGHUP where weir was started: cgroups, captures and their means come, change and go, and nobody who
//! is connected notices.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;

use crate::harness::{Bpffs, Cgroup, Net, Place, Weir, check, echo, send, until};
use crate::outbound::says;

const MODES: [&str; 3] = ["connect", "tproxy", "redirect"];
const DIAL: &str = "s = socket.create_connection(('10.98.2.2', 80), 20)\ns.sendall(b'x')\n\
                    assert s.recv(1) == b'x'";

/// A connection of a process in a cgroup, which is asked now and then whether it lives.
struct Held {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Held {
    fn open(cgroup: &Cgroup, net: &Net) -> Held {
        let script = "import socket, sys
s = socket.create_connection(('10.98.2.2', 80), 20)
for line in sys.stdin:
    s.sendall(line.encode())
    assert s.recv(100) == line.encode()
    print(*s.getpeername(), flush=True)";
        let mut command = cgroup.command(net, Place::Node, &["python3", "-c", script]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut held = Held { child, input, output };
        held.is_alive();
        held
    }

    /// It talks, and is shown the address that it dialled.
    fn is_alive(&mut self) {
        writeln!(self.input.as_mut().unwrap(), "hello").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "10.98.2.2 80\n");
    }

    fn close(mut self) {
        drop(self.input.take());
        assert!(self.child.wait().unwrap().success());
    }
}

/// Dials until its input ends, over and over; says how often it was answered.
struct Storm(Child);

impl Storm {
    fn begin(cgroup: &Cgroup, net: &Net) -> Storm {
        let script = "import select, socket, sys
count = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    s = socket.create_connection(('10.98.2.2', 80), 20)
    s.sendall(b'x')
    assert s.recv(1) == b'x'
    s.close()
    count += 1
print(count)";
        let mut command = cgroup.command(net, Place::Node, &["python3", "-c", script]);
        Storm(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }

    fn end(mut self) -> u64 {
        drop(self.0.stdin.take());
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(self.0.wait().unwrap().success(), "a connection failed");
        text.trim().parse().unwrap()
    }
}

fn node() -> Net {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    echo(net.listen(Place::Server, "10.98.2.2:80"));
    net
}

/// An entry of `outbound` at `port` for these cgroups.
fn outbound(mode: &str, port: u16, cgroups: &[&Cgroup]) -> String {
    let paths: Vec<&str> = cgroups.iter().map(|cgroup| cgroup.path.as_str()).collect();
    format!(
        "outbound: {{ capture: {mode}, listen: \"127.0.0.1:{port}\", workload: {{ cgroup: [{}] }} }}\n",
        paths.join(", ")
    )
}

fn reload(weir: &Weir, config: &str) {
    assert!(weir.reload(config), "{}", weir.log());
}

/// The cgroups of one capture come and go, in every mode; who was connected stays connected and sees what
/// it dialled.
#[test]
fn cgroups_of_a_capture_come_and_go() {
    for mode in MODES {
        let (net, one, two) = (node(), Cgroup::new(), Cgroup::new());
        let config = |cgroups: &[&Cgroup]| outbound(mode, 15_001, cgroups);
        let weir = Weir::run(&net, &config(&[&one]));
        let mut held = Held::open(&one, &net);
        let takes = |cgroup, taken: u64| {
            let before = weir.opened();
            says(cgroup, &net, DIAL);
            assert_eq!(weir.opened() - before, taken, "{mode}");
        };
        takes(&two, 0);
        for (cgroups, taken) in [
            (vec![&one, &two], [1, 1]),
            (vec![&two], [0, 1]),
            (vec![&one], [1, 0]),
            (vec![&one, &two], [1, 1]),
        ] {
            reload(&weir, &config(&cgroups));
            held.is_alive();
            takes(&one, taken[0]);
            takes(&two, taken[1]);
        }
        assert!(!weir.reload(&config(&[&one]).replace(&one.path, "/no-such-cgroup")));
        takes(&one, 1);
        held.close();
        weir.end(&net);
        assert!(!one.programs().contains("weir") && !two.programs().contains("weir"));
    }
}

/// Workloads by cgroup come and go, the last one too, in every mode: what one needed of the rules goes with
/// its last flow, and no flow is dropped.
#[test]
fn workloads_by_cgroup_come_and_go() {
    for mode in MODES {
        let (net, one, two) = (node(), Cgroup::new(), Cgroup::new());
        let entry = |name: &str, cgroup: &Cgroup, port: u16| {
            format!(
                "- {{ name: {name}, cgroup: {}, outbound: {{ capture: {mode}, listen: \
                 \"127.0.0.1:{port}\" }} }}\n",
                cgroup.path
            )
        };
        let (first, second) = (entry("first", &one, 15_001), entry("second", &two, 15_002));
        let plain = "forward: [{ listen: \"127.0.0.1:7000\", endpoints: [\"10.98.2.2:80\"] }]\n";
        let config = |entries: &[&String]| {
            let entries: String = entries.iter().map(|entry| entry.as_str()).collect();
            let key = if entries.is_empty() { "" } else { "workloads:\n" };
            format!("workers: 2\n{plain}{key}{entries}")
        };
        let weir = Weir::run(&net, &config(&[&first]));
        let mut held = Held::open(&one, &net);
        reload(&weir, &config(&[&first, &second]));
        let mut also = Held::open(&two, &net);
        let names = || {
            let flows = weir.flows();
            let mut names: Vec<_> =
                flows.iter().map(|flow| flow["workload"].as_str().unwrap().to_owned()).collect();
            names.sort();
            names
        };
        assert_eq!(names(), ["first", "second"], "{mode}");
        // The one that was there at the start goes; then, with a flow of it still open, the other one.
        for left in [vec![&second], vec![]] {
            reload(&weir, &config(&left));
            held.is_alive();
            also.is_alive();
            assert_eq!(weir.opened(), 2);
            says(&one, &net, DIAL);
            assert_eq!(weir.opened(), 2, "{mode}: it goes directly");
        }
        held.close();
        also.close();
        until("nothing of it is left", || net.is_clean());
        until("no program is left", || {
            !format!("{}{}", one.programs(), two.programs()).contains("weir")
        });
        // A name and filters may change while it is there.
        reload(&weir, &config(&[&first]));
        let mut again = Held::open(&one, &net);
        reload(&weir, &config(&[&first.replace("first", "renamed")]));
        let new = Held::open(&one, &net);
        assert_eq!(weir.opened(), 4, "{mode}");
        again.is_alive();
        new.close();
        until("it has ended", || weir.active() == 1);
        again.close();
        weir.end(&net);
    }
}

/// One that goes and comes again while a flow of it is still open: both are served, and nothing is left.
#[test]
fn workload_that_comes_again_before_its_last_flow_has_ended() {
    for mode in MODES {
        let (net, one) = (node(), Cgroup::new());
        let plain = "forward: [{ listen: \"127.0.0.1:7000\", endpoints: [\"10.98.2.2:80\"] }]\n";
        let there = format!("{plain}{}", outbound(mode, 15_001, &[&one]));
        let weir = Weir::run(&net, &there);
        let mut held = Held::open(&one, &net);
        for round in 0..3u64 {
            reload(&weir, plain);
            says(&one, &net, DIAL);
            assert_eq!(weir.opened(), 1 + round, "{mode}");
            reload(&weir, &there);
            says(&one, &net, DIAL);
            assert_eq!(weir.opened(), 2 + round, "{mode}");
            held.is_alive();
        }
        held.close();
        weir.end(&net);
        assert!(!one.programs().contains("weir"));
    }
}

/// What is open of a workload that was taken out has the time of a drain, and then is reset.
#[test]
fn what_is_open_of_a_workload_that_went_ends_in_time() {
    let (net, one) = (node(), Cgroup::new());
    let place = tempfile::TempDir::new().unwrap();
    let profile = place.path().join("hasty.yaml");
    std::fs::write(&profile, "summary: a test\ninclude: balanced\ntimeouts: { drain_ms: 300 }\n")
        .unwrap();
    let plain = format!(
        "profile: \"{}\"\nforward: [{{ listen: \"127.0.0.1:7000\", endpoints: [\"10.98.2.2:80\"] }}]\n",
        profile.display()
    );
    let weir = Weir::run(&net, &format!("{plain}{}", outbound("tproxy", 15_001, &[&one])));
    let held = Held::open(&one, &net);
    reload(&weir, &plain);
    until("it is reset", || weir.closed("workload_gone") == 1);
    until("nothing of it is left", || net.is_clean());
    drop(held.input);
    let mut child = held.child;
    child.wait().unwrap();
    weir.end(&net);
}

/// CH12, TP11: by which means a cgroup is captured changes under load, from each to each: every connection
/// is answered and every one is taken.
#[test]
fn means_change_without_a_gap() {
    let (net, one) = (node(), Cgroup::new());
    let config = |round: usize| {
        let mode = MODES[round % 3];
        outbound(mode, [15_001, 15_002, 15_003][round % 3], &[&one])
    };
    let weir = Weir::run(&net, &config(0));
    let mut held = vec![Held::open(&one, &net)];
    let storms: Vec<Storm> = (0..2).map(|_| Storm::begin(&one, &net)).collect();
    // Forwards and backwards: each follows each.
    for round in [1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0] {
        reload(&weir, &config(round));
        held.iter_mut().for_each(Held::is_alive);
        if held.len() < 4 {
            held.push(Held::open(&one, &net));
        }
    }
    let count: u64 = storms.into_iter().map(Storm::end).sum();
    assert!(count > 100, "{count} connections");
    until("all have ended", || weir.active() == 4);
    assert_eq!(weir.opened(), count + 4, "every one was taken");
    assert_eq!(weir.metric("weir_denied_total", &[]), 0);
    held.into_iter().for_each(Held::close);
    weir.end(&net);
    assert!(!one.programs().contains("weir"));
}

/// By which means a workload's clients are taken changes under load: nobody fails, everybody is taken.
#[test]
fn means_of_inbound_change_without_a_gap() {
    let net = node();
    echo(net.listen(Place::Node, "[::]:80"));
    let config = |round: u16| {
        let mode = ["tproxy", "redirect"][usize::from(round % 2)];
        format!(
            "inbound: {{ capture: {mode}, source: own, listen: \"[::]:{}\" }}\n",
            15_006 + round % 2
        )
    };
    let weir = Weir::run(&net, &config(0));
    let doors = ["10.98.1.1:80", "[fd98:1::1]:80"];
    let mut long: Vec<TcpStream> = doors.map(|door| net.connect(Place::Client, door)).into();
    let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    scope(|scope| {
        for seed in 0..4u64 {
            let (net, over, served) = (&net, &over, &served);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let mut stream = net.connect(Place::Client, doors[usize::from(seed % 2 == 1)]);
                    send(&mut stream, seed, 2000).unwrap();
                    check(&mut stream, seed, 2000);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 1..=10 {
            reload(&weir, &config(round));
            for (seed, stream) in (0..).zip(&mut long) {
                send(stream, seed, 10_000).unwrap();
                check(stream, seed, 10_000);
            }
            if round < 4 {
                long.extend(doors.map(|door| net.connect(Place::Client, door)));
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let served = served.load(Ordering::Relaxed);
    assert!(served > 50, "{served} connections");
    assert_eq!(weir.opened(), served + long.len() as u64, "every one was taken");
    assert_eq!(weir.metric("weir_denied_total", &[]), 0);
    drop(long);
    weir.end(&net);
}

/// LC6: what cannot be had changes nothing and says why.
#[test]
fn what_cannot_be_had_changes_nothing_and_says_why() {
    let (net, one) = (node(), Cgroup::new());
    let good = outbound("connect", 15_001, &[&one]);
    let weir = Weir::run(&net, &good);
    let plain = "forward: [{ listen: \"127.0.0.1:7000\", endpoints: [\"10.98.2.2:80\"] }]\n";
    let bad = [
        (outbound("tproxy", 15_001, &[&one]), "for what it captures by another means"),
        (good.replace(&one.path, "/no-such-cgroup"), "no-such-cgroup"),
        (
            outbound("tproxy", 15_002, &[&one]).replace(&one.path, "/no-such-cgroup"),
            "no-such-cgroup",
        ),
        (
            format!("{good}inbound: {{ source: keep, listen: \"192.0.2.1:15006\" }}\n"),
            "no interface has",
        ),
        (format!("{plain}{}", good.replace("15001", "7000")), "listens where"),
    ];
    let mut opened = 0;
    for (config, why) in bad {
        assert!(!weir.reload(&config), "{config}");
        assert!(weir.log().contains(why), "{why}: {}", weir.log());
        says(&one, &net, DIAL);
        opened += 1;
        assert_eq!(weir.opened(), opened, "{config}");
    }
    weir.end(&net);
    assert!(!one.programs().contains("weir"));
}

/// LC7: under `on_exit: closed` a cgroup that was taken out of the config is not refused when weir is gone,
/// and one that came is.
#[test]
fn cgroup_that_went_is_not_refused_later() {
    let (net, bpffs) = (node(), Bpffs::new());
    let (one, two) = (Cgroup::new(), Cgroup::new());
    let config = |cgroup| format!("on_exit: closed\n{}", outbound("connect", 15_001, &[cgroup]));
    let weir =
        Weir::run_as(bpffs.command(&net, Place::Node, crate::harness::weir()), &config(&one));
    assert_eq!(bpffs.pins(&net).len(), 3, "the directory's mode and two pins");
    reload(&weir, &config(&two));
    assert_eq!(bpffs.pins(&net).len(), 3, "one cgroup's pins are gone");
    weir.kill();
    says(&one, &net, DIAL);
    let refused = "try:\n    socket.create_connection(('10.98.2.2', 80), 20)\n\
                   except ConnectionRefusedError: print('refused')";
    assert_eq!(says(&two, &net, refused), "refused");
    let mut clear = bpffs.command(&net, Place::Node, crate::harness::weir());
    assert!(clear.args(["rules", "clear"]).output().unwrap().status.success());
    says(&two, &net, DIAL);
}
