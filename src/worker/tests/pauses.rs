// SPDX-License-Identifier: Apache-2.0
//! Accepting when the kernel has nothing left to accept with.

use super::*;
use crate::op::{FlowId, Kind, Token};
use crate::ring::Event;

/// RS2: with no file left in the whole system accept pauses, without a spin, and comes back by itself.
/// The error is handed to the worker: the limit is the host's.
#[test]
fn accept_pauses_where_the_system_has_no_file_left() {
    let (setup, addr, _services) = prepare(vec![server(echo)], |_, _| {});
    let counters = Arc::new(Counters::default());
    let mailbox = Arc::new(Mailbox::new(socket::bell().unwrap()));
    let mut worker = Worker::start(setup, mailbox, Arc::clone(&counters)).unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.write_all(b"patient").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        back
    });
    // As the end of a multishot accept comes (`io_accept` in io_uring/net.c).
    let token = Token::new(Kind::Accept, FlowId::new(0), 0);
    worker.handle(Event { buffer: None, more: false, result: -libc::ENFILE, token });
    assert_eq!(counters.accept_paused.value(), 1);
    let (began, mut turns) = (Instant::now(), 0);
    while worker.listening.retry_at().is_some() {
        worker.turn().unwrap();
        turns += 1;
    }
    assert!(began.elapsed() >= Duration::from_millis(50), "{:?}", began.elapsed());
    assert!(turns < 10, "{turns} turns within a pause");
    let ended = || counters.flows_closed[CloseReason::Finished as usize].value();
    while ended() == 0 {
        worker.turn().unwrap();
    }
    worker.ring.finish().unwrap();
    assert_eq!(client.join().unwrap(), b"patient");
    assert_eq!(counters.accept_paused.value(), 1);
}
