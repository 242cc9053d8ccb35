// SPDX-License-Identifier: Apache-2.0
//! One turn of the ring: submit, wait, bring completions back.
#![expect(unsafe_code, reason = "enters the ring with flags the crate has no call for")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use io_uring::{cqueue, opcode, types};

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
}

impl Default for Batch {
    fn default() -> Batch {
        Batch::new()
    }
}

impl Iterator for Batch {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let event = self.events.get(self.next).copied();
        self.next += usize::from(event.is_some());
        event
    }
}

impl Ring {
    /// Submits what was pushed, waits for an event or until `patience` is over, and fills `batch`
    /// with at most `COMPLETIONS_PER_TURN_MAX` events.
    ///
    /// # Errors
    ///
    /// The ring is broken; nothing can go on.
    pub fn turn(&mut self, patience: Option<Duration>, batch: &mut Batch) -> Result<(), RingError> {
        self.small.publish();
        self.bulk.publish();
        if !self.io.completion().is_empty() {
            // Left over from the last turn: there is work, so do not wait for more.
            self.enter(0, None)?;
        } else if self.spin.is_on() {
            self.spin_then_sleep(patience)?;
        } else {
            self.enter(1, patience)?;
        }
        self.reap(batch);
        Ok(())
    }

    /// Submits without waiting, because a queue or an arena is full.
    pub(super) fn submit(&mut self) {
        // An error here (EBUSY, EAGAIN: the kernel is short of memory) is met again by the next
        // turn, which reports it; until then pushing has no room and asserts in tests.
        let _ = self.enter(0, None);
    }

    fn spin_then_sleep(&mut self, patience: Option<Duration>) -> Result<(), RingError> {
        self.enter(0, None)?;
        if !self.io.completion().is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let mut now = began;
        if let Some(until) = self.spin.until(began) {
            while now < until {
                if self.io.submission().taskrun() {
                    self.enter(0, None)?;
                }
                if !self.io.completion().is_empty() {
                    self.spin.waited(now - began);
                    return Ok(());
                }
                std::hint::spin_loop();
                now = Instant::now();
            }
        }
        self.enter(1, patience)?;
        self.spin.waited(began.elapsed());
        Ok(())
    }

    /// `io_uring_enter`: submits everything, runs what the kernel has deferred to us, and waits
    /// for `want` events or until `patience` is over.
    fn enter(&mut self, want: u32, patience: Option<Duration>) -> Result<(), RingError> {
        let pending = u32::try_from(self.io.submission().len()).unwrap_or(u32::MAX);
        let timespec = patience.filter(|_| want > 0).map(|patience| {
            types::Timespec::new().sec(patience.as_secs()).nsec(patience.subsec_nanos())
        });
        self.enters += 1;
        let entered = match &timespec {
            Some(timespec) => {
                let arguments = types::SubmitArgs::new().timespec(timespec);
                self.io.submitter().submit_with_args(want as usize, &arguments)
            }
            None => {
                // SAFETY: no argument is passed, so no pointer is read.
                unsafe {
                    self.io.submitter().enter::<libc::sigset_t>(pending, want, GETEVENTS, None)
                }
            }
        };
        match entered {
            Ok(submitted) if submitted < pending as usize => Ok(()), // The rest goes next time.
            Ok(_) => {
                self.scratch.clear();
                Ok(())
            }
            Err(error) => self.forgive(error),
        }
    }

    /// Sorts what `io_uring_enter` can say (io_uring_enter(2)).
    fn forgive(&mut self, error: io::Error) -> Result<(), RingError> {
        match error.raw_os_error() {
            // The time is over: everything was submitted all the same.
            Some(libc::ETIME) => {
                if self.io.submission().is_empty() {
                    self.scratch.clear();
                }
                Ok(())
            }
            // A signal; or the completion queue must be read first; or memory is short for now.
            Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::EBADR) => Ok(()),
            _ => Err(RingError::Enter { source: error }),
        }
    }

    fn reap(&mut self, batch: &mut Batch) {
        batch.events.clear();
        batch.next = 0;
        let mut lent = false;
        {
            let mut queue = self.io.completion();
            while batch.events.len() < COMPLETIONS_PER_TURN_MAX {
                let Some(entry) = queue.next() else { break };
                let raw = entry.user_data();
                let event = Event {
                    buffer: cqueue::buffer_select(entry.flags()).map(BufferId),
                    more: cqueue::more(entry.flags()),
                    result: entry.result(),
                    token: Token::from_raw(raw & !ON_KERNEL_THREAD),
                };
                if let Some(buffer) = event.buffer {
                    if self.small.owns(buffer) { self.small.taken() } else { self.bulk.taken() }
                } else if event.result == -libc::ENOBUFS {
                    self.small.ran_dry();
                    self.bulk.ran_dry();
                }
                lent |= raw & ON_KERNEL_THREAD == 0 && shutdown_side(event.token).is_some();
                batch.events.push(event);
            }
        }
        if lent && self.features.descriptor_install {
            self.shut_down(batch);
        }
    }

    /// The kernel has lent descriptors for slots that are to send FIN: send it, give them back.
    fn shut_down(&mut self, batch: &mut Batch) {
        let mut index = 0;
        while let Some(event) = batch.events.get_mut(index) {
            let lent = shutdown_side(event.token).zip(u32::try_from(event.result).ok());
            if lent.is_some() {
                let lent = socket::accepted(event.result);
                let done = socket::shutdown_write(lent.as_fd());
                event.result = done.map_or_else(|error| -errno(&error), |()| 0);
            }
            index += 1;
        }
        while let Some(index) = batch.events.iter().position(has_no_descriptor) {
            let Event { token, .. } = batch.events.remove(index);
            let Some(side) = shutdown_side(token) else { return };
            let fd = self.socket(token.flow(), side);
            let request = opcode::Shutdown::new(fd, libc::SHUT_WR).build();
            self.push(request.user_data(token.raw() | ON_KERNEL_THREAD));
        }
    }
}

/// There was no descriptor to lend: FIN must take the slow road, whose event comes later.
fn has_no_descriptor(event: &Event) -> bool {
    matches!(-event.result, libc::EMFILE | libc::ENFILE) && shutdown_side(event.token).is_some()
}

fn shutdown_side(token: Token) -> Option<Side> {
    match token.kind() {
        Some(Kind::ShutdownDownstream) => Some(Side::Downstream),
        Some(Kind::ShutdownUpstream) => Some(Side::Upstream),
        _ => None,
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("fd", &self.io.as_raw_fd()).finish_non_exhaustive()
    }
}

/// Completions handled before timers and mailbox get a turn; bounds their delay to about a
/// millisecond.
const COMPLETIONS_PER_TURN_MAX: usize = 256;
/// Marks the token of a FIN that `IORING_OP_SHUTDOWN` sends; no kind has this bit.
const ON_KERNEL_THREAD: u64 = 1 << 63;
/// `IORING_ENTER_GETEVENTS`: also runs what the kernel has deferred to this thread.
const GETEVENTS: u32 = 1;
