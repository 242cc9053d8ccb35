// SPDX-License-Identifier: Apache-2.0
//! `weir check` tries for real, says the one thing to do, and leaves nothing.

use serde_json::Value;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Bpffs, Cgroup, Net, Place, config_file, said, until, weir};
use crate::hook::foreign;

/// The findings of one run, as (outcome, what, cure), and the exit code.
fn check(net: &Net, words: &[&str]) -> (Vec<(String, String, String)>, Option<i32>) {
    let output = net.output(Place::Node, &[&[weir(), "check", "-o", "json"], words].concat());
    let findings: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(&output)));
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let findings = findings.as_array().unwrap().iter();
    let findings = findings.map(|one| (text(one, "outcome"), text(one, "what"), text(one, "cure")));
    (findings.collect(), output.status.code())
}

fn cure<'a>(findings: &'a [(String, String, String)], begins: &str) -> Option<&'a str> {
    let found = findings.iter().find(|(_, what, _)| what.starts_with(begins))?;
    (found.0 == "warns").then_some(found.2.as_str())
}

/// A connection through a weir of its own in every mode, in a node that is nobody's.
#[test]
fn every_mode_is_tried_by_a_connection() {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let (findings, code) = check(&net, &["--strict"]);
    assert_eq!(code, Some(0), "{findings:#?}");
    for mode in [
        "inbound tproxy, the workload sees",
        "inbound tproxy: IPv4",
        "outbound connect: ",
        "forward: ",
    ] {
        let found = findings.iter().find(|(_, what, _)| what.starts_with(mode));
        assert_eq!(found.map(|found| found.0.as_str()), Some("works"), "{mode}: {findings:#?}");
    }
    let text = net.run(Place::Node, &[weir(), "check"]);
    assert!(text.starts_with("ring\n----\n\u{221a} ") && text.ends_with("all in all: \u{221a}\n"));
    assert!(net.is_clean());
}

/// Whatever ends a check, nothing of it stays: interrupted it clears up itself, killed the next one does.
#[test]
fn check_that_is_ended_leaves_nothing() {
    let (net, cgroup) = (Net::new(), Cgroup::new());
    let mount = cgroup.directory().parent().unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let mut child = net.command(Place::Node, weir()).arg("check").spawn().unwrap();
        let name = format!("weir-check-{}", child.id());
        let places = [mount.join(&name), std::env::temp_dir().join(&name)];
        // A weir of its own runs by now.
        until("a mode is being tried", || places[1].join("admin.sock").exists());
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        let code = child.wait().unwrap().code();
        if signal == Signal::SIGKILL {
            net.run(Place::Node, &[weir(), "check", "-o", "json"]);
        } else {
            assert_eq!(code, Some(130), "{signal}");
        }
        assert!(!places.iter().any(|place| place.exists()), "{signal}");
        let config = places[1].join("weir.yaml").display().to_string();
        let is_its = |entry: std::fs::DirEntry| {
            let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&words).contains(&config)
        };
        assert!(!std::fs::read_dir("/proc").unwrap().flatten().any(is_its), "{signal}");
    }
}

/// A look whether pins could be made makes none, and no place for them.
#[test]
fn check_of_a_closed_config_leaves_no_place_for_pins() {
    let (net, cgroup, bpffs) = (Net::new(), Cgroup::new(), Bpffs::new());
    let place = tempfile::TempDir::new().unwrap();
    let text = format!("on_exit: closed\noutbound: {{ workload: {{ cgroup: {} }} }}", cgroup.path);
    let file = config_file(&place, &text);
    let mut command = bpffs.command(&net, Place::Node, weir());
    let output = command.args(["check", "-c"]).arg(file).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("\u{221a} what this config captures can be captured"), "{text}");
    assert_eq!(bpffs.pins(&net), Vec::<String>::new());
}

/// Others who capture, translate or filter are named, and so are marks and programs in the way.
#[test]
fn others_on_the_host_are_named() {
    let net = Net::new();
    let cgroup = Cgroup::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let tables = "table ip nat { chain KUBE-SERVICES { }; chain DOCKER { }; chain ISTIO_OUTPUT { }; }
        table inet firewalld { }
        table ip filter { chain ufw-before-input { }; }
        table ip tenant { chain c { type filter hook prerouting priority -300; meta mark set 0x1; }; }";
    net.run(Place::Node, &["nft", tables]);
    net.run(Place::Node, &["ip", "rule", "add", "fwmark", "0x539", "lookup", "77", "prio", "50"]);
    let _others = foreign(cgroup.directory(), "10.0.0.1:1", "10.0.0.1:2", 1);
    let place = tempfile::TempDir::new().unwrap();
    let text = format!("inbound: {{}}\noutbound: {{ workload: {{ cgroup: {} }} }}", cgroup.path);
    let file = config_file(&place, &text);
    let (findings, code) = check(&net, &["--strict", "-c", file.to_str().unwrap()]);
    assert_eq!(code, Some(3), "{findings:#?}");
    for (name, word) in [
        ("kube-proxy has rules", "not translated"),
        ("Docker has rules", "not translated"),
        ("Istio has rules", "captures the same traffic"),
        ("firewalld has rules", "flush"),
        ("ufw has rules", "flush"),
        ("a rule of table ip tenant sets the whole mark", "its own bits"),
        ("`ip rule` 50:", "outside the mask"),
        ("the program foreign_connect", "overruled"),
    ] {
        let cure = cure(&findings, name).unwrap_or_else(|| panic!("{name}: {findings:#?}"));
        assert!(cure.contains(word), "{name}: {cure}");
    }
    assert!(!findings.iter().any(|(outcome, _, _)| outcome == "fails"), "{findings:#?}");
}

/// RD1: a connection tracking table that is nearly full is said, before redirect loses connections.
/// Its size is one for the whole host, which is nobody's to change: the test lends it another.
#[test]
fn full_connection_tracking_is_said() {
    let net = Net::new();
    let _listener = net.listen(Place::Node, "10.98.1.1:8000");
    let _streams: Vec<_> = (0..10).map(|_| net.connect(Place::Client, "10.98.1.1:8000")).collect();
    let place = tempfile::TempDir::new().unwrap();
    let file = place.path().join("max");
    std::fs::write(&file, "10\n").unwrap();
    let lend =
        "mount --bind \"$1\" /proc/sys/net/netfilter/nf_conntrack_max && shift && exec \"$@\"";
    let words = ["unshare", "--mount", "sh", "-c", lend, "sh", file.to_str().unwrap()];
    let output = net.output(Place::Node, &[&words[..], &[weir(), "check"]].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let full = "\u{203c} room in connection tracking, for redirect: 10 of 10";
    assert!(text.lines().any(|line| line.starts_with(full)), "{text}");
    assert!(text.contains("sysctl -w net.netfilter.nf_conntrack_max=40"), "{text}");
}
