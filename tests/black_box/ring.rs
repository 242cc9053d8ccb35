// SPDX-License-Identifier: Apache-2.0
//! The kernel's side: refused rings, starved buffers, reused slots, sudden death.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::thread::scope;

use socket2::SockRef;

use crate::harness::{
    Net, PATIENCE, Place, Random, Weir, check, echo, expect_eof, receive, rounds, said, send,
    until, weir,
};

const LISTEN: &str = "10.98.1.1:7000";
const SERVER: &str = "10.98.2.2:7001";
const FORWARD: [&str; 4] = ["--listen", LISTEN, "--to", SERVER];

/// Runs `weir forward` under a seccomp filter that answers io_uring_setup with `errno`.
fn refused(errno: u32) -> Output {
    // A filter of four instructions (linux/filter.h): load the number of the call, compare it with
    // io_uring_setup (425 everywhere), and return SECCOMP_RET_ERRNO or SECCOMP_RET_ALLOW.
    let script = r#"
        my ($errno, @program) = @ARGV;
        my $prctl = `uname -m` =~ /x86_64/ ? 157 : 167;
        my $filter = pack("SCCL" x 4, 0x20,0,0,0, 0x15,0,1,425, 0x06,0,0,0x50000|$errno, 0x06,0,0,0x7fff0000);
        my $list = pack("Sx6P", 4, $filter);
        syscall($prctl, 38, 1, 0, 0, 0) == 0 or die "no_new_privs: $!";
        syscall($prctl, 22, 2, $list) == 0 or die "seccomp: $!";
        exec @program or die "exec: $!";
    "#;
    let arguments = ["forward", "--listen", "127.0.0.1:1", "--to", "127.0.0.1:2"];
    Command::new("perl")
        .args(["-e", script, "--", &errno.to_string(), weir()])
        .args(arguments)
        .output()
        .unwrap()
}

/// IO1: one clear line, exit code 4, whatever the sandbox answers.
#[test]
fn refused_ring_is_one_clear_line() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let output = refused(errno.cast_unsigned());
        let text = said(&output);
        assert_eq!(output.status.code(), Some(4), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("io_uring") && text.contains("seccomp"), "{text}");
    }
}

/// IO2: what an older kernel lacks is done another way: said, counted, and not a byte is lost.
#[test]
fn ways_of_older_kernels_lose_nothing() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    echo(listener);
    let all = ["receive_limit", "descriptor_install", "deferred_work"];
    let every = all.join(",");
    for without in all.into_iter().chain([every.as_str()]) {
        let starter = ["env", &format!("WEIR_WITHOUT={without}")];
        let weir = Weir::under(&net, &starter, &FORWARD);
        for feature in without.split(',') {
            let label = format!("from=\"{feature}\"");
            assert_eq!(weir.metric("weir_fallback_total", &[&label]), 1, "{feature}");
        }
        scope(|scope| {
            for seed in 0..16 {
                let mut reader = net.connect(Place::Client, LISTEN);
                let mut writer = reader.try_clone().unwrap();
                scope.spawn(move || {
                    send(&mut writer, seed, 3_000_000).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                scope.spawn(move || {
                    check(&mut reader, seed, 3_000_000);
                    expect_eof(&reader);
                });
            }
        });
        assert_eq!(weir.closed("finished"), 16, "{without}");
        weir.end(&net);
    }
}

/// IO3, IO10: far too few buffers for everybody: all wait their turn and nobody loses a byte.
#[test]
fn starved_flows_wait_and_lose_nothing() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let profile = "summary: a test\nring: { entries: 64, completions: 128, spin_us: 0 }\n\
                   buffers: { small_count: 2, small_bytes: 4096, bulk_count: 2, bulk_bytes: 8192 }\n\
                   relay: { segments_max: 2, window_bytes: 8192, bulk_after_bytes: 16384 }\n\
                   sockets: { send_buffer_bytes: 4608, receive_buffer_bytes: 4608 }\n";
    let weir = Weir::forward_with(&net, profile, &FORWARD);
    echo(listener);
    scope(|scope| {
        for seed in 0..200 {
            let stream = net.connect(Place::Client, LISTEN);
            scope.spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                let mut writer = stream;
                let sender = std::thread::spawn(move || {
                    send(&mut writer, seed, 150_000).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                check(&mut reader, seed, 150_000);
                expect_eof(&reader);
                sender.join().unwrap();
            });
        }
    });
    assert!(weir.metric("weir_buffers_exhausted_total", &[]) > 0, "the pools were tight");
    weir.end(&net);
}

/// IO3: far more happens at once than the smallest completion ring holds: the kernel keeps the rest,
/// nothing is lost, and it is counted.
#[test]
fn completions_beyond_the_ring_are_kept_and_counted() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let profile = "summary: a test\nring: { entries: 64, completions: 128, spin_us: 0 }\n";
    let weir = Weir::forward_with(&net, profile, &FORWARD);
    echo(listener);
    weir.signal(nix::sys::signal::Signal::SIGSTOP);
    let mut clients: Vec<_> = (0..500).map(|_| net.connect(Place::Client, LISTEN)).collect();
    for (seed, client) in (0..).zip(&mut clients) {
        send(client, seed, 4000).unwrap();
    }
    weir.signal(nix::sys::signal::Signal::SIGCONT);
    for (seed, client) in (0..).zip(&mut clients) {
        check(client, seed, 4000);
    }
    assert!(weir.metric("weir_ring_overflows_total", &[]) > 0);
    drop(clients);
    weir.end(&net);
}

/// IO3: while everybody waits for buffers that nobody gives back, the worker sleeps.
#[test]
fn starved_worker_does_not_spin() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let weir = Weir::forward_with(&net, TWO_BUFFERS, &FORWARD);
    let stalled = || {
        let client = net.connect(Place::Client, LISTEN);
        let (server, _) = listener.accept().unwrap();
        fill(&client);
        (client, server)
    };
    let pairs: Vec<_> = (0..20).map(|_| stalled()).collect();
    let enters = || weir.metric("weir_ring_enters_total", &[]);
    let mut last = enters();
    until("the worker comes to rest", || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let now = enters();
        // Asking costs the worker nothing; a timer or two may fire.
        let rests = now - last < 20;
        last = now;
        rests
    });
    drop(pairs);
    weir.end(&net);
}

/// IO3: buffers that come back reach whoever has something to read, also behind many that starved with
/// nothing to read and take none.
#[test]
fn idle_flows_that_starved_do_not_stand_in_the_way() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let weir = Weir::forward_with(&net, TWO_BUFFERS, &FORWARD);
    let pair = || (net.connect(Place::Client, LISTEN), listener.accept().unwrap().0);
    let starved = || weir.metric("weir_buffers_exhausted_total", &[]);
    let stalled: Vec<_> = (0..3).map(|_| pair()).inspect(|(client, _)| fill(client)).collect();
    until("the stalled ones hold every buffer", || starved() > 0);
    let idle: Vec<_> = (0..20).map(|_| pair()).collect();
    let (mut client, mut server) = pair();
    until("idle ones starve", || starved() >= 40);
    client.write_all(b"a word").unwrap();
    drop(stalled);
    let mut word = [0; 6];
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    server.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"a word");
    drop((idle, client, server));
    weir.end(&net);
}

/// Writes until the socket is full.
fn fill(mut client: &TcpStream) {
    client.set_nonblocking(true).unwrap();
    while client.write(&[1; 65536]).is_ok() {}
}

const TWO_BUFFERS: &str = "summary: a test\nring: { spin_us: 0 }\n\
    buffers: { small_count: 2, small_bytes: 4096, bulk_count: 2, bulk_bytes: 4096 }\n\
    relay: { segments_max: 2, window_bytes: 4096, bulk_after_bytes: 1000000000 }\n\
    sockets: { send_buffer_bytes: 4608 }\n";

/// IO5: slots change hands all the time, and no byte gets into the wrong ones.
#[test]
fn reused_slots_never_mix_flows() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let profile = "summary: a test\ninclude: balanced\nlimits: { flows_max: 8 }\n";
    let weir = Weir::forward_with(&net, profile, &FORWARD);
    echo(listener);
    let net = &net;
    scope(|scope| {
        for thread in 0..6u64 {
            scope.spawn(move || {
                let mut random = Random::new(thread);
                for round in 0..100 {
                    let seed = thread * 1000 + round;
                    let bytes = random.below(20_000) + 1;
                    let mut stream = net.connect(Place::Client, LISTEN);
                    send(&mut stream, seed, bytes).unwrap();
                    if random.below(3) == 0 {
                        // Away with answers still on their way.
                        let linger = Some(std::time::Duration::ZERO);
                        SockRef::from(&stream).set_linger(linger).unwrap();
                        continue;
                    }
                    check(&mut stream, seed, bytes);
                }
            });
        }
    });
    assert_eq!(weir.opened(), 600);
    weir.end(net);
}

/// IO6: a weir that died in the middle of its work leaves its port to the next one.
#[test]
fn port_of_a_killed_weir_is_taken_over_at_once() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    echo(listener);
    for _ in 0..rounds(20, 200) {
        let weir = Weir::forward(&net, &FORWARD);
        let streams: Vec<_> = (0..50).map(|_| net.connect(Place::Client, LISTEN)).collect();
        scope(|scope| {
            for (seed, stream) in (0..).zip(&streams) {
                let (mut writer, mut reader) = (stream, stream);
                // Until it dies: FIN or RST, but not silence, and no wrong byte before.
                scope.spawn(move || send(&mut writer, seed, u64::MAX));
                scope.spawn(move || receive(&mut reader, seed, u64::MAX));
            }
            until("bytes flow", || weir.metric("weir_bytes_total", &[]) > 20_000_000);
            weir.kill();
        });
    }
}

/// IO8: what the kernel had accepted when the drain began is served to its end.
#[test]
fn connection_accepted_before_a_drain_is_served() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    let mut weir = Weir::forward(&net, &FORWARD);
    echo(listener);
    let mut served = Vec::new();
    for seed in 0..200 {
        if seed == 100 {
            weir.signal(nix::sys::signal::Signal::SIGTERM);
        }
        let Ok(mut stream) = net.try_connect(Place::Client, LISTEN) else { break };
        if send(&mut stream, seed, 100).is_ok() {
            served.push((stream, seed));
        }
    }
    let mut whole = 0;
    for (mut stream, seed) in served {
        // Those that the listener never handed over are reset; no answer is cut short.
        let mut answer = Vec::new();
        let _ = stream.shutdown(Shutdown::Write);
        if stream.read_to_end(&mut answer).is_ok() {
            check(&mut answer.as_slice(), seed, 100);
            whole += 1;
        }
    }
    assert!(whole >= 100, "only {whole} of those before the drain were served");
    assert_eq!(weir.wait().code(), Some(0));
}

/// RS1, IO3: with no descriptor left accept pauses, flows go on, and it recovers by itself.
#[test]
fn accept_pauses_without_descriptors_and_recovers() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVER);
    echo(listener);
    // A limit for each source needs addresses, so connections come as descriptors.
    let place = tempfile::TempDir::new().unwrap();
    let profile = place.path().join("small.yaml");
    let text = "summary: a test\nlimits: { flows_max: 6, flows_per_source_max: 5 }\n";
    std::fs::write(&profile, text).unwrap();
    let arguments = [&FORWARD[..], &["--profile", profile.to_str().unwrap()]].concat();
    let usual = Weir::forward(&net, &arguments);
    // A start needs a few more for a moment.
    let limit = usual.next_descriptor() + 4;
    usual.end(&net);
    let starter = ["prlimit", &format!("--nofile={limit}:{limit}")];
    let weir = Weir::under(&net, &starter, &arguments);
    let mut first = net.connect(Place::Client, LISTEN);
    send(&mut first, 1, 10).unwrap();
    check(&mut first, 1, 10);
    // The rest is taken by those who ask and do not go away.
    let mut asking = Vec::new();
    until("no descriptor is left", || {
        let is_over = weir.next_descriptor() >= limit;
        if !is_over && asking.len() < 16 {
            asking.push(UnixStream::connect(weir.socket()).unwrap());
        }
        is_over
    });
    let mut waiting = net.connect(Place::Client, LISTEN);
    send(&mut waiting, 2, 10).unwrap();
    // The second number is the length of the accept queue.
    let queue = ["ss", "-Hltn", "sport", "=", ":7000"];
    until("it waits in the accept queue", || {
        net.run(Place::Node, &queue).split_whitespace().nth(1) == Some("1")
    });
    send(&mut first, 3, 10).unwrap();
    check(&mut first, 3, 10);
    drop(asking);
    check(&mut waiting, 2, 10);
    assert!(weir.metric("weir_accept_paused_total", &[]) > 0);
    drop((first, waiting));
    weir.end(&net);
}
