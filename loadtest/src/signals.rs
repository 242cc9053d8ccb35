// SPDX-License-Identifier: Apache-2.0
//! Ctrl-C ends the work, not the program: what was made must go, and what was measured be kept.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};

/// From now on a signal is only noted. Before any other thread is started.
pub(crate) fn catch() -> io::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        // Fails only for an invalid set.
        let _ = signals.wait();
        INTERRUPTED.store(true, Ordering::Relaxed);
    })?;
    Ok(())
}

pub(crate) fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
