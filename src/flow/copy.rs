// SPDX-License-Identifier: Apache-2.0
//! The copy path of a direction: received into provided buffers, sent from them.
//!
//! Pure bookkeeping: knows what waits and what is armed; whether the direction has ended is its
//! half's matter. Invariants: at most one receive and one send in flight; the queue holds at most
//! `window_bytes`, because a receive is armed only for the credit that is left.

use super::Rules;
use super::segments::{Queue, Segments};
use crate::op::{Op, Pool, Request, SEGMENTS_PER_SEND_MAX, Segment, Side};

/// The copy path of one direction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copying {
    pub(super) queue: Queue,
    burst: Burst,
    is_doubtful: bool,
    receive: Receive,
    /// Segments of the send in flight; 0 if there is none.
    sending: u16,
}

/// What the receiving socket is doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Receive {
    /// A request is in flight.
    Armed,
    /// A request is in flight and asked to end, because the queue is long or the path changes.
    Cancelled,
    /// Nothing asked for, because the queue is long or the flow just began.
    Idle,
    /// Waiting for a buffer.
    Starved,
}

/// What one receive request has brought: tells bulk from small talk.
#[derive(Clone, Copy, Debug)]
struct Burst {
    bytes: u32,
    count: u16,
    pool: Pool,
}

impl Copying {
    pub(super) const fn new() -> Copying {
        Copying {
            burst: Burst { bytes: 0, count: 0, pool: Pool::Small },
            is_doubtful: false,
            queue: Queue::new(),
            receive: Receive::Idle,
            sending: 0,
        }
    }

    /// Everything that was received was sent.
    pub(super) const fn is_flushed(&self) -> bool {
        self.queue.is_empty() && self.sending == 0
    }

    /// Nothing waits and nothing is in flight: the path may be left.
    pub(super) fn is_over(&self) -> bool {
        self.is_flushed() && self.receive == Receive::Idle
    }

    /// A receive request has ended and the next one was not asked for yet.
    pub(super) fn is_between_receives(&self) -> bool {
        self.receive == Receive::Idle
    }

    /// A receive is in flight, and would tell that the connection broke.
    pub(super) fn is_listening(&self) -> bool {
        matches!(self.receive, Receive::Armed | Receive::Cancelled)
    }

    pub(super) fn push(&mut self, segments: &mut Segments, segment: Segment) {
        self.burst.add(segment.len);
        segments.push(&mut self.queue, segment);
    }

    /// The receive request has ended.
    pub(super) fn received(&mut self) {
        self.receive = Receive::Idle;
    }

    /// The pool that ran dry was the bulk one: the small one may serve. False if there is none left.
    pub(super) fn starve(&mut self) -> bool {
        let was_bulk = self.burst.pool == Pool::Bulk;
        self.burst = Burst { bytes: 0, count: 0, pool: Pool::Small };
        if !was_bulk {
            self.receive = Receive::Starved;
        }
        was_bulk
    }

    pub(super) fn feed(&mut self) {
        if self.receive == Receive::Starved {
            self.receive = Receive::Idle;
        }
    }

    /// The socket took so many bytes. Fewer than it was asked to may mean that its connection broke
    /// and the error was swallowed (`sk_stream_error` in net/core/stream.c takes `sk_err`).
    pub(super) fn sent(&mut self, segments: &mut Segments, bytes: u32) {
        let before = self.queue.count();
        segments.advance(&mut self.queue, bytes);
        self.is_doubtful = before - self.queue.count() < std::mem::take(&mut self.sending);
    }

    /// The last send was cut short: only the next one tells whether the connection is broken.
    pub(super) const fn is_doubtful(&self) -> bool {
        self.is_doubtful
    }

    /// The send ended before it took anything.
    pub(super) fn ended_send(&mut self) {
        self.sending = 0;
    }

    /// The next receive, if there is room for it and none is in flight.
    ///
    /// Bulk buffers for a direction that fills them; decided afresh each time, so that one that
    /// calms down gives them up.
    pub(super) fn next_receive(
        &mut self,
        side: Side,
        moved_bytes: u64,
        rules: &Rules,
    ) -> Option<Op> {
        match self.receive {
            Receive::Armed if self.is_overfull(rules) => self.cancel(side),
            Receive::Idle if self.has_room(rules) => {
                self.receive = Receive::Armed;
                let bytes = rules.bulk_segment_bytes;
                let is_bulky = moved_bytes >= rules.bulk_after_bytes && self.fills(bytes, bytes);
                let pool = if is_bulky { Pool::Bulk } else { Pool::Small };
                self.burst = Burst { bytes: 0, count: 0, pool };
                let credit_bytes = rules.window_bytes - self.queue.bytes();
                Some(Op::Receive { side, credit_bytes, pool })
            }
            _ => None,
        }
    }

    /// The next send, if something waits and none is in flight.
    pub(super) fn next_send(&mut self, from: Side) -> Option<Op> {
        if self.sending > 0 || self.queue.is_empty() {
            return None;
        }
        self.sending = self.queue.count().min(SEGMENTS_PER_SEND_MAX);
        Some(Op::Send { from, segments: self.sending })
    }

    /// Asks an armed receive to end, for good.
    pub(super) fn next_cancel(&mut self, side: Side) -> Option<Op> {
        self.feed();
        if self.receive == Receive::Armed { self.cancel(side) } else { None }
    }

    /// What the last receive brought filled its buffers on average to so many bytes of each.
    pub(super) fn fills(&self, small_bytes: u32, bulk_bytes: u32) -> bool {
        let wanted = if self.burst.pool == Pool::Bulk { bulk_bytes } else { small_bytes };
        self.burst.count > 0
            && u64::from(self.burst.bytes) >= u64::from(self.burst.count) * u64::from(wanted)
    }

    fn cancel(&mut self, side: Side) -> Option<Op> {
        self.receive = Receive::Cancelled;
        Some(Op::Cancel(Request::Receive(side)))
    }

    fn has_room(&self, rules: &Rules) -> bool {
        self.queue.bytes() <= rules.window_bytes / 2 && self.queue.count() <= rules.segments_max / 2
    }

    /// Reached by many tiny segments, or on kernels whose receive cannot be limited.
    fn is_overfull(&self, rules: &Rules) -> bool {
        self.queue.count() >= rules.segments_max || self.queue.bytes() >= rules.window_bytes
    }
}

impl Burst {
    /// A request may go on for ever: what is long ago counts half, so that the average stays.
    fn add(&mut self, bytes: u32) {
        if self.count == u16::MAX {
            (self.bytes, self.count) = (self.bytes / 2, self.count / 2);
        }
        self.bytes = self.bytes.saturating_add(bytes);
        self.count += 1;
    }
}
