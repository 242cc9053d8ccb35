// SPDX-License-Identifier: Apache-2.0
//! The loop itself: completions in, operations out, then buffers, timers and mailbox.
//!
//! Invariant: what a flow asks for is carried out in the order it asked, and a slot is free again
//! only after its last operation went to the ring.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::accept::Listening;
use super::breaker::Breaker;
use super::exchanging::Exchanging;
use super::mailbox::{Letter, Mailbox};
use super::peek::Peeking;
use super::slab::{Peers, Slab};
use super::sockmap::{self, Forwarded};
use super::timers::TimerTicks;
use super::trial::Trial;
use super::waking::Waking;
use super::wheel::{Clock, Wheel};
use super::{FlowRow, Setup};
use crate::flow::{Flow, Ops, Rules, Segments};
use crate::metrics::Counters;
use crate::op::{
    CloseReason, Completion, Errno, FlowId, Kind, Op, Pool, Readiness, Relay, Request, Segment,
    Side, Token,
};
use crate::ring::{Batch, Event, Ring, RingError, Spliced};
use crate::service::Picker;

/// Everything one worker owns.
pub(super) struct Worker {
    pub(super) batch: Batch,
    pub(super) breaker: Breaker,
    pub(super) clock: Clock,
    pub(super) counters: Arc<Counters>,
    /// When draining: the tick at which what is left is reset.
    pub(super) drain_until: Option<u32>,
    pub(super) exchanging: Exchanging,
    /// What the kernel forwards; `None` where it forwards nothing.
    pub(super) forwarded: Option<Forwarded>,
    /// The number of the place that this thread is in.
    pub(super) inside: u32,
    pub(super) listening: Listening,
    pub(super) mailbox: Arc<Mailbox>,
    /// What the step at hand asks for; empty between two.
    pub(super) ops: Ops,
    pub(super) peeking: Peeking,
    pub(super) ring: Ring,
    pub(super) rules: Rules,
    pub(super) segments: Segments,
    pub(super) services: Picker,
    pub(super) setup: Setup,
    pub(super) slab: Slab,
    /// Directions that wait for a small buffer, first come first served.
    pub(super) starved: VecDeque<(FlowId, Side)>,
    pub(super) ticks: TimerTicks,
    /// Where `auto` may splice.
    pub(super) trial: Option<Trial>,
    /// Where `auto` may give flows to the kernel.
    pub(super) waking: Option<Waking>,
    pub(super) wheel: Wheel,
}

impl Worker {
    /// Turns until drained.
    pub(super) fn run(&mut self) -> Result<(), RingError> {
        self.arm_bell(MAILBOX);
        self.arm_bell(sockmap::BELL);
        self.arm_listeners();
        while !self.is_drained() {
            self.turn()?;
        }
        // What was reset last must be reset, and not merely closed with the ring.
        self.ring.finish()
    }

    pub(super) fn turn(&mut self) -> Result<(), RingError> {
        let patience = self.patience();
        self.ring.turn(patience, &mut self.batch)?;
        self.clock.read();
        while let Some(event) = self.ring.next(&mut self.batch) {
            self.handle(event);
        }
        self.splice();
        self.forward();
        self.judge();
        self.return_buffers();
        self.share_buffers();
        self.expire();
        self.read_mail();
        self.watch_loops();
        self.leave_places();
        self.arm_listeners();
        self.counters.ring_enters.set(self.ring.enters());
        self.counters.ring_overflows.set(self.ring.overflows());
        Ok(())
    }

    /// Which relays `auto` takes from now on.
    fn judge(&mut self) {
        if let Some(trial) = &mut self.trial {
            self.rules.splice = trial.judge(self.clock.elapsed(), || self.counters.bytes());
        }
        if let Some((waking, forwarding)) = self.waking.as_mut().zip(self.rules.forwarding.as_mut())
        {
            let completions = self.counters.ring_completions.value();
            forwarding.pays = waking.judge(completions, self.ring.sleeps());
        }
    }

    /// How long the ring may sleep.
    fn patience(&self) -> Option<Duration> {
        let now = self.clock.now();
        let timer = self.wheel.next(now);
        let listener = self.listening.retry_at().map(|at| at.saturating_sub(now).max(1));
        let drain = self.drain_until.map(|at| at.saturating_sub(now).max(1));
        let ticks = [timer, listener, drain].into_iter().flatten().min().map(Clock::span);
        let forwarded = self.forwarded.as_ref().and_then(|forwarded| forwarded.patience(now));
        let looping = self.listening.looping(self.clock.elapsed());
        let starved = self.can_share_buffers().then_some(Duration::ZERO);
        [ticks, forwarded, looping, starved].into_iter().flatten().min()
    }

    /// Begins to hear one of the bells, or goes on with it.
    fn arm_bell(&mut self, bell: Token) {
        if bell == MAILBOX {
            self.ring.arm_mailbox(bell, self.mailbox.bell());
        } else if let Some(forwarded) = &self.forwarded {
            self.ring.arm_mailbox(bell, forwarded.sockmap.bell());
        }
    }

    pub(super) fn handle(&mut self, event: Event) {
        self.counters.ring_completions.add(1);
        let flow = event.token.flow();
        match event.token.kind() {
            Some(Kind::Accept) => self.accepted(flow.index(), event),
            Some(Kind::Peek) => self.heard(event),
            Some(Kind::LastSent) => self.told_last_sent(event),
            // Where the completion queue was full it has ended (`io_poll_check_events` in
            // io_uring/poll.c).
            Some(Kind::Mailbox) if !event.more => self.arm_bell(event.token),
            Some(Kind::Mailbox | Kind::Quiet) | None => {}
            Some(kind) => {
                let generation = event.token.generation();
                if let Some(head) = self.slab.head_of(flow, generation) {
                    if let Some(completion) = completion(kind, event, &mut self.segments) {
                        self.step_exchange(head, flow, completion);
                    }
                } else if self.slab.living(flow, generation).is_none() {
                    self.counters.completions_stale.add(1);
                    if let Some(buffer) = event.buffer {
                        self.segments.free(buffer);
                    }
                } else if let Some(completion) = completion(kind, event, &mut self.segments) {
                    self.step(flow, completion);
                }
            }
        }
    }

    /// Steps of pipes, as many as leave the rest of the turn its time.
    fn splice(&mut self) {
        for _ in 0..STEPS_PER_TURN_MAX {
            let Some((token, Spliced { drained, filled })) = self.ring.next_spliced() else {
                return;
            };
            let from = token.kind().map_or(Side::Downstream, Kind::side);
            let (drained, filled) = (count(drained), count(filled));
            if self.slab.living(token.flow(), token.generation()).is_some() {
                self.step(token.flow(), Completion::Spliced { drained, filled, from });
            }
        }
    }

    /// Begins a flow in `slot`, whose downstream socket the ring holds already.
    pub(super) fn open(&mut self, slot: FlowId, peers: Peers, lead: Option<Segment>) {
        let flow = Flow::open(lead, &self.rules, &mut self.segments, &mut self.ops);
        let now = self.clock.now();
        if self.slab.claim(slot, flow, peers, now).is_none() {
            // Only a kernel that hands out a taken slot gets here: give the socket back.
            self.counters.completions_stale.add(1);
            lead.into_iter().for_each(|lead| self.segments.free(lead.buffer));
            self.ops = Ops::new();
            return self.ring.close(slot, Side::Downstream, true);
        }
        self.counters.flows_active.add(1);
        self.listening.connect_began();
        self.carry(slot);
        self.settle(slot);
    }

    /// One completion for one flow.
    pub(super) fn step(&mut self, slot: FlowId, completion: Completion) {
        if self.is_redialled(slot, completion) {
            return;
        }
        let Some(entry) = self.slab.entry(slot) else { return };
        let Some(flow) = entry.flow.as_mut() else { return };
        let was_connecting = flow.is_connecting();
        let before = Side::BOTH.map(|from| (flow.relay(from), flow.moved_bytes(from)));
        flow.step(completion, &self.rules, &mut self.segments, &mut self.ops);
        if completion != Completion::Deaf {
            entry.times.active = self.clock.now();
        }
        if was_connecting && !flow.is_connecting() {
            self.listening.connect_ended();
        }
        let origin = self.listening.origin(entry.peers.listener);
        for (from, (relay, moved)) in Side::BOTH.into_iter().zip(before) {
            let forwarded = matches!(completion, Completion::Forwarded { .. });
            let moved_by = if forwarded { Relay::Sockmap } else { relay };
            self.counters.moved(origin, from, moved_by, flow.moved_bytes(from) - moved);
            self.counters.changed(relay, flow.relay(from));
        }
        self.counters.fell(flow.take_fall());
        self.carry(slot);
        self.settle(slot);
    }

    /// Takes the operations of one step to the ring.
    fn carry(&mut self, slot: FlowId) {
        let Some(entry) = self.slab.entry(slot) else { return };
        let generation = entry.generation;
        for op in self.ops.drain() {
            let token = |kind| Token::new(kind, slot, generation);
            match op {
                Op::AwaitBuffers(side) => {
                    self.counters.buffers_exhausted.add(1);
                    if entry.queue_for_buffers(side) {
                        self.starved.push_back((slot, side));
                    }
                }
                Op::AwaitDrained(_) | Op::Join | Op::Pass(_) => {
                    if let Some(forwarded) = self.forwarded.as_mut() {
                        forwarded.carry(op, slot, generation, &self.ring);
                    }
                }
                Op::Await { from, readiness } => {
                    let side = if readiness == Readiness::Readable { from } else { from.other() };
                    self.ring.await_ready(token(Kind::of(Request::Await(from))), side, readiness);
                }
                Op::Cancel(request) => self.ring.cancel(token(Kind::of(request))),
                Op::Close { side, reset } => self.ring.close(slot, side, reset),
                Op::Connect => {
                    let Peers { listener, upstream, source, .. } = entry.peers;
                    let from = self.listening.dial_from(listener, source, upstream);
                    self.ring.dial(token(Kind::Connect), upstream, from);
                }
                Op::Install(side) => {
                    self.ring.install(token(Kind::of(Request::Install(side))), side);
                }
                Op::Receive { side, credit_bytes, pool } => {
                    let token = token(Kind::of(Request::Receive(side)));
                    self.ring.receive(token, side, credit_bytes, pool);
                }
                Op::Send { from, segments } => {
                    let Some(flow) = &entry.flow else { continue };
                    let queue = self.segments.iter(flow.queue(from)).take(usize::from(segments));
                    self.ring.send(token(Kind::of(Request::Send(from))), from.other(), queue);
                }
                Op::Shutdown(side) => {
                    self.ring.shutdown(token(Kind::of(Request::Shutdown(side))), side);
                }
                Op::Splice { from, held_bytes, room_bytes } => {
                    let token = token(Kind::of(Request::Splice(from)));
                    self.ring.splice(token, from, held_bytes, room_bytes);
                }
                Op::Uninstall => self.ring.uninstall(slot),
                Op::Watch(side) => self.ring.watch(token(Kind::of(Request::Watch(side))), side),
            }
        }
    }

    /// Keeps the flow's timer in step with its state; lets go of a flow that has closed.
    fn settle(&mut self, slot: FlowId) {
        let Some(entry) = self.slab.entry(slot) else { return };
        let Some(flow) = entry.flow.as_ref() else { return };
        if let Some(reason) = flow.closed() {
            let peers = entry.peers;
            self.wheel.clear(slot.slot());
            self.slab.release(slot);
            self.counters.flows_active.sub(1);
            if let Some(counter) = self.counters.flows_closed.get(reason as usize) {
                counter.add(1);
            }
            self.release_pair(slot, peers.listener);
            self.services.ended(peers.endpoint);
            return self.listening.flow_ended(&peers);
        }
        let (now, times) = (self.clock.now(), &mut entry.times);
        let is_other = flow.timer() != times.timer;
        times.timer = flow.timer();
        times.deaf_since = flow.is_deaf().then(|| times.deaf_since.unwrap_or(now));
        if is_other || (times.deaf_since.is_some() && !times.look_due) {
            self.ticks.set(&mut self.wheel, slot, times);
        }
    }

    fn return_buffers(&mut self) {
        while let Some(buffer) = self.segments.take_freed().or_else(|| self.exchanging.take_freed())
        {
            self.ring.recycle(buffer);
        }
    }

    /// There are buffers, and directions that wait for some. Whoever was let go first may have had
    /// nothing to read (a receive starves before it looks at its socket) and have taken none: nothing
    /// else would wake the worker for those behind it.
    fn can_share_buffers(&self) -> bool {
        !self.starved.is_empty() && self.ring.free(Pool::Small) > 0
    }

    /// Says how many buffers a direction may hold now, and lets those that wait for one receive
    /// again, as many as can have one.
    fn share_buffers(&mut self) {
        let free = self.ring.free(Pool::Small);
        let (buffers, relay) = (&self.setup.profile.buffers, &self.setup.profile.relay);
        self.rules.segments_max = segments_max(relay.segments_max, buffers.small_count, free);
        for _ in 0..free {
            let Some((slot, side)) = self.starved.pop_front() else { return };
            let Some(entry) = self.slab.entry(slot) else { continue };
            entry.leave_buffer_queue(side);
            let (is_flow, generation) = (entry.flow.is_some(), entry.generation);
            if is_flow {
                self.step(slot, Completion::BuffersFree(side));
            } else if let Some(head) = self.slab.head_of(slot, generation) {
                self.step_exchange(head, slot, Completion::BuffersFree(side));
            }
        }
    }

    fn read_mail(&mut self) {
        while let Some(letter) = self.mailbox.take() {
            match letter {
                Letter::Drain(within) => {
                    let until = self.clock.now().saturating_add(Clock::ticks(within));
                    self.drain_until = Some(self.drain_until.map_or(until, |at| at.min(until)));
                    self.stop_listening();
                    self.drain_exchanges();
                }
                Letter::Endpoints(to) => {
                    // As with flows.
                    let _ = to.send(self.services.tallies(self.clock.instant()));
                }
                Letter::Change(change) => self.change(*change),
                Letter::Leave(place) => self.leave(place),
                Letter::Flows(to) => {
                    self.refresh();
                    // Whoever asked may have stopped waiting: nothing is lost.
                    let _ = to.send(self.rows());
                }
                Letter::Help(lent) => self.help(lent),
                Letter::Services(update) => {
                    self.mailbox.throw_away(self.services.swap(update));
                    self.mailbox.set_revision(self.services.table().revision);
                }
                Letter::StopHelping => self.stop_helping(),
            }
        }
        if self.drain_until.is_some_and(|until| until <= self.clock.now()) {
            self.expel_all();
        }
    }

    fn expel_all(&mut self) {
        self.give_up_waiting();
        self.expel_exchanges();
        for slot in (0..self.slab.slots()).map(FlowId::new) {
            if self.slab.entry(slot).is_some_and(|entry| entry.flow.is_some()) {
                self.step(slot, Completion::Expelled(CloseReason::Drained));
            }
        }
    }

    fn is_drained(&self) -> bool {
        self.drain_until.is_some()
            && self.slab.occupied() == 0
            && self.peeking.is_empty()
            && self.listening.is_over()
    }

    pub(super) fn row_id(&self, slot: FlowId, generation: u32) -> u64 {
        u64::from(self.setup.index) << 56 | u64::from(slot.slot()) << 32 | u64::from(generation)
    }

    fn rows(&self) -> Vec<FlowRow> {
        let now = self.clock.now();
        let flows = self.slab.iter().map(|(slot, entry, flow)| FlowRow {
            age: Clock::span(now.wrapping_sub(entry.times.opened)),
            bytes_to_downstream: flow.moved_bytes(Side::Upstream),
            bytes_to_upstream: flow.moved_bytes(Side::Downstream),
            downstream: entry.peers.downstream,
            id: self.row_id(slot, entry.generation),
            idle: Clock::span(now.wrapping_sub(entry.times.active)),
            origin: self.listening.origin(entry.peers.listener),
            original_dst: entry.peers.original_dst,
            relay_to_downstream: flow.relay(Side::Upstream),
            relay_to_upstream: flow.relay(Side::Downstream),
            upstream: entry.peers.upstream,
            workload: self.listening.workload(entry.peers.listener),
        });
        flows.chain(self.exchange_rows()).collect()
    }
}

/// What the ring's event means to the flow. A receive whose buffer comes empty gives it back.
fn completion(kind: Kind, event: Event, segments: &mut Segments) -> Option<Completion> {
    let Event { result, buffer, more, .. } = event;
    let (count, side) = (count(result), kind.side());
    let done = count.map(|_| ());
    Some(match kind {
        Kind::AwaitDownstream | Kind::AwaitUpstream => Completion::Ready { from: side },
        Kind::Connect => Completion::Connected(done),
        Kind::InstallDownstream | Kind::InstallUpstream => {
            Completion::Installed { side, result: done }
        }
        Kind::ReceiveDownstream | Kind::ReceiveUpstream => {
            let result = match (count, buffer) {
                (Ok(len @ 1..), Some(buffer)) => Ok(Some(Segment { buffer, offset: 0, len })),
                (count, buffer) => {
                    if let Some(buffer) = buffer {
                        segments.free(buffer);
                    }
                    count.map(|_| None)
                }
            };
            Completion::Received { side, result, more }
        }
        Kind::SendDownstream | Kind::SendUpstream => Completion::Sent { from: side, result: count },
        Kind::ShutdownDownstream | Kind::ShutdownUpstream => {
            Completion::ShutDown { side, result: done }
        }
        // Steps come by themselves, not as events.
        Kind::SpliceDownstream | Kind::SpliceUpstream => return None,
        Kind::WatchDownstream | Kind::WatchUpstream => {
            let is_broken = count.is_ok_and(|events| events & POLLERR != 0);
            Completion::Stirred { is_broken, more, side }
        }
        Kind::Accept | Kind::LastSent | Kind::Mailbox | Kind::Peek | Kind::Quiet => return None,
    })
}

/// Buffers that one direction may hold while so many are free: the fewer, the fewer still, so that
/// readers that have stalled cannot take all of them. A hundred leave a fifth to the others.
fn segments_max(most: u16, count: u16, free: u16) -> u16 {
    let (count, free) = (u64::from(count.max(1)), u64::from(free.min(count)));
    let most = u64::from(most).min(count / 16);
    u16::try_from(most * free * free / (count * count)).unwrap_or(u16::MAX).max(2)
}

/// As the kernel says it: a count, or a negated errno.
fn count(result: i32) -> Result<u32, Errno> {
    u32::try_from(result).map_err(|_| Errno(-result))
}

/// In the events of a watch (poll(2)). A hang-up alone does not tell: FIN both ways looks alike.
const POLLERR: u32 = 8;
/// Wakes the worker, which then reads its mail.
const MAILBOX: Token = Token::new(Kind::Mailbox, FlowId::new(0), 0);
/// Each moves up to a pipe's worth: together a few milliseconds at most.
const STEPS_PER_TURN_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalled_readers_leave_buffers_to_others() {
        let (most, count) = (64, 2048);
        let left = |stalled| {
            (0..stalled).fold(count, |free, _| free - segments_max(most, count, free).min(free))
        };
        assert_eq!(segments_max(most, count, count), most);
        assert!(left(100) > count / 5, "{}", left(100));
        assert!(left(200) > count / 10, "{}", left(200));
        assert_eq!(segments_max(most, count, 0), 2);
        assert_eq!(segments_max(most, 64, 64), 4);
        assert_eq!(segments_max(most, 2, 2), 2);
    }
}
