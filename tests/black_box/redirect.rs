// SPDX-License-Identifier: Apache-2.0
//! Inbound redirect: simple and everywhere, and what connection tracking does to it, said aloud. And
//! the case for the other modes: a table that is full.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::scope;
use std::time::Duration;

use crate::harness::{Cgroup, Net, PATIENCE, Place, Weir, check, echo, send, until};

const OWN: &str = "workers: 2\ninbound: { capture: redirect, source: own }";

/// TP7, RD2: who dials the capture port is refused and counted, tracked or not; somebody's rule that
/// leads weir's dials back to weir makes one turn, and it ends.
#[test]
fn direct_dials_are_refused_and_nothing_loops() {
    let net = Net::new();
    echo(net.listen(Place::Node, "[::]:80"));
    let weir = Weir::run(&net, OWN);
    for (count, door) in (1..).zip(["10.98.1.1:15006", "[fd98:1::1]:15006"]) {
        net.is_reset(Place::Client, door);
        assert_eq!(weir.denied("direct"), count);
    }
    let untracked =
        "table ip quiet { chain c { type filter hook prerouting priority -310; notrack; }; }";
    net.run(Place::Node, &["nft", untracked]);
    net.is_reset(Place::Client, "10.98.1.1:15006");
    assert_eq!(weir.denied("unknown_destination"), 1);
    net.run(Place::Node, &["nft", "delete table ip quiet"]);
    let loops = "table ip loops { chain c { type nat hook output priority -100; \
                 tcp dport 80 redirect to :15006; }; }";
    net.run(Place::Node, &["nft", loops]);
    for _ in 0..10 {
        net.is_reset(Place::Client, "10.98.1.1:80");
    }
    until("every turn has ended", || weir.active() == 0);
    assert_eq!((weir.opened(), weir.closed("connect_refused")), (10, 10));
    until("it is counted", || weir.metric("weir_loops_refused_total", &[]) == 10);
    net.run(Place::Node, &["nft", "delete table ip loops"]);
    weir.end(&net);
}

/// RD3, RL10: a half-closed flow ends before connection tracking forgets it.
#[test]
fn half_closed_flow_ends_before_its_entry() {
    let net = Net::new();
    net.set(Place::Node, "net.netfilter.nf_conntrack_tcp_timeout_close_wait=4");
    let app = net.listen(Place::Node, "[::]:80");
    let weir = Weir::run(&net, OWN);
    assert_eq!(weir.log().matches("timeouts.half_closed_ms 55000 is too long").count(), 1);
    let mut client = net.connect(Place::Client, "10.98.1.1:80");
    let (served, _) = app.accept().unwrap();
    served.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the server has said it all");
    until("the timer runs out", || weir.closed("half_closed_timeout") == 1);
    assert!(net.conntrack().contains("dport=80"), "and the entry was there: {}", net.conntrack());
    until("the client hears of it", || client.write(b"x").is_err());
    drop((client, served, app));
    until("both sockets are gone", || net.sockets().is_empty());
    weir.end(&net);
}

/// RD4: one port of a client for two addresses of the node: after the rewrite they would be the same
/// connection, so the kernel changes the port of one; both get where they meant to go, and it is counted.
#[test]
fn changed_client_port_is_counted_and_reaches_its_destination() {
    let net = Net::new();
    net.run(Place::Node, &["ip", "addr", "add", "10.98.1.9/24", "dev", "client"]);
    for ip in ["10.98.1.1", "10.98.1.9"] {
        crate::outbound::greet(net.listen(Place::Node, &format!("{ip}:80")));
    }
    let weir = Weir::run(&net, "workers: 1\ninbound: { capture: redirect, source: own }");
    let doors = ["10.98.1.1:80", "10.98.1.9:80"];
    let mut both = doors.map(|door| net.connect_from(Place::Client, "10.98.1.2:12345", door));
    for (stream, door) in both.iter_mut().zip(doors) {
        let mut heard = [0; 12];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(String::from_utf8_lossy(&heard), door);
    }
    let ports: Vec<bool> = weir
        .flows()
        .iter()
        .map(|flow| flow["downstream"].as_str().unwrap().ends_with(":12345"))
        .collect();
    assert_eq!(ports.iter().filter(|is_kept| **is_kept).count(), 1, "one was changed");
    until("it is counted", || weir.metric("weir_redirect_port_rewritten_total", &[]) == 1);
    drop(both);
    weir.end(&net);
}

/// How many of `count` clients that dial at once are served within `within`.
fn served(net: &Net, count: u64, door: &str, within: Duration) -> usize {
    let door: SocketAddr = door.parse().unwrap();
    net.within(Place::Client, || ask_all(count, door, within))
}

fn ask_all(count: u64, door: SocketAddr, within: Duration) -> usize {
    let ask = |seed| -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&door, within)?;
        stream.set_read_timeout(Some(within))?;
        send(&mut stream, seed, 64)?;
        stream.read_exact(&mut [0; 64])?;
        Ok(stream)
    };
    scope(|scope| {
        let asked: Vec<_> = (0..count).map(|seed| scope.spawn(move || ask(seed))).collect();
        // All are held until the last one has its answer.
        let streams: Vec<_> =
            asked.into_iter().filter_map(|one| one.join().unwrap().ok()).collect();
        streams.len()
    })
}

/// Leaves room for 64 entries in the node. The limit itself belongs to the whole host, so the table is
/// filled instead: it is counted by network namespace. Fails where the host's limit is too large.
fn fill_table(net: &Net) -> usize {
    let most = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").unwrap();
    let filling = most.trim().parse::<usize>().unwrap() - 64;
    assert!(filling <= 1 << 20, "this test fills the table: nf_conntrack_max is {most}");
    let line = |index: usize| {
        let (source, destination) = (index % 60_000 + 1, index / 60_000 + 1);
        format!(
            "-A -t 300 -u ASSURED,SEEN_REPLY -s 192.0.2.1 -d 192.0.2.2 -r 192.0.2.2 -q 192.0.2.1 -p tcp \
             --sport {source} --dport {destination} --reply-port-src {destination} --reply-port-dst \
             {source} --state ESTABLISHED\n"
        )
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, (0..filling).map(line).collect::<String>()).unwrap();
    net.run(Place::Node, &["conntrack", "-R", file.path().to_str().unwrap()]);
    assert_eq!(entries(net), filling);
    filling
}

fn entries(net: &Net) -> usize {
    let words = ["cat", "/proc/sys/net/netfilter/nf_conntrack_count"];
    net.run(Place::Node, &words).trim().parse().unwrap()
}

/// RD1, the case for the other modes: with room for 64 entries, redirect loses connections and says so;
/// those that it has live on; tproxy and connect serve everybody, with no entry.
#[test]
fn full_table_costs_redirect_connections_and_the_others_nothing() {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    echo(net.listen(Place::Node, "[::]:80"));
    echo(net.listen(Place::Server, "10.98.2.2:80"));
    let filling = fill_table(&net);

    let weir = Weir::run(&net, OWN);
    let mut early = net.connect(Place::Client, "10.98.1.1:80");
    // Both of its legs stand.
    send(&mut early, 1, 1000).unwrap();
    check(&mut early, 1, 1000);
    let all = served(&net, 500, "10.98.1.1:80", Duration::from_secs(4));
    assert!((1..=40).contains(&all), "{all} were served");
    assert!(weir.metric("weir_conntrack_dropped_total", &[]) > 0);
    until("it is said", || {
        weir.log().contains("connection tracking is full: connections are lost")
    });
    send(&mut early, 1, 1000).unwrap();
    check(&mut early, 1, 1000);
    drop(early);
    weir.end(&net);
    // Two entries of every flow linger.
    net.run(Place::Node, &["conntrack", "-D", "-p", "tcp", "--state", "TIME_WAIT"]);

    let before = entries(&net);
    let weir = Weir::run(&net, "workers: 2\ninbound: {}");
    assert_eq!(served(&net, 500, "10.98.1.1:80", PATIENCE), 500);
    assert_eq!(weir.opened(), 500);
    weir.end(&net);
    for capture in ["tproxy", "connect"] {
        let cgroup = Cgroup::new();
        let config = format!(
            "workers: 2\noutbound: {{ capture: {capture}, workload: {{ cgroup: {} }} }}",
            cgroup.path
        );
        let weir = Weir::run(&net, &config);
        let script = "import socket
all = [socket.create_connection(('10.98.2.2', 80), 30) for i in range(500)]
for s in all: s.sendall(b'x' * 64)
print(sum(len(s.recv(64, socket.MSG_WAITALL)) for s in all))";
        let output = cgroup.output(&net, &["python3", "-c", script]);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "32000\n", "{output:?}");
        assert_eq!(weir.opened(), 500);
        weir.end(&net);
    }
    assert!(entries(&net) <= before && before >= filling, "nobody needed an entry");
}
