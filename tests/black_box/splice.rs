// SPDX-License-Identifier: Apache-2.0
//! The splice relay, and how auto takes it and leaves it.

use std::io::{Read, Write};
use std::process::{Command, Output};
use std::sync::atomic::AtomicU64;
use std::thread::scope;
use std::time::{Duration, Instant};

use crate::harness::rig::{Counted, FORWARD, LISTEN, Paced, Rig, SERVER, until_stopped};
use crate::harness::{Net, Place, Weir, check, echo, run, said, send, until, weir};

const EAGER: &str = "relay: { splice_after_bytes: 100000, splice_fullness_percent: 5 }";
const SPLICE: &str = "relay: { mode: splice }";

/// The relay of the only flow: to upstream, to downstream.
fn relays(rig: &Rig) -> (String, String) {
    let flows = rig.weir.flows();
    let word = |way: &str| flows[0]["relay"][way].as_str().unwrap().to_owned();
    (word("to_upstream"), word("to_downstream"))
}

fn fallbacks(rig: &Rig, reason: &str) -> u64 {
    let labels = ["from=\"splice\"", "to=\"copy\"", &format!("reason=\"{reason}\"")];
    rig.weir.metric("weir_fallback_total", &labels)
}

fn ping(mut client: impl Write, mut server: impl Read) {
    client.write_all(&[7; 64]).unwrap();
    server.read_exact(&mut [0; 64]).unwrap();
}

/// One direction proves bulky and is spliced, the other is not; when reads get short it comes back.
#[test]
fn auto_splices_the_bulky_direction_while_it_is_bulky() {
    let rig = Rig::with(EAGER);
    let (mut client, mut server) = rig.pair();
    ping(&mut client, &mut server);
    let (pipes, sockets) = (rig.weir.descriptors("pipe:"), rig.weir.descriptors("socket:"));
    let (copy, splice) = ("copy".to_owned(), "splice".to_owned());
    assert_eq!(relays(&rig), (copy.clone(), copy.clone()));
    scope(|scope| {
        scope.spawn(|| send(&mut client, 1, 8 << 20).unwrap());
        check(&mut server, 1, 8 << 20);
    });
    assert_eq!(relays(&rig), (splice, copy.clone()));
    assert!(rig.weir.metric("weir_bytes_total", &["relay=\"splice\""]) > 4 << 20);
    assert_eq!(rig.weir.metric("weir_relay_changes_total", &["to=\"splice\""]), 1);
    until("short reads bring it back", || {
        ping(&mut client, &mut server);
        relays(&rig).0 == copy
    });
    assert_eq!(rig.weir.metric("weir_relay_changes_total", &["to=\"copy\""]), 1);
    // The pipe stays in reserve; the descriptors of both sockets are given back.
    assert_eq!(rig.weir.descriptors("pipe:"), pipes + 2);
    until("descriptors are given back", || rig.weir.descriptors("socket:") <= sockets);
    drop((client, server));
    rig.end();
}

/// IO3: a direction that has come back from splice waits for a stalled reader asleep, as before.
#[test]
fn direction_back_from_splice_waits_for_its_reader_asleep() {
    const MB: u64 = 1 << 20;
    // More than can be on its way when its reader stops: so it is not spliced once more meanwhile.
    let rig = Rig::with("relay: { splice_after_bytes: 20000000, splice_fullness_percent: 5 }");
    rig.net.limit_buffers();
    let (client, server) = rig.pair();
    let bulk = |seed| {
        scope(|scope| {
            scope.spawn(|| send(&mut &client, seed, 8 * MB).unwrap());
            check(&mut &server, seed, 8 * MB);
        });
        relays(&rig).0 == "splice"
    };
    // What a trial of copy has brought back, and not short reads, is spliced again as soon as that is over:
    // then it is not what is looked at here.
    let stalls_in_copy = |round: u64| {
        assert!((0..8).any(bulk), "bulk is spliced");
        until("it comes back", || {
            ping(&mut &client, &mut &server);
            relays(&rig).0 == "copy"
        });
        let (seed, sent) = (100 + round, AtomicU64::new(0));
        scope(|scope| {
            let mut counted = Counted(&client, &sent);
            scope.spawn(move || send(&mut counted, seed, 32 * MB).unwrap());
            until_stopped(&sent);
            let is_copied = relays(&rig).0 == "copy";
            let cpu = rig.weir.cpu();
            std::thread::sleep(Duration::from_secs(1));
            let cpu = rig.weir.cpu() - cpu;
            check(&mut &server, seed, 32 * MB);
            assert!(cpu < Duration::from_millis(50), "{cpu:?} of CPU for nothing");
            is_copied
        })
    };
    assert!((0..8).any(stalls_in_copy), "short reads bring it back");
    drop((client, server));
    rig.end();
}

/// RL6: "try again" of a pipe of one page means full or empty, and the flow knows which.
#[test]
fn pipe_of_one_page_carries_everything() {
    let rig = Rig::with("relay: { mode: splice, pipe_bytes: 4096 }");
    let (client, server) = rig.pair();
    scope(|scope| {
        scope.spawn(|| send(&mut &client, 1, 4 << 20).unwrap());
        check(&mut Paced::new(&server, 20 << 20), 1, 4 << 20);
    });
    assert_eq!(fallbacks(&rig, "stuck"), 0);
    drop((client, server));
    rig.end();
}

/// RL7: more directions hold bytes than there are pipes: the others go on by copy.
#[test]
fn flows_without_a_pipe_go_on_by_copy() {
    let rig = Rig::with(&format!("{SPLICE}\nlimits: {{ pipes_max: 2 }}"));
    let pipes = rig.weir.descriptors("pipe:");
    let pairs: Vec<_> = (0..6).map(|_| rig.pair()).collect();
    scope(|scope| {
        for (seed, (client, _)) in (0..).zip(&pairs) {
            scope.spawn(move || send(&mut &*client, seed, 20 << 20).unwrap());
        }
        until("pipes run out", || fallbacks(&rig, "pipes") > 0);
        assert!(rig.weir.descriptors("pipe:") <= pipes + 4);
        for (seed, (_, server)) in (0..).zip(&pairs) {
            scope.spawn(move || check(&mut &*server, seed, 20 << 20));
        }
    });
    drop(pairs);
    rig.end();
}

/// RL7: more flows than descriptors are allowed for: the others stay with copy.
#[test]
fn flows_without_descriptors_stay_with_copy() {
    let rig = Rig::with(&format!("{SPLICE}\nlimits: {{ spliced_flows_max: 2 }}"));
    let pairs: Vec<_> = (0..4).map(|_| rig.pair()).collect();
    for (seed, (client, server)) in (0..).zip(&pairs) {
        send(&mut &*client, seed, 50_000).unwrap();
        check(&mut &*server, seed, 50_000);
    }
    let spliced =
        || rig.weir.flows().iter().filter(|f| f["relay"]["to_upstream"] == "splice").count();
    assert_eq!(spliced(), 2);
    assert!(fallbacks(&rig, "descriptors") >= 2);
    drop(pairs);
    rig.end();
}

/// RL7: there is no descriptor for more pipes: flows that need one go on by copy.
#[test]
fn flows_that_can_open_no_pipe_go_on_by_copy() {
    let rig = Rig::with(SPLICE);
    let sockets = rig.weir.descriptors("socket:");
    let pairs: Vec<_> = (0..6).map(|_| rig.pair()).collect();
    // Lent ones, and none of a question that is being answered.
    until("descriptors are lent", || rig.weir.descriptors("socket:") == sockets + 12);
    let pid = rig.weir.pid().to_string();
    let allow = |most: usize| run(&["prlimit", "--pid", &pid, &format!("--nofile={most}:20000")]);
    allow(rig.weir.next_descriptor());
    let sent = [const { AtomicU64::new(0) }; 6];
    scope(|scope| {
        for ((seed, (client, _)), sent) in (0..).zip(&pairs).zip(&sent) {
            scope.spawn(move || send(&mut Counted(client, sent), seed, 20 << 20).unwrap());
        }
        for sent in &sent {
            until_stopped(sent);
        }
        allow(20_000);
        assert!(fallbacks(&rig, "pipes") > 0);
        for (seed, (_, server)) in (0..).zip(&pairs) {
            scope.spawn(move || check(&mut &*server, seed, 20 << 20));
        }
    });
    drop(pairs);
    rig.end();
}

/// RL7: the user has more pipes than it may (`fs.pipe-user-pages-soft`), so new ones hold two pages and
/// cannot be made larger: splice goes on with those.
#[test]
fn pipes_that_stay_small_are_no_error() {
    let soft = std::fs::read_to_string("/proc/sys/fs/pipe-user-pages-soft").unwrap();
    let pages = soft.trim().parse::<usize>().unwrap();
    let pipes: Vec<_> = (0..pages / 256 + 1)
        .map(|_| {
            let ends = nix::unistd::pipe().unwrap();
            nix::fcntl::fcntl(&ends.0, nix::fcntl::FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
            ends
        })
        .collect();
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    // Whoever has no capability is held to it, root too.
    let bare = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"];
    let weir = Weir::under(&net, &bare, &[&FORWARD[..], &["--relay", "splice"]].concat());
    let mut client = net.connect(Place::Client, LISTEN);
    let (mut server, _) = listener.accept().unwrap();
    scope(|scope| {
        scope.spawn(|| send(&mut client, 1, 8 << 20).unwrap());
        until("a pipe holds bytes", || weir.descriptors("pipe:") >= 2);
        check(&mut server, 1, 8 << 20);
    });
    // A count may be a turn behind.
    let spliced = || weir.metric("weir_bytes_total", &["relay=\"splice\""]);
    until("all of it was spliced", || spliced() == 8 << 20);
    drop((client, server, listener, pipes));
    weir.end(&net);
}

/// RL8: the last byte of a stream is not held back.
#[test]
fn last_byte_does_not_wait_for_more() {
    let rig = Rig::with(SPLICE);
    let (mut client, mut server) = rig.pair();
    let mut waits: Vec<Duration> = Vec::new();
    for seed in 0..21 {
        send(&mut client, seed, 100_000).unwrap();
        check(&mut server, seed, 100_000);
        let began = Instant::now();
        client.write_all(&[1]).unwrap();
        server.read_exact(&mut [0]).unwrap();
        waits.push(began.elapsed());
    }
    waits.sort_unstable();
    // A cork lets go after 200 ms.
    assert!(waits[10] < Duration::from_millis(100), "{waits:?}");
    drop((client, server));
    rig.end();
}

/// IO7: idle spliced flows wait in the ring, and not each in a thread of the kernel.
#[test]
fn idle_spliced_flows_take_no_threads() {
    let rig = Rig::with(&format!("{SPLICE}\nlimits: {{ spliced_flows_max: 5000, pipes_max: 8 }}"));
    let pipes = rig.weir.descriptors("pipe:");
    let threads = || std::fs::read_dir(format!("/proc/{}/task", rig.weir.pid())).unwrap().count();
    let before = threads();
    let _echo = echo(rig.listener.try_clone().unwrap());
    let mut clients = Vec::new();
    for _ in 0..5000 {
        let mut client = rig.net.connect(Place::Client, LISTEN);
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        clients.push(client);
    }
    let is_spliced = |flow: &serde_json::Value| {
        flow["relay"]["to_upstream"] == "splice" && flow["relay"]["to_downstream"] == "splice"
    };
    assert_eq!(rig.weir.flows().iter().filter(|flow| is_spliced(flow)).count(), 5000);
    // One for what a kernel thread may do for a ring, which has at most one of a kind.
    assert!(threads() <= before + 1, "{} threads after {before}", threads());
    assert!(rig.weir.descriptors("pipe:") <= pipes + 16, "idle flows hold no pipe");
    drop(clients);
    rig.end();
}

/// Runs `weir forward` where splice(2) is refused with EPERM.
fn without_splice(net: &Net, relay: &str, time_limit: &str) -> Output {
    // As in ring.rs: load the number of the call, compare it with splice (275, or 76 where the
    // generic table is used), and return SECCOMP_RET_ERRNO or SECCOMP_RET_ALLOW.
    let script = r#"
        my @program = @ARGV;
        my $is_x86 = `uname -m` =~ /x86_64/;
        my ($prctl, $splice) = $is_x86 ? (157, 275) : (167, 76);
        my $filter = pack("SCCL" x 4, 0x20,0,0,0, 0x15,0,1,$splice, 0x06,0,0,0x50001, 0x06,0,0,0x7fff0000);
        my $list = pack("Sx6P", 4, $filter);
        syscall($prctl, 38, 1, 0, 0, 0) == 0 or die "no_new_privs: $!";
        syscall($prctl, 22, 2, $list) == 0 or die "seccomp: $!";
        exec @program or die "exec: $!";
    "#;
    let forward = ["forward", "--workers", "1", "--listen", LISTEN, "--to", "10.98.2.2:7001"];
    let mut command: Command = net.command(Place::Node, "timeout");
    command.args([time_limit, "perl", "-e", script, "--", weir()]).args(forward);
    command.args(["--relay", relay]).output().unwrap()
}

/// A relay named by the user runs or is refused; auto falls back and says so.
#[test]
fn splice_that_is_forbidden_is_refused_or_fallen_back_from() {
    let net = Net::new();
    let refused = without_splice(&net, "splice", "20");
    assert_eq!(refused.status.code(), Some(4), "{}", said(&refused));
    assert!(said(&refused).contains("relay splice needs splice(2)"), "{}", said(&refused));
    // The time limit ends it with SIGTERM, and that drains.
    let auto = without_splice(&net, "auto", "2");
    assert!(said(&auto).contains("from=\"splice\" to=\"copy\""), "{}", said(&auto));
}

/// What splicing may need is there at the start, or weir does not start; auto takes what there is.
#[test]
fn too_few_descriptors_refuse_splice_and_limit_auto() {
    let net = Net::new();
    let words = ["sh", "-c", "ulimit -n 900 && exec \"$@\"", "sh", weir()];
    let profile = "{ include: balanced, limits: { flows_max: 300 } }";
    let place = tempfile::TempDir::new().unwrap();
    let file = place.path().join("few.yaml");
    std::fs::write(&file, profile).unwrap();
    let file = file.to_str().unwrap();
    let forward = [
        "forward",
        "--workers",
        "1",
        "--listen",
        LISTEN,
        "--to",
        "10.98.2.2:7001",
        "--profile",
        file,
    ];
    let splice = [&words[..], &forward[..], &["--relay", "splice"]].concat();
    let output = net.output(Place::Node, &splice);
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    let text = "relay splice needs RLIMIT_NOFILE of at least 2665, and it is 900";
    assert!(said(&output).contains(text), "{}", said(&output));
    let starter = ["prlimit", "--nofile=900:900"];
    let arguments = ["--listen", LISTEN, "--to", "10.98.2.2:7001", "--profile", file];
    let weir = Weir::under(&net, &starter, &arguments);
    assert!(weir.log().contains("fewer spliced flows"), "{}", weir.log());
    weir.end(&net);
}
