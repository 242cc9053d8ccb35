// SPDX-License-Identifier: Apache-2.0
//! The sockmap path: both directions of a flow are given to the kernel together, and come back one
//! by one.
//!
//! Given only while nothing is queued or in flight: from then on user space writes to a socket
//! only behind everything that the kernel has forwarded to it. A direction comes back when its
//! peer has sent FIN, when something broke, or when the kernel has left its bytes to user space;
//! it is received by copy then, but nothing is sent, no FIN either, before the kernel's backlog is
//! empty. It never goes back: what the kernel has begun to pass, it passes for good.

use super::half::{Half, Path, Target};
use super::{Flow, Ops, Rules, State, bit};
use crate::op::{CloseReason, Fall, Joined, Op, Side};

/// What a flow's two sockets are to each other in the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Bond {
    /// Nothing yet.
    Apart,
    /// Both directions empty themselves, and descriptors are on their way.
    Gathering,
    /// The kernel was asked.
    Asked,
    /// The kernel forwards, or did.
    Joined,
    /// Refused, for good.
    Refused,
}

/// A direction that has come back from the kernel, or that the kernel never took.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Landing {
    /// The kernel must be told to leave what comes to user space.
    Due,
    /// Nothing is known of the backlog, and nothing must be as long as there is nothing to send.
    Held,
    /// Waits for the backlog to be empty.
    Asked,
    /// As `Asked`, and an EOF has come: true only if everything that was passed was received.
    AskedAtEnd,
    /// An EOF has come, and nobody waits yet.
    End,
    /// As copy.
    Free,
}

/// When a flow is given to the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Forwarding {
    /// Small messages that have come in turn, from one side and then from the other; below 2^16.
    pub after_messages: u32,
    /// What comes at once and is larger was no small message: the count begins anew.
    pub message_bytes_max: u32,
    /// User space is woken for what comes, so that the kernel serves better. May change while flows
    /// live.
    pub pays: bool,
}

/// Small messages in turn: what tells talk from bulk. Bulk has small pieces too, at its start, at its
/// end and on a slow path, but they come from one side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Talk {
    last: Side,
    messages: u16,
}

impl Talk {
    pub(super) const fn new() -> Talk {
        Talk { last: Side::Upstream, messages: 0 }
    }

    /// So many bytes have come at once.
    pub(super) fn hear(&mut self, from: Side, bytes: u32, rules: &Rules) {
        let Some(forwarding) = rules.forwarding else { return };
        if bytes > forwarding.message_bytes_max {
            self.messages = 0;
        } else if from != self.last {
            self.messages = self.messages.saturating_add(1);
        }
        self.last = from;
    }
}

impl Forwarding {
    /// Every flow, as soon as there is a quiet moment.
    pub const ALWAYS: Forwarding =
        Forwarding { after_messages: 0, message_bytes_max: u32::MAX, pays: true };
}

impl Flow {
    /// Brings both directions to the point where the kernel can take them, and asks it to.
    pub(super) fn gather(&mut self, rules: &Rules, ops: &mut Ops) {
        match self.bond {
            Bond::Apart if self.deserves_sockmap(rules) => {
                self.bond = Bond::Gathering;
                self.set_paths(Path::Joining);
                Side::BOTH.into_iter().for_each(|from| self.drive(from, rules, ops));
            }
            // Something came: it goes by copy, and another quiet moment will come.
            Bond::Gathering if !self.is_quiet() => {
                self.bond = Bond::Apart;
                self.talk = Talk::new();
                self.set_paths(Path::Copy);
                Side::BOTH.into_iter().for_each(|from| self.drive(from, rules, ops));
            }
            Bond::Gathering if self.is_lent() && self.is_empty() => {
                self.bond = Bond::Asked;
                ops.push(Op::Join);
            }
            _ => {}
        }
    }

    /// The kernel has answered.
    pub(super) fn joined(&mut self, result: Result<Joined, Fall>) {
        match result {
            Ok(joined) => {
                self.bond = Bond::Joined;
                let has_stirred = self.stirred;
                for from in Side::BOTH {
                    let landed = Path::Landed(Landing::Free);
                    let half = self.half(from);
                    half.enter(if joined.reads(from) { Path::Sockmap } else { landed });
                    // A watch that is older than this has told already, and will not again.
                    if has_stirred & bit(from) != 0 {
                        half.land();
                    }
                }
            }
            Err(fall) => {
                self.bond = Bond::Refused;
                self.fall = Some(fall);
                self.set_paths(Path::Copy);
            }
        }
    }

    /// Descriptors could not be had: copy for good.
    pub(super) fn stay_apart(&mut self) {
        if self.bond == Bond::Gathering {
            self.bond = Bond::Refused;
            self.set_paths(Path::Copy);
        }
    }

    /// The peer of `side` has sent FIN, or its connection broke.
    pub(super) fn stirred(&mut self, side: Side, is_broken: bool) -> Result<(), CloseReason> {
        if is_broken {
            return Err(CloseReason::reset_by(side));
        }
        self.stirred |= bit(side);
        self.half(side).land();
        Ok(())
    }

    /// The kernel has forwarded so many bytes more, and may have stopped.
    pub(super) fn forwarded(&mut self, from: Side, bytes: u64, stopped: Option<Fall>) {
        let half = self.half(from);
        half.moved_bytes += bytes;
        if stopped.is_some() && half.path == Path::Sockmap {
            half.land();
            self.fall = stopped;
        }
    }

    /// Both have talked in small messages for a while, and nobody is saying anything.
    fn deserves_sockmap(&self, rules: &Rules) -> bool {
        let Some(forwarding) = rules.forwarding else { return false };
        let halves = [&self.from_downstream, &self.from_upstream];
        self.state == State::Relaying
            && forwarding.pays
            && u32::from(self.talk.messages) >= forwarding.after_messages
            && self.is_quiet()
            && halves.iter().all(|half| half.path == Path::Copy)
    }

    fn is_quiet(&self) -> bool {
        self.from_downstream.is_quiet() && self.from_upstream.is_quiet()
    }

    fn is_empty(&self) -> bool {
        self.from_downstream.copying.is_over() && self.from_upstream.copying.is_over()
    }

    fn set_paths(&mut self, path: Path) {
        Side::BOTH.into_iter().for_each(|from| self.half(from).path = path);
    }
}

impl Half {
    /// Lives, with nothing received that was not sent.
    fn is_quiet(&self) -> bool {
        !self.source_ended && self.target == Target::Open && self.copying.is_flushed()
    }

    /// Begins a path on which bytes received in user space are counted apart.
    fn enter(&mut self, path: Path) {
        self.path = path;
        self.mark = 0;
    }

    /// Takes the direction back from the kernel.
    fn land(&mut self) {
        if self.path == Path::Sockmap {
            self.path = Path::Landed(Landing::Due);
        }
    }

    /// EOF was received; what it is worth, the half knows.
    pub(super) fn ended(&mut self) {
        match self.path {
            Path::Landed(Landing::Asked) => self.path = Path::Landed(Landing::AskedAtEnd),
            Path::Landed(_) => self.path = Path::Landed(Landing::End),
            _ => self.source_ended = true,
        }
    }

    /// The backlog is empty, and `passed_bytes` is what user space should have received so far.
    pub(super) fn drained(&mut self, passed_bytes: u64) {
        let Path::Landed(landing) = self.path else { return };
        // An EOF that overtook passed bytes within the kernel is none: receive again.
        self.source_ended |= landing == Landing::AskedAtEnd && self.mark >= passed_bytes;
        self.path = Path::Landed(Landing::Free);
    }

    /// The next thing to ask for on this path.
    pub(super) fn next_landed(
        &mut self,
        landing: Landing,
        from: Side,
        rules: &Rules,
    ) -> Option<Op> {
        let (next, op) = match landing {
            Landing::Due => (Landing::Held, Op::Pass(from)),
            Landing::Held if !self.copying.queue.is_empty() => {
                (Landing::Asked, Op::AwaitDrained(from))
            }
            Landing::End => (Landing::AskedAtEnd, Op::AwaitDrained(from)),
            Landing::AskedAtEnd => return None,
            Landing::Held | Landing::Asked => return self.next_receive(from, rules),
            Landing::Free => {
                return self.next_send(from).or_else(|| self.next_receive(from, rules));
            }
        };
        self.path = Path::Landed(next);
        Some(op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Can;
    use crate::profile::Profile;

    fn talk(pieces: impl IntoIterator<Item = (Side, u32)>) -> u16 {
        let mut profile = Profile::default();
        profile.relay.sockmap_after_messages = 2;
        let rules = Rules::new(&profile, Can { forward: true, splice: true });
        let mut talk = Talk::new();
        pieces.into_iter().for_each(|(from, bytes)| talk.hear(from, bytes, &rules));
        talk.messages
    }

    #[test]
    fn only_small_messages_in_turn_are_talk() {
        let (down, up) = (Side::Downstream, Side::Upstream);
        assert_eq!(talk([(down, 64), (up, 4096)].repeat(10)), 20);
        assert_eq!(talk(vec![(down, 1448); 1000]), 1, "bulk on a slow path");
        assert_eq!(talk([(down, 64), (up, 64), (up, 5000), (down, 64)]), 1, "a large answer");
        assert_eq!(
            talk(
                vec![(down, 1); 70_000]
                    .into_iter()
                    .zip(vec![(up, 1); 70_000])
                    .flat_map(<[_; 2]>::from)
            ),
            u16::MAX
        );
    }
}
