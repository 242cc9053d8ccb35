// SPDX-License-Identifier: Apache-2.0
//! The verdict program against real sockets. Needs root; skipped without, but where `CI` is set.
#![expect(clippy::indexing_slicing, reason = "a test may panic")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::*;
use peer::Peer;

mod peer;

/// With room for a few pairs; `None` where the kernel lets nobody in.
fn sockmap() -> Option<Sockmap> {
    match Sockmap::load(2, 256 << 10) {
        Ok(sockmap) => Some(sockmap),
        Err(error) if std::env::var_os("CI").is_none() => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Both ends of a connection over loopback.
fn connected() -> [TcpStream; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let ends = [dialled, listener.accept().unwrap().0];
    for end in &ends {
        end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    }
    ends
}

fn until(mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(10), "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn read(from: &mut TcpStream, bytes: usize) -> Vec<u8> {
    let mut read = vec![0; bytes];
    from.read_exact(&mut read).unwrap();
    read
}

fn stream(bytes: u16) -> Vec<u8> {
    (0..bytes / 2).flat_map(u16::to_be_bytes).collect()
}

/// SM1 to SM6: what weir tries at start, ten times.
#[test]
fn kernel_does_what_flows_rely_on() {
    let Some(mut sockmap) = sockmap() else { return };
    for _ in 0..10 {
        sockmap.prove(256 << 10).unwrap();
    }
    assert_eq!(sockmap.room(), 2);
}

/// As above, with 100 MB each way; `cargo test --release --lib sockmap -- --ignored`.
#[test]
#[ignore = "takes several seconds"]
fn kernel_does_it_with_a_hundred_megabytes() {
    let Some(mut sockmap) = sockmap() else { return };
    sockmap.prove(100 << 20).unwrap();
}

/// SM8: bytes that came before, some of them half read, are delivered before those that follow.
#[test]
fn bytes_that_wait_unread_when_two_sockets_are_joined_go_first() {
    let Some(mut sockmap) = sockmap() else { return };
    let ([mut client, mut downstream], [upstream, mut server]) = (connected(), connected());
    client.write_all(b"read; unread; ").unwrap();
    assert_eq!(read(&mut downstream, 6), b"read; ");
    let pair = sockmap.join(downstream.as_fd(), upstream.as_fd()).unwrap();
    assert_eq!(read(&mut server, 8), b"unread; ");
    client.write_all(b"later").unwrap();
    assert_eq!(read(&mut server, 5), b"later");
    let progress = sockmap.progress(&pair, Side::Downstream);
    assert_eq!((progress.forwarded, progress.passed, progress.trimmed), (13, 0, 6));
    assert_eq!(sockmap.backlog(&pair, Side::Downstream), Some(0));
    drop((downstream, upstream));
    sockmap.forget(pair);
}

/// SM9: a socket that has had a FIN is left as it was, with all its bytes, and its partner too.
#[test]
fn socket_with_a_fin_is_refused_and_its_bytes_stay_readable() {
    let Some(mut sockmap) = sockmap() else { return };
    let ([mut client, mut downstream], [mut upstream, mut server]) = (connected(), connected());
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(downstream.peek(&mut [0; 1]).unwrap(), 1);
    until(|| sockmap.join(downstream.as_fd(), upstream.as_fd()) == Err(Refused::Kernel));
    assert_eq!(sockmap.room(), 2);
    assert_eq!(read(&mut downstream, 10), b"last words");
    assert_eq!(downstream.read(&mut [0; 1]).unwrap(), 0);
    server.write_all(b"answer").unwrap();
    assert_eq!(read(&mut upstream, 6), b"answer");
}

/// SM7: no parser, with which receives end with EAGAIN that should wait.
#[test]
fn verdict_comes_without_a_parser() {
    let contains = |name: &[u8]| BYTES.windows(name.len()).any(|bytes| bytes == name);
    assert!(contains(b"sk_skb/stream_verdict"));
    assert!(!contains(b"stream_parser"));
}

/// SM11: a verdict that still runs for a pair that is gone finds its number in nobody's hands.
#[test]
fn number_of_a_pair_rests_although_no_other_is_free() {
    let Some(mut sockmap) = sockmap() else { return };
    let ends = [connected(), connected(), connected(), connected()];
    let mut join = |one: usize| sockmap.join(ends[one][0].as_fd(), ends[one + 1][0].as_fd());
    let (first, second) = (join(0).unwrap(), join(2).unwrap());
    let used = [first.index(), second.index()];
    sockmap.forget(first);
    let ends = [connected(), connected()];
    let third = sockmap.join(ends[0][0].as_fd(), ends[1][0].as_fd()).unwrap();
    assert!(!used.contains(&third.index()), "{used:?}, {}", third.index());
    assert_eq!(sockmap.room(), 0);
    drop(ends);
    sockmap.forget(second);
    sockmap.forget(third);
}

/// SM11: no room is an answer, and room comes back.
#[test]
fn full_table_refuses_until_a_pair_is_forgotten() {
    let Some(mut sockmap) = sockmap() else { return };
    let sockets: Vec<_> = (0..3).map(|_| (connected(), connected())).collect();
    let join = |sockmap: &mut Sockmap, index: usize| {
        let ([_, downstream], [upstream, _]) = &sockets[index];
        sockmap.join(downstream.as_fd(), upstream.as_fd())
    };
    let first = join(&mut sockmap, 0).unwrap();
    let second = join(&mut sockmap, 1).unwrap();
    assert_eq!(join(&mut sockmap, 2), Err(Refused::Full));
    sockmap.forget(first);
    let third = join(&mut sockmap, 2).unwrap();
    sockmap.forget(second);
    sockmap.forget(third);
}

/// What is passed while redirected segments wait to be sent on the same socket is charged to nobody:
/// so once one direction is passed for its reader's sake, nothing is redirected into its source.
#[test]
fn direction_whose_partner_is_behind_is_passed_too() {
    let Some(mut sockmap) = sockmap() else { return };
    let ([mut client, downstream], [mut upstream, mut server]) = (connected(), connected());
    let pair = sockmap.join(downstream.as_fd(), upstream.as_fd()).unwrap();
    server.write_all(b"before").unwrap();
    assert_eq!(read(&mut client, 6), b"before");
    client.set_nonblocking(true).unwrap();
    until(|| {
        while client.write(&[1; 16384]).is_ok() {}
        sockmap.progress(&pair, Side::Downstream).pass.is_some()
    });
    server.write_all(b"after").unwrap();
    assert_eq!(read(&mut upstream, 5), b"after");
    let progress = sockmap.progress(&pair, Side::Upstream);
    assert_eq!((progress.forwarded, progress.passed), (6, 5));
    assert_eq!(progress.pass, Some(Pass::Partner));
}

/// Segments that overlap what came before, as a kernel under memory pressure sends them, are cut:
/// those that are redirected and those that are passed, over the end of the sequence numbers, and
/// when nothing but a FIN is left of them.
#[test]
fn overlapping_segments_are_trimmed_by_sequence_number() {
    let Some(mut sockmap) = sockmap() else { return };
    // In a thread of its own, because it leaves the namespace.
    let test = move || {
        let (mut peer, mut downstream) = Peer::connected();
        let [upstream, mut server] = connected();
        downstream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let pair = sockmap.join(downstream.as_fd(), upstream.as_fd()).unwrap();
        let bytes = stream(20_000);
        peer.send(0, &bytes[..1000], false);
        peer.send(500, &bytes[500..1500], false);
        peer.send(0, &bytes[..1400], false);
        peer.send(1, &bytes[1..1460], false);
        peer.send(1499, &bytes[1499..2500], false);
        assert_eq!(read(&mut server, 2500), bytes[..2500]);
        let progress = sockmap.progress(&pair, Side::Downstream);
        assert_eq!((progress.forwarded, progress.trimmed), (2500, 501));
        sockmap.pass(&pair, Side::Downstream);
        peer.send(2000, &bytes[2000..3000], false);
        peer.send(2999, &bytes[2999..3001], false);
        assert_eq!(read(&mut downstream, 501), bytes[2500..3001]);
        peer.send(2500, &bytes[2500..3001], true);
        assert_eq!(downstream.read(&mut [0; 1]).unwrap(), 0);
        let progress = sockmap.progress(&pair, Side::Downstream);
        assert_eq!((progress.forwarded, progress.passed), (2500, 501));
        assert!(!progress.is_broken);
        server.set_nonblocking(true).unwrap();
        assert!(server.read(&mut [0; 1]).is_err());
    };
    std::thread::spawn(test).join().unwrap();
}
