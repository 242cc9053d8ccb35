// SPDX-License-Identifier: Apache-2.0
//! Signals that ask a program to end, for those that have something to clean up first.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};

/// From now on SIGHUP, SIGINT and SIGTERM end nothing: `is_interrupted` says that one came. Children
/// inherit that they do not hear them, and must be ended otherwise. Call it before the first thread.
///
/// # Errors
///
/// No thread is to be had.
pub fn catch() -> io::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        // Fails only for an invalid set.
        let _ = signals.wait();
        INTERRUPTED.store(true, Ordering::Relaxed);
    })?;
    Ok(())
}

/// Somebody wants the end, and `catch` was called before.
#[must_use]
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
