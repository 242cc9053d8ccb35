// SPDX-License-Identifier: Apache-2.0
//! One turn of the ring: submit, wait, bring completions back.
#![expect(unsafe_code, reason = "enters the ring with flags the crate has no call for")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use io_uring::{cqueue, types};

use super::pipes::Pipes;
use super::{Ring, RingError};
use crate::op::{BufferId, Kind, Side, Token};
use crate::sys::socket;

/// One completion, as the kernel gave it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event {
    /// The provided buffer that was filled.
    pub buffer: Option<BufferId>,
    /// More events of the same request will follow.
    pub more: bool,
    /// Bytes, slot or descriptor; or the negated errno.
    pub result: i32,
    /// What the request was.
    pub token: Token,
}

/// The events of one turn; bounded, so that timers and mailbox get theirs.
#[derive(Debug)]
pub struct Batch {
    events: Vec<Event>,
    next: usize,
}

impl Batch {
    /// Empty.
    #[must_use]
    pub fn new() -> Batch {
        Batch { events: Vec::with_capacity(COMPLETIONS_PER_TURN_MAX), next: 0 }
    }

    /// Nothing is left in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.next == self.events.len()
    }
}

impl Default for Batch {
    fn default() -> Batch {
        Batch::new()
    }
}

impl Ring {
    /// Submits what was pushed, waits for an event or until `patience` is over, and fills `batch`
    /// with at most `COMPLETIONS_PER_TURN_MAX` events; `next` gives them out. Always the same batch:
    /// what was left in it is dropped.
    ///
    /// # Errors
    ///
    /// The ring is broken; nothing can go on.
    pub fn turn(&mut self, patience: Option<Duration>, batch: &mut Batch) -> Result<(), RingError> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        self.small.publish();
        self.bulk.publish();
        let is_in_haste = patience.is_some_and(|patience| patience.is_zero());
        if is_in_haste || self.has_work() || !self.io.completion().is_empty() {
            // Left over from the last turn: there is work, so do not wait for more.
            self.enter(0, None)?;
        } else if self.spin.is_on() {
            self.spin_then_sleep(patience)?;
        } else {
            self.sleep(patience)?;
        }
        self.reap(batch);
        Ok(())
    }

    /// The next event of `batch`. With the last event of a request its name is free again: whoever
    /// reads on may cancel what ends later in the same batch, or ask for the same once more.
    pub fn next(&mut self, batch: &mut Batch) -> Option<Event> {
        let event = batch.events.get(batch.next).copied()?;
        batch.next += 1;
        if !event.more {
            self.cancels.end(event.token);
        }
        Some(event)
    }

    /// Makes room for a chain of `entries`, which must not be torn apart by a submit. Without room
    /// nothing may be pushed; the next turn then says why.
    pub(super) fn reserve(&mut self, entries: usize) -> bool {
        for _ in 0..SUBMIT_TRIES_MAX {
            if self.has_room(entries) {
                return true;
            }
            if let Err(error) = self.enter(0, None) {
                self.broken = Some(error);
                return false;
            }
        }
        let source = io::Error::from_raw_os_error(libc::EAGAIN);
        self.broken = Some(RingError::Enter { source });
        false
    }

    /// Dials made so far begin now: a socket belongs to the network namespace in which this thread is
    /// when its request is submitted, which makes it at once (`io_socket` in io_uring/net.c). False if
    /// the kernel does not take them.
    pub fn begin_dials(&mut self) -> bool {
        for _ in 0..SUBMIT_TRIES_MAX {
            if !self.dialling {
                return true;
            }
            if let Err(error) = self.enter(0, None) {
                self.broken = Some(error);
                return false;
            }
        }
        false
    }

    fn has_room(&mut self, entries: usize) -> bool {
        let queue = self.io.submission();
        queue.capacity() - queue.len() >= entries && self.scratch.has_room(entries)
    }

    fn spin_then_sleep(&mut self, patience: Option<Duration>) -> Result<(), RingError> {
        let Some(window) = self.spin.window() else {
            let began = Instant::now();
            self.sleep(patience)?;
            self.spin.waited(began.elapsed());
            return Ok(());
        };
        self.enter(0, None)?;
        let began = Instant::now();
        let mut spun = Duration::ZERO;
        while self.io.completion().is_empty() {
            if spun >= window {
                self.sleep(patience)?;
                break;
            }
            if self.io.submission().taskrun() {
                self.enter(0, None)?;
            }
            std::hint::spin_loop();
            spun = began.elapsed();
        }
        self.spin.waited(began.elapsed());
        Ok(())
    }

    /// Submits, and sleeps unless that brought something already: in two steps, to know which, where
    /// sleeps are counted.
    fn sleep(&mut self, patience: Option<Duration>) -> Result<(), RingError> {
        if let Some(sleeps) = &mut self.sleeps {
            let before = *sleeps;
            if !self.io.submission().is_empty() {
                self.enter(0, None)?;
                if !self.io.completion().is_empty() {
                    return Ok(());
                }
            }
            self.sleeps = Some(before + 1);
        }
        self.enter(1, patience)
    }

    /// Hands over what waits in the submission queue, as the last thing before the ring closes.
    ///
    /// # Errors
    ///
    /// As `turn`.
    pub fn finish(&mut self) -> Result<(), RingError> {
        self.enter(0, None)
    }

    /// `io_uring_enter`: submits everything, runs what the kernel has deferred to us, and waits
    /// for `want` events or until `patience` is over.
    pub(super) fn enter(&mut self, want: u32, patience: Option<Duration>) -> Result<(), RingError> {
        let pending = u32::try_from(self.io.submission().len()).unwrap_or(u32::MAX);
        let timespec = patience.filter(|_| want > 0).map(|patience| {
            types::Timespec::new().sec(patience.as_secs()).nsec(patience.subsec_nanos())
        });
        let gather_us = if want > 0 { self.gather_us(patience) } else { 0 };
        self.enters += 1;
        let entered = match (&timespec, gather_us) {
            (None, 0) => {
                // SAFETY: no argument is passed, so no pointer is read.
                unsafe {
                    self.io.submitter().enter::<libc::sigset_t>(pending, want, GETEVENTS, None)
                }
            }
            (timespec, _) => {
                let want = if gather_us > 0 { GATHERED_MAX } else { want as usize };
                let mut arguments = types::SubmitArgs::new().min_wait_usec(gather_us);
                if let Some(timespec) = timespec {
                    arguments = arguments.timespec(timespec);
                }
                self.io.submitter().submit_with_args(want, &arguments)
            }
        };
        match entered {
            Ok(submitted) if submitted < pending as usize => Ok(()), // The rest goes next time.
            Ok(_) => {
                self.submitted();
                Ok(())
            }
            Err(error) => self.forgive(error),
        }
    }

    /// How long events may gather before we wake for them: after that the first one ends the wait.
    /// Not where the wait may be over before.
    fn gather_us(&self, patience: Option<Duration>) -> u32 {
        if !self.features.coalesce || patience.is_some_and(|patience| patience <= self.coalesce) {
            return 0;
        }
        u32::try_from(self.coalesce.as_micros()).unwrap_or(u32::MAX)
    }

    fn submitted(&mut self) {
        self.scratch.clear();
        self.dialling = false;
    }

    /// Sorts what `io_uring_enter` can say (io_uring_enter(2)).
    fn forgive(&mut self, error: io::Error) -> Result<(), RingError> {
        match error.raw_os_error() {
            // The time is over: everything was submitted all the same.
            Some(libc::ETIME) => {
                if self.io.submission().is_empty() {
                    self.submitted();
                }
                Ok(())
            }
            // A signal; or the completion queue must be read first; or memory is short for now.
            Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
            Some(libc::EBADR) => Err(RingError::Lost),
            _ => Err(RingError::Enter { source: error }),
        }
    }

    fn reap(&mut self, batch: &mut Batch) {
        while self.next(batch).is_some() {}
        batch.events.clear();
        batch.next = 0;
        while batch.events.len() < COMPLETIONS_PER_TURN_MAX {
            let Some(answer) = self.answers.pop() else { break };
            batch.events.push(answer);
        }
        self.overflows += u64::from(self.io.submission().cq_overflow());
        let mut queue = self.io.completion();
        while batch.events.len() + self.again.len() < COMPLETIONS_PER_TURN_MAX {
            let Some(entry) = queue.next() else { break };
            let mark = entry.user_data() & MARKS;
            let mut event = Event {
                buffer: cqueue::buffer_select(entry.flags()).map(BufferId),
                more: cqueue::more(entry.flags()),
                result: entry.result(),
                token: Token::from_raw(entry.user_data() & !MARKS),
            };
            if mark == CANCEL {
                if event.result == -libc::ENOENT && self.cancels.is_open(event.token) {
                    self.again.push(Again::Cancel(event.token));
                }
                continue;
            }
            if mark == DESCRIPTOR && event.token.kind() == Some(Kind::LastSent) {
                event.result = last_sent(event.result);
            } else if mark == DESCRIPTOR {
                if matches!(-event.result, libc::EMFILE | libc::ENFILE) {
                    self.again.push(Again::Shutdown(event.token));
                    continue;
                }
                event.result = shut_down(event.result);
            }
            if let Some(Kind::InstallDownstream | Kind::InstallUpstream) = event.token.kind() {
                event.result = installed(&mut self.pipes, event);
            }
            if let Some(buffer) = event.buffer {
                if self.small.owns(buffer) { self.small.taken() } else { self.bulk.taken() }
            } else if event.result == -libc::ENOBUFS {
                self.small.ran_dry();
                self.bulk.ran_dry();
            }
            batch.events.push(event);
        }
        drop(queue);
        self.ask_again();
    }

    /// Cancels that missed, and FINs for which there was no descriptor to lend.
    fn ask_again(&mut self) {
        while let Some(again) = self.again.pop() {
            match again {
                Again::Cancel(target) => self.push_cancel(target),
                Again::Shutdown(token) => self.shut_down_slowly(token),
            }
        }
    }
}

/// What must be asked of the kernel once more.
#[derive(Clone, Copy, Debug)]
pub(super) enum Again {
    Cancel(Token),
    Shutdown(Token),
}

/// Sends FIN through the descriptor that the kernel has lent for the slot, and gives it back.
fn shut_down(lent: i32) -> i32 {
    if lent < 0 {
        return lent;
    }
    let lent = socket::accepted(lent);
    socket::shutdown_write(lent.as_fd())
        .map_or_else(|error| -error.raw_os_error().unwrap_or(libc::EIO), |()| 0)
}

/// Looks through the descriptor that the kernel has lent for the slot, and gives it back.
fn last_sent(lent: i32) -> i32 {
    if lent < 0 {
        return lent;
    }
    let lent = socket::accepted(lent);
    socket::last_sent_ms(lent.as_fd()).map_or_else(
        |error| -error.raw_os_error().unwrap_or(libc::EIO),
        |ago| i32::try_from(ago).unwrap_or(i32::MAX),
    )
}

/// A descriptor was lent to stay, or not.
fn installed(pipes: &mut Pipes, event: Event) -> i32 {
    if event.result < 0 {
        return event.result;
    }
    let side = event.token.kind().map_or(Side::Downstream, Kind::side);
    pipes.keep(event.token.flow(), side, socket::accepted(event.result))
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("fd", &self.io.as_raw_fd()).finish_non_exhaustive()
    }
}

/// Completions handled before timers and mailbox get a turn; bounds their delay to about a
/// millisecond.
pub(super) const COMPLETIONS_PER_TURN_MAX: usize = 256;
/// Marks the token of a cancel's own request, above the kinds.
pub(super) const CANCEL: u64 = 1 << 62;
/// Marks the token of what a descriptor was asked for: a FIN, or a look at the socket.
pub(super) const DESCRIPTOR: u64 = 1 << 63;
/// So many events are worth waking for, however short they have gathered.
const GATHERED_MAX: usize = 16;
const MARKS: u64 = CANCEL | DESCRIPTOR;
/// `IORING_ENTER_GETEVENTS`: also runs what the kernel has deferred to this thread.
const GETEVENTS: u32 = 1;
/// How often to try to empty a full submission queue; only a kernel without memory needs a second.
const SUBMIT_TRIES_MAX: u32 = 1000;
