// SPDX-License-Identifier: Apache-2.0
//! Steps of pipes between two sockets in their slots, and what else goes on with them.

use super::*;
use crate::op::Readiness;

/// Both sockets of flow 0, with descriptors lent, and their peers.
fn spliced(bench: &mut Bench) -> (TcpStream, TcpStream) {
    let downstream = bench.joined(0);
    let upstream = bench.joined(FLOWS_MAX);
    for (side, kind) in
        [(Side::Downstream, Kind::InstallDownstream), (Side::Upstream, Kind::InstallUpstream)]
    {
        bench.ring.install(token(kind, 0, 1), side);
        assert_eq!(bench.next(kind).result, 0);
    }
    (downstream, upstream)
}

fn step(bench: &mut Bench, held_bytes: u32, room_bytes: u32) -> (i32, i32) {
    let token = token(Kind::SpliceDownstream, 0, 1);
    bench.ring.splice(token, Side::Downstream, held_bytes, room_bytes);
    let (came, Spliced { drained, filled }) = bench.ring.next_spliced().unwrap();
    assert_eq!(came, token);
    (filled, drained)
}

#[test]
fn bytes_go_through_the_pipe_and_eof_is_told() {
    let mut bench = Bench::open();
    let (mut downstream, mut upstream) = spliced(&mut bench);
    assert_eq!(step(&mut bench, 0, 1000), (-libc::EAGAIN, -libc::EAGAIN));
    downstream.write_all(&pattern(5000)).unwrap();
    let readable = token(Kind::AwaitDownstream, 0, 1);
    bench.ring.await_ready(readable, Side::Downstream, Readiness::Readable);
    bench.next(Kind::AwaitDownstream);
    assert_eq!(step(&mut bench, 0, 4000), (4000, 4000));
    assert_eq!(step(&mut bench, 0, 4000), (1000, 1000));
    let mut came = vec![0; 5000];
    upstream.read_exact(&mut came).unwrap();
    assert!(came == pattern(5000));
    drop(downstream);
    bench.ring.await_ready(readable, Side::Downstream, Readiness::Readable);
    bench.next(Kind::AwaitDownstream);
    assert_eq!(step(&mut bench, 0, 4000), (0, -libc::EAGAIN));
    bench.ring.close(FlowId::new(0), Side::Upstream, false);
    bench.ring.turn(Some(Duration::ZERO), &mut bench.batch).unwrap();
    // The descriptor that was lent kept nothing open.
    assert_eq!(upstream.read(&mut came).unwrap(), 0);
}

/// Behind an urgent mark splice says EOF once FIN has come, although bytes wait there.
#[test]
fn eof_at_an_urgent_mark_is_not_believed() {
    let mut bench = Bench::open();
    let (downstream, _upstream) = spliced(&mut bench);
    socket2::SockRef::from(&downstream).send_out_of_band(b"!").unwrap();
    (&downstream).write_all(b"behind").unwrap();
    downstream.shutdown(std::net::Shutdown::Write).unwrap();
    let began = Instant::now();
    while step(&mut bench, 0, 1000).0 == -libc::EAGAIN
        && began.elapsed() < Duration::from_millis(200)
    {
        thread::yield_now();
    }
    assert_eq!(step(&mut bench, 0, 1000).0, -libc::EAGAIN, "neither bytes nor EOF");
}

/// Without waiting is for the step alone: a send that waits beside it still sends everything.
#[test]
fn send_that_waits_is_not_cut_short_by_steps_beside_it() {
    let mut bench = Bench::open();
    let (downstream, mut upstream) = spliced(&mut bench);
    let segments: Vec<Segment> = (0..SEGMENTS)
        .map(|id| Segment { buffer: BufferId(id), offset: 0, len: BUFFERS.small_bytes })
        .collect();
    let mut wanted = 0;
    // Until one waits: the peer does not read.
    let sent = token(Kind::SendUpstream, 0, 1);
    loop {
        bench.ring.send(sent, Side::Downstream, segments.iter().copied());
        wanted += i32::from(SEGMENTS) * BUFFERS.small_bytes.cast_signed();
        let Some(event) = bench.any(Duration::from_millis(100)) else { break };
        assert_eq!(event.result, i32::from(SEGMENTS) * BUFFERS.small_bytes.cast_signed());
    }
    upstream.write_all(b"the other way").unwrap();
    let reader = thread::spawn(move || {
        let mut all = vec![0; usize::try_from(wanted).unwrap()];
        (&downstream).read_exact(&mut all).unwrap();
    });
    let whole = loop {
        step(&mut bench, 0, 1000);
        if let Some(event) = bench.any(Duration::from_millis(1)) {
            break event.result;
        }
    };
    assert_eq!(whole, i32::from(SEGMENTS) * BUFFERS.small_bytes.cast_signed());
    reader.join().unwrap();
}

const SEGMENTS: u16 = 4;
