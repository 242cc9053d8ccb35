// SPDX-License-Identifier: Apache-2.0
//! A table that lives as long as we do.
//!
//! `flags owner` binds it to the netlink socket that made it (nft(8)): a child `nft -i`, which ends
//! when its standard input closes, or our main thread ends, so also when we are killed. Nobody else can
//! change or flush an owned table.

use std::io::{self, Read, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::draft::{Draft, STOPPED};
use super::{making, missing, refused};
use crate::capture::CaptureError;
use crate::sys::memory::text_file;
use crate::sys::process;

/// Our table in the kernel, and the child that owns it.
#[derive(Debug)]
pub(in crate::capture) struct Table {
    /// Their names.
    chains: Vec<String>,
    child: Child,
    /// `None` once closed.
    input: Option<ChildStdin>,
    /// How often it was changed.
    revision: u32,
    /// What makes it take nothing more.
    stop: String,
    /// What the child was told to read, and may not have read yet.
    texts: Vec<OwnedFd>,
}

impl Table {
    /// Makes the table, in one transaction.
    pub(in crate::capture) fn install(draft: &Draft) -> Result<Table, CaptureError> {
        let mut command = Command::new("nft");
        command
            .arg("-i")
            // It would keep a history of its commands there.
            .env("HOME", "/nonexistent")
            // Ctrl-C is for us: it drains, and the table stays until the end.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        process::dies_with_us(&mut command);
        let mut child = command.spawn().map_err(missing)?;
        if let Some(errors) = &child.stderr {
            // A pipe refuses nobody this flag.
            let _ = fcntl(errors, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
        }
        let input = child.stdin.take();
        let (chains, stop, texts) = (draft.chains(), draft.stop(), Vec::new());
        let mut table = Table { chains, child, input, revision: 0, stop, texts };
        let there = ["-t", "list", "table", "inet", "weir"];
        table.take("install the nft table", &making(draft)?, &there)?;
        Ok(table)
    }

    /// Has these rules from now on, in one transaction. Sets keep what is in them, so that flows that
    /// are remembered stay remembered.
    pub(in crate::capture) fn change(&mut self, draft: &Draft) -> Result<(), CaptureError> {
        let (old, new) = (format!("revision_{}", self.revision), self.revision + 1);
        let done = format!("revision_{new}");
        let mut text = format!("flush table inet weir\n{}", draft.table());
        if self.revision > 0 {
            text.push_str(&format!("delete chain inet weir {old}\n"));
        }
        let chains = draft.chains();
        for chain in self.chains.iter().filter(|chain| !chains.contains(chain)) {
            text.push_str(&format!("delete chain inet weir {chain}\n"));
        }
        text.push_str(&format!("add chain inet weir {done}\n"));
        self.take("change the nft table", &text, &["list", "chain", "inet", "weir", &done])?;
        (self.chains, self.revision, self.stop) = (chains, new, draft.stop());
        self.texts.clear();
        Ok(())
    }

    /// Takes no more connections. Best effort: if the child is gone, so is the table.
    pub(in crate::capture) fn stop_taking(&mut self) {
        let stop = std::mem::take(&mut self.stop);
        if self.run(&stop).is_ok() {
            let _ = self.wait_until(&["list", "chain", "inet", "weir", STOPPED]);
        }
    }

    /// The child runs, and so the table stands: nobody else can remove it.
    pub(in crate::capture) fn stands(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The child does what `text` says, and nft answers `ask` when it is done.
    fn take(&mut self, step: &str, text: &str, ask: &[&str]) -> Result<(), CaptureError> {
        let why = match self.run(text).and_then(|()| self.wait_until(ask)) {
            Ok(true) => return Ok(()),
            Ok(false) if self.stands() => "nft did not take it".to_owned(),
            Err(source) if source.kind() != io::ErrorKind::BrokenPipe => source.to_string(),
            // It has closed its input, so this is no long wait.
            _ => self
                .child
                .wait()
                .map_or_else(|error| error.to_string(), |over| format!("nft: {over}")),
        };
        let said = self.words();
        Err(refused(step, if said.trim().is_empty() { &why } else { &said }))
    }

    /// The child reads `text` as one transaction.
    fn run(&mut self, text: &str) -> io::Result<()> {
        let file = text_file(text)?;
        let place = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let Some(input) = &mut self.input else { return Err(io::ErrorKind::BrokenPipe.into()) };
        writeln!(input, "include \"{place}\"")?;
        input.flush()?;
        self.texts.push(file);
        Ok(())
    }

    /// Asks nft until it has an answer; false if the child ends first, or takes too long.
    fn wait_until(&mut self, ask: &[&str]) -> io::Result<bool> {
        let deadline = Instant::now() + INSTALL_WITHIN;
        while Instant::now() < deadline && self.stands() {
            let answer = Command::new("nft").args(ask).stdin(Stdio::null()).output()?;
            if answer.status.success() {
                return Ok(true);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(false)
    }

    /// What the child has said since it was asked last; it may go on.
    fn words(&mut self) -> String {
        let mut said = Vec::new();
        if let Some(errors) = &mut self.child.stderr {
            // It ends with `EAGAIN`; what came before is there.
            let _ = errors.read_to_end(&mut said);
        }
        String::from_utf8_lossy(&said).into_owned()
    }

    fn end(&mut self) {
        self.input = None;
        let deadline = Instant::now() + INSTALL_WITHIN;
        while Instant::now() < deadline && self.stands() {
            std::thread::sleep(LOOK_EVERY);
        }
        // It is over already, or it hangs; in both cases there is nothing more to do for it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.end();
    }
}

/// How long nft may take; it needs milliseconds.
const INSTALL_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(2);
