// SPDX-License-Identifier: Apache-2.0
//! The sockmap relay tried on this kernel, over loopback, before any flow is trusted to it.
//!
//! Four sockets: `client - downstream`, joined to `upstream - server`. This file does by hand what
//! a flow does with a direction that has left the kernel: read what was passed, wait until the
//! backlog is nothing, write on, send FIN. Every word that comes out is looked at.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::{Pair, Sockmap};
use crate::op::Side;

/// What the kernel did that it must not do, or did not do.
#[derive(Debug, thiserror::Error)]
#[error("self-test, {step}: {what}")]
pub struct SelfTestError {
    step: &'static str,
    what: String,
}

/// One case: how many bytes each way, and what happens on the way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    /// By the side that is read from.
    pub(super) bytes: [u64; 2],
    /// Ask for the rest of this direction in user space after half of its bytes.
    pub(super) demoted: [bool; 2],
    /// The upstream direction begins when the downstream one has ended.
    pub(super) in_turn: bool,
    /// The server reads nothing until its client is stuck.
    pub(super) slow_reader: bool,
    pub(super) step: &'static str,
}

/// One direction as the test sees it.
struct Course {
    drained: bool,
    /// Its end's last write found no room.
    end_blocked: bool,
    /// Its end has sent FIN.
    fin_sent: bool,
    /// The relay has sent FIN on.
    fin_passed: bool,
    /// Read from the relay's socket in user space.
    hand: Vec<u8>,
    /// The relay's last write found no room.
    hand_blocked: bool,
    hand_ended: bool,
    hand_read: u64,
    has_fin: bool,
    received: u64,
    sent: u64,
    total: u64,
}

/// The four sockets of one case.
struct Rig<'a> {
    case: Case,
    courses: [Course; 2],
    /// The far ends: client, server.
    ends: [TcpStream; 2],
    /// The relay's own sockets: downstream, upstream.
    joined: [TcpStream; 2],
    pair: Pair,
    server_reads: bool,
    sockmap: &'a mut Sockmap,
}

impl Sockmap {
    /// Tries everything that flows rely on, with `bytes` each way: half a megabyte takes a few
    /// milliseconds and finds what fails at once.
    ///
    /// # Errors
    ///
    /// What failed; no flow may be joined then.
    pub fn prove(&mut self, bytes: u64) -> Result<(), SelfTestError> {
        let plain = Case {
            bytes: [bytes; 2],
            demoted: [false; 2],
            in_turn: false,
            slow_reader: false,
            step: "bytes both ways",
        };
        let slow = bytes.max(SLOW_BYTES_MIN);
        for case in [
            plain,
            Case { in_turn: true, step: "half-close", ..plain },
            Case { demoted: [true; 2], step: "leave the kernel in mid-stream", ..plain },
            Case { bytes: [slow, bytes], slow_reader: true, step: "slow reader", ..plain },
        ] {
            self.try_case(case)?;
        }
        Ok(())
    }

    pub(super) fn try_case(&mut self, case: Case) -> Result<(), SelfTestError> {
        let failed = |what: String| SelfTestError { step: case.step, what };
        let [client, downstream] =
            connected(case).map_err(|error| failed(format!("loopback: {error}")))?;
        let [upstream, server] =
            connected(case).map_err(|error| failed(format!("loopback: {error}")))?;
        let pair = self
            .join(downstream.as_fd(), upstream.as_fd())
            .map_err(|refused| failed(format!("join two connected sockets: {refused:?}")))?;
        let mut rig = Rig {
            case,
            courses: case.bytes.map(Course::new),
            ends: [client, server],
            joined: [downstream, upstream],
            pair,
            server_reads: !case.slow_reader,
            sockmap: self,
        };
        let result = rig.run().map_err(failed);
        let Rig { pair, joined, .. } = rig;
        drop(joined);
        self.forget(pair);
        result
    }
}

impl Rig<'_> {
    fn run(&mut self) -> Result<(), String> {
        let mut last = Instant::now();
        while !self.courses.iter().all(|course| course.has_fin) {
            let before = self.moved();
            for side in Side::BOTH {
                if side == Side::Downstream || !self.case.in_turn || self.courses[0].has_fin {
                    self.write(side)?;
                }
                self.carry_on(side)?;
                if side == Side::Upstream || self.server_reads {
                    self.read(side)?;
                }
            }
            if !self.server_reads {
                self.server_reads = self.is_stuck()?;
            }
            if self.moved() != before {
                last = Instant::now();
            } else if last.elapsed() > PATIENCE {
                return Err(format!("nothing moves any more: {}", self.story()));
            } else {
                std::thread::sleep(LOOK_EVERY);
            }
        }
        Ok(())
    }

    /// The far end that begins this direction sends what its socket takes, and FIN at the end. Where
    /// it is to be held up, it sends a little at a time: what the kernel's own thread had no time
    /// for yet, on a busy machine, is in nobody's buffer.
    fn write(&mut self, from: Side) -> Result<(), String> {
        let steps = if self.server_reads { usize::MAX } else { 1 };
        if !self.server_reads && !self.is_settled() {
            return Ok(());
        }
        let may_end = from == Side::Downstream || self.courses[0].has_fin;
        let end = &mut self.ends[from as usize];
        let course = &mut self.courses[from as usize];
        for _ in 0..steps {
            if course.sent == course.total {
                break;
            }
            let left = usize::try_from(course.total - course.sent).unwrap_or(CHUNK_BYTES);
            let bytes = words(course.sent, left.min(CHUNK_BYTES));
            let sent = would_block(end.write(bytes)).map_err(|error| format!("send: {error}"))?;
            course.end_blocked = sent.is_none();
            let Some(sent) = sent else { break };
            course.sent += sent as u64;
        }
        // Who dialled ends first: else a port that was listened on stays taken for a minute.
        if course.sent == course.total && !course.fin_sent && may_end {
            end.shutdown(Shutdown::Write).map_err(|error| format!("send FIN: {error}"))?;
            course.fin_sent = true;
        }
        if self.case.demoted[from as usize] && course.sent > course.total / 2 {
            self.sockmap.pass(&self.pair, from);
        }
        Ok(())
    }

    /// The relay's part in user space: what was passed, and the FIN, behind all that was forwarded.
    fn carry_on(&mut self, from: Side) -> Result<(), String> {
        let progress = self.sockmap.progress(&self.pair, from);
        if progress.is_broken {
            return Err("a hole in what came".to_owned());
        }
        let course = &mut self.courses[from as usize];
        let ended = self.joined[from as usize].peek(&mut [0]).is_ok_and(|bytes| bytes == 0);
        if course.fin_passed || (progress.pass.is_none() && !ended) {
            return Ok(());
        }
        self.sockmap.pass(&self.pair, from);
        if course.hand.is_empty() && !course.hand_ended {
            let mut chunk = vec![0; CHUNK_BYTES];
            let read = would_block(self.joined[from as usize].read(&mut chunk))
                .map_err(|error| format!("receive what was passed: {error}"))?;
            chunk.truncate(read.unwrap_or(0));
            course.hand_read += chunk.len() as u64;
            course.hand = chunk;
            // An early EOF is none: passed bytes may still be on their way within the kernel.
            let passed = self.sockmap.progress(&self.pair, from).passed;
            course.hand_ended = read == Some(0) && course.hand_read == passed;
        }
        if !course.drained {
            let backlog = self.sockmap.backlog(&self.pair, from);
            course.drained = backlog.ok_or("the other socket is gone")? == 0;
        }
        let to = &mut self.joined[from.other() as usize];
        if course.drained && !course.hand.is_empty() {
            let sent = would_block(to.write(&course.hand))
                .map_err(|error| format!("write on: {error}"))?;
            course.hand_blocked = sent.is_none();
            course.hand.drain(..sent.unwrap_or(0));
        }
        if course.drained && course.hand.is_empty() && course.hand_ended {
            to.shutdown(Shutdown::Write).map_err(|error| format!("pass FIN on: {error}"))?;
            course.fin_passed = true;
        }
        Ok(())
    }

    /// The far end of this direction looks at every byte.
    fn read(&mut self, from: Side) -> Result<(), String> {
        let end = &mut self.ends[from.other() as usize];
        let course = &mut self.courses[from as usize];
        let mut chunk = vec![0; CHUNK_BYTES];
        while !course.has_fin {
            let read =
                would_block(end.read(&mut chunk)).map_err(|error| format!("receive: {error}"))?;
            let Some(read) = read else { break };
            if &chunk[..read] != words(course.received, read) {
                return Err(format!("wrong bytes after {}", course.received));
            }
            course.received += read as u64;
            course.has_fin = read == 0;
        }
        if course.has_fin && course.received != course.total {
            return Err(format!("FIN after {} of {} bytes", course.received, course.total));
        }
        Ok(())
    }

    /// A client whose server reads nothing is held up: neither its socket nor the relay's takes
    /// another byte, and the kernel holds none. Says so only when it is; an error if it never was.
    fn is_stuck(&self) -> Result<bool, String> {
        let course = &self.courses[Side::Downstream as usize];
        if course.sent == course.total {
            return Err(format!("{} bytes were taken for a server that reads none", course.sent));
        }
        Ok(course.end_blocked && course.hand_blocked && self.is_settled())
    }

    /// Nothing that was redirected is still on its way to the other socket.
    fn is_settled(&self) -> bool {
        Side::BOTH.into_iter().all(|from| {
            self.courses[from as usize].drained || self.sockmap.backlog(&self.pair, from) == Some(0)
        })
    }

    /// Changes whenever anything does.
    fn moved(&self) -> u64 {
        self.courses
            .iter()
            .map(|course| {
                course.sent
                    + course.received
                    + course.hand_read
                    + course.hand.len() as u64
                    + u64::from(course.has_fin)
                    + u64::from(course.drained)
            })
            .sum()
    }

    fn story(&self) -> String {
        let course = |side: Side| {
            let course = &self.courses[side as usize];
            let progress = self.sockmap.progress(&self.pair, side);
            let backlog = self.sockmap.backlog(&self.pair, side);
            format!(
                "from {side:?} {} of {} bytes sent, {} received, {} by hand, backlog {backlog:?}, {progress:?}",
                course.sent, course.total, course.received, course.hand_read
            )
        };
        Side::BOTH.map(course).join("; ")
    }
}

impl Course {
    const fn new(total: u64) -> Course {
        Course {
            drained: false,
            end_blocked: false,
            fin_passed: false,
            fin_sent: false,
            hand: Vec::new(),
            hand_blocked: false,
            hand_ended: false,
            hand_read: 0,
            has_fin: false,
            received: 0,
            sent: 0,
            total,
        }
    }
}

/// Two ends of a connection over loopback that never block.
fn connected(case: Case) -> io::Result<[TcpStream; 2]> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // A firewall that drops what goes over loopback must not hold up a start for minutes.
    let dialled = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
    let (accepted, _) = listener.accept()?;
    for stream in [&dialled, &accepted] {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let socket = SockRef::from(stream);
        socket.set_linger(Some(Duration::ZERO))?;
        if case.slow_reader {
            // With small buffers the client is stuck sooner.
            socket.set_recv_buffer_size(SLOW_BUFFER_BYTES)?;
            socket.set_send_buffer_size(SLOW_BUFFER_BYTES)?;
        }
    }
    Ok([dialled, accepted])
}

fn would_block(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(None)
        }
        result => result.map(Some),
    }
}

/// The bytes from position `from` on, at most `CHUNK_BYTES`: words that tell where they stand, again
/// and again after a number of bytes that no buffer has.
fn words(from: u64, len: usize) -> &'static [u8] {
    static ALL: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let word = |position: u64| position.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let once: Vec<u8> = (1..=PERIOD_BYTES / 8).flat_map(word).collect();
        [once.as_slice(), once.get(..CHUNK_BYTES).unwrap_or_default()].concat()
    });
    let at = usize::try_from(from % PERIOD_BYTES).unwrap_or_default();
    ALL.get(at..at + len).unwrap_or_default()
}

/// Bytes of one read or write.
const CHUNK_BYTES: usize = 16 << 10;
/// A prime number of words.
const PERIOD_BYTES: u64 = 8 * 8191;
/// Nothing has moved for so long, on a machine that may be busy: it never will.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_micros(100);
/// More than the buffers of all four sockets and the credit hold together.
const SLOW_BYTES_MIN: u64 = 4 << 20;
const SLOW_BUFFER_BYTES: usize = 64 << 10;
