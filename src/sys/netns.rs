// SPDX-License-Identifier: Apache-2.0
//! Network namespaces: which one a thread is in decides where its sockets and children live.

use std::collections::BTreeSet;
use std::fs::{File, metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

use super::socket::netns_cookie;

/// A network namespace, held: it lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// By its file: `/run/netns/NAME`, or `/proc/PID/ns/net`.
    ///
    /// # Errors
    ///
    /// There is no such file, or it may not be read.
    pub fn open(path: &Path) -> io::Result<Netns> {
        Ok(Netns { file: File::open(path)? })
    }

    /// The one that this thread is in.
    ///
    /// # Errors
    ///
    /// `/proc` is not mounted.
    pub fn own() -> io::Result<Netns> {
        Netns::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Moves this thread into it: sockets made from now on belong to it (setns(2)).
    ///
    /// # Errors
    ///
    /// `EPERM`: needs `CAP_SYS_ADMIN`, over the namespace too. `EINVAL`: it is none.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.file, CloneFlags::CLONE_NEWNET)?)
    }

    /// Does `work` in it, on a thread of its own: this thread stays where it is.
    ///
    /// # Errors
    ///
    /// As `enter`; or there is no thread to be had.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let inner = || self.enter().map(|()| work());
            let thread = std::thread::Builder::new().name("weir-ns".to_owned());
            let joined = thread.spawn_scoped(scope, inner)?.join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Whether `path` still leads to it, and not to nothing or to another one.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        let number = |metadata: io::Result<std::fs::Metadata>| {
            metadata.map(|metadata| (metadata.dev(), metadata.ino())).ok()
        };
        number(metadata(path)).is_some_and(|at| number(self.file.metadata()) == Some(at))
    }
}

/// The numbers (`SO_NETNS_COOKIE`, socket(7)) of all namespaces in which a process lives or that have a
/// name; `None` where not all of them can be seen: in a PID namespace, or without the right to enter them.
#[must_use]
pub fn living() -> Option<BTreeSet<u64>> {
    if metadata("/proc/self/ns/pid").ok()?.ino() != FIRST_PID_NAMESPACE {
        return None;
    }
    let entries = |path: &str| std::fs::read_dir(path).into_iter().flatten().flatten();
    let named = entries(NAMED).map(|entry| entry.path());
    let lived_in = entries("/proc").map(|entry| entry.path().join("ns/net"));
    let mut seen = BTreeSet::new();
    let mut living = BTreeSet::new();
    for path in named.chain(lived_in) {
        let Ok(netns) = Netns::open(&path) else { continue };
        let found = netns.file.metadata().ok()?;
        if seen.insert((found.dev(), found.ino())) {
            living.insert(netns.within(netns_cookie).and_then(|cookie| cookie).ok()?);
        }
    }
    Some(living)
}

/// `PROC_PID_INIT_INO` (include/linux/proc_ns.h).
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
/// Where `ip netns` names namespaces.
const NAMED: &str = "/run/netns";

/// Whether this thread's namespace has IPv6. Not `/proc/net`, which is the main thread's.
#[must_use]
pub fn has_ipv6() -> bool {
    Path::new("/proc/thread-self/net/if_inet6").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespace_is_told_from_others_by_its_file() {
        let own = Netns::own().unwrap();
        assert!(own.is_at(Path::new("/proc/thread-self/ns/net")));
        assert!(!own.is_at(Path::new("/proc/thread-self/ns/mnt")));
        assert!(!own.is_at(Path::new("/no/such")));
        assert!(living().is_none_or(|all| all.contains(&netns_cookie().unwrap())));
        let error = Netns::open(Path::new("/dev/null")).unwrap().enter().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
