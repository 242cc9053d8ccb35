// SPDX-License-Identifier: Apache-2.0
//! An application whose connections are captured notices nothing of the relay that carries them, and
//! so nothing of what the kernel forwards: only weir's own sockets are ever in a sockmap.

use std::fs;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::harness::{Cgroup, Net, Place, Program, Weir, check, echo, said, send, until};
use crate::relays::RELAYS;

const BYTES: u64 = 5_000_000;

/// weir, and the workload whose connections it takes with this relay.
struct Rig {
    cgroup: Cgroup,
    net: Net,
    place: TempDir,
    relay: &'static str,
    weir: Weir,
}

impl Rig {
    fn new((relay, keys): (&'static str, &str)) -> Rig {
        let (net, cgroup, place) = (Net::new(), Cgroup::new(), TempDir::new().unwrap());
        let profile = place.path().join("test.yaml");
        fs::write(&profile, format!("summary: a test\ninclude: balanced\n{keys}\n")).unwrap();
        let config = format!(
            "profile: {}\noutbound: {{ workload: {{ cgroup: {} }} }}",
            profile.display(),
            cgroup.path
        );
        let weir = Weir::run(&net, &config);
        Rig { cgroup, net, place, relay, weir }
    }

    /// What a program of the workload printed.
    fn says(&self, words: &[&str]) -> String {
        let output = self.cgroup.output(&self.net, words);
        assert!(output.status.success(), "{}: {words:?}: {}", self.relay, said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A program of the workload that serves.
    fn serves(&self, words: &[&str], listens: &str) -> Program {
        let command = self.cgroup.command(&self.net, Place::Node, words);
        Program::run(&self.net, Place::Node, command, listens)
    }

    /// The relay has done something here.
    fn end(self) {
        let moved = match self.relay {
            "auto" => self.weir.metric("weir_bytes_total", &[]),
            relay => self.weir.metric("weir_bytes_total", &[&format!("relay=\"{relay}\"")]),
        };
        assert!(moved > 0, "{} has moved nothing", self.relay);
        self.weir.end(&self.net);
    }
}

/// SM1, SM5: what the sockets of an application say and do under each relay is what they say and do without
/// weir: a blocking receive that is disturbed, bytes that wait and are looked at, edges, zero copy, splice,
/// half-close.
#[test]
fn sockets_of_applications_behave_as_without_weir() {
    for relay in RELAYS {
        let rig = Rig::new(relay);
        let server = echo(rig.net.listen(Place::Server, "10.98.2.2:7"));
        let words = ["timeout", "60", "python3", "-c", LOOKS];
        let without = rig.net.run(Place::Node, &words);
        assert_eq!(rig.weir.opened(), 0, "not of the workload");
        assert_eq!(rig.says(&words), without, "{}", rig.relay);
        assert!(rig.weir.opened() >= 7);
        rig.end();
        drop(server);
    }
}

/// Each prints one line of its own; the server sends everything back.
const LOOKS: &str = r"
import array, errno, fcntl, os, select, signal, socket, struct, termios, time
def dial():
    s = socket.create_connection(('10.98.2.2', 7), 20)
    for _ in range(3):  # the relay has time to begin
        s.sendall(b'talk'); whole(s, 4)
    s.setblocking(True)
    return s
def whole(s, size):
    data = b''
    while len(data) < size and (piece := s.recv(size - len(data))):
        data += piece
    return data
def until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)
def state(pid):
    return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0]
def arrives(s, size):
    until(lambda: len(s.recv(size, socket.MSG_PEEK)) == size)

def disturbed(disturb):
    s = dial()
    child = os.fork()
    if child == 0:
        try: print(s.recv(16), flush=True)
        except OSError as error: print(errno.errorcode[error.errno], flush=True)
        os._exit(0)
    until(lambda: state(child) == 'S')
    disturb(child)
    s.send(b'received')
    os.waitpid(child, 0)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, False)
def stop(child):
    os.kill(child, signal.SIGSTOP)
    until(lambda: state(child) == 'T')
    os.kill(child, signal.SIGCONT)
disturbed(stop)
disturbed(lambda child: os.kill(child, signal.SIGUSR1))

s = dial()
s.send(bytes(100)); arrives(s, 100)
count = array.array('i', [0]); fcntl.ioctl(s, termios.FIONREAD, count)
print('waiting', count[0])
ours, theirs = os.pipe()
print('spliced', os.splice(s.fileno(), theirs, 100))

s = dial(); s.setblocking(False)
edges = select.epoll(); edges.register(s, select.EPOLLIN | select.EPOLLET)
for size in (1, 4096, 300):
    s.send(bytes(size))
    came = 0
    while came < size:
        assert edges.poll(20)
        try:
            while True: came += len(s.recv(65536))
        except BlockingIOError: pass
    print('by edges', came)

s = dial(); s.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY
done = 0
for _ in range(10):
    s.send(bytes(16384), 0x4000000)  # MSG_ZEROCOPY
    whole(s, 16384)
def completed():
    global done
    try: notes = s.recvmsg(1, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)[1]
    except BlockingIOError: return done >= 10
    for _, _, note in notes:
        first, last = struct.unpack('=II', note[8:16])
        done += last - first + 1
until(completed)
print('completed', done)

s = dial()
s.sendall(bytes(100_000)); s.shutdown(socket.SHUT_WR)
print('after FIN', len(whole(s, 1 << 20)))

s = dial()
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('=ii', 1, 0))
s.close()
";

/// SM1: nginx, which polls by edges and asks for FIONREAD, and HAProxy, which splices, as proxies of the
/// workload; redis-cli, stopped and continued while it blocks in receive; iperf3.
#[test]
fn programs_of_the_workload_work_in_every_relay() {
    for relay in RELAYS {
        let rig = Rig::new(relay);
        let directory = TempDir::new_in(rig.place.path()).unwrap();
        let mut content = Vec::new();
        send(&mut content, 9, BYTES).unwrap();
        fs::write(directory.path().join("large"), content).unwrap();
        let lines = format!("server {{ listen 80; root {}; }}", directory.path().display());
        let behind = Program::nginx(&rig.net, Place::Server, directory.path(), &lines);
        let proxies = [nginx(&rig), haproxy(&rig)];
        for port in [80, 81] {
            let copy = rig.place.path().join("copy");
            let url = format!("http://127.0.0.1:{port}/large");
            let words = ["curl", "-sS", "-m", "60", "-o", copy.to_str().unwrap(), &url];
            rig.net.run(Place::Node, &words);
            check(&mut fs::File::open(copy).unwrap(), 9, BYTES);
        }
        let opened = rig.weir.opened();
        assert!(opened >= 2, "{}: the proxies' dials were taken: {opened}", rig.relay);
        redis(&rig);
        iperf3(&rig);
        drop((proxies, behind));
        rig.end();
    }
}

/// A proxy on port 80, with buffers far smaller than what it hands on.
fn nginx(rig: &Rig) -> Program {
    let lines = "server { listen 80; location / { proxy_pass http://10.98.2.2; } }";
    let home = TempDir::new_in(rig.place.path()).unwrap().keep();
    let file = Program::nginx_conf(&home, lines);
    rig.serves(&["nginx", "-p", home.to_str().unwrap(), "-c", &file], ":80 ")
}

/// A proxy on port 81 that splices both ways.
fn haproxy(rig: &Rig) -> Program {
    let file = Program::haproxy_cfg(
        rig.place.path(),
        "listen x\n mode tcp\n bind :81\n option splice-request\n option splice-response\n \
         server y 10.98.2.2:80\n",
    );
    rig.serves(&["haproxy", "-db", "-f", &file], ":81 ")
}

fn redis(rig: &Rig) {
    let words = ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no"];
    let words = [&words[..], &["--save", "", "--dir", "/"]].concat();
    let server = Program::start(&rig.net, Place::Server, &words, ":6379 ");
    let ask = |words: &[&str]| {
        rig.net.run(Place::Server, &[&["redis-cli"], words].concat()).trim().to_owned()
    };
    let client = ["redis-cli", "-h", "10.98.2.2", "BLPOP", "list", "60"];
    let mut client = rig.cgroup.command(&rig.net, Place::Node, &client);
    let client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the client blocks", || ask(&["INFO", "clients"]).contains("blocked_clients:1"));
    let pid = Pid::from_raw(client.id().cast_signed());
    kill(pid, Signal::SIGSTOP).unwrap();
    let status = format!("/proc/{pid}/status");
    until("stopped", || fs::read_to_string(&status).unwrap().contains("State:\tT"));
    kill(pid, Signal::SIGCONT).unwrap();
    until("it goes on", || !fs::read_to_string(&status).unwrap().contains("State:\tT"));
    ask(&["LPUSH", "list", "value"]);
    let output = client.wait_with_output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(printed, "list\nvalue\n", "{}: {}", rig.relay, said(&output));
    drop(server);
}

fn iperf3(rig: &Rig) {
    let server = Program::start(&rig.net, Place::Server, &["iperf3", "-s"], ":5201 ");
    // Not `--bidir`: there the order in which the server accepts says who sends on which.
    for way in ["--zerocopy", "-R"] {
        rig.says(&["timeout", "60", "iperf3", "-c", "10.98.2.2", "-n", "20M", way]);
    }
    drop(server);
}
