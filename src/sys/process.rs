// SPDX-License-Identifier: Apache-2.0
//! The process and its threads: descriptors, CPUs, signals.

use std::io;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use nix::unistd::Pid;

/// Raises the soft limit of descriptors to the hard one and says what it is now.
///
/// # Errors
///
/// The limit cannot be read (getrlimit(2)).
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        return Ok(soft);
    }
    Ok(hard)
}

/// The CPUs this process may run on, in ascending order (sched_getaffinity(2)).
///
/// # Errors
///
/// The kernel knows more CPUs than the mask has bits.
pub fn allowed_cpus() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect())
}

/// Keeps this thread on one CPU; false if it may not run there.
#[must_use]
pub fn pin_thread(cpu: usize) -> bool {
    core_affinity::set_for_current(core_affinity::CoreId { id: cpu })
}

/// This thread shall see no signal: they are for the control thread.
///
/// # Errors
///
/// Never on Linux.
pub fn block_signals() -> io::Result<()> {
    Ok(SigSet::all().thread_block()?)
}
