// SPDX-License-Identifier: Apache-2.0
//! SIGHUP: a new config without a dropped flow, a bad one without a change.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Net, Place, Weir, check, echo, expect_reset, send, until};

const LISTEN: &str = "10.98.1.1:7000";
const FIRST: &str = "10.98.2.2:7001";
const SECOND: &str = "10.98.2.2:7002";

/// Answers every connection with its own name, and goes on as an echo.
fn named(listener: TcpListener, name: u8) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let _ = stream.write_all(&[name]);
                let Ok(mut from) = stream.try_clone() else { return };
                let _ = std::io::copy(&mut from, &mut stream);
                let _ = stream.shutdown(std::net::Shutdown::Write);
            });
        }
    });
}

fn who(net: &Net, door: &str) -> u8 {
    let mut name = [0];
    net.connect(Place::Client, door).read_exact(&mut name).unwrap();
    name[0]
}

fn forward(endpoint: &str) -> String {
    format!("forward:\n- {{ listen: \"{LISTEN}\", endpoints: [\"{endpoint}\"] }}\n")
}

/// Fifty reloads under load, of endpoints, listeners, filters and the source address: no connection
/// fails, and flows that were open stay open.
#[test]
fn fifty_reloads_under_load_fail_nobody() {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    for addr in [FIRST, SECOND] {
        echo(net.listen(Place::Server, addr));
    }
    echo(net.listen(Place::Node, "10.98.1.1:80"));
    let config = |round: u64| {
        let odd = round % 2 == 1;
        let more =
            format!("- {{ name: more, listen: \"10.98.1.1:7009\", endpoints: [\"{FIRST}\"] }}\n");
        format!(
            "workers: 2\ninbound: {{ source: {}, ports: {{ exclude: [{}] }} }}\n{}{}",
            if odd { "own" } else { "keep" },
            8000 + round,
            forward(if odd { SECOND } else { FIRST }),
            if odd { more.as_str() } else { "" },
        )
    };
    let weir = Weir::run(&net, &config(0));
    let doors = [LISTEN, "10.98.1.1:80"];
    let mut long: Vec<TcpStream> = doors.map(|door| net.connect(Place::Client, door)).into();
    for (seed, stream) in (0..).zip(&mut long) {
        send(stream, seed, 1000).unwrap();
        check(stream, seed, 1000);
    }
    let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    scope(|scope| {
        for seed in 0..4u64 {
            let (net, over, served) = (&net, &over, &served);
            scope.spawn(move || {
                let door = doors[usize::from(seed % 2 == 1)];
                while !over.load(Ordering::Relaxed) {
                    let mut stream = net.connect(Place::Client, door);
                    send(&mut stream, seed, 2000).unwrap();
                    check(&mut stream, seed, 2000);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 1..=50 {
            assert!(weir.reload(&config(round)), "{}", weir.log());
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(served.load(Ordering::Relaxed) > 100, "{served:?} connections");
    for (seed, stream) in (0..).zip(&mut long) {
        send(stream, seed + 10, 100_000).unwrap();
        check(stream, seed + 10, 100_000);
    }
    for reason in ["connect_refused", "connect_timeout", "downstream_reset", "upstream_reset"] {
        assert_eq!(weir.closed(reason), 0, "{reason}");
    }
    assert_eq!(weir.metric("weir_denied_total", &[]), 0);
    drop(long);
    weir.end(&net);
}

/// Endpoints change for newcomers; flows that are open keep theirs.
#[test]
fn endpoints_change_for_newcomers_only() {
    let net = Net::new();
    named(net.listen(Place::Server, FIRST), 1);
    named(net.listen(Place::Server, SECOND), 2);
    let weir = Weir::run(&net, &format!("workers: 1\n{}", forward(FIRST)));
    let mut old = net.connect(Place::Client, LISTEN);
    old.read_exact(&mut [0]).unwrap();
    assert!(weir.reload(&format!("workers: 1\n{}", forward(SECOND))), "{}", weir.log());
    assert_eq!(who(&net, LISTEN), 2);
    send(&mut old, 1, 100_000).unwrap();
    check(&mut old, 1, 100_000);
    let shown = weir.ask("/config").unwrap();
    assert!(shown.contains(SECOND) && !shown.contains(FIRST), "{shown}");
    drop(old);
    weir.end(&net);
}

/// Listeners come and go; a flow outlives its listener.
#[test]
fn listeners_come_and_go() {
    let net = Net::new();
    named(net.listen(Place::Server, FIRST), 1);
    let weir = Weir::run(&net, &format!("workers: 2\n{}", forward(FIRST)));
    let mut old = net.connect(Place::Client, LISTEN);
    old.read_exact(&mut [0]).unwrap();
    let other = "10.98.1.1:7009";
    let moved = forward(FIRST).replace(LISTEN, other);
    assert!(weir.reload(&format!("workers: 2\n{moved}")), "{}", weir.log());
    assert_eq!(who(&net, other), 1);
    until("the old door is shut", || net.try_connect(Place::Client, LISTEN).is_err());
    send(&mut old, 1, 100_000).unwrap();
    check(&mut old, 1, 100_000);
    assert!(weir.reload(&format!("workers: 2\n{}", forward(FIRST))), "{}", weir.log());
    until("the old door is open again", || net.try_connect(Place::Client, LISTEN).is_ok());
    assert_eq!(who(&net, LISTEN), 1);
    drop(old);
    weir.end(&net);
}

/// A file with a mistake, and one that asks for what cannot be had, change nothing and say why.
#[test]
fn bad_file_keeps_the_old_config_and_says_why() {
    let net = Net::new();
    named(net.listen(Place::Server, FIRST), 1);
    let weir = Weir::run(&net, &format!("workers: 1\n{}", forward(FIRST)));
    let bad = [
        ("forward: [{ listen: here }]".to_owned(), "must be an address with port"),
        (format!("workers: 1\n{}", forward("10.98.1.1:7000")), "it would loop"),
        (
            format!("workers: 1\n{}", forward(FIRST).replace(LISTEN, "192.0.2.1:7000")),
            "no interface has this address",
        ),
    ];
    for (config, why) in bad {
        assert!(!weir.reload(&config), "{config}");
        assert!(weir.log().contains(why), "{why}: {}", weir.log());
        assert_eq!(who(&net, LISTEN), 1);
    }
    weir.end(&net);
}

/// LC6, TP4: a reload that fails half-way, because whoever held the rules is gone, leaves nothing open
/// that shall be closed, and what is missing comes back.
#[test]
fn reload_that_fails_half_way_leaves_the_node_closed() {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let config = |port| {
        format!("on_exit: closed\nworkers: 1\ninbound: {{ ports: {{ exclude: [{port}] }} }}")
    };
    let weir = Weir::run(&net, &config(8001));
    let children = format!("/proc/{0}/task/{0}/children", weir.pid());
    let children = std::fs::read_to_string(children).unwrap();
    let is_holder = |pid: &&str| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line == b"nft\0-i\0"
    };
    let holder = children.split_whitespace().find(is_holder).unwrap();
    kill(Pid::from_raw(holder.parse().unwrap()), Signal::SIGKILL).unwrap();
    // Who looks at the rules may have put them back before: then it goes through.
    weir.reload(&config(8002));
    for table in ["weir", "weir_guard"] {
        let words = ["nft", "list", "table", "inet", table];
        until("both tables are back", || net.output(Place::Node, &words).status.success());
    }
    assert!(weir.reload(&config(8003)), "{}", weir.log());
    weir.kill();
    let guard = net.run(Place::Node, &["nft", "list", "table", "inet", "weir_guard"]);
    assert!(guard.contains("8003"), "{guard}");
    net.run(Place::Node, &[crate::harness::weir(), "rules", "clear"]);
    until("the node is clean", || net.is_clean());
}

/// LC6: whoever holds the rules refuses a change and ends: the reload says what it said last.
#[test]
fn reload_that_nft_refuses_says_why() {
    let net = Net::new();
    let directory = tempfile::TempDir::new().unwrap();
    let nft = directory.path().join("nft");
    // The first thing that it is told it does, the second one it refuses.
    let script = "#!/bin/sh\n[ \"$1\" = -i ] || exec /usr/sbin/nft \"$@\"\n\
                  { head -n 1; read second; echo 'refused by the test' >&2; } | /usr/sbin/nft -i\n";
    std::fs::write(&nft, script).unwrap();
    std::fs::set_permissions(&nft, PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap());
    let config =
        |port| format!("workers: 1\ninbound: {{ source: own, ports: {{ exclude: [{port}] }} }}");
    let mut command = net.command(Place::Node, crate::harness::weir());
    command.env("PATH", path);
    let weir = Weir::run_as(command, &config(8001));
    assert!(!weir.reload(&config(8002)));
    assert!(weir.log().contains("change the nft table: refused by the test"), "{}", weir.log());
    // What it held is put back.
    until("it is ready", || weir.ask("/readyz").unwrap().starts_with("HTTP/1.0 200"));
    weir.end(&net);
}

/// What cannot change is named and kept; the rest of the file is taken.
#[test]
fn what_cannot_change_is_named_and_kept() {
    let net = Net::new();
    named(net.listen(Place::Server, FIRST), 1);
    named(net.listen(Place::Server, SECOND), 2);
    let weir = Weir::run(&net, &format!("workers: 1\n{}", forward(FIRST)));
    let new = format!("workers: 2\nprofile: latency\ninbound: {{}}\n{}", forward(SECOND));
    assert!(weir.reload(&new), "{}", weir.log());
    for what in ["workers", "profile (but for its timeouts)", "who is captured"] {
        assert!(weir.log().contains(&format!("reload: {what}")), "{what}: {}", weir.log());
    }
    assert_eq!(who(&net, LISTEN), 2);
    assert!(net.is_clean() || weir.active() > 0);
    weir.end(&net);
}

/// Timeouts change for flows that are open, too.
#[test]
fn shorter_timeout_ends_open_flows() {
    let net = Net::new();
    named(net.listen(Place::Server, FIRST), 1);
    let place = tempfile::TempDir::new().unwrap();
    let profile = place.path().join("impatient.yaml");
    let text = "summary: a test\ninclude: balanced\ntimeouts: { idle_ms: 300 }\n";
    std::fs::write(&profile, text).unwrap();
    let weir = Weir::run(&net, &format!("workers: 1\n{}", forward(FIRST)));
    let mut idle = net.connect(Place::Client, LISTEN);
    idle.read_exact(&mut [0]).unwrap();
    let new = format!("workers: 1\nprofile: \"{}\"\n{}", profile.display(), forward(FIRST));
    assert!(weir.reload(&new), "{}", weir.log());
    expect_reset(&mut idle);
    assert_eq!(weir.closed("idle_timeout"), 1);
    drop(idle);
    weir.end(&net);
}

/// A listener that overlaps one of ours is refused at once, in our own name.
#[test]
fn listener_that_overlaps_an_old_one_takes_two_reloads() {
    let net = Net::new();
    let listener = net.listen(Place::Server, FIRST);
    named(listener, b'1');
    let wide = format!("workers: 1\n{}", forward(FIRST).replace("10.98.1.1:7000", "0.0.0.0:7000"));
    let narrow = format!("workers: 1\n{}", forward(FIRST));
    let weir = Weir::run(&net, &narrow);
    assert!(!weir.reload(&wide));
    let said =
        format!("listen 0.0.0.0:7000: this weir listens on {LISTEN} until the reload is done");
    assert!(weir.log().contains(&said), "{}", weir.log());
    assert_eq!(who(&net, LISTEN), b'1');
    let between = narrow.replace("10.98.1.1:7000", "10.98.1.1:7009");
    assert!(weir.reload(&between), "{}", weir.log());
    assert!(weir.reload(&wide), "{}", weir.log());
    assert_eq!(who(&net, LISTEN), b'1');
    weir.end(&net);
}
