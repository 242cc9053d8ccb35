// SPDX-License-Identifier: Apache-2.0
//! What a config says of a SOFARegistry.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::{RegistryKind, servers};
use crate::yaml::{Mistakes, Section};

/// A SOFARegistry, and who weir is there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sofa {
    /// The group of its services.
    pub group: String,
    /// How often a session server is asked whether it is there.
    pub heartbeat: Duration,
    /// Whose providers are wanted.
    pub scope: Scope,
    /// HTTP ports of session servers, at least one: they say where the session servers are.
    pub servers: Vec<String>,
    /// Of this host; empty if not said.
    pub zone: String,
}

/// Whose providers a subscription is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scope {
    /// Those of this data center.
    DataCenter,
    /// All.
    Global,
    /// Those of this zone.
    Zone,
}

impl Scope {
    const WORDS: [(&str, Scope); 3] =
        [("data_center", Scope::DataCenter), ("global", Scope::Global), ("zone", Scope::Zone)];

    /// The word of a config.
    #[must_use]
    pub fn word(self) -> &'static str {
        let found = Scope::WORDS.iter().find(|(_, scope)| *scope == self);
        found.map_or("", |(word, _)| word)
    }

    /// As the registry calls it.
    #[must_use]
    pub fn wire(self) -> &'static str {
        match self {
            Scope::DataCenter => "dataCenter",
            Scope::Global => "global",
            Scope::Zone => "zone",
        }
    }
}

impl Sofa {
    /// Whose word it is.
    pub(super) fn identity(&self) -> String {
        let Sofa { group, scope, servers, zone, .. } = self;
        let mut servers = servers.clone();
        servers.sort_unstable();
        format!("sofa {} {group} {} {zone}", servers.join(","), scope.word())
    }
}

pub(super) fn sofa(section: &mut Section, mistakes: &mut Mistakes) -> Option<RegistryKind> {
    if !cfg!(feature = "sofa") {
        let text = "this weir was built without it (cargo feature `sofa`)";
        mistakes.add(section.place(), &section.path("kind"), text);
    }
    let servers = servers(section, mistakes);
    let group = word(section, "group", mistakes).unwrap_or_else(|| GROUP_USUAL.to_owned());
    let zone = word(section, "zone", mistakes).unwrap_or_default();
    let scope = section.word("scope", &Scope::WORDS, mistakes).unwrap_or(Scope::Global);
    let heartbeat = section.number("heartbeat_ms", HEARTBEAT_MS, mistakes);
    let heartbeat = Duration::from_millis(heartbeat.unwrap_or(HEARTBEAT_MS_USUAL));
    Some(RegistryKind::Sofa(Sofa { group, heartbeat, scope, servers: servers?, zone }))
}

/// `#` parts the words of the registry's own ids.
fn word(section: &mut Section, key: &'static str, mistakes: &mut Mistakes) -> Option<String> {
    let (place, path) = (section.place(), section.path(key));
    let word = section.parsed::<String>(key, "a word", mistakes)?;
    let is_word = !word.is_empty()
        && !word.contains('#')
        && !word.contains(|letter: char| letter.is_whitespace() || letter.is_control());
    if !is_word {
        mistakes.add(place, &path, format!("`{word}`: must be a word, without spaces and `#`"));
    }
    Some(word)
}

/// Of SOFARPC's services.
const GROUP_USUAL: &str = "SOFA";
/// A session server closes a connection that says nothing for 45 s.
const HEARTBEAT_MS: RangeInclusive<u64> = 500..=20_000;
const HEARTBEAT_MS_USUAL: u64 = 15_000;
