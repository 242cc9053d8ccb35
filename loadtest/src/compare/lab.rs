// SPDX-License-Identifier: Apache-2.0
//! Network namespaces, a pair for each target, and the processes in them; all gone on drop.
//!
//! Names carry the process id: what a killed comparison left, the next one removes. The host's own
//! namespace is never touched.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::{programs, tracking};
use crate::place;
use crate::signals::is_interrupted;

/// Everything that a comparison made.
pub(super) struct Lab {
    cgroups: Option<PathBuf>,
    pub(super) directory: PathBuf,
    /// Without root there are no namespaces: all is on the host's loopback.
    is_loopback: bool,
    name: String,
    processes: Vec<(String, Child)>,
    sites: usize,
}

/// A program of a site, as it was started.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) cpus: Vec<usize>,
    pub(super) name: String,
    pub(super) words: Vec<String>,
}

/// Where one target is.
#[derive(Clone, Debug)]
pub(super) struct Site {
    /// A cgroup whose connects may be captured.
    pub(super) cgroup: Option<PathBuf>,
    /// Where the forwarder's clients are.
    pub(super) far: Option<PathBuf>,
    /// Where the forwarder is.
    pub(super) node: Option<PathBuf>,
    pub(super) number: usize,
}

impl Lab {
    /// An empty one, after those of the dead are removed.
    pub(super) fn new(is_loopback: bool) -> Result<Lab> {
        let wanted = if is_loopback { &PROGRAMS[..1] } else { &PROGRAMS[..] };
        for (program, package) in wanted {
            let is_there = programs::find(program).is_some();
            ensure!(is_there, "{program} is not installed: apt-get install {package}");
        }
        let name = format!("{PREFIX}{}", std::process::id());
        let cgroups = cgroup_mount().filter(|_| !is_loopback);
        if !is_loopback {
            sweep(cgroups.as_deref());
        }
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(Lab { cgroups, directory, is_loopback, name, processes: Vec::new(), sites: 0 })
    }

    /// A node and its far end, joined by a cable.
    /// With `is_tracked` the node tracks connections, as other people's rules would have it.
    pub(super) fn site(&mut self, congestion: &str, is_tracked: bool) -> Result<Site> {
        let number = self.sites;
        self.sites += 1;
        if self.is_loopback {
            return Ok(Site { cgroup: None, far: None, node: None, number });
        }
        let [node, far] = ["node", "far"].map(|end| format!("{}-{number}-{end}", self.name));
        for namespace in [&node, &far] {
            run(&["ip", "netns", "add", namespace])?;
            run(&["ip", "-n", namespace, "link", "set", "lo", "up"])?;
            for (key, value) in SYSCTLS {
                // What a kernel does not have, it does not need.
                let _ = set(namespace, key, value);
            }
            set(namespace, "net/ipv4/tcp_congestion_control", congestion).with_context(|| {
                let known = fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control");
                let known = known.unwrap_or_default();
                format!("--congestion {congestion}: allowed here are {}", known.trim())
            })?;
        }
        let add = ["ip", "-n", &far, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0"];
        run(&[&add[..], &["netns", &node]].concat())?;
        for (namespace, address) in [(&node, NODE), (&far, FAR)] {
            let address = format!("{address}/24");
            run(&["ip", "-n", namespace, "addr", "add", &address, "dev", "eth0"])?;
            run(&["ip", "-n", namespace, "link", "set", "eth0", "up"])?;
        }
        if is_tracked {
            let rules = "table inet others { chain input { type filter hook input priority 0; ct state new counter; }; }";
            run(&["ip", "netns", "exec", &node, "nft", rules])?;
        }
        let path = |namespace: &str| Some(Path::new(NETNS).join(namespace));
        let cgroup =
            self.cgroups.as_ref().map(|mount| mount.join(format!("{}-{number}", self.name)));
        if let Some(cgroup) = &cgroup {
            fs::create_dir(cgroup).with_context(|| format!("make {}", cgroup.display()))?;
        }
        Ok(Site { cgroup, far: path(&far), node: path(&node), number })
    }

    /// Starts a program in the node of `site`, on its CPU, that runs until it is ended.
    pub(super) fn start(&mut self, site: &Site, program: &Program) -> Result<u32> {
        let Program { cpus, name, words } = program;
        let log = self.directory.join(format!("{}.log", site.number));
        let log = File::create(&log).with_context(|| format!("make {}", log.display()))?;
        let mut command = match &site.node {
            Some(node) => {
                // Not `ip netns exec`: that hides cgroup v2 behind a new /sys.
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", node.display())).arg("taskset");
                command
            }
            None => Command::new("taskset"),
        };
        let cpus = cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        command.args(["-c", &cpus]).args(words);
        // Ctrl-C is for us: who is ended before the others makes errors in the figures.
        command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        let pid = child.id();
        self.processes.push((name.clone(), child));
        Ok(pid)
    }

    /// What the program of a site has written.
    pub(super) fn said(&self, site: &Site) -> String {
        let text = fs::read_to_string(self.directory.join(format!("{}.log", site.number)));
        let text = text.unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join("; ")
    }

    /// Waits until `is_ready`; fails when the program ends, with what it said, or takes too long.
    pub(super) fn await_ready(
        &mut self,
        site: &Site,
        name: &str,
        is_ready: impl Fn() -> bool,
    ) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            ensure!(!is_interrupted(), "interrupted");
            let child = self.processes.iter_mut().rfind(|(other, _)| other == name);
            if let Some((_, child)) = child
                && let Some(status) = child.try_wait()?
            {
                bail!("{name} ended with {status}: {}", self.said(site));
            }
            if is_ready() {
                return Ok(());
            }
            std::thread::sleep(LOOK_EVERY);
        }
        bail!("{name} is not ready after {} s: {}", PATIENCE.as_secs(), self.said(site))
    }

    /// Ends a program that is not wanted any more.
    pub(super) fn end(&mut self, name: &str) {
        for (_, child) in self.processes.iter_mut().filter(|(other, _)| other == name) {
            kill(child);
        }
        self.processes.retain(|(other, _)| other != name);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            kill(child);
        }
        if !self.is_loopback {
            remove(&self.name, self.cgroups.as_deref());
        }
        // What is not there need not go.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Site {
    /// Where the server listens that a forwarder of this site dials.
    pub(super) fn node_address(&self) -> &'static str {
        if self.node.is_some() { NODE } else { "127.0.0.1" }
    }

    /// Does `work` in the node: sockets stay where they were made.
    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let Some(node) = &self.node else { return Ok(work()) };
        std::thread::scope(|scope| {
            let inner = scope.spawn(|| place::enter(node).map(|()| work()));
            inner.join().unwrap_or_else(|_| bail!("work in {} failed", node.display()))
        })
    }

    /// Listeners at `port`, whoever's they are.
    pub(super) fn listeners(&self, port: u16) -> Result<usize> {
        let read = || {
            ["tcp", "tcp6"].map(|name| fs::read_to_string(format!("/proc/thread-self/net/{name}")))
        };
        let texts = self.within(read)?.into_iter().collect::<Result<Vec<_>, _>>()?;
        let end = format!(":{port:04X}");
        let is_one = |line: &&str| {
            let mut words = line.split_whitespace();
            words.nth(1).is_some_and(|local| local.ends_with(&end)) && words.nth(1) == Some(LISTEN)
        };
        Ok(texts.iter().flat_map(|text| text.lines()).filter(is_one).count())
    }

    /// Forgets every tracked connection of the node, so that those of earlier loads do not count.
    pub(super) fn forget_tracked(&self) -> Result<()> {
        if self.node.is_none() {
            return Ok(());
        }
        self.within(|| {
            let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
            match count {
                Ok(count) if count.trim() != "0" => tracking::forget_all(),
                _ => Ok(()),
            }
        })?
    }

    /// TCP sockets in use, which go when a load is over.
    pub(super) fn sockets(&self) -> Result<u64> {
        let text = self.within(|| fs::read_to_string("/proc/thread-self/net/sockstat"))??;
        let line = text.lines().find(|line| line.starts_with("TCP:")).unwrap_or_default();
        Ok(line.split(' ').nth(2).and_then(|count| count.parse().ok()).unwrap_or(0))
    }
}

/// Ends a program and all that it has started, as nginx starts workers: each has a group of its own.
fn kill(child: &mut Child) {
    if let Ok(group) = i32::try_from(child.id()) {
        // It may have ended by itself.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    let _ = child.wait();
}

/// A port of the host's loopback that is free now.
pub(super) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?.port())
}

/// Runs a program that makes something.
fn run(words: &[&str]) -> Result<()> {
    ensure!(!is_interrupted(), "interrupted");
    let output = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run {}", words[0]))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", words.join(" "), said.trim());
    Ok(())
}

/// Sets a sysctl of a namespace.
fn set(namespace: &str, key: &str, value: &str) -> Result<()> {
    let path = Path::new(NETNS).join(namespace);
    std::thread::scope(|scope| {
        let inner = scope.spawn(|| {
            place::enter(&path)?;
            let file = Path::new("/proc/sys").join(key);
            fs::write(&file, value)
                .with_context(|| format!("set {} to {value} in {namespace}", file.display()))
        });
        inner.join().unwrap_or_else(|_| bail!("set {key} in {namespace}"))
    })
}

/// Labs of comparisons that are no more.
fn sweep(cgroups: Option<&Path>) {
    let mut dead: Vec<String> = Vec::new();
    let places = [Path::new(NETNS)].into_iter().chain(cgroups);
    for entry in places.filter_map(|place| fs::read_dir(place).ok()).flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if let Some(pid) = pid.filter(|pid| !Path::new("/proc").join(pid).exists()) {
            dead.push(format!("{PREFIX}{pid}"));
        }
    }
    dead.sort();
    dead.dedup();
    for name in dead {
        remove(&name, cgroups);
        let _ = fs::remove_dir_all(std::env::temp_dir().join(&name));
    }
}

/// Ends what still runs in the namespaces of a lab, which are nobody else's, and removes them.
fn remove(name: &str, cgroups: Option<&Path>) {
    let begin = format!("{name}-");
    let entries = |place: &Path| {
        let entries = fs::read_dir(place).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|other| other.starts_with(&begin)).collect::<Vec<_>>()
    };
    for namespace in entries(Path::new(NETNS)) {
        let pids = Command::new("ip").args(["netns", "pids", &namespace]).output();
        let pids = pids.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        for pid in pids.unwrap_or_default().split_whitespace() {
            let _ = Command::new("kill").args(["-9", pid]).output();
        }
        let _ = Command::new("ip").args(["netns", "del", &namespace]).output();
    }
    for cgroup in cgroups
        .into_iter()
        .flat_map(|mount| entries(mount).into_iter().map(|name| mount.join(name)))
    {
        // A cgroup is busy until its last process is gone.
        let until = Instant::now() + PATIENCE;
        while fs::remove_dir(&cgroup).is_err() && cgroup.exists() && Instant::now() < until {
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// Where cgroup v2 is mounted.
pub(super) fn cgroup_mount() -> Option<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = table.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// The address of a node, and of its far end: each pair of namespaces is a world of its own.
pub(super) const NODE: &str = "10.97.0.1";
pub(super) const FAR: &str = "10.97.0.2";
/// The state of a listener (proc_net_tcp.rst).
const LISTEN: &str = "0A";
const LOOK_EVERY: Duration = Duration::from_millis(10);
const NETNS: &str = "/run/netns";
const PATIENCE: Duration = Duration::from_secs(10);
const PREFIX: &str = "weir-compare-";
/// What a lab cannot do without, the first one even without namespaces, and the packages that have it.
const PROGRAMS: [(&str, &str); 3] =
    [("taskset", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2")];
/// So that new connections at full rate do not run out of ports, and that clients' addresses can
/// be kept.
const SYSCTLS: [(&str, &str); 5] = [
    ("net/ipv4/ip_local_port_range", "16384 65535"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/tcp_tw_reuse_delay", "100"),
    ("net/ipv4/tcp_fwmark_accept", "1"),
    ("net/core/somaxconn", "4096"),
];
