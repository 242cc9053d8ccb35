// SPDX-License-Identifier: Apache-2.0
//! From the legs to the downstream: whole frames, one after the other.

use super::refusal::{Failure, heartbeat, refusal};
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
            let mut moved = self.refuse(means)?;
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
    fn refuse<H: Host>(&mut self, means: &mut Means<'_, H>) -> Result<bool, CloseReason> {
        if self.failures == 0 || self.floor.is_some() || self.is_last {
            return Ok(false);
        }
        let at = self.asked.iter().position(|asked| asked.failure.is_some());
        let Some(at) = at.filter(|at| *at == 0 || !self.is_ordered()) else { return Ok(false) };
        let Some(asked) = self.asked.remove(at) else { return Ok(false) };
        let Some(failure) = asked.failure else { return Ok(false) };
        self.failures -= 1;
        means.host.count(failure.outcome());
        self.is_last = self.is_ordered() && (asked.mark.closes || failure == Failure::Bad);
        self.say(refusal(self.protocol, asked.mark, failure), means)?;
        Ok(true)
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
        let is_amid = self.amid() == Some(index);
        let answered = match reply.kind {
            ReplyKind::Answer(_) if is_ordered => Some(0),
            ReplyKind::Open => Some(0),
            ReplyKind::Answer(id) => self.asked.iter().position(|asked| {
                asked.leg == index && asked.mark.id == id && asked.failure.is_none()
            }),
            _ => None,
        };
        let says = match reply.kind {
            // Nobody waits for it any more.
            ReplyKind::Answer(_) => answered.is_some(),
            ReplyKind::Heartbeat(_) if is_amid => return Ok(false),
            ReplyKind::Heartbeat(_) | ReplyKind::Nothing => false,
            ReplyKind::Before | ReplyKind::Callback(_) | ReplyKind::Open => true,
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
            self.floor = Some(index);
        }
        leg.needed = 0;
        leg.closes |= reply.closes;
        (leg.reading, leg.says) = (Reading::of(reply.extent), says);
        if let Some(span) = means.rules.request.filter(|_| says) {
            self.set_alarm(means.now.wrapping_add(span));
        }
        self.note(index, reply.kind, answered, means)?;
        Ok(true)
    }

    /// What follows from a frame that has begun.
    fn note<H: Host>(
        &mut self,
        index: usize,
        kind: ReplyKind,
        answered: Option<usize>,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        if let Some(asked) = answered.and_then(|at| self.asked.remove(at)) {
            means.picker.ended(asked.endpoint);
            means.host.count(Outcome::Answered);
            self.is_held &= !asked.mark.may_open;
            self.failures -= usize::from(asked.failure.is_some());
            if let Some(leg) = self.legs.get_mut(index) {
                (leg.ends_all, leg.timeouts) = (self.protocol == Protocol::Http1 && leg.closes, 0);
                leg.waiting = leg.waiting.saturating_sub(1);
                leg.used_at = means.now;
            }
        }
        match kind {
            ReplyKind::Callback(id) => self.remember(id, index),
            ReplyKind::Open => {
                (self.reading, self.to) = (Reading::Rest, Some(index));
                Ok(())
            }
            ReplyKind::Heartbeat(mark) => self.answer_leg(index, mark, means),
            _ => Ok(()),
        }
    }

    /// The downstream's answer to what this leg asks goes back there. Two legs that ask under the same
    /// id at once could not be told apart.
    fn remember(&mut self, id: u64, index: usize) -> Result<(), CloseReason> {
        self.callbacks.retain(|(other, leg)| *other != id || *leg != index);
        let is_known = self.callbacks.iter().any(|(other, _)| *other == id);
        if is_known || self.callbacks.len() >= CALLBACKS_MAX {
            return Err(CloseReason::ProtocolError);
        }
        self.callbacks.push((id, index));
        Ok(())
    }

    fn answer_leg<H: Host>(
        &mut self,
        index: usize,
        mark: Mark,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        let text = heartbeat(self.protocol, mark);
        let segment = means.host.write(text.as_bytes()).ok_or(CloseReason::LocalLimit)?;
        let Some(leg) = self.legs.get_mut(index) else { return Ok(()) };
        leg.taken += u64::from(segment.len);
        leg.socket.outbox.take_in(segment, means.pieces)
    }

    /// What comes now belongs to the leg's frame that has begun.
    fn pass_answer<H: Host>(
        &mut self,
        index: usize,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let Some(leg) = self.legs.get_mut(index) else { return Ok(false) };
        let Some(front) = means.pieces.front(leg.socket.inbox) else { return Ok(false) };
        let Ok(eaten) = leg.reading.eat(means.host.bytes(front)) else {
            self.lose(index, Failure::Broken, means)?;
            return Ok(false);
        };
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
        }
        Ok(true)
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

/// What upstreams may ask of one downstream at a time.
const CALLBACKS_MAX: usize = 64;
