// SPDX-License-Identifier: Apache-2.0
//! What works on this host, found out by doing it: in a scratch network namespace and a scratch
//! cgroup, both gone afterwards. Nothing of the host is changed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::start;
use crate::capture::{Filters, HookPlan, Inbound, MARK_MASK, OWN_MARK, Outbound, Plan, Way};
use crate::config::Config;
use crate::profile::Profile;
use crate::ring::{self, DialOptions, Features, Ring};
use crate::sys::{cgroup, process};

/// One thing that was tried.
#[derive(Clone, Debug, Eq, PartialEq, serde::Serialize)]
pub struct Finding {
    /// What to do about it; empty if it works.
    pub cure: String,
    /// `ring`, `capture`, `limits` or `config`.
    pub group: &'static str,
    /// How it went.
    pub outcome: Outcome,
    /// What was tried.
    pub what: String,
}

/// How it went.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Serialize)]
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
    let mut findings = rings(&profile);
    findings.extend(captures());
    findings.extend(limits(&profile));
    if let Some(config) = config.filter(|config| !config.workloads.is_empty()) {
        let prepared = start::prepare(config).map(drop);
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

/// Installs both captures for real, where nobody's traffic is.
fn captures() -> Vec<Finding> {
    let attempt = || match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => vec![
            finding("capture", "inbound tproxy", try_inbound()),
            finding("capture", "outbound connect", try_outbound()),
        ],
        Err(error) => {
            let what = "a network namespace to try captures in";
            vec![finding("capture", what, Err(format!("{error}: needs CAP_SYS_ADMIN")))]
        }
    };
    let mut findings = std::thread::scope(|scope| scope.spawn(attempt).join()).unwrap_or_default();
    let accepts = fs::read_to_string(FWMARK_ACCEPT).is_ok_and(|text| text.trim() == "1");
    findings.push(Finding {
        cure: if accepts { String::new() } else { FWMARK_CURE.to_owned() },
        group: "capture",
        outcome: if accepts { Outcome::Works } else { Outcome::Warns },
        what: "replies led back by mark, for inbound.source keep".to_owned(),
    });
    findings
}

fn try_inbound() -> Result<(), String> {
    // In the scratch namespace, which is the one that this thread sees; its loopback is down.
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    up.map_err(|error| format!("ip: {error} (`apt-get install iproute2`)"))?;
    fs::write(FWMARK_ACCEPT, "1").map_err(|error| format!("{FWMARK_ACCEPT}: {error}"))?;
    let listen = ([0; 16], 15_006).into();
    let way = Way::Tproxy;
    let inbound = Inbound { exclude: vec![], include: vec![ALL], keep_source: true, listen, way };
    let plan = Plan { inbound: Some(inbound), own_ports: vec![15_006], ..Plan::default() };
    let prepared = plan.prepare().map_err(|error| error.to_string())?;
    prepared.install().map(drop).map_err(|error| error.to_string())
}

fn try_outbound() -> Result<(), String> {
    let scratch = ScratchCgroup::make()?;
    let hook = HookPlan {
        cgroups: vec![scratch.name.clone()],
        closed: false,
        filters: Filters { include_ports: vec![ALL], ..Filters::default() },
        own_mark: OWN_MARK,
        own_mark_mask: MARK_MASK,
        port: 15_001,
        records_max: FLOWS,
    };
    let plan = Plan { outbound: vec![Outbound::Connect(hook)], ..Plan::default() };
    let prepared = plan.prepare().map_err(|error| error.to_string())?;
    prepared.install().map(drop).map_err(|error| error.to_string())
}

/// An empty cgroup, removed on drop.
struct ScratchCgroup {
    name: PathBuf,
    path: PathBuf,
}

impl ScratchCgroup {
    fn make() -> Result<ScratchCgroup, String> {
        let name = PathBuf::from(format!("weir-check-{}", std::process::id()));
        let path = cgroup::mount().map_err(|error| error.to_string())?.join(&name);
        fs::create_dir(&path).map_err(|error| format!("make {}: {error}", path.display()))?;
        Ok(ScratchCgroup { name, path })
    }
}

impl Drop for ScratchCgroup {
    fn drop(&mut self) {
        // Nobody was ever in it.
        let _ = fs::remove_dir(&self.path);
    }
}

fn limits(profile: &Profile) -> Vec<Finding> {
    let somaxconn = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
    let somaxconn: u32 = somaxconn.trim().parse().unwrap_or_default();
    let backlog = profile.limits.backlog;
    let queue = Finding {
        cure: format!("`sysctl -w net.core.somaxconn={backlog}`; it is {somaxconn}"),
        group: "limits",
        outcome: if somaxconn >= backlog { Outcome::Works } else { Outcome::Warns },
        what: format!("accept queues of {backlog}, as the profile asks for"),
    };
    let workers = process::allowed_cpus().map_or(1, |cpus| cpus.len().max(1));
    let needed = profile.limits.flows_max as usize / workers * 2;
    let limit = process::raise_descriptor_limit().unwrap_or_default();
    let enough = limit >= needed as u64;
    let cure = format!("raise RLIMIT_NOFILE to {needed}, or lower limits.flows_max");
    let what = format!("{} flows on {workers} workers", profile.limits.flows_max);
    vec![queue, finding("limits", &what, if enough { Ok(()) } else { Err(cure) })]
}

fn finding(group: &'static str, what: &str, result: Result<(), String>) -> Finding {
    let outcome = if result.is_ok() { Outcome::Works } else { Outcome::Fails };
    Finding { cure: result.err().unwrap_or_default(), group, outcome, what: what.to_owned() }
}

const ALL: std::ops::RangeInclusive<u16> = 1..=u16::MAX;
const FLOWS: u32 = 64;
const FWMARK_ACCEPT: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";
const FWMARK_CURE: &str = "`sysctl -w net.ipv4.tcp_fwmark_accept=1`, or `inbound.source: own`";
