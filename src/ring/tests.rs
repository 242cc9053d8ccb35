// SPDX-License-Identifier: Apache-2.0
//! The ring against the real kernel, over loopback.
#![expect(clippy::indexing_slicing, clippy::panic, reason = "tests may")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::*;
use crate::profile;
use crate::sys::socket;

/// A ring with a batch, and the words to await events.
pub(super) struct Bench {
    batch: Batch,
    pub(super) ring: Ring,
}

impl Bench {
    pub(super) fn open() -> Bench {
        Bench::with(&BUFFERS)
    }

    fn with(buffers: &profile::Buffers) -> Bench {
        let ring = Ring::open(Setup {
            buffers,
            dial: DialOptions::new(&sockets(), None),
            flows_max: FLOWS_MAX,
            ring: &RING,
        });
        Bench { batch: Batch::new(), ring: ring.unwrap() }
    }

    /// The next event of this kind; an event of another kind fails the test.
    pub(super) fn next(&mut self, kind: Kind) -> Event {
        let event = self.any(PATIENCE).unwrap_or_else(|| panic!("never: {kind:?}"));
        assert_eq!(event.token.kind(), Some(kind), "{event:?}");
        event
    }

    fn any(&mut self, within: Duration) -> Option<Event> {
        let began = Instant::now();
        loop {
            if let Some(event) = self.batch.next() {
                return Some(event);
            }
            let left = within.checked_sub(began.elapsed())?;
            self.ring.turn(Some(left), &mut self.batch).unwrap();
        }
    }

    /// Lets the kernel work through everything that can be done now; whatever comes fails.
    fn assert_silent(&mut self) {
        for _ in 0..8 {
            self.ring.turn(Some(Duration::from_millis(1)), &mut self.batch).unwrap();
            assert_eq!(self.batch.next(), None);
        }
    }

    /// An adopted downstream socket in `slot`, and its peer.
    pub(super) fn joined(&mut self, slot: u32) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        self.ring.adopt(FlowId::new(slot), listener.accept().unwrap().0.into());
        peer
    }

    fn bytes(&self, event: Event) -> Vec<u8> {
        let segment = Segment { buffer: event.buffer.unwrap(), offset: 0, len: 1 };
        let len = usize::try_from(event.result).unwrap();
        // SAFETY: the event gave us the buffer with `len` bytes in it, and it is not recycled yet.
        unsafe { std::slice::from_raw_parts(self.ring.address(segment), len) }.to_vec()
    }
}

pub(super) fn token(kind: Kind, slot: u32, generation: u32) -> Token {
    Token::new(kind, FlowId::new(slot), generation)
}

fn sockets() -> profile::Sockets {
    profile::Sockets {
        busy_poll: Duration::ZERO,
        congestion: None,
        keepalive: None,
        nodelay: true,
        receive_buffer_bytes: 0,
        send_buffer_bytes: 0,
        user_timeout: Duration::ZERO,
    }
}

/// A listener whose accept queue is full: the kernel drops every further SYN. The streams keep it
/// so.
fn black_hole() -> (socket2::Socket, Vec<TcpStream>, SocketAddr) {
    let listener =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let addr = listener.local_addr().unwrap().as_socket().unwrap();
    let fill = |_| TcpStream::connect_timeout(&addr, Duration::from_millis(200)).ok();
    let fillers: Vec<TcpStream> = (0..4).map_while(fill).collect();
    assert!(fillers.len() < 4, "the queue never filled");
    (listener, fillers, addr)
}

const BUFFERS: profile::Buffers =
    profile::Buffers { bulk_count: 4, bulk_bytes: 65536, small_count: 16, small_bytes: 4096 };
const FLOWS_MAX: u32 = 64;
const PATIENCE: Duration = Duration::from_secs(10);
const RING: profile::Ring = profile::Ring { completions: 256, entries: 64, spin: Duration::ZERO };

#[test]
fn cancel_right_behind_a_dial_ends_it_even_where_no_answer_comes() {
    let mut bench = Bench::open();
    let (_listener, _fillers, addr) = black_hole();
    for generation in 0..20 {
        let dial = token(Kind::Connect, 3, generation);
        bench.ring.dial(dial, addr, None);
        bench.ring.cancel(dial);
        let event = bench.next(Kind::Connect);
        assert_eq!((event.token, event.result), (dial, -libc::ECANCELED));
        bench.ring.close(FlowId::new(3), Side::Upstream, true);
        bench.assert_silent();
    }
}
