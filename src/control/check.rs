// SPDX-License-Identifier: Apache-2.0
//! What works on this host, found out by doing it: in scratch network namespaces and a scratch
//! cgroup, gone afterwards. Nothing of the host is changed.

use super::{forwarding, start};
use crate::bpf;
use crate::config::Config;
use crate::profile::Profile;
use crate::ring::{self, DialOptions, Features, Ring};
use crate::sys::signals::is_interrupted;

pub use lab::dial;

mod host;
mod lab;
mod modes;

/// One thing that was tried.
#[derive(Clone, Debug, Eq, PartialEq, serde::Serialize)]
pub struct Finding {
    /// What to do about it; empty if it works.
    pub cure: String,
    /// `ring`, `capture`, `relay`, `limits`, `conflicts` or `config`.
    pub group: &'static str,
    /// How it went.
    pub outcome: Outcome,
    /// What was tried.
    pub what: String,
}

/// How it went; the worst comes first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It will not work here.
    Fails,
    /// It works, but not as well as it could.
    Warns,
    /// It works.
    Works,
}

/// Tries everything, and what `config` asks for if there is one.
#[must_use]
pub fn run(config: Option<&Config>) -> Vec<Finding> {
    let profile = config.map_or_else(Profile::default, |config| config.profile.clone());
    // Before anything is tried: what is tried leaves entries in connection tracking.
    let limits = host::limits(&profile, config);
    let mut findings = rings(&profile);
    findings.extend(modes::findings());
    // What follows takes its time, and nobody waits for it any more.
    if is_interrupted() {
        return findings;
    }
    findings.push(finding(
        "relay",
        SOCKMAP,
        forwarding::prove().map_err(|error| error.to_string()),
    ));
    findings.extend(limits);
    findings.extend(host::conflicts(config));
    if let Some(config) = config.filter(|config| !config.workloads.is_empty()) {
        let prepared = start::prepare(config).map(drop);
        bpf::tidy();
        let what = "what this config captures can be captured where its workloads live";
        findings.push(finding("config", what, prepared.map_err(|error| error.to_string())));
    }
    findings
}

/// Opens a worker's ring, in a thread of its own because a ring belongs to its thread.
fn rings(profile: &Profile) -> Vec<Finding> {
    let open = || {
        let dial = DialOptions::new(&profile.sockets, None);
        let (buffers, ring) = (&profile.buffers, &profile.ring);
        let splice = ring::SpliceLimits::default();
        let setup = ring::Setup { buffers, dial, flows_max: FLOWS, headers: 1, ring, splice };
        Ring::open(setup).map(|ring| *ring.features())
    };
    let opened = std::thread::scope(|scope| scope.spawn(open).join());
    let opened = match opened {
        Ok(Ok(features)) => Ok(features),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the attempt ended with a panic".to_owned()),
    };
    let mut findings =
        vec![finding("ring", "an io_uring with all that weir needs", opened.clone().map(drop))];
    findings.extend(opened.iter().flat_map(features));
    findings
}

fn features(features: &Features) -> Vec<Finding> {
    let lacking = features.fallbacks().map(|lacking| Finding {
        cure: format!("{} is used instead; Linux {} has it", lacking.to, lacking.since),
        group: "ring",
        outcome: Outcome::Warns,
        what: lacking.from.to_owned(),
    });
    let bind = if features.bind {
        Ok(())
    } else {
        Err("`source: own`, or Linux 6.11 or newer".to_owned())
    };
    let bind = finding("ring", "bind in the ring, for inbound.source keep", bind);
    lacking.chain([bind]).collect()
}

fn finding(group: &'static str, what: &str, result: Result<(), String>) -> Finding {
    let outcome = if result.is_ok() { Outcome::Works } else { Outcome::Fails };
    Finding { cure: result.err().unwrap_or_default(), group, outcome, what: what.to_owned() }
}

const SOCKMAP: &str = "sockmap: the kernel forwards 100 MB each way and loses nothing";
const FLOWS: u32 = 64;
