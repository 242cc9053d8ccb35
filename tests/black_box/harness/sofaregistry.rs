// SPDX-License-Identifier: Apache-2.0
//! The real SOFARegistry: meta, data and session server in one JVM, its tables in memory, in a
//! namespace of the test.

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::{Net, Place, java};

/// One that knows nothing at first; killed on drop.
pub(crate) struct SofaRegistry<'a> {
    child: Option<Child>,
    home: TempDir,
    ip: String,
    net: &'a Net,
    place: Place,
}

impl<'a> SofaRegistry<'a> {
    /// At its usual ports in `place`, whose own address is `ip`; not running yet.
    pub(crate) fn new(net: &'a Net, place: Place, ip: &str) -> SofaRegistry<'a> {
        let home = TempDir::new().unwrap();
        SofaRegistry { child: None, home, ip: ip.to_owned(), net, place }
    }

    /// As `new`, and serves.
    pub(crate) fn started(net: &'a Net, place: Place, ip: &str) -> SofaRegistry<'a> {
        let mut registry = SofaRegistry::new(net, place, ip);
        registry.start();
        registry
    }

    pub(crate) fn start(&mut self) {
        let mut command = java(self.net, self.place, self.home.path(), "WEIR_SOFAREGISTRY");
        command.arg(MAIN);
        let log = fs::File::create(self.home.path().join("out")).unwrap();
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.child = Some(child.expect("java"));
        let end = Instant::now() + STARTS_WITHIN;
        while !self.serves() {
            let over = self.child.as_mut().unwrap().try_wait().unwrap();
            let said = || fs::read_to_string(self.home.path().join("out")).unwrap_or_default();
            assert!(over.is_none(), "SOFARegistry ended: {}", said());
            assert!(Instant::now() < end, "SOFARegistry does not serve: {}", said());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Dies without a word, with all it knew.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGSTOP and SIGCONT.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    /// What its session server holds of publishers of a SOFARPC service.
    pub(crate) fn publishers(&self, service: &str) -> Vec<Value> {
        let id = format!("{service}@DEFAULT#@#DEFAULT_INSTANCE_ID#@#SOFA");
        let id = id.replace('@', "%40").replace('#', "%23");
        let said = self.ask(&format!("/digest/pub/data/query?dataInfoId={id}"));
        let said: Value = serde_json::from_str(&said).unwrap_or_default();
        said["PUB"].as_array().cloned().unwrap_or_default()
    }

    fn serves(&self) -> bool {
        self.ask("/health/check").contains("\"success\":true")
    }

    /// The session server's HTTP port; empty if it does not answer.
    fn ask(&self, path: &str) -> String {
        let url = format!("http://{}:9603{path}", self.ip);
        let output = self.net.output(self.place, &["curl", "-s", "-m", "2", &url]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for SofaRegistry<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

const MAIN: &str = "com.alipay.sofa.registry.server.integration.RegistryApplication";
/// Twelve seconds on two idle cores.
const STARTS_WITHIN: Duration = Duration::from_secs(120);
