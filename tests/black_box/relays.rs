// SPDX-License-Identifier: Apache-2.0
//! What holds in every relay: resets, back-pressure, urgent data, every byte of a long stream.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::harness::rig::{Counted, Rig, until_stopped};
use crate::harness::{Random, check, expect_eof, expect_reset, receive, rounds, send, until};

/// Each relay as keys of a profile; `auto` so that it changes its mind often.
pub(crate) const RELAYS: [(&str, &str); 4] = [
    ("copy", "relay: { mode: copy }"),
    ("splice", "relay: { mode: splice }"),
    (
        "auto",
        "relay: { mode: auto, splice_after_bytes: 30000, splice_fullness_percent: 5, \
         splice_short_bytes: 8192, sockmap_after_messages: 2 }",
    ),
    ("sockmap", "relay: { mode: sockmap }"),
];

/// RL4, RL5, IO4: a reset of either end arrives at the other end as a reset, wherever it happens,
/// and what was on its way then is seen by nobody else, although there is but one pipe.
#[test]
fn reset_is_passed_on_and_its_pipe_is_discarded() {
    for (relay, profile) in RELAYS {
        let rig = Rig::with(&format!("{profile}\nlimits: {{ pipes_max: 1 }}"));
        let pipes = rig.weir.descriptors("pipe:");
        let mut random = Random::new(4);
        for round in 0..300 {
            let (client, server) = rig.pair_in(relay);
            let (mut sender, mut other) =
                if round % 2 == 0 { (client, server) } else { (server, client) };
            let before = random.below(200_000);
            scope(|scope| {
                scope.spawn(|| {
                    send(&mut sender, round, before).unwrap();
                    SockRef::from(&sender).set_linger(Some(Duration::ZERO)).unwrap();
                    drop(sender);
                });
                let came = receive(&mut other, round, before + 1);
                assert!(came.is_err(), "{relay} {round}: EOF after {came:?} of {before} bytes");
            });
        }
        // An upstream may reset before weir has looked at its answer.
        let reasons = ["connect_failed", "downstream_reset", "upstream_reset"];
        let resets = || reasons.map(|reason| rig.weir.closed(reason)).iter().sum::<u64>();
        until("every reset is counted", || resets() == 300);
        let left = rig.weir.descriptors("pipe:") - pipes;
        assert!(left <= 2, "{relay}: {left} ends of pipes where one pipe is allowed");
        rig.end();
    }
}

/// RL4, RL5: a reset stays a reset behind a send that waits for room: that send swallows the error,
/// and what is received next looks like FIN. The pipe that was full then is not used again.
#[test]
fn reset_behind_a_blocked_send_is_no_end_of_stream() {
    for (relay, profile) in RELAYS {
        let rig = Rig::with(profile);
        let pipes = rig.weir.descriptors("pipe:");
        for round in 0..100 {
            let (client, server) = rig.pair_in(relay);
            let (mut writer, mut other) =
                if round % 2 == 0 { (client, server) } else { (server, client) };
            fill(&writer);
            scope(|scope| {
                scope.spawn(|| expect_reset(&mut writer));
                other.write_all(b"an answer that is not whole").unwrap();
                SockRef::from(&other).set_linger(Some(Duration::ZERO)).unwrap();
                drop(other);
            });
        }
        let resets = || rig.weir.closed("downstream_reset") + rig.weir.closed("upstream_reset");
        until("every reset is counted", || resets() == 100);
        let (mut client, mut server) = rig.pair();
        send(&mut client, 7, 100_000).unwrap();
        check(&mut server, 7, 100_000);
        drop((client, server));
        let left = rig.weir.descriptors("pipe:") - pipes;
        assert!(left <= 4, "{relay}: {left} ends of pipes of dead flows are left");
        rig.end();
    }
}

/// IO4: FIN and RST arrive within 100 ms, although receives wait on both sockets.
#[test]
fn end_of_a_flow_arrives_within_100_ms() {
    for (relay, profile) in RELAYS {
        let rig = Rig::with(profile);
        let mut waits: Vec<Duration> = (0..40)
            .map(|round| {
                let (client, server) = rig.pair_in(relay);
                let (mut ends, mut other) =
                    if round % 2 == 0 { (client, server) } else { (server, client) };
                send(&mut ends, round, 100).unwrap();
                check(&mut other, round, 100);
                let resets = round % 4 < 2;
                if resets {
                    SockRef::from(&ends).set_linger(Some(Duration::ZERO)).unwrap();
                }
                let began = Instant::now();
                drop(ends);
                if resets {
                    expect_reset(&mut other)
                } else {
                    expect_eof(&other)
                }
                began.elapsed()
            })
            .collect();
        waits.sort_unstable();
        // A machine that is busy with others may keep anybody waiting now and then.
        assert!(waits[30] < Duration::from_millis(100), "{relay}: {waits:?}");
        rig.end();
    }
}

/// RL4: a reset is passed on at once although nothing is read from who sent it: because the other end
/// does not read, or because FIN has come before.
#[test]
fn reset_behind_a_pause_is_passed_on_within_a_second() {
    for (relay, profile) in RELAYS {
        let rig = Rig::with(profile);
        for round in 0..8 {
            let (client, server) = rig.pair_in(relay);
            let (sender, mut reader) =
                if round % 2 == 0 { (client, server) } else { (server, client) };
            let has_stalled = round / 2 % 2 == 0;
            if has_stalled {
                fill(&sender);
            } else {
                sender.shutdown(Shutdown::Write).unwrap();
                expect_eof(&reader);
            }
            // The pause has only begun, or lasts.
            std::thread::sleep(Duration::from_millis(100 * (round & 4)));
            let began = Instant::now();
            SockRef::from(&sender).set_linger(Some(Duration::ZERO)).unwrap();
            drop(sender);
            let resets = || rig.weir.closed("downstream_reset") + rig.weir.closed("upstream_reset");
            until("the reset is counted", || resets() == round + 1);
            until("both sockets are gone", || rig.net.sockets().is_empty());
            let late = began.elapsed();
            assert!(late < Duration::from_secs(1), "{relay} {round}: after {late:?}");
            if has_stalled {
                expect_reset(&mut reader);
            } else {
                // Behind FIN a read says EOF for ever.
                until("the reset arrives", || reader.take_error().unwrap().is_some());
            }
        }
        rig.end();
    }
}

/// Writes until both sockets and what weir holds are full: nobody reads at the other end.
fn fill(mut writer: &TcpStream) {
    writer.set_nonblocking(true).unwrap();
    let mut taken = 0;
    until("the writer is stopped", || {
        let before = taken;
        while let Ok(bytes) = writer.write(&[1; 65536]) {
            taken += bytes;
        }
        taken > 0 && taken == before
    });
    writer.set_nonblocking(false).unwrap();
}

/// RL2: the last block and FIN in one segment, after the other direction has ended.
#[test]
fn last_block_that_comes_with_fin_is_delivered() {
    for (relay, profile) in RELAYS {
        let rig = Rig::with(profile);
        for seed in 0..200 {
            let (mut client, mut server) = rig.pair_in(relay);
            client.shutdown(Shutdown::Write).unwrap();
            expect_eof(&server);
            // Corked, data and FIN leave together.
            SockRef::from(&server).set_tcp_cork(true).unwrap();
            send(&mut server, seed, 700).unwrap();
            drop(server);
            check(&mut client, seed, 700);
            expect_eof(&client);
        }
        until("all finished", || rig.weir.closed("finished") == 200);
        rig.end();
    }
}

/// RL3, SM10, IO3: a reader that stops makes the writer stop within bounds, and keeps it stopped; memory
/// stays as it is and weir sleeps; then everything arrives. One reader takes nothing from the start, the
/// other one stops after it has read as fast as it could, when every buffer has grown: 12 of the 16 MB are
/// then the buffers of the four sockets, and weir's own part is its window.
#[test]
fn stalled_reader_stops_the_writer_and_loses_nothing() {
    in_every_relay(|relay, profile| {
        let rig = Rig::with(profile);
        rig.net.limit_buffers();
        let before = rig.weir.anonymous_bytes();
        let (cold, warm) = (rig.pair_in(relay), rig.pair_in(relay));
        let flows = [(cold, 0), (warm, 64 * MB)];
        let sent = [const { AtomicU64::new(0) }; 2];
        scope(|scope| {
            for (((client, server), read), sent) in flows.iter().zip(&sent) {
                client.set_write_timeout(Some(2 * STALL)).unwrap();
                scope.spawn(|| {
                    let mut counted = Counted(client, sent);
                    send(&mut counted, 5, *read).unwrap();
                    send(&mut counted, 3, STALLED_BYTES).unwrap();
                });
                check(&mut &*server, 5, *read);
            }
            let taken = || sent.each_ref().map(|sent| sent.load(Ordering::Relaxed));
            for sent in &sent {
                until_stopped(sent);
            }
            let (stopped, held) = (taken(), rig.net.socket_bytes());
            let (cpu, user) = (rig.weir.cpu(), rig.weir.anonymous_bytes());
            std::thread::sleep(STALL);
            let cpu = rig.weir.cpu() - cpu;
            assert!(cpu < STALL / 20, "{relay}: {cpu:?} of CPU for nothing");
            assert_eq!(taken(), stopped, "{relay}: they stay stopped");
            for (stopped, (_, read)) in stopped.into_iter().zip(&flows) {
                let ahead = stopped - read;
                assert!(
                    ahead < 16 * MB,
                    "{relay}: {ahead} bytes ahead of a reader that has stopped"
                );
            }
            let (now, still) = (rig.net.socket_bytes(), rig.weir.anonymous_bytes());
            assert!(now < held + MB, "{relay}: sockets grew from {held} to {now} bytes");
            assert!(still < user + MB, "{relay}: user memory grew from {user} to {still} bytes");
            let grown = still.saturating_sub(before);
            assert!(grown < BULK_POOL + 4 * MB, "{relay}: user memory grew by {grown} bytes");
            flows.iter().for_each(|((_, server), _)| check(&mut &*server, 3, STALLED_BYTES));
        });
        drop(flows);
        rig.end();
    });
}

/// RL13: an urgent byte stays in its place or is left out, and the stream goes on.
#[test]
fn urgent_byte_never_stops_the_stream() {
    for (relay, profile) in RELAYS {
        let rig = Rig::with(profile);
        let (mut client, mut server) = rig.pair();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            server.read_to_end(&mut all).unwrap();
            all
        });
        for _ in 0..20 {
            client.write_all(&[b'a'; 40_000]).unwrap();
            assert_eq!(SockRef::from(&client).send_out_of_band(b"!").unwrap(), 1);
            client.write_all(&[b'b'; 40_000]).unwrap();
        }
        client.shutdown(Shutdown::Write).unwrap();
        let all = reader.join().unwrap();
        let urgent = all.iter().filter(|byte| **byte == b'!').count();
        assert_eq!(all.len() - urgent, 20 * 80_000, "{relay}");
        expect_eof(&client);
        drop(client);
        rig.end();
    }
}

/// Every word of a long stream, both ways at once; 20 GB with `WEIR_TEST_FULL=1`. Bulk leaves the kernel
/// at once: for what stays there see `sockmap::long_talk_is_whole_word_by_word`.
#[test]
fn long_stream_is_whole_word_by_word() {
    let bytes = rounds(2_000 * MB, 20_000 * MB);
    in_every_relay(|relay, profile| {
        let rig = Rig::with(profile);
        let (client, server) = rig.pair_in(relay);
        scope(|scope| {
            for (seed, mut stream) in [(1, &client), (2, &server)] {
                scope.spawn(move || {
                    send(&mut stream, seed, bytes / 2).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                });
            }
            for (seed, mut stream) in [(1, &server), (2, &client)] {
                scope.spawn(move || {
                    check(&mut stream, seed, bytes / 2);
                    expect_eof(stream);
                });
            }
        });
        let spliced = rig.weir.metric("weir_bytes_total", &["relay=\"splice\""]);
        let expected = if matches!(relay, "copy" | "sockmap") { 0 } else { bytes / 4 };
        assert!(spliced >= expected, "{relay}: {spliced} bytes were spliced");
        drop((client, server));
        rig.end();
    });
}

/// In all at once: most of the time of what is done so is waiting.
fn in_every_relay(test: impl Fn(&'static str, &'static str) + Sync) {
    scope(|scope| {
        for (relay, profile) in RELAYS {
            let test = &test;
            scope.spawn(move || test(relay, profile));
        }
    });
}

const MB: u64 = 1 << 20;
/// Of a worker, for all its flows; bulk touches all of it.
const BULK_POOL: u64 = 64 * (64 << 10);
/// How long a reader stops: whatever fills slowly would show.
const STALL: Duration = Duration::from_secs(30);
/// More than any path may hold.
const STALLED_BYTES: u64 = 50 * MB;
