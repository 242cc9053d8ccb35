// SPDX-License-Identifier: Apache-2.0
//! Client against server, over loopback, without a forwarder between them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A server, ended by its own pid when dropped.
struct Server {
    addr: SocketAddr,
    child: Child,
}

impl Server {
    fn start(arguments: &[&str]) -> Server {
        // Found free a moment ago; nobody else on this host is likely to take it in between.
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = loadtest()
            .args(["serve", "--listen", &addr.to_string(), "--kind"])
            .args(arguments)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while TcpStream::connect(addr).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "the server listens");
        }
        Server { addr, child }
    }

    fn output(&self, arguments: &[&str]) -> Output {
        let duration: &[&str] =
            if arguments.contains(&"--duration") { &[] } else { &["--duration", "0.2"] };
        loadtest()
            .args(["run", "-o", "json", "--warmup", "0", "--to", &self.addr.to_string()])
            .args(duration)
            .args(arguments)
            .output()
            .unwrap()
    }

    fn run(&self, arguments: &[&str]) -> Value {
        let output = self.output(arguments);
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn loadtest() -> Command {
    Command::new(env!("CARGO_BIN_EXE_weir-loadtest"))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn number(outcome: &Value, path: &str) -> f64 {
    outcome.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path}: {outcome}"))
}

/// An address where nobody listens.
fn nobody() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[test]
fn every_kind_of_load_gets_through_without_errors() {
    for (server, loads) in [
        (
            &["echo"][..],
            &[
                &["--connections", "1"][..],
                &["--connections", "200", "--size", "5000"],
                &["--connections", "20", "--size", "64*8,5000*2,256k*1", "--churn", "10"],
                &["--connections", "8", "--think", "5"],
                &["--kind", "connections", "--connections", "8"],
                &["--kind", "connections", "--connections", "8", "--reset"],
                &["--kind", "connections", "--connections", "8", "--rate", "500"],
            ][..],
        ),
        (&["source"], &[&["--kind", "bulk", "--connections", "2"]]),
        (&["sink"], &[&["--kind", "upload", "--connections", "2"]]),
        (&["half-duplex"], &[&["--kind", "half-close", "--connections", "4", "--size", "100k"]]),
        (&["http", "--size", "700"], &[&["--kind", "http", "--connections", "16"]]),
        (&["slow", "--read-rate", "100000"], &[&["--connections", "4", "--size", "1000"]]),
    ] {
        let server_kind = server;
        let server = Server::start(server);
        for load in loads {
            let outcome = server.run(load);
            assert_eq!(outcome["errors"], 0, "{server_kind:?} {load:?}: {outcome}");
            let done = number(&outcome, "/per_second") + number(&outcome, "/bytes_per_second");
            assert!(done > 0.0, "{server_kind:?} {load:?}: {outcome}");
        }
    }
}

#[test]
fn the_baseline_engine_carries_the_same_loads() {
    for (kind, loads) in [("echo", &["pingpong", "connections"][..]), ("source", &["bulk"])] {
        let server = Server::start(&[kind, "--engine", "tokio-uring"]);
        for load in loads {
            let engine = ["--engine", "tokio-uring", "--connections", "4", "--kind", load];
            let outcome = server.run(&engine);
            assert_eq!(outcome["errors"], 0, "{load}: {outcome}");
            assert_eq!(outcome["engine"], "tokio-uring");
            assert!(number(&outcome, "/bytes_per_second") > 0.0, "{load}: {outcome}");
        }
    }
    let nonsense = ["run", "--to", "127.0.0.1:1", "--engine", "tokio-uring", "--rate", "5"];
    let output = loadtest().args(nonsense).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("--engine ring"), "{}", said(&output));
}

#[test]
fn words_are_checked_at_whoever_reads_them() {
    for (server, load) in [
        ("echo", &["--connections", "16", "--size", "3001", "--check", "--seed", "77"][..]),
        ("echo", &["--kind", "connections", "--check", "--size", "100"]),
        ("source", &["--kind", "bulk", "--connections", "2", "--check"]),
        ("sink", &["--kind", "upload", "--connections", "2", "--check"]),
        ("half-duplex", &["--kind", "half-close", "--size", "70000", "--check"]),
    ] {
        let checking = if server == "echo" { &[server][..] } else { &[server, "--check"] };
        let outcome = Server::start(checking).run(load);
        assert_eq!(outcome["errors"], 0, "{server}: {outcome}");
    }
}

/// Forwards two connections, and swaps two words of what comes back.
fn corrupting(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for downstream in listener.incoming().take(2) {
            let (mut downstream, mut upstream) =
                (downstream.unwrap(), TcpStream::connect(to).unwrap());
            std::thread::spawn(move || {
                let mut chunk = [0; 64];
                while downstream.read_exact(&mut chunk).is_ok() {
                    upstream.write_all(&chunk).unwrap();
                    upstream.read_exact(&mut chunk).unwrap();
                    let (first, second) = chunk.split_at_mut(8);
                    first.swap_with_slice(&mut second[..8]);
                    if downstream.write_all(&chunk).is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

#[test]
fn bytes_that_changed_places_are_corrupted() {
    let server = Server::start(&["echo"]);
    let between = corrupting(server.addr).to_string();
    let output = loadtest()
        .args(["run", "-o", "json", "--duration", "0.3", "--warmup", "0", "--connections", "1"])
        .args(["--check", "--to", &between])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "nothing good came: {}", said(&output));
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(number(&outcome, "/errors_by_kind/corrupted") >= 1.0, "{outcome}");
}

#[test]
fn nobody_at_the_address_is_an_error_of_its_kind() {
    let addr = nobody();
    let output = loadtest()
        .args(["run", "-o", "json", "--duration", "0.1", "--warmup", "0", "--connections", "1"])
        .args(["--to", &addr])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("refused"), "{}", said(&output));
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(number(&outcome, "/errors_by_kind/refused") >= 1.0, "{outcome}");
}

#[test]
fn a_silent_server_times_out() {
    // A sink reads and never answers.
    let server = Server::start(&["sink"]);
    let output = server.output(&["--connections", "2", "--timeout", "0.1", "--duration", "0.5"]);
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(number(&outcome, "/errors_by_kind/timed_out") >= 2.0, "{outcome}");
    assert_eq!(output.status.code(), Some(1));
}

/// Answers at once, but for one stall.
fn stalling(stall: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut chunk = [0; 64];
        let mut number = 0;
        while stream.read_exact(&mut chunk).is_ok() && stream.write_all(&chunk).is_ok() {
            number += 1;
            if number == 60 {
                std::thread::sleep(stall);
            }
        }
    });
    addr
}

/// A stall of a third of the time: in a closed loop one latency of hundreds is bad, in an open
/// loop a third of them.
#[test]
fn an_open_loop_does_not_omit_what_a_stall_held_up() {
    let run = |arguments: &[&str]| -> Value {
        let to = stalling(Duration::from_millis(300)).to_string();
        let output = loadtest()
            .args(["run", "-o", "json", "--duration", "0.9", "--warmup", "0", "--connections", "1"])
            .args(["--to", &to])
            .args(arguments)
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let open = run(&["--rate", "200"]);
    assert!(number(&open, "/latency_us/p90") > 100_000.0, "{open}");
    assert!(number(&open, "/latency_us/max") >= 290_000.0, "{open}");
    let closed = run(&[]);
    assert!(number(&closed, "/latency_us/p90") < 100_000.0, "{closed}");
}

#[test]
fn an_open_loop_keeps_its_rate() {
    let server = Server::start(&["echo"]);
    let outcome = server.run(&["--rate", "1000", "--connections", "8", "--duration", "1"]);
    let reached = number(&outcome, "/per_second");
    assert!((900.0..1100.0).contains(&reached), "{outcome}");
}

#[test]
fn a_missed_threshold_is_exit_99() {
    let server = Server::start(&["echo"]);
    let fine = ["--threshold", "p99<10s", "--threshold", "errors=0"];
    assert!(server.output(&fine).status.success());
    let output = server.output(&["--threshold", "rate>1000000000"]);
    assert_eq!(output.status.code(), Some(99));
    assert!(said(&output).contains("threshold rate>1000000000 is missed"), "{}", said(&output));
    let output = server.output(&["--threshold", "p98<1ms"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_busy_port_is_said_with_its_cure() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let output = loadtest().args(["serve", "--listen", &addr]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("ss -ltnp"), "{}", said(&output));
}

#[test]
fn an_interrupted_run_keeps_what_it_measured() {
    let server = Server::start(&["echo"]);
    let child = loadtest()
        .args(["run", "-o", "json", "--duration", "60", "--warmup", "0"])
        .args(["--to", &server.addr.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // So that something was measured; a shorter time would do.
    std::thread::sleep(Duration::from_millis(500));
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(outcome["interrupted"], true);
    assert!(number(&outcome, "/per_second") > 0.0, "{outcome}");
}
