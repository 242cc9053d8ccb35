// SPDX-License-Identifier: Apache-2.0
//! The sockmap relay: what the kernel forwards is every byte, in order, and every end as it was
//! meant; and what it cannot forward well comes back to user space without a seam.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::scope;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, send as send_flagged};
use socket2::SockRef;

use crate::harness::{
    Net, Place, Random, Weir, check, expect_eof, expect_reset, receive, run, said, send, until,
    weir,
};

const LISTEN: &str = "10.98.1.1:7000";
const SERVER: &str = "10.98.2.2:7001";
const FORWARD: [&str; 4] = ["--listen", LISTEN, "--to", SERVER];
const NAMED: &str = "relay: { mode: sockmap }\n";
const MB: u64 = 1 << 20;

/// A weir in front of one server, and a pair of joined sockets for the asking.
struct Rig {
    weir: Weir,
    listener: TcpListener,
    net: Net,
}

impl Rig {
    /// With these keys on top of the balanced profile.
    fn with(profile: &str) -> Rig {
        let net = Net::new();
        let listener = net.listen(Place::Server, SERVER);
        let profile = format!("summary: a test\ninclude: balanced\n{profile}");
        let weir = Weir::forward_with(&net, &profile, &FORWARD);
        Rig { listener, net, weir }
    }

    fn pair(&self) -> (TcpStream, TcpStream) {
        let client = self.net.connect(Place::Client, LISTEN);
        let (server, _) = self.listener.accept().unwrap();
        server.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
        (client, server)
    }

    /// A pair that the kernel forwards between, both ways.
    fn joined(&self) -> (TcpStream, TcpStream) {
        let before = self.weir.metric("weir_relay_changes_total", &["to=\"sockmap\""]);
        let pair = self.pair();
        until("the kernel forwards", || {
            self.weir.metric("weir_relay_changes_total", &["to=\"sockmap\""]) >= before + 2
        });
        pair
    }

    fn forwarded(&self) -> u64 {
        self.weir.metric("weir_bytes_total", &["relay=\"sockmap\""])
    }

    fn end(self) {
        drop(self.listener);
        self.weir.end(&self.net);
    }
}

/// A question and its answer, as often as asked.
fn exchange(client: &mut TcpStream, server: &mut TcpStream, times: u32) {
    for number in 0..times {
        let message = number.to_le_bytes().repeat(16);
        let mut came = vec![0; message.len()];
        client.write_all(&message).unwrap();
        server.read_exact(&mut came).unwrap();
        assert_eq!(came, message);
        server.write_all(&message).unwrap();
        client.read_exact(&mut came).unwrap();
        assert_eq!(came, message);
    }
}

/// SM1: small messages go through the kernel, all of them, and are counted.
#[test]
fn small_messages_are_forwarded_by_the_kernel_and_counted() {
    let rig = Rig::with(NAMED);
    let (mut client, mut server) = rig.joined();
    let relay = &rig.weir.flows()[0]["relay"];
    assert_eq!(
        (&relay["to_upstream"], &relay["to_downstream"]),
        (&"sockmap".into(), &"sockmap".into())
    );
    exchange(&mut client, &mut server, 2000);
    let bytes = &rig.weir.flows()[0]["bytes"];
    assert_eq!(
        (&bytes["to_upstream"], &bytes["to_downstream"]),
        (&128_000.into(), &128_000.into())
    );
    drop(client);
    expect_eof(&server);
    drop(server);
    until("closed", || rig.weir.closed("finished") == 1);
    assert_eq!(rig.forwarded(), 256_000);
    rig.end();
}

/// SM2, SM3, RL1: whoever ends its direction first, and whatever its size, FIN comes behind all.
#[test]
fn fin_never_overtakes_what_the_kernel_forwards() {
    let rig = Rig::with(NAMED);
    let mut random = Random::new(1);
    for round in 0..100 {
        let (client, server) = rig.joined();
        let (mut first, mut second) =
            if round % 2 == 0 { (client, server) } else { (server, client) };
        let sizes = [1, 3000, 60_000, MB, 10 * MB];
        let there = 1 + random.below(sizes[round % 5]);
        let back = 1 + random.below(sizes[(round + round / 5) % 5]);
        scope(|scope| {
            scope.spawn(|| {
                send(&mut first, 1, there).unwrap();
                first.shutdown(Shutdown::Write).unwrap();
                check(&mut first, 2, back);
                expect_eof(&first);
            });
            let early = round % 4 < 2;
            let mut writer = second.try_clone().unwrap();
            let sender = early.then(|| scope.spawn(move || send(&mut writer, 2, back).unwrap()));
            check(&mut second, 1, there);
            expect_eof(&second);
            match sender {
                Some(sender) => sender.join().unwrap(),
                None => send(&mut second, 2, back).unwrap(),
            }
            second.shutdown(Shutdown::Write).unwrap();
        });
    }
    until("all finished", || rig.weir.closed("finished") == 100);
    rig.end();
}

/// RL2: the last block and FIN in one segment, after the other direction has ended.
#[test]
fn last_block_that_comes_with_fin_is_forwarded() {
    let rig = Rig::with(NAMED);
    for seed in 0..50 {
        let (mut client, mut server) = rig.joined();
        client.shutdown(Shutdown::Write).unwrap();
        expect_eof(&server);
        SockRef::from(&server).set_tcp_cork(true).unwrap();
        send(&mut server, seed, 700).unwrap();
        drop(server);
        check(&mut client, seed, 700);
        expect_eof(&client);
    }
    until("all finished", || rig.weir.closed("finished") == 50);
    rig.end();
}

/// SM6, RL3: a reader that stops makes the writer stop, soon, and nothing is lost when it goes on.
/// Nothing piles up in the kernel meanwhile but what sockets hold.
#[test]
fn stalled_reader_stops_the_writer_although_the_kernel_forwards() {
    const BYTES: u64 = 200 * MB;
    let rig = Rig::with(NAMED);
    let before = rig.weir.anonymous_bytes();
    let (client, mut server) = rig.joined();
    let sent = AtomicU64::new(0);
    scope(|scope| {
        let mut counted = Counted(&client, &sent);
        let writer = scope.spawn(move || send(&mut counted, 3, BYTES).unwrap());
        let mut last = (0, Instant::now());
        until("the writer stops", || {
            let now = sent.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            }
            now > 0 && last.1.elapsed() > Duration::from_millis(1000)
        });
        let stuck = sent.load(Ordering::Relaxed);
        assert!(stuck < 16 * MB, "{stuck} bytes went nowhere");
        let grown = rig.weir.anonymous_bytes().saturating_sub(before);
        assert!(grown < 4 * MB, "user memory grew by {grown} bytes");
        assert_eq!(rig.weir.flows()[0]["relay"]["to_upstream"], "copy");
        check(&mut server, 3, BYTES);
        writer.join().unwrap();
    });
    let labels = ["from=\"sockmap\"", "to=\"copy\"", "reason=\"backlog\""];
    assert_eq!(rig.weir.metric("weir_fallback_total", &labels), 1);
    drop((client, server));
    rig.end();
}

/// SM6, RL10: that the kernel has once left a direction to user space is no sign of life for ever.
#[test]
fn flow_that_the_kernel_has_left_to_user_space_becomes_idle() {
    let rig = Rig::with(&format!("{NAMED}timeouts: {{ idle_ms: 2000 }}\n"));
    let (mut client, server) = rig.joined();
    client.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    while client.write(&[7; 65536]).is_ok() {}
    let labels = ["from=\"sockmap\"", "to=\"copy\"", "reason=\"backlog\""];
    assert_eq!(rig.weir.metric("weir_fallback_total", &labels), 1);
    until("the flow is idle", || rig.weir.closed("idle_timeout") == 1);
    drop((client, server));
    rig.end();
}

/// Counts what was taken.
struct Counted<'a>(&'a TcpStream, &'a AtomicU64);

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = self.0.write(bytes)?;
        self.1.fetch_add(taken as u64, Ordering::Relaxed);
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// SM4, SM5: both directions leave the kernel in mid-stream, under full load, and no byte is
/// missing, doubled or out of order.
#[test]
fn directions_that_leave_the_kernel_in_mid_stream_go_on_without_a_seam() {
    const BYTES: u64 = 100 * MB;
    let rig = Rig::with(NAMED);
    let (mut client, mut server) = rig.joined();
    exchange(&mut client, &mut server, 50);
    scope(|scope| {
        for (from, to, seed) in [(&client, &server, 5), (&server, &client, 6)] {
            let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            scope.spawn(move || send(&mut from, seed, BYTES).unwrap());
            scope.spawn(move || check(&mut to, seed, BYTES));
        }
    });
    drop((client, server));
    rig.end();
}

/// SM8, RL4: a reset arrives as a reset, wherever it happens, while the kernel forwards.
#[test]
fn reset_of_one_end_resets_the_other_although_nobody_reads_in_between() {
    let rig = Rig::with(NAMED);
    let mut random = Random::new(4);
    for round in 0..100 {
        let (client, server) = rig.joined();
        let (mut sender, mut other) =
            if round % 2 == 0 { (client, server) } else { (server, client) };
        let before = random.below(if round % 3 == 0 { 1 } else { 200_000 } + 1);
        scope(|scope| {
            scope.spawn(|| {
                send(&mut sender, round, before).unwrap();
                SockRef::from(&sender).set_linger(Some(Duration::ZERO)).unwrap();
                drop(sender);
            });
            let came = receive(&mut other, round, before + 1);
            assert!(came.is_err(), "round {round}: EOF after {came:?} of {before} bytes");
        });
    }
    let resets = || ["downstream_reset", "upstream_reset"].map(|reason| rig.weir.closed(reason));
    until("every reset is counted", || resets().iter().sum::<u64>() == 100);
    rig.end();
}

/// SM9, SM10: what a client says at once, and an end that comes with it, before the kernel has
/// taken over, arrive as well.
#[test]
fn early_bytes_and_an_early_fin_arrive() {
    let rig = Rig::with(NAMED);
    for seed in 0..100 {
        let mut client = rig.net.connect(Place::Client, LISTEN);
        send(&mut client, seed, 5000).unwrap();
        if seed % 2 == 0 {
            client.shutdown(Shutdown::Write).unwrap();
        }
        let (mut server, _) = rig.listener.accept().unwrap();
        check(&mut server, seed, 5000);
        send(&mut server, seed, 3000).unwrap();
        check(&mut client, seed, 3000);
        drop(client);
        expect_eof(&server);
    }
    until("all finished", || rig.weir.closed("finished") == 100);
    rig.end();
}

/// RL13: an urgent byte keeps its place, and the stream goes on.
#[test]
fn urgent_byte_stays_in_its_place() {
    use std::os::fd::AsRawFd;
    let rig = Rig::with(NAMED);
    let (mut client, mut server) = rig.joined();
    client.write_all(b"ab").unwrap();
    send_flagged(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
    client.write_all(b"cd").unwrap();
    let mut came = [0; 5];
    server.read_exact(&mut came).unwrap();
    assert_eq!(&came, b"ab!cd");
    exchange(&mut client, &mut server, 10);
    drop((client, server));
    rig.end();
}

/// SM11: a full table leaves further flows in user space, and says so.
#[test]
fn flow_that_finds_no_room_is_copied_and_counted() {
    let rig = Rig::with("relay: { mode: sockmap }\nlimits: { sockmap_flows_max: 1 }\n");
    let (mut client, mut server) = rig.joined();
    let (mut second, mut second_server) = rig.pair();
    let labels = ["from=\"sockmap\"", "reason=\"pairs\""];
    until("counted", || rig.weir.metric("weir_fallback_total", &labels) == 1);
    exchange(&mut second, &mut second_server, 100);
    exchange(&mut client, &mut server, 100);
    assert_eq!(rig.weir.metric("weir_bytes_total", &["relay=\"copy\""]), 2 * 6400);
    drop((client, server, second, second_server));
    rig.end();
}

/// SM12: killed with flows that the kernel forwards, both ends of each see the end.
#[test]
fn killed_weir_leaves_no_end_hanging() {
    let Rig { weir, listener, net } = Rig::with(NAMED);
    let mut pairs = Vec::new();
    for _ in 0..20 {
        let client = net.connect(Place::Client, LISTEN);
        pairs.push((client, listener.accept().unwrap().0));
    }
    until("the kernel forwards", || {
        weir.metric("weir_relay_changes_total", &["to=\"sockmap\""]) == 40
    });
    pairs.iter_mut().for_each(|(client, server)| exchange(client, server, 10));
    weir.kill();
    for (client, server) in &mut pairs {
        for end in [client, server] {
            end.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
            // FIN or RST: the kernel closes what weir held, one after the other.
            let end = end.read(&mut [0; 16]);
            assert!(
                matches!(&end, Ok(0))
                    || end.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset
            );
        }
    }
    drop(pairs);
    until("no socket is left", || net.sockets().is_empty());
}

/// SM13: flows that come and go while the kernel takes them over, from four sides, in the end
/// leave nothing: no pair, no socket, no word in the kernel log. `WEIR_STORM_SECONDS` for longer.
#[test]
fn storm_of_short_flows_leaves_nothing_behind() {
    let seconds = std::env::var("WEIR_STORM_SECONDS").ok().and_then(|text| text.parse().ok());
    let until_then = Instant::now() + Duration::from_secs(seconds.unwrap_or(10));
    let kernel = || run(&["dmesg"]).lines().filter(|line| is_trouble(line)).count();
    let before = kernel();
    let rig = Rig::with(NAMED);
    scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                let (to, from) = mpsc::sync_channel(1);
                scope.spawn(move || live_shortly(seed, from));
                to
            })
            .collect();
        while Instant::now() < until_then {
            threads.iter().for_each(|thread| thread.send(rig.pair()).unwrap());
        }
    });
    assert_eq!(kernel(), before, "{}", run(&["dmesg"]));
    rig.end();
}

/// Each flow says a little and ends in one of several ways.
fn live_shortly(seed: u64, flows: mpsc::Receiver<(TcpStream, TcpStream)>) {
    let mut random = Random::new(seed);
    for (mut client, mut server) in flows {
        let bytes = random.below(3000);
        send(&mut client, seed, bytes).unwrap();
        match random.below(4) {
            0 => SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap(),
            1 => drop(server),
            _ => {
                server.write_all(b"ok").unwrap();
                client.read_exact(&mut [0; 2]).unwrap();
            }
        }
    }
}

fn is_trouble(line: &str) -> bool {
    ["BUG", "WARNING", "refcount", "general protection", "Oops"]
        .iter()
        .any(|word| line.contains(word))
}

/// A relay named by the user runs or is refused; `auto` says what it lacks and goes on.
#[test]
fn without_the_right_to_load_it_the_relay_is_refused_and_auto_falls_back() {
    let net = Net::new();
    let bare = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"];
    let command = |relay: &'static str| {
        let words = [&bare[..], &[weir(), "forward", "--relay", relay, "--workers", "1"], &FORWARD]
            .concat();
        net.output(Place::Node, &words)
    };
    let refused = command("sockmap");
    assert_eq!(refused.status.code(), Some(4), "{}", said(&refused));
    assert!(said(&refused).contains("CAP_BPF"), "{}", said(&refused));
}

/// `auto` copies what is short, gives to the kernel what talks long in small messages, and takes
/// it back when it becomes bulk.
#[test]
fn auto_gives_small_talk_to_the_kernel_and_takes_bulk_back() {
    let rig = Rig::with("relay: { sockmap_after_messages: 64 }\n");
    let (mut client, mut server) = rig.pair();
    exchange(&mut client, &mut server, 10);
    assert_eq!(rig.weir.flows()[0]["relay"]["to_upstream"], "copy");
    exchange(&mut client, &mut server, 100);
    assert_eq!(rig.weir.flows()[0]["relay"]["to_upstream"], "sockmap");
    scope(|scope| {
        scope.spawn(|| send(&mut client, 9, 50 * MB).unwrap());
        check(&mut server, 9, 50 * MB);
    });
    assert_eq!(rig.weir.flows()[0]["relay"]["to_upstream"], "copy");
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    expect_reset(&mut server);
    drop(server);
    rig.end();
}
