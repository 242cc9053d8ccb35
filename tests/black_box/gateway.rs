// SPDX-License-Identifier: Apache-2.0
//! Inbound tproxy for any destination: weir on a node through which others' traffic goes.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread::scope;

use crate::harness::{Net, Place, Weir, check, echo, send, until};

const CONFIG: &str = "workers: 2\ninbound: { destinations: any }";
const DOORS: [(&str, &str); 2] =
    [("10.98.2.2:80", Net::CLIENT[0]), ("[fd98:2::2]:80", Net::CLIENT[1])];

/// The node routes between client and server.
pub(crate) fn routed() -> Net {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.ip_forward=1");
    net.set(Place::Node, "net.ipv6.conf.all.forwarding=1");
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    for (place, [v4, v6]) in
        [(Place::Client, ["10.98.1.1", "fd98:1::1"]), (Place::Server, ["10.98.2.1", "fd98:2::1"])]
    {
        net.run(place, &["ip", "-4", "route", "add", "default", "via", v4]);
        net.run(place, &["ip", "-6", "route", "add", "default", "via", v6]);
    }
    net
}

fn meet(net: &Net, app: &TcpListener, door: &str) -> (TcpStream, TcpStream, IpAddr) {
    let client = net.connect(Place::Client, door);
    let (served, seen) = app.accept().unwrap();
    (client, served, seen.ip().to_canonical())
}

fn exchange(mut client: TcpStream, mut served: TcpStream) {
    scope(|scope| {
        scope.spawn(|| send(&mut served, 1, 500_000).unwrap());
        check(&mut client, 1, 500_000);
    });
    client.write_all(b"x").unwrap();
    served.read_exact(&mut [0]).unwrap();
}

/// `source: own`: the server sees the node; and what is of the node itself is taken as ever.
#[test]
fn own_source_and_the_nodes_own_workload_are_served_too() {
    let net = routed();
    let (app, own) = (net.listen(Place::Server, "[::]:80"), net.listen(Place::Node, "[::]:80"));
    let weir = Weir::run(&net, "workers: 1\ninbound: { destinations: any, source: own }");
    let (client, served, seen) = meet(&net, &app, DOORS[0].0);
    assert_eq!(seen.to_string(), "10.98.2.1");
    exchange(client, served);
    let (client, served, _) = meet(&net, &own, "10.98.1.1:80");
    exchange(client, served);
    until("both flows end", || weir.opened() == 2 && weir.active() == 0);
    drop((app, own));
    weir.end(&net);
    let own = net.listen(Place::Node, "[::]:80");
    let weir = Weir::run(&net, CONFIG);
    let (client, served, seen) = meet(&net, &own, "10.98.1.1:80");
    assert_eq!(seen.to_string(), Net::CLIENT[0]);
    exchange(client, served);
    drop(own);
    weir.end(&net);
}

/// Excluded ports are forwarded, and so is what was open before weir came.
#[test]
fn what_is_not_taken_is_forwarded() {
    let net = routed();
    echo(net.listen(Place::Server, "[::]:8022"));
    let app = net.listen(Place::Server, "[::]:80");
    let (mut old, mut old_served, _) = meet(&net, &app, DOORS[0].0);
    let config = "workers: 1\ninbound: { destinations: any, ports: { exclude: [8022] } }";
    let weir = Weir::run(&net, config);
    for seed in 0..2 {
        let mut direct = net.connect(Place::Client, "10.98.2.2:8022");
        send(&mut direct, seed, 1000).unwrap();
        check(&mut direct, seed, 1000);
    }
    old.write_all(b"x").unwrap();
    old_served.read_exact(&mut [0]).unwrap();
    old_served.write_all(b"y").unwrap();
    old.read_exact(&mut [0]).unwrap();
    assert_eq!(weir.opened(), 0);
    drop((old, old_served, app));
    weir.end(&net);
}

/// However a connection ends, both sides hear of it: also those that are being made or have ended, which
/// have no mark.
#[test]
fn every_end_is_heard_on_the_other_side() {
    let net = routed();
    let app = net.listen(Place::Server, "[::]:80");
    let weir = Weir::run(&net, CONFIG);
    for (door, _) in DOORS {
        let (client, mut served, _) = meet(&net, &app, door);
        drop(client);
        assert_eq!(served.read(&mut [0]).unwrap(), 0);
        drop(served);
        let (mut client, served, _) = meet(&net, &app, door);
        drop(served);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        drop(client);
        let (mut client, served, _) = meet(&net, &app, door);
        socket2::SockRef::from(&served).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(served);
        crate::harness::expect_reset(&mut client);
    }
    until("nothing lingers", || weir.active() == 0 && net.sockets().is_empty());
    let closed: SocketAddr = "10.98.2.2:81".parse().unwrap();
    net.is_reset(Place::Client, &closed.to_string());
    drop(app);
    weir.end(&net);
}

/// Marks that are looked at on the way in (`src_valid_mark`), and strict filters, do no harm: the way back
/// to a packet's source never leads to weir.
#[test]
fn valid_marks_and_strict_filters_do_no_harm() {
    let net = routed();
    for sysctl in ["all.rp_filter=1", "client.rp_filter=1", "all.src_valid_mark=1"] {
        net.set(Place::Node, &format!("net.ipv4.conf.{sysctl}"));
    }
    let app = net.listen(Place::Server, "[::]:80");
    let weir = Weir::run(&net, CONFIG);
    for (door, client_ip) in DOORS {
        let (client, served, seen) = meet(&net, &app, door);
        assert_eq!(seen.to_string(), client_ip);
        exchange(client, served);
    }
    assert_eq!(weir.opened(), 2);
    drop(app);
    weir.end(&net);
}

/// TP4: each of the rules that lead packets to weir is put back.
#[test]
fn removed_rules_are_put_back() {
    let net = routed();
    let weir = Weir::run(&net, CONFIG);
    let rules = || net.run(Place::Node, &["ip", "-4", "rule"]);
    let all = rules().lines().count();
    let mine: Vec<String> =
        rules().lines().filter(|line| line.contains("0x53")).map(str::to_owned).collect();
    assert_eq!(mine.len(), 3, "{mine:?}");
    for rule in mine {
        let preference = rule.split(':').next().unwrap();
        net.run(Place::Node, &["ip", "-4", "rule", "del", "pref", preference]);
        until("the rule is back", || rules().lines().count() == all);
    }
    weir.end(&net);
}

/// Where every address looks like one of this host, weir refuses and says the cure.
#[test]
fn addresses_that_all_look_local_are_refused() {
    let net = routed();
    net.set(Place::Node, "net.ipv4.ip_nonlocal_bind=1");
    let place = tempfile::TempDir::new().unwrap();
    let file = crate::harness::config_file(&place, CONFIG);
    let words = [crate::harness::weir(), "run", "-c", file.to_str().unwrap()];
    let output = net.output(Place::Node, &words);
    assert_eq!(output.status.code(), Some(4));
    assert!(crate::harness::said(&output).contains("net.ipv4.ip_nonlocal_bind=0"));
    assert!(net.is_clean());
}
