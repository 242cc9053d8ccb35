// SPDX-License-Identifier: Apache-2.0
//! How a ring waits: it spins, sleeps, lets events gather; and brings every one of them.

use super::*;

#[test]
fn spinning_ring_brings_every_event() {
    let ring = profile::Ring { spin: Duration::from_micros(50), ..RING };
    let mut bench = Bench::with(sockets(), ring);
    let mut peer = bench.joined(0);
    let (go, gate) = std::sync::mpsc::channel();
    let writer = thread::spawn(move || {
        while gate.recv().is_ok() {
            peer.write_all(b"x").unwrap();
        }
    });
    bench.receive(0, 1_000_000);
    for _ in 0..500 {
        go.send(()).unwrap();
        let event = bench.next(Kind::ReceiveDownstream);
        assert_eq!((event.result, event.more), (1, true));
        bench.ring.recycle(event.buffer.unwrap());
    }
    drop(go);
    writer.join().unwrap();
}

/// Events that come close together are brought by one wait.
#[test]
fn coalescing_ring_wakes_once_for_events_that_come_together() {
    // Longer than a writer may be kept from its CPU.
    let ring = profile::Ring { coalesce: Duration::from_millis(500), ..RING };
    let mut bench = Bench::with(sockets(), ring);
    assert!(bench.ring.features().coalesce, "needs Linux 6.12");
    let peers = [0, 1].map(|slot| bench.joined(slot));
    for slot in [0, 1] {
        bench.receive(slot, 1_000_000);
    }
    bench.assert_silent();
    let before = bench.ring.enters();
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let writer = thread::spawn(move || {
        gate.recv().unwrap();
        peers.map(|mut peer| {
            peer.write_all(b"x").unwrap();
            peer
        })
    });
    go.send(()).unwrap();
    for _ in 0..2 {
        assert_eq!(bench.next(Kind::ReceiveDownstream).result, 1);
    }
    assert_eq!(bench.ring.enters() - before, 1);
    drop(writer.join().unwrap());
}

/// A wait that has an end of its own is not made longer.
#[test]
fn coalescing_ring_ends_a_short_wait_in_time() {
    let ring = profile::Ring { coalesce: Duration::from_secs(60), ..RING };
    let mut bench = Bench::with(sockets(), ring);
    let mut peer = bench.joined(0);
    bench.receive(0, 1_000_000);
    assert_eq!(bench.any(Duration::from_millis(1)), None);
    peer.write_all(b"x").unwrap();
    assert_eq!(bench.next(Kind::ReceiveDownstream).result, 1);
}

/// A turn that may not wait does not spin either.
#[test]
fn spinning_ring_without_patience_returns_at_once() {
    let ring = profile::Ring { spin: Duration::from_secs(60), ..RING };
    let mut bench = Bench::with(sockets(), ring);
    let mut peer = bench.joined(0);
    bench.receive(0, 1_000_000);
    let began = Instant::now();
    bench.ring.turn(Some(Duration::ZERO), &mut bench.batch).unwrap();
    assert_eq!(bench.ring.next(&mut bench.batch), None);
    assert!(began.elapsed() < PATIENCE);
    // It has run what the kernel had deferred all the same.
    peer.write_all(b"x").unwrap();
    while bench.ring.next(&mut bench.batch).is_none() {
        bench.ring.turn(Some(Duration::ZERO), &mut bench.batch).unwrap();
    }
}
