// SPDX-License-Identifier: Apache-2.0
//! Three network namespaces, two cables, a cgroup and the processes in them; all gone on drop.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::sys::cgroup;
use crate::sys::signals::is_interrupted;

/// A client, a node with a workload, and a server.
pub(super) struct Lab {
    cgroup: PathBuf,
    directory: PathBuf,
    processes: Vec<(&'static str, Child)>,
}

/// A place in the lab.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    /// Dials the workload.
    Client,
    /// Where weir runs.
    Node,
    /// What the workload dials.
    Server,
    /// In the node, and in the workload's cgroup.
    Workload,
}

/// A step of making the lab that went wrong, in the words of who refused it.
pub(super) type Refusal = String;

impl Lab {
    /// Removes what a killed demo left, and builds anew.
    pub(super) fn build() -> Result<Lab, Refusal> {
        sweep();
        let name = format!("{PREFIX}{}", std::process::id());
        let mount = cgroup::mount().map_err(|error| error.to_string())?;
        let lab = Lab {
            cgroup: mount.join(&name),
            directory: std::env::temp_dir().join(&name),
            processes: Vec::new(),
        };
        for directory in [&lab.directory, &lab.cgroup] {
            fs::create_dir(directory).map_err(|error| refused("make", directory, &error))?;
        }
        for place in [Place::Client, Place::Node, Place::Server] {
            run("ip", &["netns", "add", &lab.namespace(place)])?;
            run("ip", &["-n", &lab.namespace(place), "link", "set", "lo", "up"])?;
        }
        lab.cable(Place::Client, CLIENT, NODE_TO_CLIENT)?;
        lab.cable(Place::Server, SERVER, NODE_TO_SERVER)?;
        Ok(lab)
    }

    /// Where files of the demo go.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The workload's cgroup, relative to the cgroup v2 mount.
    pub(super) fn cgroup(&self) -> String {
        format!("/{PREFIX}{}", std::process::id())
    }

    /// Runs a program to its end and gives what it printed.
    pub(super) fn output(&self, place: Place, words: &[&str]) -> Result<String, Refusal> {
        if is_interrupted() {
            return Err("interrupted".to_owned());
        }
        let output = self
            .command(place, words)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("{}: {error}", words.join(" ")))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("it said nothing");
        Err(format!("{} ({}): {said}", words.join(" "), output.status))
    }

    /// Starts a program that runs until it is ended, and logs into a file of its name.
    pub(super) fn start(
        &mut self,
        place: Place,
        name: &'static str,
        words: &[&str],
    ) -> Result<(), Refusal> {
        let log = self.log(name)?;
        let errors = log.try_clone().map_err(|error| format!("{name}: {error}"))?;
        let child = self
            .command(place, words)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(|error| format!("start {name}: {error}"))?;
        self.processes.push((name, child));
        Ok(())
    }

    /// What a program has written so far.
    pub(super) fn said(&self, name: &str) -> String {
        // A log that is not there says nothing.
        fs::read_to_string(self.directory.join(name)).unwrap_or_default()
    }

    /// Waits for a program that ends by itself.
    pub(super) fn is_over(&mut self, name: &str) -> bool {
        let mut named = self.processes.iter_mut().filter(|(other, _)| *other == name);
        named.all(|(_, child)| !matches!(child.try_wait(), Ok(None)))
    }

    /// Ends a program without a word of warning.
    pub(super) fn kill(&mut self, name: &str) {
        for (_, child) in self.processes.iter_mut().filter(|(other, _)| *other == name) {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        self.processes.retain(|(other, _)| *other != name);
    }

    /// The name of a place's network namespace.
    pub(super) fn namespace(&self, place: Place) -> String {
        let word = match place {
            Place::Client => "client",
            Place::Node | Place::Workload => "node",
            Place::Server => "server",
        };
        format!("{PREFIX}{}-{word}", std::process::id())
    }

    fn log(&self, name: &str) -> Result<File, Refusal> {
        let path = self.directory.join(name);
        File::create(&path).map_err(|error| refused("make", &path, &error))
    }

    /// The shell joins the cgroup before it becomes the program: a socket belongs to the cgroup in
    /// which it was made.
    fn command(&self, place: Place, words: &[&str]) -> Command {
        // Not `ip netns exec`: that hides cgroup v2 behind a new /sys.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace(place)));
        if place == Place::Workload {
            let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.cgroup.display());
            command.args(["sh", "-c", &join, "sh"]);
        }
        command.args(words);
        command
    }

    /// A cable from `place` to the node, with addresses of both families at both ends.
    fn cable(&self, place: Place, far: [&str; 2], near: [&str; 2]) -> Result<(), Refusal> {
        let (outer, node) = (self.namespace(place), self.namespace(Place::Node));
        let name = if place == Place::Client { "client" } else { "server" };
        let peer = ["peer", "name", name, "netns", &node];
        let add = ["-n", &outer, "link", "add", "node", "type", "veth"];
        run("ip", &[&add[..], &peer[..]].concat())?;
        for (namespace, link, addresses) in [(&outer, "node", far), (&node, name, near)] {
            for address in addresses {
                let add = ["-n", namespace, "addr", "add", address, "dev", link];
                let nodad = if address.contains(':') { &["nodad"][..] } else { &[] };
                run("ip", &[&add[..], nodad].concat())?;
            }
            run("ip", &["-n", namespace, "link", "set", link, "up"])?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        remove(&format!("{PREFIX}{}", std::process::id()), &self.cgroup);
        // What is not there need not go.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Runs a program that makes something.
pub(super) fn run(program: &str, words: &[&str]) -> Result<(), Refusal> {
    let output = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error} (run scripts/setup)"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", words.join(" "), said.trim()))
}

/// Waits until `is_done`, in vain if it takes too long.
pub(super) fn wait(mut is_done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if is_done() {
            return true;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    false
}

/// Without its port or prefix.
pub(super) fn bare(address: &str) -> String {
    let address = address.split('/').next().unwrap_or_default();
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V6(ip)) => format!("[{ip}]"),
        _ => address.to_owned(),
    }
}

/// Labs of demos that are no more.
fn sweep() {
    let Ok(entries) = fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        let Some((pid, _)) = rest.split_once('-') else { continue };
        if !Path::new("/proc").join(pid).exists() {
            let lab = format!("{PREFIX}{pid}");
            let cgroup = cgroup::mount().map(|mount| mount.join(&lab)).unwrap_or_default();
            remove(&lab, &cgroup);
            let _ = fs::remove_dir_all(std::env::temp_dir().join(&lab));
        }
    }
}

/// Ends what still runs in the namespaces of `lab`, which are nobody else's, and removes them.
fn remove(lab: &str, cgroup: &Path) {
    for place in ["client", "node", "server"] {
        let namespace = format!("{lab}-{place}");
        let pids = Command::new("ip").args(["netns", "pids", &namespace]).output();
        let pids = pids.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        for pid in pids.unwrap_or_default().split_whitespace() {
            let _ = run("kill", &["-9", pid]);
        }
        let _ = run("ip", &["netns", "del", &namespace]);
    }
    // A cgroup is busy until its last process is gone.
    wait(|| fs::remove_dir(cgroup).is_ok() || !cgroup.exists());
}

fn refused(step: &str, path: &Path, error: &io::Error) -> Refusal {
    format!("{step} {}: {error}", path.display())
}

const PREFIX: &str = "weir-demo-";
/// Addresses of each end, IPv4 and IPv6.
pub(super) const CLIENT: [&str; 2] = ["10.99.1.2/24", "fd99:1::2/64"];
pub(super) const NODE_TO_CLIENT: [&str; 2] = ["10.99.1.1/24", "fd99:1::1/64"];
pub(super) const NODE_TO_SERVER: [&str; 2] = ["10.99.2.1/24", "fd99:2::1/64"];
pub(super) const SERVER: [&str; 2] = ["10.99.2.2/24", "fd99:2::2/64"];
const LOOK_EVERY: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(5);
