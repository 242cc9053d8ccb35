// SPDX-License-Identifier: Apache-2.0
//! A running weir, asked over its admin socket.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::{Net, PATIENCE, Place, until, until_nothing};

/// Killed on drop; `end` is the friendly way, and checks what it leaves.
pub(crate) struct Weir {
    child: Child,
    /// What they said when a test failed.
    metrics: String,
    flows: String,
    place: TempDir,
}

/// The program under test.
pub(crate) fn weir() -> &'static str {
    env!("CARGO_BIN_EXE_weir")
}

impl Weir {
    /// `weir forward` in the node, one worker, ready to accept.
    pub(crate) fn forward(net: &Net, arguments: &[&str]) -> Weir {
        Weir::under(net, &[], arguments)
    }

    /// As `forward`, with a profile of this text.
    pub(crate) fn forward_with(net: &Net, profile: &str, arguments: &[&str]) -> Weir {
        let place = TempDir::new().unwrap();
        let file = place.path().join("test.yaml");
        fs::write(&file, profile).unwrap();
        let all = [arguments, &["--profile", file.to_str().unwrap()]].concat();
        Weir::under(net, &[], &all)
    }

    /// As `forward`, started by the program `starter`.
    pub(crate) fn under(net: &Net, starter: &[&str], arguments: &[&str]) -> Weir {
        let place = TempDir::new().unwrap();
        let words = [starter, &[weir()]].concat();
        let mut command = net.command(Place::Node, words[0]);
        command.args(&words[1..]);
        let workers: &[&str] =
            if arguments.contains(&"--workers") { &[] } else { &["--workers", "1"] };
        command.arg("forward").args(workers).args(arguments);
        command.arg("--socket").arg(place.path().join("admin.sock"));
        Weir::spawned(command, place)
    }

    /// `weir run` in the node with this config, ready and with its capture in place.
    pub(crate) fn run(net: &Net, config: &str) -> Weir {
        Weir::run_as(net.command(Place::Node, weir()), config)
    }

    /// As `run`, by a command that starts the program under test.
    pub(crate) fn run_as(mut command: Command, config: &str) -> Weir {
        let place = TempDir::new().unwrap();
        let file = config_file(&place, config);
        command.args(["run", "-c"]).arg(file);
        Weir::spawned(command, place)
    }

    fn spawned(mut command: Command, place: TempDir) -> Weir {
        let log = fs::File::create(place.path().join("log")).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut weir = Weir { child, flows: String::new(), metrics: String::new(), place };
        until("weir is ready", || {
            let over = weir.child.try_wait().unwrap();
            assert!(over.is_none(), "weir ended with {over:?}: {}", weir.log());
            weir.ask("/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.0 200"))
        });
        weir
    }

    /// SIGHUP with this config in its file; true once it is in force, false once it was refused.
    pub(crate) fn reload(&self, config: &str) -> bool {
        let count = |what: &str| self.log().matches(what).count();
        let (done, refused) = ("the config is reloaded", "the config is not reloaded");
        let before = (count(done), count(refused));
        config_file(&self.place, config);
        self.signal(nix::sys::signal::Signal::SIGHUP);
        until("the reload is over", || (count(done), count(refused)) != before);
        count(done) > before.0
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.place.path().join("admin.sock")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.place.path().join("log")).unwrap_or_default()
    }

    /// One answer of the admin listener, with its head; `None` if nobody answers.
    pub(crate) fn ask(&self, target: &str) -> Option<String> {
        ask(&self.socket(), "GET", target)
    }

    pub(crate) fn flows(&self) -> Vec<serde_json::Value> {
        let answer = self.ask("/flows").unwrap();
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// What `weir endpoints` says: state and open flows of each address.
    pub(crate) fn endpoints(&self) -> Vec<(String, String, u64)> {
        let answer = self.ask("/endpoints").unwrap();
        let list: Vec<serde_json::Value> =
            serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        list.iter()
            .map(|one| (text(&one["address"]), text(&one["state"]), one["flows"].as_u64().unwrap()))
            .collect()
    }

    /// The sum of the series of `name` that have all `labels` (`reason="finished"`).
    pub(crate) fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let answer = self.ask("/metrics").unwrap();
        let is_it = |line: &&str| {
            let series = line.split(' ').next().unwrap_or_default();
            series.split('{').next() == Some(name)
                && labels.iter().all(|label| series.contains(label))
        };
        let values = answer.lines().filter(is_it).filter_map(|line| line.rsplit(' ').next());
        values.map(|value| value.parse::<u64>().unwrap()).sum()
    }

    pub(crate) fn closed(&self, reason: &str) -> u64 {
        self.metric("weir_flows_closed_total", &[&format!("reason=\"{reason}\"")])
    }

    pub(crate) fn denied(&self, reason: &str) -> u64 {
        self.metric("weir_denied_total", &[&format!("reason=\"{reason}\"")])
    }

    pub(crate) fn opened(&self) -> u64 {
        self.metric("weir_flows_opened_total", &[])
    }

    pub(crate) fn active(&self) -> u64 {
        self.metric("weir_flows_active", &[])
    }

    /// The number that the next descriptor of the process would get.
    pub(crate) fn next_descriptor(&self) -> usize {
        let place = PathBuf::from(format!("/proc/{}/fd", self.pid()));
        (0..).find(|number| fs::symlink_metadata(place.join(number.to_string())).is_err()).unwrap()
    }

    /// Open descriptors of this kind: `pipe:`, `socket:`.
    pub(crate) fn descriptors(&self, kind: &str) -> usize {
        let place = format!("/proc/{}/fd", self.pid());
        let links = fs::read_dir(place).unwrap().flatten().map(|one| fs::read_link(one.path()));
        links.flatten().filter(|target| target.to_string_lossy().starts_with(kind)).count()
    }

    /// Time that its threads have run.
    pub(crate) fn cpu(&self) -> Duration {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten();
        let run = |thread: fs::DirEntry| -> Option<u64> {
            let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split_whitespace().next()?.parse().ok()
        };
        Duration::from_nanos(threads.filter_map(run).sum())
    }

    /// Resident bytes that belong to user space alone.
    pub(crate) fn anonymous_bytes(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid())).unwrap();
        let line = text.lines().find(|line| line.starts_with("Anonymous:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.pid().try_into().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Dies without a word.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut over = None;
        until("weir ends", || {
            over = self.child.try_wait().unwrap();
            over.is_some()
        });
        over.unwrap()
    }

    /// Every flow has ended: SIGTERM, exit code 0, counters that balance, and a clean node.
    pub(crate) fn end(self, net: &Net) {
        self.end_but_for(net, |_| false);
    }

    /// As `end`, of a weir that is `on_exit: closed`: what refuses stays.
    pub(crate) fn end_closed(self, net: &Net) {
        self.end_but_for(net, |left| left == "table inet weir_guard");
    }

    fn end_but_for(mut self, net: &Net, may_stay: impl Fn(&str) -> bool) {
        until("every flow has ended", || self.active() == 0);
        assert_eq!(self.opened(), self.metric("weir_flows_closed_total", &[]), "counters balance");
        self.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(self.wait().code(), Some(0), "{}", self.log());
        assert!(!self.socket().exists(), "the admin socket is gone");
        until_nothing(|| {
            let left = net.left_in(Place::Node);
            left.lines().filter(|line| !may_stay(line)).collect::<Vec<_>>().join("\n")
        });
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.metrics = self.ask("/metrics").unwrap_or_default();
            self.flows = self.ask("/flows").unwrap_or_default();
        }
        // It has ended already, mostly.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("weir said: {}", self.log());
            let is_news = |line: &&str| !line.starts_with('#') && !line.ends_with(" 0");
            let metrics = self.metrics.clone();
            eprintln!("{}", metrics.lines().filter(is_news).collect::<Vec<_>>().join("\n"));
            eprintln!("{}", self.flows);
        }
    }
}

/// Writes `config` beside the admin socket that it names as SOCKET.
pub(crate) fn config_file(place: &TempDir, config: &str) -> PathBuf {
    let socket = place.path().join("admin.sock");
    let file = place.path().join("weir.yaml");
    let admin = format!("{config}\nadmin: {{ socket: \"{}\" }}\n", socket.display());
    fs::write(&file, admin).unwrap();
    file
}

fn ask(socket: &Path, method: &str, target: &str) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    write!(stream, "{method} {target} HTTP/1.0\r\nHost: weir\r\nContent-Length: 0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    (!answer.is_empty()).then_some(answer)
}
