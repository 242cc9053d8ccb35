// SPDX-License-Identifier: Apache-2.0
//! Opens a ring with the best flags this kernel takes, or says in one line why there is none.
#![expect(unsafe_code, reason = "one registration the crate has no call for")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::IoUring;

use super::buffers::Buffers;
use super::cancels::Cancels;
use super::headers::Headers;
use super::pipes::{Pipes, SpliceLimits};
use super::scratch::Scratch;
use super::spin::Spin;
use super::turn::COMPLETIONS_PER_TURN_MAX;
use super::{DialOptions, Features, Ring, probe};
use crate::op::Pool;
use crate::profile;
use crate::sys::socket;

/// What a ring is opened with.
#[derive(Debug)]
pub struct Setup<'a> {
    /// Sizes of the two pools.
    pub buffers: &'a profile::Buffers,
    /// Options of every dialled socket.
    pub dial: DialOptions,
    /// Flows at a time; the descriptor table has two places for each.
    pub flows_max: u32,
    /// Headers that may be on their way at once.
    pub headers: u16,
    /// Sizes of the queues, and how to wait.
    pub ring: &'a profile::Ring,
    /// What may be spliced at a time.
    pub splice: SpliceLimits,
}

/// Why there is no ring, or no more.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// `RLIMIT_NOFILE` leaves no descriptor for the ring itself.
    #[error(
        "set up io_uring: no descriptor is left for it (raise RLIMIT_NOFILE with `ulimit -n` or \
         LimitNOFILE=)"
    )]
    Descriptors,
    /// `io_uring_enter` failed for good.
    #[error("enter the io_uring: {source}")]
    Enter {
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel lacks a feature weir cannot do without.
    #[error("io_uring on this kernel lacks {feature}, which came with Linux {since}")]
    Feature {
        /// In words.
        feature: &'static str,
        /// The kernel that has it.
        since: &'static str,
    },
    /// The completion queue was full and the kernel had no memory to keep what did not fit.
    #[error(
        "io_uring lost completions: the kernel ran out of memory for them (give the machine more \
         memory, or raise ring.completions in the profile)"
    )]
    Lost,
    /// `RLIMIT_MEMLOCK` or the memory itself.
    #[error(
        "set up io_uring: out of memory for {what} (raise the cgroup's memory limit or \
         RLIMIT_MEMLOCK, or choose a smaller profile)"
    )]
    Memory {
        /// What did not fit.
        what: &'static str,
    },
    /// A socket option of the profile that this kernel or these rights do not allow.
    #[error("set {option}: {source} (see `sockets` in the profile)")]
    Option {
        /// As the manuals call it.
        option: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel, a seccomp filter or a sysctl forbids io_uring.
    #[error("io_uring is refused here: {source}; {cause}")]
    Refused {
        /// The likely cause and the cure.
        cause: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another step of the set-up.
    #[error("set up io_uring: {step}: {source}")]
    Step {
        /// What the kernel said.
        source: io::Error,
        /// The step that failed.
        step: &'static str,
    },
    /// The descriptor table is larger than `RLIMIT_NOFILE` allows.
    #[error(
        "a worker with flows_max {flows_max} needs RLIMIT_NOFILE of at least {needed} (raise it \
         with `ulimit -n` or LimitNOFILE=, or lower limits.flows_max in the profile)"
    )]
    Table {
        /// As asked for.
        flows_max: u32,
        /// Two a flow.
        needed: u64,
    },
    /// The descriptor table is larger than the kernel makes them.
    #[error("a worker can hold at most 524288 flows, not {flows_max}: lower limits.flows_max")]
    TableMax {
        /// As asked for.
        flows_max: u32,
    },
}

impl Ring {
    /// Opens the ring of the calling thread; only this thread may use it.
    ///
    /// # Errors
    ///
    /// One clear line for each cause, with its cure.
    pub fn open(setup: Setup<'_>) -> Result<Ring, RingError> {
        let (io, deferred_work) = build(setup.ring)?;
        if !io.params().is_feature_submit_stable() || !io.params().is_feature_ext_arg() {
            return Err(RingError::Feature { feature: "stable submission", since: "5.11" });
        }
        // Saves a descriptor look-up a turn; where it is refused nothing is lost but that.
        let _ = io.submitter().register_ring_fd();
        // Nothing of ours should run on kernel threads; this bounds what does all the same.
        let _ = io.submitter().register_iowq_max_workers(&mut [1, 1]);
        register_table(&io, setup.flows_max)?;
        let (small, bulk) = register_buffers(&io, setup.buffers)?;
        // The largest pools leave half of all buffer ids (`profile/read.rs`).
        let first = setup.buffers.small_count + setup.buffers.bulk_count;
        let headers = Headers::new(first, setup.headers.min(u16::MAX - first))
            .map_err(|_| RingError::Memory { what: "the headers" })?;
        let mut ring = Ring {
            io,
            small,
            bulk,
            headers,
            dial: Box::new(setup.dial),
            name: Box::new(socket::no_address()),
            again: Vec::with_capacity(COMPLETIONS_PER_TURN_MAX),
            answers: Vec::with_capacity(setup.flows_max as usize * 2),
            broken: None,
            cancels: Cancels::new(setup.flows_max),
            coalesce: setup.ring.coalesce,
            dialling: false,
            enters: 0,
            sleeps: None,
            features: Features { deferred_work, ..Features::default() },
            flows_max: setup.flows_max,
            overflows: 0,
            pipes: Pipes::new(setup.flows_max, setup.splice),
            scratch: Scratch::new(),
            spin: Spin::new(setup.ring.spin),
            steps: VecDeque::with_capacity(
                setup.splice.flows_max.min(setup.flows_max) as usize * 2,
            ),
        };
        ring.features = probe::probe(&mut ring).map_err(|error| match error {
            RingError::Enter { source } => refused(source),
            other => other,
        })?;
        Ok(ring)
    }
}

/// Flags from best to least; a kernel that does not know one answers EINVAL. Also says whether
/// work is deferred.
fn build(profile: &profile::Ring) -> Result<(IoUring, bool), RingError> {
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    let all = [SetupFlags::All, SetupFlags::Deferred, SetupFlags::Cooperative];
    let without = usize::from(probe::is_withheld("deferred_work")) * 2;
    for flags in all.into_iter().skip(without) {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(profile.completions).setup_clamp().setup_submit_all();
        builder.setup_single_issuer().setup_taskrun_flag().dontfork();
        match flags {
            SetupFlags::All => builder.setup_defer_taskrun().setup_no_sqarray(),
            SetupFlags::Deferred => builder.setup_defer_taskrun(),
            SetupFlags::Cooperative => builder.setup_coop_taskrun(),
        };
        match builder.build(profile.entries.max(ENTRIES_MIN)) {
            Ok(io) => return Ok((io, flags != SetupFlags::Cooperative)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(refused(error)),
        }
    }
    Err(refused(last))
}

#[derive(Clone, Copy, PartialEq)]
enum SetupFlags {
    /// Deferred task work and no index array (6.6).
    All,
    /// Deferred task work (6.1).
    Deferred,
    /// Cooperative task work (6.0).
    Cooperative,
}

/// Names the likely cause: the kernel itself only says EPERM, ENOSYS or EINVAL.
fn refused(source: io::Error) -> RingError {
    let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let cause = match (source.raw_os_error(), sysctl.trim()) {
        (Some(libc::ENOMEM), _) => return RingError::Memory { what: "the queues" },
        (Some(libc::EMFILE | libc::ENFILE), _) => return RingError::Descriptors,
        (Some(libc::EPERM), "1" | "2") => format!(
            "kernel.io_uring_disabled is {} (`sysctl -w kernel.io_uring_disabled=0` allows it)",
            sysctl.trim()
        ),
        (Some(libc::EPERM), _) => {
            "a seccomp filter forbids it (container runtimes do by default: allow io_uring_setup, \
             io_uring_enter and io_uring_register in the profile)"
                .to_owned()
        }
        (Some(libc::ENOSYS), _) => "the kernel was built without it, or a seccomp filter hides it \
             (allow io_uring_setup, io_uring_enter and io_uring_register in the profile)"
            .to_owned(),
        (Some(libc::EINVAL), _) => {
            "the kernel is too old: weir needs Linux 6.7 or newer (`uname -r`)".to_owned()
        }
        _ => "see io_uring_setup(2)".to_owned(),
    };
    RingError::Refused { cause, source }
}

/// Two places a flow; the kernel hands out only the lower half.
fn register_table(io: &IoUring, flows_max: u32) -> Result<(), RingError> {
    let places = flows_max.saturating_mul(2);
    io.submitter().register_files_sparse(places).map_err(|source| match source.raw_os_error() {
        Some(libc::EMFILE) if places > TABLE_MAX => RingError::TableMax { flows_max },
        Some(libc::EMFILE) => RingError::Table { flows_max, needed: u64::from(places) },
        Some(libc::ENOMEM) => RingError::Memory { what: "the descriptor table" },
        Some(libc::EPERM | libc::ENOSYS) => refused(source),
        _ => RingError::Step { source, step: "register the descriptor table" },
    })?;
    let range = FileIndexRange { off: 0, len: flows_max, resv: 0 };
    // SAFETY: the ring is open; the kernel reads one `io_uring_file_index_range` from `range`
    // and keeps no pointer (io_register_file_alloc_range in io_uring/filetable.c).
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            io.as_raw_fd(),
            REGISTER_FILE_ALLOC_RANGE,
            &raw const range,
            0,
        )
    };
    if result < 0 {
        let source = io::Error::last_os_error();
        return Err(RingError::Step { source, step: "reserve the lower half of the table" });
    }
    Ok(())
}

fn register_buffers(
    io: &IoUring,
    sizes: &profile::Buffers,
) -> Result<(Buffers, Buffers), RingError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOMEM) => RingError::Memory { what: "the buffers" },
        _ => RingError::Step { source, step: "register the buffers" },
    };
    let profile::Buffers { small_count, small_bytes, bulk_count, bulk_bytes } = *sizes;
    let submitter = io.submitter();
    let small = Buffers::register(&submitter, Pool::Small as u16, 0, small_count, small_bytes);
    let first = small_count;
    let bulk = Buffers::register(&submitter, Pool::Bulk as u16, first, bulk_count, bulk_bytes);
    Ok((small.map_err(failed)?, bulk.map_err(failed)?))
}

/// The longest dial chain must fit.
const ENTRIES_MIN: u32 = 32;

/// `struct io_uring_file_index_range` (linux/io_uring.h).
#[repr(C)]
struct FileIndexRange {
    off: u32,
    len: u32,
    resv: u64,
}

/// `IORING_MAX_FIXED_FILES` (io_uring/rsrc.c).
const TABLE_MAX: u32 = 1 << 20;
/// `IORING_REGISTER_FILE_ALLOC_RANGE`, since 6.0.
const REGISTER_FILE_ALLOC_RANGE: libc::c_uint = 25;
