// SPDX-License-Identifier: Apache-2.0
//! What a load costs others, read from /proc at the begin and at the end of the measurement.
//!
//! The generator reads it itself, between two turns: nobody has anything to do then, so that the
//! time of reading is charged to nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Whom to watch.
pub(crate) struct Watch {
    metrics: Option<PathBuf>,
    /// Counters of the network namespaces that the load passes.
    namespaces: Vec<Counters>,
    pids: Vec<u32>,
}

/// What came to it in the measurement.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Watched {
    /// Entries that were added meanwhile, in all namespaces that the load passes.
    #[serde(default)]
    pub(crate) conntrack_added: i64,
    /// Entries at the end, in all namespaces that the load passes.
    pub(crate) conntrack_entries: u64,
    /// CPU time of the watched processes and their children.
    pub(crate) cpu_seconds: f64,
    /// CPU time of the kernel's own threads.
    pub(crate) kernel_threads_seconds: f64,
    /// What the watched program says of itself, if it has metrics: what was added.
    pub(crate) metrics: BTreeMap<String, f64>,
    /// CPU time of everybody else: load that does not belong here.
    pub(crate) others_seconds: f64,
    /// TCP segments sent again, in all namespaces that the load passes.
    pub(crate) retransmits: u64,
    /// What the kernel's slab allocator holds more than before the load.
    pub(crate) slab_bytes: i64,
    /// Anonymous memory of the watched processes more than before the load.
    pub(crate) user_bytes: i64,
}

/// One reading.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    conntrack_entries: u64,
    kernel_threads: u64,
    metrics: BTreeMap<String, f64>,
    others: u64,
    retransmits: u64,
    watched: u64,
}

/// Memory before anything was opened; the user's by process, because children come and go.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    slab: u64,
    user: BTreeMap<u32, u64>,
}

/// Files that belong to the namespace in which they were opened.
struct Counters {
    conntrack: Option<File>,
    snmp: Option<File>,
}

impl Watch {
    /// Processes with all their children; `metrics` is the admin socket of a weir.
    pub(crate) fn new(pids: Vec<u32>, metrics: Option<PathBuf>) -> Watch {
        Watch { metrics, namespaces: Vec::new(), pids }
    }

    /// Watches the namespace in which this thread is, too.
    pub(crate) fn add_this_namespace(&mut self) {
        self.namespaces.push(Counters {
            conntrack: File::open("/proc/sys/net/netfilter/nf_conntrack_count").ok(),
            snmp: File::open("/proc/thread-self/net/snmp").ok(),
        });
    }

    pub(crate) fn memory(&self) -> Result<Memory> {
        let mut user = BTreeMap::new();
        for pid in self.family(&parents()) {
            match anonymous_bytes(pid) {
                Ok(bytes) => drop(user.insert(pid, bytes)),
                // A child that helped for a moment has ended.
                Err(_) if !self.pids.contains(&pid) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Memory { slab: slab_bytes()?, user })
    }

    pub(crate) fn read(&mut self) -> Reading {
        let mut reading = Reading {
            metrics: self.metrics.as_deref().and_then(metrics).unwrap_or_default(),
            ..Reading::default()
        };
        for counters in &mut self.namespaces {
            reading.conntrack_entries += again(&mut counters.conntrack)
                .and_then(|text| text.trim().parse::<u64>().ok())
                .unwrap_or(0);
            reading.retransmits +=
                again(&mut counters.snmp).and_then(|text| retransmits(&text)).unwrap_or(0);
        }
        let parents = parents();
        let family = self.family(&parents);
        for (pid, parent) in &parents {
            let nanos = cpu_nanos(*pid);
            match (family.contains(pid), *pid == KTHREADD || *parent == KTHREADD) {
                (true, _) => reading.watched += nanos,
                (false, true) => reading.kernel_threads += nanos,
                (false, false) if *pid == std::process::id() => {}
                (false, false) => reading.others += nanos,
            }
        }
        reading
    }

    /// What was added between two readings, and memory since the one before the load.
    pub(crate) fn difference(
        &self,
        begin: &Reading,
        end: &Reading,
        memory: &Memory,
    ) -> Result<Watched> {
        let now = self.memory()?;
        let before = |pid: &u32| memory.user.get(pid).copied().unwrap_or(0);
        let user = now.user.iter().map(|(pid, bytes)| signed(*bytes) - signed(before(pid)));
        let added = |(name, value): (&String, &f64)| {
            let before = begin.metrics.get(name).copied().unwrap_or(0.0);
            (value - before > 0.0).then(|| (name.clone(), value - before))
        };
        Ok(Watched {
            conntrack_added: signed(end.conntrack_entries) - signed(begin.conntrack_entries),
            conntrack_entries: end.conntrack_entries,
            cpu_seconds: seconds(end.watched.saturating_sub(begin.watched)),
            kernel_threads_seconds: seconds(
                end.kernel_threads.saturating_sub(begin.kernel_threads),
            ),
            metrics: end.metrics.iter().filter_map(added).collect(),
            others_seconds: seconds(end.others.saturating_sub(begin.others)),
            retransmits: end.retransmits.saturating_sub(begin.retransmits),
            slab_bytes: signed(now.slab) - signed(memory.slab),
            user_bytes: user.sum(),
        })
    }

    fn family(&self, parents: &BTreeMap<u32, u32>) -> BTreeSet<u32> {
        descend(&self.pids, parents)
    }
}

/// A process and all that descend from it.
pub(crate) fn family(pid: u32) -> BTreeSet<u32> {
    descend(&[pid], &parents())
}

fn descend(pids: &[u32], parents: &BTreeMap<u32, u32>) -> BTreeSet<u32> {
    let mut family: BTreeSet<u32> = pids.iter().copied().collect();
    loop {
        let born = parents.iter().filter(|(_, parent)| family.contains(parent));
        let born: Vec<u32> =
            born.map(|(pid, _)| *pid).filter(|pid| !family.contains(pid)).collect();
        if born.is_empty() {
            return family;
        }
        family.extend(born);
    }
}

/// Resident memory that belongs to user space alone (proc_pid_smaps(5)).
fn anonymous_bytes(pid: u32) -> Result<u64> {
    let place = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&place)
        .with_context(|| format!("read {place} (has the watched process ended?)"))?;
    kilobytes(&text, "Anonymous:").with_context(|| format!("no Anonymous in {place}"))
}

fn slab_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    kilobytes(&text, "Slab:").context("no Slab in /proc/meminfo")
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Every process and its parent.
fn parents() -> BTreeMap<u32, u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in brackets, may hold anything; then come the state and the parent.
        text.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    pids.filter_map(|pid| Some((pid, parent(pid)?))).collect()
}

/// Time on a CPU of all threads, in nanoseconds (sched-stats.rst); processes come and go.
fn cpu_nanos(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |place: PathBuf| {
        let text = fs::read_to_string(place.join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    };
    tasks.filter_map(|task| of(task.path())).sum()
}

/// Reads a file of /proc that is open already.
fn again(file: &mut Option<File>) -> Option<String> {
    let file = file.as_mut()?;
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_to_string(&mut text).ok()?;
    Some(text)
}

/// `RetransSegs` of the two lines of `Tcp:`, names and values.
fn retransmits(snmp: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let place = names.split(' ').position(|name| name == "RetransSegs")?;
    values.split(' ').nth(place)?.parse().ok()
}

/// The counters of a weir, summed over their labels but for those of `weir_fallback_total`.
fn metrics(socket: &Path) -> Option<BTreeMap<String, f64>> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: weir\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let mut sums = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("weir_")) {
        let (series, value) = line.rsplit_once(' ')?;
        let name = if series.starts_with("weir_fallback") {
            series
        } else {
            series.split('{').next().unwrap_or(series)
        };
        *sums.entry(name.to_owned()).or_insert(0.0) += value.parse::<f64>().unwrap_or(0.0);
    }
    Some(sums)
}

/// Counts and sizes of this world fit.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52 ns")]
fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

const KTHREADD: u32 = 2;

#[cfg(test)]
mod tests {
    use super::{kilobytes, retransmits};

    #[test]
    fn counters_are_found_by_their_names() {
        let snmp = "Ip: A B\nIp: 1 2\nTcp: InSegs RetransSegs OutRsts\nTcp: 10 42 3\n";
        assert_eq!(retransmits(snmp), Some(42));
        assert_eq!(kilobytes("MemFree:  1 kB\nSlab:    1234 kB\n", "Slab:"), Some(1234 * 1024));
    }
}
