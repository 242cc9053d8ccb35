// SPDX-License-Identifier: Apache-2.0
//! Every means of capture by every family, cell by cell: a real connection, whose destination,
//! addresses, bytes and entries in connection tracking are what was promised.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::gateway::routed;
use crate::harness::{Cgroup, Net, Place, Weir, config_file, said, until, weir};

/// A means of capture, and whom the other side sees.
struct Mode {
    capture: &'static str,
    /// Entries in connection tracking for each flow: one for each leg that is tracked.
    entries: usize,
    source: Source,
    to: To,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Source {
    Keep,
    Own,
}

/// Where the one who answers is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum To {
    /// Behind the node, which captures what goes by.
    Gateway,
    /// On the node: inbound.
    Workload,
    /// Behind the node, whose workload dials: outbound.
    Server,
}

const MODES: [Mode; 9] = [
    Mode { capture: "tproxy", to: To::Workload, source: Source::Keep, entries: 0 },
    Mode { capture: "tproxy", to: To::Workload, source: Source::Own, entries: 0 },
    Mode { capture: "tproxy", to: To::Gateway, source: Source::Keep, entries: 0 },
    Mode { capture: "tproxy", to: To::Gateway, source: Source::Own, entries: 0 },
    Mode { capture: "redirect", to: To::Workload, source: Source::Keep, entries: 1 },
    Mode { capture: "redirect", to: To::Workload, source: Source::Own, entries: 2 },
    Mode { capture: "connect", to: To::Server, source: Source::Own, entries: 0 },
    Mode { capture: "tproxy", to: To::Server, source: Source::Own, entries: 0 },
    Mode { capture: "redirect", to: To::Server, source: Source::Own, entries: 2 },
];

/// Cells that cannot be: why, in the words that a config with such a cell is refused with.
const NO_SUCH_CELL: [(&str, &str); 5] = [
    // A hook on connect() is where somebody dials, and clients of the workload dial elsewhere.
    ("inbound: { capture: connect }", "must be redirect or tproxy"),
    // The kernel rewrites to the address of the interface: which one it will be nobody knows.
    ("inbound: { capture: redirect, listen: \"[fd98:1::1]:15006\" }", "listen on [::] or 0.0.0.0"),
    ("inbound: { capture: redirect, listen: \"10.98.1.1:15006\" }", "listen on [::] or 0.0.0.0"),
    // What is for another host has no address here that it could be rewritten to.
    ("inbound: { capture: redirect, destinations: any }", "any needs capture tproxy"),
    // Where applications dial from, replies come back by themselves: nothing is to be kept.
    ("outbound: { source: keep, capture: tproxy }", "outbound.source: unknown key"),
];

/// A family of the one who dials, and of the socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Dial {
    /// IPv4 through an IPv6 socket: Java's default.
    Mapped,
    V4,
    V6,
}

const DIALS: [Dial; 3] = [Dial::V4, Dial::V6, Dial::Mapped];
/// One socket for both families, and one for each.
const PORTS: [u16; 2] = [80, 81];

impl Mode {
    /// Addresses to listen on; outbound there is no choice: weir listens on loopback, for both families.
    fn listens(&self) -> &'static [&'static str] {
        match (self.to, self.capture) {
            (To::Server, _) => &["127.0.0.1:15001"],
            (_, "redirect") => &["[::]:15006", "0.0.0.0:15006"],
            _ => &["[::]:15006", "0.0.0.0:15006", "[fd98:1::1]:15006", "10.98.1.1:15006"],
        }
    }

    fn config(&self, listen: &str, cgroup: &Cgroup) -> String {
        let Mode { capture, .. } = self;
        let source = format!("{:?}", self.source).to_lowercase();
        match self.to {
            To::Server => format!(
                "outbound: {{ capture: {capture}, listen: \"{listen}\", workload: {{ cgroup: {} }} }}",
                cgroup.path
            ),
            to => {
                let which = if to == To::Gateway { "any" } else { "local" };
                format!(
                    "inbound: {{ capture: {capture}, listen: \"{listen}\", source: {source}, \
                     destinations: {which} }}"
                )
            }
        }
    }

    fn net(&self) -> Net {
        let net = if self.to == To::Gateway { routed() } else { Net::new() };
        let accepts = i32::from(self.source == Source::Keep);
        net.set(Place::Node, &format!("net.ipv4.tcp_fwmark_accept={accepts}"));
        net
    }

    /// Who answers, and where.
    fn servers(&self, net: &Net) {
        let place = if self.to == To::Workload { Place::Node } else { Place::Server };
        introduce(net.listen(place, "[::]:80"));
        for ip in self.addresses() {
            let ip: IpAddr = ip.parse().unwrap();
            introduce(net.listen(place, &SocketAddr::new(ip, 81).to_string()));
        }
    }

    /// What is dialled.
    fn addresses(&self) -> [&'static str; 2] {
        if self.to == To::Workload { Net::NODE } else { Net::SERVER }
    }

    /// Whom the one who answers sees, with and without weir.
    fn seen(&self, is_taken: bool, family: usize) -> &'static str {
        const NODE_TO_SERVER: [&str; 2] = ["10.98.2.1", "fd98:2::1"];
        match (self.to, is_taken && self.source == Source::Own) {
            (To::Server, _) | (To::Gateway, true) => NODE_TO_SERVER[family],
            (To::Workload, true) => Net::NODE[family],
            (_, false) => Net::CLIENT[family],
        }
    }

    fn dialler(&self, net: &Net, cgroup: &Cgroup) -> Dialler {
        let words = ["python3", "-c", DIALLER];
        Dialler::start(match self.to {
            To::Server => cgroup.command(net, Place::Node, &words),
            _ => {
                let mut command = net.command(Place::Client, words[0]);
                command.args(&words[1..]);
                command
            }
        })
    }

    fn name(&self) -> String {
        format!("{} to {:?}, {:?}", self.capture, self.to, self.source)
    }

    fn direction(&self) -> &'static str {
        if self.to == To::Server { "outbound" } else { "inbound" }
    }
}

/// A listener of one family takes that family only.
fn takes(listen: &str, dial: Dial) -> bool {
    let listen: SocketAddr = listen.parse().unwrap();
    match (listen.ip(), dial) {
        (IpAddr::V6(ip), _) if ip.is_unspecified() => true,
        (IpAddr::V4(ip), _) if ip.is_loopback() => true,
        (IpAddr::V4(_), Dial::V4 | Dial::Mapped) | (IpAddr::V6(_), Dial::V6) => true,
        (IpAddr::V4(_), Dial::V6) | (IpAddr::V6(_), Dial::V4 | Dial::Mapped) => false,
    }
}

/// Says to everybody whom it sees and where it was reached, and then sends everything back.
fn introduce(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || -> io::Result<()> {
                let (peer, own) = (stream.peer_addr()?, stream.local_addr()?);
                let own = SocketAddr::new(own.ip().to_canonical(), own.port());
                writeln!(stream, "{} {own}", peer.ip().to_canonical())?;
                io::copy(&mut stream.try_clone()?, &mut stream)?;
                stream.shutdown(std::net::Shutdown::Write)
            });
        }
    });
}

/// Dials what it is told to: says its own name and the one it sees, and what the other side saw; then
/// sends words that say where they stand, has them back, and waits.
const DIALLER: &str = "
import socket, sys, threading
words = b''.join(i.to_bytes(8, 'little') for i in range(40000))
for line in sys.stdin:
    family, ip, port = line.split()
    s = socket.socket(getattr(socket, family)); s.settimeout(20)
    s.connect((ip, int(port)))
    heard = s.makefile('rb')
    saw = heard.readline().decode().strip()
    sender = threading.Thread(target=s.sendall, args=(words,)); sender.start()
    assert heard.read(len(words)) == words
    sender.join()
    print(s.getsockname()[1], *s.getpeername()[:2], saw, flush=True)
    sys.stdin.readline()
    s.shutdown(socket.SHUT_WR)
    assert heard.read() == b''
    heard.close(); s.close()
    print('closed', flush=True)";

/// Ended on drop.
struct Dialler {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Dialler {
    fn start(mut command: Command) -> Dialler {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Dialler { child, input, output: BufReader::new(output) }
    }

    fn say(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }
}

impl Drop for Dialler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One mode on one address, and who dials.
struct Bench<'a> {
    dialler: Dialler,
    listen: &'static str,
    mode: &'a Mode,
    net: &'a Net,
    weir: Weir,
}

impl Bench<'_> {
    /// One connection, from the dial to its end; whether it was taken.
    fn walk(&mut self, dial: Dial, port: u16) -> bool {
        let Bench { listen, mode, net, .. } = *self;
        let cell = format!("{}, {listen}, {dial:?} to port {port}", mode.name());
        let family = usize::from(dial == Dial::V6);
        let ip = mode.addresses()[family];
        let door = SocketAddr::new(ip.parse().unwrap(), port).to_string();
        let (socket, dialled) = match dial {
            Dial::Mapped => ("AF_INET6", format!("::ffff:{ip}")),
            Dial::V4 => ("AF_INET", ip.to_owned()),
            Dial::V6 => ("AF_INET6", ip.to_owned()),
        };
        let (is_taken, before) = (takes(listen, dial), tracked(net));
        let heard = self.dialler.say(&format!("{socket} {dialled} {port}"));
        let (own_port, rest) = heard.split_once(' ').unwrap_or_else(|| panic!("{cell}: {heard}"));
        // It sees what it dialled; who answers was reached there, and sees whom it shall see.
        let seen = mode.seen(is_taken, family);
        assert_eq!(rest, format!("{dialled} {port} {seen} {door}"), "{cell}");
        let flows = self.weir.flows();
        assert_eq!(flows.len(), usize::from(is_taken), "{cell}: {flows:?}");
        if let Some(flow) = flows.first() {
            let said =
                ["direction", "capture", "original_dst"].map(|key| flow[key].as_str().unwrap());
            assert_eq!(said, [mode.direction(), mode.capture, &door], "{cell}");
            let downstream = flow["downstream"].as_str().unwrap();
            assert!(downstream.ends_with(&format!(":{own_port}")), "{cell}: {downstream}");
            assert_eq!(tracked(net) - before, mode.entries, "{cell}: {}", net.conntrack());
        }
        assert_eq!(self.dialler.say("close"), "closed", "{cell}");
        until("the flow has ended", || self.weir.active() == 0);
        is_taken
    }
}

fn tracked(net: &Net) -> usize {
    net.conntrack().lines().count()
}

/// Every cell of the modes that lead there.
fn walk_modes(to: To) {
    for mode in MODES.iter().filter(|mode| mode.to == to) {
        let (net, cgroup) = (mode.net(), Cgroup::new());
        mode.servers(&net);
        for listen in mode.listens() {
            let weir = Weir::run(&net, &format!("workers: 1\n{}", mode.config(listen, &cgroup)));
            if to == To::Workload && mode.source == Source::Own {
                let rules = net.run(Place::Node, &["ip", "rule"]);
                assert!(!rules.contains("133"), "{}: {rules}", mode.name());
            }
            let dialler = mode.dialler(&net, &cgroup);
            let mut bench = Bench { dialler, listen, mode, net: &net, weir };
            let mut taken = 0;
            for dial in DIALS {
                for port in PORTS {
                    taken += u64::from(bench.walk(dial, port));
                }
            }
            let Bench { dialler, weir, .. } = bench;
            drop(dialler);
            let labels = [mode.direction(), mode.capture].map(|value| format!("=\"{value}\""));
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            assert_eq!(weir.metric("weir_flows_opened_total", &labels), taken);
            assert_eq!((weir.opened(), weir.closed("finished")), (taken, taken));
            until("direct connections are gone", || net.sockets().is_empty());
            weir.end(&net);
        }
        assert!(!cgroup.programs().contains("weir"));
    }
}

/// TP8, TP10: what clients of a workload dial.
#[test]
fn inbound_keeps_its_promises_in_every_cell() {
    walk_modes(To::Workload);
}

/// TP10: what goes by.
#[test]
fn gateway_keeps_its_promises_in_every_cell() {
    walk_modes(To::Gateway);
}

/// TP8, TP10, CH9: what a workload dials.
#[test]
fn outbound_keeps_its_promises_in_every_cell() {
    walk_modes(To::Server);
}

/// What has no cell is refused, with the reason.
#[test]
fn cells_that_cannot_be_are_refused_with_the_reason() {
    let place = tempfile::TempDir::new().unwrap();
    for (config, why) in NO_SUCH_CELL {
        let file = config_file(&place, config);
        let output = Command::new(weir()).args(["config", "check"]).arg(file).output().unwrap();
        let text = said(&output);
        assert!(output.status.code() == Some(2) && text.contains(why), "{config}: {text}");
    }
}

/// TP2: the same four numbers again, while the old connection rests in TIME_WAIT at weir, which was the
/// first to end it: the newcomer is answered at once, not after another SYN.
#[test]
fn redial_while_the_old_connection_rests_is_answered_at_once() {
    for mode in &MODES {
        let (net, cgroup) = (mode.net(), Cgroup::new());
        let place = if mode.to == To::Workload { Place::Node } else { Place::Server };
        say_one_word(net.listen(place, "[::]:80"));
        let listen = mode.listens()[0];
        let weir = Weir::run(&net, &format!("workers: 1\n{}", mode.config(listen, &cgroup)));
        for (family, ip) in ["AF_INET", "AF_INET6"].into_iter().zip(mode.addresses()) {
            let script = format!("{REDIALS}\nredial(socket.{family}, '{ip}')");
            let words = ["timeout", "60", "python3", "-c", &script];
            let output = match mode.to {
                To::Server => cgroup.output(&net, &words),
                _ => net.output(Place::Client, &words),
            };
            assert!(output.status.success(), "{}, {family}: {}", mode.name(), said(&output));
        }
        assert_eq!(weir.opened(), 2 * 4, "{}", mode.name());
        weir.end(&net);
    }
}

/// Ends every connection first.
fn say_one_word(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.write_all(b"x");
        }
    });
}

/// `tcpi_total_retrans` of `TCP_INFO` (linux/tcp.h) counts what was sent again.
const REDIALS: &str = "
import socket, struct
def redial(family, ip):
    for turn in range(4):
        s = socket.socket(family); s.settimeout(20)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(('', 41000))
        s.connect((ip, 80))
        total = struct.unpack_from('I', s.getsockopt(6, 11, 104), 100)[0]
        assert total == 0, f'{turn}: {total} sent again'
        assert s.recv(1) == b'x' and s.recv(1) == b'', turn
        s.close()";
