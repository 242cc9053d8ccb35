// SPDX-License-Identifier: Apache-2.0
//! When a flow must be looked at next, and what is done then.
//!
//! Invariant: the timer of a flow's slot stands no later than the first of its reasons. It may stand
//! earlier: timers are set once and looked at when they run out, because bytes move far more often.

use std::time::Duration;

use super::slab::{Entry, Times};
use super::turn::Worker;
use super::wheel::{Clock, Wheel};
use crate::op::{Completion, FlowId, Kind, Side, Timer, Token};
use crate::profile::Timeouts;
use crate::ring::Event;

/// The profile's timeouts in ticks; `None` for never.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimerTicks {
    connect: u32,
    /// How long a flow may have a deaf side before it is watched.
    deaf: u32,
    half_closed: u32,
    idle: Option<u32>,
    /// The age at which a flow is kept alive; `None` where none is.
    lasting: Option<u32>,
}

impl Worker {
    /// What has run out: a flow that moved bytes since gets the rest of its time, and so does one
    /// that was not deaf all the while.
    pub(super) fn expire(&mut self) {
        let now = self.clock.now();
        while let Some(slot) = self.wheel.expired(now) {
            let slot = FlowId::new(slot);
            if self.is_given_up(slot) || self.is_alarmed(slot) {
                continue;
            }
            // The kernel may have moved bytes that nobody has heard of.
            Side::BOTH.into_iter().for_each(|from| self.look_at(slot, from));
            let Some(Entry { flow: Some(_), times, .. }) = self.slab.entry(slot) else { continue };
            let is_over = self.ticks.deadline(times).is_some_and(|at| is_past(at, now));
            if let Some(timer) = times.timer.filter(|_| is_over) {
                if timer == Timer::Connect || !self.asks_last_sent(slot) {
                    self.step(slot, Completion::Expired(timer));
                }
                continue;
            }
            if self.ticks.lasting(times).is_some_and(|at| is_past(at, now)) {
                times.is_kept_alive = true;
                Side::BOTH.into_iter().for_each(|side| self.ring.keep_alive(slot, side));
            }
            let is_deaf = self.ticks.look(times).is_some_and(|at| is_past(at, now));
            if is_deaf {
                times.deaf_since = None;
            }
            self.ticks.set(&mut self.wheel, slot, times);
            if is_deaf {
                self.step(slot, Completion::Deaf);
            }
        }
    }

    /// Asks the kernel when it last sent something of this flow: a send says nothing before its last
    /// byte is taken, and what was taken may take long to a slow reader. False if that was asked, or
    /// cannot be.
    fn asks_last_sent(&mut self, slot: FlowId) -> bool {
        let Some(entry) = self.slab.entry(slot) else { return false };
        let times = &mut entry.times;
        if times.asked == Some(times.active) || !self.ring.features().descriptor_install {
            return false;
        }
        times.asked = Some(times.active);
        let token = Token::new(Kind::LastSent, slot, entry.generation);
        Side::BOTH.into_iter().for_each(|side| self.ring.ask_last_sent(token, side));
        self.wheel.set(slot.slot(), self.clock.now().wrapping_add(Clock::ticks(ANSWER_WITHIN)));
        true
    }

    /// The answer for one side.
    pub(super) fn told_last_sent(&mut self, event: Event) {
        let (slot, now) = (event.token.flow(), self.clock.now());
        let Some(entry) = self.slab.living(slot, event.token.generation()) else { return };
        let Ok(ago) = u64::try_from(event.result) else { return };
        let times = &mut entry.times;
        // Rounded up: never later than it was.
        let sent = now.wrapping_sub(Clock::ticks(Duration::from_millis(ago)));
        if !is_past(sent, times.active) {
            times.active = sent;
        }
    }
}

impl TimerTicks {
    pub(super) fn new(timeouts: &Timeouts, keeps_alive: bool) -> TimerTicks {
        TimerTicks {
            connect: Clock::ticks(timeouts.connect),
            deaf: Clock::ticks(DEAF_MAX),
            half_closed: Clock::ticks(timeouts.half_closed),
            idle: (!timeouts.idle.is_zero()).then(|| Clock::ticks(timeouts.idle)),
            lasting: keeps_alive.then(|| Clock::ticks(LASTING_AFTER)),
        }
    }

    /// Sets the timer of a flow's slot to when it must be looked at next.
    pub(super) fn set(self, wheel: &mut Wheel, slot: FlowId, times: &mut Times) {
        let look = self.look(times);
        times.look_due = look.is_some();
        match [self.deadline(times), self.lasting(times), look]
            .into_iter()
            .flatten()
            .reduce(earlier)
        {
            Some(at) => wheel.set(slot.slot(), at),
            None => wheel.clear(slot.slot()),
        }
    }

    /// When the flow's timer runs out; `None` for never.
    fn deadline(self, times: &Times) -> Option<u32> {
        let (since, ticks) = match times.timer? {
            Timer::Connect => (times.opened, Some(self.connect)),
            Timer::HalfClosed => (times.active, Some(self.half_closed)),
            Timer::Idle => (times.active, self.idle),
        };
        Some(since.wrapping_add(ticks?))
    }

    /// When a connected flow counts as one that lasts; `None` if it does already.
    fn lasting(self, times: &Times) -> Option<u32> {
        let is_connected = matches!(times.timer, Some(Timer::HalfClosed | Timer::Idle));
        let after = self.lasting.filter(|_| is_connected && !times.is_kept_alive)?;
        Some(times.opened.wrapping_add(after))
    }

    /// When it has been deaf for long enough to be watched.
    fn look(self, times: &Times) -> Option<u32> {
        times.deaf_since.map(|since| since.wrapping_add(self.deaf))
    }
}

/// Of two ticks that are not far apart.
const fn earlier(one: u32, other: u32) -> u32 {
    if is_past(one, other) { one } else { other }
}

/// `tick` is not later than `now`.
const fn is_past(tick: u32, now: u32) -> bool {
    tick.wrapping_sub(now).cast_signed() <= 0
}

/// A reset of a stalled flow is passed on that late; long enough for no busy flow to be watched.
const DEAF_MAX: Duration = Duration::from_millis(250);
/// Most flows are over by then, and the shortest keepalive begins no sooner.
const LASTING_AFTER: Duration = Duration::from_secs(1);
/// The kernel answers in the next turn, which may be a long one. A timer is late by as much.
const ANSWER_WITHIN: Duration = Duration::from_millis(50);
