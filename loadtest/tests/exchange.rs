// SPDX-License-Identifier: Apache-2.0
//! Client against server, over loopback, without a forwarder between them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// A server, ended by its own pid when dropped.
struct Server {
    addr: SocketAddr,
    child: Child,
}

impl Server {
    fn start(kind: &str) -> Server {
        // Found free a moment ago; nobody else on this host is likely to take it in between.
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_weir-loadtest"))
            .args(["serve", "--kind", kind, "--listen", &addr.to_string()])
            .spawn()
            .unwrap();
        let began = Instant::now();
        while TcpStream::connect(addr).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "the server listens");
        }
        Server { addr, child }
    }

    fn run(&self, arguments: &[&str]) -> serde_json::Value {
        let output = Command::new(env!("CARGO_BIN_EXE_weir-loadtest"))
            .args(["run", "--duration", "0.2", "--warmup", "0", "--to", &self.addr.to_string()])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_kind_of_load_gets_through_without_errors() {
    let echo = Server::start("echo");
    for arguments in [
        &["--connections", "1"][..],
        &["--connections", "200", "--size", "5000"],
        &["--kind", "connections", "--connections", "8"],
        &["--kind", "connections", "--connections", "8", "--reset"],
    ] {
        let outcome = echo.run(arguments);
        assert_eq!(outcome["errors"], 0, "{arguments:?}: {outcome}");
        assert!(outcome["per_second"].as_f64() > Some(0.0), "{arguments:?}: {outcome}");
    }
    let source = Server::start("source");
    let outcome = source.run(&["--kind", "bulk", "--connections", "2"]);
    assert!(outcome["bytes_per_second"].as_f64() > Some(0.0), "{outcome}");
}

#[test]
fn nobody_at_the_address_is_an_error() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let status = Command::new(env!("CARGO_BIN_EXE_weir-loadtest"))
        .args(["run", "--duration", "0.1", "--warmup", "0", "--connections", "1", "--to", &addr])
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}
