// SPDX-License-Identifier: Apache-2.0
//! Random lives of exchanges against a fake ring, each from a seed.
//!
//! A client sends requests of one protocol for several services over one connection, pipelined and cut
//! anywhere; servers answer in any order (HTTP's in theirs), late, never, or break. The fake ring
//! answers in any order, cuts sends short, fails, runs out of buffers and of slots, lets cancels race.
//! What must hold, whatever happens:
//!
//! 1. A server gets whole frames, unchanged, and only of its own service.
//! 2. The client gets whole frames: each request that wants one exactly one answer, its own or an
//!    error, in HTTP in order; only a reset may cut one.
//! 3. At most one request of a kind is in flight on a socket, and it is closed, once, only when none is.
//! 4. What is held stays within the window; every buffer, slot and count of the picker comes home.
//! 5. An exchange that can go on does.
//!
//! Replay one with `WEIR_SEED=<n> cargo test --lib exchange::simulation`.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::*;
use crate::op::random::Random;
use crate::op::{BufferId, Request};
use crate::service::{Balance, Directory, Endpoint, Manner, Update};
use frames::{Found, STRANGER, Word};

mod frames;

const SEEDS: u64 = 10_000;
const BUFFERS: u16 = 24;
const TEXTS: u16 = 40;
const BUFFER_BYTES: usize = 64;
const HEAD: FlowId = FlowId::new(0);

/// Everything outside the exchange but the ring's requests.
struct World {
    buffers: Vec<Vec<u8>>,
    counts: [u64; Outcome::ALL.len()],
    home: Vec<BufferId>,
    slots: Vec<FlowId>,
    texts: Vec<BufferId>,
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

    fn ejected(&mut self) {}

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

/// The client's side of the connection.
struct Client {
    /// Requests that want an answer and have none, in order.
    asked: Vec<Word>,
    beats: usize,
    broken: bool,
    fins: bool,
    got: Vec<u8>,
    /// The last answer said so.
    is_last: bool,
    said: usize,
    says: Vec<u8>,
}

/// An upstream connection, as its server sees it.
#[derive(Default)]
struct Server {
    /// Answers that are on their way.
    answers: Vec<u8>,
    /// Requests to answer.
    asked: Vec<Word>,
    broken: bool,
    ends: bool,
    got: Vec<u8>,
    is_silent: bool,
    service: u64,
}

struct Life {
    cancelled: Vec<(FlowId, Request)>,
    client: Client,
    error_chance: u64,
    exchange: Option<Exchange>,
    in_flight: Vec<(FlowId, Request, Op)>,
    now: u32,
    picker: Picker,
    pieces: Pieces,
    protocol: Protocol,
    random: Random,
    rules: Rules,
    servers: HashMap<FlowId, Server>,
    starved: Vec<(FlowId, Side)>,
    started: Instant,
    wishes: Vec<Wish>,
    words: HashMap<u64, Word>,
    world: World,
}

fn addr(service: u64, endpoint: u64) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, service as u8], 1000 + endpoint as u16))
}

impl Life {
    fn new(seed: u64) -> Life {
        let mut random = Random::new(seed);
        let all = [Protocol::Bolt, Protocol::Dubbo, Protocol::Http1];
        let protocol = all[random.below(3) as usize];
        let started = Instant::now();
        let mut directory = Directory::default();
        for service in 0..3 {
            let endpoints = (0..1 + random.below(3)).map(|one| Endpoint::new(addr(service, one)));
            let endpoints =
                if service == 2 && random.one_in(4) { vec![] } else { endpoints.collect() };
            let manner = Manner::of(Balance::RoundRobin);
            directory.set(&format!("com.s{service}"), manner, endpoints, started);
        }
        let ids = (0..BUFFERS).map(BufferId);
        let home = ids.take(4 + random.below(20) as usize).collect();
        let rules = Rules {
            connect: 300,
            head: 600,
            idle: (!random.one_in(3)).then_some(4000),
            leg_idle: 1000,
            pieces_max: 8 + random.below(30) as u32,
            request: Some(200),
            tick_ms: 16,
            whole_bytes_max: random.below(120) as u32,
            window_bytes: 600 + random.below(800) as u32,
        };
        let size = [2, 8, 60][random.below(3) as usize];
        let mut life = Life {
            cancelled: Vec::new(),
            client: Client::new(),
            error_chance: [0, 0, 200, 40][random.below(4) as usize],
            exchange: None,
            in_flight: Vec::new(),
            now: u32::MAX - 500,
            picker: Picker::new(Update::new(directory.table(), None), 0),
            pieces: Pieces::new(BUFFERS + TEXTS, 400),
            protocol,
            rules,
            servers: HashMap::new(),
            starved: Vec::new(),
            started,
            wishes: Vec::new(),
            words: HashMap::new(),
            world: World {
                buffers: vec![vec![0; 128]; usize::from(BUFFERS + TEXTS)],
                counts: [0; Outcome::ALL.len()],
                home,
                slots: (1..1 + random.below(12) as u32).map(FlowId::new).collect(),
                texts: (BUFFERS..BUFFERS + TEXTS).map(BufferId).collect(),
            },
            random,
        };
        (1..=1 + life.random.below(size)).for_each(|id| life.ask(id));
        life
    }

    /// The client will say one thing more.
    fn ask(&mut self, id: u64) {
        let random = &mut self.random;
        let service = if random.one_in(12) { STRANGER } else { random.below(3) };
        let len = [3, 20, 150][random.below(3) as usize];
        let word = Word { id, len: random.below(len) as usize, service, style: random.below(4) };
        if random.one_in(10) {
            let beat = frames::heartbeat(self.protocol, id);
            self.client.beats += usize::from(!beat.is_empty());
            self.client.says.extend(beat);
        }
        let one_way = self.protocol != Protocol::Http1 && random.one_in(8);
        self.client.says.extend(frames::request(self.protocol, word, one_way));
        if !one_way {
            self.client.asked.push(word);
        }
        self.words.insert(id, word);
    }

    fn act(&mut self, act: impl FnOnce(&mut Exchange, &mut Means<'_, World>)) {
        let mut scratch = [0; 1024];
        let ticks = u64::from(self.now.wrapping_sub(u32::MAX - 500));
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
        for Wish { slot, op } in std::mem::take(&mut self.wishes) {
            let request = match op {
                Op::Connect => Request::Connect,
                Op::Receive { side, .. } => Request::Receive(side),
                Op::Send { from, .. } => Request::Send(from),
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
                Request::Receive(Side::Downstream) | Request::Send(Side::Upstream)
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
    fn next(&mut self) -> Option<(FlowId, Completion)> {
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
            let errno = (was_cancelled && !self.random.one_in(3)).then_some(Errno(ECANCELED));
            let answer = match op {
                Op::Connect => Some((self.connect(slot, errno), false)),
                Op::Receive { side, credit_bytes, .. } => {
                    self.receive(slot, side, credit_bytes, errno)
                }
                Op::Send { from, segments } => {
                    Some((self.send(slot, from, segments, errno), false))
                }
                _ => None,
            };
            let Some((completion, more)) = answer else { continue };
            if !more {
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

    fn connect(&mut self, slot: FlowId, errno: Option<Errno>) -> Completion {
        let failed = self.random.one_in(self.error_chance / 8).then_some(Errno(111));
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
        let fails = self.random.one_in(self.error_chance);
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
            return if ends { result(Ok(None), false) } else { None };
        }
        let Some(buffer) = self.world.home.pop() else { return result(Err(Errno(ENOBUFS)), false) };
        let most = left.len().min(BUFFER_BYTES).min(credit_bytes as usize);
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
            Side::Downstream => self.servers[&slot].broken || self.random.one_in(self.error_chance),
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

    /// Servers read and answer, as they like.
    fn serve(&mut self) {
        let (protocol, random) = (self.protocol, &mut self.random);
        for server in self.servers.values_mut() {
            while let Some((found, len)) = frames::find(protocol, &server.got, false, false) {
                server.got.drain(..len);
                let Found::Full(_, text, wants) = found else { panic!("a server got {found:?}") };
                let id: u64 = text.split('/').nth(2).unwrap().parse().unwrap();
                let word = self.words[&id];
                assert_eq!(text, word.text(), "as it was sent");
                assert_eq!(word.service, server.service, "misrouted");
                // Some are never answered: their time runs out. HTTP cannot answer what comes later.
                let is_heard = !random.one_in(self.error_chance);
                server.is_silent |= !is_heard && protocol == Protocol::Http1;
                if wants && is_heard && !server.is_silent {
                    server.asked.push(word);
                }
            }
            if server.asked.is_empty() || server.ends || random.one_in(3) {
                continue;
            }
            let any = if protocol == Protocol::Http1 { 1 } else { server.asked.len() as u64 };
            let word = server.asked.remove(random.below(any) as usize);
            let closes = protocol == Protocol::Http1 && random.one_in(20);
            server.answers.extend(frames::answer(protocol, word, closes));
            server.ends = closes || random.one_in(self.error_chance * 2);
        }
    }

    /// The client reads what has come.
    fn read(&mut self) {
        loop {
            let is_over = self.exchange.as_ref().unwrap().closed() == Some(CloseReason::Finished);
            let client = &mut self.client;
            let found = frames::find(self.protocol, &client.got, true, is_over);
            let Some((found, len)) = found else { return };
            client.got.drain(..len);
            assert!(!client.is_last, "said that it was the last");
            let is_http = self.protocol == Protocol::Http1;
            let id = match found {
                Found::Beat if is_http => continue,
                Found::Beat => {
                    client.beats = client.beats.checked_sub(1).expect("a heartbeat was sent");
                    continue;
                }
                Found::Refused(id, closes) => {
                    client.is_last = closes;
                    if is_http { client.asked[0].id } else { id }
                }
                Found::Full(said, text, closes) => {
                    client.is_last = is_http && closes;
                    let id: u64 = text.split('/').nth(2).unwrap().parse().unwrap();
                    assert!(is_http || said == id, "an answer under another's id");
                    assert_eq!(text, self.words[&id].text(), "as it was answered");
                    id
                }
            };
            let at = client.asked.iter().position(|word| word.id == id);
            let at = at.unwrap_or_else(|| panic!("{id} is answered twice, or was never asked"));
            assert!(!is_http || at == 0, "out of order: {id} before {:?}", client.asked);
            client.asked.remove(at);
        }
    }
}

impl Client {
    fn new() -> Client {
        Client {
            asked: Vec::new(),
            beats: 0,
            broken: false,
            fins: true,
            got: Vec::new(),
            is_last: false,
            said: 0,
            says: Vec::new(),
        }
    }
}

/// One life and how it ended; panics where a promise is broken.
fn live(seed: u64) -> (CloseReason, [u64; Outcome::ALL.len()]) {
    let mut life = Life::new(seed);
    life.client.fins = !life.random.one_in(3);
    let home = (life.world.home.len(), life.world.slots.len(), life.world.texts.len());
    life.act(|_, _| {});
    let mut steps = 0;
    loop {
        let exchange = life.exchange.as_ref().unwrap();
        if let Some(reason) = exchange.closed() {
            life.read();
            assert_eq!(
                (life.world.home.len(), life.world.slots.len(), life.world.texts.len()),
                home
            );
            assert!(life.in_flight.is_empty(), "{:?}", life.in_flight);
            let counted =
                life.picker.tallies(life.started).iter().map(|tally| tally.flows).sum::<u32>();
            assert_eq!(counted, 0, "requests are counted as open");
            let Client { asked, beats, got, is_last, .. } = &life.client;
            if reason == CloseReason::Finished {
                assert!(got.is_empty(), "half a frame: {:?}", String::from_utf8_lossy(got));
                assert!(
                    *is_last || (asked.is_empty() && *beats == 0),
                    "without an answer: {asked:?}"
                );
            }
            return (reason, life.world.counts);
        }
        steps += 1;
        assert!(steps < 50_000, "the exchange goes round in circles");
        let alarm = exchange.alarm();
        let all_said = life.client.said == life.client.says.len();
        let Some((slot, completion)) = life.next() else {
            if !life.cancelled.is_empty() {
                continue; // It loses the race next time.
            }
            let Some(alarm) = alarm else {
                assert!(
                    all_said && life.client.asked.is_empty(),
                    "it hangs: {exchange:?}",
                    exchange = life.exchange
                );
                life.act(|exchange, means| exchange.drain(means));
                continue;
            };
            life.now = alarm;
            life.act(|exchange, means| {
                exchange.step(HEAD, Completion::Expired(crate::op::Timer::Idle), means);
            });
            continue;
        };
        life.act(|exchange, means| exchange.step(slot, completion, means));
        life.read();
    }
}

#[test]
fn any_order_of_events_keeps_every_promise() {
    if let Ok(seed) = std::env::var("WEIR_SEED") {
        let reason = live(seed.parse().expect("WEIR_SEED is a number"));
        eprintln!("seed {seed} ended: {reason:?}");
        return;
    }
    let (mut ended, mut counts) = ([0; CloseReason::COUNT], [0; Outcome::ALL.len()]);
    for seed in 0..SEEDS {
        let Ok((reason, counted)) = std::panic::catch_unwind(|| live(seed)) else {
            panic!("replay with WEIR_SEED={seed} cargo test --lib exchange::simulation");
        };
        ended[reason as usize] += 1;
        counts.iter_mut().zip(counted).for_each(|(all, more)| *all += more);
    }
    eprintln!("{ended:?} {counts:?}");
    // A simulation in which all goes well, or nothing does, proves little.
    assert!(ended[CloseReason::Finished as usize] > SEEDS / 3, "{ended:?}");
    assert!(ended[CloseReason::UpstreamReset as usize] > 0, "{ended:?}");
    for outcome in Outcome::ALL {
        if matches!(outcome, Outcome::Bad | Outcome::OtherService) {
            continue; // Nobody says such a thing here.
        }
        assert!(counts[outcome as usize] > SEEDS / 200, "{outcome:?}: {counts:?}");
    }
}
