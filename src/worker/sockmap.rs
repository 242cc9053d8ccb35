// SPDX-License-Identifier: Apache-2.0
//! The flows that the kernel forwards: joining them, hearing from them, and what they moved.
//!
//! While the kernel forwards, nothing of a flow comes through the ring but its end. The kernel
//! rings a bell when it leaves a direction to user space; what it has moved is read from memory
//! now and then. Nothing is allocated after start.

use std::collections::VecDeque;
use std::time::Duration;

use super::turn::Worker;
use super::wheel::Clock;
use crate::bpf::sockmap::{Pair, Pass, Refused, Sockmap};
use crate::op::{
    CloseReason, Completion, Errno, Fall, FlowId, Joined, Kind, Op, Relay, Side, Token,
};
use crate::ring::Ring;

/// What one worker knows of the flows that the kernel forwards.
pub(super) struct Forwarded {
    /// Answers to wishes to join.
    answers: VecDeque<(FlowId, u32, Completion)>,
    /// Directions that wait for their backlog to be empty.
    draining: Vec<(FlowId, u32, Side)>,
    joints: Box<[Option<Joint>]>,
    look_at: u32,
    /// By slot: the number of its pair, `NONE` for most.
    pairs: Vec<u32>,
    /// Numbers of pairs from here on were never used.
    pairs_used: u32,
    pub(super) sockmap: Sockmap,
}

/// One joined flow.
struct Joint {
    /// Directions whose backlog was seen empty: once user space has written behind it, there is
    /// nothing to be seen of it any more.
    drained: [bool; 2],
    pair: Pair,
    /// Bytes that the flow knows of, by the side they came from.
    said_bytes: [u64; 2],
    /// That the kernel has stopped by itself is said once: it is no sign of life.
    said_stopped: [bool; 2],
    slot: FlowId,
}

impl Forwarded {
    pub(super) fn new(sockmap: Sockmap, flows_max: u32) -> Forwarded {
        let room = sockmap.room().min(flows_max) as usize;
        Forwarded {
            answers: VecDeque::with_capacity(flows_max as usize),
            draining: Vec::with_capacity(room * 2),
            joints: (0..sockmap.numbers()).map(|_| None).collect(),
            look_at: 0,
            pairs: vec![NONE; flows_max as usize],
            pairs_used: 0,
            sockmap,
        }
    }

    /// How long the worker may sleep for the sake of these flows.
    pub(super) fn patience(&self, now: u32) -> Option<Duration> {
        if !self.draining.is_empty() {
            return Some(DRAIN_LOOK_EVERY);
        }
        let is_any = !self.sockmap.is_empty();
        is_any.then(|| Clock::span(self.look_at.saturating_sub(now).max(1)))
    }

    /// Carries out what only the kernel's part of the relay can.
    pub(super) fn carry(&mut self, op: Op, slot: FlowId, generation: u32, ring: &Ring) {
        match op {
            Op::AwaitDrained(from) => self.draining.push((slot, generation, from)),
            Op::Join => {
                let result = self.join(slot, ring);
                self.answers.push_back((slot, generation, Completion::Joined(result)));
            }
            Op::Pass(from) => {
                let index = self.pairs.get(slot.index()).map(|index| *index as usize);
                if let Some(Some(joint)) = index.and_then(|index| self.joints.get(index)) {
                    self.sockmap.pass(&joint.pair, from);
                }
            }
            _ => {}
        }
    }

    fn join(&mut self, slot: FlowId, ring: &Ring) -> Result<Joined, Fall> {
        let [downstream, upstream] = ring.lent(slot).ok_or(Fall::Descriptors)?;
        let pair = self.sockmap.join(downstream, upstream).map_err(|refused| match refused {
            Refused::Full => Fall::Pairs,
            Refused::Kernel => Fall::Refused,
        })?;
        let index = pair.index();
        let joined = Joined {
            from_downstream: pair.reads(Side::Downstream),
            from_upstream: pair.reads(Side::Upstream),
        };
        if let Some(place) = self.pairs.get_mut(slot.index()) {
            *place = index;
        }
        if let Some(place) = self.joints.get_mut(index as usize) {
            self.pairs_used = self.pairs_used.max(index + 1);
            let (drained, said_bytes, said_stopped) = ([false; 2], [0; 2], [false; 2]);
            *place = Some(Joint { drained, pair, said_bytes, said_stopped, slot });
        }
        Ok(joined)
    }

    /// The backlog of a direction, and what was left to user space so far; `None` while there is
    /// one. An error where the socket that it goes to is gone.
    fn drained(&mut self, slot: FlowId, from: Side) -> Option<Result<u64, Errno>> {
        let index = *self.pairs.get(slot.index())?;
        let joint = self.joints.get_mut(index as usize)?.as_mut()?;
        let drained = joint.drained.get_mut(from as usize)?;
        if !*drained {
            match self.sockmap.backlog(&joint.pair, from) {
                Some(backlog) => *drained = backlog == 0,
                None => return Some(Err(Errno(libc::ENOTCONN))),
            }
        }
        drained.then(|| Ok(self.sockmap.progress(&joint.pair, from).passed))
    }

    /// What the kernel has moved since the flow last heard of it, and whether it has stopped.
    fn news(&mut self, slot: FlowId, from: Side) -> Option<Completion> {
        let pair = *self.pairs.get(slot.index())?;
        let joint = self.joints.get_mut(pair as usize)?.as_mut()?;
        let progress = self.sockmap.progress(&joint.pair, from);
        if progress.is_broken {
            return Some(Completion::Expelled(CloseReason::RelayBroken));
        }
        let said = joint.said_bytes.get_mut(from as usize)?;
        let bytes = progress.forwarded - *said;
        *said = progress.forwarded;
        let stopped = progress.pass.filter(|pass| *pass != Pass::Asked).map(|_| Fall::Backlog);
        let said_stopped = joint.said_stopped.get_mut(from as usize)?;
        let stopped = stopped.filter(|_| !std::mem::replace(said_stopped, true));
        let is_news = bytes > 0 || stopped.is_some();
        is_news.then_some(Completion::Forwarded { bytes, from, stopped })
    }
}

impl Worker {
    /// The kernel's part of a turn.
    pub(super) fn forward(&mut self) {
        if self.forwarded.is_none() {
            return;
        }
        while let Some((slot, generation, answer)) =
            self.forwarded.as_mut().and_then(|forwarded| forwarded.answers.pop_front())
        {
            if self.slab.living(slot, generation).is_some() {
                self.step(slot, answer);
            }
        }
        self.hear_of_stopped();
        self.look_at_all();
        self.drain_backlogs();
    }

    fn hear_of_stopped(&mut self) {
        while let Some((index, from)) =
            self.forwarded.as_mut().and_then(|forwarded| forwarded.sockmap.next_stopped())
        {
            let joint = self.forwarded.as_ref().and_then(|all| all.joints.get(index as usize));
            if let Some(slot) = joint.and_then(Option::as_ref).map(|joint| joint.slot) {
                self.look_at(slot, from);
            }
        }
    }

    /// Every flow that the kernel forwards, now and then: for counters and idle timers.
    fn look_at_all(&mut self) {
        let now = self.clock.now();
        let Some(forwarded) = self.forwarded.as_mut().filter(|all| all.look_at <= now) else {
            return;
        };
        forwarded.look_at = now.saturating_add(Clock::ticks(LOOK_EVERY));
        self.refresh();
    }

    /// Tells every flow what the kernel has moved for it.
    pub(super) fn refresh(&mut self) {
        for index in 0..self.forwarded.as_ref().map_or(0, |all| all.pairs_used) {
            let joint = self.forwarded.as_ref().and_then(|all| all.joints.get(index as usize));
            let Some(slot) = joint.and_then(Option::as_ref).map(|joint| joint.slot) else {
                continue;
            };
            for from in Side::BOTH {
                self.look_at(slot, from);
            }
        }
    }

    /// Tells a flow what the kernel has moved for it. One that is on its way out would not listen:
    /// `release_pair` counts what it has not heard of.
    pub(super) fn look_at(&mut self, slot: FlowId, from: Side) {
        if self.slab.entry(slot).is_none_or(|entry| entry.times.timer.is_none()) {
            return;
        }
        let news = self.forwarded.as_mut().and_then(|forwarded| forwarded.news(slot, from));
        if let Some(news) = news {
            self.step(slot, news);
        }
    }

    fn drain_backlogs(&mut self) {
        let mut index = 0;
        while let Some(forwarded) = self.forwarded.as_mut()
            && let Some((slot, generation, from)) = forwarded.draining.get(index).copied()
        {
            let is_living = self.slab.living(slot, generation).is_some();
            let drained = forwarded.drained(slot, from);
            if is_living && drained.is_none() {
                index += 1;
                continue;
            }
            forwarded.draining.swap_remove(index);
            if is_living {
                self.look_at(slot, from);
            }
            if let Some(result) = drained.filter(|_| self.slab.living(slot, generation).is_some()) {
                self.step(slot, Completion::Drained { from, result });
            }
        }
    }

    /// The flow is over: what was moved last is counted, and its place is free.
    pub(super) fn release_pair(&mut self, slot: FlowId, listener: u16) {
        let Some(forwarded) = self.forwarded.as_mut() else { return };
        let Some(index) = forwarded.pairs.get_mut(slot.index()) else { return };
        let index = std::mem::replace(index, NONE);
        let joint = forwarded.joints.get_mut(index as usize).and_then(Option::take);
        let Some(Joint { pair, said_bytes, .. }) = joint else { return };
        let origin = self.listening.origin(listener);
        for (from, said) in Side::BOTH.into_iter().zip(said_bytes) {
            let bytes = forwarded.sockmap.progress(&pair, from).forwarded - said;
            self.counters.moved(origin, from, Relay::Sockmap, bytes);
        }
        forwarded.sockmap.forget(pair);
    }
}

/// Rings the worker, which then asks the kernel what it has to say.
pub(super) const BELL: Token = Token::new(Kind::Mailbox, FlowId::new(1), 0);
/// How often bytes are counted and flows found to be alive. Late by as much, `weir flows` asks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A backlog waits for a kernel thread, not for a peer: it is empty within a millisecond or so.
const DRAIN_LOOK_EVERY: Duration = Duration::from_millis(1);
/// No pair.
const NONE: u32 = u32::MAX;
