// SPDX-License-Identifier: Apache-2.0
//! One direction of a flow: received from one socket, sent to the other, by copy.
//!
//! Pure bookkeeping: knows what waits, what is armed and what has ended; never decides about the
//! other direction. Invariants: at most one receive and one send in flight; the queue holds at
//! most `window_bytes`, because a receive is armed only for the credit that is left.

use super::Rules;
use super::segments::{Queue, Segments};
use crate::op::{Op, Pool, Request, SEGMENTS_PER_SEND_MAX, Segment, Side};

/// One direction of a flow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Half {
    /// Bytes sent so far.
    pub(super) moved_bytes: u64,
    pub(super) queue: Queue,
    pub(super) receive: Receive,
    pub(super) send: Send,
    burst: Burst,
    /// Bytes at the head of the queue that nobody sent us.
    lead_bytes: u32,
    /// Segments of the send in flight.
    sending: u16,
}

/// What the receiving socket is doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Receive {
    /// A request is in flight.
    Armed,
    /// A request is in flight and asked to end, because the queue is long.
    Cancelled,
    /// FIN has come: nothing will be read any more.
    Ended,
    /// Nothing asked for, because the queue is long or the flow just began.
    Idle,
    /// Waiting for a buffer.
    Starved,
}

/// What the sending socket is doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Send {
    /// FIN was asked for; nothing may be sent any more.
    Ended,
    /// Nothing in flight.
    Idle,
    /// A send is in flight.
    InFlight,
    /// There is no connection yet.
    Unconnected,
}

/// What one receive request has brought: tells bulk from small talk.
#[derive(Clone, Copy, Debug)]
struct Burst {
    bytes: u32,
    count: u32,
    pool: Pool,
}

impl Half {
    pub(super) const fn new(send: Send) -> Half {
        Half {
            burst: Burst { bytes: 0, count: 0, pool: Pool::Small },
            lead_bytes: 0,
            moved_bytes: 0,
            queue: Queue::new(),
            receive: Receive::Idle,
            send,
            sending: 0,
        }
    }

    /// Everything that came was sent, and nothing more will come.
    pub(super) fn is_flushed(&self) -> bool {
        self.receive == Receive::Ended && self.queue.is_empty() && self.send == Send::Idle
    }

    /// Puts bytes of our own before everything that will come.
    pub(super) fn lead(&mut self, segments: &mut Segments, segment: Segment) {
        self.lead_bytes = segment.len;
        segments.push(&mut self.queue, segment);
    }

    pub(super) fn push(&mut self, segments: &mut Segments, segment: Segment) {
        self.burst.bytes = self.burst.bytes.saturating_add(segment.len);
        self.burst.count = self.burst.count.saturating_add(1);
        segments.push(&mut self.queue, segment);
    }

    /// The pool that ran dry was the bulk one: the small one may serve.
    pub(super) fn retreat(&mut self) -> bool {
        let was_bulk = self.burst.pool == Pool::Bulk;
        self.burst = Burst { bytes: 0, count: 0, pool: Pool::Small };
        was_bulk
    }

    /// The socket took so many bytes; false if not all that it was asked to take, which it does
    /// only when its connection is broken.
    pub(super) fn sent(&mut self, segments: &mut Segments, bytes: u32) -> bool {
        self.send = Send::Idle;
        let lead = bytes.min(self.lead_bytes);
        self.lead_bytes -= lead;
        self.moved_bytes += u64::from(bytes - lead);
        let before = self.queue.count();
        segments.advance(&mut self.queue, bytes);
        before - self.queue.count() == self.sending
    }

    /// The next receive, if there is room for it and none is in flight.
    pub(super) fn next_receive(&mut self, side: Side, rules: &Rules) -> Option<Op> {
        match self.receive {
            Receive::Armed if self.is_overfull(rules) => {
                self.receive = Receive::Cancelled;
                Some(Op::Cancel(Request::Receive(side)))
            }
            Receive::Idle if self.has_room(rules) => {
                self.receive = Receive::Armed;
                let pool = self.next_pool(rules);
                self.burst = Burst { bytes: 0, count: 0, pool };
                let credit_bytes = rules.window_bytes - self.queue.bytes();
                Some(Op::Receive { side, credit_bytes, pool })
            }
            _ => None,
        }
    }

    /// The next send, if something waits and none is in flight.
    pub(super) fn next_send(&mut self, from: Side) -> Option<Op> {
        if self.send != Send::Idle || self.queue.is_empty() {
            return None;
        }
        self.send = Send::InFlight;
        self.sending = self.queue.count().min(SEGMENTS_PER_SEND_MAX);
        Some(Op::Send { from, segments: self.sending })
    }

    fn has_room(&self, rules: &Rules) -> bool {
        self.queue.bytes() <= rules.window_bytes / 2 && self.queue.count() <= rules.segments_max / 2
    }

    /// Reached by many tiny segments, or on kernels whose receive cannot be limited.
    fn is_overfull(&self, rules: &Rules) -> bool {
        self.queue.count() >= rules.segments_max || self.queue.bytes() >= rules.window_bytes
    }

    /// Bulk buffers for a direction that fills them; decided afresh for every receive, so that a
    /// direction that calms down gives them up.
    fn next_pool(&self, rules: &Rules) -> Pool {
        let bulky = self.moved_bytes >= rules.bulk_after_bytes
            && u64::from(self.burst.bytes)
                >= u64::from(self.burst.count) * u64::from(rules.bulk_segment_bytes)
            && self.burst.count > 0;
        if bulky { Pool::Bulk } else { Pool::Small }
    }
}

const _: () = assert!(size_of::<Half>() <= 64, "a half must fit one cache line");
