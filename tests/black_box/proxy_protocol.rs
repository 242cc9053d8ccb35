// SPDX-License-Identifier: Apache-2.0
//! The PROXY protocol: the workload is told who its client is, before anything else.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::scope;

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use crate::harness::{Net, PATIENCE, Place, Program, Weir, check, expect_eof, send, until};

/// Namespaces in which replies can be led back by mark.
fn prepared() -> Arc<Net> {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    Arc::new(net)
}

fn run(net: &Net, source: &str, version: &str) -> Weir {
    let inbound = format!("inbound: {{ source: {source}, proxy_protocol: {version} }}");
    Weir::run(net, &format!("workers: 1\n{inbound}"))
}

/// Reads what `version` says; the source is the client's, port and all.
fn expect_header(version: &str, served: &mut TcpStream, from: SocketAddr, to: SocketAddr) {
    served.set_read_timeout(Some(PATIENCE)).unwrap();
    let wanted = match (version, from, to) {
        ("v1", ..) => {
            let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
            let ports = format!("{} {}", from.port(), to.port());
            format!("PROXY {family} {} {} {ports}\r\n", from.ip(), to.ip()).into_bytes()
        }
        (_, SocketAddr::V4(from), SocketAddr::V4(to)) => [
            &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..],
            &from.ip().octets(),
            &to.ip().octets(),
            &from.port().to_be_bytes(),
            &to.port().to_be_bytes(),
        ]
        .concat(),
        (_, SocketAddr::V6(from), SocketAddr::V6(to)) => [
            &b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24"[..],
            &from.ip().octets(),
            &to.ip().octets(),
            &from.port().to_be_bytes(),
            &to.port().to_be_bytes(),
        ]
        .concat(),
        _ => unreachable!("one family"),
    };
    let mut header = vec![0; wanted.len()];
    served.read_exact(&mut header).unwrap();
    assert_eq!(header, wanted, "{version}: {}", String::from_utf8_lossy(&header));
}

/// A client that dials `door` through an IPv6 socket, as Java does.
fn dial_mapped(net: &Net, door: SocketAddr) -> TcpStream {
    let SocketAddr::V4(v4) = door else { unreachable!("an IPv4 door") };
    let mapped = SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port()));
    net.within(Place::Client, || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_only_v6(false).unwrap();
        socket.connect(&mapped.into()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.into()
    })
}

/// TP10: both versions, both families and v4-mapped, with the client's address kept or not.
#[test]
fn header_comes_first_and_names_both_ends() {
    let net = prepared();
    let app = net.listen(Place::Node, "[::]:80");
    for (version, source) in [("v1", "keep"), ("v2", "keep"), ("v1", "own"), ("v2", "own")] {
        let weir = run(&net, source, version);
        for door in ["10.98.1.1:80", "[fd98:1::1]:80", "mapped"] {
            let (client, door) = match door {
                "mapped" => {
                    let door = "10.98.1.1:80".parse().unwrap();
                    (dial_mapped(&net, door), door)
                }
                door => (net.connect(Place::Client, door), door.parse().unwrap()),
            };
            let from = client.local_addr().unwrap();
            let from = SocketAddr::new(from.ip().to_canonical(), from.port());
            exchange(client, &app, |served| expect_header(version, served, from, door));
        }
        until("flows end", || weir.active() == 0);
        assert_eq!(weir.metric("weir_bytes_total", &[]), 3 * 600_000, "headers are not relayed");
        weir.end(&net);
    }
}

/// Both ways, each with its own end.
fn exchange(mut client: TcpStream, app: &TcpListener, header: impl FnOnce(&mut TcpStream)) {
    let (mut served, _) = app.accept().unwrap();
    header(&mut served);
    let mut writer = client.try_clone().unwrap();
    scope(|scope| {
        scope.spawn(move || {
            send(&mut writer, 1, 300_000).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        check(&mut served, 1, 300_000);
        expect_eof(&served);
        scope.spawn(move || {
            send(&mut served, 2, 300_000).unwrap();
        });
        check(&mut client, 2, 300_000);
        expect_eof(&client);
    });
}

/// RL12: a client that says nothing, or ends at once, is announced all the same.
#[test]
fn silent_client_is_announced_too() {
    let net = prepared();
    let app = net.listen(Place::Node, "[::]:80");
    let door = "10.98.1.1:80";
    let weir = run(&net, "keep", "v2");
    // The server speaks first.
    let mut client = net.connect(Place::Client, door);
    let from = client.local_addr().unwrap();
    let (mut served, _) = app.accept().unwrap();
    expect_header("v2", &mut served, from, door.parse().unwrap());
    served.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(weir.flows()[0]["bytes"]["to_upstream"], 0);
    drop((client, served));
    // The client half-closes before anything else.
    let mut client = net.connect(Place::Client, door);
    client.shutdown(Shutdown::Write).unwrap();
    let (mut served, _) = app.accept().unwrap();
    expect_header("v2", &mut served, client.local_addr().unwrap(), door.parse().unwrap());
    expect_eof(&served);
    served.write_all(b"bye").unwrap();
    drop(served);
    client.read_exact(&mut [0; 3]).unwrap();
    expect_eof(&client);
    drop(client);
    drop(app);
    weir.end(&net);
}

/// More connections wait for their upstream than there are headers: each gets its own in the end.
#[test]
fn headers_that_run_out_are_waited_for() {
    let net = prepared();
    let app = net.listen(Place::Node, "[::]:80");
    let place = TempDir::new().unwrap();
    let profile = place.path().join("narrow.yaml");
    let text = "include: balanced\nlimits: { connects_pending_max: 4 }\n";
    std::fs::write(&profile, text).unwrap();
    let config = format!(
        "workers: 1\nprofile: \"{}\"\ninbound: {{ proxy_protocol: v2 }}",
        profile.display()
    );
    let weir = Weir::run(&net, &config);
    let door = "10.98.1.1:80";
    // All come at once.
    weir.signal(Signal::SIGSTOP);
    let clients: Vec<TcpStream> = (0..100).map(|_| net.connect(Place::Client, door)).collect();
    let mut expected: Vec<SocketAddr> =
        clients.iter().map(|client| client.local_addr().unwrap()).collect();
    weir.signal(Signal::SIGCONT);
    for _ in &clients {
        let (mut served, _) = app.accept().unwrap();
        let mut header = [0; 28];
        served.read_exact(&mut header).unwrap();
        let port = u16::from_be_bytes([header[24], header[25]]);
        let known = expected.iter().position(|from| from.port() == port);
        expected.swap_remove(known.expect("a client that was not named yet"));
    }
    drop((clients, app));
    weir.end(&net);
}

/// nginx as the workload: `real_ip` takes the client from the header.
#[test]
fn nginx_believes_the_header() {
    let net = prepared();
    let home = TempDir::new().unwrap();
    let lines = "server { listen [::]:80 ipv6only=off proxy_protocol; set_real_ip_from ::/0; \
                 set_real_ip_from 0.0.0.0/0; real_ip_header proxy_protocol; location / { \
                 return 200 \"$remote_addr $proxy_protocol_addr $proxy_protocol_server_port\"; } }";
    let server = Program::nginx(&net, Place::Node, home.path(), lines);
    for (version, source) in [("v1", "own"), ("v2", "keep")] {
        let weir = run(&net, source, version);
        for (door, client) in [("10.98.1.1", Net::CLIENT[0]), ("[fd98:1::1]", Net::CLIENT[1])] {
            let url = format!("http://{door}/");
            let said = net.run(Place::Client, &["curl", "-sS", "-m", "60", "-g", &url]);
            assert_eq!(said, format!("{client} {client} 80"), "{version}");
        }
        weir.end(&net);
    }
    drop(server);
}

/// haproxy as the workload, with `accept-proxy`.
#[test]
fn haproxy_accepts_the_header() {
    let net = prepared();
    let home = TempDir::new().unwrap();
    let sections = "frontend f\n mode http\n bind :::80 v4v6 accept-proxy\n http-request return \
                    status 200 content-type text/plain lf-string \"%[src] %[dst] %[dst_port]\"\n";
    let server = Program::haproxy(&net, Place::Node, home.path(), (sections, ":80 "));
    for (version, source) in [("v1", "keep"), ("v2", "own")] {
        let weir = run(&net, source, version);
        for (door, client) in [("10.98.1.1", Net::CLIENT[0]), ("[fd98:1::1]", Net::CLIENT[1])] {
            let url = format!("http://{door}/");
            let said = net.run(Place::Client, &["curl", "-sS", "-m", "60", "-g", &url]);
            let dst = door.trim_matches(['[', ']']);
            assert_eq!(said, format!("{client} {dst} 80"), "{version}");
        }
        weir.end(&net);
    }
    drop(server);
}
