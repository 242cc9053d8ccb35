// SPDX-License-Identifier: Apache-2.0
//! Readers that have stalled or are slow: what they may not take from others, and what ends them.

use socket2::{Domain, SockRef, Socket, Type};

use super::*;
use crate::op::{FlowId, Kind, Token};
use crate::ring::Event;
use crate::worker::mailbox::Letter;

/// Both of weir's sockets hold little, and so do those that a listener hands on.
fn small_sockets(profile: &mut Profile) {
    profile.sockets.send_buffer_bytes = 4608;
    profile.sockets.receive_buffer_bytes = 4608;
}

/// A server with little room to receive.
fn small_server(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, serve) = (stream.unwrap(), serve.clone());
            thread::spawn(move || serve(stream));
        }
    });
    addr
}

/// Writes until nothing goes in any more.
fn fill(mut stream: &TcpStream) {
    stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    while stream.write(&[7; 65536]).is_ok() {}
}

#[test]
fn stalled_reader_leaves_buffers_to_others() {
    let healthy = Forwarder::start(
        vec![small_server(|stream| drop(hold(stream))), server(echo)],
        |profile, _| {
            small_sockets(profile);
            profile.relay.segments_max = 64;
        },
    );
    let (mut stalled, mut client) = (healthy.connect(), healthy.connect());
    for stream in [&stalled, &client] {
        stream.set_nodelay(true).unwrap();
    }
    // Each exchange beside it lets the worker take what the other one has written, in a buffer of
    // its own once the reader's sockets are full.
    for _ in 0..400 {
        stalled.write_all(&[1; 64]).unwrap();
        client.write_all(b"healthy").unwrap();
        client.read_exact(&mut [0; 7]).unwrap();
    }
    drop((stalled, client));
    healthy.end();
}

#[test]
fn slow_reader_is_not_idle() {
    let upstream = server(|mut stream| {
        stream.write_all(&[3; 60_000]).unwrap();
        drop(hold(stream));
    });
    let forwarder = Forwarder::start(vec![upstream], |profile, _| {
        small_sockets(profile);
        profile.timeouts.idle = Duration::from_millis(300);
    });
    // Before it connects: a window that was offered cannot be taken back.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&forwarder.addr.into()).unwrap();
    let mut client = TcpStream::from(socket);
    let mut left = 60_000;
    while left > 0 {
        // That slow it is.
        thread::sleep(Duration::from_millis(20));
        let bytes = client.read(&mut [0; 1000]).unwrap();
        assert!(bytes > 0, "{left} bytes are missing");
        left -= bytes;
    }
    forwarder.await_closed(CloseReason::IdleTimeout, 1);
    forwarder.end();
}

#[test]
fn stalled_reader_is_idle() {
    let upstream = server(|stream| {
        fill(&stream);
        drop(hold(stream));
    });
    let forwarder = Forwarder::start(vec![upstream], |profile, _| {
        small_sockets(profile);
        profile.timeouts.idle = Duration::from_millis(300);
    });
    let client = forwarder.connect();
    forwarder.await_closed(CloseReason::IdleTimeout, 1);
    drop(client);
    forwarder.end();
}

#[test]
fn reset_of_a_stalled_flow_is_noticed_although_its_timer_became_another() {
    let upstream = small_server(|stream| {
        let mut seen = [0; 1];
        stream.peek(&mut seen).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        drop(hold(stream));
    });
    let forwarder = Forwarder::start(vec![upstream], |profile, _| small_sockets(profile));
    let mut client = forwarder.connect();
    client.set_nonblocking(true).unwrap();
    while client.write(&[7; 4096]).is_ok() {}
    client.set_nonblocking(false).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "half-closed");
    socket::set_reset_on_close(client.as_fd()).unwrap();
    drop(client);
    forwarder.await_closed(CloseReason::DownstreamReset, 1);
    forwarder.end();
}

#[test]
fn bell_that_fell_silent_is_armed_again() {
    let mailbox = Arc::new(Mailbox::new(socket::bell().unwrap()));
    let setup = setup(Vec::new(), small_profile(), SHARE, &Directory::default());
    let bell = Arc::clone(&mailbox);
    let ended = thread::spawn(move || {
        let mut worker = Worker::start(setup, mailbox, Arc::default()).unwrap();
        let token = Token::new(Kind::Mailbox, FlowId::new(0), 0);
        worker.handle(Event { buffer: None, more: false, result: 1, token });
        bell.send(Letter::Drain(Duration::ZERO));
        worker.ring.turn(Some(PATIENCE), &mut worker.batch).unwrap();
        worker.ring.next(&mut worker.batch).map(|event| event.token == token)
    });
    assert_eq!(ended.join().unwrap(), Some(true));
}
