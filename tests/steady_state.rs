// SPDX-License-Identifier: Apache-2.0
//! A worker in its steady state allocates nothing: not for a byte, not for a connection.
//!
//! The whole process is counted, so nothing else may run here: one test, one file.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::alloc::System;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use weir::bpf::sockmap::Sockmap;
use weir::capture::{PortCounts, SourcePorts};
use weir::config::ProxyProtocol;
use weir::op::Relay;
use weir::profile::{Profile, RelayMode};
use weir::service::{Balance, Directory, Endpoint, Manner, Update};
use weir::sys::socket::{ListenOptions, listen, local_name};
use weir::worker::{self, Handle, Listener, Route, Setup, Share};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// A worker with a listener to `upstream`; with a limit for each source, connections come the way
/// that captured ones do. Shared, each request must name its service, `test`.
fn start(
    is_shared: bool,
    upstream: SocketAddr,
    flows_per_source_max: u32,
    mode: RelayMode,
    sockmap: Option<Sockmap>,
) -> (Handle, SocketAddr) {
    let mut profile = Profile::default();
    profile.relay.mode = mode;
    let options = ListenOptions { backlog: 64, nodelay: true, ..ListenOptions::default() };
    let fd = listen("127.0.0.1:0".parse().unwrap(), &options).unwrap();
    let addr = local_name(fd.as_fd()).unwrap();
    let mut services = Directory::default();
    let (balance, endpoints) = (Balance::LeastFlows, vec![Endpoint::new(upstream)]);
    let id = services.set("test", Manner::of(balance), endpoints, Instant::now());
    let origin = weir::metrics::Origin::Forward;
    let route = if is_shared { Route::Named } else { Route::Service { balance, id, origin } };
    let handle = worker::spawn(Setup {
        cpu: None,
        home: Arc::default(),
        index: 0,
        listeners: vec![Listener {
            fd: fd.into(),
            place: Arc::default(),
            proxy_protocol: ProxyProtocol::Off,
            route,
            workload: Arc::default(),
        }],
        marks: None,
        profile: Arc::new(profile),
        services: Update::new(services.table(), None),
        share: Share {
            connects_pending_max: 64,
            flows_max: 500,
            flows_per_source_max,
            pipes_max: 8,
            sockmap_flows_max: 64,
            spliced_flows_max: 100,
        },
        sockmap,
        source_ports: SourcePorts::new(PortCounts::new(), 0, 1),
    });
    (handle.unwrap(), addr)
}

/// A life in full: connect, exchanges small and large, half-close, the end.
fn live(weir: SocketAddr, upstream: &TcpListener, chunk: &mut [u8]) {
    let mut client = TcpStream::connect(weir).unwrap();
    let (mut server, _) = upstream.accept().unwrap();
    for len in [1, 64, 5000, 100_000] {
        let chunk = &mut chunk[..len];
        client.write_all(chunk).unwrap();
        server.read_exact(chunk).unwrap();
        server.write_all(chunk).unwrap();
        client.read_exact(chunk).unwrap();
    }
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(server.read(chunk).unwrap(), 0);
    server.write_all(&chunk[..10]).unwrap();
    drop(server);
    client.read_exact(&mut chunk[..10]).unwrap();
    assert_eq!(client.read(chunk).unwrap(), 0);
}

fn allocations(flows_per_source_max: u32, mode: RelayMode, sockmap: Option<Sockmap>) -> usize {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = upstream.local_addr().unwrap();
    let (handle, weir) = start(false, addr, flows_per_source_max, mode, sockmap);
    let mut chunk = vec![7; 100_000];
    let mut open: Vec<(TcpStream, TcpStream)> = Vec::with_capacity(50);
    for _ in 0..50 {
        let client = TcpStream::connect(weir).unwrap();
        open.push((client, upstream.accept().unwrap().0));
    }
    for _ in 0..20 {
        live(weir, &upstream, &mut chunk);
    }
    let region = Region::new(ALLOCATOR);
    for _ in 0..200 {
        live(weir, &upstream, &mut chunk);
        for (client, server) in &mut open {
            client.write_all(b"ping").unwrap();
            server.read_exact(&mut [0; 4]).unwrap();
        }
    }
    let change = region.change();
    for (relay, of_mode) in
        [(Relay::Splice, RelayMode::Splice), (Relay::Sockmap, RelayMode::Sockmap)]
    {
        let moved = &handle.counters().bytes_to_upstream[relay as usize];
        assert_eq!(moved.iter().any(|counter| counter.value() > 0), mode == of_mode);
    }
    drop(open);
    assert!(handle.drain(Duration::ZERO));
    handle.join().unwrap();
    change.allocations + change.reallocations
}

/// Requests of the shared port that each go their own way: on connections that stay, and on some that come, ask
/// and go.
fn request_allocations(request: &[u8], answer: &[u8]) -> usize {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = upstream.local_addr().unwrap();
    let (handle, weir) = start(true, addr, 0, RelayMode::Auto, None);
    let ask = |client: &mut TcpStream, server: &mut TcpStream| {
        let mut bytes = [0; 256];
        server.read_exact(&mut bytes[..request.len()]).unwrap();
        assert_eq!(&bytes[..request.len()], request);
        server.write_all(answer).unwrap();
        client.read_exact(&mut bytes[..answer.len()]).unwrap();
        assert_eq!(&bytes[..answer.len()], answer);
    };
    let begin = || {
        let mut client = TcpStream::connect(weir).unwrap();
        client.write_all(request).unwrap();
        let (mut server, _) = upstream.accept().unwrap();
        ask(&mut client, &mut server);
        (client, server)
    };
    let mut open = Vec::with_capacity(50);
    open.extend(std::iter::repeat_with(begin).take(50));
    for _ in 0..20 {
        drop(begin());
    }
    let region = Region::new(ALLOCATOR);
    for _ in 0..200 {
        drop(begin());
        for (client, server) in &mut open {
            client.write_all(request).unwrap();
            ask(client, server);
        }
    }
    let change = region.change();
    drop(open);
    assert!(handle.drain(Duration::ZERO));
    handle.join().unwrap();
    change.allocations + change.reallocations
}

/// A Bolt request of v1 for the service `test`, and its answer.
const BOLT: [&[u8]; 2] = [
    b"\x01\x01\0\x01\x01\0\0\0\x07\x0b\0\0\x0b\xb8\0\0\0\x13\0\0\0\x05\
      \0\0\0\x07service\0\0\0\x04testhello",
    b"\x01\0\0\x02\x01\0\0\0\x07\x0b\0\0\0\0\0\0\0\0\0\x06answer",
];
const HTTP: [&[u8]; 2] = [
    b"GET / HTTP/1.1\r\nHost: test\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nanswer",
];

#[test]
fn worker_in_its_steady_state_allocates_nothing() {
    let (auto, splice) = (RelayMode::Auto, RelayMode::Splice);
    assert_eq!(allocations(0, auto, None), 0, "connections that come as slots");
    assert_eq!(allocations(400, auto, None), 0, "connections that come as descriptors");
    assert_eq!(allocations(0, splice, None), 0, "connections that are spliced");
    for (protocol, [request, answer]) in [("Bolt", BOLT), ("HTTP/1.1", HTTP)] {
        assert_eq!(request_allocations(request, answer), 0, "requests of {protocol}");
    }
    // Needs root; skipped without, but where `CI` is set.
    match Sockmap::load(64, 256 << 10) {
        Ok(loaded) => {
            let count = allocations(0, RelayMode::Sockmap, Some(loaded));
            assert_eq!(count, 0, "connections that the kernel forwards");
        }
        Err(error) if std::env::var_os("CI").is_none() => eprintln!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    }
    // Only so that the counter is known to count.
    let region = Region::new(ALLOCATOR);
    drop(vec![0u8; 4096]);
    assert_eq!(region.change().allocations, 1);
}
