// SPDX-License-Identifier: Apache-2.0
//! The upstream connections of one exchange.
//!
//! Invariant: a leg keeps its index for as long as it lives, and its slot until its socket was closed.

use std::net::SocketAddr;

use super::refusal::Failure;
use super::socket::Socket;
use super::speech::{Mark, Reading};
use super::{EAGAIN, ECANCELED, EINTR, ENOBUFS, Exchange, Host, Means, sent};
use crate::op::{CloseReason, Completion, Errno, FlowId, Op, Side};
use crate::service::{EndpointId, Pick, ServiceId};

/// An upstream connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leg {
    addr: SocketAddr,
    /// What it asks must wait, since then.
    pub(super) blocked_since: Option<u32>,
    /// How it has last spoken of its own accord: whoever does may do it again.
    pub(super) channel: Option<Mark>,
    /// When it must be connected, at the latest.
    due: u32,
    /// It takes no more requests.
    pub(super) closes: bool,
    pub(super) endpoint: EndpointId,
    /// The answer that is being passed on is the last thing the downstream gets.
    pub(super) ends_all: bool,
    heard: u64,
    /// Counted as open at it, as long as the leg lives.
    holds: EndpointId,
    pub(super) is_broken: bool,
    /// What its inbox begins with is not complete.
    pub(super) is_cut: bool,
    /// Bytes that must be there before it is worth looking at its inbox again.
    pub(super) needed: u32,
    pub(super) reading: Reading,
    redials: u8,
    /// The frame that it is in the middle of is for the downstream.
    pub(super) says: bool,
    /// Bytes that its socket has taken.
    pub(super) sent: u64,
    pub(super) service: ServiceId,
    pub(super) slot: FlowId,
    pub(super) socket: Socket,
    state: State,
    /// Bytes that ever went into its outbox.
    pub(super) taken: u64,
    /// What went in then and last is for this connection, and no other.
    tied_at: Option<u64>,
    /// Answers that did not come in time, in a row.
    pub(super) timeouts: u8,
    pub(super) used_at: u32,
    /// Requests that it has not answered.
    pub(super) waiting: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Waiting for what is in flight to end.
    Closing {
        /// What it has not sent yet goes to another endpoint.
        again: bool,
    },
    Dialling,
    Open,
}

/// A leg as it is shown and dialled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Line {
    /// What is dialled.
    pub addr: SocketAddr,
    /// Bytes that came from it.
    pub heard: u64,
    /// Bytes that its socket has taken.
    pub sent: u64,
    /// Its place, and the ring's for its socket.
    pub slot: FlowId,
}

/// The legs of one exchange, by index.
#[derive(Debug, Default)]
pub(super) struct Legs {
    list: Vec<Option<Leg>>,
}

impl Leg {
    pub(super) const fn line(&self) -> Line {
        Line { addr: self.addr, heard: self.heard, sent: self.sent, slot: self.slot }
    }

    /// It has a whole connection, until it is closed.
    pub(super) fn hold(&mut self, endpoint: EndpointId) {
        self.holds = endpoint;
        self.waiting += 1;
    }

    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    pub(super) const fn is_dialling(&self) -> bool {
        matches!(self.state, State::Dialling)
    }

    /// It may get a request.
    fn is_usable(&self) -> bool {
        let lives = matches!(self.state, State::Dialling | State::Open);
        lives && !self.closes && !self.is_broken && !self.socket.has_ended()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting == 0 && self.reading == Reading::Between && self.socket.is_flushed()
    }

    /// Its next frame is there, and it is not its turn.
    pub(super) fn has_to_wait(&self) -> bool {
        self.reading == Reading::Between && !self.socket.inbox.is_empty() && !self.is_cut
    }

    pub(super) const fn due(&self) -> u32 {
        self.due
    }

    /// What goes in next must not go elsewhere.
    pub(super) const fn tie(&mut self) {
        self.tied_at = Some(self.taken);
    }

    /// What waits in its outbox from there on means the same to any endpoint.
    pub(super) fn is_free_from(&self, at: u64) -> bool {
        self.tied_at.is_none_or(|tied| tied < at)
    }

    /// Where it is tried again, another endpoint is left to try.
    pub(super) fn may_redial(&self) -> bool {
        self.redials < REDIALS_MAX
    }

    /// Ends what is in flight; the socket is closed once all of it has ended.
    pub(super) fn begin_close<H: Host>(&mut self, again: bool, means: &mut Means<'_, H>) {
        self.state = State::Closing { again };
        let cancels = self.socket.cancels();
        cancels.into_iter().flatten().for_each(|op| means.wish(self.slot, op));
    }

    fn dial<H: Host>(&mut self, pick: Pick, means: &mut Means<'_, H>) {
        (self.addr, self.endpoint) = (pick.addr, pick.endpoint);
        self.due = means.now.wrapping_add(means.rules.connect);
        self.state = State::Dialling;
        self.socket.dial();
        means.wish(self.slot, Op::Connect);
    }
}

impl Exchange {
    /// One more leg; `None` if there is no room for it, or no slot.
    pub(super) fn dial<H: Host>(
        &mut self,
        service: ServiceId,
        pick: Pick,
        means: &mut Means<'_, H>,
    ) -> Option<usize> {
        if !self.legs.has_room() {
            // Whoever has nothing to do makes room; but not at once.
            let amid = self.amid();
            let idle = self
                .legs
                .iter()
                .filter(|(index, leg)| leg.is_open() && leg.is_idle() && Some(*index) != amid);
            let idle = idle.min_by_key(|(_, leg)| (leg.channel.is_some(), leg.used_at));
            if let Some(index) = idle.map(|(index, _)| index) {
                self.close_leg(index, false, means);
            }
        }
        let index = self.legs.vacancy()?;
        let is_own = self.legs.find(self.head).is_none();
        let slot = if is_own { self.head } else { means.host.slot(self.head)? };
        let mut leg = Leg {
            addr: pick.addr,
            blocked_since: None,
            channel: None,
            closes: false,
            due: 0,
            endpoint: pick.endpoint,
            ends_all: false,
            heard: 0,
            holds: EndpointId::NONE,
            is_broken: false,
            is_cut: false,
            needed: 0,
            reading: Reading::Between,
            redials: 0,
            says: false,
            sent: 0,
            service,
            slot,
            socket: Socket::new(Side::Upstream),
            state: State::Dialling,
            taken: 0,
            tied_at: None,
            timeouts: 0,
            used_at: means.now,
            waiting: 0,
        };
        leg.dial(pick, means);
        self.set_alarm(leg.due);
        self.legs.put(index, leg);
        Some(index)
    }

    /// What happened on a leg's socket.
    pub(super) fn take_leg<H: Host>(
        &mut self,
        index: usize,
        completion: Completion,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        let Some(leg) = self.legs.get_any(index) else { return Ok(()) };
        self.active = means.now;
        match completion {
            Completion::Connected(result) => {
                leg.socket.dialled();
                return self.dialled(index, result, means);
            }
            Completion::Received { result, more, .. } => {
                if !more {
                    leg.socket.received();
                }
                match result {
                    Ok(Some(segment)) if leg.is_open() => {
                        let waits = leg.reading == Reading::Between;
                        leg.heard += u64::from(segment.len);
                        return leg.socket.store(waits, segment, means);
                    }
                    Ok(Some(segment)) => means.pieces.free(segment.buffer),
                    Ok(None) => leg.socket.ended(),
                    Err(Errno(ENOBUFS)) if leg.is_open() => {
                        let op = leg.socket.starve();
                        means.wish(leg.slot, op);
                    }
                    Err(Errno(ENOBUFS | ECANCELED | EAGAIN | EINTR)) => {}
                    Err(_) => {
                        leg.is_broken = true;
                        leg.socket.ended();
                    }
                }
            }
            Completion::Sent { result, .. } => {
                let bytes = sent(result);
                // Its answer may have come before it broke: the receive says when that is read.
                if bytes.is_err() {
                    leg.is_broken = true;
                    leg.socket.shut();
                }
                let bytes = bytes.unwrap_or(0);
                leg.sent += u64::from(bytes);
                leg.socket.sent(bytes, means.pieces);
                means.host.moved(Side::Downstream, bytes);
            }
            _ => leg.socket.feed(),
        }
        Ok(())
    }

    /// A dial has ended.
    fn dialled<H: Host>(
        &mut self,
        index: usize,
        result: Result<(), Errno>,
        means: &mut Means<'_, H>,
    ) -> Result<(), CloseReason> {
        let Some(leg) = self.legs.get_any(index) else { return Ok(()) };
        match (leg.state, result) {
            (State::Dialling, Ok(())) => {
                leg.state = State::Open;
                means.picker.connected(leg.endpoint);
                Ok(())
            }
            (State::Dialling, Err(errno)) => {
                let is_local = CloseReason::of_connect(errno) == CloseReason::LocalLimit;
                if !is_local && means.picker.failed(leg.endpoint, means.instant) {
                    means.host.ejected();
                }
                self.lose(index, Failure::NoEndpoint, means)
            }
            _ => Ok(()),
        }
    }

    /// Closes legs whose peer has ended, that nobody needs, or that wait for it; true if something
    /// changed.
    pub(super) fn tend_legs<H: Host>(
        &mut self,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let mut changed = false;
        for index in 0..self.legs.len() {
            changed |= self.tend(index, means)?;
            if self.legs.close_quiet(index, true, means) {
                changed = true;
                self.dial_again(index, means);
            }
        }
        Ok(changed)
    }

    /// Ends a leg; with `again` what it has not sent goes to another endpoint.
    pub(super) fn close_leg<H: Host>(
        &mut self,
        index: usize,
        again: bool,
        means: &mut Means<'_, H>,
    ) {
        self.callbacks.leave(index);
        if let Some(leg) = self.legs.get_mut(index) {
            leg.begin_close(again, means);
        }
    }

    fn tend<H: Host>(
        &mut self,
        index: usize,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let is_amid = self.amid() == Some(index);
        let Some(leg) = self.legs.get_mut(index).filter(|leg| leg.is_open()) else {
            return Ok(false);
        };
        let is_over = leg.socket.has_ended() && (leg.socket.inbox.is_empty() || leg.is_cut);
        let is_free = leg.reading == Reading::Between && leg.socket.inbox.is_empty();
        match (is_over, leg.reading) {
            (true, Reading::Rest) if leg.is_broken => return Err(CloseReason::UpstreamReset),
            (true, Reading::Rest) => {
                // The end of the answer is the end of the connection, on both sides.
                self.is_last = true;
                self.floor = None;
                self.close_leg(index, false, means);
            }
            (true, _) if leg.waiting == 0 && is_free && !is_amid => {
                self.close_leg(index, false, means);
            }
            (true, _) => self.lose(index, Failure::Broken, means)?,
            (false, _) if leg.closes && leg.is_idle() && is_free && !is_amid => {
                self.close_leg(index, false, means);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// A leg whose socket was closed tries another endpoint with what it has not sent.
    fn dial_again<H: Host>(&mut self, index: usize, means: &mut Means<'_, H>) {
        let Some(leg) = self.legs.get_any(index) else { return };
        let pick = means.picker.pick(leg.service, self.key, means.instant);
        if let Some(pick) = pick {
            // Its requests are counted where they were first meant to go.
            means.picker.ended(pick.endpoint);
        }
        let Some(pick) = pick.filter(|pick| !pick.is_last_resort || leg.redials == 0) else {
            self.fail_leg(index, Failure::NoEndpoint, means);
            return self.legs.remove(index, means);
        };
        leg.redials += 1;
        leg.dial(pick, means);
        let due = leg.due;
        self.set_alarm(due);
    }
}

impl Legs {
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.iter().all(Option::is_none)
    }

    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Leg)> {
        self.list.iter().enumerate().filter_map(|(index, leg)| Some((index, leg.as_ref()?)))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut Leg)> {
        self.list.iter_mut().enumerate().filter_map(|(index, leg)| Some((index, leg.as_mut()?)))
    }

    /// A leg that is not closing.
    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Leg> {
        self.get_any(index).filter(|leg| !matches!(leg.state, State::Closing { .. }))
    }

    /// A leg that goes on, perhaps with another endpoint: what comes for it is kept.
    pub(super) fn get_lasting(&mut self, index: usize) -> Option<&mut Leg> {
        self.get_any(index).filter(|leg| !matches!(leg.state, State::Closing { again: false }))
    }

    pub(super) fn get_any(&mut self, index: usize) -> Option<&mut Leg> {
        self.list.get_mut(index)?.as_mut()
    }

    pub(super) fn find(&self, slot: FlowId) -> Option<(usize, &Leg)> {
        self.iter().find(|(_, leg)| leg.slot == slot)
    }

    pub(super) fn of_endpoint(&self, endpoint: EndpointId) -> Option<usize> {
        let mut usable = self.iter().filter(|(_, leg)| leg.is_usable());
        usable.find(|(_, leg)| leg.endpoint == endpoint).map(|(index, _)| index)
    }

    pub(super) fn of_service(&self, service: ServiceId) -> usize {
        self.iter().filter(|(_, leg)| leg.service == service && leg.is_usable()).count()
    }

    /// The leg of `service` with the fewest requests whose endpoint is still in use.
    pub(super) fn freest<H: Host>(
        &self,
        service: ServiceId,
        means: &Means<'_, H>,
    ) -> Option<usize> {
        let usable = self.iter().filter(|(_, leg)| {
            leg.service == service
                && leg.is_usable()
                && means.picker.is_in_use(service, leg.endpoint, means.instant)
        });
        usable.min_by_key(|(_, leg)| leg.waiting).map(|(index, _)| index)
    }

    /// All of them have sent what they got.
    pub(super) fn are_flushed(&self) -> bool {
        self.iter().all(|(_, leg)| leg.socket.is_flushed())
    }

    /// Below what is wanted; those that are closing may still be there.
    pub(super) fn has_room(&self) -> bool {
        let living = self.iter().filter(|(_, leg)| !matches!(leg.state, State::Closing { .. }));
        living.count() < LEGS_MAX
    }

    fn vacancy(&mut self) -> Option<usize> {
        let vacant = self.list.iter().position(Option::is_none);
        let next = Some(self.list.len()).filter(|next| *next < LEGS_MAX + LEGS_CLOSING_MAX);
        vacant.or(next)
    }

    fn put(&mut self, index: usize, leg: Leg) {
        match self.list.get_mut(index) {
            Some(place) => *place = Some(leg),
            None => self.list.push(Some(leg)),
        }
    }

    /// Closes the socket of a leg that is closing and has nothing in flight; true if it is to be tried
    /// again. If not, it is no more.
    pub(super) fn close_quiet<H: Host>(
        &mut self,
        index: usize,
        reset: bool,
        means: &mut Means<'_, H>,
    ) -> bool {
        let Some(leg) = self.get_any(index) else { return false };
        let State::Closing { again } = leg.state else { return false };
        if !leg.socket.is_quiet() {
            return false;
        }
        means.wish(leg.slot, Op::Close { side: Side::Upstream, reset: reset && !leg.is_idle() });
        means.pieces.clear(&mut leg.socket.inbox);
        if again {
            (leg.closes, leg.is_broken, leg.is_cut, leg.needed) = (false, false, false, 0);
            (leg.blocked_since, leg.channel) = (None, None);
            leg.socket = leg.socket.anew();
            return true;
        }
        self.remove(index, means);
        false
    }

    fn remove<H: Host>(&mut self, index: usize, means: &mut Means<'_, H>) {
        if let Some(mut leg) = self.list.get_mut(index).and_then(Option::take) {
            means.picker.ended(leg.holds);
            leg.socket.clear(means.pieces);
        }
    }
}

/// Upstream connections of one downstream.
const LEGS_MAX: usize = 16;
/// Besides, those that are about to go.
const LEGS_CLOSING_MAX: usize = 8;
/// Endpoints tried for what one leg holds.
const REDIALS_MAX: u8 = 32;
