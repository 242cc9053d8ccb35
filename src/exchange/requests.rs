// SPDX-License-Identifier: Apache-2.0
//! From the downstream to the legs: each request whole to an endpoint of its own service.

use super::refusal::{Failure, heartbeat};
use super::speech::{self, Ask, AskKind, Reading};
use super::{Asked, Exchange, Host, Means, NOWHERE, TICKS_MAX};
use crate::metrics::Outcome;
use crate::op::CloseReason;
use crate::service::{EndpointId, ServiceId};
use crate::wire::Stop;
use crate::wire::detect::Protocol;

impl Exchange {
    /// As far as it goes; false if nothing could be done.
    pub(super) fn read_requests<H: Host>(
        &mut self,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let mut moved = false;
        while !self.client.inbox.is_empty() {
            let goes_on = match self.reading {
                Reading::Between => self.begin_request(means)?,
                _ => self.pass_request(means)?,
            };
            if !goes_on {
                break;
            }
            moved = true;
        }
        if self.reading != Reading::Between
            && self.reading != Reading::Rest
            && self.client.has_ended()
            && self.client.inbox.is_empty()
        {
            // Half a request that went out cannot be taken back.
            return Err(CloseReason::DownstreamReset);
        }
        Ok(moved)
    }

    /// Looks who the next frame is for.
    fn begin_request<H: Host>(&mut self, means: &mut Means<'_, H>) -> Result<bool, CloseReason> {
        if !self.takes_requests(means) {
            return Ok(false);
        }
        if self.guard.is_some() {
            return self.begin_frame(means);
        }
        if self.pass_whole_requests(means)? {
            return Ok(true);
        }
        let (protocol, called) = (self.protocol, self.called);
        let ask = means.read(self.client.inbox, |bytes, picker| {
            speech::ask(protocol, bytes, called, picker.table())
        });
        let ask = match ask {
            Ok(ask) => ask,
            Err(Stop::NeedMore(needed)) => {
                self.wait_for(needed, means);
                return Ok(false);
            }
            Err(Stop::Bad(_) | Stop::NotMine) => return self.misunderstand(means),
        };
        // It is there: what keeps it from going on is ours.
        (self.hanging, self.needed) = (None, 0);
        if ask.kind == AskKind::Heartbeat {
            // Our answer must not get into somebody's frame.
            let has_said =
                self.floor.is_none() && self.say(heartbeat(self.protocol, ask.mark), means);
            if !has_said {
                return Ok(false);
            }
        }
        self.to = self.target(ask, means);
        self.reading = Reading::of(ask.extent);
        self.uploads = matches!(ask.kind, AskKind::Request(_)) && self.to.is_some();
        self.is_held = ask.mark.may_open && self.to.is_some();
        self.has_asked_last |= ask.mark.closes;
        Ok(true)
    }

    /// The front of the inbox is of no use before so many bytes are there, and not for ever.
    pub(super) fn wait_for<H: Host>(&mut self, needed: usize, means: &mut Means<'_, H>) {
        self.needed = u32::try_from(needed).unwrap_or(u32::MAX);
        if self.hanging.is_none() {
            self.hanging = Some(means.now);
            self.set_alarm(means.now.wrapping_add(means.rules.head));
        }
    }

    fn takes_requests<H: Host>(&self, means: &Means<'_, H>) -> bool {
        let most = means.rules.pieces_max;
        let waiting = self.legs.iter().map(|(_, leg)| leg.socket.outbox.count()).sum::<u32>();
        !self.is_last
            && !self.is_held
            && !self.has_asked_last
            && self.asked.len() < ASKED_MAX
            && self.client.inbox.bytes() >= self.needed
            && self.client.outbox.count() < most
            && waiting < most
    }

    /// The leg that gets the frame; `None` for nobody.
    fn target<H: Host>(&mut self, ask: Ask, means: &mut Means<'_, H>) -> Option<usize> {
        match ask.kind {
            AskKind::Heartbeat | AskKind::Nothing => None,
            AskKind::Answer => {
                let leg = self.callbacks.answered(ask.mark.id)?;
                self.legs.get_mut(leg)?.tie();
                Some(leg)
            }
            AskKind::OneWay(service) => {
                let chosen = self.choose_known(service, means);
                if let Ok((_, endpoint)) = chosen {
                    means.picker.ended(endpoint);
                }
                means.host.count(chosen.map_or_else(Failure::outcome, |_| Outcome::OneWay));
                chosen.ok().map(|(leg, _)| leg)
            }
            AskKind::Request(service) => {
                let chosen = self.choose_known(service, means);
                self.enter(ask, chosen, means)
            }
        }
    }

    /// Remembers a request until it is answered.
    pub(super) fn enter<H: Host>(
        &mut self,
        ask: Ask,
        chosen: Result<(usize, EndpointId), Failure>,
        means: &mut Means<'_, H>,
    ) -> Option<usize> {
        let span = ask.timeout_ms.map_or(means.rules.request, |millis| {
            Some(millis.div_ceil(means.rules.tick_ms).clamp(1, TICKS_MAX))
        });
        let due = span.map(|span| means.now.wrapping_add(span));
        let (leg, endpoint) = chosen.unwrap_or((NOWHERE, EndpointId::NONE));
        let starts_at = self.legs.get_mut(leg).map_or(0, |leg| {
            leg.waiting += 1;
            leg.taken
        });
        let failure = chosen.err();
        self.failures += usize::from(failure.is_some());
        let mark = ask.mark;
        self.asked.push_back(Asked { due, endpoint, failure, leg, mark, span, starts_at });
        if let Some(due) = due.filter(|_| failure.is_none()) {
            self.set_alarm(due);
        }
        failure.is_none().then_some(leg)
    }

    pub(super) fn choose_known<H: Host>(
        &mut self,
        service: Option<ServiceId>,
        means: &mut Means<'_, H>,
    ) -> Result<(usize, EndpointId), Failure> {
        self.choose(service.ok_or(Failure::UnknownService)?, means)
    }

    /// A leg to the endpoint whose turn it is; where there are enough legs, one of them.
    fn choose<H: Host>(
        &mut self,
        service: ServiceId,
        means: &mut Means<'_, H>,
    ) -> Result<(usize, EndpointId), Failure> {
        let pick =
            means.picker.pick(service, self.key, means.instant).ok_or(Failure::NoEndpoint)?;
        let there = self.legs.of_endpoint(pick.endpoint);
        let leg = there.or_else(|| {
            let has_enough = self.legs.of_service(service) >= LEGS_PER_SERVICE_MAX;
            let is_full = has_enough || !self.legs.has_room();
            let other = if is_full { self.legs.freest(service, means) } else { None };
            other.or_else(|| self.dial(service, pick, means))
        });
        if leg.is_none() {
            means.picker.ended(pick.endpoint);
        }
        Ok((leg.ok_or(Failure::Overload)?, pick.endpoint))
    }

    /// What comes now belongs to the frame that has begun.
    fn pass_request<H: Host>(&mut self, means: &mut Means<'_, H>) -> Result<bool, CloseReason> {
        let Some(front) = means.pieces.front(self.client.inbox) else { return Ok(false) };
        let mut reading = self.reading;
        let Ok(eaten) = reading.eat(means.host.bytes(front)) else {
            return self.misunderstand(means);
        };
        if eaten < front.len && !means.pieces.can_divide() {
            self.look_again(means);
            return Ok(false);
        }
        self.reading = reading;
        self.restart_time(means);
        let Some(leg) = self.to.and_then(|leg| self.legs.get_lasting(leg)) else {
            means.pieces.advance(&mut self.client.inbox, eaten);
            return Ok(true);
        };
        leg.taken += u64::from(eaten);
        let fits = means.pieces.shift(&mut self.client.inbox, &mut leg.socket.outbox, eaten);
        if fits { Ok(true) } else { Err(CloseReason::LocalLimit) }
    }

    /// The time for an answer begins with the last byte of its request.
    fn restart_time<H: Host>(&mut self, means: &Means<'_, H>) {
        if let Some(asked) = self.asked.back_mut().filter(|_| self.uploads) {
            asked.due = asked.span.map(|span| means.now.wrapping_add(span));
        }
        self.uploads &= self.reading != Reading::Between;
    }

    /// Where the next frame begins is not known any more: HTTP is told so, when it is its turn; in the
    /// other protocols nobody could be told which request is meant.
    fn misunderstand<H: Host>(&mut self, means: &mut Means<'_, H>) -> Result<bool, CloseReason> {
        if self.protocol != Protocol::Http1 || self.reading != Reading::Between {
            means.host.count(Outcome::Bad);
            return Err(CloseReason::ProtocolError);
        }
        self.hanging = None;
        self.failures += 1;
        self.asked.push_back(Asked {
            due: None,
            endpoint: EndpointId::NONE,
            failure: Some(Failure::Bad),
            leg: NOWHERE,
            mark: speech::Mark::default(),
            span: None,
            starts_at: 0,
        });
        (self.reading, self.to) = (Reading::Rest, None);
        Ok(true)
    }
}

/// Of one downstream at a time; more wait in its socket.
pub(super) const ASKED_MAX: usize = 1024;
/// Upstream connections of one downstream to one service: enough to spread its requests, few enough
/// that a thousand downstreams do not each dial every endpoint.
const LEGS_PER_SERVICE_MAX: usize = 8;
