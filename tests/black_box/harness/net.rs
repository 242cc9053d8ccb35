// SPDX-License-Identifier: Apache-2.0
//! A client, a node and a server, each in a network namespace, joined by two cables.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::Scope;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

use super::{PATIENCE, expect_reset, until};

/// The three namespaces of one test; removed on drop, with everything in them.
pub(crate) struct Net {
    name: String,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    Client,
    Node,
    /// A workload's own, beside the node; see `Net::with_pods`.
    Pod(u8),
    Server,
}

/// A cgroup of one test, removed on drop.
pub(crate) struct Cgroup {
    /// Relative to the mount, as a config wants it.
    pub(crate) path: String,
    directory: PathBuf,
}

impl Net {
    pub(crate) const CLIENT: [&str; 2] = ["10.98.1.2", "fd98:1::2"];
    /// The node as the client sees it.
    pub(crate) const NODE: [&str; 2] = ["10.98.1.1", "fd98:1::1"];
    pub(crate) const SERVER: [&str; 2] = ["10.98.2.2", "fd98:2::2"];

    /// New namespaces. In the node connection tracking is on, as if others had asked for it.
    pub(crate) fn new() -> Net {
        static SWEPT: Once = Once::new();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        SWEPT.call_once(sweep);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let net = Net { name: format!("{PREFIX}{}-{number}", std::process::id()) };
        let (client, node, server) = (
            net.namespace(Place::Client),
            net.namespace(Place::Node),
            net.namespace(Place::Server),
        );
        for namespace in [&client, &node, &server] {
            run(&["ip", "netns", "add", namespace]);
            run(&["ip", "-n", namespace, "link", "set", "lo", "up"]);
        }
        let near = [("10.98.1.1/24", "fd98:1::1/64"), ("10.98.2.1/24", "fd98:2::1/64")];
        let far = [("10.98.1.2/24", "fd98:1::2/64"), ("10.98.2.2/24", "fd98:2::2/64")];
        for (index, outer) in [&client, &server].into_iter().enumerate() {
            let name = ["client", "server"][index];
            let add = ["ip", "-n", outer, "link", "add", "node", "type", "veth"];
            run(&[&add[..], &["peer", "name", name, "netns", &node]].concat());
            for (namespace, link, (v4, v6)) in
                [(&node, name, near[index]), (outer, "node", far[index])]
            {
                run(&["ip", "-n", namespace, "addr", "add", v4, "dev", link]);
                run(&["ip", "-n", namespace, "addr", "add", v6, "dev", link, "nodad"]);
                run(&["ip", "-n", namespace, "link", "set", link, "up"]);
            }
        }
        net.run(Place::Node, &["nft", CONNTRACK_ON]);
        net
    }

    /// As `new`, with three more namespaces, each joined to the client by a cable. There is no way
    /// between them and the node.
    pub(crate) fn with_pods() -> Net {
        let net = Net::new();
        Net::PODS.into_iter().for_each(|pod| net.add_pod(pod));
        net
    }

    /// The namespace of a workload, joined to the client.
    pub(crate) fn add_pod(&self, pod: Place) {
        let client = self.namespace(Place::Client);
        let (namespace, link) = (self.namespace(pod), self.link(pod));
        run(&["ip", "netns", "add", &namespace]);
        run(&["ip", "-n", &namespace, "link", "set", "lo", "up"]);
        let add = ["ip", "-n", &client, "link", "add", &link, "type", "veth"];
        run(&[&add[..], &["peer", "name", "client", "netns", &namespace]].concat());
        let ends = [(&namespace, "client", 2), (&client, link.as_str(), 1)];
        for (namespace, link, host) in ends {
            let (v4, v6) = (format!("{}/24", self.pod_v4(pod, host)), self.pod_v6(pod, host));
            run(&["ip", "-n", namespace, "addr", "add", &v4, "dev", link]);
            let v6 = format!("{v6}/64");
            run(&["ip", "-n", namespace, "addr", "add", &v6, "dev", link, "nodad"]);
            run(&["ip", "-n", namespace, "link", "set", link, "up"]);
        }
        self.set(pod, "net.ipv4.tcp_fwmark_accept=1");
    }

    pub(crate) const PODS: [Place; 3] = [Place::Pod(0), Place::Pod(1), Place::Pod(2)];

    /// Host 1 is the client as the pod sees it, host 2 the pod.
    pub(crate) fn pod_v4(&self, pod: Place, host: u8) -> String {
        format!("10.98.1{}.{host}", self.number(pod))
    }

    pub(crate) fn pod_v6(&self, pod: Place, host: u8) -> String {
        format!("fd98:1{}::{host}", self.number(pod))
    }

    /// The client's end of a pod's cable.
    pub(crate) fn link(&self, pod: Place) -> String {
        format!("pod{}", self.number(pod))
    }

    fn number(&self, pod: Place) -> u8 {
        let Place::Pod(number) = pod else { unreachable!("{} has no pod {pod:?}", self.name) };
        number
    }

    pub(crate) fn namespace(&self, place: Place) -> String {
        let place = match place {
            Place::Pod(number) => format!("pod{number}"),
            place => format!("{place:?}").to_lowercase(),
        };
        format!("{}-{place}", self.name)
    }

    /// A command that will run in `place`.
    pub(crate) fn command(&self, place: Place, program: &str) -> Command {
        // Not `ip netns exec`: that hides cgroup v2 behind a new /sys.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace(place))).arg(program);
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn output(&self, place: Place, words: &[&str]) -> Output {
        self.command(place, words[0]).args(&words[1..]).output().expect(words[0])
    }

    /// What a program that must succeed printed.
    pub(crate) fn run(&self, place: Place, words: &[&str]) -> String {
        let output = self.output(place, words);
        assert!(output.status.success(), "{words:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Does `work` in `place`: sockets stay where they were made.
    pub(crate) fn within<T: Send>(&self, place: Place, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.namespace(place));
        std::thread::scope(|scope: &Scope<'_, '_>| {
            let inner = || {
                setns(File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            };
            scope.spawn(inner).join().unwrap()
        })
    }

    pub(crate) fn listen(&self, place: Place, addr: &str) -> TcpListener {
        let addr: SocketAddr = addr.parse().unwrap();
        self.within(place, || {
            let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            // A child that another test starts just now has, until it runs, a copy of every
            // descriptor: of a listener that was closed here, too.
            until("the port is free", || socket.bind(&addr.into()).is_ok());
            socket.listen(4096).unwrap();
            socket.into()
        })
    }

    pub(crate) fn connect(&self, place: Place, addr: &str) -> TcpStream {
        self.try_connect(place, addr).unwrap()
    }

    pub(crate) fn try_connect(&self, place: Place, addr: &str) -> std::io::Result<TcpStream> {
        let addr: SocketAddr = addr.parse().unwrap();
        let stream = self.within(place, || TcpStream::connect_timeout(&addr, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Ok(stream)
    }

    /// As `connect`, from an address and a port that may be in use towards others.
    pub(crate) fn connect_from(&self, place: Place, from: &str, to: &str) -> TcpStream {
        let [from, to] = [from, to].map(|addr| addr.parse::<SocketAddr>().unwrap());
        self.within(place, || {
            let socket = Socket::new(Domain::for_address(from), Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&from.into()).unwrap();
            socket.connect(&to.into()).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.into()
        })
    }

    /// Connects and is reset, which may come before the connect returns.
    pub(crate) fn is_reset(&self, place: Place, addr: &str) {
        match self.try_connect(place, addr) {
            Ok(mut stream) => expect_reset(&mut stream),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
    }

    pub(crate) fn set(&self, place: Place, sysctl: &str) {
        self.run(place, &["sysctl", "-qw", sysctl]);
    }

    /// What a flow may hold is the node's part, then: its sockets grow as far as the kernel lets them where
    /// nobody has said otherwise, those of both ends a little. Hosts that are tuned for long fat paths let
    /// each receiver take 32 MB.
    pub(crate) fn limit_buffers(&self) {
        for (place, receive, send) in [
            (Place::Client, 1 << 20, 1 << 20),
            (Place::Node, 6 << 20, 4 << 20),
            (Place::Server, 1 << 20, 1 << 20),
        ] {
            self.set(place, &format!("net.ipv4.tcp_rmem=4096 131072 {receive}"));
            self.set(place, &format!("net.ipv4.tcp_wmem=4096 16384 {send}"));
        }
    }

    /// Entries in the node's connection tracking table.
    pub(crate) fn conntrack(&self) -> String {
        self.run(Place::Node, &["conntrack", "-L"])
    }

    /// TCP sockets of the node that are not in TIME_WAIT, without the listeners.
    pub(crate) fn sockets(&self) -> String {
        self.sockets_in(Place::Node)
    }

    pub(crate) fn sockets_in(&self, place: Place) -> String {
        let words = ["ss", "-Htan", "state", "connected", "exclude", "time-wait"];
        self.run(place, &words)
    }

    /// Bytes that the kernel holds for the node's TCP sockets, received or to be sent.
    pub(crate) fn socket_bytes(&self) -> u64 {
        let text = self.run(Place::Node, &["ss", "-Htnm"]);
        // skmem:(r0,rb131072,t0,tb87040,f4096,w0,o0,bl0,d0)
        let fields = text.split(['(', ',', ')']);
        let number = |field: &str, name| field.strip_prefix(name)?.parse::<u64>().ok();
        fields.filter_map(|field| number(field, 'r').or(number(field, 'w'))).sum()
    }

    /// Nothing of weir is left in the node but sockets in TIME_WAIT.
    pub(crate) fn is_clean(&self) -> bool {
        self.is_clean_in(Place::Node)
    }

    pub(crate) fn is_clean_in(&self, place: Place) -> bool {
        self.left_in(place).is_empty()
    }

    /// What of weir is left there, line by line.
    pub(crate) fn left_in(&self, place: Place) -> String {
        let tables = self.run(place, &["nft", "list", "tables"]);
        let tables = tables.lines().filter(|line| line.starts_with("table inet weir"));
        let families = ["-4", "-6"];
        let rules = families.map(|family| self.run(place, &["ip", family, "rule"])).concat();
        let is_ours = |line: &&str| line.contains("lookup 133") || line.contains("fwmark 0x53c");
        let rules = rules.lines().filter(is_ours);
        // A table that was never used is an error to `ip`, and says nothing on stdout.
        let routes = families.map(|family| {
            let words = ["ip", family, "route", "show", "table", "133", "proto", "133"];
            String::from_utf8_lossy(&self.output(place, &words).stdout).into_owned()
        });
        let routes = routes.concat();
        // Tests that pin have a bpffs of their own, and look there.
        let pins = fs::read_dir("/sys/fs/bpf/weir").into_iter().flatten().flatten();
        let pins: Vec<String> = pins.map(|pin| pin.path().display().to_string()).collect();
        let sockets = self.sockets_in(place);
        let left = tables.chain(rules).chain(routes.lines()).chain(sockets.lines());
        left.chain(pins.iter().map(String::as_str)).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

impl Cgroup {
    /// An empty one.
    pub(crate) fn new() -> Cgroup {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/{PREFIX}{}-{number}", std::process::id());
        let directory = mount().join(&path[1..]);
        fs::create_dir(&directory).unwrap();
        Cgroup { path, directory }
    }

    /// An empty one below it; it must go first.
    pub(crate) fn inner(&self) -> Cgroup {
        let directory = self.directory.join("inner");
        fs::create_dir(&directory).unwrap();
        Cgroup { path: format!("{}/inner", self.path), directory }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// A command that will run in the cgroup and in `place`.
    pub(crate) fn command(&self, net: &Net, place: Place, words: &[&str]) -> Command {
        let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.directory.display());
        let mut command = net.command(place, "sh");
        command.args(["-c", &join, "sh"]).args(words);
        command
    }

    pub(crate) fn output(&self, net: &Net, words: &[&str]) -> Output {
        self.command(net, Place::Node, words).output().unwrap()
    }

    /// Programs attached to it, as bpftool lists them.
    pub(crate) fn programs(&self) -> String {
        run(&["bpftool", "cgroup", "show", self.directory.to_str().unwrap()])
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A cgroup is busy until the last of its processes is reaped.
        for _ in 0..400 {
            if fs::remove_dir(&self.directory).is_ok() || !self.directory.exists() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// What a program that must succeed printed.
pub(crate) fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output();
    let output = output.expect(words[0]);
    assert!(output.status.success(), "{words:?}: {}", said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What it wrote to stderr.
pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Where cgroup v2 is mounted.
fn mount() -> PathBuf {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| line.contains(" - cgroup2 ")).expect("cgroup v2");
    line.split(' ').nth(4).unwrap().into()
}

/// What test runs that were killed have left.
fn sweep() {
    let entries = |place: PathBuf| fs::read_dir(place).into_iter().flatten().flatten();
    let is_dead = |name: &str| {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    };
    for entry in entries("/run/netns".into()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_dead(&name)
            && let Some((net, _)) = name.rsplit_once('-')
        {
            remove(net);
        }
    }
    for entry in entries(mount()) {
        if is_dead(&entry.file_name().to_string_lossy()) {
            let _ = fs::remove_dir(entry.path().join("inner"));
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Ends what still runs in the namespaces, which are nobody else's, and removes them.
fn remove(name: &str) {
    for place in ["client", "node", "server", "pod0", "pod1", "pod2"] {
        let namespace = format!("{name}-{place}");
        if !Path::new("/run/netns").join(&namespace).exists() {
            continue;
        }
        let pids = || {
            let output = Command::new("ip").args(["netns", "pids", &namespace]).output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        for pid in pids().split_whitespace() {
            // The test's own threads are in the namespace only while they work there.
            if pid != std::process::id().to_string() {
                let _ = Command::new("kill").args(["-9", pid]).output();
            }
        }
        if !std::thread::panicking() {
            let own = std::process::id().to_string();
            until("programs in the namespace end", || {
                pids().split_whitespace().all(|pid| pid == own)
            });
        }
        let _ = Command::new("ip").args(["netns", "del", &namespace]).output();
    }
}

/// Names begin so, and then comes the process id.
const PREFIX: &str = "weir-test-";
const CONNTRACK_ON: &str = "table inet others { chain input { type filter hook input priority 0; \
                            ct state new counter; }; }";
