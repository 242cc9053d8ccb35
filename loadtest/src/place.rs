// SPDX-License-Identifier: Apache-2.0
//! Where a thread works: its network namespace, its CPU, its cgroup.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, setns};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

/// Moves this thread: sockets that it makes from now on belong to that namespace.
pub(crate) fn enter(namespace: &Path) -> Result<()> {
    let file = File::open(namespace)
        .with_context(|| format!("open the network namespace {}", namespace.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| {
        format!("enter the network namespace {} (needs CAP_SYS_ADMIN)", namespace.display())
    })
}

/// Moves this process: sockets that it makes from now on belong to that cgroup.
pub(crate) fn join(cgroup: &Path) -> Result<()> {
    let file = cgroup.join("cgroup.procs");
    fs::write(&file, "0").with_context(|| format!("join the cgroup {}", cgroup.display()))
}

/// This thread, and those it starts, run on that CPU only.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("--cpu {cpu} is not a CPU number"))?;
    sched_setaffinity(Pid::from_raw(0), &set)
        .with_context(|| format!("run on CPU {cpu} (allowed: {:?})", allowed_cpus()))
}

/// As many descriptors as this process may have, from now on: no table of a ring may be larger.
pub(crate) fn descriptors_max() -> u32 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 0 };
    let most = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_or(soft, |()| hard);
    u32::try_from(most).unwrap_or(u32::MAX)
}

/// The CPUs that this process may use.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return vec![0] };
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}
