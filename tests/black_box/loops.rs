// SPDX-License-Identifier: Apache-2.0
//! Never a loop, never an open proxy: own ports are not dialled.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use crate::harness::{Cgroup, Net, Place, Weir, echo, expect_reset, rounds, until};

/// TP7, TP9: own ports on every address of both families, dialled through the captures and from outside,
/// 10,000 times, and in every other mode some times: refused each time, counted, and no descriptor is
/// lost.
#[test]
fn ten_thousand_forbidden_dials_are_refused() {
    // Those that only a closed port met are the kernel's to refuse: 127.9.9.9:15001 and, from outside, port
    // 15001. Under tproxy and redirect nothing takes a dial to this host, and 127.9.9.9:15006 is met by the
    // listener itself, as everywhere.
    for (inbound, outbound, times) in [
        ("tproxy", "connect", 500),
        ("tproxy, source: own", "tproxy", rounds(50, 500)),
        ("redirect, source: own", "redirect", rounds(50, 500)),
        ("redirect", "connect", rounds(50, 500)),
    ] {
        forbidden_dials(inbound, outbound, times);
    }
}

fn forbidden_dials(inbound: &str, outbound: &str, times: u64) {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let cgroup = Cgroup::new();
    let config = format!(
        "workers: 1\ninbound: {{ capture: {inbound} }}\n\
         outbound: {{ capture: {outbound}, workload: {{ cgroup: {} }} }}",
        cgroup.path
    );
    let weir = Weir::run(&net, &config);
    let before = weir.next_descriptor();
    // What a dialler sees: a refusal or a reset, at the connect or after it; never a byte, never EOF.
    let script = "
import itertools, socket, struct, sys
hosts, rounds = sys.argv[1].split(','), int(sys.argv[2])
served = 0
for host, port in itertools.product(hosts, (15001, 15006)):
    for _ in range(rounds):
        v6 = ':' in host
        s = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
        s.settimeout(20)
        try:
            s.connect((host, port))
            s.recv(1)
            served += 1
        except (ConnectionRefusedError, ConnectionResetError):
            pass
        s.close()
print(served)";
    let times_text = times.to_string();
    let inside = "127.0.0.1,127.9.9.9,::1,10.98.1.1,10.98.2.1,fd98:1::1,fd98:2::1,::ffff:10.98.1.1";
    let output = cgroup.output(&net, &["python3", "-c", script, inside, &times_text]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "0\n", "{}", crate::harness::said(&output));
    let outside = "10.98.1.1,fd98:1::1";
    let said = net.run(Place::Client, &["python3", "-c", script, outside, &times_text]);
    assert_eq!(said, "0\n");
    assert_eq!(weir.opened(), 0, "{inbound} and {outbound}: none became a flow");
    // Of 8 hosts inside and 2 outside, each at two ports.
    let closed = if outbound == "connect" { 1 + 2 } else { 1 + 5 + 2 };
    let denied = weir.metric("weir_denied_total", &[]);
    assert_eq!(denied, times * (20 - closed), "{inbound} and {outbound}");
    // A look at the rules takes a few for a moment.
    until("no descriptor is lost", || weir.next_descriptor() <= before);
    weir.end(&net);
}

/// TP7: weirs that point at each other pass a connection round and round: they notice, reset it all the
/// way, say so, and have lost nothing; whoever comes again is no worse off.
#[test]
fn weirs_that_point_at_each_other_end_the_loop() {
    for (weirs, workers) in [(2, "1"), (2, "2"), (3, "1")] {
        let net = Net::new();
        let door = |number: usize| format!("10.98.1.1:{}", 7000 + number % weirs);
        let start = |number| {
            let (listen, to) = (door(number), door(number + 1));
            Weir::forward(&net, &["--listen", &listen, "--to", &to, "--workers", workers])
        };
        let ring: Vec<Weir> = (0..weirs).map(start).collect();
        for round in 1..3 {
            let mut client = net.connect(Place::Client, &door(0));
            expect_reset(&mut client);
            let sum = |count: fn(&Weir) -> u64| ring.iter().map(count).sum::<u64>();
            until("the loop has ended", || sum(Weir::active) == 0);
            assert!(sum(|weir| weir.denied("looped")) >= round, "{weirs} weirs, {workers} workers");
            let opened = sum(Weir::opened);
            assert!(opened < 4000 * weirs as u64, "{opened} flows until it was noticed");
        }
        assert!(ring.iter().any(|weir| weir.log().contains("a loop through others")));
        ring.into_iter().for_each(|weir| weir.end(&net));
    }
}

/// Many connections on which nobody says a word, from one address to one destination, are no loop: not
/// one after the other, not as fast as they come.
#[test]
fn silent_connections_are_no_loop() {
    let net = Net::new();
    let server = net.listen(Place::Server, "10.98.2.2:7001");
    let weir = Weir::forward(&net, &["--listen", "10.98.1.1:7000", "--to", "10.98.2.2:7001"]);
    let script = "
import socket, sys
sockets = [socket.create_connection(('10.98.1.1', 7000), 20) for _ in range(1000)]
for _ in range(1000):
    s = socket.socket(); s.setblocking(False); s.connect_ex(('10.98.1.1', 7000)); sockets.append(s)
print('all', flush=True)
sys.stdin.readline()
for s in sockets:
    s.settimeout(20)
    s.sendall(b'x')
    assert s.recv(1) == b'x'";
    let mut clients = net.command(Place::Client, "python3");
    clients.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut clients = clients.spawn().unwrap();
    let mut said = BufReader::new(clients.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "all");
    until("all are open", || weir.active() == 2000);
    echo(server);
    drop(clients.stdin.take());
    assert!(clients.wait().unwrap().success());
    assert_eq!(weir.denied("looped"), 0);
    weir.end(&net);
}
