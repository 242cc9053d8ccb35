// SPDX-License-Identifier: Apache-2.0
//! Other people's programs under every way of capture: nginx, curl and redis, on both families.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use crate::harness::{Cgroup, Net, Place, Program, Weir, check, said, send};

const BYTES: u64 = 5_000_000;

/// nginx and redis in `place`, on both families.
fn programs(net: &Net, place: Place, directory: &Path) -> [Program; 2] {
    let mut content = Vec::new();
    send(&mut content, 9, BYTES).unwrap();
    fs::write(directory.join("large"), content).unwrap();
    let lines = format!("server {{ listen 80; listen [::]:80; root {}; }}", directory.display());
    let nginx = Program::nginx(net, place, directory, &lines);
    let words =
        ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "::", "--protected-mode", "no"];
    let redis =
        Program::start(net, place, &[&words[..], &["--save", "", "--dir", "/"]].concat(), ":6379 ");
    [nginx, redis]
}

/// curl and redis as clients at the addresses of the programs; `words` runs one of them.
fn use_them(addresses: [&str; 2], directory: &Path, words: impl Fn(&[&str]) -> String) -> u64 {
    let [v4, v6] = addresses;
    for host in [v4.to_owned(), format!("[{v6}]")] {
        let copy = directory.join("copy");
        let url = format!("http://{host}/large");
        words(&["curl", "-sS", "-m", "60", "-o", copy.to_str().unwrap(), &url]);
        check(&mut fs::File::open(copy).unwrap(), 9, BYTES);
        let range = format!("http://{host}/large?[1-20]");
        let ask = [
            "curl",
            "-sS",
            "-m",
            "60",
            "-r",
            "0-99",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} ",
            &range,
        ];
        assert_eq!(words(&ask), "206 ".repeat(20));
    }
    for host in [v4, v6] {
        assert_eq!(words(&["redis-cli", "-h", host, "set", "a", "b"]).trim(), "OK");
        let bench = ["redis-benchmark", "-h", host, "-n", "2000", "-c", "20", "-t", "get", "-q"];
        assert!(words(&bench).contains("requests per second"));
    }
    4
}

#[test]
fn inbound_ways_serve_nginx_and_redis() {
    for config in [
        "inbound: {}",
        "inbound: { source: own }",
        "inbound: { capture: redirect }",
        "inbound: { capture: redirect, source: own }",
    ] {
        let net = Net::new();
        net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
        let directory = TempDir::new().unwrap();
        let servers = programs(&net, Place::Node, directory.path());
        let weir = Weir::run(&net, &format!("workers: 2\n{config}"));
        let least = use_them(Net::NODE, directory.path(), |words| net.run(Place::Client, words));
        assert!(weir.opened() > least, "{config}");
        drop(servers);
        weir.end(&net);
    }
}

#[test]
fn outbound_ways_serve_curl_and_redis() {
    for capture in ["tproxy", "redirect", "connect"] {
        let (net, cgroup) = (Net::new(), Cgroup::new());
        let directory = TempDir::new().unwrap();
        let servers = programs(&net, Place::Server, directory.path());
        let config = format!(
            "workers: 2\noutbound: {{ capture: {capture}, workload: {{ cgroup: {} }} }}",
            cgroup.path
        );
        let weir = Weir::run(&net, &config);
        let least = use_them(Net::SERVER, directory.path(), |words| {
            let output = cgroup.output(&net, words);
            assert!(output.status.success(), "{words:?}: {}", said(&output));
            String::from_utf8(output.stdout).unwrap()
        });
        assert!(weir.opened() > least, "{capture}");
        drop(servers);
        weir.end(&net);
    }
}
