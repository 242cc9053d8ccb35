// SPDX-License-Identifier: Apache-2.0
//! A profile as weir understood it. Read again, it is the same profile.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::profile::{Keepalive, Profile, RelayMode, Sockets};

/// Every key and its value in force.
#[must_use]
pub fn profile(profile: &Profile) -> Value {
    let Profile { buffers, limits, relay, ring, timeouts, .. } = profile;
    let sysctls: Map<String, Value> = profile
        .sysctls
        .iter()
        .map(|(name, wanted)| (name.clone(), wanted.to_string().into()))
        .collect();
    json!({
        "summary": profile.summary,
        "ring": {
            "entries": ring.entries,
            "completions": ring.completions,
            "spin_us": micros(ring.spin),
            "coalesce_us": micros(ring.coalesce),
        },
        "buffers": {
            "small_count": buffers.small_count,
            "small_bytes": buffers.small_bytes,
            "bulk_count": buffers.bulk_count,
            "bulk_bytes": buffers.bulk_bytes,
        },
        "relay": {
            "mode": word(relay.mode),
            "window_bytes": relay.window_bytes,
            "bulk_after_bytes": relay.bulk_after_bytes,
            "segments_max": relay.segments_max,
            "sockmap_after_messages": relay.sockmap_after_messages,
            "sockmap_message_bytes_max": relay.sockmap_message_bytes_max,
            "sockmap_credit_bytes": relay.sockmap_credit_bytes,
            "splice_after_bytes": relay.splice_after_bytes,
            "splice_fullness_percent": relay.splice_fullness_percent,
            "splice_short_bytes": relay.splice_short_bytes,
            "pipe_bytes": relay.pipe_bytes,
        },
        "sockets": sockets(&profile.sockets),
        "timeouts": {
            "connect_ms": millis(timeouts.connect),
            "half_closed_ms": millis(timeouts.half_closed),
            "idle_ms": millis(timeouts.idle),
            "request_ms": millis(timeouts.request),
            "drain_ms": millis(timeouts.drain),
        },
        "limits": {
            "flows_max": limits.flows_max,
            "flows_per_source_max": limits.flows_per_source_max,
            "connects_pending_max": limits.connects_pending_max,
            "pipes_max": limits.pipes_max,
            "sockmap_flows_max": limits.sockmap_flows_max,
            "spliced_flows_max": limits.spliced_flows_max,
            "backlog": limits.backlog,
        },
        "sysctls": sysctls,
    })
}

fn sockets(sockets: &Sockets) -> Value {
    let keepalive = sockets.keepalive.map(|Keepalive { idle, interval, probes }| {
        json!({ "idle_ms": millis(idle), "interval_ms": millis(interval), "probes": probes })
    });
    json!({
        "nodelay": if sockets.nodelay { "on" } else { "off" },
        "congestion": sockets.congestion.as_deref().unwrap_or("system"),
        "keepalive": keepalive.unwrap_or_else(|| "off".into()),
        "user_timeout_ms": millis(sockets.user_timeout),
        "busy_poll_us": micros(sockets.busy_poll),
        "receive_buffer_bytes": sockets.receive_buffer_bytes,
        "send_buffer_bytes": sockets.send_buffer_bytes,
    })
}

fn word(mode: RelayMode) -> Option<&'static str> {
    RelayMode::WORDS.iter().find(|(_, known)| *known == mode).map(|(word, _)| *word)
}

pub(super) fn millis(span: Duration) -> Value {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX).into()
}

fn micros(span: Duration) -> Value {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX).into()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::yaml;
    use super::*;

    #[test]
    fn shown_profile_reads_as_the_same_profile() {
        for name in Profile::names() {
            let shipped = Profile::named(name).unwrap();
            let text = yaml(&profile(&shipped));
            let read = Profile::parse("shown.yaml", name, &text).unwrap_or_else(|m| panic!("{m}"));
            assert_eq!(read, shipped, "{text}");
        }
    }

    /// A key that is new in a profile must not be forgotten here.
    #[test]
    fn every_key_of_the_default_profile_is_shown() {
        let shown = yaml(&profile(&Profile::default()));
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tuning/balanced.yaml");
        let text = fs::read_to_string(root).unwrap();
        for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
            let key = line.split(':').next().unwrap().trim();
            assert!(key.is_empty() || shown.contains(&format!("{key}:")), "{key} is not shown");
        }
    }
}
