// SPDX-License-Identifier: Apache-2.0
//! One socket of an exchange: what is in flight on it, what came and waits to be read, what waits to
//! be sent.
//!
//! Invariant: at most one connect, one receive and one send are in flight.

use super::pieces::{Pieces, Queue};
use super::{Host, Means};
use crate::op::{Op, Pool, Request, SEGMENTS_PER_SEND_MAX, Side};

/// A socket with its two queues.
#[derive(Clone, Copy, Debug)]
pub(super) struct Socket {
    /// Came, and was not taken out yet.
    pub(super) inbox: Queue,
    is_dialling: bool,
    /// FIN is on its way.
    is_finishing: bool,
    /// It takes nothing any more.
    is_shut: bool,
    /// Waits to be sent.
    pub(super) outbox: Queue,
    is_sending: bool,
    /// Since when it is listened to, if it is.
    listens_since: u32,
    receive: Receive,
    side: Side,
}

/// What the socket's receive is doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Receive {
    Armed,
    /// In flight, and asked to end.
    Cancelled,
    /// EOF came.
    Ended,
    Idle,
    /// Waits for a buffer.
    Starved,
}

impl Socket {
    pub(super) const fn new(side: Side) -> Socket {
        let (inbox, outbox) = (Queue::new(), Queue::new());
        let receive = Receive::Idle;
        Socket {
            inbox,
            is_dialling: false,
            is_finishing: false,
            is_sending: false,
            is_shut: false,
            listens_since: 0,
            outbox,
            receive,
            side,
        }
    }

    /// Another socket in its place, with the same to send.
    pub(super) const fn anew(&self) -> Socket {
        Socket { outbox: self.outbox, ..Socket::new(self.side) }
    }

    /// Nothing is in flight.
    pub(super) fn is_quiet(&self) -> bool {
        let receives = matches!(self.receive, Receive::Armed | Receive::Cancelled);
        !receives && !self.is_sending && !self.is_dialling && !self.is_finishing
    }

    /// Nothing waits to be sent, and nothing is being sent.
    pub(super) fn is_flushed(&self) -> bool {
        self.outbox.is_empty() && !self.is_sending
    }

    /// The kernel has some of the outbox just now.
    pub(super) const fn is_sending(&self) -> bool {
        self.is_sending
    }

    /// Since when the peer could have said something, if it can.
    pub(super) fn listens_since(&self) -> Option<u32> {
        (self.receive == Receive::Armed).then_some(self.listens_since)
    }

    /// It waits for a buffer.
    pub(super) fn is_starved(&self) -> bool {
        self.receive == Receive::Starved
    }

    /// The peer has sent FIN.
    pub(super) fn has_ended(&self) -> bool {
        self.receive == Receive::Ended
    }

    pub(super) fn ended(&mut self) {
        self.receive = Receive::Ended;
    }

    /// The receive has ended; it may be asked for again.
    pub(super) fn received(&mut self) {
        if self.receive != Receive::Ended {
            self.receive = Receive::Idle;
        }
    }

    pub(super) fn starve(&mut self) -> Op {
        self.receive = Receive::Starved;
        Op::AwaitBuffers(self.side)
    }

    pub(super) fn feed(&mut self) {
        if self.receive == Receive::Starved {
            self.receive = Receive::Idle;
        }
    }

    pub(super) fn dial(&mut self) -> Op {
        self.is_dialling = true;
        Op::Connect
    }

    pub(super) fn dialled(&mut self) {
        self.is_dialling = false;
    }

    /// Sends FIN; everything before it was sent.
    pub(super) const fn finish(&mut self) -> Op {
        self.is_finishing = true;
        Op::Shutdown(self.side)
    }

    pub(super) const fn finished(&mut self) {
        self.is_finishing = false;
    }

    /// A send has failed: what waits stays.
    pub(super) const fn shut(&mut self) {
        self.is_shut = true;
    }

    /// So many bytes of the outbox are with the kernel.
    pub(super) fn sent(&mut self, bytes: u32, pieces: &mut Pieces) {
        self.is_sending = false;
        pieces.advance(&mut self.outbox, bytes);
    }

    /// What it shall do now: receive while what it has brought (`held` bytes in so many pieces) leaves
    /// room, send while something waits. Before the bytes `wanted` are there nothing becomes less.
    pub(super) fn next<H: Host>(
        &mut self,
        held: Held,
        wanted: Wanted,
        means: &Means<'_, H>,
    ) -> [Option<Op>; 2] {
        let (side, rules) = (self.side, means.rules);
        let is_short = self.inbox.bytes() < wanted.bytes && held.bytes < rules.window_bytes;
        let is_full = held.bytes >= rules.window_bytes || held.pieces >= wanted.pieces_max;
        let has_room = held.bytes <= rules.window_bytes / 2 && held.pieces <= wanted.pieces_max / 2;
        let receive = match self.receive {
            Receive::Idle if has_room || is_short => {
                (self.receive, self.listens_since) = (Receive::Armed, means.now);
                let credit_bytes = rules.window_bytes - held.bytes;
                Some(Op::Receive { side, credit_bytes, pool: Pool::Small })
            }
            Receive::Armed if is_full && !is_short => {
                self.receive = Receive::Cancelled;
                Some(Op::Cancel(Request::Receive(side)))
            }
            _ => None,
        };
        let send = !self.is_sending && !self.is_shut && !self.outbox.is_empty();
        let send = send.then(|| {
            self.is_sending = true;
            let most = u32::from(SEGMENTS_PER_SEND_MAX);
            let segments = u16::try_from(self.outbox.count().min(most)).unwrap_or(1);
            Op::Send { from: side.other(), segments }
        });
        [receive, send]
    }

    /// What ends all that is in flight.
    pub(super) fn cancels(&mut self) -> [Option<Op>; 3] {
        let side = self.side;
        let is_armed = self.receive == Receive::Armed;
        if is_armed {
            self.receive = Receive::Cancelled;
        } else {
            self.feed();
        }
        let cancel = |is_there: bool, request| is_there.then_some(Op::Cancel(request));
        [
            cancel(self.is_dialling, Request::Connect),
            cancel(is_armed, Request::Receive(side)),
            cancel(self.is_sending, Request::Send(side.other())),
        ]
    }

    /// Lets go of all that waits; only when nothing is in flight.
    pub(super) fn clear(&mut self, pieces: &mut Pieces) {
        pieces.clear(&mut self.inbox);
        pieces.clear(&mut self.outbox);
    }
}

/// What a socket shall bring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Wanted {
    /// Before so many are there nothing can go on.
    pub(super) bytes: u32,
    pub(super) pieces_max: u32,
}

/// What is held of a socket's bytes, wherever it waits now.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Held {
    pub(super) bytes: u32,
    pub(super) pieces: u32,
}

impl Held {
    pub(super) const fn and(self, queue: Queue) -> Held {
        Held { bytes: self.bytes + queue.bytes(), pieces: self.pieces + queue.count() }
    }
}
