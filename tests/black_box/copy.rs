// SPDX-License-Identifier: Apache-2.0
//! The copy relay: every byte, in order, and every end as it was meant.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::harness::{
    Net, Place, Random, Weir, check, echo, expect_eof, expect_reset, receive, rounds, run, send,
    until,
};

const LISTEN: &str = "10.98.1.1:7000";
const SERVER: &str = "10.98.2.2:7001";
const FORWARD: [&str; 4] = ["--listen", LISTEN, "--to", SERVER];
const MB: u64 = 1 << 20;

/// A weir in front of one server, and a pair of joined sockets for the asking.
struct Rig {
    weir: Weir,
    listener: TcpListener,
    net: Net,
}

impl Rig {
    fn new() -> Rig {
        Rig::with("")
    }

    /// With these keys on top of the balanced profile.
    fn with(profile: &str) -> Rig {
        let net = Net::new();
        let listener = net.listen(Place::Server, SERVER);
        let profile = format!("summary: a test\ninclude: balanced\n{profile}");
        let weir = Weir::forward_with(&net, &profile, &FORWARD);
        Rig { listener, net, weir }
    }

    fn pair(&self) -> (TcpStream, TcpStream) {
        let client = self.net.connect(Place::Client, LISTEN);
        let (server, _) = self.listener.accept().unwrap();
        server.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
        (client, server)
    }

    fn end(self) {
        drop(self.listener);
        self.weir.end(&self.net);
    }
}

/// RL1: whoever ends its direction first, before or after the other has answered.
#[test]
fn each_direction_ends_when_its_sender_ends_it() {
    let rig = Rig::new();
    for order in 0..4 {
        let (client, server) = rig.pair();
        let (mut first, mut second) =
            if order % 2 == 0 { (client, server) } else { (server, client) };
        let early = order < 2;
        scope(|scope| {
            scope.spawn(|| {
                send(&mut first, 1, MB).unwrap();
                first.shutdown(Shutdown::Write).unwrap();
                check(&mut first, 2, 20 * MB);
                expect_eof(&mut first);
            });
            if early {
                check(&mut second, 1, MB);
                expect_eof(&mut second);
                send(&mut second, 2, 20 * MB).unwrap();
            } else {
                let mut writer = second.try_clone().unwrap();
                let sender = scope.spawn(move || send(&mut writer, 2, 20 * MB).unwrap());
                check(&mut second, 1, MB);
                expect_eof(&mut second);
                sender.join().unwrap();
            }
            second.shutdown(Shutdown::Write).unwrap();
        });
    }
    assert_eq!(rig.weir.closed("finished"), 4);
    rig.end();
}

/// RL2: the last block and FIN in one segment, after the other direction has ended.
#[test]
fn last_block_that_comes_with_fin_is_delivered() {
    let rig = Rig::new();
    for seed in 0..200 {
        let (mut client, mut server) = rig.pair();
        client.shutdown(Shutdown::Write).unwrap();
        expect_eof(&mut server);
        // Corked, data and FIN leave together.
        SockRef::from(&server).set_tcp_cork(true).unwrap();
        send(&mut server, seed, 700).unwrap();
        drop(server);
        check(&mut client, seed, 700);
        expect_eof(&mut client);
    }
    until("all finished", || rig.weir.closed("finished") == 200);
    rig.end();
}

/// RL3: a reader that stops makes the writer stop, within bounds, and goes on without loss.
#[test]
fn stalled_reader_stops_the_writer_and_loses_nothing() {
    const BYTES: u64 = 200 * MB;
    let rig = Rig::new();
    let before = rig.weir.anonymous_bytes();
    let (client, mut server) = rig.pair();
    let sent = AtomicU64::new(0);
    scope(|scope| {
        let mut counted = Counted(&client, &sent);
        let writer = scope.spawn(move || send(&mut counted, 3, BYTES).unwrap());
        let mut last = (0, Instant::now());
        until("the writer stops", || {
            let now = sent.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            }
            now > 0 && last.1.elapsed() > Duration::from_millis(500)
        });
        assert!(sent.load(Ordering::Relaxed) < BYTES / 2, "{sent:?} bytes went nowhere");
        let grown = rig.weir.anonymous_bytes().saturating_sub(before);
        assert!(grown < 4 * MB, "user memory grew by {grown} bytes");
        check(&mut server, 3, BYTES);
        writer.join().unwrap();
    });
    drop((client, server));
    rig.end();
}

/// Counts what was taken.
struct Counted<'a>(&'a TcpStream, &'a AtomicU64);

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = self.0.write(bytes)?;
        self.1.fetch_add(taken as u64, Ordering::Relaxed);
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// RL4, IO4: a reset of either end arrives at the other end as a reset, wherever it happens, and
/// both sockets are gone.
#[test]
fn reset_of_one_end_resets_the_other() {
    let rounds = rounds(5_000, 50_000);
    let net = Net::new();
    let doors = [(LISTEN, SERVER), ("[fd98:1::1]:7000", "[fd98:2::2]:7001")];
    let config = doors.map(|(listen, to)| {
        format!("{{ name: \"{to}\", listen: \"{listen}\", endpoints: [\"{to}\"] }}")
    });
    let weir = Weir::run(&net, &format!("workers: 2\nforward: [{}]", config.join(", ")));
    scope(|scope| {
        for (seed, (listen, to)) in (0..).zip(doors) {
            let (net, listener) = (&net, net.listen(Place::Server, to));
            scope.spawn(move || reset_often(net, listen, &listener, seed, rounds));
        }
    });
    // An upstream may reset before weir has looked at its answer.
    let reasons = ["connect_failed", "downstream_reset", "upstream_reset"];
    let resets = || reasons.map(|reason| weir.closed(reason)).iter().sum::<u64>();
    until("every reset is counted", || resets() == rounds * 2);
    until("no socket is left", || net.sockets().is_empty());
    weir.end(&net);
}

fn reset_often(net: &Net, listen: &str, listener: &TcpListener, seed: u64, rounds: u64) {
    let mut random = Random::new(seed);
    for round in 0..rounds {
        let client = net.connect(Place::Client, listen);
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
        let (mut sender, mut other) =
            if round % 2 == 0 { (client, server) } else { (server, client) };
        // Mostly within a segment or two, now and then deep in a stream.
        let before = random.below(if round % 16 == 0 { 200_000 } else { 5_000 });
        scope(|scope| {
            scope.spawn(|| {
                send(&mut sender, round, before).unwrap();
                SockRef::from(&sender).set_linger(Some(Duration::ZERO)).unwrap();
                drop(sender);
            });
            let came = receive(&mut other, round, before + 1);
            assert!(came.is_err(), "round {round}: EOF after {came:?} of {before} bytes");
        });
    }
}

/// RL4: a reset stays a reset behind a send that waits for room: that send swallows the error, and
/// what is received next looks like FIN.
#[test]
fn reset_behind_a_blocked_send_is_no_end_of_stream() {
    let rig = Rig::new();
    for round in 0..100 {
        let (client, server) = rig.pair();
        let (mut writer, mut other) =
            if round % 2 == 0 { (client, server) } else { (server, client) };
        writer.set_nonblocking(true).unwrap();
        // Until both sockets and weir's window are full: nobody reads at the other end.
        let mut taken = 0;
        until("the writer is stopped", || {
            let before = taken;
            while let Ok(bytes) = writer.write(&[1; 65536]) {
                taken += bytes;
            }
            taken > 0 && taken == before
        });
        writer.set_nonblocking(false).unwrap();
        scope(|scope| {
            scope.spawn(|| expect_reset(&mut writer));
            other.write_all(b"an answer that is not whole").unwrap();
            SockRef::from(&other).set_linger(Some(Duration::ZERO)).unwrap();
            drop(other);
        });
    }
    let resets = || rig.weir.closed("downstream_reset") + rig.weir.closed("upstream_reset");
    until("every reset is counted", || resets() == 100);
    rig.end();
}

/// RL9: a peer that is gone without a word is found out, idle or with bytes on their way.
#[test]
fn peer_that_lost_power_is_given_up() {
    let rig = Rig::with(
        "sockets:\n  keepalive: { idle_ms: 1000, interval_ms: 1000, probes: 2 }\n  user_timeout_ms: 2000\n",
    );
    let (mut idle, _idle_server) = rig.pair();
    let (mut busy, _busy_server) = rig.pair();
    let drop_all =
        "table inet cut { chain c { type filter hook input priority 0; iifname \"node\" drop; }; }";
    rig.net.run(Place::Server, &["nft", drop_all]);
    busy.write_all(&[1; 1000]).unwrap();
    expect_reset(&mut idle);
    expect_reset(&mut busy);
    assert_eq!(rig.weir.closed("upstream_reset"), 2);
    drop((idle, busy));
    rig.end();
}

/// RL10: a flow of which one direction has ended and the other is silent does not stay for ever.
#[test]
fn half_closed_and_silent_flow_is_reset() {
    let rig = Rig::with("timeouts:\n  half_closed_ms: 300\n");
    let (mut client, mut server) = rig.pair();
    server.shutdown(Shutdown::Write).unwrap();
    expect_eof(&mut client);
    expect_reset(&mut server);
    until("counted", || rig.weir.closed("half_closed_timeout") == 1);
    drop((client, server));
    rig.end();
}

/// RL11: silent clients cost a place each, up to a limit for each source, and nobody else's.
#[test]
fn silent_clients_are_bounded_and_others_are_served() {
    let rig = Rig::with("limits:\n  flows_per_source_max: 4000\ntimeouts:\n  idle_ms: 4000\n");
    let echo = echo(rig.listener.try_clone().unwrap());
    // Those above the limit may be reset before they know that they were connected.
    let silent: Vec<_> = (0..4200).map(|_| rig.net.try_connect(Place::Client, LISTEN)).collect();
    until("the limit bites", || rig.weir.denied("source_limit") >= 200);
    assert!(rig.weir.active() <= 4000);
    run(&[
        "ip",
        "-n",
        &rig.net.namespace(Place::Client),
        "addr",
        "add",
        "10.98.1.9/24",
        "dev",
        "node",
    ]);
    let output = rig.net.output(
        Place::Client,
        &["sh", "-c", "printf good | timeout 20 socat - TCP:10.98.1.1:7000,bind=10.98.1.9"],
    );
    assert_eq!(String::from_utf8_lossy(&output.stdout), "good", "{output:?}");
    until("silence ends", || rig.weir.closed("idle_timeout") == 4000);
    drop((silent, echo));
    rig.end();
}

/// RL12: the server may speak first, nobody may speak at all, or a byte at a time, or for long.
#[test]
fn every_kind_of_talk_goes_through() {
    let rig = Rig::new();
    let (mut client, mut server) = rig.pair();
    server.write_all(b"220 ready").unwrap();
    let mut banner = [0; 9];
    client.read_exact(&mut banner).unwrap();
    assert_eq!(&banner, b"220 ready");
    for byte in 0..200u8 {
        client.write_all(&[byte]).unwrap();
        let mut came = [0];
        server.read_exact(&mut came).unwrap();
        assert_eq!(came, [byte]);
    }
    drop((client, server));
    let (client, mut server) = rig.pair();
    drop(client);
    expect_eof(&mut server);
    drop(server);
    rig.end();
}

/// RL12: counters of bytes are wider than 32 bits.
#[test]
fn more_than_four_gigabytes_are_counted_right() {
    const BYTES: u64 = (4 << 30) + 12_345;
    let rig = Rig::new();
    let (mut client, mut server) = rig.pair();
    scope(|scope| {
        scope.spawn(move || {
            let chunk = vec![0; 1 << 20];
            let mut left = usize::try_from(BYTES).unwrap();
            while left > 0 {
                left -= client.write(&chunk[..left.min(chunk.len())]).unwrap();
            }
        });
        let mut chunk = vec![0; 1 << 20];
        let mut came = 0;
        loop {
            match server.read(&mut chunk).unwrap() {
                0 => break,
                bytes => came += bytes as u64,
            }
        }
        assert_eq!(came, BYTES);
        drop(server);
    });
    assert_eq!(rig.weir.metric("weir_bytes_total", &[]), BYTES);
    rig.end();
}
