// SPDX-License-Identifier: Apache-2.0
//! What weir tells its programs while they run: that it lives, which filters are in force, and what
//! a connect meets otherwise.
//!
//! The words lie in memory that the programs share. A thread of its own says ten times a second
//! that the process runs: nothing that another thread waits for can make it fall silent, and
//! SIGSTOP or a crash does.
#![expect(unsafe_code, reason = "shared memory is an address")]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::sys::memory::Mapping;
use crate::sys::process;

/// The words, in memory that is shared with the programs.
pub(super) struct Control {
    words: Mapping,
}

/// `struct control` of shared.h.
#[repr(C)]
struct Words {
    beat_ns: AtomicU64,
    mode: AtomicU32,
    set: AtomicU32,
}

/// What a connect that should be taken meets; `enum mode` of shared.h.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(super) enum Mode {
    /// Taken; while we are silent, it goes on untouched.
    Open = 0,
    /// Taken; while we are silent, it is refused.
    Closed = 1,
    /// Refused.
    Refuse = 2,
}

/// The thread that says that we live. It ends when this is dropped.
pub(super) struct Pulse {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

// SAFETY: the mapping is owned, and all that is ever done to it is done with atomics.
unsafe impl Send for Control {}
// SAFETY: as above.
unsafe impl Sync for Control {}

impl Control {
    /// The words of the map `control`.
    pub(super) fn map(map: BorrowedFd<'_>) -> io::Result<Control> {
        Ok(Control { words: Mapping::shared(map, size_of::<Words>())? })
    }

    pub(super) fn set_mode(&self, mode: Mode) {
        self.words().mode.store(mode as u32, Ordering::Release);
    }

    /// The filters in force.
    pub(super) fn set(&self) -> u32 {
        self.words().set.load(Ordering::Acquire)
    }

    /// From now on these filters are in force.
    pub(super) fn choose(&self, set: u32) {
        self.words().set.store(set, Ordering::Release);
    }

    pub(super) fn beat(&self) {
        self.words().beat_ns.store(process::monotonic_ns(), Ordering::Release);
    }

    #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
    fn words(&self) -> &Words {
        // SAFETY: the mapping is at least as long as `Words` and aligned to a page; it lives as
        // long as `self`, and everybody who writes to it, the kernel included, does it word by word.
        unsafe { &*self.words.as_ptr().cast::<Words>() }
    }
}

impl Pulse {
    /// The first beat is done when this returns.
    pub(super) fn start(control: &Arc<Control>) -> io::Result<Pulse> {
        control.beat();
        let over = Arc::new(AtomicBool::new(false));
        let (control, is_over) = (Arc::clone(control), Arc::clone(&over));
        let beat = move || {
            // Signals are for the control thread. This cannot fail on Linux.
            let _ = process::block_signals();
            while !is_over.load(Ordering::Acquire) {
                control.beat();
                std::thread::park_timeout(BEAT_EVERY);
            }
        };
        let thread = std::thread::Builder::new().name("weir-pulse".to_owned()).spawn(beat)?;
        Ok(Pulse { over, thread: Some(thread) })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It ends by itself, and never panics.
            let _ = thread.join();
        }
    }
}

/// A twentieth of `SILENCE_NS` of shared.h: a busy host may delay some.
const BEAT_EVERY: Duration = Duration::from_millis(100);
const _: () = assert!(size_of::<Words>() == 16);
