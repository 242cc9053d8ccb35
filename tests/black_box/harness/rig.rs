// SPDX-License-Identifier: Apache-2.0
//! A weir in front of one server, and pairs of joined sockets for the asking.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Net, PATIENCE, Place, Weir, until};

/// A weir, its node, and the listener behind it.
pub(crate) struct Rig {
    pub(crate) listener: TcpListener,
    pub(crate) net: Net,
    pub(crate) weir: Weir,
}

impl Rig {
    pub(crate) fn new() -> Rig {
        Rig::with("")
    }

    /// With these keys on top of the balanced profile.
    pub(crate) fn with(profile: &str) -> Rig {
        let net = Net::new();
        let listener = net.listen(Place::Server, SERVER);
        let profile = format!("summary: a test\ninclude: balanced\n{profile}\n");
        let weir = Weir::forward_with(&net, &profile, &FORWARD);
        Rig { listener, net, weir }
    }

    pub(crate) fn pair(&self) -> (TcpStream, TcpStream) {
        let client = self.net.connect(Place::Client, LISTEN);
        let (server, _) = self.listener.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.set_write_timeout(Some(PATIENCE)).unwrap();
        (client, server)
    }

    /// A pair that this relay has taken over, as far as it does so by itself.
    pub(crate) fn pair_in(&self, relay: &str) -> (TcpStream, TcpStream) {
        if relay == "sockmap" { self.joined() } else { self.pair() }
    }

    /// A pair that the kernel forwards between, both ways.
    pub(crate) fn joined(&self) -> (TcpStream, TcpStream) {
        let joined = || self.weir.metric("weir_relay_changes_total", &["to=\"sockmap\""]);
        let before = joined();
        let pair = self.pair();
        until("the kernel forwards", || joined() >= before + 2);
        pair
    }

    /// Every flow has ended: weir ends too, and leaves nothing.
    pub(crate) fn end(self) {
        drop(self.listener);
        self.weir.end(&self.net);
    }
}

/// Counts what was taken.
pub(crate) struct Counted<'a>(pub(crate) &'a TcpStream, pub(crate) &'a AtomicU64);

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.0.write(bytes)?;
        self.1.fetch_add(taken as u64, Ordering::Relaxed);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until nothing more is taken; how much was.
pub(crate) fn until_stopped(sent: &AtomicU64) -> u64 {
    let mut last = (0, Instant::now());
    until("the writer stops", || {
        let now = sent.load(Ordering::Relaxed);
        if now != last.0 {
            last = (now, Instant::now());
        }
        now > 0 && last.1.elapsed() > Duration::from_millis(500)
    });
    last.0
}

/// Reads no faster than it should; at 0 it reads nothing for a while, and then as fast as it goes.
pub(crate) struct Paced<'a> {
    began: Instant,
    bytes_per_second: u64,
    from: &'a TcpStream,
    taken: u64,
}

impl<'a> Paced<'a> {
    pub(crate) fn new(from: &'a TcpStream, bytes_per_second: u64) -> Paced<'a> {
        Paced { began: Instant::now(), bytes_per_second, from, taken: 0 }
    }

    /// When the next byte is due.
    fn due(&self) -> Duration {
        match self.bytes_per_second {
            0 => STALL,
            speed => Duration::from_micros(self.taken * 1_000_000 / speed),
        }
    }
}

impl Read for Paced<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Some(early) = self.due().checked_sub(self.began.elapsed()) {
            std::thread::sleep(early);
        }
        let taken = self.from.read(bytes)?;
        self.taken += taken as u64;
        Ok(taken)
    }
}

/// Where weir listens.
pub(crate) const LISTEN: &str = "10.98.1.1:7000";
/// Where its upstream is.
pub(crate) const SERVER: &str = "10.98.2.2:7001";
/// The arguments that say so.
pub(crate) const FORWARD: [&str; 4] = ["--listen", LISTEN, "--to", SERVER];
/// Long enough to fill every socket and buffer.
const STALL: Duration = Duration::from_millis(300);
