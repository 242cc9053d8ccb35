// SPDX-License-Identifier: Apache-2.0
//! What every test stands on: namespaces, a running weir, checked payload.

use std::time::{Duration, Instant};

pub(crate) use self::authority::Authority;
pub(crate) use self::bpffs::Bpffs;
pub(crate) use self::etcd::Etcd;
pub(crate) use self::java::java;
pub(crate) use self::net::{Cgroup, Net, Place, run, said};
pub(crate) use self::program::Program;
pub(crate) use self::sofaregistry::SofaRegistry;
pub(crate) use self::weir::{Weir, config_file, weir};
pub(crate) use self::words::{Random, check, echo, expect_eof, expect_reset, receive, send};
pub(crate) use self::zookeeper::Zookeeper;

mod authority;
mod bpffs;
mod etcd;
mod java;
mod net;
mod program;
pub(crate) mod rig;
mod sofaregistry;
mod weir;
mod words;
mod zookeeper;

/// Waits until `is_so`; fails with `what` if it never is.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// As often as a usual run has time for, or as the catalogue asks with `WEIR_TEST_FULL=1`.
pub(crate) fn rounds(usual: u64, full: u64) -> u64 {
    if std::env::var_os("WEIR_TEST_FULL").is_some() { full } else { usual }
}

/// Waits until what `left` says is nothing; fails with what it still says.
pub(crate) fn until_nothing(left: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while !left().is_empty() && Instant::now() < deadline {
        std::thread::sleep(LOOK_EVERY);
    }
    assert_eq!(left(), "", "something is left");
}

/// For anything that should be a matter of milliseconds, on a machine that is busy with others.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(5);
