// SPDX-License-Identifier: Apache-2.0
//! Killed after each single object that a start makes.

use std::os::unix::process::ExitStatusExt;

use tempfile::TempDir;

use crate::harness::{Cgroup, Net, Place, Weir, check, config_file, echo, run, send, until, weir};

/// LC4, LC9: wherever a start is killed, traffic flows directly, `rules clear` finds what is left and
/// nothing the second time, and the next start is clean.
#[test]
fn start_that_dies_after_any_object_leaves_traffic_alone() {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let cgroup = Cgroup::new();
    echo(net.listen(Place::Node, "[::]:80"));
    echo(net.listen(Place::Server, "10.98.2.2:80"));
    let config = format!(
        "workers: 1\ninbound: {{}}\noutbound: {{ workload: {{ cgroup: {} }} }}",
        cgroup.path
    );
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
