// SPDX-License-Identifier: Apache-2.0
//! Legs that break, answers that do not come in time, and who has to be told.

use super::refusal::{Failure, probe};
use super::speech::Reading;
use super::{Exchange, Host, Means, NOWHERE};
use crate::op::CloseReason;
use crate::service::EndpointId;
use crate::wire::detect::Protocol;

impl Exchange {
    /// A leg can go on no more. What it has not begun to send goes elsewhere, if that is possible; the
    /// rest has failed.
    pub(super) fn lose<H: Host>(
        &mut self,
        index: usize,
        failure: Failure,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        if self.floor == Some(index) {
            return Err(CloseReason::UpstreamReset); // Half a frame cannot be taken back.
        }
        let is_amid = self.amid() == Some(index);
        let Some(leg) = self.legs.get_mut(index) else { return Ok(()) };
        let (was_dialling, sent) = (leg.is_dialling(), leg.sent);
        // What is with the kernel just now counts as sent.
        let is_known = !leg.socket.is_sending();
        let may_redial = leg.may_redial() && failure != Failure::Timeout;
        let endpoint = leg.endpoint;
        let is_fresh = |asked: &super::Asked| {
            asked.leg == index && asked.failure.is_none() && asked.starts_at >= sent
        };
        let first = self.asked.iter().find(|asked| is_fresh(asked)).map(|asked| asked.starts_at);
        let first = first.filter(|first| !is_amid && is_known && leg.is_free_from(*first));
        let holds = if was_dialling { Some(sent) } else { first };
        let Some(kept_from) = holds.filter(|_| may_redial) else {
            if failure != Failure::Timeout {
                self.note_broken(index, was_dialling, endpoint, means);
            }
            self.fail_leg(index, failure, means);
            self.close_leg(index, false, means);
            return Ok(());
        };
        self.note_broken(index, was_dialling, endpoint, means);
        self.fail_if(index, failure, |asked| asked.starts_at < kept_from, means);
        if let Some(leg) = self.legs.get_mut(index) {
            let gone = u32::try_from(kept_from - leg.sent).unwrap_or(u32::MAX);
            means.pieces.advance(&mut leg.socket.outbox, gone);
            (leg.sent, leg.reading, leg.says) = (kept_from, Reading::Between, false);
        }
        self.close_leg(index, true, means);
        Ok(())
    }

    /// An upstream that broke with requests in its hands is out of use for a while.
    fn note_broken<H: Host>(
        &mut self,
        index: usize,
        was_dialling: bool,
        endpoint: EndpointId,
        means: &mut Means<'_, H>,
    ) {
        let is_owed = |asked: &super::Asked| asked.leg == index && asked.failure.is_none();
        if !was_dialling
            && self.asked.iter().any(is_owed)
            && means.picker.failed(endpoint, means.instant)
        {
            means.host.ejected();
        }
    }

    /// Nothing that this leg has got will be answered.
    pub(super) fn fail_leg<H: Host>(
        &mut self,
        index: usize,
        failure: Failure,
        means: &mut Means<'_, H>,
    ) {
        self.fail_if(index, failure, |_| true, means);
        self.callbacks.leave(index);
        if self.to == Some(index) {
            (self.to, self.uploads) = (None, false);
        }
    }

    fn fail_if<H: Host>(
        &mut self,
        index: usize,
        failure: Failure,
        has_failed: impl Fn(&super::Asked) -> bool,
        means: &mut Means<'_, H>,
    ) {
        let mut failed = 0;
        for asked in &mut self.asked {
            if asked.leg == index && asked.failure.is_none() && has_failed(asked) {
                (asked.failure, asked.leg) = (Some(failure), NOWHERE);
                failed += 1;
                means.picker.ended(std::mem::replace(&mut asked.endpoint, EndpointId::NONE));
                // Whether the connection turns into something else is decided now.
                self.is_held &= !asked.mark.may_open;
            }
        }
        self.failures += failed;
        if let Some(leg) = self.legs.get_any(index) {
            leg.waiting = leg.waiting.saturating_sub(u32::try_from(failed).unwrap_or(u32::MAX));
        }
    }

    /// Looks at everything that has a time, and says when the next look is due.
    pub(super) fn expire<H: Host>(&mut self, means: &mut Means<'_, H>) -> Result<(), CloseReason> {
        let now = means.now;
        let is_over = |at: u32| at.wrapping_sub(now).cast_signed() <= 0;
        self.expire_requests(is_over, means)?;
        self.expire_legs(is_over, means)?;
        // Who is not listened to, or has said enough, is not late.
        let is_heard = self.client.inbox.bytes() >= self.needed;
        let since = self.client.listens_since().filter(|_| !is_heard).unwrap_or(now);
        self.hanging = self.hanging.map(|hanging| later(hanging, since));
        let hanging = self.hanging.map(|since| since.wrapping_add(means.rules.head));
        let idle = means.rules.idle.map(|idle| self.active.wrapping_add(idle));
        if hanging.is_some_and(is_over) || idle.is_some_and(is_over) {
            return Err(CloseReason::IdleTimeout);
        }
        // Half a frame keeps everybody waiting; in HTTP nobody waits that would not have to anyway.
        let stalled = self.floor_since(now).zip(means.rules.request);
        let stalled = stalled.map(|(since, span)| since.wrapping_add(span));
        if stalled.is_some_and(is_over) {
            return Err(CloseReason::UpstreamReset);
        }
        self.alarm = None;
        let asked = self.asked.iter().filter(|asked| asked.failure.is_none());
        let asked = asked.filter_map(|asked| asked.due).min_by_key(|due| due.wrapping_sub(now));
        [hanging, idle, stalled, asked].into_iter().flatten().for_each(|at| self.set_alarm(at));
        for index in 0..self.legs.len() {
            let Some(leg) = self.legs.get_mut(index) else { continue };
            let idle = leg.used_at.wrapping_add(means.rules.leg_idle);
            let at = if leg.is_dialling() { leg.due() } else { idle };
            if !is_over(at) {
                self.set_alarm(at);
            }
        }
        Ok(())
    }

    /// When the leg whose frame is on its way has last said something, or is listened to since.
    fn floor_since(&mut self, now: u32) -> Option<u32> {
        let is_shared = matches!(self.protocol, Protocol::Bolt | Protocol::Dubbo);
        let leg = self.legs.get_mut(self.floor?)?;
        if leg.socket.is_starved() {
            return Some(leg.used_at); // Whoever waits for its turn may have the buffers.
        }
        if !is_shared {
            return None;
        }
        let since = leg.socket.listens_since().filter(|_| leg.socket.inbox.is_empty());
        Some(later(leg.used_at, since.unwrap_or(now)))
    }

    /// It is this request's turn, and its leg could say so, and does not.
    fn is_late(&self, at: usize) -> bool {
        let Some(asked) = self.asked.get(at) else { return false };
        let Some((_, leg)) = self.legs.iter().find(|(index, _)| *index == asked.leg) else {
            return false;
        };
        if !leg.is_open() {
            return true;
        }
        let is_next = self.protocol != Protocol::Http1
            || self.asked.iter().position(|other| other.leg == asked.leg) == Some(at);
        let is_silent = !leg.has_to_wait();
        let client = &self.client;
        let waits_for_rest = self.uploads
            && at + 1 == self.asked.len()
            && client.inbox.is_empty()
            && client.listens_since().is_some();
        // Where there are no buffers, whoever waits must make room in the end.
        let is_listened_to = leg.socket.listens_since().is_some() || leg.socket.is_starved();
        is_next && leg.reading == Reading::Between && is_silent && is_listened_to && !waits_for_rest
    }

    fn expire_requests<H: Host>(
        &mut self,
        is_over: impl Fn(u32) -> bool,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        for at in 0..self.asked.len() {
            let Some(asked) = self.asked.get_mut(at) else { break };
            if asked.failure.is_some() || !asked.due.is_some_and(&is_over) {
                continue;
            }
            let (index, mark, endpoint) = (asked.leg, asked.mark, asked.endpoint);
            if !self.is_late(at) {
                if let Some(asked) = self.asked.get_mut(at) {
                    asked.due = asked.span.map(|span| means.now.wrapping_add(span));
                }
                continue;
            }
            let Some(leg) = self.legs.get_any(index) else { continue };
            let missed = u8::from(!leg.socket.is_starved());
            leg.timeouts = leg.timeouts.saturating_add(missed);
            if leg.timeouts >= TIMEOUTS_MAX && means.picker.failed(endpoint, means.instant) {
                means.host.ejected();
            }
            if self.protocol == Protocol::Http1 {
                // Its answer could come any time, in the place of the next one.
                self.lose(index, Failure::Timeout, means)?;
                continue;
            }
            self.fail_if(index, Failure::Timeout, |asked| asked.mark == mark, means);
        }
        Ok(())
    }

    fn expire_legs<H: Host>(
        &mut self,
        is_over: impl Fn(u32) -> bool,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        for index in 0..self.legs.len() {
            let is_amid = self.amid() == Some(index);
            let Some(leg) = self.legs.get_mut(index) else { continue };
            let is_unused = is_over(leg.used_at.wrapping_add(means.rules.leg_idle));
            if leg.is_dialling() && is_over(leg.due()) {
                if means.picker.failed(leg.endpoint, means.instant) {
                    means.host.ejected();
                }
                self.lose(index, Failure::NoEndpoint, means)?;
            } else if leg.is_open() && leg.is_idle() && is_unused && !is_amid {
                self.leave_unused(index, means);
            }
        }
        Ok(())
    }
}

impl Exchange {
    /// Nobody uses a leg; but one that speaks of its own accord is kept, and its server kept awake.
    fn leave_unused<H: Host>(&mut self, index: usize, means: &mut Means<'_, H>) {
        let channel = self.legs.get_mut(index).and_then(|leg| leg.channel);
        let Some(mark) = channel else { return self.close_leg(index, false, means) };
        if self.tell_leg(index, probe(self.protocol, mark), means)
            && let Some(leg) = self.legs.get_mut(index)
        {
            leg.used_at = means.now;
        }
    }
}

/// The later of two ticks.
const fn later(one: u32, other: u32) -> u32 {
    if other.wrapping_sub(one).cast_signed() > 0 { other } else { one }
}

/// So many answers in a row that do not come in time put an endpoint out of use.
const TIMEOUTS_MAX: u8 = 3;
