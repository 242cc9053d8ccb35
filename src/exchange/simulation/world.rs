// SPDX-License-Identifier: Apache-2.0
//! The fake ring of the simulation, and everything else that an exchange asks of its worker.

use std::time::Duration;

use super::*;

/// Everything outside the exchange but the ring's requests.
pub(super) struct World {
    /// Of what comes at a time.
    buffer_bytes: usize,
    buffers: Vec<Vec<u8>>,
    pub(super) counts: [u64; Outcome::ALL.len()],
    pub(super) ejected: u64,
    home: Vec<BufferId>,
    slots: Vec<FlowId>,
    texts: Vec<BufferId>,
}

/// An upstream connection, as its server sees it.
#[derive(Default)]
pub(super) struct Server {
    /// What it says, on its way.
    pub(super) answers: Vec<u8>,
    /// Requests to answer.
    pub(super) asked: Vec<Word>,
    broken: bool,
    /// What it has asked of the client.
    pub(super) called: Vec<Word>,
    pub(super) ends: bool,
    pub(super) got: Vec<u8>,
    pub(super) is_silent: bool,
    pub(super) pushes: u64,
    pub(super) service: u64,
}

impl Server {
    pub(super) fn is_answering(&self) -> bool {
        !self.asked.is_empty() && !self.ends
    }

    /// The client has answered.
    pub(super) fn is_answered(&mut self, number: u64, text: &str) {
        let at = self.called.iter().position(|word| word.number == number);
        let at = at.expect("an answer to what this server has asked");
        assert_eq!(self.called.remove(at).text(), text, "an answer to somebody else");
    }
}

impl World {
    pub(super) fn new(starves: bool, random: &mut Random) -> World {
        let free = if starves { 14 + random.below(11) as u16 } else { BUFFERS };
        let texts = 1 + random.below(u64::from(TEXTS)) as u16;
        // Frames that are mostly cut, or many whole ones at a time.
        let buffer_bytes = [64, 600][random.below(2) as usize];
        World {
            buffer_bytes,
            buffers: vec![vec![0; buffer_bytes + 64]; usize::from(BUFFERS + TEXTS)],
            counts: [0; Outcome::ALL.len()],
            ejected: 0,
            home: (0..free).map(BufferId).collect(),
            slots: (1..1 + random.below(12) as u32).map(FlowId::new).collect(),
            texts: (BUFFERS..BUFFERS + texts).map(BufferId).collect(),
        }
    }

    /// Buffers, slots and texts that nobody holds.
    pub(super) fn at_home(&self) -> (usize, usize, usize) {
        (self.home.len(), self.slots.len(), self.texts.len())
    }
}

impl Host for World {
    fn append(&mut self, last: Segment, more: Segment) -> bool {
        let end = (last.offset + last.len) as usize;
        let bytes = self.bytes(more).to_vec();
        let into = &mut self.buffers[usize::from(last.buffer.0)];
        let room = into.get_mut(end..end + bytes.len());
        room.map(|room| room.copy_from_slice(&bytes)).is_some()
    }

    fn bytes(&self, segment: Segment) -> &[u8] {
        let (start, len) = (segment.offset as usize, segment.len as usize);
        &self.buffers[usize::from(segment.buffer.0)][start..start + len]
    }

    fn count(&mut self, outcome: Outcome) {
        self.counts[outcome as usize] += 1;
    }

    fn ejected(&mut self) {
        self.ejected += 1;
    }

    fn moved(&mut self, _: Side, _: u32) {}

    fn slot(&mut self, _: FlowId) -> Option<FlowId> {
        self.slots.pop()
    }

    fn write(&mut self, text: &[u8]) -> Option<Segment> {
        let buffer = self.texts.pop()?;
        self.buffers[usize::from(buffer.0)][..text.len()].copy_from_slice(text);
        Some(Segment { buffer, offset: 0, len: text.len() as u32 })
    }
}

impl Life {
    pub(super) fn act(&mut self, act: impl FnOnce(&mut Exchange, &mut Means<'_, World>)) {
        let mut scratch = [0; 1024];
        let ticks = u64::from(self.now.wrapping_sub(START));
        let mut means = Means {
            host: &mut self.world,
            instant: self.started + Duration::from_millis(ticks * 16),
            now: self.now,
            picker: &mut self.picker,
            pieces: &mut self.pieces,
            rules: &self.rules,
            scratch: &mut scratch,
            wishes: &mut self.wishes,
        };
        let mut exchange = self
            .exchange
            .take()
            .unwrap_or_else(|| Exchange::open((HEAD, self.protocol, 7), None, &mut means));
        act(&mut exchange, &mut means);
        self.exchange = Some(exchange);
        self.carry();
    }

    /// Takes what is wished, as the ring would.
    fn carry(&mut self) {
        for Wish { slot, op } in mem::take(&mut self.wishes) {
            let request = match op {
                Op::Connect => Request::Connect,
                Op::Receive { side, .. } => Request::Receive(side),
                Op::Send { from, .. } => Request::Send(from),
                Op::Shutdown(side) => Request::Shutdown(side),
                Op::Cancel(request) => {
                    self.cancelled.push((slot, request));
                    continue;
                }
                Op::AwaitBuffers(side) => {
                    self.starved.push((slot, side));
                    continue;
                }
                Op::Close { side, .. } => {
                    self.close(slot, side);
                    continue;
                }
                op => panic!("nobody can {op:?} here"),
            };
            let busy = self.in_flight.iter().any(|(of, other, _)| (*of, *other) == (slot, request));
            assert!(!busy, "{request:?} is in flight twice");
            self.in_flight.push((slot, request, op));
            let chance = self.luck.stall_chance(request);
            if self.random.one_in(chance) {
                self.stalled.push((slot, request));
            }
        }
        while let Some(buffer) = self.pieces.take_freed() {
            let is_text = buffer.0 >= BUFFERS;
            if is_text { self.world.texts.push(buffer) } else { self.world.home.push(buffer) }
        }
    }

    fn close(&mut self, slot: FlowId, side: Side) {
        let own = self.in_flight.iter().find(|(of, request, _)| {
            let is_downstream = matches!(
                request,
                Request::Receive(Side::Downstream)
                    | Request::Send(Side::Upstream)
                    | Request::Shutdown(Side::Downstream)
            );
            *of == slot && is_downstream == (side == Side::Downstream)
        });
        assert!(own.is_none(), "closed with {own:?} in flight");
        self.starved.retain(|one| *one != (slot, side));
        if side == Side::Upstream {
            self.servers.remove(&slot);
            let lines = self.exchange.as_ref().unwrap().lines().map(|line| line.slot);
            if slot != HEAD && lines.into_iter().all(|kept| kept != slot) {
                self.world.slots.push(slot);
            }
        }
    }

    /// Something that can happen now; `None` if nothing can.
    pub(super) fn next(&mut self) -> Option<(FlowId, Completion)> {
        self.serve();
        if !self.starved.is_empty() && !self.world.home.is_empty() && self.random.one_in(2) {
            let (slot, side) = self.starved.remove(0);
            return Some((slot, Completion::BuffersFree(side)));
        }
        let start = self.random.below(self.in_flight.len().max(1) as u64) as usize;
        for step in 0..self.in_flight.len() {
            let index = (start + step) % self.in_flight.len();
            let (slot, request, op) = self.in_flight[index];
            let was_cancelled = self.cancelled.contains(&(slot, request));
            if self.stalled.contains(&(slot, request)) && !was_cancelled {
                continue;
            }
            let errno = (was_cancelled && !self.random.one_in(3)).then_some(Errno(ECANCELED));
            let answer = match op {
                Op::Connect => Some((self.connect(slot, errno), false)),
                Op::Receive { side, credit_bytes, .. } => {
                    self.receive(slot, side, credit_bytes, errno)
                }
                Op::Send { from, segments } => {
                    Some((self.send(slot, from, segments, errno), false))
                }
                Op::Shutdown(side) => {
                    self.client.has_fin = true;
                    Some((Completion::ShutDown { side, result: Ok(()) }, false))
                }
                _ => None,
            };
            let Some((completion, more)) = answer else { continue };
            let chance = self.luck.stall_chance(request);
            if more && self.random.one_in(chance) {
                self.stalled.push((slot, request));
            }
            if !more {
                self.stalled.retain(|one| *one != (slot, request));
                let index =
                    self.in_flight.iter().position(|(of, one, _)| (*of, *one) == (slot, request));
                self.in_flight.swap_remove(index.unwrap());
                self.cancelled.retain(|one| *one != (slot, request));
            }
            return Some((slot, completion));
        }
        let free = !self.world.home.is_empty() && !self.starved.is_empty();
        free.then(|| self.starved.remove(0))
            .map(|(slot, side)| (slot, Completion::BuffersFree(side)))
    }

    /// Something that had stalled goes on, perhaps; certainly if it `must`. True if something did.
    pub(super) fn wake(&mut self, must: bool) -> bool {
        if self.stalled.is_empty() || !(must || self.random.one_in(3)) {
            return false;
        }
        let at = self.random.below(self.stalled.len() as u64) as usize;
        let (_, request) = self.stalled.swap_remove(at);
        assert!(!must || request != Request::Connect, "nobody watches a dial");
        true
    }

    fn connect(&mut self, slot: FlowId, errno: Option<Errno>) -> Completion {
        let failed = self.random.one_in(self.luck.fails / 8).then_some(Errno(111));
        if let Some(errno) = errno.or(failed) {
            return Completion::Connected(Err(errno));
        }
        let exchange = self.exchange.as_ref().unwrap();
        let line = exchange.lines().find(|line| line.slot == slot).expect("it is dialled");
        let SocketAddr::V4(to) = line.addr else { panic!("{line:?}") };
        let service = u64::from(to.ip().octets()[3]);
        let old = self.servers.insert(slot, Server { service, ..Server::default() });
        assert!(old.is_none(), "dialled twice");
        Completion::Connected(Ok(()))
    }

    fn receive(
        &mut self,
        slot: FlowId,
        side: Side,
        credit_bytes: u32,
        errno: Option<Errno>,
    ) -> Option<(Completion, bool)> {
        let result = |result, more| Some((Completion::Received { side, result, more }, more));
        if let Some(errno) = errno {
            return result(Err(errno), false);
        }
        let fails = self.random.one_in(self.luck.fails);
        let (left, ends, is_broken): (&[u8], bool, &mut bool) = match side {
            Side::Downstream => {
                let client = &mut self.client;
                (&client.says[client.said..], client.fins, &mut client.broken)
            }
            Side::Upstream => {
                let server = self.servers.get_mut(&slot)?;
                (&server.answers, server.ends, &mut server.broken)
            }
        };
        *is_broken |= fails;
        if *is_broken {
            return result(Err(Errno(104)), false);
        }
        if left.is_empty() {
            self.client.has_ended |= ends && side == Side::Downstream;
            return if ends { result(Ok(None), false) } else { None };
        }
        let Some(buffer) = self.world.home.pop() else { return result(Err(Errno(ENOBUFS)), false) };
        let most = left.len().min(self.world.buffer_bytes).min(credit_bytes as usize);
        let len =
            if self.random.one_in(4) { 1 + self.random.below(most as u64) as usize } else { most };
        let bytes = left[..len].to_vec();
        self.world.buffers[usize::from(buffer.0)][..len].copy_from_slice(&bytes);
        match side {
            Side::Downstream => self.client.said += len,
            Side::Upstream => drop(self.servers.get_mut(&slot)?.answers.drain(..len)),
        }
        result(Ok(Some(Segment { buffer, offset: 0, len: len as u32 })), !self.random.one_in(3))
    }

    fn send(
        &mut self,
        slot: FlowId,
        from: Side,
        segments: u16,
        errno: Option<Errno>,
    ) -> Completion {
        let exchange = self.exchange.as_ref().unwrap();
        let queue = self.pieces.iter(exchange.outbox(slot, from)).take(usize::from(segments));
        let bytes: Vec<u8> = queue.flat_map(|piece| self.world.bytes(piece).to_vec()).collect();
        assert!(!bytes.is_empty());
        let is_broken = match from {
            Side::Upstream => self.client.broken,
            Side::Downstream => self.servers[&slot].broken || self.random.one_in(self.luck.fails),
        };
        if let Some(errno) = errno.or(is_broken.then_some(Errno(32))) {
            if let Some(server) = self.servers.get_mut(&slot).filter(|_| from == Side::Downstream) {
                server.broken |= is_broken;
            }
            return Completion::Sent { from, result: Err(errno) };
        }
        let cut = self.random.one_in(5);
        let len =
            if cut { self.random.below(bytes.len() as u64 + 1) as usize } else { bytes.len() };
        match from {
            Side::Upstream => self.client.got.extend(&bytes[..len]),
            Side::Downstream => self.servers.get_mut(&slot).unwrap().got.extend(&bytes[..len]),
        }
        Completion::Sent { from, result: Ok(len as u32) }
    }
}

impl Luck {
    const fn stall_chance(&self, request: Request) -> u64 {
        match request {
            Request::Receive(Side::Downstream) => self.pauses,
            Request::Send(Side::Upstream) => self.stalls_client,
            Request::Shutdown(_) => 0,
            _ => self.stalls_servers,
        }
    }
}
