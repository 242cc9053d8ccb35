// SPDX-License-Identifier: Apache-2.0
//! A profile from YAML: what the file says, over what it includes, over the defaults.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::{
    Buffers, Keepalive, Limits, Profile, Relay, RelayMode, Ring, SHIPPED, Sockets, Timeouts, Wanted,
};
use crate::yaml::{self, Kind, Mistakes, Node, Section, nearest, parsed};

impl Profile {
    /// A shipped profile.
    #[must_use]
    pub fn named(name: &str) -> Option<Profile> {
        let (name, text) = SHIPPED.iter().find(|(shipped, _)| *shipped == name)?;
        Profile::parse(&format!("{name}.yaml"), name, text).ok()
    }

    /// A profile file. `file` is how messages call it, `name` how the profile is called.
    ///
    /// # Errors
    ///
    /// Every mistake in the file.
    pub fn parse(file: &str, name: &str, text: &str) -> Result<Profile, Mistakes> {
        Section::document(file, text, |section, mistakes| {
            let mut profile = base(section, mistakes);
            name.clone_into(&mut profile.name);
            read(section, &mut profile, mistakes);
            relations(section, &profile, mistakes);
            profile
        })
    }

    /// A profile file by its path.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or every mistake in it.
    pub fn load(path: &Path) -> Result<Profile, Mistakes> {
        let (file, text) = (path.display().to_string(), yaml::read(path)?);
        Profile::parse(&file, &file, &text)
    }
}

/// What the profile builds on: the included one, or the defaults. An include is always a shipped
/// profile, and of those only `balanced` is included, so there can be no cycle.
fn base(section: &mut Section, mistakes: &mut Mistakes) -> Profile {
    let Some(node) = section.take("include") else { return Profile::default() };
    let name = node.text().unwrap_or_default();
    Profile::named(name).unwrap_or_else(|| {
        let hint = nearest(name, &Profile::names()).unwrap_or_default();
        let text = format!("`{name}` is no shipped profile{hint}");
        mistakes.add(node.place, "include", text);
        Profile::default()
    })
}

fn read(section: &mut Section, profile: &mut Profile, mistakes: &mut Mistakes) {
    if let Some(summary) = section.parsed("summary", "one line of text", mistakes) {
        profile.summary = summary;
    }
    ring(section.section("ring", mistakes), &mut profile.ring, mistakes);
    buffers(section.section("buffers", mistakes), &mut profile.buffers, mistakes);
    relay(section.section("relay", mistakes), &mut profile.relay, mistakes);
    sockets(section.section("sockets", mistakes), &mut profile.sockets, mistakes);
    timeouts(section.section("timeouts", mistakes), &mut profile.timeouts, mistakes);
    limits(section.section("limits", mistakes), &mut profile.limits, mistakes);
    if let Some(node) = section.take("sysctls") {
        profile.sysctls.extend(sysctls(&node, mistakes));
    }
}

fn ring(mut section: Section, ring: &mut Ring, mistakes: &mut Mistakes) {
    set(&mut ring.entries, section.number("entries", 64..=32768, mistakes));
    set(&mut ring.completions, section.number("completions", 128..=65536, mistakes));
    set_micros(&mut ring.coalesce, section.number("coalesce_us", 0..=10_000, mistakes));
    set_micros(&mut ring.spin, section.number("spin_us", 0..=10_000, mistakes));
    section.finish(mistakes);
}

fn buffers(mut section: Section, buffers: &mut Buffers, mistakes: &mut Mistakes) {
    set(&mut buffers.small_count, section.number("small_count", 1..=16384, mistakes));
    set(&mut buffers.small_bytes, section.number("small_bytes", 4096..=1 << 20, mistakes));
    set(&mut buffers.bulk_count, section.number("bulk_count", 1..=16384, mistakes));
    set(&mut buffers.bulk_bytes, section.number("bulk_bytes", 4096..=4 << 20, mistakes));
    section.finish(mistakes);
}

fn relay(mut section: Section, relay: &mut Relay, mistakes: &mut Mistakes) {
    set(&mut relay.mode, section.word("mode", &RelayMode::WORDS, mistakes));
    set(&mut relay.window_bytes, section.number("window_bytes", 4096..=64 << 20, mistakes));
    set(&mut relay.bulk_after_bytes, section.number("bulk_after_bytes", 0..=1 << 40, mistakes));
    set(&mut relay.segments_max, section.number("segments_max", 2..=4096, mistakes));
    let after = section.number("sockmap_after_messages", 0..=65_535, mistakes);
    set(&mut relay.sockmap_after_messages, after);
    let bytes = section.number("sockmap_message_bytes_max", 1..=1 << 20, mistakes);
    set(&mut relay.sockmap_message_bytes_max, bytes);
    let credit = section.number("sockmap_credit_bytes", 4096..=64 << 20, mistakes);
    set(&mut relay.sockmap_credit_bytes, credit);
    let after = section.number("splice_after_bytes", 1..=1 << 40, mistakes);
    set(&mut relay.splice_after_bytes, after);
    let fullness = section.number("splice_fullness_percent", 0..=100, mistakes);
    set(&mut relay.splice_fullness_percent, fullness);
    let short = section.number("splice_short_bytes", 0..=1 << 20, mistakes);
    set(&mut relay.splice_short_bytes, short);
    set(&mut relay.pipe_bytes, section.number("pipe_bytes", 4096..=64 << 20, mistakes));
    section.finish(mistakes);
}

fn sockets(mut section: Section, sockets: &mut Sockets, mistakes: &mut Mistakes) {
    set(&mut sockets.nodelay, section.word("nodelay", &ON_OFF, mistakes));
    let bytes = 0..=1 << 30;
    let receive = section.number("receive_buffer_bytes", bytes.clone(), mistakes);
    set(&mut sockets.receive_buffer_bytes, receive);
    set(&mut sockets.send_buffer_bytes, section.number("send_buffer_bytes", bytes, mistakes));
    set_micros(&mut sockets.busy_poll, section.number("busy_poll_us", 0..=10_000, mistakes));
    let timeout = section.number("user_timeout_ms", 0..=86_400_000, mistakes);
    set_millis(&mut sockets.user_timeout, timeout);
    if let Some(name) = section.parsed::<String>("congestion", "a word", mistakes) {
        sockets.congestion = (name != "system").then_some(name);
    }
    keepalive(&mut section, sockets, mistakes);
    section.finish(mistakes);
}

fn keepalive(section: &mut Section, sockets: &mut Sockets, mistakes: &mut Mistakes) {
    let Some(node) = section.take("keepalive") else { return };
    if node.text() == Some("off") {
        sockets.keepalive = None;
        return;
    }
    let mut section = Section::open(Some(node), "sockets.keepalive", mistakes);
    let mut keepalive = sockets.keepalive.unwrap_or(KEEPALIVE);
    set_millis(&mut keepalive.idle, section.number("idle_ms", 1000..=86_400_000, mistakes));
    set_millis(&mut keepalive.interval, section.number("interval_ms", 1000..=3_600_000, mistakes));
    set(&mut keepalive.probes, section.number("probes", 1..=127, mistakes));
    section.finish(mistakes);
    sockets.keepalive = Some(keepalive);
}

fn timeouts(mut section: Section, timeouts: &mut Timeouts, mistakes: &mut Mistakes) {
    set_millis(&mut timeouts.connect, section.number("connect_ms", 10..=600_000, mistakes));
    set_millis(&mut timeouts.drain, section.number("drain_ms", 0..=86_400_000, mistakes));
    set_millis(
        &mut timeouts.half_closed,
        section.number("half_closed_ms", 10..=86_400_000, mistakes),
    );
    set_millis(&mut timeouts.idle, section.number("idle_ms", 0..=u64::from(u32::MAX), mistakes));
    let request = section.number("request_ms", 0..=u64::from(u32::MAX), mistakes);
    set_millis(&mut timeouts.request, request);
    section.finish(mistakes);
}

fn limits(mut section: Section, limits: &mut Limits, mistakes: &mut Mistakes) {
    set(&mut limits.flows_max, section.number("flows_max", 1..=10_000_000, mistakes));
    let per_source = section.number("flows_per_source_max", 0..=10_000_000, mistakes);
    set(&mut limits.flows_per_source_max, per_source);
    let pending = section.number("connects_pending_max", 1..=1_000_000, mistakes);
    set(&mut limits.connects_pending_max, pending);
    set(&mut limits.pipes_max, section.number("pipes_max", 0..=1_000_000, mistakes));
    let forwarded = section.number("sockmap_flows_max", 0..=1_000_000, mistakes);
    set(&mut limits.sockmap_flows_max, forwarded);
    let spliced = section.number("spliced_flows_max", 0..=1_000_000, mistakes);
    set(&mut limits.spliced_flows_max, spliced);
    set(&mut limits.backlog, section.number("backlog", 1..=65535, mistakes));
    section.finish(mistakes);
}

fn sysctls(node: &Node, mistakes: &mut Mistakes) -> BTreeMap<String, Wanted> {
    let Kind::Map(entries) = &node.kind else {
        mistakes.add(node.place, "sysctls", "must be a map of sysctl names to values");
        return BTreeMap::new();
    };
    let mut known = BTreeMap::new();
    for (name, place, value) in entries {
        let path = format!("sysctls.{name}");
        let is_name = name.contains('.')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if !is_name {
            mistakes.add(*place, &path, "is no sysctl name (`net.core.somaxconn`)");
        } else if let Some(wanted) = parsed(value, &path, WANTED, mistakes) {
            known.insert(name.clone(), wanted);
        }
    }
    known
}

/// What must hold between keys.
fn relations(section: &Section, profile: &Profile, mistakes: &mut Mistakes) {
    let Profile { buffers, relay, ring, .. } = profile;
    let powers = [
        ("ring.entries", ring.entries),
        ("ring.completions", ring.completions),
        ("buffers.small_count", u32::from(buffers.small_count)),
        ("buffers.bulk_count", u32::from(buffers.bulk_count)),
        ("relay.pipe_bytes", relay.pipe_bytes),
    ];
    for (path, value) in powers.into_iter().filter(|(_, value)| !value.is_power_of_two()) {
        let near = value.next_power_of_two();
        let text = format!("{value} is not a power of two (the next one is {near})");
        mistakes.add(section.place(), path, text);
    }
    let pages =
        [("buffers.small_bytes", buffers.small_bytes), ("buffers.bulk_bytes", buffers.bulk_bytes)];
    for (path, bytes) in pages.into_iter().filter(|(_, bytes)| bytes % 4096 != 0) {
        mistakes.add(section.place(), path, format!("{bytes} is not a multiple of 4096"));
    }
    if ring.completions < ring.entries.saturating_mul(2) {
        let text = format!("must be at least twice ring.entries ({})", ring.entries);
        mistakes.add(section.place(), "ring.completions", text);
    }
    if relay.window_bytes < buffers.small_bytes {
        let text = format!("must be at least buffers.small_bytes ({})", buffers.small_bytes);
        mistakes.add(section.place(), "relay.window_bytes", text);
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

fn set_millis(place: &mut Duration, millis: Option<u64>) {
    set(place, millis.map(Duration::from_millis));
}

fn set_micros(place: &mut Duration, micros: Option<u64>) {
    set(place, micros.map(Duration::from_micros));
}

const ON_OFF: [(&str, bool); 4] = [("on", true), ("off", false), ("true", true), ("false", false)];

const WANTED: &str = "a value, or \">=NUMBER\" for that much or more";

/// What `keepalive: {}` means.
const KEEPALIVE: Keepalive =
    Keepalive { idle: Duration::from_secs(60), interval: Duration::from_secs(10), probes: 6 };
