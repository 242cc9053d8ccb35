// SPDX-License-Identifier: Apache-2.0
//! Active checks: tries from the control thread whether endpoints accept connections, or answer a
//! heartbeat.
//!
//! Each address is tried once an interval, however many services have it; at most so many at a
//! time. What is found goes into the directory, and from there to the workers.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::services::Services;
use crate::service::{Check, CheckKind, Table};
use crate::takeover::connect;
use crate::wire::{Stop, bolt, dubbo};

/// What was found at an address, and when to look again.
struct Record {
    /// Attempts in a row that contradict what is believed.
    against: u8,
    check: Check,
    is_healthy: bool,
    is_looking: bool,
    next: Instant,
}

/// Looks until the end. `mark` keeps the checks from being captured.
pub(super) async fn run(services: Arc<Services>, mark: Option<u32>) {
    let mut records: HashMap<SocketAddr, Record> = HashMap::new();
    let mut probes: JoinSet<(SocketAddr, bool)> = JoinSet::new();
    let mut revision = 0;
    loop {
        let table = services.table();
        if table.revision != revision {
            revision = table.revision;
            refresh(&mut records, &table);
        }
        let now = Instant::now();
        let due = records.iter_mut().filter(|(_, record)| !record.is_looking && record.next <= now);
        for (addr, record) in due.take(PROBES_MAX.saturating_sub(probes.len())) {
            record.is_looking = true;
            record.next = now + record.check.interval;
            let (addr, Check { interval, kind }) = (*addr, record.check);
            let within = interval.min(PROBE_WITHIN);
            probes.spawn(async move { (addr, answers(addr, kind, within, mark).await) });
        }
        let rest = if records.is_empty() { IDLE_LOOK } else { LOOK };
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            Some(Ok((addr, is_healthy))) = probes.join_next() => {
                let Some(record) = records.get_mut(&addr) else { continue };
                if record.heard(is_healthy) {
                    tracing::info!(%addr, is_healthy, "endpoint");
                    services.change(|directory| {
                        directory.set_health(addr, is_healthy, Instant::now())
                    });
                }
            }
        }
    }
}

/// The addresses of all services that want to be checked, each at its shortest interval and by what asks
/// for most, and with what the table believes of them.
fn refresh(records: &mut HashMap<SocketAddr, Record>, table: &Table) {
    let mut wanted: HashMap<SocketAddr, (Check, bool)> = HashMap::new();
    for service in table.services() {
        let Some(check) = service.manner.check else { continue };
        for member in service.members() {
            let believed = (check, member.is_healthy);
            let (all, _) = wanted.entry(member.endpoint.addr).or_insert(believed);
            all.interval = all.interval.min(check.interval);
            all.kind = all.kind.max(check.kind);
        }
    }
    records.retain(|addr, _| wanted.contains_key(addr));
    for (addr, (check, is_healthy)) in wanted {
        let new =
            || Record { against: 0, check, is_healthy, is_looking: false, next: Instant::now() };
        let record = records.entry(addr).or_insert_with(new);
        record.check = check;
        // It may have left and come back between two looks: what the table believes is what a check
        // can contradict.
        if record.is_healthy != is_healthy {
            (record.against, record.is_healthy) = (0, is_healthy);
        }
    }
}

impl Record {
    /// Takes in one attempt; true if belief has changed.
    fn heard(&mut self, is_healthy: bool) -> bool {
        self.is_looking = false;
        self.against = if is_healthy == self.is_healthy { 0 } else { self.against + 1 };
        let is_turned = self.against >= TURNS_AFTER;
        if is_turned {
            (self.against, self.is_healthy) = (0, is_healthy);
        }
        is_turned
    }
}

/// Whether who is there does in time what `kind` asks for.
pub(super) async fn answers(
    addr: SocketAddr,
    kind: CheckKind,
    within: Duration,
    mark: Option<u32>,
) -> bool {
    let look = async {
        let stream = connect(addr, mark).await?;
        match kind {
            CheckKind::Bolt => beats(stream, &bolt::heartbeat(BEAT), is_bolt_beat).await,
            CheckKind::Dubbo => beats(stream, &dubbo::heartbeat(BEAT.into()), is_dubbo_beat).await,
            CheckKind::Tcp => Ok(true),
        }
    };
    matches!(tokio::time::timeout(within, look).await, Ok(Ok(true)))
}

/// Whether the first thing that is said there is an answer to this heartbeat.
async fn beats(
    mut stream: TcpStream,
    heartbeat: &[u8],
    is_answer: fn(&[u8]) -> Result<bool, Stop>,
) -> io::Result<bool> {
    stream.write_all(heartbeat).await?;
    let mut said = Vec::new();
    loop {
        match is_answer(&said) {
            Err(Stop::NeedMore(_)) if said.len() < BEAT_BYTES_MAX => {}
            answer => return Ok(answer == Ok(true)),
        }
        if stream.read_buf(&mut said).await? == 0 {
            return Ok(false);
        }
    }
}

fn is_bolt_beat(said: &[u8]) -> Result<bool, Stop> {
    let frame = bolt::parse(said)?;
    Ok(frame.kind == bolt::Kind::HeartbeatAnswer && frame.request_id == BEAT && frame.status == 0)
}

fn is_dubbo_beat(said: &[u8]) -> Result<bool, Stop> {
    let frame = dubbo::parse(said)?;
    let is_answer = frame.kind == dubbo::Kind::Response && frame.is_event;
    Ok(is_answer && frame.request_id == u64::from(BEAT) && frame.status == DUBBO_WELL)
}

/// Whether a connection is accepted there and stays for a moment: a weir whose application is gone
/// accepts, and hangs up.
pub(super) async fn stays(addr: SocketAddr, mark: Option<u32>) -> bool {
    let connected = tokio::time::timeout(PROBE_WITHIN, connect(addr, mark)).await;
    let Ok(Ok(stream)) = connected else { return false };
    // Who speaks first is there, too.
    match tokio::time::timeout(STAYS_FOR, stream.peek(&mut [0])).await {
        Ok(said) => said.is_ok_and(|bytes| bytes > 0),
        Err(_) => true,
    }
}

/// The id of every heartbeat, each of which has a connection of its own.
const BEAT: u32 = 1;
/// An answer is a tenth of it.
const BEAT_BYTES_MAX: usize = 256;
const DUBBO_WELL: u8 = 20;
/// Attempts in a row that change what is believed.
const TURNS_AFTER: u8 = 2;
/// Attempts at a time.
const PROBES_MAX: usize = 64;
/// An endpoint on the same continent answers far sooner.
const PROBE_WITHIN: Duration = Duration::from_secs(1);
/// A weir that cannot reach its application on the same host knows far sooner.
const STAYS_FOR: Duration = Duration::from_millis(300);
const LOOK: Duration = Duration::from_millis(20);
const IDLE_LOOK: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{Balance, Directory, Endpoint, Manner};

    fn directory(addrs: &[SocketAddr], directory: &mut Directory) -> Arc<Table> {
        let check = Some(Check { interval: Duration::from_millis(10), kind: CheckKind::Tcp });
        let manner = Manner { check, ..Manner::of(Balance::RoundRobin) };
        let endpoints = addrs.iter().map(|addr| Endpoint::new(*addr)).collect();
        directory.set("a", manner, endpoints, Instant::now());
        directory.table()
    }

    /// Services that share an address may ask for different things.
    #[test]
    fn address_is_looked_at_as_often_and_as_closely_as_any_service_asks() {
        let addr: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let (mut book, mut records) = (Directory::default(), HashMap::new());
        for (name, ms, kind) in [("a", 10, CheckKind::Tcp), ("b", 500, CheckKind::Bolt)] {
            let check = Some(Check { interval: Duration::from_millis(ms), kind });
            let manner = Manner { check, ..Manner::of(Balance::RoundRobin) };
            book.set(name, manner, vec![Endpoint::new(addr)], Instant::now());
        }
        refresh(&mut records, &book.table());
        let expected = Check { interval: Duration::from_millis(10), kind: CheckKind::Bolt };
        assert_eq!(records[&addr].check, expected);
    }

    #[test]
    fn only_an_answer_to_the_heartbeat_is_one() {
        let mut bolt = vec![1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(is_bolt_beat(&bolt), Ok(true));
        assert!(matches!(is_bolt_beat(&bolt[..9]), Err(Stop::NeedMore(_))));
        assert_eq!(is_bolt_beat(&bolt::heartbeat(BEAT)), Ok(false), "an echo");
        bolt[8] = 2;
        assert_eq!(is_bolt_beat(&bolt), Ok(false), "another id");
        assert!(is_bolt_beat(b"HTTP/1.1 400").is_err());
        let mut dubbo = vec![0xda, 0xbb, 0x22, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, b'N'];
        assert_eq!(is_dubbo_beat(&dubbo), Ok(true));
        assert_eq!(is_dubbo_beat(&dubbo::heartbeat(BEAT.into())), Ok(false), "an echo");
        dubbo[3] = 80;
        assert_eq!(is_dubbo_beat(&dubbo), Ok(false), "in trouble");
    }

    /// Whatever came between, a check contradicts what the table says, so that what it finds is news.
    #[test]
    fn record_believes_what_the_table_says() {
        let addr: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let (mut book, mut records) = (Directory::default(), HashMap::new());
        refresh(&mut records, &directory(&[addr], &mut book));
        assert!(records[&addr].is_healthy);
        // Found dead, gone for a moment that nobody looked at, and back: new, so healthy.
        records.get_mut(&addr).unwrap().is_healthy = false;
        assert!(book.set_health(addr, false, Instant::now()));
        directory(&[], &mut book);
        refresh(&mut records, &directory(&[addr], &mut book));
        assert!(records[&addr].is_healthy);
        // Dead in the table when the record is made: two answers are news.
        assert!(book.set_health(addr, false, Instant::now()));
        records.clear();
        refresh(&mut records, &book.table());
        let record = records.get_mut(&addr).unwrap();
        assert!(!record.heard(true) && record.heard(true));
        assert!(book.set_health(addr, true, Instant::now()));
    }
}
