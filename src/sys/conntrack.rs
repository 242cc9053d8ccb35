// SPDX-License-Identifier: Apache-2.0
//! Connection tracking of this network namespace: its limits and what it lost.

use std::fs;
use std::time::Duration;

/// How long an entry stays without a packet, by what the connection has said.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EntryLife {
    /// Both directions are open.
    pub established: Duration,
    /// One direction has ended: the shorter of `fin_wait` and `close_wait`.
    pub half_closed: Duration,
}

/// What the sysctls say, and the kernel's defaults where they are not to be read.
#[must_use]
pub fn entry_life() -> EntryLife {
    let seconds = |name: &str, default| Duration::from_secs(number(name).unwrap_or(default));
    EntryLife {
        established: seconds("nf_conntrack_tcp_timeout_established", 432_000),
        half_closed: seconds("nf_conntrack_tcp_timeout_fin_wait", 120)
            .min(seconds("nf_conntrack_tcp_timeout_close_wait", 60)),
    }
}

/// Packets dropped in this network namespace because there was no entry to be had, since it was made.
#[must_use]
pub fn dropped_packets() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/stat/nf_conntrack").unwrap_or_default();
    sum(&text, "drop")
}

/// A table of one line of names, and one line of numbers in base 16 for each CPU.
fn sum(table: &str, name: &str) -> u64 {
    let mut lines = table.lines();
    let names = lines.next().unwrap_or_default();
    let Some(index) = names.split_whitespace().position(|word| word == name) else { return 0 };
    let value = |line: &str| {
        line.split_whitespace().nth(index).and_then(|word| u64::from_str_radix(word, 16).ok())
    };
    lines.filter_map(value).sum()
}

fn number(name: &str) -> Option<u64> {
    fs::read_to_string(format!("/proc/sys/net/netfilter/{name}")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_of_all_cpus_are_added() {
        let table = "entries  clashres drop early_drop\n0000001f  00000000 0000000a 00000000\n\
                     0000001f  00000000 00000003 00000000\n";
        assert_eq!(sum(table, "drop"), 13);
        assert_eq!((sum(table, "nothing"), sum("", "drop")), (0, 0));
    }
}
