// SPDX-License-Identifier: Apache-2.0
//! What a turn of the ring costs: with nothing to do, and with bytes through a provided buffer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use weir::op::{FlowId, Kind, Pool, Segment, Side, Token};
use weir::profile::Profile;
use weir::ring::{Batch, DialOptions, Event, Ring, Setup, SpliceLimits};

/// The kernel takes it for a signed number (`io_recv_finish` in io_uring/net.c).
const CREDIT_BYTES: u32 = 1 << 30;
const SLOT: FlowId = FlowId::new(0);

/// A ring that holds one end of a socket pair.
struct Lab {
    batch: Batch,
    peer: UnixStream,
    ring: Ring,
}

impl Lab {
    fn open() -> Lab {
        let profile = Profile::default();
        let dial = DialOptions::new(&profile.sockets, None);
        let setup = Setup {
            buffers: &profile.buffers,
            dial,
            flows_max: 4,
            headers: 0,
            ring: &profile.ring,
            splice: SpliceLimits::default(),
        };
        let mut ring = Ring::open(setup).expect("a ring (`weir check` says why not)");
        let (ours, peer) = UnixStream::pair().expect("a socket pair");
        ring.adopt(SLOT, ours.into());
        Lab { batch: Batch::new(), peer, ring }
    }

    fn next(&mut self, kind: Kind) -> Event {
        loop {
            while let Some(event) = self.ring.next(&mut self.batch) {
                if event.token.kind() == Some(kind) {
                    return event;
                }
            }
            self.ring.turn(Some(Duration::from_secs(1)), &mut self.batch).expect("a turn");
        }
    }

    /// Receives, for longer than most benches last.
    fn receive(&mut self) {
        let token = Token::new(Kind::ReceiveDownstream, SLOT, 0);
        self.ring.receive(token, Side::Downstream, CREDIT_BYTES, Pool::Small);
    }

    /// A message to the ring, and back to where it came from.
    fn echo(&mut self) {
        self.peer.write_all(&[7; 64]).expect("room");
        let event = self.next(Kind::ReceiveDownstream);
        let buffer = event.buffer.expect("a buffer");
        if !event.more {
            self.receive();
        }
        let segment = Segment { buffer, offset: 0, len: event.result.cast_unsigned() };
        let token = Token::new(Kind::SendUpstream, SLOT, 0);
        self.ring.send(token, Side::Downstream, std::iter::once(segment));
        self.next(Kind::SendUpstream);
        self.ring.recycle(buffer);
        self.peer.read_exact(&mut [0; 64]).expect("the echo");
    }
}

fn ring(criterion: &mut Criterion) {
    let mut lab = Lab::open();
    criterion.bench_function("ring/empty turn", |bencher| {
        bencher.iter(|| lab.ring.turn(Some(Duration::ZERO), &mut lab.batch));
    });
    lab.receive();
    criterion.bench_function("ring/64 bytes in and out", |bencher| bencher.iter(|| lab.echo()));
}

criterion_group!(benches, ring);
criterion_main!(benches);
