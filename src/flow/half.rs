// SPDX-License-Identifier: Apache-2.0
//! One direction of a flow: what of it has ended, and on which path its bytes move.
//!
//! A path knows how bytes move (`copy.rs`, `splice.rs`, `sockmap.rs`), the half knows when to
//! change it. Never decides about the other direction. Invariant: a path is left only where it is
//! empty: nothing queued, nothing in flight, no byte in a pipe.

use super::copy::Copying;
use super::sockmap::Landing;
use super::splice::Splicing;
use super::{Promotion, Rules};
use crate::op::{Op, Relay, Side};

/// One direction of a flow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Half {
    pub(super) copying: Copying,
    /// Bytes handed to the target so far.
    pub(super) moved_bytes: u64,
    pub(super) path: Path,
    /// FIN has come: nothing will be read any more.
    pub(super) source_ended: bool,
    pub(super) splicing: Splicing,
    pub(super) target: Target,
    /// `moved_bytes` when it last came back to copy: what was moved since must prove it again. Once
    /// joined to its partner in the kernel: bytes received in user space since.
    pub(super) mark: u64,
}

/// How the bytes of a direction move now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Path {
    /// Through provided buffers.
    Copy,
    /// As `Leaving`, in both directions: sockmap is next.
    Joining,
    /// Back from sockmap: received by copy, sent behind what the kernel has forwarded.
    Landed(Landing),
    /// Copy empties itself, and descriptors are on their way: splice is next.
    Leaving,
    /// Within the kernel.
    Sockmap,
    /// Through a pipe.
    Splice,
}

/// The socket that is written to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Target {
    /// FIN was asked for; nothing may be sent any more.
    Ended,
    /// Takes bytes.
    Open,
    /// There is no connection yet.
    Unconnected,
}

impl Half {
    pub(super) const fn new(target: Target) -> Half {
        Half {
            copying: Copying::new(),
            moved_bytes: 0,
            path: Path::Copy,
            mark: 0,
            source_ended: false,
            splicing: Splicing::new(),
            target,
        }
    }

    pub(super) const fn relay(&self) -> Relay {
        match self.path {
            Path::Copy | Path::Joining | Path::Landed(_) | Path::Leaving => Relay::Copy,
            Path::Sockmap => Relay::Sockmap,
            Path::Splice => Relay::Splice,
        }
    }

    /// Everything that came was handed on, and nothing more will come.
    pub(super) fn is_flushed(&self) -> bool {
        self.source_ended
            && self.target == Target::Open
            && self.copying.is_flushed()
            && self.splicing.is_over()
    }

    /// Nothing in flight would tell that the connection of the source broke.
    pub(super) fn is_deaf(&self) -> bool {
        match self.path {
            Path::Copy | Path::Joining | Path::Landed(_) | Path::Leaving => {
                !self.copying.is_listening()
            }
            // The kernel hears, and does not tell.
            Path::Sockmap => true,
            Path::Splice => !self.splicing.is_listening(),
        }
    }

    /// Changes the path where it is empty and another one serves better; true if it did, and then
    /// there may be more to change. `lent`: the descriptors of both sides are here.
    pub(super) fn steer(&mut self, rules: &Rules, lent: bool) -> bool {
        let never = rules.splice == Promotion::Never;
        match self.path {
            Path::Copy if self.deserves_splice(rules) => self.path = Path::Leaving,
            Path::Leaving if self.source_ended || never => self.path = Path::Copy,
            Path::Leaving if lent && self.copying.is_over() => {
                self.splicing = Splicing::begin(rules);
                self.path = Path::Splice;
            }
            Path::Splice if never && self.splicing.is_over() => {
                // No fault of its own: it may come back as soon as that changes.
                self.path = Path::Copy;
                self.mark = self.moved_bytes.saturating_sub(rules.splice_after_bytes);
            }
            Path::Splice if self.splicing.wants_out() && self.splicing.is_over() => {
                self.return_to_copy();
            }
            _ => return false,
        }
        true
    }

    /// The next path cannot be had: copy for a while.
    pub(super) fn stay(&mut self) {
        if self.path == Path::Leaving {
            self.return_to_copy();
        }
    }

    /// The next thing to ask for, if there is one; call it until there is none.
    pub(super) fn next_op(&mut self, from: Side, rules: &Rules) -> Option<Op> {
        match self.path {
            Path::Copy => self.next_send(from).or_else(|| self.next_receive(from, rules)),
            Path::Joining | Path::Leaving => {
                self.next_send(from).or_else(|| self.copying.next_cancel(from))
            }
            Path::Landed(landing) => self.next_landed(landing, from, rules),
            Path::Sockmap => None,
            Path::Splice => self.splicing.next(from, self.source_ended, rules),
        }
    }

    pub(super) fn next_send(&mut self, from: Side) -> Option<Op> {
        if self.target == Target::Open { self.copying.next_send(from) } else { None }
    }

    pub(super) fn next_receive(&mut self, from: Side, rules: &Rules) -> Option<Op> {
        if self.source_ended {
            return None;
        }
        self.copying.next_receive(from, self.moved_bytes, rules)
    }

    /// Looked at between two receives, when the last one's bytes are all counted.
    fn deserves_splice(&self, rules: &Rules) -> bool {
        let lives = !self.source_ended && self.target == Target::Open;
        let since = self.moved_bytes.saturating_sub(self.mark);
        let Rules { splice_read_bytes, splice_bulk_read_bytes, .. } = *rules;
        lives
            && match rules.splice {
                Promotion::Always => self.mark == 0 || since >= rules.splice_after_bytes,
                Promotion::Bulk => {
                    since >= rules.splice_after_bytes
                        && self.copying.is_between_receives()
                        && self.copying.fills(splice_read_bytes, splice_bulk_read_bytes)
                }
                Promotion::Never => false,
            }
    }

    fn return_to_copy(&mut self) {
        self.path = Path::Copy;
        self.mark = self.moved_bytes.max(1);
    }
}

const _: () = assert!(size_of::<Half>() <= 64, "a half must fit one cache line");
