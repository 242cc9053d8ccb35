// SPDX-License-Identifier: Apache-2.0
//! The machine that is measured on, and what on it would falsify the figures.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::place::{allowed_cpus, descriptors_max};
use crate::watch::{Memory, Watch};

/// What it is, and how it is set.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Machine {
    pub(crate) autogroup: String,
    pub(crate) clocksource: String,
    /// Of the host, and of the namespaces in which was measured.
    pub(crate) congestion: [String; 2],
    pub(crate) cpu_model: String,
    pub(crate) cpus_allowed: Vec<usize>,
    pub(crate) descriptors_max: u32,
    pub(crate) forwarder_cpu: usize,
    pub(crate) generator_cpu: usize,
    pub(crate) governor: String,
    pub(crate) is_virtual: bool,
    pub(crate) kernel: String,
    pub(crate) loadavg: String,
    pub(crate) loadtest: String,
    pub(crate) memory_kb: u64,
    /// CPUs that others kept busy just before the start.
    pub(crate) others_cpu: f64,
    pub(crate) pressure: String,
}

impl Machine {
    pub(super) fn look(congestion: &str, generator_cpu: usize, forwarder_cpu: usize) -> Machine {
        let proc = |name: &str| read(&format!("/proc/{name}"));
        let cpu = proc("cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
        let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let memory = proc("meminfo");
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let governor = format!("{CPU}/cpu{forwarder_cpu}/cpufreq/scaling_governor");
        Machine {
            autogroup: proc("sys/kernel/sched_autogroup_enabled"),
            clocksource: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            congestion: [proc("sys/net/ipv4/tcp_congestion_control"), congestion.to_owned()],
            cpu_model: model.unwrap_or_default().trim_start_matches([' ', '\t', ':']).to_owned(),
            cpus_allowed: allowed_cpus(),
            descriptors_max: descriptors_max(),
            forwarder_cpu,
            generator_cpu,
            governor: read(&governor),
            is_virtual: flags.split(' ').any(|flag| flag == "hypervisor"),
            kernel: proc("sys/kernel/osrelease"),
            loadavg: proc("loadavg"),
            loadtest: env!("CARGO_PKG_VERSION").to_owned(),
            memory_kb: memory
                .and_then(|text| text.trim().strip_suffix(" kB")?.parse().ok())
                .unwrap_or(0),
            others_cpu: others_cpu(),
            pressure: proc("pressure/cpu").lines().next().unwrap_or_default().to_owned(),
        }
    }

    /// What makes the figures worth less, and what to do.
    pub(super) fn warnings(&self, is_loopback: bool) -> Vec<String> {
        let mut list = Vec::new();
        let mut warn = |holds: bool, text: String| {
            if holds {
                list.push(text);
            }
        };
        let [host, inside] = &self.congestion;
        warn(
            is_loopback && host != inside,
            format!(
                "forwarders' sockets use the host's congestion control {host}, not {inside}: BBR paces \
                 bulk, so that all forwarders look alike (as root, namespaces of our own are used)"
            ),
        );
        warn(
            !is_loopback && inside == "bbr",
            "with BBR bulk is paced, and all forwarders look alike: say --congestion reno"
                .to_owned(),
        );
        warn(
            self.generator_cpu == self.forwarder_cpu,
            "generator and forwarder share a CPU: rates are of both together".to_owned(),
        );
        warn(
            self.others_cpu > OTHERS_WARN,
            format!("others keep {:.2} CPUs busy: figures will be noisy", self.others_cpu),
        );
        warn(
            !self.governor.is_empty() && self.governor != "performance",
            format!(
                "the CPU governor is {}: `cpupower frequency-set -g performance`",
                self.governor
            ),
        );
        warn(
            self.is_virtual,
            "this is a virtual machine: to wake a halted CPU is dear, so latencies at low load say \
             more of the host than of a forwarder"
                .to_owned(),
        );
        warn(
            !matches!(self.clocksource.as_str(), "tsc" | "kvm-clock" | "arch_sys_counter" | ""),
            format!("the clock source {} is slow: it costs the generator", self.clocksource),
        );
        list
    }

    /// Others have so much that a measurement is of no use.
    pub(super) fn is_too_busy(&self) -> bool {
        self.others_cpu > OTHERS_MAX
    }
}

/// CPUs that others keep busy, in a short look.
fn others_cpu() -> f64 {
    let mut watch = Watch::new(Vec::new(), None);
    let (begin, began) = (watch.read(), Instant::now());
    std::thread::sleep(LOOK);
    let (end, took) = (watch.read(), began.elapsed());
    let others = watch.difference(&begin, &end, &Memory::default());
    others.map_or(0.0, |watched| watched.others_seconds / took.as_secs_f64())
}

fn read(path: &str) -> String {
    // What this kernel does not tell is left empty.
    fs::read_to_string(Path::new(path)).unwrap_or_default().trim().to_owned()
}

const CPU: &str = "/sys/devices/system/cpu";
const LOOK: Duration = Duration::from_millis(300);
/// CPUs of others: with more we refuse, unless told otherwise.
const OTHERS_MAX: f64 = 0.5;
const OTHERS_WARN: f64 = 0.1;
