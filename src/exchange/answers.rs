// SPDX-License-Identifier: Apache-2.0
//! From the legs to the downstream: whole frames, one after the other.

use super::callbacks::Turn;
use super::refusal::{Failure, Text, heartbeat, refusal};
use super::speech::{self, Extent, Mark, Reading, Reply, ReplyKind};
use super::{Exchange, Host, Means};
use crate::metrics::Outcome;
use crate::op::CloseReason;
use crate::wire::Stop;
use crate::wire::detect::Protocol;

impl Exchange {
    /// As far as it goes; false if nothing could be done.
    pub(super) fn pass_answers<H: Host>(
        &mut self,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let mut has_moved = false;
        loop {
            let mut moved = self.refuse(means);
            for index in 0..self.legs.len() {
                moved |= self.hear(index, means)?;
            }
            if !moved {
                return Ok(has_moved);
            }
            has_moved = true;
        }
    }

    /// Answers in order are HTTP's way.
    fn is_ordered(&self) -> bool {
        self.protocol == Protocol::Http1
    }

    /// Tells of a request that failed, when it is its turn.
    fn refuse<H: Host>(&mut self, means: &mut Means<'_, H>) -> bool {
        if self.failures == 0 || self.floor.is_some() || self.is_last {
            return false;
        }
        let at = self.asked.iter().position(|asked| asked.failure.is_some());
        let Some(at) = at.filter(|at| *at == 0 || !self.is_ordered()) else { return false };
        let asked = self.asked.get(at).and_then(|asked| Some((asked.mark, asked.failure?)));
        let Some((mark, failure)) = asked else { return false };
        if !self.say(refusal(self.protocol, mark, failure), means) {
            return false;
        }
        self.asked.remove(at);
        self.failures -= 1;
        means.host.count(failure.outcome());
        let is_last = mark.closes || mark.expects || failure == Failure::Bad;
        self.is_last = self.is_ordered() && is_last;
        true
    }

    /// What one leg has said.
    fn hear<H: Host>(
        &mut self,
        index: usize,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let mut moved = false;
        while let Some(leg) = self.legs.get_mut(index) {
            if leg.socket.inbox.is_empty() || !leg.is_open() || self.is_last {
                break;
            }
            let goes_on = match leg.reading {
                Reading::Between => self.begin_answer(index, means)?,
                _ => self.pass_answer(index, means)?,
            };
            if !goes_on {
                break;
            }
            moved = true;
        }
        Ok(moved)
    }

    /// Looks what a leg's next frame is, and whether it can go now.
    fn begin_answer<H: Host>(
        &mut self,
        index: usize,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let to = match self.asked.front() {
            Some(asked) if self.is_ordered() && asked.leg != index => {
                let has_asked = self.asked.iter().any(|asked| asked.leg == index);
                if has_asked {
                    return Ok(false); // Others were asked before.
                }
                None
            }
            Some(asked) => Some(asked.mark),
            None => None,
        };
        let protocol = self.protocol;
        let Some(leg) = self.legs.get_mut(index) else { return Ok(false) };
        leg.is_cut = false;
        if leg.socket.inbox.bytes() < leg.needed {
            leg.is_cut = true;
            return Ok(false);
        }
        if self.pass_whole_answers(index, means)? {
            return Ok(true);
        }
        let Some(leg) = self.legs.get_mut(index) else { return Ok(false) };
        let reply = means.read(leg.socket.inbox, |bytes, _| speech::reply(protocol, bytes, to));
        match reply {
            Ok(reply) => self.admit(index, reply, means),
            Err(Stop::NeedMore(needed)) => {
                (leg.is_cut, leg.needed) = (true, u32::try_from(needed).unwrap_or(u32::MAX));
                Ok(false)
            }
            Err(Stop::Bad(_) | Stop::NotMine) => {
                self.lose(index, Failure::Broken, means)?;
                Ok(false)
            }
        }
    }

    /// Lets a frame begin, if it may.
    fn admit<H: Host>(
        &mut self,
        index: usize,
        reply: Reply,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let floor = self.floor;
        let is_ordered = self.is_ordered();
        let answered = match reply.kind {
            ReplyKind::Answer(_) if is_ordered => Some(0),
            ReplyKind::Open => Some(0),
            ReplyKind::Answer(id) => self.answered_by(index, id),
            _ => None,
        };
        let says = match reply.kind {
            // Nobody waits for it any more.
            ReplyKind::Answer(_) => answered.is_some(),
            ReplyKind::Heartbeat(mark) => {
                if !self.tell_leg(index, heartbeat(self.protocol, mark), means) {
                    return Ok(false);
                }
                false
            }
            ReplyKind::Nothing => false,
            ReplyKind::Before | ReplyKind::Callback(_) | ReplyKind::Open | ReplyKind::Push(_) => {
                true
            }
        };
        let Some(leg) = self.legs.get_mut(index) else { return Ok(false) };
        if says {
            let whole = match reply.extent {
                Extent::Bytes(bytes) => bytes.min(u64::from(means.rules.whole_bytes_max) + 1),
                Extent::Chunked(_) | Extent::End => 0,
            };
            let whole = u32::try_from(whole).unwrap_or(0);
            let is_cut = whole <= means.rules.whole_bytes_max && leg.socket.inbox.bytes() < whole;
            if is_cut || floor.is_some_and(|floor| floor != index) {
                leg.is_cut = is_cut;
                leg.needed = if is_cut { whole } else { 0 };
                return Ok(false);
            }
            if let ReplyKind::Callback(mark) = reply.kind {
                let turn = self.callbacks.ask(mark.id, index);
                if turn != Turn::Yours {
                    return Ok(self.put_off((index, turn), mark, reply.extent, means));
                }
            }
            self.floor = Some(index);
        }
        let Some(leg) = self.legs.get_mut(index) else { return Ok(false) };
        leg.needed = 0;
        leg.closes |= reply.closes;
        (leg.reading, leg.says) = (Reading::of(reply.extent), says);
        if let Some(span) = means.rules.request.filter(|_| says) {
            self.set_alarm(means.now.wrapping_add(span));
        }
        self.note(index, reply.kind, answered, means);
        Ok(true)
    }

    /// The request of this leg and id.
    pub(super) fn answered_by(&self, index: usize, id: u64) -> Option<usize> {
        self.asked
            .iter()
            .position(|asked| asked.leg == index && asked.mark.id == id && asked.failure.is_none())
    }

    /// What follows from a frame that has begun.
    pub(super) fn note<H: Host>(
        &mut self,
        index: usize,
        kind: ReplyKind,
        answered: Option<usize>,
        means: &mut Means<'_, H>,
    ) {
        if let Some(asked) = answered.and_then(|at| self.asked.remove(at)) {
            means.picker.ended(asked.endpoint);
            means.host.count(Outcome::Answered);
            self.is_held &= !asked.mark.may_open;
            self.failures -= usize::from(asked.failure.is_some());
            if let Some(leg) = self.legs.get_mut(index) {
                let is_last = leg.closes || asked.mark.closes;
                leg.ends_all = self.protocol == Protocol::Http1 && is_last;
                leg.timeouts = 0;
                leg.waiting = leg.waiting.saturating_sub(1);
                leg.used_at = means.now;
            }
        }
        match (kind, self.legs.get_mut(index)) {
            (ReplyKind::Callback(mark) | ReplyKind::Push(mark), Some(leg)) => {
                (leg.channel, leg.blocked_since) = (Some(mark), None);
            }
            (ReplyKind::Open, Some(leg)) => {
                leg.ends_all = false;
                (self.reading, self.to) = (Reading::Rest, Some(index));
            }
            _ => {}
        }
    }

    /// What a leg asks could not be told from what another one has asked: it waits until that was
    /// answered, but not for long, because whatever is behind it waits too. True if it goes on.
    fn put_off<H: Host>(
        &mut self,
        (index, turn): (usize, Turn),
        mark: Mark,
        extent: Extent,
        means: &mut Means<'_, H>,
    ) -> bool {
        let Some(leg) = self.legs.get_mut(index) else { return false };
        let until = leg.blocked_since.get_or_insert(means.now).wrapping_add(means.rules.callback);
        if turn == Turn::Taken && until.wrapping_sub(means.now).cast_signed() > 0 {
            self.set_alarm(until);
            return false;
        }
        let is_broken = leg.is_broken; // Nobody would read it.
        let text = refusal(self.protocol, mark, Failure::Overload);
        if !is_broken && !self.tell_leg(index, text, means) {
            return false;
        }
        if let Some(leg) = self.legs.get_mut(index) {
            (leg.reading, leg.says, leg.needed) = (Reading::of(extent), false, 0);
            leg.blocked_since = None;
        }
        true
    }

    /// A frame of our own for a leg, only between two others; false if that must wait.
    pub(super) fn tell_leg<H: Host>(
        &mut self,
        index: usize,
        text: Text,
        means: &mut Means<'_, H>,
    ) -> bool {
        let is_amid = self.amid() == Some(index);
        let Some(leg) = self.legs.get_mut(index).filter(|_| !is_amid) else { return false };
        let before = leg.socket.outbox.bytes();
        leg.tie();
        let has_said = means.say(text, &mut leg.socket.outbox);
        leg.taken += u64::from(leg.socket.outbox.bytes() - before);
        if !has_said {
            self.look_again(means);
        }
        has_said
    }

    /// What comes now belongs to the leg's frame that has begun.
    fn pass_answer<H: Host>(
        &mut self,
        index: usize,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let Some(leg) = self.legs.get_mut(index) else { return Ok(false) };
        let Some(front) = means.pieces.front(leg.socket.inbox) else { return Ok(false) };
        let mut reading = leg.reading;
        let Ok(eaten) = reading.eat(means.host.bytes(front)) else {
            self.lose(index, Failure::Broken, means)?;
            return Ok(false);
        };
        if eaten < front.len && !means.pieces.can_divide() {
            self.look_again(means);
            return Ok(false);
        }
        leg.reading = reading;
        leg.used_at = means.now;
        if !leg.says {
            means.pieces.advance(&mut leg.socket.inbox, eaten);
        } else if !means.pieces.shift(&mut leg.socket.inbox, &mut self.client.outbox, eaten) {
            return Err(CloseReason::LocalLimit);
        }
        if leg.reading == Reading::Between {
            self.is_last |= std::mem::take(&mut leg.ends_all);
            if self.floor == Some(index) {
                self.floor = None;
            }
            self.begin_turn(index, means);
        }
        Ok(true)
    }
}

impl Exchange {
    /// In HTTP the time for a leg's next answer begins where the one before it ends.
    fn begin_turn<H: Host>(&mut self, index: usize, means: &Means<'_, H>) {
        if self.is_ordered()
            && let Some(next) = self.asked.iter_mut().find(|asked| asked.leg == index)
        {
            next.due = next.span.map(|span| means.now.wrapping_add(span));
        }
    }
}

impl Failure {
    pub(super) const fn outcome(self) -> Outcome {
        match self {
            Failure::Bad => Outcome::Bad,
            Failure::Broken => Outcome::Broken,
            Failure::NoEndpoint => Outcome::NoEndpoint,
            Failure::Overload => Outcome::Overload,
            Failure::Timeout => Outcome::Timeout,
            Failure::UnknownService => Outcome::UnknownService,
        }
    }
}
