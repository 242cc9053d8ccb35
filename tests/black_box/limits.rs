// SPDX-License-Identifier: Apache-2.0
//! Upstreams that do not answer, queues that overflow, work that spreads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use socket2::SockRef;

use crate::harness::{Net, Place, Weir, check, echo, receive, said, send, until};

const LISTEN: &str = "10.98.1.1:7000";
const SERVER: &str = "10.98.2.2:7001";

/// RS6: refused, unreachable and black-holed upstreams reset the downstream and are counted.
#[test]
fn dead_upstream_resets_the_downstream_and_is_counted() {
    let net = Net::new();
    // Nobody has this address: the node's neighbour table gives up (EHOSTUNREACH).
    let unreachable = "10.98.2.77:7001";
    let black_hole = "10.98.2.2:7002";
    let drop_it =
        "table inet cut { chain c { type filter hook input priority 0; tcp dport 7002 drop; }; }";
    net.run(Place::Server, &["nft", drop_it]);
    let profile = "summary: a test\ninclude: balanced\ntimeouts: { connect_ms: 6000 }\n";
    for (upstream, reasons) in [
        (SERVER, vec!["connect_refused"]),
        (unreachable, vec!["connect_unreachable"]),
        (black_hole, vec!["connect_timeout"]),
    ] {
        let weir = Weir::forward_with(&net, profile, &["--listen", LISTEN, "--to", upstream]);
        net.is_reset(Place::Client, LISTEN);
        let reason = format!("reason=\"{}\"", reasons[0]);
        assert_eq!(weir.closed(reasons[0]), 1, "{upstream}");
        assert_eq!(weir.metric("weir_connect_failed_total", &[&reason]), 1, "{upstream}");
        weir.end(&net);
    }
}

/// TP3: without a free port to dial from clients are reset at once; dials are tried again now and
/// then, and not for everyone who comes. Each destination has its own ports.
#[test]
fn exhausted_ports_are_answered_fast_and_without_a_storm() {
    let net = Net::new();
    let (first, second) = ("10.98.2.2:7001", "10.98.2.2:7002");
    echo(net.listen(Place::Server, first));
    echo(net.listen(Place::Server, second));
    net.set(Place::Node, "net.ipv4.ip_local_port_range=40000 40063");
    let other = "10.98.1.1:7009";
    let config = format!(
        "workers: 1\nforward:\n- {{ listen: \"{LISTEN}\", endpoints: [\"{first}\"] }}\n\
         - {{ listen: \"{other}\", endpoints: [\"{second}\"] }}"
    );
    let weir = Weir::run(&net, &config);
    let mut open = Vec::new();
    for (door, flows) in [(LISTEN, 64), (other, 128)] {
        while open.len() < flows {
            open.push(net.connect(Place::Client, door));
        }
        until("all are open", || weir.active() == flows as u64);
    }
    let began = Instant::now();
    for _ in 0..300 {
        net.is_reset(Place::Client, LISTEN);
    }
    let tried = u128::from(weir.closed("local_limit"));
    assert_eq!(tried + u128::from(weir.denied("source_ports")), 300);
    let pauses = began.elapsed().as_millis() / 100;
    assert!((1..=pauses + 2).contains(&tried), "{tried} dials in {pauses} pauses");
    // With a reset no port lingers in TIME_WAIT.
    for client in open {
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    }
    until("the flows end", || weir.active() == 0);
    until("clients are served again", || {
        net.try_connect(Place::Client, LISTEN).is_ok_and(|mut stream| {
            send(&mut stream, 1, 1000).and_then(|()| receive(&mut stream, 1, 1000)).is_ok()
        })
    });
    weir.end(&net);
}

/// RS5: an accept queue that overflowed loses nobody who is patient.
#[test]
fn overflowing_accept_queue_serves_everybody_in_the_end() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let profile = "summary: a test\ninclude: balanced\nlimits: { backlog: 4, flows_max: 4 }\n";
    let weir = Weir::forward_with(&net, profile, &["--listen", LISTEN, "--to", SERVER]);
    echo(listener);
    let net = &net;
    std::thread::scope(|scope| {
        for seed in 0..40 {
            scope.spawn(move || {
                let mut stream = net.connect(Place::Client, LISTEN);
                send(&mut stream, seed, 1000).unwrap();
                check(&mut stream, seed, 1000);
            });
        }
    });
    assert_eq!(weir.opened(), 40);
    weir.end(net);
}

/// RS7: connections spread over the workers.
#[test]
fn connections_spread_over_the_workers() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let weir = Weir::forward(&net, &["--workers", "2", "--listen", LISTEN, "--to", SERVER]);
    let flows: Vec<_> = (0..2000).map(|_| net.connect(Place::Client, LISTEN)).collect();
    until("all are flows", || weir.active() == 2000);
    let mut workers: BTreeMap<u64, u32> = BTreeMap::new();
    for flow in weir.flows() {
        *workers.entry(flow["id"].as_u64().unwrap() >> 56).or_default() += 1;
    }
    assert_eq!(workers.values().sum::<u32>(), 2000);
    assert!(workers.len() == 2 && workers.values().all(|flows| *flows < 1300), "{workers:?}");
    drop((flows, listener));
    weir.end(&net);
}

/// A worker that its host does not run (here: a debugger holds its thread) keeps its own flows waiting, and
/// nobody else.
struct Held(Pid);

impl Held {
    fn worker(weir: &Weir, index: usize) -> Held {
        let tasks = format!("/proc/{}/task", weir.pid());
        let name = format!("weir-w{index}\n");
        let mut tasks = std::fs::read_dir(tasks).unwrap().map(|task| task.unwrap().path());
        let task = tasks.find(|task| std::fs::read_to_string(task.join("comm")).unwrap() == name);
        let number = task.unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
        let thread = Pid::from_raw(number);
        ptrace::seize(thread, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(thread).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        Held(thread)
    }

    fn let_go(self) {
        ptrace::detach(self.0, None).unwrap();
    }
}

/// RS7: a stalled worker's queue is rescued, in either way to accept; it takes part again afterwards.
#[test]
fn connections_of_a_worker_that_does_not_run_are_served_by_another() {
    for (balance, held) in [("round_robin", 1), ("consistent_hash", 1), ("round_robin", 2)] {
        let net = Net::new();
        echo(net.listen(Place::Server, SERVER));
        let config = format!(
            "workers: {}\nforward: [{{ name: a, listen: \"{LISTEN}\", balance: {balance}, endpoints: [\"{SERVER}\"] }}]\n",
            held + 1
        );
        let weir = Weir::run(&net, &config);
        let serve = |count: u64| {
            let mut flows: Vec<_> =
                (0..count).map(|_| net.connect(Place::Client, LISTEN)).collect();
            for (seed, flow) in (0..).zip(&mut flows) {
                send(flow, seed, 1000).unwrap();
            }
            (0..).zip(&mut flows).for_each(|(seed, flow)| check(flow, seed, 1000));
            flows
        };
        drop(serve(8));
        until("all have ended", || weir.active() == 0);
        let sockets = weir.descriptors("socket:");
        let held: Vec<Held> = (1..=held).map(|index| Held::worker(&weir, index)).collect();
        let flows = serve(64);
        assert!(weir.metric("weir_worker_stalls_total", &[]) >= held.len() as u64);
        assert!(weir.log().contains("worker 0 takes them"), "{}", weir.log());
        drop(flows);
        let workers = held.len() + 1;
        held.into_iter().for_each(Held::let_go);
        until("the others' sockets are given back", || weir.descriptors("socket:") <= sockets);
        until("all serve again", || {
            let _flows = serve(16);
            let flows = weir.flows();
            let by = flows.iter().map(|flow| flow["id"].as_u64().unwrap() >> 56);
            by.collect::<BTreeSet<u64>>().len() == workers
        });
        weir.end(&net);
    }
}

/// Limits that cannot be kept are refused with the number that is needed.
#[test]
fn too_few_descriptors_are_refused_with_the_number_needed() {
    let net = Net::new();
    let words = ["sh", "-c", "ulimit -n 500 && exec \"$@\"", "sh", crate::harness::weir()];
    let forward = ["forward", "--workers", "1", "--listen", LISTEN, "--to", SERVER];
    let output = net.output(Place::Node, &[&words[..], &forward[..]].concat());
    assert_eq!(output.status.code(), Some(4));
    assert!(
        said(&output).contains("RLIMIT_NOFILE of at least 18000, and it is 500"),
        "{}",
        said(&output)
    );
}
