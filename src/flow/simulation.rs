// SPDX-License-Identifier: Apache-2.0
//! Random lives of flows against a fake ring, each from a seed.
//!
//! The fake ring answers requests in any order, cuts sends short where a connection breaks, fails at
//! any step, runs out of buffers, descriptors and pipes, refuses to splice, lets cancels race, fires
//! timers. Paths change at any time, and the kernel forwards as it likes (`kernel.rs`). Every other
//! flow has a lead, which goes first: bytes of its downstream that nobody received. What must hold,
//! whatever happens:
//!
//! 1. Bytes out are a prefix of bytes in, in order; all of them if both ends finished.
//! 2. At most one request of a kind is in flight; a socket is closed only when none is.
//! 3. FIN follows the last byte; each socket is closed exactly once, upstream first.
//! 4. A direction never holds more than its window or (but for what was on its way) its segments.
//! 5. Every buffer, pipe and descriptor comes home, and no pipe with bytes in it is used again; a
//!    flow that can go on does.
//! 6. Once a connection has broken, no FIN is sent: the other end must not take it for the end.
//! 7. What is spliced is not received and sent at the same time.
//! 8. A flow that was told that it is deaf has something in flight that hears each side break.
//! 9. Behind what the kernel forwards nothing is sent, no FIN either, before it has arrived; and an
//!    EOF that overtook bytes is not believed.
//!
//! Replay one with `WEIR_SEED=<n> cargo test --lib simulation`.

use std::collections::VecDeque;

use super::*;
use crate::op::random::Random;
use crate::op::{BufferId, Joined, Readiness};
use kernel::Way;

mod kernel;

const SEEDS: u64 = 40_000;
const BUFFERS: u16 = 12;
const BUFFER_BYTES: u64 = 16;

/// One socket of the flow, as the outside world sees it.
#[derive(Default)]
struct Peer {
    /// Bytes it will send before FIN.
    will_send: u64,
    /// Bytes received from it so far.
    taken: u64,
    /// Bytes sent to it so far; byte number `n` must have the value `n`.
    given: u64,
    got_fin: bool,
    /// Bytes of it that its pipe holds.
    in_pipe: u64,
    /// The ring has lent a descriptor of it.
    lent: bool,
    closed: Option<bool>,
}

struct World {
    random: Random,
    rules: Rules,
    peers: [Peer; 2],
    segments: Segments,
    /// First byte number in each buffer that is out.
    contents: [u64; BUFFERS as usize],
    home: Vec<BufferId>,
    in_flight: Vec<(Request, Op)>,
    cancelled: Vec<Request>,
    starved: VecDeque<Side>,
    /// A send has failed.
    broken: bool,
    error_chance: u64,
    queues: [Queue; 2],
    can_limit: bool,
    /// Pipes and descriptors that can be had.
    pipes: usize,
    places: usize,
    /// Directions that were spliced, and that came back.
    changes: [u64; Relay::COUNT],
    /// What the kernel has to say to the last wish to join.
    joined: Option<Result<Joined, Fall>>,
    ways: [Way; 2],
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random::new(seed);
        let size = [1, 5, 60, 400][random.below(4) as usize];
        let peer = |random: &mut Random| Peer { will_send: random.below(size), ..Peer::default() };
        World {
            rules: Rules {
                bulk_after_bytes: random.below(100),
                bulk_segment_bytes: 8,
                forwarding: [
                    None,
                    Some(Forwarding::ALWAYS),
                    Some(Forwarding {
                        after_messages: 3,
                        message_bytes_max: 20,
                        pays: random.one_in(2),
                    }),
                ][random.below(3) as usize],
                pipe_bytes: 1 + random.below(60) as u32,
                segments_max: 2 + random.below(6) as u16,
                splice: promotion(&mut random),
                splice_after_bytes: 1 + random.below(60),
                splice_bulk_read_bytes: random.below(20) as u32,
                splice_read_bytes: random.below(10) as u32,
                splice_short_bytes: random.below(12) as u32,
                window_bytes: 2 + random.below(80) as u32,
            },
            peers: [peer(&mut random), peer(&mut random)],
            segments: Segments::new(BUFFERS),
            contents: [0; BUFFERS as usize],
            home: (0..1 + random.below(u64::from(BUFFERS)) as u16).map(BufferId).collect(),
            in_flight: Vec::new(),
            cancelled: Vec::new(),
            starved: VecDeque::new(),
            broken: false,
            queues: [Queue::new(); 2],
            error_chance: [0, 0, 300, 40][random.below(4) as usize],
            can_limit: !random.one_in(4),
            pipes: random.below(3) as usize,
            places: random.below(4) as usize,
            changes: [0; Relay::COUNT],
            joined: None,
            ways: [Way::default(), Way::default()],
            random,
        }
    }

    /// Takes the operations of one step, as the ring would.
    fn carry(&mut self, flow: &Flow, ops: &mut Ops) {
        for op in ops.drain() {
            if let Some(request) = op.begins() {
                let taken = self.in_flight.iter().any(|(other, _)| *other == request);
                assert!(!taken, "{request:?} is in flight twice");
                self.in_flight.push((request, op));
            }
            match op {
                Op::AwaitBuffers(side) => self.starved.push_back(side),
                Op::Cancel(request) => self.cancelled.push(request),
                Op::Close { side, reset } => self.close(side, reset),
                Op::AwaitDrained(from) => self.await_drained(from),
                Op::Join => self.join(),
                Op::Pass(from) => self.pass(from),
                Op::Send { from, segments } => {
                    self.check_behind(from);
                    assert!(segments > 0 && segments <= flow.queue(from).count());
                }
                Op::Receive { credit_bytes, side, .. } => {
                    assert!(credit_bytes > 0);
                    assert_eq!(self.peers[side as usize].in_pipe, 0, "received around a pipe");
                }
                Op::Splice { from, held_bytes, room_bytes } => {
                    self.check_splice(flow, from, held_bytes, room_bytes);
                }
                Op::Uninstall => self.uninstall(),
                Op::Shutdown(side) => {
                    self.check_behind(side.other());
                    assert!(!self.broken, "FIN after a connection broke");
                }
                Op::Watch(side) => {
                    let is_dialling = flow.is_connecting() && side == Side::Upstream;
                    assert!(!is_dialling, "watches a socket that is not there");
                }
                Op::Await { .. } | Op::Connect | Op::Install(_) => {}
            }
        }
        self.home.extend(std::iter::from_fn(|| self.segments.take_freed()));
    }

    /// The first bytes of the downstream, in a buffer of ours.
    fn lead(&mut self) -> Option<Segment> {
        let buffer = if self.random.one_in(2) { self.home.pop()? } else { return None };
        let len = 1 + self.random.below(BUFFER_BYTES) as u32;
        let peer = &mut self.peers[Side::Downstream as usize];
        self.contents[usize::from(buffer.0)] = 0;
        peer.will_send += u64::from(len);
        peer.taken = u64::from(len);
        Some(Segment { buffer, offset: 0, len })
    }

    fn check_splice(&self, flow: &Flow, from: Side, held_bytes: u32, room_bytes: u32) {
        let others = [Request::Receive(from), Request::Send(from), Request::Await(from)];
        let busy = self.in_flight.iter().find(|(request, _)| others.contains(request));
        assert!(busy.is_none() && flow.queue(from).is_empty(), "spliced beside {busy:?}");
        assert!(self.peers.iter().all(|peer| peer.lent), "spliced without descriptors");
        assert_eq!(u64::from(held_bytes), self.peers[from as usize].in_pipe);
        assert!(held_bytes + room_bytes <= self.rules.pipe_bytes, "a pipe is overfull");
        assert!(held_bytes + room_bytes > 0, "a step for nothing");
    }

    fn uninstall(&mut self) {
        for peer in &mut self.peers {
            assert_eq!(peer.in_pipe, 0, "bytes left in a pipe");
            self.places += usize::from(std::mem::take(&mut peer.lent));
        }
    }

    fn close(&mut self, side: Side, reset: bool) {
        for peer in &mut self.peers {
            self.places += usize::from(std::mem::take(&mut peer.lent));
            self.pipes += usize::from(std::mem::take(&mut peer.in_pipe) > 0);
        }
        assert!(self.in_flight.is_empty(), "closed with {:?} in flight", self.in_flight);
        let order = self.peers[Side::Upstream as usize].closed.is_some();
        assert_eq!(order, side == Side::Downstream, "the upstream is closed first");
        assert_eq!(self.peers[side as usize].closed.replace(reset), None, "closed twice");
    }

    /// Something that can happen now; `None` if nothing can.
    fn next(&mut self) -> Option<Completion> {
        if self.random.one_in(self.error_chance * 4) {
            let all = [Timer::Connect, Timer::HalfClosed, Timer::Idle];
            return Some(Completion::Expired(all[self.random.below(3) as usize]));
        }
        if self.random.one_in(30) {
            return Some(Completion::Deaf);
        }
        if self.random.one_in(2)
            && let Some(said) = self.forward()
        {
            return Some(said);
        }
        let waiting = self.starved.len();
        let pick = self.random.below((self.in_flight.len() + waiting).max(1) as u64) as usize;
        if pick < self.in_flight.len() {
            let (request, op) = self.in_flight[pick];
            if let Some(answer) = self.answer(pick, request, op) {
                return Some(answer);
            }
        }
        if !self.home.is_empty() && waiting > 0 {
            return self.starved.pop_front().map(Completion::BuffersFree);
        }
        // What came up has to wait: for the kernel, or for a buffer that something brings home.
        self.forward().or_else(|| {
            (0..self.in_flight.len()).find_map(|index| {
                let (request, op) = self.in_flight[index];
                self.answer(index, request, op)
            })
        })
    }

    fn answer(&mut self, index: usize, request: Request, op: Op) -> Option<Completion> {
        let cancelled = self.cancelled.contains(&request) && !self.random.one_in(3);
        let failed = self.random.one_in(self.error_chance);
        let errno = match (cancelled, failed) {
            (true, _) => Some(Errno(ECANCELED)),
            (false, true) => {
                Some(Errno([104, 32, 110, EAGAIN, EINTR][self.random.below(5) as usize]))
            }
            (false, false) => None,
        };
        if let Op::Receive { side, .. } = op {
            return self.receive(index, side, op, errno);
        }
        if let Op::Watch(side) = op {
            // Where the kernel reads, it says what the watch has to say.
            let says = !self.ways[side as usize].reads || self.cancelled.contains(&request);
            return says.then(|| self.watch(index, side, errno));
        }
        self.end(index, request);
        Some(match op {
            Op::Await { from, .. } => Completion::Ready { from },
            Op::Install(side) => self.install(side, errno),
            Op::Send { from, segments } => self.send(from, segments, errno),
            Op::Splice { from, room_bytes, .. } => self.splice(from, u64::from(room_bytes), errno),
            Op::Shutdown(side) => {
                let peer = &mut self.peers[side as usize];
                peer.got_fin |= errno.is_none();
                Completion::ShutDown { side, result: errno.map_or(Ok(()), Err) }
            }
            _ => Completion::Connected(errno.map_or(Ok(()), Err)),
        })
    }

    /// A watch tells of a broken connection, of FIN, or that it has ended.
    fn watch(&mut self, index: usize, side: Side, errno: Option<Errno>) -> Completion {
        let is_broken = errno.is_some_and(|errno| errno != Errno(ECANCELED));
        let more = errno != Some(Errno(ECANCELED)) && !self.random.one_in(4);
        self.broken |= is_broken && !self.cancelled.contains(&Request::Watch(side));
        if !more {
            self.end(index, Request::Watch(side));
        }
        Completion::Stirred { is_broken, more, side }
    }

    /// Something in flight waits for what `side` has to say.
    fn hears(&self, side: Side) -> bool {
        self.in_flight.iter().any(|(_, op)| match *op {
            Op::Receive { side: of, .. } | Op::Watch(of) => of == side,
            Op::Splice { from, .. } => from == side,
            Op::Await { from, readiness } => from == side && readiness == Readiness::Readable,
            _ => false,
        })
    }

    fn end(&mut self, index: usize, request: Request) {
        self.in_flight.swap_remove(index);
        self.cancelled.retain(|other| *other != request);
    }

    fn receive(
        &mut self,
        index: usize,
        side: Side,
        op: Op,
        errno: Option<Errno>,
    ) -> Option<Completion> {
        let Op::Receive { credit_bytes, pool, .. } = op else { unreachable!() };
        let request = Request::Receive(side);
        let end = |world: &mut World, result| {
            world.end(index, request);
            Completion::Received { side, result, more: false }
        };
        if let Some(errno) = errno {
            return Some(end(self, Err(errno)));
        }
        let (left, first) = self.receivable(side)?;
        if left == 0 {
            return Some(end(self, Ok(None)));
        }
        let Some(buffer) = self.home.pop() else { return Some(end(self, Err(Errno(ENOBUFS)))) };
        let room = BUFFER_BYTES * if pool == Pool::Bulk { 2 } else { 1 };
        let limit = if self.can_limit { u64::from(credit_bytes) } else { u64::MAX };
        let len = 1 + self.random.below(left.min(room).min(limit)) as u32;
        self.contents[usize::from(buffer.0)] = first;
        self.received(side, u64::from(len));
        let credit_bytes = credit_bytes.saturating_sub(len);
        let over = (self.can_limit && credit_bytes == 0) || self.random.one_in(10);
        if over {
            self.end(index, request);
        } else {
            self.in_flight[index].1 = Op::Receive { side, credit_bytes: credit_bytes.max(1), pool };
        }
        let segment = Segment { buffer, offset: 0, len };
        Some(Completion::Received { side, result: Ok(Some(segment)), more: !over })
    }

    /// Takes some or all of what the flow has queued; the flow's own queue says which bytes.
    fn send(&mut self, from: Side, segments: u16, errno: Option<Errno>) -> Completion {
        if let Some(errno) = errno {
            self.broken |= !matches!(errno, Errno(EAGAIN | EINTR | ECANCELED));
            return Completion::Sent { from, result: Err(errno) };
        }
        let queued: Vec<Segment> = self.queued(from).take(usize::from(segments)).collect();
        let all: u32 = queued.iter().map(|segment| segment.len).sum();
        let sent =
            if self.random.one_in(5) { self.random.below(u64::from(all)) as u32 } else { all };
        let mut left = u64::from(sent);
        for segment in queued {
            let first = self.contents[usize::from(segment.buffer.0)] + u64::from(segment.offset);
            let step = left.min(u64::from(segment.len));
            let peer = &mut self.peers[from.other() as usize];
            assert!(!peer.got_fin || step == 0, "bytes after FIN");
            assert!(step == 0 || first == peer.given, "byte {first} came as number {}", peer.given);
            peer.given += step;
            left -= step;
        }
        Completion::Sent { from, result: Ok(sent) }
    }

    fn install(&mut self, side: Side, errno: Option<Errno>) -> Completion {
        let result = match (errno, self.places) {
            (None, 1..) => Ok(()),
            _ => Err(Errno(24)), // EMFILE
        };
        if result.is_ok() {
            self.places -= 1;
            assert!(!std::mem::replace(&mut self.peers[side as usize].lent, true), "lent twice");
        }
        Completion::Installed { side, result }
    }

    /// One step: some of what the source has goes in, some of what the pipe has comes out.
    fn splice(&mut self, from: Side, room: u64, errno: Option<Errno>) -> Completion {
        let before = self.peers[from as usize].in_pipe;
        if before == 0 && self.pipes == 0 {
            let (drained, filled) = (Err(Errno(EAGAIN)), Err(Errno(ENOBUFS)));
            return Completion::Spliced { drained, filled, from };
        }
        self.pipes -= usize::from(before == 0);
        let broken = errno.filter(|_| self.random.one_in(2));
        let filled = self.fill(from, room, errno.filter(|_| broken.is_none()));
        let drained = self.drain(from, broken);
        self.pipes += usize::from(self.peers[from as usize].in_pipe == 0);
        Completion::Spliced { drained, filled, from }
    }

    fn fill(&mut self, from: Side, room: u64, errno: Option<Errno>) -> Result<u32, Errno> {
        let peer = &mut self.peers[from as usize];
        let left = peer.will_send - peer.taken;
        match errno {
            _ if room == 0 || self.random.one_in(8) => Err(Errno(EAGAIN)),
            Some(_) if self.random.one_in(2) => Err(Errno(22)), // EINVAL
            Some(errno) => Err(errno),
            None if left == 0 => Ok(0),
            None => {
                let bytes = 1 + self.random.below(left.min(room));
                peer.taken += bytes;
                peer.in_pipe += bytes;
                Ok(bytes as u32)
            }
        }
    }

    fn drain(&mut self, from: Side, errno: Option<Errno>) -> Result<u32, Errno> {
        let held = self.peers[from as usize].in_pipe;
        if let Some(errno) = errno {
            return Err(errno);
        }
        if held == 0 || self.random.one_in(4) {
            return Err(Errno(EAGAIN));
        }
        let bytes = if self.random.one_in(3) { 1 + self.random.below(held) } else { held };
        let first = self.peers[from as usize].taken - held;
        self.peers[from as usize].in_pipe -= bytes;
        let target = &mut self.peers[from.other() as usize];
        assert!(!target.got_fin, "bytes after FIN");
        assert_eq!(first, target.given, "bytes out of order");
        target.given += bytes;
        Ok(bytes as u32)
    }

    fn queued(&self, from: Side) -> impl Iterator<Item = Segment> + '_ {
        self.segments.iter(self.queues[from as usize])
    }
}

fn promotion(random: &mut Random) -> Promotion {
    [Promotion::Always, Promotion::Bulk, Promotion::Never][random.below(3) as usize]
}

/// One life and how it ended; panics where a promise is broken.
fn live(seed: u64) -> (CloseReason, [u64; Relay::COUNT]) {
    let mut world = World::new(seed);
    let home = (world.home.len(), world.pipes, world.places);
    let mut ops = Ops::new();
    let lead = world.lead();
    let lead_bytes = lead.map_or(0, |lead| lead.len);
    let mut flow = Flow::open(lead, &world.rules, &mut world.segments, &mut ops);
    world.carry(&flow, &mut ops);
    let mut steps = 0;
    while flow.closed().is_none() {
        steps += 1;
        assert!(steps < 20_000, "the flow goes round in circles");
        world.queues = [flow.queue(Side::Downstream), flow.queue(Side::Upstream)];
        let completion = world.next().expect("a living flow waits for something");
        if world.random.one_in(30) {
            world.rules.splice = promotion(&mut world.random);
            if let Some(forwarding) = &mut world.rules.forwarding {
                forwarding.pays = !forwarding.pays;
            }
        }
        let before = Side::BOTH.map(|from| flow.relay(from));
        flow.step(completion, &world.rules, &mut world.segments, &mut ops);
        let after = Side::BOTH.map(|from| flow.relay(from));
        for (_, relay) in before.into_iter().zip(after).filter(|(one, other)| one != other) {
            world.changes[relay as usize] += 1;
        }
        world.carry(&flow, &mut ops);
        if completion == Completion::Deaf && flow.timer().is_some() {
            assert!(!flow.is_deaf() && world.hears(Side::Downstream));
            assert!(flow.is_connecting() || world.hears(Side::Upstream));
        }
        for side in Side::BOTH {
            let held = flow.queue(side);
            let window = world.rules.window_bytes.max(lead_bytes);
            let limit = if world.can_limit { window } else { u32::MAX };
            assert!(held.bytes() <= limit, "{} bytes in a window of {limit}", held.bytes());
        }
    }
    assert_eq!((world.home.len(), world.pipes, world.places), home, "everything comes home");
    let finished = flow.closed() == Some(CloseReason::Finished);
    assert!(!finished || !world.broken, "a broken connection is no friendly end");
    for side in Side::BOTH {
        let (peer, other) = (&world.peers[side as usize], &world.peers[side.other() as usize]);
        assert_eq!(peer.closed, Some(!finished), "a reset stays a reset");
        assert!(other.given <= peer.taken);
        let lead = if side == Side::Downstream { u64::from(lead_bytes) } else { 0 };
        // What the kernel has taken upon itself is as good as delivered, but for a reset.
        let moved = (other.given + world.ways[side as usize].backlog).saturating_sub(lead);
        assert!(flow.moved_bytes(side) <= moved, "a lead counts as nobody's bytes");
        assert!(!finished || flow.moved_bytes(side) == moved);
        assert!(!other.got_fin || other.given == peer.will_send, "FIN before the last byte");
        assert!(!finished || other.given == peer.will_send, "bytes were lost");
    }
    (flow.closed().expect("it closed"), world.changes)
}

#[test]
fn any_order_of_events_keeps_every_promise() {
    if let Ok(seed) = std::env::var("WEIR_SEED") {
        let reason = live(seed.parse().expect("WEIR_SEED is a number"));
        eprintln!("seed {seed} ended: {reason:?}");
        return;
    }
    let (mut ended, mut changes) = ([0; CloseReason::COUNT], [0; Relay::COUNT]);
    for seed in 0..SEEDS {
        let Ok((reason, changed)) = std::panic::catch_unwind(|| live(seed)) else {
            panic!("replay with WEIR_SEED={seed} cargo test --lib simulation");
        };
        ended[reason as usize] += 1;
        (0..Relay::COUNT).for_each(|relay| changes[relay] += changed[relay]);
    }
    // A simulation that never finishes a flow, or never breaks one, proves little.
    assert!(ended[CloseReason::Finished as usize] > SEEDS / 4, "{ended:?}");
    assert!(ended[CloseReason::UpstreamReset as usize] > SEEDS / 100, "{ended:?}");
    assert!(ended[CloseReason::ConnectTimeout as usize] > 0, "{ended:?}");
    // And so does one that never changes the path.
    assert!(changes.iter().all(|count| *count > SEEDS / 20), "{changes:?}");
}
