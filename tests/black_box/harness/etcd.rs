// SPDX-License-Identifier: Apache-2.0
//! Debian's etcd, in a namespace of the test, looked at with its own `etcdctl`.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::{Authority, Net, Place, until};

/// A server of its own data; killed on drop, with who watches it.
pub(crate) struct Etcd<'a> {
    child: Option<Child>,
    home: TempDir,
    /// Only who is known is answered.
    is_closed: bool,
    net: &'a Net,
    place: Place,
    /// Of a server that shows who it is and wants to know the same: its authority, its own certificate and
    /// that one's key.
    tls: Option<[PathBuf; 3]>,
    url: String,
    watcher: Option<Child>,
}

impl<'a> Etcd<'a> {
    /// At `addr` in `place`, but not running yet.
    pub(crate) fn new(net: &'a Net, place: Place, addr: &str) -> Etcd<'a> {
        let (home, url) = (TempDir::new().unwrap(), format!("http://{addr}"));
        Etcd { child: None, home, is_closed: false, net, place, tls: None, url, watcher: None }
    }

    /// As `started`, and speaks TLS only, with whom its own authority vouches for.
    pub(crate) fn secure(
        net: &'a Net,
        place: Place,
        addr: &str,
        authority: &Authority,
    ) -> Etcd<'a> {
        let mut etcd = Etcd::new(net, place, addr);
        let ip = addr.rsplit_once(':').unwrap().0;
        let [certificate, key] = authority.issue("etcd", &format!("IP:{ip},DNS:etcd.example"));
        etcd.url = format!("https://{addr}");
        etcd.tls = Some([authority.ca(), certificate, key]);
        etcd.start();
        etcd
    }

    /// As `new`, and serves.
    pub(crate) fn started(net: &'a Net, place: Place, addr: &str) -> Etcd<'a> {
        let mut etcd = Etcd::new(net, place, addr);
        etcd.start();
        etcd
    }

    pub(crate) fn start(&mut self) {
        let mut command = self.net.command(self.place, "etcd");
        command.arg("--data-dir").arg(self.home.path().join("data"));
        if let Some([ca, certificate, key]) = &self.tls {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
            command.arg("--cert-file").arg(certificate).arg("--key-file").arg(key);
        }
        command.args(["--listen-client-urls", &self.url, "--advertise-client-urls", &self.url]);
        let log = fs::File::create(self.home.path().join("out")).unwrap();
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.child = Some(child.expect("etcd"));
        until("etcd serves", || {
            let over = self.child.as_mut().unwrap().try_wait().unwrap();
            let said = || fs::read_to_string(self.home.path().join("out")).unwrap_or_default();
            assert!(over.is_none(), "etcd ended (installed by scripts/setup): {}", said());
            self.ask(&["endpoint", "health"]).is_some()
        });
    }

    /// Writes down every change from now on.
    pub(crate) fn watch(&mut self) {
        let file = fs::File::create(self.home.path().join("history")).unwrap();
        let mut command = self.net.command(self.place, "etcdctl");
        command.args(["--endpoints", &self.url, "watch", "--prefix", "/"]);
        let child = command.stdout(file).stderr(Stdio::null()).spawn().unwrap();
        self.watcher = Some(child);
        self.ask(&["put", "/watched", "yes"]).unwrap();
        until("the watcher watches", || {
            self.ask(&["put", "/watched", "yes"]).unwrap();
            self.history().contains("/watched")
        });
    }

    /// What the watcher has written down.
    pub(crate) fn history(&self) -> String {
        fs::read_to_string(self.home.path().join("history")).unwrap()
    }

    /// Dies without a word; its data stay.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Forgets everything; only while it does not run.
    pub(crate) fn wipe(&self) {
        fs::remove_dir_all(self.home.path().join("data")).unwrap();
    }

    /// SIGSTOP and SIGCONT.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    /// The keys of providers.
    pub(crate) fn providers(&self) -> Vec<String> {
        let said = self.ask(&["get", "--prefix", "/", "--keys-only"]).unwrap_or_default();
        let keys = said.lines().filter(|line| line.contains("/providers/"));
        keys.map(str::to_owned).collect()
    }

    /// Asks who everybody is from now on: `root` may do everything, and `weir`, whose password is `secret`,
    /// may read and write below `prefix`.
    pub(crate) fn close(&mut self, prefix: &str) {
        let steps: [&[&str]; 8] = [
            &["role", "add", "root"],
            &["user", "add", "root:root"],
            &["user", "grant-role", "root", "root"],
            &["role", "add", "weir"],
            &["role", "grant-permission", "--prefix=true", "weir", "readwrite", prefix],
            &["user", "add", "weir:secret"],
            &["user", "grant-role", "weir", "weir"],
            &["auth", "enable"],
        ];
        for step in steps {
            self.ask(step).unwrap_or_else(|| panic!("{step:?}"));
        }
        self.is_closed = true;
    }

    /// As somebody else who may do so: what `etcdctl` prints, if it succeeds.
    pub(crate) fn ask(&self, words: &[&str]) -> Option<String> {
        let user: &[&str] = if self.is_closed { &["--user", "root:root"] } else { &[] };
        let first = ["etcdctl", "--command-timeout=1s", "--endpoints", &self.url];
        let keys = ["--cacert", "--cert", "--key"];
        let tls = self.tls.iter().flat_map(|files| keys.into_iter().zip(files));
        let tls: Vec<&str> = tls.flat_map(|(key, file)| [key, file.to_str().unwrap()]).collect();
        let all = [&first, &tls[..], user, words].concat();
        let output = self.net.output(self.place, &all);
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }
}

impl Drop for Etcd<'_> {
    fn drop(&mut self) {
        for mut child in self.child.take().into_iter().chain(self.watcher.take()) {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
