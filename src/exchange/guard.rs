// SPDX-License-Identifier: Apache-2.0
//! A connection of HTTP/2 belongs to the service that its first request names. Its later requests are
//! looked at: one for another service ends the connection, rather than reach the wrong provider.

use super::speech::Reading;
use super::{Exchange, Host, Means, naming};
use crate::metrics::Outcome;
use crate::op::CloseReason;
use crate::wire::http2::{self, Requested, Streams};
use crate::wire::{Stop, http2::Opening};

/// What the requests of a connection have said.
#[derive(Debug, Default)]
pub(super) struct Guard {
    first: Option<Requested>,
    /// It goes to this leg.
    leg: Option<usize>,
    streams: Streams,
}

impl Guard {
    /// It has an upstream, or had one.
    pub(super) const fn is_bound(&self) -> bool {
        self.leg.is_some()
    }
}

impl Exchange {
    /// Looks at the next frame of HTTP/2; false if it is not there.
    pub(super) fn begin_frame<H: Host>(
        &mut self,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let Some(mut guard) = self.guard.take() else { return Ok(false) };
        let begun = self.look_at_frame(&mut guard, means);
        self.guard = Some(guard);
        begun
    }

    fn look_at_frame<H: Host>(
        &mut self,
        guard: &mut Guard,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        if guard.leg.is_none() {
            let opening = means.read(self.client.inbox, |bytes, _| http2::parse(bytes));
            match opening {
                Ok(opening) => guard.leg = Some(self.bind(&opening, means)?),
                Err(stop) => return self.wait_for_frame(stop, means),
            }
        }
        let streams = std::cell::RefCell::new(&mut guard.streams);
        let next = means.read(self.client.inbox, |bytes, picker| {
            let is_known = |name: &[u8]| naming::by_name(name, picker.table()).is_some();
            streams.borrow_mut().next(bytes, is_known)
        });
        let (len, requested) = match next {
            Ok(next) => next,
            Err(stop) => return self.wait_for_frame(stop, means),
        };
        if let Some(requested) = requested {
            let first = *guard.first.get_or_insert(requested);
            if !requested.is_like(first) {
                means.host.count(Outcome::OtherService);
                return Err(CloseReason::ProtocolError);
            }
        }
        (self.hanging, self.needed) = (None, 0);
        (self.reading, self.to) = (Reading::Bytes(len), guard.leg);
        Ok(true)
    }

    /// The leg for all of it.
    fn bind<H: Host>(
        &mut self,
        opening: &Opening,
        means: &mut Means<'_, H>,
    ) -> Result<usize, CloseReason> {
        let service = naming::of_http2(opening, means.picker.table());
        let (index, endpoint) = match self.choose_known(service, means) {
            Ok(chosen) => chosen,
            Err(failure) => {
                means.host.count(failure.outcome());
                return Err(CloseReason::ConnectFailed);
            }
        };
        if let Some(leg) = self.legs.get_mut(index) {
            leg.hold(endpoint);
        }
        Ok(index)
    }

    fn wait_for_frame<H: Host>(
        &mut self,
        stop: Stop,
        means: &mut Means<'_, H>,
    ) -> Result<bool, CloseReason> {
        let Stop::NeedMore(needed) = stop else {
            means.host.count(Outcome::Bad);
            return Err(CloseReason::ProtocolError);
        };
        self.wait_for(needed, means);
        Ok(false)
    }
}
