// SPDX-License-Identifier: Apache-2.0
//! From start to end, the friendly one and the other one.

use std::net::Shutdown;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::{
    Cgroup, Net, Place, Random, Weir, check, echo, expect_reset, rounds, send, until, weir,
};

const LISTEN: &str = "10.98.1.1:7000";
const SERVER: &str = "10.98.2.2:7001";
const FORWARD: [&str; 4] = ["--listen", LISTEN, "--to", SERVER];

/// LC5: SIGTERM refuses newcomers, lets flows end, and exits with 0.
#[test]
fn drain_lets_open_flows_end() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let mut weir = Weir::forward(&net, &FORWARD);
    echo(listener);
    let mut stream = net.connect(Place::Client, LISTEN);
    send(&mut stream, 1, 1000).unwrap();
    check(&mut stream, 1, 1000);
    weir.signal(Signal::SIGTERM);
    until("newcomers are refused", || net.try_connect(Place::Client, LISTEN).is_err());
    send(&mut stream, 2, 1_000_000).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    check(&mut stream, 2, 1_000_000);
    drop(stream);
    assert_eq!(weir.wait().code(), Some(0), "{}", weir.log());
}

/// LC5: what is still open when the time is over, or when SIGTERM comes again, is reset.
#[test]
fn drain_resets_what_does_not_end() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    echo(listener);
    let profile = "summary: a test\ninclude: balanced\ntimeouts: { drain_ms: 400 }\n";
    let mut weir = Weir::forward_with(&net, profile, &FORWARD);
    let mut stream = net.connect(Place::Client, LISTEN);
    weir.signal(Signal::SIGTERM);
    expect_reset(&mut stream);
    assert_eq!(weir.wait().code(), Some(0), "{}", weir.log());
    let mut weir = Weir::forward(&net, &FORWARD);
    let mut stream = net.connect(Place::Client, LISTEN);
    weir.signal(Signal::SIGTERM);
    until("newcomers are refused", || net.try_connect(Place::Client, LISTEN).is_err());
    weir.signal(Signal::SIGTERM);
    expect_reset(&mut stream);
    assert_eq!(weir.wait().code(), Some(0), "{}", weir.log());
}

/// LC8: a second weir refuses to start, and the first one does not notice.
#[test]
fn second_weir_refuses_and_changes_nothing() {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let first = Weir::run(&net, "inbound: {}");
    let rules = net.run(Place::Node, &["nft", "list", "table", "inet", "weir"]);
    let place = tempfile::TempDir::new().unwrap();
    for (config, word) in [
        (first.socket().with_file_name("weir.yaml"), "admin"),
        (
            crate::harness::config_file(&place, "inbound: { listen: \"[::]:16006\" }"),
            "a running weir holds the rules",
        ),
    ] {
        let words = [weir(), "run", "-c", config.to_str().unwrap()];
        let output = net.output(Place::Node, &words);
        let said = crate::harness::said(&output);
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains(word), "{said}");
    }
    assert!(first.ask("/readyz").unwrap().starts_with("HTTP/1.0 200"));
    let chains = |text: &str| text.lines().filter(|line| line.contains("chain")).count();
    let now = net.run(Place::Node, &["nft", "list", "table", "inet", "weir"]);
    assert_eq!(chains(&now), chains(&rules));
    first.end(&net);
}

/// LC4: killed at any time, nothing of weir is left that changes traffic, and the next one starts.
#[test]
fn killed_at_any_time_nothing_is_left() {
    let net = Net::new();
    let cgroup = Cgroup::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let config = format!(
        "workers: 1\ninbound: {{}}\noutbound: {{ workload: {{ cgroup: {} }} }}",
        cgroup.path
    );
    let place = tempfile::TempDir::new().unwrap();
    let file = crate::harness::config_file(&place, &config);
    let mut random = Random::new(4);
    for _ in 0..rounds(50, 1_000) {
        let mut command = net.command(Place::Node, weir());
        command.args(["run", "-c"]).arg(&file).stderr(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        // Anywhere between nothing and everything installed.
        std::thread::sleep(Duration::from_millis(random.below(150)));
        child.kill().unwrap();
        child.wait().unwrap();
        let tables = || net.run(Place::Node, &["nft", "list", "tables"]);
        until("the table is gone", || !tables().contains("inet weir"));
        until("the programs are gone", || !cgroup.programs().contains("weir"));
    }
    let weir = Weir::run(&net, &config);
    weir.end(&net);
}

/// `weir check` tries for real, says the cure, and leaves nothing.
#[test]
fn check_names_what_is_missing_and_its_cure() {
    let net = Net::new();
    let strict = [weir(), "check", "--strict"];
    let before = net.output(Place::Node, &strict);
    let text = String::from_utf8_lossy(&before.stdout).into_owned();
    assert_eq!(before.status.code(), Some(3), "{text}");
    assert!(
        text.contains("\u{203c} replies led back by mark") && text.contains("tcp_fwmark_accept=1"),
        "{text}"
    );
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let after = net.output(Place::Node, &strict);
    let text = String::from_utf8_lossy(&after.stdout).into_owned();
    assert_eq!(after.status.code(), Some(0), "{text}");
    assert!(
        text.contains("\u{221a} inbound tproxy") && text.contains("\u{221a} outbound connect"),
        "{text}"
    );
    assert!(net.is_clean());
    let bare = net.output(
        Place::Node,
        &["setpriv", "--bounding-set=-all", "--inh-caps=-all", weir(), "check"],
    );
    assert_eq!(bare.status.code(), Some(4), "{}", crate::harness::said(&bare));
}

/// Without the capability one clear line says so, and nothing is changed.
#[test]
fn missing_capability_is_named() {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let place = tempfile::TempDir::new().unwrap();
    let file = crate::harness::config_file(&place, "inbound: {}");
    let bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
    let words = [weir(), "run", "-c", file.to_str().unwrap()];
    let output = net.output(Place::Node, &[&bare[..], &words].concat());
    let said = crate::harness::said(&output);
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.lines().count() == 1 && said.contains("CAP_NET_ADMIN"), "{said}");
    assert!(net.is_clean());
}
