// SPDX-License-Identifier: Apache-2.0
//! Debian's ZooKeeper, in a namespace of the test.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use zookeeper_client::Client;

use super::{Authority, Net, Place, until};

/// A server of its own data; killed on drop.
pub(crate) struct Zookeeper<'a> {
    addr: String,
    child: Option<Child>,
    home: TempDir,
    net: &'a Net,
    place: Place,
}

impl<'a> Zookeeper<'a> {
    /// At `addr` in `place`, but not running yet.
    pub(crate) fn new(net: &'a Net, place: Place, addr: &str) -> Zookeeper<'a> {
        let home = TempDir::new().unwrap();
        let (ip, port) = addr.rsplit_once(':').unwrap();
        let config = format!(
            "tickTime=500\nminSessionTimeout=1000\nmaxSessionTimeout=20000\ndataDir={}\n\
             clientPortAddress={ip}\nclientPort={port}\nadmin.enableServer=false\n\
             4lw.commands.whitelist=srvr,dump\n",
            home.path().join("data").display()
        );
        fs::write(home.path().join("zoo.cfg"), config).unwrap();
        Zookeeper { addr: addr.to_owned(), child: None, home, net, place }
    }

    /// As `started`, and speaks TLS at `addr` with whom its own authority vouches for; in plain text it serves at
    /// `plain`.
    pub(crate) fn secure(
        net: &'a Net,
        place: Place,
        plain: &str,
        addr: &str,
        authority: &Authority,
    ) -> Zookeeper<'a> {
        let mut zookeeper = Zookeeper::new(net, place, plain);
        let (ip, port) = addr.rsplit_once(':').unwrap();
        let both = zookeeper.home.path().join("server.pem");
        let pair = authority.issue("zookeeper", &format!("IP:{ip}"));
        let pair = pair.map(|file| fs::read_to_string(file).unwrap());
        fs::write(&both, pair.concat()).unwrap();
        let config = zookeeper.home.path().join("zoo.cfg");
        let more = format!(
            "secureClientPortAddress={ip}\nsecureClientPort={port}\n\
             serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory\n\
             ssl.keyStore.type=PEM\nssl.keyStore.location={}\nssl.trustStore.type=PEM\n\
             ssl.trustStore.location={}\n",
            both.display(),
            authority.ca().display()
        );
        fs::write(&config, fs::read_to_string(&config).unwrap() + &more).unwrap();
        zookeeper.start();
        zookeeper
    }

    /// As `new`, and serves.
    pub(crate) fn started(net: &'a Net, place: Place, addr: &str) -> Zookeeper<'a> {
        let mut zookeeper = Zookeeper::new(net, place, addr);
        zookeeper.start();
        zookeeper
    }

    pub(crate) fn start(&mut self) {
        let mut command = self.net.command(self.place, "java");
        // A log file of the usual 64 MiB takes longer to allocate than everything else.
        let words = ["-Xmx128m", "-XX:TieredStopAtLevel=1", "-Dzookeeper.preAllocSize=64", "-cp"];
        command.args(words).arg(CLASSES).arg(MAIN).arg(self.home.path().join("zoo.cfg"));
        let log = fs::File::create(self.home.path().join("out")).unwrap();
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.child = Some(child.expect("java"));
        // `ruok` is answered before requests are.
        until("ZooKeeper serves", || {
            let over = self.child.as_mut().unwrap().try_wait().unwrap();
            let said = || fs::read_to_string(self.home.path().join("out")).unwrap_or_default();
            assert!(over.is_none(), "ZooKeeper ended (installed by scripts/setup): {}", said());
            self.ask("srvr").contains("Mode:")
        });
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

    /// The paths of ephemeral nodes: who lives.
    pub(crate) fn ephemerals(&self) -> Vec<String> {
        let said = self.ask("dump");
        let paths = said.lines().map(str::trim).filter(|line| line.starts_with('/'));
        paths.map(str::to_owned).collect()
    }

    /// The sessions that own them.
    pub(crate) fn owners(&self) -> Vec<String> {
        let said = self.ask("dump");
        let heads = said.lines().filter(|line| line.starts_with("0x") && line.ends_with(':'));
        heads.map(str::to_owned).collect()
    }

    /// What somebody else does there who is nobody in particular.
    pub(crate) fn visit<T: Send>(&self, work: impl AsyncFnOnce(Client) -> T + Send) -> T {
        self.net.within(self.place, || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { work(Client::connect(&self.addr).await.unwrap()).await })
        })
    }

    /// Its own record of every change there ever was, as bytes with some text in them.
    pub(crate) fn history(&self) -> String {
        let files = fs::read_dir(self.home.path().join("data/version-2")).unwrap().flatten();
        let logs = files.map(|file| file.path()).filter(|path| is_log(path));
        logs.map(|path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()).collect()
    }

    /// One of its four letter words; empty if it does not answer.
    fn ask(&self, word: &str) -> String {
        let mut said = String::new();
        if let Ok(mut stream) = self.net.try_connect(self.place, &self.addr) {
            // While it starts it takes connections that it never answers.
            stream.set_read_timeout(Some(ANSWER_WITHIN)).unwrap();
            // What came before an error is as good as an answer.
            let _ = stream
                .write_all(word.as_bytes())
                .and_then(|()| stream.read_to_string(&mut said).map(drop));
        }
        said
    }
}

fn is_log(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("log."))
}

impl Drop for Zookeeper<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// Where Debian has it, and what its TLS needs besides.
const CLASSES: &str = "/etc/zookeeper/conf_example:/usr/share/java/zookeeper.jar:\
                       /usr/share/java/netty-codec.jar:/usr/share/java/netty-resolver.jar";
const MAIN: &str = "org.apache.zookeeper.server.ZooKeeperServerMain";
