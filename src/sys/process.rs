// SPDX-License-Identifier: Apache-2.0
//! The process and its threads: descriptors, CPUs, signals, time.
#![expect(
    unsafe_code,
    reason = "membarrier(2) and what a child does before exec have no safe wrapper"
)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, getpid, getppid, gettid};

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

/// An object named `step` stands. In builds with debug assertions the process dies by SIGKILL here if
/// `WEIR_DIE_AFTER` says so: tests look what is left. In release builds this is nothing.
pub fn made(step: &str) {
    if cfg!(debug_assertions) && std::env::var("WEIR_DIE_AFTER").is_ok_and(|last| last == step) {
        // A process may always kill itself.
        let _ = nix::sys::signal::kill(getpid(), Signal::SIGKILL);
    }
}

/// The child will be killed when the main thread ends (prctl(2)), and so as soon as we are: our
/// descriptors are open until the last of our threads has run once more to its end, and one that is
/// pinned to a busy CPU waits for that. Does nothing on another thread, which may end before us.
pub fn dies_with_us(command: &mut Command) {
    let parent = getpid();
    if gettid() != parent {
        return;
    }
    let before_exec = move || -> io::Result<()> {
        set_pdeathsig(Signal::SIGKILL)?;
        // We may have been killed before it was set.
        if getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
    };
    // SAFETY: it makes two syscalls, allocates nothing and takes no lock (signal-safety(7)).
    unsafe { command.pre_exec(before_exec) };
}

/// Nanoseconds of `CLOCK_MONOTONIC`, the clock of `bpf_ktime_get_ns`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    // The clock is always there (clock_gettime(2)), and never negative.
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or_default()
}

/// Returns when every BPF program that runs now has ended: membarrier(2) waits for an RCU grace
/// period. False where the kernel does not do that (CPUs without a tick).
#[must_use]
pub fn wait_for_programs() -> bool {
    // SAFETY: the command takes numbers only.
    unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 }
}
