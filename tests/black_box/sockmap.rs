// SPDX-License-Identifier: Apache-2.0
//! The sockmap relay: what the kernel forwards is every byte, in order, and every end as it was
//! meant; and what it cannot forward well comes back to user space without a seam.
//!
//! SM1 to SM10 are the lines of a table of what goes wrong without care: a FIN that overtakes, before a
//! fast reader (1) and a slow one (2), because no socket option shows the kernel's backlog (3) and
//! nothing but counting tells when it is empty (4); leaving the map in mid-stream (5), or by a flag (6);
//! parsers (7, see the unit tests of `bpf::sockmap`); bytes (8) and a FIN (9) from before; a reader that
//! never reads (10). Its last two, resets and urgent data, are those of every relay (`relays`).

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc;
use std::thread::scope;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, send as send_flagged};
use socket2::SockRef;
use tempfile::TempDir;

use crate::harness::rig::{FORWARD, LISTEN, Paced, Rig, SERVER};
use crate::harness::{
    Net, Place, Random, Weir, check, expect_eof, expect_reset, rounds, run, said, send, until, weir,
};

const NAMED: &str = "relay: { mode: sockmap }";
const TALK: &str = "relay: { sockmap_after_messages: 64 }";
const MB: u64 = 1 << 20;
/// Of a reader: as fast as it goes.
const FAST: u64 = u64::MAX;

fn forwarded(rig: &Rig) -> u64 {
    rig.weir.metric("weir_bytes_total", &["relay=\"sockmap\""])
}

/// How the bytes of the only flow move to its upstream.
fn to_upstream(rig: &Rig) -> String {
    let flows = rig.weir.flows();
    flows[0]["relay"]["to_upstream"].as_str().unwrap().to_owned()
}

/// A question and its answer, as often as asked.
pub(crate) fn exchange(mut client: &TcpStream, mut server: &TcpStream, times: u32) {
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

/// SM3: small messages go through the kernel, all of them, and are counted.
#[test]
fn small_messages_are_forwarded_by_the_kernel_and_counted() {
    let rig = Rig::with(NAMED);
    let (client, server) = rig.joined();
    let relay = &rig.weir.flows()[0]["relay"];
    assert_eq!(
        (&relay["to_upstream"], &relay["to_downstream"]),
        (&"sockmap".into(), &"sockmap".into())
    );
    exchange(&client, &server, 2000);
    let bytes = &rig.weir.flows()[0]["bytes"];
    assert_eq!(
        (&bytes["to_upstream"], &bytes["to_downstream"]),
        (&128_000.into(), &128_000.into())
    );
    drop(client);
    expect_eof(&server);
    drop(server);
    until("closed", || rig.weir.closed("finished") == 1);
    assert_eq!(forwarded(&rig), 256_000);
    rig.end();
}

/// SM1 to SM4, RL1: whoever ends its direction first, whatever its size, and however slowly it is read:
/// FIN comes behind all.
#[test]
fn fin_never_overtakes_what_the_kernel_forwards() {
    let rig = Rig::with(NAMED);
    let mut random = Random::new(1);
    let times = rounds(100, 1000);
    for round in 0..usize::try_from(times).unwrap() {
        let (client, server) = rig.joined();
        let (mut first, mut second) =
            if round % 2 == 0 { (client, server) } else { (server, client) };
        let sizes = [1, 3000, 60_000, MB, 10 * MB];
        let there = 1 + random.below(sizes[round % 5]);
        let back = 1 + random.below(sizes[(round + round / 5) % 5]);
        let reader = [FAST, FAST, 0, 50 * MB][round / 4 % 4];
        scope(|scope| {
            scope.spawn(|| {
                send(&mut first, 1, there).unwrap();
                first.shutdown(Shutdown::Write).unwrap();
                check(&mut Paced::new(&first, reader), 2, back);
                expect_eof(&first);
            });
            let early = round % 4 < 2;
            let mut writer = second.try_clone().unwrap();
            let sender = early.then(|| scope.spawn(move || send(&mut writer, 2, back).unwrap()));
            check(&mut Paced::new(&second, reader), 1, there);
            expect_eof(&second);
            match sender {
                Some(sender) => sender.join().unwrap(),
                None => send(&mut second, 2, back).unwrap(),
            }
            second.shutdown(Shutdown::Write).unwrap();
        });
    }
    until("all finished", || rig.weir.closed("finished") == times);
    rig.end();
}

/// SM3: 2 GB each way, or 20 with `WEIR_TEST_FULL=1`, every word, and nothing of it ever leaves the
/// kernel: each piece has arrived before the next one is sent.
#[test]
fn long_talk_is_whole_word_by_word() {
    let bytes = rounds(1_000 * MB, 10_000 * MB);
    let rig = Rig::with(&format!("{NAMED}\nsockets: {{ send_buffer_bytes: 1048576 }}"));
    let (client, server) = rig.joined();
    scope(|scope| {
        for (seed, from, to) in [(1, &client, &server), (2, &server, &client)] {
            let (tell, arrived) = mpsc::channel();
            scope.spawn(move || send(&mut InTurn { arrived, to: from }, seed, bytes).unwrap());
            scope.spawn(move || check(&mut Telling { from: to, tell }, seed, bytes));
        }
    });
    assert_eq!(to_upstream(&rig), "sockmap");
    assert_eq!(forwarded(&rig), 2 * bytes);
    drop((client, server));
    rig.end();
}

/// Writes a piece, and waits until it has arrived.
struct InTurn<'a> {
    arrived: mpsc::Receiver<usize>,
    to: &'a TcpStream,
}

impl Write for InTurn<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write_all(bytes)?;
        let mut left = bytes.len();
        while left > 0 {
            left -= self.arrived.recv().map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says what has arrived.
struct Telling<'a> {
    from: &'a TcpStream,
    tell: mpsc::Sender<usize>,
}

impl Read for Telling<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let came = self.from.read(bytes)?;
        // The writer may have ended, with an error of its own.
        let _ = self.tell.send(came);
        Ok(came)
    }
}

/// RL10: that the kernel has once left a direction to user space is no sign of life for ever.
#[test]
fn flow_that_the_kernel_has_left_to_user_space_becomes_idle() {
    let rig = Rig::with(&format!("{NAMED}\ntimeouts: {{ idle_ms: 2000 }}"));
    let (mut client, server) = rig.joined();
    client.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    while client.write(&[7; 65536]).is_ok() {}
    let labels = ["from=\"sockmap\"", "to=\"copy\"", "reason=\"backlog\""];
    assert_eq!(rig.weir.metric("weir_fallback_total", &labels), 1);
    until("the flow is idle", || rig.weir.closed("idle_timeout") == 1);
    drop((client, server));
    rig.end();
}

/// SM5, SM6: both directions leave the kernel in mid-stream, under full load, and no byte is
/// missing, doubled or out of order.
#[test]
fn directions_that_leave_the_kernel_in_mid_stream_go_on_without_a_seam() {
    const BYTES: u64 = 100 * MB;
    let rig = Rig::with(NAMED);
    let (client, server) = rig.joined();
    exchange(&client, &server, 50);
    scope(|scope| {
        for (from, to, seed) in [(&client, &server, 5), (&server, &client, 6)] {
            let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            scope.spawn(move || send(&mut from, seed, BYTES).unwrap());
            scope.spawn(move || check(&mut to, seed, BYTES));
        }
    });
    let labels = ["from=\"sockmap\"", "to=\"copy\"", "reason=\"backlog\""];
    assert!(rig.weir.metric("weir_fallback_total", &labels) >= 1);
    drop((client, server));
    rig.end();
}

/// SM8, SM9: what a client says at once, and an end that comes with it, before the kernel has
/// taken over, arrive as well.
#[test]
fn early_bytes_and_an_early_fin_arrive() {
    let rig = Rig::with(NAMED);
    let times = rounds(100, 1000);
    for seed in 0..times {
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
    until("all finished", || rig.weir.closed("finished") == times);
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
    exchange(&client, &server, 10);
    drop((client, server));
    rig.end();
}

/// SM11: a full table leaves further flows in user space, and says so.
#[test]
fn flow_that_finds_no_room_is_copied_and_counted() {
    let rig = Rig::with("relay: { mode: sockmap }\nlimits: { sockmap_flows_max: 1 }\n");
    let (client, server) = rig.joined();
    let (second, second_server) = rig.pair();
    let labels = ["from=\"sockmap\"", "reason=\"pairs\""];
    until("counted", || rig.weir.metric("weir_fallback_total", &labels) == 1);
    exchange(&second, &second_server, 100);
    exchange(&client, &server, 100);
    assert_eq!(rig.weir.metric("weir_bytes_total", &["relay=\"copy\""]), 2 * 6400);
    drop((client, server, second, second_server));
    rig.end();
}

/// SM12: killed with flows that the kernel forwards, some with bytes on their way, both ends of each see
/// the end, and within 5 seconds nothing is left.
#[test]
fn killed_weir_leaves_no_end_hanging() {
    let before = kernel_trouble();
    let rig = Rig::with(NAMED);
    let pairs: Vec<_> = (0..20).map(|_| rig.joined()).collect();
    pairs.iter().for_each(|(client, server)| exchange(client, server, 10));
    for (client, server) in pairs.iter().step_by(2) {
        [client, server].into_iter().for_each(|end| (&*end).write_all(&[7; 10_000]).unwrap());
    }
    let Rig { weir, listener, net } = rig;
    weir.kill();
    for end in pairs.iter().flat_map(|(client, server)| [client, server]) {
        // FIN or RST: the kernel closes what weir held, one after the other.
        match io::copy(&mut &*end, &mut io::sink()) {
            Ok(bytes) => assert!(bytes <= 10_000),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }
    let dead = Instant::now();
    drop((pairs, listener));
    until("no socket is left", || net.sockets().is_empty());
    assert!(dead.elapsed() < Duration::from_secs(5), "after {:?}", dead.elapsed());
    assert_eq!(kernel_trouble(), before);
}

/// SM13: flows that come and go while the kernel takes them over, from four threads at either end,
/// leave nothing: no pair, no socket, no memory, no word in the kernel log. 30 seconds of them, or
/// ten minutes with `WEIR_TEST_FULL=1`.
#[test]
fn storm_of_short_flows_leaves_nothing_behind() {
    let before = kernel_trouble();
    let rig = Rig::with(NAMED);
    rig.listener.set_nonblocking(true).unwrap();
    storm(&rig, Duration::from_secs(1));
    let (descriptors, bytes) = (rig.weir.next_descriptor(), rig.weir.anonymous_bytes());
    storm(&rig, Duration::from_secs(rounds(30, 600)));
    until("descriptors are given back", || rig.weir.next_descriptor() <= descriptors);
    assert!(rig.weir.anonymous_bytes() < bytes + 4 * MB);
    let joined = rig.weir.metric("weir_relay_changes_total", &["to=\"sockmap\""]) / 2;
    assert!(joined > rig.weir.opened() / 4, "{joined} of {} were joined", rig.weir.opened());
    assert_eq!(rig.weir.metric("weir_fallback_total", &["reason=\"pairs\""]), 0, "pairs are left");
    assert_eq!(kernel_trouble(), before);
    rig.end();
}

/// As many flows as can be had, for so long; then none is left.
fn storm(rig: &Rig, length: Duration) {
    let end = Instant::now() + length;
    scope(|scope| {
        for seed in 0..4 {
            let mut random = Random::new(seed);
            scope.spawn(move || {
                while Instant::now() < end {
                    match rig.listener.accept() {
                        Ok((stream, _)) => live_shortly(&stream, &mut random),
                        Err(_) => std::thread::yield_now(),
                    }
                }
            });
            let mut random = Random::new(seed + 4);
            scope.spawn(move || {
                rig.net.within(Place::Client, || {
                    while Instant::now() < end {
                        // Ports run out for a while: every third end leaves one in TIME_WAIT.
                        if let Ok(stream) = TcpStream::connect(LISTEN) {
                            live_shortly(&stream, &mut random);
                        }
                    }
                });
            });
        }
    });
    while let Ok((stream, _)) = rig.listener.accept() {
        drop(stream);
    }
    until("every flow has ended", || rig.weir.active() == 0);
}

/// One end of a flow says a little, hears a little, and ends in one of several ways; what the other end
/// does meanwhile is its own affair.
fn live_shortly(mut stream: &TcpStream, random: &mut Random) {
    let room = &mut [7; 3000][..1 + usize::try_from(random.below(2999)).unwrap()];
    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let hears_first = random.below(2) == 0;
    for turn in 0..random.below(4) {
        let _ = if (turn % 2 == 0) == hears_first { stream.read(room) } else { stream.write(room) };
    }
    let _ = match random.below(3) {
        0 => SockRef::from(stream).set_linger(Some(Duration::ZERO)),
        1 => stream.shutdown(Shutdown::Write).and_then(|()| stream.read(room)).map(drop),
        _ => Ok(()),
    };
}

/// Lines of the kernel's log that should not be there.
fn kernel_trouble() -> usize {
    run(&["dmesg"]).lines().filter(|line| is_trouble(line)).count()
}

fn is_trouble(line: &str) -> bool {
    ["BUG", "WARNING", "refcount", "general protection", "Oops"]
        .iter()
        .any(|word| line.contains(word))
}

/// Nobody may load a program, or this kernel is on the deny list, or what it does is not what it must
/// do (there is no loopback to try it on): a relay named by the user is refused with the reason, `auto`
/// says what it lacks and goes on by copy.
#[test]
fn where_it_cannot_be_trusted_the_relay_is_refused_and_auto_copies() {
    let bare = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"];
    let place = TempDir::new().unwrap();
    let profile = place.path().join("talk.yaml");
    fs::write(&profile, format!("summary: a test\ninclude: balanced\n{TALK}\n")).unwrap();
    let auto = [&FORWARD[..], &["--profile", profile.to_str().unwrap()]].concat();
    let cases: [(&[&str], bool, &str); 3] = [
        (&bare, true, "CAP_BPF"),
        (&["setarch", "--uname-2.6"], true, "is on the deny list"),
        (&["env"], false, "self-test"),
    ];
    for (wrapper, has_loopback, reason) in cases {
        let net = Net::new();
        if !has_loopback {
            net.run(Place::Node, &["ip", "link", "set", "lo", "down"]);
        }
        let words = [wrapper, &[weir(), "forward", "--relay", "sockmap", "--workers", "1"]];
        let refused = net.output(Place::Node, &[&words.concat()[..], &FORWARD].concat());
        assert_eq!(refused.status.code(), Some(4), "{}", said(&refused));
        assert!(said(&refused).contains(reason), "{}", said(&refused));

        let listener = net.listen(Place::Server, SERVER);
        let weir = Weir::under(&net, wrapper, &auto);
        let labels = ["from=\"sockmap\"", "to=\"copy\""];
        assert_eq!(weir.metric("weir_fallback_total", &labels), 1, "{reason}");
        let client = net.connect(Place::Client, LISTEN);
        let (server, _) = listener.accept().unwrap();
        exchange(&client, &server, 1000);
        assert_eq!(weir.flows()[0]["relay"]["to_upstream"], "copy");
        drop((client, server, listener));
        weir.end(&net);
    }
}

/// Talks until the kernel forwards what is said.
fn until_joined(rig: &Rig, client: &mut TcpStream, server: &mut TcpStream) {
    until("the kernel forwards", || {
        exchange(client, server, 20);
        // Whoever is not asked again at once sleeps.
        to_upstream(rig) == "sockmap"
    });
}

/// `auto` copies what is short, gives to the kernel what talks long in small messages, and takes
/// it back when it becomes bulk.
#[test]
fn auto_gives_small_talk_to_the_kernel_and_takes_bulk_back() {
    let rig = Rig::with(TALK);
    let (mut client, mut server) = rig.pair();
    exchange(&client, &server, 10);
    assert_eq!(to_upstream(&rig), "copy");
    until_joined(&rig, &mut client, &mut server);
    scope(|scope| {
        scope.spawn(|| send(&mut &client, 9, 50 * MB).unwrap());
        check(&mut &server, 9, 50 * MB);
    });
    assert_eq!(to_upstream(&rig), "copy");
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    expect_reset(&mut server);
    drop(server);
    rig.end();
}

/// Bulk is no small talk, however small its pieces are when it begins, when it ends and on its way: it
/// goes to splice, and comes back to splice after a pause.
#[test]
fn auto_never_gives_bulk_to_the_kernel() {
    let rig = Rig::with(
        "relay: { sockmap_after_messages: 64, splice_after_bytes: 100000, \
         splice_fullness_percent: 5 }",
    );
    let (client, mut server) = rig.pair();
    for seed in 0..4 {
        (&client).write_all(&[7; 64]).unwrap();
        server.read_exact(&mut [0; 64]).unwrap();
        for _ in 0..500 {
            server.write_all(&[7; 1000]).unwrap();
            (&client).read_exact(&mut [0; 1000]).unwrap();
        }
        scope(|scope| {
            scope.spawn(|| send(&mut &server, seed, 16 * MB).unwrap());
            check(&mut &client, seed, 16 * MB);
        });
        let spliced = rig.weir.metric("weir_bytes_total", &["relay=\"splice\""]);
        assert!(spliced > (seed + 1) * 8 * MB, "round {seed}: {spliced} bytes were spliced");
    }
    assert_eq!(forwarded(&rig), 0);
    drop((client, server));
    rig.end();
}

/// A direction that leaves the kernel because it is bulk takes the other with it: what is passed while
/// the kernel has yet to send something on the same socket would be charged to nobody.
#[test]
fn both_directions_leave_the_kernel_when_one_is_bulk() {
    let rig = Rig::with(NAMED);
    let (client, server) = rig.joined();
    scope(|scope| {
        scope.spawn(|| send(&mut &client, 9, 50 * MB).unwrap());
        check(&mut &server, 9, 50 * MB);
    });
    exchange(&client, &server, 1);
    let relay = &rig.weir.flows()[0]["relay"];
    assert_eq!((&relay["to_upstream"], &relay["to_downstream"]), (&"copy".into(), &"copy".into()));
    exchange(&client, &server, 100);
    drop((client, server));
    rig.end();
}
