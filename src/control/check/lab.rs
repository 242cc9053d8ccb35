// SPDX-License-Identifier: Apache-2.0
//! A node and somebody far away, each in a network namespace without a name, joined by a cable; and a
//! cgroup for a workload. All of it goes with the last descriptor of it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::super::client;
use crate::sys::cgroup;
use crate::sys::signals::is_interrupted;

/// Where modes are tried.
pub(super) struct Lab {
    /// The workload's, below the cgroup v2 mount.
    cgroup: PathBuf,
    far: Namespace,
    node: Namespace,
    place: PathBuf,
}

/// A weir in the node; killed on drop.
pub(super) struct Weir {
    child: Child,
    log: PathBuf,
    socket: PathBuf,
}

struct Namespace(File);

impl Lab {
    /// Builds it. Servers that tell everybody their own address wait at both ends.
    pub(super) fn build() -> Result<Lab, String> {
        let own = format!("{PREFIX}{}", std::process::id());
        sweep();
        let mount = cgroup::mount().map_err(|error| error.to_string())?;
        let lab = Lab {
            cgroup: mount.join(&own),
            far: Namespace::new()?,
            node: Namespace::new()?,
            place: std::env::temp_dir().join(&own),
        };
        for directory in [&lab.cgroup, &lab.place] {
            fs::create_dir(directory)
                .map_err(|error| format!("make {}: {error}", directory.display()))?;
        }
        let far = format!("/proc/{}/fd/{}", std::process::id(), lab.far.0.as_raw_fd());
        lab.node.ip(&format!("link add cable type veth peer name cable netns {far}"))?;
        for (namespace, addresses) in [(&lab.node, NODE), (&lab.far, FAR)] {
            namespace.ip("link set lo up")?;
            namespace.ip(&format!("addr add {}/24 dev cable", addresses[0]))?;
            namespace.ip(&format!("addr add {}/64 dev cable nodad", addresses[1]))?;
            namespace.ip("link set cable up")?;
            greet(namespace.within(|| TcpListener::bind((ANY, PORT)))?);
        }
        let accept = || fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1");
        lab.node.within(accept)?;
        Ok(lab)
    }

    /// Relative to the mount, as a config wants it.
    pub(super) fn cgroup(&self) -> String {
        format!("/{}", self.cgroup.file_name().unwrap_or_default().display())
    }

    /// A weir with this config, ready, or what it said.
    pub(super) fn start(&self, config: &str) -> Result<Weir, String> {
        let (file, log, socket) =
            (self.place.join("weir.yaml"), self.place.join("log"), self.place.join("admin.sock"));
        let text = format!("{config}\nadmin: {{ socket: \"{}\" }}\n", socket.display());
        fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
        let child = self.node.within(|| {
            Command::new(std::env::current_exe()?)
                .args(["run", "-c"])
                .arg(&file)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&log)?)
                .spawn()
        })?;
        let mut weir = Weir { child, log, socket };
        let deadline = Instant::now() + READY_WITHIN;
        while !weir.is_ready() {
            let is_over = is_interrupted() || !matches!(weir.child.try_wait(), Ok(None));
            if is_over || Instant::now() > deadline {
                return Err(weir.last_words());
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(weir)
    }

    /// Somebody far away dials, and is told by which address the server knows it.
    pub(super) fn far_dials(&self, to: SocketAddr) -> Result<IpAddr, String> {
        self.far.within(|| ask(to).map(|(_, heard)| heard))
    }

    /// The workload dials `to`: where its socket says it is, and whom somebody far away sees.
    pub(super) fn workload_dials(&self, to: IpAddr) -> Result<(), String> {
        let output = self.node.within(|| {
            Command::new(std::env::current_exe()?)
                .arg("dial")
                .arg("--cgroup")
                .arg(&self.cgroup)
                .arg(SocketAddr::new(to, PORT).to_string())
                .stdin(Stdio::null())
                .output()
        })?;
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // What was not made need not go; a cgroup whose last process is not reaped yet is busy.
        let deadline = Instant::now() + READY_WITHIN;
        while self.cgroup.exists()
            && fs::remove_dir(&self.cgroup).is_err()
            && Instant::now() < deadline
        {
            std::thread::sleep(LOOK_EVERY);
        }
        let _ = fs::remove_dir_all(&self.place);
    }
}

/// Labs of checks that were killed: the weir that was being tried, its files, and the cgroup.
fn sweep() {
    let labs = [Some(std::env::temp_dir()), cgroup::mount().ok()].into_iter().flatten();
    for entry in labs.flat_map(fs::read_dir).flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).filter(|pid| pid.parse::<u32>().is_ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            end_those_of(&std::env::temp_dir().join(&name));
            // A directory with files is one of files, and an empty one a cgroup, or nearly gone.
            let _ = fs::remove_dir(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
        }
    }
}

/// A weir that was started with a config in `place`.
fn end_those_of(place: &Path) {
    let config = place.join("weir.yaml");
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = words.split(|byte| *byte == 0);
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(pid) = pid.filter(|_| words.any(|word| word == config.as_os_str().as_bytes())) {
            // It may have ended by itself.
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

impl Weir {
    /// Flows that it took so far.
    pub(super) fn opened(&self, direction: &str, capture: &str) -> u64 {
        let series =
            format!("weir_flows_opened_total{{direction=\"{direction}\",capture=\"{capture}\"}} ");
        let answer = client::ask(&self.socket, "GET", "/metrics").and_then(client::Answer::body);
        let Ok(text) = answer else { return 0 };
        let count = text.lines().find_map(|line| line.strip_prefix(&series));
        count.and_then(|count| count.parse().ok()).unwrap_or_default()
    }

    fn is_ready(&self) -> bool {
        let answer = client::ask(&self.socket, "GET", "/readyz");
        answer.and_then(client::Answer::done).is_ok()
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let last = text.lines().last().unwrap_or("weir said nothing");
        last.trim_start_matches("weir: ").to_owned()
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Namespace {
    fn new() -> Result<Namespace, String> {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        };
        let made = std::thread::scope(|scope| scope.spawn(make).join());
        let made = made.map_err(|_| "a panic".to_owned())?;
        made.map(Namespace).map_err(|error| format!("{error}: needs CAP_SYS_ADMIN"))
    }

    /// Does `work` in it; sockets and processes stay where they were made.
    fn within<T: Send, E: ToString + Send>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send,
    ) -> Result<T, String> {
        let inner = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET).map_err(|error| error.to_string())?;
            work().map_err(|error| error.to_string())
        };
        let done = std::thread::scope(|scope| scope.spawn(inner).join());
        done.unwrap_or_else(|_| Err("a panic".to_owned()))
    }

    fn ip(&self, words: &str) -> Result<(), String> {
        let run = || Command::new("ip").args(words.split(' ')).stdin(Stdio::null()).output();
        let output = self
            .within(run)
            .map_err(|error| format!("ip: {error} (`apt-get install iproute2`)"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!("ip {words}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// Dials from inside a cgroup and says what is wrong with what came back.
///
/// # Errors
///
/// The cgroup cannot be joined, nobody answers, or the socket does not show what was dialled.
pub fn dial(cgroup: &Path, to: SocketAddr) -> Result<(), String> {
    let own = std::process::id().to_string();
    fs::write(cgroup.join("cgroup.procs"), own)
        .map_err(|error| format!("join {}: {error}", cgroup.display()))?;
    let (peer, _) = ask(to)?;
    if peer == to {
        return Ok(());
    }
    Err(format!("getpeername says {peer}, and {to} was dialled"))
}

/// The peer's name, and the address that the peer saw.
fn ask(to: SocketAddr) -> Result<(SocketAddr, IpAddr), String> {
    let failed = |error: io::Error| format!("{to}: {error}");
    let stream = TcpStream::connect_timeout(&to, PATIENCE).map_err(failed)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let peer = stream.peer_addr().map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(failed)?;
    let heard = line.trim().parse().map_err(|_| format!("{to}: answered `{}`", line.trim()))?;
    Ok((peer, heard))
}

/// Tells everybody the address they come from. Ends with the process, which is near.
fn greet(listener: TcpListener) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Ok(peer) = stream.peer_addr() else { continue };
            // Who has gone need not know.
            let _ = writeln!(stream, "{}", peer.ip().to_canonical());
        }
    });
}

const ANY: &str = "::";
/// Names begin so, and then comes the process id.
const PREFIX: &str = "weir-check-";
/// The servers'.
pub(super) const PORT: u16 = 9000;
pub(super) const NODE: [&str; 2] = ["10.97.1.1", "fd97:1::1"];
pub(super) const FAR: [&str; 2] = ["10.97.1.2", "fd97:1::2"];
const READY_WITHIN: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(5);
