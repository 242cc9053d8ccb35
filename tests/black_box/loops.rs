// SPDX-License-Identifier: Apache-2.0
//! Never a loop, never an open proxy: own ports are not dialled.

use crate::harness::{Cgroup, Net, Place, Weir, until};

/// TP7, TP9: own ports on every address of both families, dialled through the hook and from outside,
/// 10,000 times: refused each time, counted, and no descriptor is lost.
#[test]
fn ten_thousand_forbidden_dials_are_refused() {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let cgroup = Cgroup::new();
    let config = format!(
        "workers: 1\ninbound: {{}}\noutbound: {{ workload: {{ cgroup: {} }} }}",
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
    let inside = "127.0.0.1,127.9.9.9,::1,10.98.1.1,10.98.2.1,fd98:1::1,fd98:2::1,::ffff:10.98.1.1";
    let output = cgroup.output(&net, &["python3", "-c", script, inside, "500"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "0\n", "{}", crate::harness::said(&output));
    let outside = "10.98.1.1,fd98:1::1";
    let said = net.run(Place::Client, &["python3", "-c", script, outside, "500"]);
    assert_eq!(said, "0\n");
    assert_eq!(weir.opened(), 0, "none became a flow");
    // Those that only a closed port met are the kernel's to refuse: 127.9.9.9:15001 and, from outside,
    // port 15001.
    assert_eq!(weir.metric("weir_denied_total", &[]), 10_000 - 500 - 2 * 500);
    // A look at the rules takes a few for a moment.
    until("no descriptor is lost", || weir.next_descriptor() <= before);
    weir.end(&net);
}
