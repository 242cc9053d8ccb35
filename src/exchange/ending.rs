// SPDX-License-Identifier: Apache-2.0
//! How an exchange ends: at once with a reset, or after its last answer without one.

use super::{Exchange, Host, Means, State};
use crate::op::{CloseReason, Op, Side};

impl Exchange {
    /// Ends the exchange: with a reset on all sides, unless all was said.
    pub(super) fn close<H: Host>(&mut self, reason: CloseReason, means: &mut Means<'_, H>) {
        self.state = State::Closing(reason);
        let cancels = self.client.cancels();
        cancels.into_iter().flatten().for_each(|op| means.wish(self.head, op));
        self.leave_legs(means);
    }

    /// All was said, but perhaps not heard: bytes of the downstream that nobody has read would turn
    /// our close into a reset, which takes with it what is on its way there. So FIN goes first, and
    /// what still comes is thrown away until its own FIN comes, or it has had the time.
    pub(super) fn linger<H: Host>(&mut self, means: &mut Means<'_, H>) {
        self.state = State::Lingering;
        self.leave_legs(means);
        means.pieces.clear(&mut self.client.inbox);
        let op = self.client.finish();
        means.wish(self.head, op);
        self.alarm = Some(means.now.wrapping_add(means.rules.linger));
        self.drive(means);
    }

    /// Something happened after the last answer.
    pub(super) fn go_on_lingering<H: Host>(
        &mut self,
        taken: Result<(), CloseReason>,
        means: &mut Means<'_, H>,
    ) {
        means.pieces.clear(&mut self.client.inbox);
        if taken.is_err() || self.client.has_ended() {
            return self.close(CloseReason::Finished, means);
        }
        self.drive(means);
    }

    fn leave_legs<H: Host>(&mut self, means: &mut Means<'_, H>) {
        for (_, leg) in self.legs.iter_mut() {
            leg.begin_close(false, means);
        }
        for asked in self.asked.drain(..) {
            means.picker.ended(asked.endpoint);
        }
    }

    pub(super) fn finish_closing<H: Host>(&mut self, means: &mut Means<'_, H>) {
        let (State::Closing(_) | State::Lingering) = self.state else { return };
        let reset = !matches!(self.state, State::Lingering | State::Closing(CloseReason::Finished));
        for index in 0..self.legs.len() {
            self.legs.close_quiet(index, reset, means);
        }
        let State::Closing(reason) = self.state else { return };
        if !self.legs.is_empty() || !self.client.is_quiet() {
            return;
        }
        self.client.clear(means.pieces);
        means.wish(self.head, Op::Close { side: Side::Downstream, reset });
        self.state = State::Closed(reason);
    }
}
