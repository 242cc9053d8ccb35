// SPDX-License-Identifier: Apache-2.0
//! Killed after each single object that a start makes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use tempfile::TempDir;

use crate::harness::{
    Bpffs, Cgroup, Net, PATIENCE, Place, Random, Weir, check, config_file, echo, rounds, run, send,
    until, until_nothing, weir,
};

/// LC4, LC6, `on_exit: closed`: wherever a start is killed, connects are served or refused, never led to
/// where nobody waits: they are refused from the object on that refuses them, and `rules clear` opens.
#[test]
fn closed_start_that_dies_after_any_object_serves_or_refuses() {
    let (net, cgroup, bpffs) = (Net::new(), Cgroup::new(), Bpffs::new());
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    echo(net.listen(Place::Node, "[::]:80"));
    echo(net.listen(Place::Server, "10.98.2.2:80"));
    let config = format!(
        "workers: 1\non_exit: closed\ninbound: {{}}\noutbound: {{ workload: {{ cgroup: {} }} }}",
        cgroup.path
    );
    let place = TempDir::new().unwrap();
    let file = config_file(&place, &config);
    let outbound = || {
        let talk = "exec 3<>/dev/tcp/10.98.2.2/80; echo hello >&3; head -n 1 <&3";
        cgroup.output(&net, &["timeout", "20", "bash", "-c", talk]).stdout == b"hello\n"
    };
    let inbound = || {
        let mut client = net.try_connect(Place::Client, "10.98.1.1:80")?;
        client.write_all(b"x").and_then(|()| client.read_exact(&mut [0]))
    };
    // What is refused after each: inbound, outbound.
    for (step, closes) in [
        ("table", [false, false]),
        ("weir_sockops", [false, false]),
        ("weir_connect4", [false, false]),
        ("weir_connect6", [false, false]),
        ("guard", [true, false]),
        ("pin weir_connect4", [true, true]),
        ("pin weir_connect6", [true, true]),
        ("pins", [true, true]),
    ] {
        let mut command = bpffs.command(&net, Place::Node, weir());
        command.args(["run", "-c"]).arg(&file).env("WEIR_DIE_AFTER", step);
        let output = command.output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "{step}: {}", crate::harness::said(&output));
        let tables = || net.run(Place::Node, &["nft", "list", "tables"]);
        until("the table is gone", || !tables().lines().any(|line| line == "table inet weir"));
        until("as it shall be", || [inbound().is_err(), !outbound()] == closes);
        let clear = || {
            let mut command = bpffs.command(&net, Place::Node, weir());
            command.args(["rules", "clear"]).output().unwrap()
        };
        assert!(clear().status.success(), "{step}");
        assert_eq!(String::from_utf8_lossy(&clear().stdout), "nothing of weir is left here\n");
        until("everything is open", || inbound().is_ok() && outbound());
        assert_eq!(bpffs.pins(&net), Vec::<String>::new(), "{step}");
        until("the node is clean", || net.is_clean());
    }
}

/// LC4, CH1: killed at any moment under load, in a start or after it: traffic flows directly within
/// 100 ms in the middle, and nothing is left that `rules clear` does not find, no socket either. What was
/// open hears of it as soon as the kernel has taken the rings apart, which takes longer than to let new
/// connections pass. What it says tells the time that the process takes to die from the pauses of those who
/// dial, and from a lost SYN, which would come again after a second.
#[test]
fn random_kills_under_load_leave_nothing() {
    let (net, cgroup, config) = node(2);
    let place = TempDir::new().unwrap();
    let file = config_file(&place, &config);
    let load = |mut command: Command| {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (served, times) = mpsc::channel();
        std::thread::spawn(move || {
            lines.map_while(Result::ok).try_for_each(|line| served.send(Dial::read(&line)))
        });
        (Killed(child), times)
    };
    let mut client = net.command(Place::Client, "python3");
    client.args(["-c", DIALS, "10.98.1.1"]);
    let loads = [
        load(client),
        load(cgroup.command(&net, Place::Node, &["python3", "-c", DIALS, "10.98.2.2"])),
    ];
    let mut random = Random::new(u64::from(std::process::id()));
    let mut times_of = Kills::default();
    for round in 0..rounds(20, 200) {
        let mut command = net.command(Place::Node, weir());
        let mut child =
            command.args(["run", "-c"]).arg(&file).stderr(Stdio::null()).spawn().unwrap();
        // A start takes some 200 ms: half of the kills meet one.
        std::thread::sleep(Duration::from_millis(random.below(400)));
        child.kill().unwrap();
        let killed = ::weir::sys::process::monotonic_ns();
        child.wait().unwrap();
        times_of.deaths.push(::weir::sys::process::monotonic_ns() - killed);
        for (_, times) in &loads {
            times_of.note(killed, std::iter::from_fn(|| times.recv_timeout(PATIENCE).ok()));
        }
        net.run(Place::Node, &[weir(), "rules", "clear"]);
        let left = |line: &str| line.contains("lookup 133") || line == "table inet weir";
        assert!(!net.left_in(Place::Node).lines().any(left), "round {round}");
        until("the programs are gone", || !cgroup.programs().contains("weir"));
    }
    times_of.say();
    drop(loads);
    for place in [Place::Client, Place::Node, Place::Server] {
        until_nothing(|| net.sockets_in(place));
    }
    let mut next = Weir::run(&net, &config);
    next.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(next.wait().code(), Some(0), "the next start is clean: {}", next.log());
}

/// What kills cost, in nanoseconds.
#[derive(Default)]
struct Kills {
    /// Until the process is gone.
    deaths: Vec<u64>,
    /// Until a connection that was open hears of it.
    heard: Vec<u64>,
    /// The longest time in which nobody dialled, although nothing was in the way.
    pauses: Vec<u64>,
    /// By all dials, until the first one that was served.
    sent_again: u64,
    /// Until a new connection is direct.
    waits: Vec<u64>,
}

impl Kills {
    /// What those who dialled met, up to the first new connection that is served.
    fn note(&mut self, killed: u64, dials: impl Iterator<Item = Dial>) {
        let (mut from, mut free, mut pause) = (killed, killed, 0);
        for dial in dials.filter(|dial| dial.ended > killed) {
            self.sent_again += dial.sent_again;
            pause = pause.max(dial.began.saturating_sub(free));
            free = dial.ended;
            if dial.began <= killed {
                // It hears of it; one that began later is served.
                self.heard.push(dial.ended - killed);
                from = dial.ended;
            } else if dial.served {
                self.pauses.push(pause);
                self.waits.push(dial.ended - from);
                return;
            }
        }
        panic!("traffic does not flow");
    }

    /// Tells dying, what comes after it, and the pauses of those who dial from each other.
    fn say(mut self) {
        let mut middle = 0;
        for (what, all) in [
            ("a connection that was open hears of it", &mut self.heard),
            ("the process is gone", &mut self.deaths),
            ("somebody dials who was kept by nothing but the host", &mut self.pauses),
            ("a new connection is direct", &mut self.waits),
        ] {
            all.sort_unstable();
            let at = |index: usize| all.get(index).copied().unwrap_or_default() / 1_000_000;
            middle = at(all.len() / 2);
            eprintln!("ms until {what}: median {middle}, most {}", at(all.len().saturating_sub(1)));
        }
        eprintln!("segments that had to be sent again: {}", self.sent_again);
        assert!(middle < 100, "{:?}", self.waits);
    }
}

/// Dials without a pause; says of each dial when it began, when it ended, whether it was served, and how
/// many segments had to be sent again (`tcpi_total_retrans` in linux/tcp.h).
const DIALS: &str = "
import socket, struct, sys, time
to = sys.argv[1]
while True:
    began, served = time.monotonic_ns(), 0
    s = socket.socket(); s.settimeout(5)
    try:
        s.connect((to, 80))
        s.sendall(b'x'); served = int(s.recv(1) == b'x')
    except OSError:
        pass
    ended = time.monotonic_ns()
    again, = struct.unpack_from('I', s.getsockopt(6, 11, 104), 100); s.close()
    print(began, ended, served, again, flush=True)
    time.sleep(0.002)";

/// When a dial began and ended, whether it was served, and how many segments were sent again.
struct Dial {
    began: u64,
    ended: u64,
    sent_again: u64,
    served: bool,
}

impl Dial {
    fn read(line: &str) -> Dial {
        let numbers: Vec<u64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
        let [began, ended, served, sent_again] = numbers[..] else { panic!("{line}") };
        Dial { began, ended, sent_again, served: served == 1 }
    }
}

/// Ended on drop.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node that captures both ways, with an echo in it and one behind it.
fn node(workers: u16) -> (Net, Cgroup, String) {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let cgroup = Cgroup::new();
    echo(net.listen(Place::Node, "[::]:80"));
    echo(net.listen(Place::Server, "10.98.2.2:80"));
    let config = format!(
        "workers: {workers}\ninbound: {{}}\noutbound: {{ workload: {{ cgroup: {} }} }}",
        cgroup.path
    );
    (net, cgroup, config)
}

/// LC4, LC9: wherever a start is killed, traffic flows directly, `rules clear` finds what is left and
/// nothing the second time, and the next start is clean.
#[test]
fn start_that_dies_after_any_object_leaves_traffic_alone() {
    let (net, cgroup, config) = node(1);
    let place = TempDir::new().unwrap();
    let file = config_file(&place, &config);
    let routes = ["-4", "-6"].map(|family| {
        let route = format!("{family} route replace local default dev lo table 133 proto 133");
        [route, format!("{family} rule add fwmark 0x53a/0xfff lookup 133")]
    });
    let programs = ["weir_peer4", "weir_peer6", "weir_sockops", "weir_connect4", "weir_connect6"];
    let mut steps: Vec<&str> = routes.iter().flatten().map(String::as_str).collect();
    steps.push("table");
    steps.extend(programs);
    steps.extend(["guard", "pins"]);
    for step in steps {
        let mut command = net.command(Place::Node, weir());
        command.args(["run", "-c"]).arg(&file).env("WEIR_DIE_AFTER", step);
        let output = command.output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "{step}: {}", crate::harness::said(&output));
        let tables = || net.run(Place::Node, &["nft", "list", "tables"]);
        until("the table is gone", || !tables().contains("inet weir"));
        until("the programs are gone", || !cgroup.programs().contains("weir"));
        let talk = "exec 3<>/dev/tcp/10.98.2.2/80; echo hello >&3; head -n 1 <&3";
        let output = cgroup.output(&net, &["bash", "-c", talk]);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\n", "{step}");
        for door in ["10.98.1.1:80", "[fd98:1::1]:80"] {
            let mut client = net.connect(Place::Client, door);
            send(&mut client, 1, 1000).unwrap();
            check(&mut client, 1, 1000);
        }
        for _ in 0..2 {
            net.run(Place::Node, &[weir(), "rules", "clear"]);
        }
        until("the node is clean", || net.is_clean());
    }
    let weir = Weir::run(&net, &config);
    weir.end(&net);
    assert!(!run(&["bpftool", "prog", "show"]).contains(&cgroup.path));
}
