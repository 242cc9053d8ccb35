// SPDX-License-Identifier: Apache-2.0
//! Whose traffic is captured: `inbound` and `outbound` at the top of a config, which mean the network
//! namespace that weir is started in, and the entries of `workloads`.

use std::path::PathBuf;

use super::claims::Claim;
use super::{Captured, Namespace, OutboundCapture, Workload, capture};
use crate::yaml::{Mistakes, Node, Place, Section};

pub(super) fn all(
    section: &mut Section,
    claims: &mut Vec<Claim>,
    mistakes: &mut Mistakes,
) -> Vec<Captured> {
    let (inbound, outbound) = (section.take("inbound"), section.take("outbound"));
    let scope = Scope { cgroup: None, namespace: Namespace::Own, path: String::new() };
    let top = captured(inbound, outbound, String::new(), scope, claims, mistakes);
    let mut workloads: Vec<Captured> = top.into_iter().collect();
    let items = section.list("workloads").unwrap_or_default();
    for (index, item) in items.into_iter().enumerate() {
        let path = format!("workloads[{index}]");
        let place = item.place;
        let Some(next) = entry(item, &path, index, claims, mistakes) else { continue };
        refuse_twins(&workloads, &next, (&path, place), mistakes);
        workloads.push(next);
    }
    workloads
}

/// What an entry's `inbound` and `outbound` mean.
pub(super) struct Scope {
    pub(super) namespace: Namespace,
    /// Of the entry in the file; empty at its top.
    pub(super) path: String,
    /// Whose connections `outbound` takes: an entry that is a cgroup has said so.
    cgroup: Option<PathBuf>,
}

impl Scope {
    /// The path of a key of the entry.
    pub(super) fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Whose connections are taken, if `outbound` says `said`. The connect hook of another network
    /// namespace takes all of its connects: it hangs on all cgroups, and looks where a socket is.
    pub(super) fn whose(
        &self,
        said: Option<Workload>,
        capture: OutboundCapture,
        (section, mistakes): (&Section, &mut Mistakes),
    ) -> Option<Workload> {
        let everybody = capture == OutboundCapture::Connect && self.namespace != Namespace::Own;
        match (&self.cgroup, said) {
            (Some(_), Some(_)) => {
                let text = "is said already: this entry is a cgroup";
                mistakes.add(section.place(), &section.path("workload"), text);
                None
            }
            (Some(cgroup), None) => Some(Workload::Cgroups(vec![cgroup.clone()])),
            (None, None) if everybody => Some(Workload::Cgroups(vec!["/".into()])),
            (None, said) => said,
        }
    }
}

fn entry(
    item: Node,
    path: &str,
    index: usize,
    claims: &mut Vec<Claim>,
    mistakes: &mut Mistakes,
) -> Option<Captured> {
    let mut section = Section::open(Some(item), path, mistakes);
    let place = section.place();
    let name = section.parsed("name", "a word", mistakes);
    let netns = section.parsed::<PathBuf>("netns", "a path", mistakes);
    let pid = section.number("pid", 1..=PID_MAX, mistakes);
    let cgroup = section.parsed::<PathBuf>("cgroup", "a path", mistakes);
    let (inbound, outbound) = (section.take("inbound"), section.take("outbound"));
    section.finish(mistakes);
    let (namespace, cgroup) = match (netns, pid, cgroup) {
        (Some(netns), None, None) => (Namespace::Path(netns), None),
        (None, Some(pid), None) => (Namespace::Process(pid), None),
        (None, None, Some(cgroup)) => (Namespace::Own, Some(cgroup)),
        _ => {
            let text = "must have one of `netns: /run/netns/NAME`, `pid: NUMBER` and `cgroup: \
                        /PATH`";
            mistakes.add(place, path, text);
            return None;
        }
    };
    if namespace == Namespace::Own && inbound.is_some() {
        let text = "traffic to a cgroup cannot be told from other traffic: give it a netns or a \
                    pid, or put `inbound` at the top of the file";
        mistakes.add(place, &format!("{path}.inbound"), text);
        return None;
    }
    if inbound.is_none() && outbound.is_none() {
        mistakes.add(place, path, "captures nothing: give it `inbound:` or `outbound:`");
    }
    let name = name.unwrap_or_else(|| format!("workload-{index}"));
    let scope = Scope { cgroup, namespace, path: path.to_owned() };
    captured(inbound, outbound, name, scope, claims, mistakes)
}

/// `None` if nothing is captured.
fn captured(
    inbound: Option<Node>,
    outbound: Option<Node>,
    name: String,
    scope: Scope,
    claims: &mut Vec<Claim>,
    mistakes: &mut Mistakes,
) -> Option<Captured> {
    if inbound.is_none() && outbound.is_none() {
        return None;
    }
    let inbound = inbound.and_then(|node| capture::inbound(node, &scope, claims, mistakes));
    let outbound = outbound.and_then(|node| capture::outbound(node, &scope, claims, mistakes));
    Some(Captured { inbound, name, namespace: scope.namespace, outbound })
}

/// Names are unique, and a namespace other than weir's own has one entry.
fn refuse_twins(
    others: &[Captured],
    next: &Captured,
    (path, place): (&str, Place),
    mistakes: &mut Mistakes,
) {
    for other in others {
        if other.name == next.name {
            mistakes.add(place, path, format!("the name {} is taken", next.name));
        }
        if other.namespace == next.namespace && next.namespace != Namespace::Own {
            let text = format!(
                "has the network namespace of {}: what is captured in one stands in one entry",
                other.name
            );
            mistakes.add(place, path, text);
        }
    }
}

/// `PID_MAX_LIMIT` (linux/threads.h).
const PID_MAX: u32 = 4_194_304;
