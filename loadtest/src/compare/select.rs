// SPDX-License-Identifier: Apache-2.0
//! What is to be compared, from words: modes, relays, peers, workloads.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};

use crate::run::Kind;

/// Who or what forwards.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Way {
    Direct,
    /// weir as a plain forwarder.
    Forward,
    Inbound(&'static str),
    Outbound(&'static str),
    Peer(Peer),
    /// By registry: the workload dials the address that its service has here.
    Takeover,
}

/// Somebody else's forwarder, and two of our own that everybody would write first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Peer {
    Envoy,
    Haproxy,
    HaproxySplice,
    Nginx,
    Tokio,
    TokioUring,
}

/// One row of the matrix.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Target {
    /// Asked for by its name: it may not be left out.
    pub(crate) is_named: bool,
    /// The word for it, as `forward/copy`; with the profile behind it if there are several.
    pub(crate) name: String,
    /// Empty for what is not weir's.
    pub(crate) profile: String,
    /// Empty for what is not weir's.
    pub(crate) relay: String,
    /// A key of the profile, and what it is set to.
    pub(crate) set: Option<(String, String)>,
    pub(crate) way: Way,
    /// Threads of a weir.
    pub(crate) workers: u32,
}

/// One column of the matrix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Workload {
    pub(crate) connections: usize,
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// Exchanges a second of an open loop.
    pub(crate) rate: Option<f64>,
    pub(crate) reset: bool,
}

/// Rows and columns.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    pub(crate) targets: Vec<Target>,
    pub(crate) workloads: Vec<Workload>,
}

/// A key of a profile, and the values to try: `ring.spin_us=0,20,50`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Vary {
    key: String,
    values: Vec<String>,
}

/// What was asked for, in words; an empty list is the default.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked<'a> {
    pub(crate) modes: &'a [String],
    pub(crate) peers: &'a [String],
    pub(crate) profiles: &'a [String],
    pub(crate) relays: &'a [String],
    pub(crate) vary: Option<&'a Vary>,
    pub(crate) workers: &'a [u32],
    pub(crate) workloads: &'a [String],
}

/// Makes the matrix; without any word, the default one.
pub(crate) fn select(asked: &Asked<'_>) -> Result<Selection> {
    let Asked { modes, peers, profiles, relays, vary, workers, workloads } = *asked;
    let is_asked = !modes.is_empty();
    let modes = listed("mode", modes, &MODES, &DEFAULT_MODES)?;
    let relays = listed("relay", relays, &RELAYS, &["auto"])?;
    let profiles = listed("profile", profiles, &PROFILES, &["balanced"])?;
    let is_peer_asked = !peers.is_empty();
    let peers = listed("peer", peers, &PEERS, &DEFAULT_PEERS)?;
    let workers = if workers.is_empty() { &[1][..] } else { workers };
    let sets = vary.map_or_else(|| vec![None], Vary::sets);
    let mut targets = Vec::new();
    for (name, way, is_single) in modes {
        let is_named = is_asked && is_single;
        if way == Way::Direct {
            targets.push(Target::foreign(name, way, is_named));
            continue;
        }
        for (relay, (), is_single) in &relays {
            let is_named = is_named && *is_single;
            for (profile, (), _) in &profiles {
                let each =
                    workers.iter().flat_map(|count| sets.iter().map(move |set| (*count, set)));
                targets.extend(each.map(|(count, set)| {
                    Target {
                        is_named,
                        name: [
                            format!("{name}/{relay}"),
                            if profiles.len() > 1 { format!("/{profile}") } else { String::new() },
                            if workers.len() > 1 { format!("/{count}w") } else { String::new() },
                            set.as_ref().map_or_else(String::new, |(_, value)| format!("/{value}")),
                        ]
                        .concat(),
                        profile: (*profile).to_owned(),
                        relay: (*relay).to_owned(),
                        set: set.clone(),
                        way,
                        workers: count,
                    }
                }));
            }
        }
    }
    targets.extend(peers.into_iter().map(|(name, peer, is_single)| {
        Target::foreign(name, Way::Peer(peer), is_peer_asked && is_single)
    }));
    ensure!(!targets.is_empty(), "nothing to compare: name a mode or a peer");
    let words = workloads.iter().map(String::as_str);
    let words = if workloads.is_empty() { DEFAULT_WORKLOADS.to_vec() } else { words.collect() };
    let workloads = words.into_iter().map(str::parse).collect::<Result<Vec<Workload>, _>>();
    let workloads = workloads.map_err(anyhow::Error::msg)?;
    Ok(Selection { targets, workloads })
}

/// The known ones of that name; `all` is all of them, and those are not single ones, `none` none.
fn listed<T: Copy>(
    what: &str,
    words: &[String],
    known: &[(&'static str, T)],
    default: &[&str],
) -> Result<Vec<(&'static str, T, bool)>> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let words = if words.is_empty() { default.to_vec() } else { words };
    let mut list: Vec<(&str, T, bool)> = Vec::new();
    for word in words {
        match (word, known.iter().find(|(name, _)| *name == word)) {
            ("all", _) => list.extend(known.iter().map(|(name, it)| (*name, *it, false))),
            ("none", _) => {}
            (_, Some((name, it))) => list.push((*name, *it, true)),
            (_, None) => {
                let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
                let hint = nearest(word, &names);
                bail!("unknown {what} `{word}`{hint} (known: {}, all, none)", names.join(", "));
            }
        }
    }
    Ok(list)
}

/// ", did you mean X?", or nothing.
pub(crate) fn nearest(word: &str, known: &[&str]) -> String {
    let distance = |name: &&&str| strsim::damerau_levenshtein(word, name);
    match known.iter().min_by_key(distance) {
        Some(name) if distance(&name) <= 1 + name.len() / 3 => format!(", did you mean `{name}`?"),
        _ => String::new(),
    }
}

impl Target {
    /// What has neither relay nor profile.
    fn foreign(name: &str, way: Way, is_named: bool) -> Target {
        let (profile, relay) = (String::new(), String::new());
        Target { is_named, name: name.to_owned(), profile, relay, set: None, way, workers: 1 }
    }
}

impl Vary {
    fn sets(&self) -> Vec<Option<(String, String)>> {
        self.values.iter().map(|value| Some((self.key.clone(), value.clone()))).collect()
    }
}

impl FromStr for Vary {
    type Err = String;

    fn from_str(text: &str) -> Result<Vary, String> {
        let is_word = |word: &str| {
            !word.is_empty() && word.chars().all(|letter| letter.is_alphanumeric() || letter == '_')
        };
        let parts = text.split_once('=');
        let parts = parts.filter(|(key, _)| key.contains('.') && key.split('.').all(is_word));
        let parts = parts.filter(|(_, values)| values.split(',').all(is_word));
        let (key, values) = parts.ok_or("must be a key and its values, as ring.spin_us=0,20,50")?;
        let values = values.split(',').map(str::to_owned).collect();
        Ok(Vary { key: key.to_owned(), values })
    }
}

impl FromStr for Workload {
    type Err = String;

    /// `pingpong-64`, `connections-64`, `pingpong-64@20000` for an open loop.
    fn from_str(text: &str) -> Result<Workload, String> {
        let (place, rate) = text.split_once('@').map_or((text, None), |(a, b)| (a, Some(b)));
        let (word, count) = place.rsplit_once('-').unwrap_or((place, ""));
        let names = WORKLOADS.map(|(name, _)| name);
        let Some((_, kind)) = WORKLOADS.iter().find(|(name, _)| *name == word) else {
            let hint = nearest(word, &names);
            let names = names.map(|name| format!("{name}-N")).join(", ");
            return Err(format!(
                "unknown workload `{text}`{hint} (known: {names}; as pingpong-64)"
            ));
        };
        let connections = count.parse().ok().filter(|count| (1..=CONNECTIONS_MAX).contains(count));
        let connections = connections.ok_or_else(|| {
            format!("workload `{text}` must end with connections from 1 to {CONNECTIONS_MAX}, as {word}-64")
        })?;
        let rate = rate.map(|rate| rate.parse().ok().filter(|rate| *rate > 0.0));
        if rate == Some(None)
            || rate.is_some() && !matches!(kind, Kind::Pingpong | Kind::Connections)
        {
            return Err(format!(
                "workload `{text}`: a rate is exchanges a second, as pingpong-64@20000"
            ));
        }
        let reset = word == "connections-reset";
        Ok(Workload {
            connections,
            kind: *kind,
            name: text.to_owned(),
            rate: rate.flatten(),
            reset,
        })
    }
}

impl Workload {
    /// Messages, by weight: `mixed` is what a mesh carries, mostly small and some large.
    pub(crate) fn sizes(&self) -> &'static str {
        if self.name.starts_with("mixed") { "64*80,1000*15,16k*4,256k*1" } else { "64" }
    }

    /// Exchanges before a connection is replaced.
    pub(crate) fn churn(&self) -> u32 {
        if self.name.starts_with("mixed") { 100 } else { 0 }
    }

    /// What figures are given for each.
    pub(crate) const fn unit(&self) -> &'static str {
        match self.kind {
            Kind::Bulk | Kind::Upload => "GB",
            Kind::Connections | Kind::HalfClose => "connection",
            Kind::Idle => "flow",
            Kind::Http | Kind::Pingpong => "request",
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

const MODES: [(&str, Way); 8] = [
    ("direct", Way::Direct),
    ("forward", Way::Forward),
    ("inbound-redirect", Way::Inbound("redirect")),
    ("inbound-tproxy", Way::Inbound("tproxy")),
    ("outbound-connect", Way::Outbound("connect")),
    ("outbound-redirect", Way::Outbound("redirect")),
    ("outbound-tproxy", Way::Outbound("tproxy")),
    ("takeover", Way::Takeover),
];
const RELAYS: [(&str, ()); 4] = [("auto", ()), ("copy", ()), ("sockmap", ()), ("splice", ())];
const PROFILES: [(&str, ()); 4] =
    [("balanced", ()), ("latency", ()), ("many-flows", ()), ("throughput", ())];
const PEERS: [(&str, Peer); 6] = [
    ("envoy", Peer::Envoy),
    ("haproxy", Peer::Haproxy),
    ("haproxy-splice", Peer::HaproxySplice),
    ("nginx", Peer::Nginx),
    ("tokio", Peer::Tokio),
    ("tokio-uring", Peer::TokioUring),
];
const WORKLOADS: [(&str, Kind); 7] = [
    ("bulk", Kind::Bulk),
    ("connections", Kind::Connections),
    ("connections-reset", Kind::Connections),
    ("idle", Kind::Idle),
    ("mixed", Kind::Pingpong),
    ("pingpong", Kind::Pingpong),
    ("upload", Kind::Upload),
];
const DEFAULT_MODES: [&str; 4] = ["direct", "forward", "inbound-tproxy", "outbound-connect"];
const DEFAULT_PEERS: [&str; 1] = ["haproxy"];
const DEFAULT_WORKLOADS: [&str; 7] = [
    "pingpong-1",
    "pingpong-64",
    "pingpong-64@20000",
    "pingpong-1000",
    "connections-64",
    "bulk-1",
    "idle-1000",
];
const CONNECTIONS_MAX: usize = 32_000;

#[cfg(test)]
mod tests {
    use super::{Asked, Selection, Vary, Workload, select};

    /// Modes, relays, profiles, peers, workloads.
    fn selected(words: [&str; 5]) -> anyhow::Result<Selection> {
        let lists = words
            .map(|text| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() });
        let [modes, relays, profiles, peers, workloads] = &lists;
        select(&Asked { modes, peers, profiles, relays, vary: None, workers: &[], workloads })
    }

    fn names(selection: anyhow::Result<Selection>) -> Vec<String> {
        selection.into_iter().flat_map(|all| all.targets).map(|target| target.name).collect()
    }

    #[test]
    fn any_subset_can_be_named() {
        let selection = selected(["direct forward", "copy splice", "", "nginx", ""]);
        assert_eq!(names(selection), ["direct", "forward/copy", "forward/splice", "nginx"]);
        let all = names(selected(["forward", "", "all", "none", ""]));
        assert_eq!(all.len(), 4);
        assert_eq!(all[1], "forward/auto/latency");
        let (modes, peers) = (["forward".to_owned()], ["none".to_owned()]);
        let asked = Asked { modes: &modes, peers: &peers, workers: &[1, 2], ..Asked::default() };
        assert_eq!(names(select(&asked)), ["forward/auto/1w", "forward/auto/2w"]);
        let vary = "ring.spin_us=0,50".parse::<Vary>();
        let asked = Asked { vary: vary.as_ref().ok(), workers: &[], ..asked };
        assert_eq!(names(select(&asked)), ["forward/auto/0", "forward/auto/50"]);
        for wrong in ["spin_us=1", "ring.spin_us", "ring.spin_us=", "ring.=1", "ring.spin_us=1,}"] {
            assert!(wrong.parse::<Vary>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_who_was_named_may_not_be_left_out() {
        let named = |modes: &str, relays: &str, peers: &str| -> Vec<bool> {
            let selection = selected([modes, relays, "", peers, ""]);
            let targets = selection.map(|all| all.targets).unwrap_or_default();
            targets.iter().map(|target| target.is_named).collect()
        };
        assert_eq!(named("forward", "copy", "nginx"), [true, true]);
        assert_eq!(named("forward", "", "none"), [true]);
        assert_eq!(named("forward", "all", "none"), [false; 4]);
        assert!(named("", "", "").iter().all(|is_named| !is_named));
    }

    #[test]
    fn what_is_not_known_is_said_with_what_was_meant() {
        let refused = |modes: &str, peers: &str, workloads: &str| {
            let selection = selected([modes, "", "", peers, workloads]);
            selection.map_or_else(|error| error.to_string(), |_| String::new())
        };
        assert!(refused("", "haprxy", "").contains("did you mean `haproxy`?"));
        assert!(refused("inbound-tproxi", "", "").contains("did you mean `inbound-tproxy`?"));
        assert!(refused("", "", "pingpng-64").contains("did you mean `pingpong`?"));
        assert!(refused("none", "none", "").contains("nothing to compare"));
        for wrong in ["pingpong", "pingpong-0", "pingpong-99999", "bulk-1@5", "pingpong-1@x"] {
            assert!(wrong.parse::<Workload>().is_err(), "{wrong}");
        }
        let open: Result<Workload, _> = "connections-reset-64@500".parse();
        assert!(open.is_ok_and(|open| open.reset && open.rate == Some(500.0)));
    }
}
