// SPDX-License-Identifier: Apache-2.0
//! The ring against the real kernel, over loopback.
#![expect(clippy::indexing_slicing, clippy::panic, reason = "tests may")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::profile;
use crate::sys::socket;

mod closing;
mod refused;
mod same_turn;
mod splicing;
mod waiting;

/// A ring with a batch, and the words to await events.
struct Bench {
    batch: Batch,
    ring: Ring,
}

impl Bench {
    fn open() -> Bench {
        Bench::with(sockets(), RING)
    }

    fn with(sockets: profile::Sockets, ring: profile::Ring) -> Bench {
        let dial = DialOptions::new(&sockets, None);
        let splice = SpliceLimits { flows_max: 2, pipe_bytes: 65536, pipes_max: 2 };
        let (flows_max, headers, ring) = (FLOWS_MAX, 4, &ring);
        let setup = Setup { buffers: &BUFFERS, dial, flows_max, headers, ring, splice };
        Bench { batch: Batch::new(), ring: Ring::open(setup).unwrap() }
    }

    /// The next event of this kind; an event of another kind fails the test.
    fn next(&mut self, kind: Kind) -> Event {
        let event = self.any(PATIENCE).unwrap_or_else(|| panic!("never: {kind:?}"));
        assert_eq!(event.token.kind(), Some(kind), "{event:?}");
        event
    }

    fn any(&mut self, within: Duration) -> Option<Event> {
        let began = Instant::now();
        loop {
            if let Some(event) = self.ring.next(&mut self.batch) {
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
            assert_eq!(self.ring.next(&mut self.batch), None);
        }
    }

    /// An adopted downstream socket in `slot`, and its peer.
    fn joined(&mut self, slot: u32) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        self.ring.adopt(FlowId::new(slot), listener.accept().unwrap().0.into());
        peer
    }

    /// A listener whose connections come as events with `ACCEPT`.
    fn listen(&mut self, into: AcceptInto) -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        self.ring.accept_many(ACCEPT, listener.as_fd(), into);
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    fn receive(&mut self, slot: u32, credit_bytes: u32) {
        let token = token(Kind::ReceiveDownstream, slot, 1);
        self.ring.receive(token, Side::Downstream, credit_bytes, Pool::Small);
    }

    /// What a receive brings until its last event, and the result of that event if it holds no
    /// bytes. The buffers go back.
    fn receive_all(&mut self) -> (Vec<u8>, i32) {
        let mut bytes = Vec::new();
        loop {
            let event = self.next(Kind::ReceiveDownstream);
            if let Some(buffer) = event.buffer {
                bytes.extend(self.bytes(event));
                self.ring.recycle(buffer);
            }
            if !event.more {
                return (bytes, event.result.min(0));
            }
        }
    }

    fn bytes(&self, event: Event) -> Vec<u8> {
        let segment = segment(event);
        // SAFETY: the event gave us the buffer with `len` bytes in it, and it is not recycled yet.
        unsafe { std::slice::from_raw_parts(self.ring.address(segment), segment.len as usize) }
            .to_vec()
    }
}

fn segment(event: Event) -> Segment {
    let len = u32::try_from(event.result).unwrap();
    Segment { buffer: event.buffer.unwrap(), offset: 0, len }
}

fn result_of(event: Event) -> (Token, i32, bool) {
    (event.token, event.result, event.more)
}

/// Bytes that tell their place, so that loss and disorder show.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

/// The end of the stream as its reader sees it.
fn end_of(mut stream: &TcpStream) -> Result<usize, ErrorKind> {
    stream.read(&mut [0; 16]).map_err(|error| error.kind())
}

fn token(kind: Kind, slot: u32, generation: u32) -> Token {
    Token::new(kind, FlowId::new(slot), generation)
}

fn sockets() -> profile::Sockets {
    profile::Profile::default().sockets
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

const ACCEPT: Token = Token::new(Kind::Accept, FlowId::new(2), 0);
const BUFFERS: profile::Buffers =
    profile::Buffers { bulk_count: 4, bulk_bytes: 65536, small_count: 16, small_bytes: 4096 };
const FLOWS_MAX: u32 = 64;
const PATIENCE: Duration = Duration::from_secs(10);
const RING: profile::Ring =
    profile::Ring { coalesce: Duration::ZERO, completions: 256, entries: 64, spin: Duration::ZERO };

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

#[test]
fn probe_gives_back_what_it_used() {
    let mut bench = Bench::open();
    bench.assert_silent();
    assert_eq!((bench.ring.free(Pool::Small), bench.ring.free(Pool::Bulk)), (16, 4));
    let (_listener, addr) = bench.listen(AcceptInto::Slots);
    let _peer = TcpStream::connect(addr).unwrap();
    assert_eq!(result_of(bench.next(Kind::Accept)), (ACCEPT, 0, true));
}

#[test]
fn accepted_connections_fill_the_lower_half_and_no_more() {
    let mut bench = Bench::open();
    let (_listener, addr) = bench.listen(AcceptInto::Slots);
    let peers: Vec<TcpStream> = (0..FLOWS_MAX).map(|_| TcpStream::connect(addr).unwrap()).collect();
    for slot in 0..FLOWS_MAX {
        let event = bench.next(Kind::Accept);
        assert_eq!(event.result.cast_unsigned(), slot);
        let name = bench.ring.peer_name(FlowId::new(slot), Side::Downstream);
        assert_eq!(name, peers[slot as usize].local_addr().ok());
    }
    let _one_too_many = TcpStream::connect(addr).unwrap();
    assert_eq!(result_of(bench.next(Kind::Accept)), (ACCEPT, -libc::ENFILE, false));
    bench.ring.close(FlowId::new(7), Side::Downstream, true);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    bench.ring.accept_one(ACCEPT, listener.as_fd(), AcceptInto::Slots);
    let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    assert_eq!(result_of(bench.next(Kind::Accept)), (ACCEPT, 7, false));
}

#[test]
fn empty_slot_has_no_peer() {
    let mut bench = Bench::open();
    assert_eq!(bench.ring.peer_name(FlowId::new(9), Side::Upstream), None);
}

#[test]
fn cancelled_accept_ends_and_takes_nobody_with_it() {
    let mut bench = Bench::open();
    let (listener, addr) = bench.listen(AcceptInto::Descriptors);
    bench.ring.cancel(ACCEPT);
    assert_eq!(result_of(bench.next(Kind::Accept)), (ACCEPT, -libc::ECANCELED, false));
    let peer = TcpStream::connect(addr).unwrap();
    bench.assert_silent();
    assert_eq!(listener.accept().unwrap().1, peer.local_addr().unwrap());
}

#[test]
fn adopted_connection_lives_in_its_slot_and_its_descriptor_is_closed() {
    let mut bench = Bench::open();
    let (_listener, addr) = bench.listen(AcceptInto::Descriptors);
    let mut peer = TcpStream::connect(addr).unwrap();
    let event = bench.next(Kind::Accept);
    assert!(event.more);
    bench.ring.adopt(FlowId::new(5), socket::accepted(event.result));
    bench.receive(5, 100);
    peer.write_all(b"hello").unwrap();
    let event = bench.next(Kind::ReceiveDownstream);
    assert_eq!(
        (event.token, bench.bytes(event)),
        (token(Kind::ReceiveDownstream, 5, 1), b"hello".to_vec())
    );
    bench.ring.cancel(event.token);
    assert_eq!(bench.receive_all(), (vec![], -libc::ECANCELED));
    bench.ring.close(FlowId::new(5), Side::Downstream, false);
    bench.assert_silent();
    // A second descriptor would keep the connection open.
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(end_of(&peer), Ok(0));
}

#[test]
fn dial_connects_with_one_event_and_names_its_peer() {
    let mut bench = Bench::open();
    for addr in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(addr).unwrap();
        let to = listener.local_addr().unwrap();
        let dial = token(Kind::Connect, 11, 0xffff_fff0);
        bench.ring.dial(dial, to, None);
        assert_eq!(result_of(bench.next(Kind::Connect)), (dial, 0, false));
        assert_eq!(bench.ring.peer_name(FlowId::new(11), Side::Upstream), Some(to));
        let (accepted, _) = listener.accept().unwrap();
        bench.ring.close(FlowId::new(11), Side::Upstream, false);
        bench.assert_silent();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(end_of(&accepted), Ok(0));
    }
}

#[test]
fn refused_dial_says_so_once() {
    let mut bench = Bench::open();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dial = token(Kind::Connect, 0, 1);
    bench.ring.dial(dial, closed, None);
    assert_eq!(result_of(bench.next(Kind::Connect)), (dial, -libc::ECONNREFUSED, false));
    bench.assert_silent();
}

#[test]
fn dial_from_another_address_is_seen_from_there() {
    let mut bench = Bench::open();
    for (to, from) in [("127.0.0.1:0", "127.0.0.9:0"), ("[::1]:0", "[::1]:0")] {
        let from: SocketAddr = from.parse().unwrap();
        let listener = TcpListener::bind(to).unwrap();
        let dial = token(Kind::Connect, 0, 1);
        bench.ring.dial(
            dial,
            listener.local_addr().unwrap(),
            Some(DialFrom { abroad: false, addr: from }),
        );
        let event = bench.next(Kind::Connect);
        if nix::unistd::geteuid().is_root() {
            assert_eq!(event.result, 0);
            assert_eq!(listener.accept().unwrap().1.ip(), from.ip());
        } else {
            assert_eq!(event.result, -libc::EPERM);
        }
        bench.ring.close(FlowId::new(0), Side::Upstream, true);
    }
}

#[test]
fn dial_that_cannot_bind_says_so_once() {
    let mut bench = Bench::open();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap();
    let dial = token(Kind::Connect, 0, 1);
    bench.ring.dial(dial, taken, Some(DialFrom { abroad: false, addr: taken }));
    let refusal = if nix::unistd::geteuid().is_root() { libc::EADDRINUSE } else { libc::EPERM };
    assert_eq!(result_of(bench.next(Kind::Connect)), (dial, -refusal, false));
    bench.assert_silent();
}

#[test]
fn dial_with_an_option_the_kernel_refuses_says_so_once() {
    let congestion = Some("no_such_control".to_owned());
    let mut bench = Bench::with(profile::Sockets { congestion, ..sockets() }, RING);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dial = token(Kind::Connect, 0, 1);
    bench.ring.dial(dial, listener.local_addr().unwrap(), None);
    assert_eq!(result_of(bench.next(Kind::Connect)), (dial, -libc::ENOENT, false));
    bench.assert_silent();
}

#[test]
fn long_chains_stay_whole_in_a_small_queue() {
    let keepalive = profile::Keepalive {
        idle: Duration::from_secs(60),
        interval: Duration::from_secs(5),
        probes: 3,
    };
    let full = profile::Sockets {
        keepalive: Some(keepalive),
        receive_buffer_bytes: 65536,
        send_buffer_bytes: 65536,
        user_timeout: Duration::from_secs(30),
        ..sockets()
    };
    let refused = Some("no_such_control".to_owned());
    for (congestion, result) in [(None, 0), (refused, -libc::ENOENT)] {
        let small = profile::Ring { completions: 256, entries: 8, ..RING };
        let mut bench = Bench::with(profile::Sockets { congestion, ..full.clone() }, small);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        (0..FLOWS_MAX).for_each(|slot| bench.ring.dial(token(Kind::Connect, slot, 1), to, None));
        for _ in 0..FLOWS_MAX {
            assert_eq!(bench.next(Kind::Connect).result, result);
        }
        bench.assert_silent();
    }
}

#[test]
fn receive_ends_by_itself_with_the_buffer_that_uses_up_its_credit() {
    let mut bench = Bench::open();
    assert!(bench.ring.features().receive_limit, "needs Linux 6.17");
    let mut peer = bench.joined(0);
    let sent = pattern(9000);
    peer.write_all(&sent).unwrap();
    bench.receive(0, 4097);
    assert_eq!(bench.receive_all(), (sent[..8192].to_vec(), 0));
    bench.assert_silent();
    bench.receive(0, 4097);
    drop(peer);
    assert_eq!(bench.receive_all(), (sent[8192..].to_vec(), 0));
}

#[test]
fn receive_without_a_limit_goes_on_until_cancelled() {
    let mut bench = Bench::open();
    bench.ring.features.receive_limit = false;
    let mut peer = bench.joined(0);
    bench.receive(0, 1);
    for _ in 0..3 {
        peer.write_all(b"more").unwrap();
        let event = bench.next(Kind::ReceiveDownstream);
        assert_eq!((bench.bytes(event), event.more), (b"more".to_vec(), true));
        bench.ring.recycle(event.buffer.unwrap());
    }
    bench.ring.cancel(token(Kind::ReceiveDownstream, 0, 1));
    assert_eq!(bench.receive_all(), (vec![], -libc::ECANCELED));
    bench.assert_silent();
}

#[test]
fn empty_pool_ends_a_receive_and_what_waited_comes_later() {
    let mut bench = Bench::open();
    let mut peer = bench.joined(0);
    let sent = pattern(200_000);
    let bytes = sent.clone();
    let writer = thread::spawn(move || peer.write_all(&bytes));
    let (mut received, mut dry) = (Vec::new(), 0);
    loop {
        bench.receive(0, 1_000_000);
        let mut held = Vec::new();
        let last = loop {
            let event = bench.next(Kind::ReceiveDownstream);
            held.extend(event.buffer);
            if event.buffer.is_some() {
                received.extend(bench.bytes(event));
            }
            if !event.more {
                break event.result;
            }
        };
        if last == 0 {
            break;
        }
        assert_eq!((last, held.len(), bench.ring.free(Pool::Small)), (-libc::ENOBUFS, 16, 0));
        held.into_iter().for_each(|buffer| bench.ring.recycle(buffer));
        assert_eq!(bench.ring.free(Pool::Small), 16);
        dry += 1;
    }
    assert!(dry > 1 && received == sent, "{dry} times, {} bytes", received.len());
    writer.join().unwrap().unwrap();
}

#[test]
fn gathered_send_keeps_the_order_of_its_segments() {
    let mut bench = Bench::open();
    let (mut source, mut sink) = (bench.joined(0), bench.joined(1));
    let sent = pattern(12 * 4096);
    source.write_all(&sent).unwrap();
    drop(source);
    bench.receive(0, 1_000_000);
    let mut segments = Vec::new();
    loop {
        let event = bench.next(Kind::ReceiveDownstream);
        if event.result == 0 {
            break;
        }
        segments.push(segment(event));
    }
    assert!(segments.len() >= 12);
    let send = token(Kind::SendUpstream, 1, 4);
    bench.ring.send(send, Side::Downstream, segments.iter().copied());
    let total = i32::try_from(sent.len()).unwrap();
    assert_eq!(result_of(bench.next(Kind::SendUpstream)), (send, total, false));
    let mut received = vec![0; sent.len()];
    sink.read_exact(&mut received).unwrap();
    assert_eq!(received, sent);
    let tail = Segment { offset: segments[0].len - 3, len: 3, ..segments[0] };
    bench.ring.send(send, Side::Downstream, std::iter::once(tail));
    assert_eq!(bench.next(Kind::SendUpstream).result, 3);
    sink.read_exact(&mut received[..3]).unwrap();
    let end = segments[0].len as usize;
    assert_eq!(received[..3], sent[end - 3..end]);
}

#[test]
fn cancelled_send_says_how_much_was_taken() {
    let mut bench = Bench::open();
    let (mut source, mut sink) = (bench.joined(0), bench.joined(1));
    source.write_all(&pattern(4096)).unwrap();
    bench.receive(0, 4096);
    let segment = segment(bench.next(Kind::ReceiveDownstream));
    let send = token(Kind::SendUpstream, 1, 4);
    let mut taken: usize = 0;
    let mut blocked = false;
    while !blocked {
        bench.ring.send(send, Side::Downstream, std::iter::repeat_n(segment, 32));
        let done = bench.any(Duration::from_millis(100));
        blocked = done.is_none();
        if blocked {
            bench.ring.cancel(send);
        }
        let event = done.unwrap_or_else(|| bench.next(Kind::SendUpstream));
        assert!(event.result > 0 || event.result == -libc::ECANCELED, "{event:?}");
        taken += usize::try_from(event.result).unwrap_or(0);
    }
    bench.ring.close(FlowId::new(1), Side::Downstream, false);
    let reader = thread::spawn(move || std::io::copy(&mut sink, &mut std::io::sink()));
    bench.assert_silent();
    assert_eq!(reader.join().unwrap().unwrap(), taken as u64);
}

#[test]
fn cancelled_receive_ends_once() {
    let mut bench = Bench::open();
    let _peer = bench.joined(0);
    bench.receive(0, 100);
    bench.ring.cancel(token(Kind::ReceiveDownstream, 0, 1));
    bench.ring.cancel(token(Kind::ReceiveDownstream, 0, 1));
    assert_eq!(bench.receive_all(), (vec![], -libc::ECANCELED));
    bench.assert_silent();
}

#[test]
fn watch_hears_fin_and_a_reset_and_no_byte() {
    let mut bench = Bench::open();
    let mut peer = bench.joined(0);
    let watch = token(Kind::WatchDownstream, 0, 1);
    bench.ring.watch(watch, Side::Downstream);
    peer.write_all(b"unread").unwrap();
    bench.assert_silent();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    let has_error = |event: Event| event.result & i32::from(libc::POLLERR) != 0;
    let fin = bench.next(Kind::WatchDownstream);
    assert!(!has_error(fin) && fin.more, "{fin:?}");
    bench.assert_silent();
    socket2::SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
    drop(peer);
    let reset = bench.next(Kind::WatchDownstream);
    assert!(has_error(reset) && reset.more, "{reset:?}");
    bench.ring.cancel(watch);
    assert_eq!(result_of(bench.next(Kind::WatchDownstream)), (watch, -libc::ECANCELED, false));
}

#[test]
fn mailbox_rings_as_often_as_it_is_rung() {
    let mut bench = Bench::open();
    let bell = socket::bell().unwrap();
    let mailbox = token(Kind::Mailbox, 0, 0);
    bench.ring.arm_mailbox(mailbox, bell.as_fd());
    bench.assert_silent();
    for _ in 0..3 {
        nix::unistd::write(&bell, &1_u64.to_ne_bytes()).unwrap();
        let event = bench.next(Kind::Mailbox);
        assert_eq!((event.token, event.more), (mailbox, true));
    }
}

#[test]
fn completions_without_room_are_kept_and_counted() {
    let small = profile::Ring { completions: 64, entries: 32, ..RING };
    let mut bench = Bench::with(sockets(), small);
    let options = socket::ListenOptions { backlog: 512, ..Default::default() };
    let listener = socket::listen("127.0.0.1:0".parse().unwrap(), &options).unwrap();
    let addr = socket::local_name(listener.as_fd()).unwrap();
    let peers: Vec<TcpStream> = (0..300).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let mut accepted = Vec::new();
    bench.ring.accept_many(ACCEPT, listener.as_fd(), AcceptInto::Descriptors);
    while accepted.len() < peers.len() {
        let event = bench.next(Kind::Accept);
        accepted.push(socket::accepted(event.result));
        if !event.more {
            bench.ring.accept_many(ACCEPT, listener.as_fd(), AcceptInto::Descriptors);
        }
    }
    bench.assert_silent();
    assert!(bench.ring.overflows() > 0);
}
