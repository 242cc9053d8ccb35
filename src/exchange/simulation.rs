// SPDX-License-Identifier: Apache-2.0
//! Random lives of exchanges against a fake ring, each from a seed.
//!
//! A client sends requests of one protocol for several services over one connection, pipelined and cut
//! anywhere, with pauses; servers answer in any order (HTTP's in theirs), late, never, or break, and
//! ask the client themselves. The fake ring answers in any order, cuts sends short, fails, stalls, runs
//! out of buffers and of slots, lets cancels race. What must hold, whatever happens:
//!
//! 1. A server gets whole frames, unchanged, only of its own service, and only answers to what it has
//!    asked itself.
//! 2. The client gets whole frames: each request that wants one exactly one answer, its own or an
//!    error, in HTTP in order; only a reset may cut one.
//! 3. At most one request of a kind is in flight on a socket, and it is closed, once, only when none is.
//! 4. Every buffer, slot and count of the picker comes home.
//! 5. An exchange that can go on does, and one whose peers do nothing wrong ends well: it runs out of
//!    nothing, and no endpoint is put out of use.
//!
//! Replay one with `WEIR_SEED=<n> cargo test --lib exchange::simulation`.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use super::*;
use crate::op::random::Random;
use crate::op::{BufferId, Request};
use crate::service::{Balance, Directory, Endpoint, Manner, Update};
use frames::{Found, STRANGER, Word};
use world::{Server, World};

mod frames;
mod world;

const SEEDS: u64 = 10_000;
const BUFFERS: u16 = 96;
const TEXTS: u16 = 40;
const HEAD: FlowId = FlowId::new(0);
/// The first tick: they run over soon.
const START: u32 = u32::MAX - 500;

/// The client's side of the connection.
#[derive(Default)]
struct Client {
    /// Requests that want an answer and have none, in order.
    asked: Vec<Word>,
    beats: usize,
    broken: bool,
    fins: bool,
    got: Vec<u8>,
    /// The rest of its last request never comes.
    hangs: bool,
    /// It has sent FIN.
    has_ended: bool,
    /// FIN has come.
    has_fin: bool,
    /// Something has come that must be the last.
    is_last: bool,
    said: usize,
    says: Vec<u8>,
}

/// How often what goes wrong: one in so many times, never for 0.
#[derive(Default)]
struct Luck {
    /// An answer of HTTP is its connection's last.
    closes: u64,
    /// A socket breaks, or an answer never comes.
    fails: u64,
    /// The client falls silent for a while.
    pauses: u64,
    /// A server has something to say of its own accord.
    pushes: u64,
    /// The client does not read for a while.
    stalls_client: u64,
    /// There are few buffers.
    starves: bool,
    /// A dial gets no answer for a while, or a server does not read, or falls silent.
    stalls_servers: u64,
}

struct Life {
    cancelled: Vec<(FlowId, Request)>,
    client: Client,
    exchange: Option<Exchange>,
    in_flight: Vec<(FlowId, Request, Op)>,
    /// When something last happened on a socket.
    last: u32,
    luck: Luck,
    now: u32,
    picker: Picker,
    pieces: Pieces,
    protocol: Protocol,
    pushed: u64,
    random: Random,
    rules: Rules,
    /// How long nothing had happened when it last ran out of time.
    silence: u32,
    servers: BTreeMap<FlowId, Server>,
    /// What is in flight and gets no answer for a while.
    stalled: Vec<(FlowId, Request)>,
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
        let rules = Rules {
            connect: 300,
            head: 600,
            idle: (!random.one_in(3)).then_some(4000),
            callback: 60,
            leg_idle: 1000,
            linger: 300,

            pieces_max: 8 + random.below(30) as u32,
            request: Some(200),
            tick_ms: 16,
            whole_bytes_max: random.below(120) as u32,
            window_bytes: 600 + random.below(800) as u32,
        };
        let luck = Luck::new(&mut random);
        let size = [2, 8, 60][random.below(3) as usize];
        let mut life = Life {
            cancelled: Vec::new(),
            client: Client::default(),
            exchange: None,
            in_flight: Vec::new(),
            last: START,
            now: START,
            picker: Picker::new(Update::new(directory.table(), None), 0),
            pieces: Pieces::new(BUFFERS + TEXTS, 140 + random.below(300) as u32),
            protocol,
            pushed: 0,
            rules,
            silence: 0,
            servers: BTreeMap::new(),
            stalled: Vec::new(),
            starved: Vec::new(),
            started,
            wishes: Vec::new(),
            words: HashMap::new(),
            world: World::new(luck.starves, &mut random),
            luck,
            random,
        };
        let asks_on = life.luck.pushes > 0 && !life.random.one_in(4);
        life.client.fins = !asks_on && !life.random.one_in(3);
        let last = 1 + life.random.below(size);
        (1..=last).for_each(|id| life.ask(id, id == last));
        life
    }

    /// The client will say one thing more.
    fn ask(&mut self, id: u64, is_last: bool) {
        let random = &mut self.random;
        let is_http = self.protocol == Protocol::Http1;
        let service = if random.one_in(12) { STRANGER } else { random.below(3) };
        let len = [3, 20, 150][random.below(3) as usize];
        let word = Word {
            closes: is_http && is_last && random.one_in(4),
            id,
            len: random.below(len) as usize,
            number: id,
            pad: if random.one_in(8) { random.below(400) as usize } else { 0 },
            service,
            style: random.below(4),
        };
        if random.one_in(10) {
            let beat = frames::heartbeat(self.protocol, id);
            self.client.beats += usize::from(!beat.is_empty());
            self.client.says.extend(beat);
        }
        if is_http && random.one_in(10) {
            self.client.says.extend(b"\r\n");
        }
        if is_http && is_last && !word.closes && random.one_in(4) {
            // What no server understands, and whatever is behind it.
            self.client.asked.push(Word { closes: true, ..word });
            return self.client.says.extend(b"what\x01ever\r\n\r\nGET / HTTP/1.1\r\n\r\n");
        }
        let one_way = !is_http && random.one_in(8);
        self.client.says.extend(frames::request(self.protocol, word, one_way));
        if !one_way {
            self.client.asked.push(word);
        }
        self.words.insert(id, word);
    }

    /// Servers read and answer, as they like.
    fn serve(&mut self) {
        let (protocol, luck, random) = (self.protocol, &self.luck, &mut self.random);
        for server in self.servers.values_mut() {
            while let Some((found, len)) = frames::find(protocol, &server.got, false, false) {
                server.got.drain(..len);
                let (text, wants) = match found {
                    Found::Asks { text, wants } => (text, wants),
                    Found::Answers { number, text, .. } => {
                        server.is_answered(number, &text);
                        continue;
                    }
                    Found::Beat { number, wants: true } => {
                        server.answers.extend(frames::heartbeat_answer(protocol, number));
                        continue;
                    }
                    Found::Refused { number, .. } => {
                        server.called.retain(|word| word.number != number);
                        continue;
                    }
                    found => panic!("a server got {found:?}"),
                };
                let word = self.words[&id_in(&text)];
                assert_eq!(text, word.text(), "as it was sent");
                assert_eq!(word.service, server.service, "misrouted");
                // Some are never answered: their time runs out. HTTP cannot answer what comes later.
                let is_heard = !random.one_in(luck.fails);
                server.is_silent |= !is_heard && protocol == Protocol::Http1;
                if wants && is_heard && !server.is_silent {
                    server.asked.push(word);
                }
            }
            if protocol != Protocol::Http1 && random.one_in(luck.pushes) && server.pushes < 80 {
                self.pushed += 1;
                server.pushes += 1;
                let (id, number) = (1_000_000 + self.pushed, server.pushes);
                let word = Word { id, len: 5, number, style: random.below(4), ..Word::default() };
                let one_way = random.one_in(2);
                server.answers.extend(frames::request(protocol, word, one_way));
                self.words.insert(id, word);
                server.called.extend((!one_way).then_some(word));
            }
            if server.asked.is_empty() || server.ends || random.one_in(3) {
                continue;
            }
            let any = if protocol == Protocol::Http1 { 1 } else { server.asked.len() as u64 };
            let word = server.asked.remove(random.below(any) as usize);
            let is_http = protocol == Protocol::Http1;
            let closes = is_http && (random.one_in(luck.closes) || word.closes && word.len > 1);
            server.answers.extend(frames::answer(protocol, word, closes));
            server.ends = closes || random.one_in(luck.fails * 2);
        }
    }

    /// The client reads what has come.
    fn read(&mut self) {
        let is_closed = self.exchange.as_ref().unwrap().closed() == Some(CloseReason::Finished);
        let is_http = self.protocol == Protocol::Http1;
        while let Some((found, len)) =
            frames::find(self.protocol, &self.client.got, true, is_closed || self.client.has_fin)
        {
            let client = &mut self.client;
            client.got.drain(..len);
            assert!(!client.is_last, "said that it was the last");
            let id = match found {
                Found::Early => continue,
                Found::Beat { wants: false, .. } => {
                    client.beats = client.beats.checked_sub(1).expect("a heartbeat was sent");
                    continue;
                }
                Found::Beat { .. } => panic!("the client is asked whether it lives"),
                Found::Asks { text, wants } => {
                    let word = self.words[&id_in(&text)];
                    assert_eq!(text, word.text(), "as it was sent");
                    if wants && !client.has_ended && !self.random.one_in(10) {
                        client.says.extend(frames::answer(self.protocol, word, false));
                    }
                    continue;
                }
                Found::Refused { number, closes } => {
                    client.is_last = closes;
                    if is_http { client.asked[0].id } else { number }
                }
                Found::Answers { number, text, closes } => {
                    client.is_last = is_http && closes;
                    let id = id_in(&text);
                    assert!(is_http || number == id, "an answer under another's id");
                    assert_eq!(text, self.words[&id].text(), "as it was answered");
                    id
                }
            };
            let at = client.asked.iter().position(|word| word.id == id);
            let at = at.unwrap_or_else(|| panic!("{id} is answered twice, or was never asked"));
            assert!(!is_http || at == 0, "out of order: {id} before {:?}", client.asked);
            client.is_last |= client.asked.remove(at).closes;
        }
    }

    /// How it ended, and whether that was right.
    fn judge(&self, reason: CloseReason) {
        let Life { client, luck, world, .. } = self;
        match reason {
            CloseReason::Finished => {
                let Client { asked, beats, got, is_last, .. } = client;
                assert!(got.is_empty(), "half a frame: {:?}", String::from_utf8_lossy(got));
                let is_answered = asked.is_empty() && *beats == 0;
                assert!(*is_last || is_answered, "without an answer: {asked:?}");
            }
            CloseReason::DownstreamReset => assert!(client.broken, "the client has done nothing"),
            CloseReason::IdleTimeout => {
                let is_idle = self.rules.idle.is_some_and(|idle| self.silence >= idle);
                let is_waited_for = is_idle || luck.pauses > 0 || client.hangs;
                assert!(is_waited_for, "who waits for the client?");
            }
            CloseReason::UpstreamReset => assert!(!luck.is_fair(), "no server has done anything"),
            reason => panic!("it ended by {reason:?}"),
        }
        if luck.is_fair() {
            let blamed = [Outcome::Broken, Outcome::Timeout].map(|one| world.counts[one as usize]);
            assert_eq!((blamed, world.ejected), ([0, 0], 0), "no server has done anything");
        }
        let flows = self.picker.tallies(self.started).iter().map(|tally| tally.flows).sum::<u32>();
        assert_eq!(flows, 0, "requests are counted as open");
    }
}

impl Luck {
    fn new(random: &mut Random) -> Luck {
        let mut one_of = |chances: [u64; 4]| chances[random.below(4) as usize];
        let pushes = one_of([0, 0, 20, 2]);
        Luck {
            closes: one_of([0, 0, 20, 20]),
            fails: one_of([0, 0, 200, 40]),
            pauses: one_of([0, 0, 0, 20]),
            pushes,
            // Where servers talk, many legs may hold some, and none can go home before another.
            starves: pushes == 0 && one_of([0, 0, 1, 1]) > 0,
            stalls_client: one_of([0, 0, 20, 4]),
            stalls_servers: one_of([0, 0, 20, 4]),
        }
    }

    /// No server does anything wrong, and we have what it takes.
    const fn is_fair(&self) -> bool {
        self.fails == 0 && self.stalls_servers == 0 && self.closes == 0 && !self.starves
    }
}

fn id_in(text: &str) -> u64 {
    text.split('/').nth(2).unwrap().parse().unwrap()
}

/// One life and how it ended; panics where a promise is broken.
fn live(seed: u64) -> (CloseReason, [u64; Outcome::ALL.len()]) {
    let mut life = Life::new(seed);
    (live_on(&mut life), life.world.counts)
}

fn live_on(life: &mut Life) -> CloseReason {
    let home = life.world.at_home();
    life.act(|_, _| {});
    let (mut alarms, mut steps) = (0, 0);
    loop {
        let exchange = life.exchange.as_ref().unwrap();
        if let Some(reason) = exchange.closed() {
            life.read();
            assert_eq!(life.world.at_home(), home, "buffers, slots and texts come home");
            assert!(life.in_flight.is_empty(), "{:?}", life.in_flight);
            life.judge(reason);
            return reason;
        }
        steps += 1;
        assert!(steps < 50_000, "the exchange goes round in circles");
        let alarm = exchange.alarm();
        let Some((slot, completion)) = life.next() else {
            let is_fair = life.luck.is_fair();
            let is_answering = is_fair && life.servers.values().any(Server::is_answering);
            if !life.cancelled.is_empty() || is_answering || life.wake(alarm.is_none()) {
                continue; // A cancel loses the race next time.
            }
            alarms += 1;
            let Some(alarm) = alarm.filter(|_| alarms % 100 > 0) else {
                let client = &life.client;
                let all_said = client.said == client.says.len();
                let is_heard = all_said && client.asked.is_empty() && client.beats == 0;
                assert!(is_heard || alarm.is_some(), "it hangs: {:?}", life.exchange);
                life.act(|exchange, means| exchange.drain(means));
                continue;
            };
            life.now = alarm;
            life.silence = alarm.wrapping_sub(life.last);
            life.act(|exchange, means| {
                exchange.step(HEAD, Completion::Expired(crate::op::Timer::Idle), means);
            });
            continue;
        };
        life.last = life.now;
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
        if outcome == Outcome::OtherService {
            continue; // Nobody says such a thing here.
        }
        assert!(counts[outcome as usize] > SEEDS / 200, "{outcome:?}: {counts:?}");
    }
}

/// Who begins a request and falls silent holds a connection, and is not waited for for ever, also where an idle
/// one is; what was asked before is answered.
#[test]
fn half_a_request_is_waited_for_as_long_as_the_rules_say() {
    for seed in 0..600 {
        let mut life = Life::new(seed);
        let Luck { starves, .. } = life.luck;
        life.luck = Luck { starves, ..Luck::default() };
        life.rules.idle = None;
        (life.client, life.words) = (Client { hangs: true, ..Client::default() }, HashMap::new());
        life.ask(1, false);
        let half = frames::request(life.protocol, Word { id: 2, ..Word::default() }, false);
        life.client.says.extend(&half[..1 + life.random.below(12) as usize]);
        let reason = live_on(&mut life);
        assert_eq!(reason, CloseReason::IdleTimeout, "seed {seed}");
        let Client { asked, beats, .. } = &life.client;
        assert!(asked.is_empty() && *beats == 0, "seed {seed}: {asked:?}");
        let lasted = life.now.wrapping_sub(START);
        let head = life.rules.head;
        assert!(lasted >= head && lasted < head + 300, "seed {seed}: {lasted} ticks");
    }
}
