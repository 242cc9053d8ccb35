// SPDX-License-Identifier: Apache-2.0
//! The least that forwarding a message can cost on this host: the calls on sockets, and nothing else.
//!
//! Flows as a forwarder has them, four sockets each. One CPU is client and server, the other the
//! forwarder; they take turns, so that every receive finds its message and nobody ever polls, waits or
//! wakes anybody. What is left is the kernel's TCP, which every forwarder that copies has to pay.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::arguments::{Bound, Output};
use crate::{Exit, place, print};

/// Measures and prints.
pub(crate) fn bound(arguments: &Bound) -> Result<Exit> {
    let [ends, forwarder] = arguments.cpus[..] else { bail!("--cpus: name two CPUs, as 0,1") };
    ensure!(ends != forwarder, "--cpus: name two different CPUs");
    ensure!(arguments.connections > 0, "--connections must be above 0");
    place::descriptors_max();
    let until = Until { warm: arguments.duration / 4, whole: arguments.duration * 5 / 4 };
    let mut flows = Flows::open(arguments.connections)?;
    let turn = Turn(AtomicU32::new(0));
    let measured = std::thread::scope(|scope| -> Result<Measured> {
        let Flows { clients, downstreams, upstreams, servers } = &mut flows;
        let turn = &turn;
        let there = scope.spawn(move || -> Result<()> {
            let _over = Over(turn);
            place::pin(forwarder)?;
            forward(turn, downstreams, upstreams)
        });
        let here = {
            let _over = Over(turn);
            place::pin(ends).and_then(|()| exchange(turn, clients, servers, &until))
        };
        match there.join() {
            Ok(Ok(())) => here,
            Ok(Err(error)) => Err(error),
            Err(_) => bail!("the forwarding thread panicked"),
        }
    })?;
    print(&match arguments.output {
        Output::Json => format!(
            "{{\"forwarder_us\":{:.3},\"ends_us\":{:.3}}}\n",
            measured.forwarder_us, measured.ends_us
        ),
        Output::Table => format!(
            "{} flows: {:.2} µs of the forwarder's CPU an exchange, {:.2} µs of client and server\n",
            arguments.connections, measured.forwarder_us, measured.ends_us
        ),
    });
    Ok(Exit::Fine)
}

struct Measured {
    ends_us: f64,
    forwarder_us: f64,
}

struct Until {
    warm: Duration,
    whole: Duration,
}

/// The sockets of all flows, by what a forwarder calls them.
struct Flows {
    clients: Vec<TcpStream>,
    downstreams: Vec<TcpStream>,
    servers: Vec<TcpStream>,
    upstreams: Vec<TcpStream>,
}

impl Flows {
    fn open(count: usize) -> Result<Flows> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen on 127.0.0.1")?;
        let to = listener.local_addr()?;
        let mut flows = Flows {
            clients: Vec::new(),
            downstreams: Vec::new(),
            servers: Vec::new(),
            upstreams: Vec::new(),
        };
        for _ in 0..count {
            let (client, downstream) = pair(&listener, to)?;
            let (upstream, server) = pair(&listener, to)?;
            flows.clients.push(client);
            flows.downstreams.push(downstream);
            flows.upstreams.push(upstream);
            flows.servers.push(server);
        }
        Ok(flows)
    }
}

fn pair(listener: &TcpListener, to: SocketAddr) -> Result<(TcpStream, TcpStream)> {
    let one = TcpStream::connect(to).context("connect (four descriptors a flow: `ulimit -n`)")?;
    let (other, _) = listener.accept().context("accept")?;
    for socket in [&one, &other] {
        socket.set_nodelay(true)?;
        // Its message is there already; if it is not, that shall be an error.
        socket.set_nonblocking(true)?;
    }
    Ok((one, other))
}

/// Client and server: every round is one exchange on every flow.
fn exchange(
    turn: &Turn,
    clients: &mut [TcpStream],
    servers: &mut [TcpStream],
    until: &Until,
) -> Result<Measured> {
    let mut buffer = vec![0; BATCH * STRIDE];
    let (mut own, mut whole, mut rounds) = (Duration::ZERO, Duration::ZERO, 0_u32);
    let began = Instant::now();
    loop {
        let round = Instant::now();
        let mut spent = Duration::ZERO;
        let mut ours = |work: &mut dyn FnMut() -> Result<()>| {
            let began = Instant::now();
            let done = work();
            spent += began.elapsed();
            done
        };
        ours(&mut || send(clients, &buffer))?;
        turn.pass(TO_UPSTREAM);
        turn.wait(ANSWER)?;
        ours(&mut || relay(servers, None, &mut buffer))?;
        turn.pass(TO_DOWNSTREAM);
        turn.wait(DONE)?;
        ours(&mut || receive(clients, &mut buffer))?;
        if began.elapsed() > until.warm {
            (own, whole, rounds) = (own + spent, whole + round.elapsed(), rounds + 1);
        }
        if began.elapsed() > until.whole && rounds > 0 {
            let exchanges = f64::from(rounds) * f64::from(u32::try_from(clients.len())?);
            let us = |time: Duration| time.as_secs_f64() * 1e6 / exchanges;
            return Ok(Measured { ends_us: us(own), forwarder_us: us(whole - own) });
        }
    }
}

/// The forwarder: every message that waits, first one way, then the other, until all is over.
fn forward(turn: &Turn, downstreams: &mut [TcpStream], upstreams: &mut [TcpStream]) -> Result<()> {
    let mut buffer = vec![0; BATCH * STRIDE];
    while turn.wait(TO_UPSTREAM).is_ok() {
        relay(downstreams, Some(&mut *upstreams), &mut buffer)?;
        turn.pass(ANSWER);
        if turn.wait(TO_DOWNSTREAM).is_err() {
            break;
        }
        relay(upstreams, Some(&mut *downstreams), &mut buffer)?;
        turn.pass(DONE);
    }
    Ok(())
}

/// A message from each to its partner, or back; some receives, then their sends, as forwarders do that
/// are told of several events at a time.
fn relay(
    from: &mut [TcpStream],
    mut to: Option<&mut [TcpStream]>,
    buffer: &mut [u8],
) -> Result<()> {
    for first in (0..from.len()).step_by(BATCH) {
        let last = from.len().min(first + BATCH);
        receive(&mut from[first..last], buffer)?;
        match &mut to {
            Some(to) => send(&mut to[first..last], buffer)?,
            None => send(&mut from[first..last], buffer)?,
        }
    }
    Ok(())
}

fn receive(from: &mut [TcpStream], buffer: &mut [u8]) -> Result<()> {
    for (index, socket) in from.iter_mut().enumerate() {
        let room = &mut buffer[index % BATCH * STRIDE..][..STRIDE];
        let bytes = socket.read(room).context("receive a message")?;
        ensure!(bytes == MESSAGE_BYTES, "received {bytes} bytes of a message");
    }
    Ok(())
}

fn send(to: &mut [TcpStream], buffer: &[u8]) -> Result<()> {
    for (index, socket) in to.iter_mut().enumerate() {
        let message = &buffer[index % BATCH * STRIDE..][..MESSAGE_BYTES];
        socket.write_all(message).context("send a message")?;
    }
    Ok(())
}

/// Who may work now.
#[repr(align(128))]
struct Turn(AtomicU32);

impl Turn {
    fn pass(&self, to: u32) {
        // Once it is over it stays so.
        let _ = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| (now != OVER).then_some(to));
    }

    fn wait(&self, turn: u32) -> Result<()> {
        loop {
            match self.0.load(Ordering::Acquire) {
                now if now == turn => return Ok(()),
                OVER => bail!("the other side gave up"),
                _ => std::hint::spin_loop(),
            }
        }
    }
}

/// Ends the other's waiting, however this side ends.
struct Over<'a>(&'a Turn);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.0.store(OVER, Ordering::Release);
    }
}

const TO_UPSTREAM: u32 = 1;
const ANSWER: u32 = 2;
const TO_DOWNSTREAM: u32 = 3;
const DONE: u32 = 4;
const OVER: u32 = 5;
/// As many events as the kernel gives a ring at a time (`IO_LOCAL_TW_DEFAULT_MAX` in io_uring/tw.h).
const BATCH: usize = 20;
const MESSAGE_BYTES: usize = 64;
/// Room of a message: not a power of two, which would share a few sets of a cache.
const STRIDE: usize = 4096 + 64;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::bound;
    use crate::arguments::{Bound, Output};
    use crate::place::allowed_cpus;

    #[test]
    fn every_flow_gets_its_message_back() {
        let cpus = allowed_cpus();
        let bound_of = |cpus: Vec<usize>, connections| {
            let duration = Duration::from_millis(20);
            bound(&Bound { connections, cpus, duration, output: Output::Json })
        };
        assert!(bound_of(vec![0], 1).is_err());
        assert!(bound_of(vec![0, 0], 1).is_err());
        if let [one, other, ..] = cpus[..] {
            assert!(bound_of(vec![one, other], 45).is_ok());
            // Who cannot be where it should be makes the other give up.
            assert!(bound_of(vec![one, 1_000_000], 1).is_err());
            assert!(bound_of(vec![1_000_000, one], 1).is_err());
        }
    }
}
