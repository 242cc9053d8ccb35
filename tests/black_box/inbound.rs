// SPDX-License-Identifier: Apache-2.0
//! Inbound tproxy: the workload sees its clients, the kernel tracks nothing, nobody loops.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::scope;

use nix::sys::signal::Signal;
use socket2::{Domain, Protocol, Socket, Type};

use crate::harness::{
    Net, Place, Weir, check, config_file, echo, expect_eof, expect_reset, said, send, until, weir,
};

/// Namespaces in which replies can be led back by mark.
fn prepared() -> Arc<Net> {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    Arc::new(net)
}

/// Both families, port 80 of the node.
fn doors() -> [(String, &'static str); 2] {
    let [v4, v6] = Net::NODE;
    [(format!("{v4}:80"), Net::CLIENT[0]), (format!("[{v6}]:80"), Net::CLIENT[1])]
}

/// A client dials `door`, and the workload sees whom it saw.
fn meet(net: &Net, app: &TcpListener, door: &str) -> (TcpStream, TcpStream, String) {
    let client = net.connect(Place::Client, door);
    let (served, seen) = app.accept().unwrap();
    (client, served, seen.ip().to_canonical().to_string())
}

fn no_conntrack(net: &Net) {
    assert_eq!(net.conntrack(), "", "connection tracking saw nothing");
}

/// CH2 for what nft takes: a weir that is stopped, not dead, keeps who comes waiting, whatever `on_exit`
/// says: nobody is lost, and everybody is served when it goes on.
#[test]
fn stopped_weir_keeps_clients_waiting() {
    for (capture, on_exit) in [("tproxy", "open"), ("redirect", "closed")] {
        let net = prepared();
        echo(net.listen(Place::Node, "[::]:80"));
        let config = format!(
            "workers: 1\non_exit: {on_exit}\ninbound: {{ capture: {capture}, source: own }}"
        );
        let mut weir = Weir::run(&net, &config);
        let (door, _) = &doors()[0];
        let mut open = net.connect(Place::Client, door);
        send(&mut open, 1, 1000).unwrap();
        check(&mut open, 1, 1000);
        weir.signal(Signal::SIGSTOP);
        let mut waiting: Vec<_> = (0..20).map(|_| net.connect(Place::Client, door)).collect();
        waiting.push(open);
        for (seed, client) in (2..).zip(&mut waiting) {
            send(client, seed, 1000).unwrap();
            client.set_nonblocking(true).unwrap();
            let nothing = client.read(&mut [0]).unwrap_err();
            assert_eq!(nothing.kind(), ErrorKind::WouldBlock, "{capture}");
            client.set_nonblocking(false).unwrap();
        }
        weir.signal(Signal::SIGCONT);
        for (seed, client) in (2..).zip(&mut waiting) {
            check(client, seed, 1000);
        }
        assert_eq!(weir.opened(), 21);
        drop(waiting);
        until("the flows end", || weir.active() == 0);
        weir.signal(Signal::SIGTERM);
        assert_eq!(weir.wait().code(), Some(0));
        // What `closed` leaves on purpose.
        net.run(Place::Node, &[self::weir(), "rules", "clear"]);
        until("the node is clean", || net.is_clean());
    }
}

/// TP3: hundreds of flows of one client at a time; each source port is free on both sides.
#[test]
fn hundreds_of_flows_of_one_client_stand_side_by_side() {
    let net = prepared();
    echo(net.listen(Place::Node, "[::]:80"));
    let weir = Weir::run(&net, "workers: 2\ninbound: {}");
    let mut streams = Vec::new();
    for seed in 0..600 {
        let (door, _) = &doors()[seed % 2];
        let mut stream = net.connect(Place::Client, door);
        send(&mut stream, seed as u64, 5000).unwrap();
        streams.push(stream);
    }
    until("all are open", || weir.active() == 600);
    let sources: HashSet<SocketAddr> =
        streams.iter().map(|stream| stream.local_addr().unwrap()).collect();
    assert_eq!(sources.len(), 600);
    for (seed, stream) in streams.iter_mut().enumerate() {
        check(stream, seed as u64, 5000);
    }
    no_conntrack(&net);
    drop(streams);
    weir.end(&net);
}

/// TP1: a client may use one port for two connections; weir's ports are its own.
#[test]
fn client_port_used_twice_makes_two_flows() {
    let net = prepared();
    echo(net.listen(Place::Node, "10.98.1.1:80"));
    echo(net.listen(Place::Node, "10.98.1.1:81"));
    let weir = Weir::run(&net, "workers: 1\ninbound: {}");
    let dial = |door| net.connect_from(Place::Client, "10.98.1.2:12345", door);
    let mut both = ["10.98.1.1:80", "10.98.1.1:81"].map(dial);
    for (seed, stream) in both.iter_mut().enumerate() {
        send(stream, seed as u64, 50_000).unwrap();
        check(stream, seed as u64, 50_000);
    }
    drop(both);
    weir.end(&net);
}

/// TP2: ports that somebody else holds are passed over.
#[test]
fn taken_source_port_is_passed_over() {
    let net = prepared();
    echo(net.listen(Place::Node, "10.98.1.1:80"));
    let held: Vec<Socket> = net.within(Place::Node, || {
        let hold = |port: u16| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_ip_transparent_v4(true).unwrap();
            socket.bind(&SocketAddr::from(([10, 98, 1, 2], port)).into()).unwrap();
            socket
        };
        (10_240..10_260).map(hold).collect()
    });
    let weir = Weir::run(&net, "workers: 1\ninbound: {}");
    for seed in 0..10 {
        let mut stream = net.connect(Place::Client, "10.98.1.1:80");
        send(&mut stream, seed, 1000).unwrap();
        check(&mut stream, seed, 1000);
    }
    assert_eq!(weir.closed("local_limit"), 0);
    drop(held);
    weir.end(&net);
}

/// TP3: when every source port is in use the next client is reset at once and counted; each
/// destination has its own.
#[test]
fn exhausted_source_ports_reset_at_once() {
    let net = prepared();
    echo(net.listen(Place::Node, "[::]:80"));
    echo(net.listen(Place::Node, "[::]:81"));
    let weir = Weir::run(&net, "workers: 1\ninbound: { source_ports: 20000-20063 }");
    let mut open: Vec<TcpStream> = Vec::new();
    for (count, door) in (1..).zip(["10.98.1.1:80", "10.98.1.1:81", "[fd98:1::1]:80"]) {
        let before = open.len();
        while weir.denied("source_ports") < count {
            // A reset may come before the connect returns.
            let client = net.try_connect(Place::Client, door);
            let counted = || weir.denied("source_ports") + weir.opened();
            until("it is served or denied", || counted() == (open.len() as u64 + count));
            match client {
                Ok(stream) if weir.denied("source_ports") < count => open.push(stream),
                Ok(mut stream) => expect_reset(&mut stream),
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            }
            assert!(open.len() - before <= 64, "64 ports");
        }
        // Ports that share a place in weir's table with a live connection are passed over.
        assert!(open.len() - before > 50, "{} flows", open.len() - before);
    }
    for (seed, stream) in (0..).zip(&mut open) {
        send(stream, seed, 1000).unwrap();
        check(stream, seed, 1000);
    }
    drop(open);
    weir.end(&net);
}

/// TP4: a rule that somebody removed is noticed, said, and put back.
#[test]
fn removed_rule_is_put_back() {
    let net = prepared();
    echo(net.listen(Place::Node, "[::]:80"));
    let weir = Weir::run(&net, "workers: 1\ninbound: {}");
    net.run(Place::Node, &["ip", "-4", "rule", "del", "lookup", "133"]);
    let rules = || net.run(Place::Node, &["ip", "-4", "rule"]);
    until("the rule is back", || rules().contains("lookup 133"));
    until("it is said", || weir.log().contains("the fwmark rule was gone"));
    let mut stream = net.connect(Place::Client, "10.98.1.1:80");
    send(&mut stream, 1, 1000).unwrap();
    check(&mut stream, 1, 1000);
    drop(stream);
    weir.end(&net);
}

/// TP5: ports that are left out, and clients on the node itself, are not taken: they reach the workload
/// directly.
#[test]
fn what_is_left_out_goes_directly() {
    for capture in ["tproxy", "redirect"] {
        let net = Net::new();
        echo(net.listen(Place::Node, "[::]:80"));
        echo(net.listen(Place::Node, "[::]:8022"));
        let config = format!(
            "workers: 1\ninbound: {{ capture: {capture}, source: own, ports: {{ exclude: [\"8000-8100\"] }} }}"
        );
        let weir = Weir::run(&net, &config);
        let directly = [
            (Place::Client, "10.98.1.1:8022"),
            (Place::Client, "[fd98:1::1]:8022"),
            (Place::Node, "10.98.1.1:80"),
            (Place::Node, "127.0.0.1:80"),
            (Place::Node, "[::1]:80"),
            (Place::Node, "[fd98:1::1]:80"),
        ];
        for (place, door) in directly.into_iter().chain([(Place::Client, "10.98.1.1:80")]) {
            let mut stream = net.connect(place, door);
            send(&mut stream, 1, 1000).unwrap();
            check(&mut stream, 1, 1000);
            let taken = u64::from(!directly.contains(&(place, door)));
            assert_eq!(weir.opened(), taken, "{capture}: {door}");
        }
        until("the direct ones are gone, too", || net.sockets().is_empty());
        weir.end(&net);
    }
}

/// TP2: weir was the first to end, and dials from the same port again at once: by their timestamps the kernel
/// tells the new connection from the one that rests in TIME_WAIT. Without timestamps such ports are passed
/// over, and who finds none is reset at once.
#[test]
fn resting_port_is_used_again_if_there_are_timestamps() {
    // A place of its own for each: a connection on a port that rests takes the timestamp over, if it has
    // none itself (`tcp_twsk_unique` in net/ipv4/tcp_ipv4.c), and leaves it to the next one.
    for (timestamps, served_of_200) in [(1, 200), (0, 64)] {
        let net = prepared();
        net.set(Place::Node, &format!("net.ipv4.tcp_timestamps={timestamps}"));
        echo(net.listen(Place::Node, "10.98.1.1:80"));
        let weir = Weir::run(&net, "workers: 1\ninbound: { source_ports: 20000-20063 }");
        let ask = || -> std::io::Result<()> {
            let mut client = net.try_connect(Place::Client, "10.98.1.1:80")?;
            client.write_all(b"x")?;
            client.read_exact(&mut [0])?;
            client.shutdown(Shutdown::Write)?;
            expect_eof(&client);
            until("the flow has ended", || weir.active() == 0);
            Ok(())
        };
        let served = (0..200).take_while(|_| ask().is_ok()).count();
        assert_eq!(served, served_of_200, "with 64 ports and tcp_timestamps={timestamps}");
        let refused = weir.closed("local_limit") + weir.denied("source_ports");
        assert_eq!(refused, u64::from(served < 200));
        weir.end(&net);
    }
}

/// TP7, TP9: whoever dials the capture port is refused and counted; nobody's rule makes a loop.
#[test]
fn direct_dials_are_refused_and_nothing_loops() {
    let net = prepared();
    echo(net.listen(Place::Node, "10.98.1.1:80"));
    let config = "workers: 1\ninbound: { listen: \"[::]:15006\" }\n\
                  forward: [{ listen: \"[::]:7000\", endpoints: [\"10.98.2.2:1\"] }]";
    let weir = Weir::run(&net, config);
    let doors = ["10.98.1.1:15006", "[fd98:1::1]:15006"];
    for (count, door) in (1..).zip(doors) {
        net.is_reset(Place::Client, door);
        assert_eq!(weir.denied("direct"), count);
    }
    // Somebody's rule sends what weir dials back to weir: one turn, and it ends.
    let loops = "table ip loops { chain c { type nat hook output priority -100; \
                 tcp dport 80 redirect to :15006; }; }";
    net.run(Place::Node, &["nft", loops]);
    // Untracked packets are not translated at all, so even this rule does no harm.
    let mut stream = net.connect(Place::Client, "10.98.1.1:80");
    send(&mut stream, 1, 100).unwrap();
    check(&mut stream, 1, 100);
    drop(stream);
    weir.end(&net);
}

/// What the kernel is not set up for is refused with the cure, and nothing is changed.
#[test]
fn kept_source_without_the_sysctl_is_refused() {
    let net = Net::new();
    let place = tempfile::TempDir::new().unwrap();
    let file = config_file(&place, "inbound: {}");
    let output = net.output(Place::Node, &[weir(), "run", "-c", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(4));
    assert!(said(&output).contains("sysctl -w net.ipv4.tcp_fwmark_accept=1"), "{}", said(&output));
    assert!(net.is_clean());
}

/// RS5: under a flood the kernel answers with cookies, and those who return one are taken too.
#[test]
fn connections_made_by_cookie_are_taken() {
    let net = prepared();
    net.set(Place::Node, "net.ipv4.tcp_syncookies=2");
    let app = net.listen(Place::Node, "[::]:80");
    let weir = Weir::run(&net, "workers: 1\ninbound: {}");
    for (door, client_ip) in doors() {
        let (_client, _served, seen) = meet(&net, &app, &door);
        assert_eq!(seen, client_ip);
    }
    assert_eq!(weir.opened(), 2);
    drop(app);
    weir.end(&net);
}

/// RS5: twenty thousand SYNs of nobody fill no queue for good: who means it is served meanwhile.
#[test]
fn flood_of_syns_keeps_nobody_out() {
    const SYNS: u32 = 20_000;
    let net = prepared();
    net.set(Place::Node, "net.ipv4.tcp_syncookies=1");
    net.set(Place::Node, "net.ipv4.tcp_max_syn_backlog=64");
    echo(net.listen(Place::Node, "[::]:80"));
    let profile = "summary: a test\ninclude: balanced\nlimits: { backlog: 64 }\n";
    let place = tempfile::TempDir::new().unwrap();
    let file = place.path().join("small.yaml");
    std::fs::write(&file, profile).unwrap();
    let weir = Weir::run(&net, &format!("workers: 1\nprofile: {}\ninbound: {{}}", file.display()));
    let shared: &Net = &net;
    scope(|scope| {
        let flood = scope.spawn(|| shared.within(Place::Client, || flood(SYNS)));
        let mut served = 0;
        while !flood.is_finished() || served < 10 {
            let mut client = shared.connect(Place::Client, "10.98.1.1:80");
            send(&mut client, served, 1000).unwrap();
            check(&mut client, served, 1000);
            served += 1;
        }
    });
    let cookies = net.run(Place::Node, &["nstat", "-asz", "TcpExtSyncookiesSent"]);
    let sent = cookies.lines().last().and_then(|line| line.split_whitespace().nth(1));
    assert!(sent.is_some_and(|sent| sent != "0"), "the queue was never full: {cookies}");
    weir.end(&net);
}

/// 10.98.1.100 and up.
const FLOODED: u32 = 0x0a62_0164;
/// `IPPROTO_TCP`, as the header has it.
const TCP: u8 = 6;

/// SYNs to 10.98.1.1:80 from addresses of the client's own network that nobody has.
fn flood(count: u32) {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP));
    let socket = socket.unwrap();
    socket.set_header_included_v4(true).unwrap();
    let to = SocketAddr::from(([10, 98, 1, 1], 0));
    for number in 0..count {
        let from = Ipv4Addr::from(FLOODED + number % 100);
        let _ = socket.send_to(&syn(from, Ipv4Addr::new(10, 98, 1, 1), number), &to.into());
    }
}

/// A SYN to port 80 (RFC 791, RFC 9293); the kernel fills in the sum of the IP header.
fn syn(from: Ipv4Addr, to: Ipv4Addr, number: u32) -> [u8; 40] {
    let mut packet = [0; 40];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&40u16.to_be_bytes());
    packet[8..10].copy_from_slice(&[64, TCP]);
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    packet[20..22].copy_from_slice(&(1024 + number / 100 % 60_000).to_be_bytes()[2..]);
    packet[22..24].copy_from_slice(&80u16.to_be_bytes());
    packet[24..28].copy_from_slice(&number.to_be_bytes());
    packet[32..36].copy_from_slice(&[0x50, 0x02, 0xff, 0xff]);
    let pseudo = packet[12..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum = pseudo.sum::<u32>() + u32::from(TCP) + 20;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !((sum & 0xffff) + (sum >> 16));
    packet[36..38].copy_from_slice(&sum.to_be_bytes()[2..]);
    packet
}

/// Under load nothing is tracked, bulk and short connections alike.
#[test]
fn nothing_is_tracked_under_load() {
    let net = prepared();
    echo(net.listen(Place::Node, "[::]:80"));
    let weir = Weir::run(&net, "workers: 2\ninbound: {}");
    let shared: &Net = &net;
    scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                let (door, _) = &doors()[usize::from(thread % 2 == 1)];
                for round in 0..100 {
                    let seed = thread * 1000 + round;
                    let mut stream = shared.connect(Place::Client, door);
                    let bytes = if round % 20 == 0 { 1_000_000 } else { 300 };
                    let mut writer = stream.try_clone().unwrap();
                    let sender =
                        std::thread::spawn(move || send(&mut writer, seed, bytes).unwrap());
                    check(&mut stream, seed, bytes);
                    sender.join().unwrap();
                }
            });
        }
        for _ in 0..10 {
            no_conntrack(shared);
        }
    });
    no_conntrack(&net);
    assert_eq!(weir.opened(), 400);
    weir.end(&net);
}

/// The workload's listener keeps the port while flows are open, and may be started again.
#[test]
fn workload_may_restart_while_flows_are_open() {
    let net = prepared();
    let app: TcpListener = net.listen(Place::Node, "[::]:80");
    let weir = Weir::run(&net, "workers: 1\ninbound: {}");
    let mut client = net.connect(Place::Client, "10.98.1.1:80");
    let (mut served, _) = app.accept().unwrap();
    drop(app);
    let again = net.listen(Place::Node, "[::]:80");
    client.write_all(b"x").unwrap();
    served.read_exact(&mut [0]).unwrap();
    let second = net.connect(Place::Client, "10.98.1.1:80");
    again.accept().unwrap();
    drop((client, served, second, again));
    weir.end(&net);
}

/// TP6: strict reverse-path filters, and marks looked at on the way in, do no harm.
#[test]
fn strict_filters_do_no_harm() {
    let net = prepared();
    for sysctl in
        ["all.rp_filter=1", "client.rp_filter=1", "lo.rp_filter=1", "all.src_valid_mark=1"]
    {
        net.set(Place::Node, &format!("net.ipv4.conf.{sysctl}"));
    }
    let app = net.listen(Place::Node, "[::]:80");
    let weir = Weir::run(&net, "workers: 1\ninbound: {}");
    for (door, client_ip) in doors() {
        let (_client, _served, seen) = meet(&net, &app, &door);
        assert_eq!(seen, client_ip);
    }
    assert_eq!(weir.opened(), 2);
    drop(app);
    weir.end(&net);
}
