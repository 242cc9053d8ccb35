// SPDX-License-Identifier: Apache-2.0
//! How many descriptors there are, and each worker's share of what they allow.
//!
//! A flow's sockets live in its worker's table, which is measured against the limit alone. Splicing
//! takes descriptors of the process: what a relay named by the user may need is there at the
//! start, or weir does not start.

use super::{RunError, facade};
use crate::config::Config;
use crate::profile::{Limits, RelayMode};
use crate::sys::process;
use crate::worker::Share;

/// Each worker's share, as far as descriptors allow.
pub(super) fn share(config: &Config, workers: usize) -> Result<Share, RunError> {
    let limit = process::raise_descriptor_limit().map_err(RunError::Runtime)?;
    let Limits { flows_max, .. } = config.profile.limits;
    let share = equal(&config.profile.limits, workers);
    // io_uring/rsrc.c checks each table alone against RLIMIT_NOFILE.
    let needed = u64::from(share.flows_max) * 2;
    if needed > limit {
        return Err(RunError::Descriptors { flows_max, limit, needed, workers });
    }
    let facades = config.takeover.iter().filter(|takeover| takeover.facade.is_some()).count();
    let of_facades = facades * (2 * facade::CONNECTIONS_MAX + 1);
    let base = (workers * (listeners(config) + OF_A_WORKER) + of_facades) as u64 + OF_CONTROL;
    let Share { pipes_max, spliced_flows_max, .. } = share;
    let wanted = u64::from(pipes_max + spliced_flows_max) * 2 * workers as u64;
    match config.profile.relay.mode {
        RelayMode::Auto | RelayMode::Splice if base + wanted <= limit => Ok(share),
        RelayMode::Splice => Err(RunError::SpliceDescriptors { limit, needed: base + wanted }),
        RelayMode::Auto => {
            let share = fewer(share, limit.saturating_sub(base), wanted);
            let flows = share.spliced_flows_max as usize * workers;
            let text = "RLIMIT_NOFILE leaves descriptors for fewer spliced flows than the profile \
                        allows";
            tracing::warn!(limit, spliced_flows_max = flows, "{text}");
            Ok(share)
        }
        RelayMode::Copy | RelayMode::Sockmap => Ok(share),
    }
}

/// Sockets of one worker that listen, at most.
fn listeners(config: &Config) -> usize {
    let captured = config.workloads.iter().map(|captured| {
        // Outbound has one for each family.
        usize::from(captured.inbound.is_some()) + 2 * usize::from(captured.outbound.is_some())
    });
    let taken_over = config.takeover.iter().map(|takeover| {
        2 + takeover.services.iter().filter(|wanted| wanted.listen.is_some()).count()
    });
    config.forward.len() + captured.chain(taken_over).sum::<usize>()
}

/// An equal part for each worker, rounded up.
fn equal(limits: &Limits, workers: usize) -> Share {
    let workers = u32::try_from(workers).unwrap_or(u32::MAX).max(1);
    Share {
        connects_pending_max: limits.connects_pending_max.div_ceil(workers),
        flows_max: limits.flows_max.div_ceil(workers),
        flows_per_source_max: limits.flows_per_source_max.div_ceil(workers),
        pipes_max: limits.pipes_max.div_ceil(workers),
        sockmap_flows_max: limits.sockmap_flows_max.div_ceil(workers),
        spliced_flows_max: limits.spliced_flows_max.div_ceil(workers),
    }
}

/// As many spliced flows and pipes as `there` descriptors allow where `wanted` would be used.
fn fewer(share: Share, there: u64, wanted: u64) -> Share {
    let part =
        |count: u32| u32::try_from(u64::from(count) * there / wanted.max(1)).unwrap_or(count);
    let (pipes_max, spliced_flows_max) = (part(share.pipes_max), part(share.spliced_flows_max));
    Share { pipes_max, spliced_flows_max, ..share }
}

/// Ring and mailbox, besides the listeners; and what a start holds for a moment.
const OF_A_WORKER: usize = 8;
/// Standard streams, admin connections, eBPF, registries.
const OF_CONTROL: u64 = 96;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listener_is_counted() {
        let text = "forward:\n- { listen: \"127.0.0.1:1\", endpoints: [\"127.0.0.1:2\"] }\n\
                    takeover: { services: [{ name: a }, { name: b, listen: \"127.0.0.2:3\" }] }\n\
                    inbound: {}\n\
                    workloads:\n- { netns: /a, inbound: {}, outbound: {} }\n\
                    - { cgroup: /c, outbound: {} }\n";
        assert_eq!(listeners(&Config::parse("weir.yaml", None, text).unwrap()), 1 + 3 + 1 + 3 + 2);
    }

    #[test]
    fn fewer_descriptors_mean_fewer_of_both() {
        let share = Share {
            connects_pending_max: 1,
            sockmap_flows_max: 1,
            flows_max: 1,
            flows_per_source_max: 0,
            pipes_max: 256,
            spliced_flows_max: 1024,
        };
        let less = fewer(share, 1280, 2560);
        assert_eq!((less.pipes_max, less.spliced_flows_max), (128, 512));
        let none = fewer(share, 0, 2560);
        assert_eq!((none.pipes_max, none.spliced_flows_max), (0, 0));
    }
}
