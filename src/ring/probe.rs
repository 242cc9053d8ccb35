// SPDX-License-Identifier: Apache-2.0
//! What this kernel can do, found out by doing it once: the only place that degrades.
//!
//! Runs on the ring itself before it is used, with sockets that reach no network: a namespace
//! whose loopback is down is no obstacle.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use io_uring::{Probe, opcode, squeue, types};
use socket2::{Domain, Socket, Type};

use super::{Batch, Event, Ring, RingError};
use crate::op::{FlowId, Kind, Pool, Side, Token};
use crate::sys::pipe::{self, Pipe};

/// What this kernel can do beyond the floor.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Features {
    /// A dialled socket can be bound in the ring (6.11).
    pub bind: bool,
    /// A wait for several events can end early with the first (6.12), or nobody asked for it.
    pub coalesce: bool,
    /// Completions are worked through only when the worker asks (6.1): about a third faster with
    /// many connections than the cooperative fallback.
    pub deferred_work: bool,
    /// A slot can lend a descriptor (6.8): FIN without a kernel thread.
    pub descriptor_install: bool,
    /// A multishot receive can be limited (6.17): back-pressure without cancelling.
    pub receive_limit: bool,
    /// Sockets can be spliced through a pipe, and their slots lend descriptors for it.
    pub splice: bool,
}

/// A better way that this kernel lacks, and what is done instead: labels of a metric.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fallback {
    /// What is lacking.
    pub from: &'static str,
    /// The Linux that has it first.
    pub since: &'static str,
    /// What is done instead.
    pub to: &'static str,
}

impl Features {
    /// What is lacking here.
    pub fn fallbacks(&self) -> impl Iterator<Item = Fallback> {
        let all = [
            (self.coalesce, "coalesce", "wake_at_once", "6.12"),
            (self.deferred_work, "deferred_work", "cooperative_work", "6.1"),
            (self.descriptor_install, "descriptor_install", "worker_thread_shutdown", "6.8"),
            (self.receive_limit, "receive_limit", "receive_cancel", "6.17"),
            (self.splice, "splice", "copy", "6.8"),
        ];
        let lacking = all.into_iter().filter(|(is_there, ..)| !is_there);
        lacking.map(|(_, from, to, since)| Fallback { from, since, to })
    }
}

/// Tries each feature; fails only without one weir cannot do without.
pub(super) fn probe(ring: &mut Ring) -> Result<Features, RingError> {
    let step = |step| move |source| RingError::Step { source, step };
    let bind = knows(ring, opcode::Bind::CODE).map_err(step("ask which operations there are"))?;
    let tcp = tcp_socket().map_err(step("make a socket for the probe"))?;
    ring.adopt(SLOT, tcp.into());
    if attempt(ring, set_nodelay())? < 0 {
        return Err(RingError::Feature { feature: "socket options in the ring", since: "6.7" });
    }
    let (ours, theirs) = UnixStream::pair().map_err(step("make sockets for the probe"))?;
    ring.adopt(SLOT, ours.into());
    let receive_limit = limit_works(ring, &theirs)? && !is_withheld("receive_limit");
    let descriptor_install = install_works(ring)? && !is_withheld("descriptor_install");
    ring.close(SLOT, Side::Downstream, false);
    let coalesce = ring.coalesce.is_zero()
        || ring.io.params().is_feature_min_timeout() && !is_withheld("coalesce");
    let deferred_work = ring.features.deferred_work;
    let splice = descriptor_install && splice_works();
    Ok(Features { bind, coalesce, deferred_work, descriptor_install, receive_limit, splice })
}

/// A byte through a pipe: a seccomp filter may forbid either call.
fn splice_works() -> bool {
    let attempt = || {
        let ((mut near, far), pipe) = (UnixStream::pair()?, Pipe::open(PROBE_PIPE_BYTES)?);
        near.write_all(b"x")?;
        pipe::fill(&pipe, far.as_fd(), 1)?;
        pipe::drain(&pipe, far.as_fd(), 1)
    };
    attempt().is_ok_and(|moved| moved == 1)
}

/// A receive whose credit its first buffer uses up: old kernels refuse it (EINVAL).
fn limit_works(ring: &mut Ring, mut theirs: &UnixStream) -> Result<bool, RingError> {
    let step = "write to ourselves for the probe";
    theirs.write_all(b"x").map_err(|source| RingError::Step { source, step })?;
    ring.features.receive_limit = true;
    ring.receive(token(Kind::ReceiveDownstream), Side::Downstream, 1, Pool::Small);
    let event = await_event(ring, Kind::ReceiveDownstream)?;
    ring.features.receive_limit = false;
    if let Some(buffer) = event.buffer {
        ring.recycle(buffer);
    }
    Ok(event.result == 1 && !event.more)
}

/// A FIN by way of a lent descriptor: old kernels do not know the request (EINVAL).
fn install_works(ring: &mut Ring) -> Result<bool, RingError> {
    ring.features.descriptor_install = true;
    ring.shutdown(token(Kind::ShutdownDownstream), Side::Downstream);
    let event = await_event(ring, Kind::ShutdownDownstream)?;
    ring.features.descriptor_install = false;
    Ok(event.result == 0)
}

/// Whether a test wants this feature to be lacking (`WEIR_WITHOUT=receive_limit,deferred_work`), so
/// that the ways of older kernels are tried on newer ones; `worker1` is a worker that fails at once. Only
/// where debug assertions are on.
pub(crate) fn is_withheld(feature: &str) -> bool {
    cfg!(debug_assertions)
        && std::env::var("WEIR_WITHOUT")
            .is_ok_and(|list| list.split(',').any(|word| word == feature))
}

fn tcp_socket() -> io::Result<Socket> {
    Socket::new(Domain::IPV4, Type::STREAM, None)
        .or_else(|_| Socket::new(Domain::IPV6, Type::STREAM, None))
}

fn knows(ring: &Ring, code: u8) -> io::Result<bool> {
    let mut probe = Probe::new();
    ring.io.submitter().register_probe(&mut probe)?;
    Ok(probe.is_supported(code))
}

fn set_nodelay() -> squeue::Entry {
    let fd = types::Fixed(SLOT.slot());
    let (level, name) = (libc::IPPROTO_TCP.cast_unsigned(), libc::TCP_NODELAY.cast_unsigned());
    opcode::SetSockOpt::new(fd, level, name, (&raw const ON).cast(), 4).build()
}

fn attempt(ring: &mut Ring, entry: squeue::Entry) -> Result<i32, RingError> {
    ring.push(entry.user_data(token(Kind::SendDownstream).raw()));
    Ok(await_event(ring, Kind::SendDownstream)?.result)
}

/// The one event of this kind; others (a quiet failure) are passed over.
fn await_event(ring: &mut Ring, kind: Kind) -> Result<Event, RingError> {
    let began = Instant::now();
    let mut batch = Batch::new();
    while began.elapsed() < ANSWER_WITHIN {
        ring.turn(Some(ANSWER_WITHIN), &mut batch)?;
        while let Some(event) = ring.next(&mut batch) {
            if event.token.kind() == Some(kind) {
                return Ok(event);
            }
        }
    }
    let source = io::Error::from_raw_os_error(libc::ETIMEDOUT);
    Err(RingError::Step { source, step: "wait for the probe's answer" })
}

const fn token(kind: Kind) -> Token {
    Token::new(kind, SLOT, u32::MAX)
}

/// The first slot of the table; free again when the probe is over.
const SLOT: FlowId = FlowId::new(0);
const PROBE_PIPE_BYTES: u32 = 4096;
/// Everything the probe asks for is answered at once; this only bounds a broken kernel.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
static ON: libc::c_int = 1;
