// SPDX-License-Identifier: Apache-2.0
//! A worker on the real kernel: plain listeners over loopback.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::capture::{PortCounts, SourcePorts};
use crate::profile;
use crate::service::{Directory, Endpoint, Manner};
use crate::sys::socket::ListenOptions;

mod listeners;
mod pauses;
mod stalls;

/// A worker that forwards to `endpoints`; drained and joined by `end`.
struct Forwarder {
    addr: SocketAddr,
    handle: Handle,
    services: Directory,
}

impl Forwarder {
    fn start(endpoints: Vec<SocketAddr>, change: impl FnOnce(&mut Profile, &mut Share)) -> Self {
        let (setup, addr, services) = prepare(endpoints, change);
        let handle = spawn(setup).unwrap();
        Forwarder { addr, handle, services }
    }

    fn move_to(&mut self, endpoints: Vec<Endpoint>) {
        let last = self.services.table();
        self.services.set("test", Manner::of(Balance::RoundRobin), endpoints, Instant::now());
        assert!(self.handle.update(Update::new(self.services.table(), Some(&last))));
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn closed(&self, reason: CloseReason) -> u64 {
        self.handle.counters().flows_closed[reason as usize].value()
    }

    fn await_closed(&self, reason: CloseReason, count: u64) {
        until(|| self.closed(reason) >= count, &format!("{count} flows closed as {reason:?}"));
    }

    /// Drains; every flow that was opened must have been closed.
    fn end(self) {
        assert!(self.handle.drain(Duration::ZERO));
        until(|| self.handle.is_finished(), "the worker ended");
        let counters = Arc::clone(&self.handle.counters);
        self.handle.join().unwrap();
        let opened: u64 = counters.flows_opened.iter().map(|counter| counter.value()).sum();
        let closed: u64 = counters.flows_closed.iter().map(|counter| counter.value()).sum();
        assert_eq!((opened, counters.flows_active.value()), (closed, 0));
    }
}

use crate::op::CloseReason;

/// What a worker needs that forwards to `endpoints`, and where it will listen.
fn prepare(
    endpoints: Vec<SocketAddr>,
    change: impl FnOnce(&mut Profile, &mut Share),
) -> (Setup, SocketAddr, Directory) {
    let mut profile = small_profile();
    let mut share = SHARE;
    change(&mut profile, &mut share);
    let options = ListenOptions { backlog: 1024, nodelay: true, ..ListenOptions::default() };
    let fd = socket::listen("127.0.0.1:0".parse().unwrap(), &options).unwrap();
    let addr = socket::local_name(fd.as_fd()).unwrap();
    let endpoints = endpoints.into_iter().map(Endpoint::new).collect();
    let mut services = Directory::default();
    let manner = Manner::of(Balance::RoundRobin);
    let id = services.set("test", manner, endpoints, Instant::now());
    let route = Route::Service { balance: Balance::RoundRobin, id, origin: Origin::Forward };
    let listener = Listener {
        fd: fd.into(),
        place: Arc::default(),
        proxy_protocol: ProxyProtocol::Off,
        route,
        workload: Arc::default(),
    };
    (setup(vec![listener], profile, share, &services), addr, services)
}

fn setup(listeners: Vec<Listener>, profile: Profile, share: Share, services: &Directory) -> Setup {
    Setup {
        cpu: None,
        home: Arc::default(),
        index: 0,
        listeners,
        marks: None,
        profile: Arc::new(profile),
        services: Update::new(services.table(), None),
        share,
        sockmap: None,
        source_ports: SourcePorts::new(PortCounts::new(), 0, 1),
    }
}

fn small_profile() -> Profile {
    let base = Profile::default();
    Profile {
        buffers: profile::Buffers {
            bulk_count: 16,
            bulk_bytes: 65536,
            small_count: 64,
            small_bytes: 16384,
        },
        relay: profile::Relay {
            bulk_after_bytes: 65536,
            mode: RelayMode::Copy,
            pipe_bytes: 65536,
            segments_max: 16,
            sockmap_after_messages: 4,
            sockmap_credit_bytes: 65536,
            splice_after_bytes: 65536,
            splice_fullness_percent: 10,
            splice_short_bytes: 1,
            window_bytes: 65536,
            ..base.relay
        },
        ring: profile::Ring {
            coalesce: Duration::ZERO,
            completions: 1024,
            entries: 256,
            spin: Duration::ZERO,
        },
        timeouts: Timeouts {
            drain: Duration::from_secs(5),
            half_closed: Duration::from_secs(5),
            ..base.timeouts
        },
        ..base
    }
}

/// Waits for a condition; panics with `what` when it does not come.
fn until(condition: impl Fn() -> bool, what: &str) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        thread::yield_now();
    }
}

/// A server that runs `serve` on a thread for each connection.
fn server(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, serve) = (stream.unwrap(), serve.clone());
            thread::spawn(move || serve(stream));
        }
    });
    addr
}

fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 65536];
    while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..bytes]).is_err() {
            return;
        }
    }
}

/// Bytes that differ by position and by flow.
fn payload(seed: u64, words: u64) -> Vec<u8> {
    (0..words).flat_map(|word| (seed << 48 | word).to_le_bytes()).collect()
}

#[test]
fn every_byte_comes_back_and_fin_ends_the_flow() {
    let forwarder = Forwarder::start(vec![server(echo)], |_, _| {});
    let clients: Vec<_> = (0..8u8)
        .map(|seed| {
            let mut stream = forwarder.connect();
            thread::spawn(move || {
                let sent = payload(u64::from(seed), 500_000);
                let mut writer = stream.try_clone().unwrap();
                let bytes = sent.clone();
                let writing = thread::spawn(move || {
                    for chunk in bytes.chunks(7777 + usize::from(seed) * 1001) {
                        writer.write_all(chunk).unwrap();
                    }
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut received = Vec::new();
                stream.read_to_end(&mut received).unwrap();
                writing.join().unwrap();
                assert!(received == sent, "flow {seed}: {} bytes came back", received.len());
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    forwarder.await_closed(CloseReason::Finished, 8);
    forwarder.end();
}

#[test]
fn half_closed_flow_still_carries_the_answer() {
    let upstream = server(|mut stream| {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).unwrap();
        stream.write_all(&payload(1, request.len() as u64)).unwrap();
    });
    let forwarder = Forwarder::start(vec![upstream], |_, _| {});
    let mut client = forwarder.connect();
    client.write_all(&[7; 100_000]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert!(answer == payload(1, 100_000));
    forwarder.await_closed(CloseReason::Finished, 1);
    forwarder.end();
}

#[test]
fn reset_stays_a_reset_in_both_directions() {
    let upstream = server(|mut stream| {
        let _ = stream.read(&mut [0; 16]);
        socket::set_reset_on_close(stream.as_fd()).unwrap();
    });
    let forwarder = Forwarder::start(vec![upstream, server(echo)], |_, _| {});
    let mut client = forwarder.connect();
    client.write_all(b"please").unwrap();
    let error = client.read(&mut [0; 16]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    forwarder.await_closed(CloseReason::UpstreamReset, 1);
    let mut client = forwarder.connect();
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    socket::set_reset_on_close(client.as_fd()).unwrap();
    drop(client);
    forwarder.await_closed(CloseReason::DownstreamReset, 1);
    forwarder.end();
}

#[test]
fn refused_upstream_resets_the_downstream_and_is_counted() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let forwarder = Forwarder::start(vec![nobody], |_, _| {});
    let mut client = forwarder.connect();
    let error = client.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    forwarder.await_closed(CloseReason::ConnectRefused, 1);
    forwarder.end();
}

#[test]
fn endpoint_that_refuses_is_left_out_and_nobody_notices() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let forwarder = Forwarder::start(vec![nobody, server(echo), nobody], |_, _| {});
    for _ in 0..20 {
        let mut client = forwarder.connect();
        client.write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
    }
    forwarder.await_closed(CloseReason::Finished, 20);
    let counters = forwarder.handle.counters();
    assert_eq!(forwarder.closed(CloseReason::ConnectRefused), 0);
    let (ejected, retried) =
        (counters.endpoints_ejected.value(), counters.connects_retried.value());
    assert!(ejected >= 1 && retried == ejected, "{ejected} ejected, {retried} retried");
    forwarder.end();
}

#[test]
fn service_that_moves_takes_new_flows_along_and_leaves_the_old_ones() {
    let old = server(echo);
    let mut forwarder = Forwarder::start(vec![old], |_, _| {});
    let mut client = forwarder.connect();
    client.write_all(b"before").unwrap();
    client.read_exact(&mut [0; 6]).unwrap();
    let new = server(|mut stream| stream.write_all(b"new").unwrap());
    forwarder.move_to(vec![Endpoint::new(new)]);
    let moved = || {
        let mut text = Vec::new();
        let mut client = forwarder.connect();
        client.shutdown(Shutdown::Write).unwrap();
        client.read_to_end(&mut text).unwrap();
        text == b"new"
    };
    until(moved, "new flows go to the new endpoint");
    client.write_all(b"after").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    forwarder.move_to(Vec::new());
    let denied = || {
        // Refused on the way in, or reset.
        let _ = forwarder.connect().read(&mut [0]);
        forwarder.handle.counters().denied[crate::metrics::Denied::NoEndpoint as usize].value() > 0
    };
    until(denied, "nowhere to go is said");
    drop(client);
    forwarder.end();
}

#[test]
fn stopped_reader_stops_the_writer_and_loses_nothing() {
    let gate = Arc::new(crossbeam_queue::ArrayQueue::new(1));
    let held = Arc::clone(&gate);
    let upstream = server(move |mut stream| {
        until(|| held.pop().is_some(), "the reader may go on");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        stream.write_all(&(received.len() as u64).to_le_bytes()).unwrap();
        assert!(received == payload(3, received.len() as u64 / 8));
    });
    let forwarder = Forwarder::start(vec![upstream], |_, _| {});
    let mut client = forwarder.connect();
    client.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let bytes = payload(3, 8_000_000);
    let mut sent = 0;
    while let Ok(count) = client.write(&bytes[sent..]) {
        sent += count;
        assert!(sent < bytes.len(), "nothing stopped the writer");
    }
    gate.push(()).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    let end = (sent + 1_000_000) & !7;
    client.write_all(&bytes[sent..end]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = [0; 8];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(u64::from_le_bytes(answer), end as u64);
    forwarder.end();
}

#[test]
fn more_clients_than_flows_wait_their_turn() {
    let forwarder = Forwarder::start(vec![server(echo)], |_, share| {
        *share = Share { flows_max: 4, connects_pending_max: 2, ..SHARE };
    });
    let clients: Vec<_> = (0..32)
        .map(|_| {
            let mut stream = forwarder.connect();
            thread::spawn(move || {
                stream.write_all(b"x").unwrap();
                stream.read_exact(&mut [0]).unwrap();
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    forwarder.await_closed(CloseReason::Finished, 32);
    forwarder.end();
}

#[test]
fn few_buffers_are_shared_by_many_flows() {
    let forwarder = Forwarder::start(vec![server(echo)], |profile, _| {
        profile.buffers.small_count = 2;
        profile.buffers.bulk_count = 1;
    });
    let clients: Vec<_> = (0..64)
        .map(|seed| {
            let mut stream = forwarder.connect();
            thread::spawn(move || {
                let bytes = payload(seed, 1000);
                for _ in 0..5 {
                    stream.write_all(&bytes).unwrap();
                    let mut back = vec![0; bytes.len()];
                    stream.read_exact(&mut back).unwrap();
                    assert!(back == bytes);
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    forwarder.end();
}

#[test]
fn too_many_flows_from_one_address_are_reset() {
    let forwarder = Forwarder::start(vec![server(echo)], |_, share| {
        share.flows_per_source_max = 2;
    });
    let mut kept: Vec<TcpStream> = Vec::new();
    for _ in 0..2 {
        let mut stream = forwarder.connect();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        kept.push(stream);
    }
    let error = forwarder.connect().read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    drop(kept.pop());
    forwarder.await_closed(CloseReason::Finished, 1);
    let mut stream = forwarder.connect();
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    drop((stream, kept));
    forwarder.end();
}

#[test]
fn timers_end_what_is_silent() {
    let forwarder = Forwarder::start(vec![server(|stream| drop(hold(stream)))], |profile, _| {
        profile.timeouts.idle = Duration::from_millis(100);
        profile.timeouts.half_closed = Duration::from_millis(100);
    });
    let silent = forwarder.connect();
    forwarder.await_closed(CloseReason::IdleTimeout, 1);
    let half = forwarder.connect();
    half.shutdown(Shutdown::Write).unwrap();
    forwarder.await_closed(CloseReason::HalfClosedTimeout, 1);
    drop((silent, half));
    forwarder.end();
}

/// Keeps a connection open, silent, until the other end is gone.
fn hold(stream: TcpStream) -> TcpStream {
    while socket::peer_name(stream.as_fd()).is_ok() {
        thread::sleep(Duration::from_millis(10));
    }
    stream
}

const SHARE: Share = Share {
    connects_pending_max: 64,
    flows_max: 256,
    flows_per_source_max: 0,
    pipes_max: 16,
    sockmap_flows_max: 64,
    spliced_flows_max: 64,
};
/// No test waits longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(20);
