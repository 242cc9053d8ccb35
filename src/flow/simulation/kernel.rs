// SPDX-License-Identifier: Apache-2.0
//! The kernel of the simulation, while it forwards: what it has taken from one socket and not yet
//! put into the other, and what it has left to user space, of which some cannot be received yet.

use super::*;

/// One direction, by the side that is read.
#[derive(Default)]
pub(super) struct Way {
    /// Taken, and on its way to the other socket.
    pub(super) backlog: u64,
    /// Taken since it was last said.
    unsaid: u64,
    /// Left to user space: on its way, and ready to be received.
    hidden: u64,
    ready: u64,
    passed: u64,
    passes: bool,
    pub(super) reads: bool,
    said_end: bool,
    said_pass: bool,
    waits: bool,
}

impl World {
    /// Takes the pair, mostly.
    pub(super) fn join(&mut self) {
        assert!(self.peers.iter().all(|peer| peer.lent), "joined without descriptors");
        let waits = |request: &Request| matches!(request, Request::Install(_) | Request::Watch(_));
        let busy = self.in_flight.iter().find(|(request, _)| !waits(request));
        assert!(busy.is_none(), "joined beside {busy:?}");
        assert!(self.ways.iter().all(|way| !way.reads), "joined twice");
        let reads = [!self.random.one_in(8), !self.random.one_in(8)];
        self.joined = Some(if reads == [false; 2] {
            Err(Fall::Refused)
        } else {
            for (way, reads) in self.ways.iter_mut().zip(reads) {
                way.reads = reads;
            }
            Ok(Joined { from_downstream: reads[0], from_upstream: reads[1] })
        });
    }

    pub(super) fn pass(&mut self, from: Side) {
        assert!(self.ways[from as usize].reads, "told to leave what it never took");
        self.ways[from as usize].passes = true;
    }

    pub(super) fn await_drained(&mut self, from: Side) {
        assert!(!std::mem::replace(&mut self.ways[from as usize].waits, true), "waits twice");
    }

    /// Whoever sends now would be ahead of what was taken before.
    pub(super) fn check_behind(&self, from: Side) {
        assert_eq!(self.ways[from as usize].backlog, 0, "sent around the kernel");
    }

    /// Lets the kernel do something, and says what is to be said of it.
    pub(super) fn forward(&mut self) -> Option<Completion> {
        if let Some(result) = self.joined.take() {
            return Some(Completion::Joined(result));
        }
        for _ in 0..1 + self.random.below(4) {
            let from = Side::BOTH[self.random.below(2) as usize];
            self.advance(from, false);
            let said = if self.random.one_in(2) { self.say(from) } else { None };
            if said.is_some() {
                return said;
            }
        }
        // Enough of chance: what can come, comes, and arrives.
        for from in [Side::BOTH, Side::BOTH].concat() {
            self.advance(from, true);
        }
        self.say(Side::Downstream).or_else(|| self.say(Side::Upstream))
    }

    /// Some of what each place holds moves on to the next, or all of it.
    fn advance(&mut self, from: Side, all: bool) {
        let mut part = [0; 3];
        let peer = &self.peers[from as usize];
        let way = &self.ways[from as usize];
        let left = if way.reads { peer.will_send - peer.taken } else { 0 };
        for (part, whole) in part.iter_mut().zip([left, way.backlog, way.hidden]) {
            *part = if all { whole } else { self.random.below(whole + 1) };
        }
        let [came, gone, found] = part;
        let stops = self.random.one_in(12);
        let way = &mut self.ways[from as usize];
        way.backlog -= gone;
        way.hidden -= found;
        way.ready += found;
        way.passes |= stops && came > 0;
        let place = if way.passes { &mut way.hidden } else { &mut way.backlog };
        *place += came;
        if way.passes {
            way.passed += came;
        } else {
            way.unsaid += came;
        }
        self.peers[from as usize].taken += came;
        let target = &mut self.peers[from.other() as usize];
        assert!(gone == 0 || !target.got_fin, "FIN before what the kernel had");
        target.given += gone;
    }

    fn say(&mut self, from: Side) -> Option<Completion> {
        let fails = self.random.one_in(self.error_chance);
        let is_over = self.peers[from as usize].taken == self.peers[from as usize].will_send;
        let watch = self.in_flight.iter().position(|(request, _)| *request == Request::Watch(from));
        let way = &mut self.ways[from as usize];
        let stopped = (way.passes && !way.said_pass).then_some(Fall::Backlog);
        if way.unsaid > 0 || stopped.is_some() {
            way.said_pass |= way.passes;
            let bytes = std::mem::take(&mut way.unsaid);
            return Some(Completion::Forwarded { bytes, from, stopped });
        }
        if way.waits && way.backlog == 0 {
            way.waits = false;
            let result = if fails { Err(Errno(ENOTCONN)) } else { Ok(way.passed) };
            return Some(Completion::Drained { from, result });
        }
        let index = watch.filter(|_| (is_over && !way.said_end) || fails)?;
        way.said_end = true;
        self.broken |= fails && !self.cancelled.contains(&Request::Watch(from));
        let more = !self.random.one_in(3);
        if !more {
            self.end(index, Request::Watch(from));
        }
        Some(Completion::Stirred { is_broken: fails, more, side: from })
    }

    /// What a receive on a socket that the kernel reads finds: how many bytes may come, and the
    /// number of the first. An EOF is all there is, but what is on its way can still follow it.
    pub(super) fn receivable(&self, side: Side) -> Option<(u64, u64)> {
        let (peer, way) = (&self.peers[side as usize], &self.ways[side as usize]);
        if !way.reads {
            return Some((peer.will_send - peer.taken, peer.taken));
        }
        assert!(way.passes, "received beside the kernel");
        let is_over = peer.taken == peer.will_send;
        (way.ready > 0 || is_over).then_some((way.ready, peer.taken - way.hidden - way.ready))
    }

    /// So many of those were received.
    pub(super) fn received(&mut self, side: Side, bytes: u64) {
        let way = &mut self.ways[side as usize];
        if way.reads {
            way.ready -= bytes;
        } else {
            self.peers[side as usize].taken += bytes;
        }
    }
}

const ENOTCONN: i32 = 107;
