// SPDX-License-Identifier: Apache-2.0
//! What every exchange of a worker goes by; from the profile.

use std::time::Duration;

use super::TICKS_MAX;
use crate::profile::Profile;

/// What every exchange of a worker goes by. Times are ticks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rules {
    /// What an upstream asks waits so long for another one's turn.
    pub callback: u32,
    /// A leg that has not come about by then is given up.
    pub connect: u32,
    /// From the first byte of a request's head to its last.
    pub head: u32,
    /// Of silence with nothing asked; `None` for never.
    pub idle: Option<u32>,
    /// A leg without requests is closed after it.
    pub leg_idle: u32,
    /// After the last answer the downstream is listened to so long, lest a reset overtake it.
    pub linger: u32,
    /// Pieces held of what one socket has brought, and at most that many waiting for one socket.
    pub pieces_max: u32,
    /// For an answer, where the request does not say; `None` for never.
    pub request: Option<u32>,
    /// How long a tick is.
    pub tick_ms: u32,
    /// An answer up to this size is passed on in one go.
    pub whole_bytes_max: u32,
    /// Bytes held of what one socket has brought.
    pub window_bytes: u32,
}

impl Rules {
    /// As the profile says, with ticks of `tick`.
    #[must_use]
    pub fn new(profile: &Profile, tick: Duration) -> Rules {
        let Profile { buffers, relay, timeouts, .. } = profile;
        let ticks = |span: Duration| {
            let ticks = span.as_millis().div_ceil(tick.as_millis().max(1));
            u32::try_from(ticks).unwrap_or(TICKS_MAX).clamp(1, TICKS_MAX)
        };
        let pieces_max = u32::from(relay.segments_max).max(8);
        // What waits for its rest must leave room for the rest, however it comes.
        let whole =
            (relay.window_bytes / 4).min(buffers.small_bytes.saturating_mul(pieces_max / 8));
        Rules {
            callback: ticks(CALLBACK_WAITS),
            connect: ticks(timeouts.connect),
            head: ticks(HEAD_WITHIN),
            idle: (!timeouts.idle.is_zero()).then(|| ticks(timeouts.idle)),
            leg_idle: ticks(LEG_IDLE),
            linger: ticks(LINGER),
            pieces_max,
            request: (!timeouts.request.is_zero()).then(|| ticks(timeouts.request)),
            tick_ms: u32::try_from(tick.as_millis()).unwrap_or(1).max(1),
            whole_bytes_max: whole.min(WHOLE_BYTES_MAX),
            window_bytes: relay.window_bytes,
        }
    }
}

/// A downstream that answers at all mostly does within milliseconds.
const CALLBACK_WAITS: Duration = Duration::from_secs(1);
/// From the first byte of a request to the last that says where it goes.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Below the 90 s after which a Bolt server closes.
const LEG_IDLE: Duration = Duration::from_secs(60);
/// A downstream that reads its last answer closes within a round trip.
const LINGER: Duration = Duration::from_secs(2);
/// An answer that is passed on whole cannot keep others waiting, nor break in the middle.
const WHOLE_BYTES_MAX: u32 = 64 * 1024;
