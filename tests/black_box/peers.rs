// SPDX-License-Identifier: Apache-2.0
//! Other people's programs at both ends, and a great many bytes.

use std::fs;
use std::net::Shutdown;
use std::thread::scope;

use tempfile::TempDir;

use crate::harness::{Net, Place, Program, Weir, check, echo, expect_eof, said, send};

const LISTEN: &str = "10.98.1.1:7000";

/// Weir in front of `to`, which runs in the server.
fn forward(net: &Net, to: &str) -> Weir {
    Weir::forward(net, &["--listen", LISTEN, "--to", to])
}

/// nginx and curl: a large file, byte for byte, and many requests on one connection.
#[test]
fn nginx_serves_curl() {
    let net = Net::new();
    let place = TempDir::new().unwrap();
    let mut content = Vec::new();
    send(&mut content, 9, 50_000_000).unwrap();
    fs::write(place.path().join("large"), content).unwrap();
    let lines = format!("server {{ listen 80; root {}; }}", place.path().display());
    let server = Program::nginx(&net, Place::Server, place.path(), &lines);
    let weir = forward(&net, "10.98.2.2:80");
    let copy = place.path().join("copy");
    let url = format!("http://{LISTEN}/large");
    net.run(Place::Client, &["curl", "-sS", "-m", "60", "-o", copy.to_str().unwrap(), &url]);
    check(&mut fs::File::open(copy).unwrap(), 9, 50_000_000);
    let range = format!("http://{LISTEN}/large?[1-200]");
    let words =
        ["curl", "-sS", "-m", "60", "-r", "0-99", "-o", "/dev/null", "-w", "%{http_code} ", &range];
    assert_eq!(net.run(Place::Client, &words), "206 ".repeat(200));
    assert_eq!(weir.opened(), 2, "200 requests on one connection");
    drop(server);
    weir.end(&net);
}

/// iperf3 in both directions. Its receiver stops when the sender says so over another connection,
/// with bytes still on their way, so only what was sent is exact.
#[test]
fn iperf3_runs_both_ways() {
    let net = Net::new();
    let server = Program::start(&net, Place::Server, &["iperf3", "-s"], ":5201 ");
    let weir = forward(&net, "10.98.2.2:5201");
    for direction in [&[][..], &["-R"][..]] {
        let words = ["iperf3", "-c", "10.98.1.1", "-p", "7000", "-n", "300M", "-P", "3", "-J"];
        let report = net.run(Place::Client, &[&words[..], direction].concat());
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        let bytes = |end: &str| report["end"][end]["bytes"].as_u64().unwrap();
        assert!(bytes("sum_sent") >= 300_000_000 && bytes("sum_received") > 0, "{}", report["end"]);
        assert!(weir.metric("weir_bytes_total", &[]) >= bytes("sum_received"));
    }
    drop(server);
    weir.end(&net);
}

/// haproxy behind weir, in front of an echo.
#[test]
fn haproxy_is_a_good_upstream() {
    let net = Net::new();
    echo(net.listen(Place::Server, "10.98.2.2:7002"));
    let place = TempDir::new().unwrap();
    let sections = "frontend f\n mode tcp\n bind 10.98.2.2:7001\n default_backend b\n\
                    backend b\n mode tcp\n server s 10.98.2.2:7002\n";
    let server = Program::haproxy(&net, Place::Server, place.path(), (sections, ":7001 "));
    let weir = forward(&net, "10.98.2.2:7001");
    scope(|scope| {
        for seed in 0..20 {
            let mut stream = net.connect(Place::Client, LISTEN);
            let mut writer = stream.try_clone().unwrap();
            scope.spawn(move || {
                send(&mut writer, seed, 1_000_000).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                check(&mut stream, seed, 1_000_000);
                expect_eof(&stream);
            });
        }
    });
    drop(server);
    weir.end(&net);
}

/// openssl at both ends: what is encrypted arrives as it was sent.
#[test]
fn openssl_talks_through() {
    let net = Net::new();
    let place = TempDir::new().unwrap();
    let path = |name: &str| place.path().join(name).display().to_string();
    let (key, certificate) = (path("key.pem"), path("cert.pem"));
    let request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=weir"];
    let files = ["-keyout", &key, "-out", &certificate, "-days", "1"];
    net.run(Place::Server, &[&request[..], &files].concat());
    let serve =
        ["openssl", "s_server", "-accept", "7001", "-key", &key, "-cert", &certificate, "-www"];
    let server = Program::start(&net, Place::Server, &serve, ":7001 ");
    let weir = forward(&net, "10.98.2.2:7001");
    let ask = format!(
        "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 30 openssl s_client -quiet -ign_eof -connect {LISTEN} \
         -CAfile {certificate} -verify_return_error"
    );
    let output = net.output(Place::Client, &["sh", "-c", &ask]);
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(answer.contains("s_server"), "{answer} {}", said(&output));
    drop(server);
    weir.end(&net);
}

/// Redis pipelines: small requests in great number, each with its own answer.
#[test]
fn redis_answers_pipelines() {
    let net = Net::new();
    let place = TempDir::new().unwrap();
    let directory = place.path().display().to_string();
    let serve = [
        "redis-server",
        "--bind",
        "10.98.2.2",
        "--port",
        "7001",
        "--save",
        "",
        "--protected-mode",
        "no",
        "--dir",
        &directory,
    ];
    let server = Program::start(&net, Place::Server, &serve, ":7001 ");
    let weir = forward(&net, "10.98.2.2:7001");
    let script = "for i in $(seq 3000); do echo \"SET key$i value$i\"; echo \"GET key$i\"; done | \
                  timeout 60 redis-cli -h 10.98.1.1 -p 7000";
    let output = net.run(Place::Client, &["sh", "-c", script]);
    let expected: String = (1..=3000).map(|i| format!("OK\nvalue{i}\n")).collect();
    assert_eq!(output, expected);
    drop(server);
    weir.end(&net);
}

/// 64 flows of 64 MB at once, both ways, in chunks of random length, every word checked.
#[test]
fn sixty_four_flows_lose_and_mix_nothing() {
    let bytes: u64 = 64 << 20;
    let net = Net::new();
    echo(net.listen(Place::Server, "10.98.2.2:7001"));
    let weir =
        Weir::forward(&net, &["--workers", "2", "--listen", LISTEN, "--to", "10.98.2.2:7001"]);
    scope(|scope| {
        for seed in 0..64 {
            let mut stream = net.connect(Place::Client, LISTEN);
            let mut writer = stream.try_clone().unwrap();
            scope.spawn(move || {
                send(&mut writer, seed, bytes).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                check(&mut stream, seed, bytes);
                expect_eof(&stream);
            });
        }
    });
    assert_eq!(weir.metric("weir_bytes_total", &[]), 64 * 2 * bytes);
    assert_eq!(weir.closed("finished"), 64);
    weir.end(&net);
}
