// SPDX-License-Identifier: Apache-2.0
//! Every kind of talk and silence: every byte, in order, and every end as it was meant.

use std::io::{BufReader, BufWriter, Read, Write, copy, repeat, sink};
use std::net::{Shutdown, TcpListener};
use std::thread::scope;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::harness::rig::{LISTEN, Rig, SERVER};
use crate::harness::{
    Net, Place, Random, Weir, echo, expect_eof, expect_reset, receive, rounds, run, send, until,
};

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

/// RL8: the last byte of a large block waits for nothing behind it.
#[test]
fn last_byte_of_a_large_block_comes_at_once() {
    let rig = Rig::new();
    let (client, mut server) = rig.pair();
    let mut block = vec![7; 1_000_001];
    let mut waits: Vec<Duration> = (0..30)
        .map(|_| {
            let (block_out, mut writer) = (block.clone(), client.try_clone().unwrap());
            let sender = std::thread::spawn(move || writer.write_all(&block_out).unwrap());
            server.read_exact(&mut block[1..]).unwrap();
            let began = Instant::now();
            server.read_exact(&mut block[..1]).unwrap();
            sender.join().unwrap();
            began.elapsed()
        })
        .collect();
    waits.sort_unstable();
    // A delayed acknowledgement or a corked socket would add 40 or 200 ms each time.
    assert!(waits[waits.len() / 2] < Duration::from_millis(20), "{waits:?}");
    client.shutdown(Shutdown::Both).unwrap();
    drop((client, server));
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

/// RL9: both peers are asked whether they live, once a flow has lasted a second.
#[test]
fn flow_that_lasts_is_kept_alive_on_both_sides() {
    let rig =
        Rig::with("sockets:\n  keepalive: { idle_ms: 77000, interval_ms: 1000, probes: 2 }\n");
    let pair = rig.pair();
    let alive = || rig.net.run(Place::Node, &["ss", "-tnoH", "state", "established"]);
    // The client of `weir status` has no TCP: these are the flow's sockets, and no others.
    until("asked", || alive().matches("timer:(keepalive,1min1").count() == 2);
    drop(pair);
    rig.end();
}

/// RL10: a flow of which one direction has ended and the other is silent does not stay for ever.
#[test]
fn half_closed_and_silent_flow_is_reset() {
    let rig = Rig::with("timeouts:\n  half_closed_ms: 300\n");
    let (client, mut server) = rig.pair();
    server.shutdown(Shutdown::Write).unwrap();
    expect_eof(&client);
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
    let (client, server) = rig.pair();
    drop(client);
    expect_eof(&server);
    drop(server);
    rig.end();
}

/// RL12: counters of bytes are wider than 32 bits.
#[test]
fn more_than_four_gigabytes_are_counted_right() {
    const BYTES: u64 = (4 << 30) + 12_345;
    let rig = Rig::new();
    let (client, server) = rig.pair();
    scope(|scope| {
        scope.spawn(move || {
            let mut client = BufWriter::with_capacity(1 << 20, client);
            copy(&mut repeat(0).take(BYTES), &mut client).unwrap();
        });
        let mut server = BufReader::with_capacity(1 << 20, server);
        assert_eq!(copy(&mut server, &mut sink()).unwrap(), BYTES);
    });
    assert_eq!(rig.weir.metric("weir_bytes_total", &[]), BYTES);
    rig.end();
}
