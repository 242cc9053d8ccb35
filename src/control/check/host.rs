// SPDX-License-Identifier: Apache-2.0
//! The host as it is: settings and limits that matter, and others who do the same job. Looks only.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::super::start;
use super::{Finding, Outcome, finding};
use crate::capture::{
    FOREIGN_MARK, MARK_MASK, Neighbour, OUTBOUND_MARK, OWN_MARK, ROUTE_TABLE, STEER_MARK,
    conntrack_use, neighbours,
};
use crate::config::{
    Captured, Config, InboundCapture, OutboundCapture, SourceAddress, Workers, Workload,
};
use crate::profile::Profile;
use crate::sys::process;

/// Settings and limits.
pub(super) fn limits(profile: &Profile, config: Option<&Config>) -> Vec<Finding> {
    let somaxconn = number("/proc/sys/net/core/somaxconn").unwrap_or_default();
    let backlog = u64::from(profile.limits.backlog);
    let workers = config.map_or(&Workers::Auto, |config| &config.workers);
    let workers = start::cpus(workers).map_or(1, |cpus| cpus.len().max(1));
    let needed = (profile.limits.flows_max as usize).div_ceil(workers) * 2;
    let limit = process::raise_descriptor_limit().unwrap_or_default();
    let cure = format!("raise RLIMIT_NOFILE to {needed}, or lower limits.flows_max");
    let what = format!("{} flows on {workers} workers", profile.limits.flows_max);
    let mut findings = vec![
        advice(
            "limits",
            format!("accept queues of {backlog}, as the profile asks for"),
            somaxconn >= backlog,
            format!("`sysctl -w net.core.somaxconn={backlog}`; it is {somaxconn}"),
        ),
        finding("limits", &what, (limit >= needed as u64).then_some(()).ok_or(cure)),
        advice(
            "limits",
            "eBPF programs are compiled (net.core.bpf_jit_enable)".to_owned(),
            number("/proc/sys/net/core/bpf_jit_enable") != Some(0),
            "`sysctl -w net.core.bpf_jit_enable=1`".to_owned(),
        ),
    ];
    let keeps = config.is_none_or(|config| {
        let mut inbound = config.workloads.iter().filter_map(|one| one.inbound.as_ref());
        inbound.any(|inbound| inbound.source == SourceAddress::Keep)
    });
    if keeps {
        findings.push(advice(
            "limits",
            "replies led back by mark, for inbound.source keep".to_owned(),
            number("/proc/sys/net/ipv4/tcp_fwmark_accept") == Some(1),
            "`sysctl -w net.ipv4.tcp_fwmark_accept=1`, or `inbound.source: own`".to_owned(),
        ));
    }
    findings.extend(tracking(profile, config));
    findings
}

/// What redirect needs of connection tracking: room, and patience.
fn tracking(profile: &Profile, config: Option<&Config>) -> Vec<Finding> {
    let Some((count, max)) = conntrack_use() else { return Vec::new() };
    let mut findings = vec![advice(
        "limits",
        format!("room in connection tracking, for redirect: {count} of {max} entries"),
        count < max / 10 * 9,
        format!(
            "new connections will be dropped by the kernel: `sysctl -w \
             net.netfilter.nf_conntrack_max={}`, or capture by tproxy and connect, which need no \
             entries",
            max * 4
        ),
    )];
    let redirects = config.is_some_and(|config| {
        config.workloads.iter().any(|Captured { inbound, outbound, .. }| {
            inbound.as_ref().is_some_and(|one| one.capture == InboundCapture::Redirect)
                || outbound.as_ref().is_some_and(|one| one.capture == OutboundCapture::Redirect)
        })
    });
    let close_wait = number("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait");
    if let Some(seconds) = close_wait.filter(|_| redirects) {
        findings.push(advice(
            "limits",
            "half-closed flows end before their tracking entry, for redirect".to_owned(),
            profile.timeouts.half_closed.as_secs() < seconds,
            format!("timeouts.half_closed_ms must be below {seconds} s (nf_conntrack_tcp_timeout_close_wait)"),
        ));
    }
    findings
}

/// Others in this network namespace, and on the way of the workload's connects.
pub(super) fn conflicts(config: Option<&Config>) -> Vec<Finding> {
    let ruleset = ruleset();
    let mut findings: Vec<Finding> = OTHERS
        .iter()
        .filter(|(_, signs, _)| signs.iter().any(|sign| ruleset.contains(sign)))
        .map(|(name, _, cure)| warning(format!("{name} has rules here"), (*cure).to_owned()))
        .collect();
    findings.extend(whole_marks(&ruleset).map(|place| {
        let cure = "let it set its own bits only (`meta mark set meta mark | …`), or keep it away \
                    from captured traffic";
        let bits = format!("a rule of {place} sets the whole mark, weir's bits {MARK_MASK:#x} too");
        warning(bits, cure.to_owned())
    }));
    findings.extend(foreign_rules(&listed("ip", &["rule"])).into_iter().map(|rule| {
        let cure =
            "choose marks outside the mask 0xfff for it, or leave out weir's (0x539 to 0x53c)";
        warning(format!("`ip rule` {rule} matches a mark of weir's"), cure.to_owned())
    }));
    findings.extend(programs(config));
    if findings.is_empty() {
        findings.push(finding("conflicts", "nobody else captures or rewrites here", Ok(())));
    }
    findings
}

/// Programs of others that the workload's connects meet, and any host-wide ones.
fn programs(config: Option<&Config>) -> Vec<Finding> {
    let outbound = config.iter().flat_map(|config| &config.workloads);
    let workloads = outbound.filter_map(|one| one.outbound.as_ref()?.workload.as_ref());
    let mut cgroups: Vec<PathBuf> = workloads
        .flat_map(|workload| match workload {
            Workload::Cgroups(paths) => paths.clone(),
            Workload::Uid(_) => Vec::new(),
        })
        .collect();
    if cgroups.is_empty() {
        cgroups.push("/".into());
    }
    let mut found: Vec<Neighbour> =
        cgroups.iter().flat_map(|cgroup| neighbours(cgroup).unwrap_or_default()).collect();
    found.sort_by_key(|one| one.id);
    found.dedup_by_key(|one| one.id);
    let told = |Neighbour { id, name, place, .. }: Neighbour| {
        let by = if name.starts_with("cil_") { "Cilium's program" } else { "the program" };
        let cure = "if it rewrites destinations, weir takes what it makes of them when it runs \
                    first, and is overruled when it runs last (docs/CAPTURE.md); exclude its \
                    addresses if in doubt";
        warning(format!("{by} {name} ({id}) is attached at {place}"), cure.to_owned())
    };
    found.into_iter().map(told).collect()
}

/// Rules of the packet filter, of the old kind too if there are any.
fn ruleset() -> String {
    let mut text = listed("nft", &["-t", "list", "ruleset"]);
    for (family, program) in [("ip", "iptables-legacy-save"), ("ip6", "ip6tables-legacy-save")] {
        let names = format!("/proc/net/{family}_tables_names");
        if fs::read_to_string(names).is_ok_and(|names| !names.trim().is_empty()) {
            text.push_str(&listed(program, &[]));
        }
    }
    text
}

/// Where a rule of somebody else sets all bits of a packet's mark.
fn whole_marks(ruleset: &str) -> impl Iterator<Item = String> {
    let mut places = Vec::new();
    let mut table = "";
    for line in ruleset.lines() {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches([' ', '{']).split(" {").next().unwrap_or(name);
        }
        let is_ours = table.starts_with("inet weir");
        let value = line.split_once("meta mark set ").map(|(_, value)| value);
        if value.is_some_and(|value| value.starts_with("0x")) && !is_ours {
            places.push(format!("table {table}"));
        }
    }
    places.dedup();
    places.into_iter()
}

/// Lines of `ip rule` that are not ours and match one of our marks.
fn foreign_rules(rules: &str) -> Vec<String> {
    let value = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let ours = format!("lookup {ROUTE_TABLE}");
    let matches = |line: &&str| {
        let word = line.split("fwmark ").nth(1).and_then(|rest| rest.split(' ').next());
        let (mark, mask) = match word.map(|word| word.split_once('/').unwrap_or((word, "ffffffff")))
        {
            Some((mark, mask)) => (value(mark), value(mask)),
            None => return false,
        };
        let Some((mark, mask)) = mark.zip(mask) else { return false };
        // One of ours leads nowhere: it keeps the way back of packets that keep their mark.
        let is_way_back = line.contains("iif lo fwmark 0x53c/0xfff goto ");
        !line.trim_end().ends_with(&ours)
            && !is_way_back
            && [OWN_MARK, STEER_MARK, OUTBOUND_MARK, FOREIGN_MARK]
                .iter()
                .any(|own| own & mask == mark)
    };
    rules.lines().filter(matches).map(str::to_owned).collect()
}

fn listed(program: &str, words: &[&str]) -> String {
    let output =
        Command::new(program).args(words).stdin(Stdio::null()).stderr(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

fn number(path: impl AsRef<Path>) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn advice(group: &'static str, what: String, is_well: bool, cure: String) -> Finding {
    let (outcome, cure) =
        if is_well { (Outcome::Works, String::new()) } else { (Outcome::Warns, cure) };
    Finding { cure, group, outcome, what }
}

fn warning(what: String, cure: String) -> Finding {
    Finding { cure, group: "conflicts", outcome: Outcome::Warns, what }
}

/// Who it is, how its rules are told, and what to do.
const OTHERS: [(&str, &[&str], &str); 9] = [
    ("Calico", &["cali-"], TRANSLATES),
    ("Cilium", &["CILIUM_"], TRANSLATES),
    ("Docker", &["chain DOCKER", ":DOCKER"], TRANSLATES),
    ("firewalld", &["firewalld"], FILTERS),
    ("Istio", &["ISTIO_", "istio"], CAPTURES),
    ("Kuma", &["KUMA_MESH", "MESH_INBOUND"], CAPTURES),
    ("kube-proxy", &["KUBE-SERVICES", "kube-proxy"], TRANSLATES),
    ("Linkerd", &["PROXY_INIT_"], CAPTURES),
    ("ufw", &["ufw-", "ufw6-"], FILTERS),
];
const CAPTURES: &str = "it captures the same traffic: let one of the two do it";
const FILTERS: &str = "it may flush or filter: weir's table has an owner and survives a flush; open the \
                       capture ports in its zones only to loopback";
const TRANSLATES: &str = "what weir takes by tproxy is not tracked and so not translated: exclude the ports \
                          and networks that it publishes, or capture by redirect";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_the_workers_that_the_config_wants() {
        let text =
            "workers: 3\nforward: [{ listen: \"127.0.0.1:1\", endpoints: [\"127.0.0.1:2\"] }]\n";
        let config = Config::parse("weir.yaml", None, text).unwrap();
        let findings = limits(&config.profile, Some(&config));
        let is_told = |one: &Finding| one.what.ends_with(" flows on 3 workers");
        assert!(findings.iter().any(is_told), "{findings:?}");
    }

    #[test]
    fn rules_that_match_our_marks_are_told_from_others() {
        let rules = "0:\tfrom all lookup local\n\
                     100:\tfrom all fwmark 0x53a/0xfff lookup 133\n\
                     101:\tfrom all fwmark 0x1/0x1 lookup 200\n\
                     102:\tfrom all fwmark 0x40000/0xc0000 lookup 7\n\
                     103:\tfrom all fwmark 0x539 lookup 100\n\
                     104:\tfrom all fwmark 0x53c/0xfff lookup 100\n\
                     105:\tfrom all iif lo fwmark 0x53c/0xfff goto 32766\n";
        let found = foreign_rules(rules);
        assert_eq!(found.len(), 3, "{found:?}");
        let begins = ["101:", "103:", "104:"];
        assert!(found.iter().zip(begins).all(|(rule, begin)| rule.starts_with(begin)));
    }

    #[test]
    fn only_whole_marks_of_others_are_named() {
        let ruleset = "table inet weir {\n\tmeta mark set 0x0000053b\n}\n\
                       table ip mangle {\n\tmeta mark set 0x00000001\n\tmeta mark set 0x2\n}\n\
                       table ip good {\n\tmeta mark set meta mark | 0x00010000\n}\n";
        assert_eq!(whole_marks(ruleset).collect::<Vec<_>>(), ["table ip mangle"]);
    }
}
