// SPDX-License-Identifier: Apache-2.0
//! Runs of whole frames, as they come from peers that pipeline: each is looked at, all are moved in one
//! go.
//!
//! Only requests and answers, of protocols whose frames say how long they are, and only as far as one
//! buffer holds them. Whatever else stands at the front is left to `requests` and `answers`, which do
//! the same frame by frame; so what a run does not take is never lost, only dearer.

use super::requests::ASKED_MAX;
use super::speech::{self, Ask, AskKind, Extent, Reading, Reply, ReplyKind};
use super::{Exchange, Host, Means};
use crate::op::{CloseReason, Segment};
use crate::service::ServiceId;
use crate::wire::detect::Protocol;

/// Frames at the front of a queue that go the same way.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Run {
    bytes: u32,
    /// The leg; `None` for nowhere.
    to: Option<usize>,
}

impl Exchange {
    /// Passes the requests at the front of the inbox that are there whole; false if none is. Ends with
    /// the first that goes elsewhere: its way is noted, and its bytes are still to be passed.
    pub(super) fn pass_whole_requests<H: Host>(
        &mut self,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let Some(front) = self.front_of_run(means.pieces.front(self.client.inbox), means) else {
            return Ok(false);
        };
        let mut run = Run::default();
        while let Some(rest) = front.behind(run.bytes).filter(|_| self.asked.len() < ASKED_MAX) {
            let Some((ask, service, len)) = self.whole_request(rest, means) else { break };
            let chosen = self.choose_known(service, means);
            let to = self.enter(ask, chosen, means);
            (self.hanging, self.needed) = (None, 0);
            if run.bytes > 0 && to != run.to {
                self.flush_run(run, means)?;
                (self.reading, self.to) = (Reading::Bytes(u64::from(len)), to);
                self.uploads = to.is_some();
                return Ok(true);
            }
            if let Some(leg) = to.and_then(|leg| self.legs.get_lasting(leg)) {
                leg.taken += u64::from(len);
            }
            run = Run { bytes: run.bytes + len, to };
        }
        self.flush_run(run, means)?;
        Ok(run.bytes > 0)
    }

    /// A request, whose it is, and its length, if it is there whole.
    fn whole_request<H: Host>(
        &mut self,
        rest: Segment,
        means: &Means<'_, H>,
    ) -> Option<(Ask, Option<ServiceId>, u32)> {
        let (bytes, table) = (means.host.bytes(rest), means.picker.table());
        let ask = speech::ask(self.protocol, bytes, self.called, table).ok()?;
        let AskKind::Request(service) = ask.kind else { return None };
        self.called = service.or(self.called);
        Some((ask, service, whole(ask.extent, rest)?))
    }

    fn flush_run<H: Host>(
        &mut self,
        run: Run,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        let Some(leg) = run.to.and_then(|leg| self.legs.get_lasting(leg)) else {
            means.pieces.advance(&mut self.client.inbox, run.bytes);
            return Ok(());
        };
        let fits = means.pieces.shift(&mut self.client.inbox, &mut leg.socket.outbox, run.bytes);
        if fits { Ok(()) } else { Err(CloseReason::LocalLimit) }
    }

    /// Passes the answers at the front of a leg's inbox that are there whole, and that somebody waits
    /// for; false if none is.
    pub(super) fn pass_whole_answers<H: Host>(
        &mut self,
        index: usize,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let inbox = self.legs.get_mut(index).map(|leg| leg.socket.inbox).unwrap_or_default();
        let front = means.pieces.front(inbox).filter(|_| self.floor.is_none());
        let Some(front) = self.front_of_run(front, means) else { return Ok(false) };
        let mut run = 0;
        while let Some(rest) = front.behind(run) {
            let reply = speech::reply(self.protocol, means.host.bytes(rest), None);
            let Ok(Reply { closes: false, extent, kind: ReplyKind::Answer(id) }) = reply else {
                break;
            };
            let Some(len) = whole(extent, rest) else { break };
            let Some(at) = self.answered_by(index, id) else { break };
            self.note(index, ReplyKind::Answer(id), Some(at), means);
            run += len;
        }
        let Some(leg) = self.legs.get_mut(index).filter(|_| run > 0) else { return Ok(false) };
        leg.needed = 0;
        let fits = means.pieces.shift(&mut leg.socket.inbox, &mut self.client.outbox, run);
        if fits { Ok(true) } else { Err(CloseReason::LocalLimit) }
    }

    /// The piece, if runs can be taken from it: it may have to be divided.
    fn front_of_run<H: Host>(
        &self,
        front: Option<Segment>,
        means: &Means<'_, H>,
    ) -> Option<Segment> {
        let is_framed = matches!(self.protocol, Protocol::Bolt | Protocol::Dubbo);
        front.filter(|_| is_framed && means.pieces.can_divide())
    }
}

impl Segment {
    /// What is left of it behind so many bytes; `None` for nothing.
    fn behind(self, bytes: u32) -> Option<Segment> {
        let (offset, len) = (self.offset + bytes, self.len - bytes);
        (len > 0).then_some(Segment { offset, len, ..self })
    }
}

/// The length of a frame, if all of it is in `rest`.
fn whole(extent: Extent, rest: Segment) -> Option<u32> {
    let Extent::Bytes(bytes) = extent else { return None };
    u32::try_from(bytes).ok().filter(|bytes| (1..=rest.len).contains(bytes))
}
