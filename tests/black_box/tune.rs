// SPDX-License-Identifier: Apache-2.0
//! `weir tune` on a network namespace's own sysctls: set, compared, and put back exactly.

use std::path::Path;

use tempfile::TempDir;

use crate::harness::{Net, Place, said, weir};

const BACKLOG: &str = "/proc/sys/net/core/somaxconn";
const REUSE: &str = "/proc/sys/net/ipv4/tcp_tw_reuse";

fn read(net: &Net, path: &str) -> String {
    net.run(Place::Node, &["cat", path]).trim().to_owned()
}

fn tune(net: &Net, state: &Path, words: &[&str]) -> String {
    let all = [&[weir(), "tune"], words, &["--state", state.to_str().unwrap()]].concat();
    net.run(Place::Node, &all)
}

#[test]
fn sysctls_are_set_and_put_back_exactly() {
    let net = Net::new();
    let place = TempDir::new().unwrap();
    let state = place.path().join("tune.json");
    net.set(Place::Node, "net.core.somaxconn=777");
    net.set(Place::Node, "net.ipv4.tcp_tw_reuse=0");
    let differs = net.output(Place::Node, &[weir(), "tune", "verify", "many-flows"]);
    assert_eq!(differs.status.code(), Some(1));
    assert!(said(&differs).contains("2 of 2 sysctls are not as many-flows wants them"));

    let steps = tune(&net, &state, &["apply", "many-flows", "--dry-run"]);
    assert_eq!(read(&net, BACKLOG), "777", "a dry run changes nothing");
    assert!(!state.exists());

    tune(&net, &state, &["apply", "many-flows"]);
    assert_eq!((read(&net, BACKLOG).as_str(), read(&net, REUSE).as_str()), ("16384", "1"));
    net.run(Place::Node, &[weir(), "tune", "verify", "many-flows"]);
    tune(&net, &state, &["off"]);
    assert_eq!((read(&net, BACKLOG).as_str(), read(&net, REUSE).as_str()), ("777", "0"));
    assert!(!state.exists());

    // The printed steps do the same by hand.
    net.run(Place::Node, &["sh", "-ec", &steps]);
    assert_eq!((read(&net, BACKLOG).as_str(), read(&net, REUSE).as_str()), ("16384", "1"));
    let undo: String = steps.lines().filter_map(|line| line.split("undo: ").nth(1)).fold(
        String::new(),
        |mut all, line| {
            all.push_str(line);
            all.push('\n');
            all
        },
    );
    net.run(Place::Node, &["sh", "-ec", &undo]);
    assert_eq!((read(&net, BACKLOG).as_str(), read(&net, REUSE).as_str()), ("777", "0"));
}

/// A value that the kernel refuses: what was set before it is put back, and the cure is said.
#[test]
fn refused_sysctl_leaves_the_others_as_they_were() {
    let net = Net::new();
    let place = TempDir::new().unwrap();
    let (profile, state) = (place.path().join("mine.yaml"), place.path().join("tune.json"));
    let text = "sysctls: { net.core.somaxconn: 999, net.ipv4.tcp_tw_reuse: 9 }\n";
    std::fs::write(&profile, text).unwrap();
    let before = read(&net, BACKLOG);
    let words = ["tune", "apply", profile.to_str().unwrap(), "--state", state.to_str().unwrap()];
    let refused = net.output(Place::Node, &[&[weir()], &words[..]].concat());
    assert_eq!(refused.status.code(), Some(4));
    assert!(said(&refused).contains("set net.ipv4.tcp_tw_reuse to 9: Invalid argument"));
    assert_eq!(read(&net, BACKLOG), before);
    assert!(!state.exists());
}
