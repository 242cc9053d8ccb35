// SPDX-License-Identifier: Apache-2.0
//! Much at once: what is asked for, ends and is asked for again between two turns.

use std::os::unix::net::UnixStream;

use super::*;

#[test]
fn cancel_of_what_ends_later_in_the_same_batch_is_not_repeated() {
    let mut bench = Bench::open();
    for generation in 0..3 {
        let receive = token(Kind::ReceiveDownstream, 0, generation);
        drop(bench.joined(0));
        bench.ring.receive(receive, Side::Downstream, 100, Pool::Small);
        while bench.batch.is_empty() {
            bench.ring.turn(Some(PATIENCE), &mut bench.batch).unwrap();
        }
        bench.ring.cancel(receive);
        assert_eq!(result_of(bench.next(Kind::ReceiveDownstream)), (receive, 0, false));
        bench.assert_silent();
        assert!(bench.ring.io.submission().is_empty(), "still asking");
    }
}

#[test]
fn request_that_is_asked_for_again_in_the_same_turn_can_be_cancelled_again() {
    let mut bench = Bench::open();
    let _peer = bench.joined(0);
    let receive = token(Kind::ReceiveDownstream, 0, 1);
    bench.receive(0, 100);
    bench.ring.cancel(receive);
    for _ in 0..3 {
        let event = bench.next(Kind::ReceiveDownstream);
        assert_eq!(result_of(event), (receive, -libc::ECANCELED, false));
        bench.receive(0, 100);
        bench.ring.cancel(receive);
    }
    assert_eq!(bench.receive_all(), (vec![], -libc::ECANCELED));
    bench.assert_silent();
}

#[test]
fn gathered_sends_beyond_the_room_for_their_headers_stay_apart() {
    let ring = profile::Ring { completions: 2048, entries: 1024, ..RING };
    let mut bench = Bench::with(sockets(), ring);
    let mut sink = bench.joined(1);
    let text = bench.ring.lend_header(&pattern(128)).unwrap();
    // No divisor of the room, so that whoever takes another's place shows.
    let piece = |index: u32| [0, 1].map(|half| 2 * (index % 61) + half);
    let send = token(Kind::SendUpstream, 1, 1);
    for index in 0..1000 {
        let byte = |offset| Segment { offset, len: 1, ..text };
        bench.ring.send(send, Side::Downstream, piece(index).into_iter().map(byte));
    }
    for _ in 0..1000 {
        assert_eq!(bench.next(Kind::SendUpstream).result, 2);
    }
    let mut received = vec![0; 2000];
    sink.read_exact(&mut received).unwrap();
    let sent: Vec<u8> =
        (0..1000).flat_map(piece).map(|offset| u8::try_from(offset).unwrap()).collect();
    assert_eq!(received, sent);
}

#[test]
fn adopted_connections_beyond_the_room_for_their_descriptors_all_arrive() {
    let ring = profile::Ring { completions: 1024, entries: 512, ..RING };
    let mut bench = Bench::with(sockets(), ring);
    let mut peers = Vec::new();
    for index in 0..300 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        bench.ring.adopt(FlowId::new(index % FLOWS_MAX), ours.into());
        peers.push(theirs);
    }
    bench.assert_silent();
    // Each slot holds the last that was put there.
    for index in 300 - FLOWS_MAX..300 {
        peers[index as usize].write_all(&index.to_le_bytes()).unwrap();
        bench.receive(index % FLOWS_MAX, 4);
        assert_eq!(bench.receive_all(), (index.to_le_bytes().to_vec(), 0));
    }
}
