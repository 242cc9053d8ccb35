// SPDX-License-Identifier: Apache-2.0
//! Registries in the OpenMetrics text format: one series for each registry of the config.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::takeover::{FacadeRow, RegistryRow};

/// As they are at the moment of asking.
#[derive(Debug)]
pub(super) struct Registries(pub(super) Vec<RegistryRow>);

impl Collector for Registries {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if self.0.is_empty() {
            return Ok(());
        }
        for (name, help, pick) in GAUGES {
            let kind = ConstGauge::new(0i64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for row in &self.0 {
                let labels = [("registry", row.name.as_str())];
                ConstGauge::new(pick(row)).encode(family.encode_family(&labels)?)?;
            }
        }
        for (name, help, pick) in COUNTERS {
            let kind = ConstCounter::new(0u64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for row in &self.0 {
                let labels = [("registry", row.name.as_str())];
                ConstCounter::new(pick(row)).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Times a registry's word was not taken at once";
        let kind = ConstCounter::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor("registry_doubted", help, None, kind)?;
        for row in &self.0 {
            for (reason, count) in row.doubted {
                let labels = [("registry", row.name.as_str()), ("reason", reason)];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// The façade, if the config has one.
#[derive(Debug)]
pub(super) struct Facades(pub(super) Option<FacadeRow>);

impl Collector for Facades {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(FacadeRow { counts, sessions }) = self.0 else { return Ok(()) };
        let sessions = ConstGauge::new(i64::try_from(sessions).unwrap_or(i64::MAX));
        let help = "Sessions of applications that are connected through the façade";
        let kind = sessions.metric_type();
        sessions.encode(encoder.encode_descriptor("facade_sessions", help, None, kind)?)?;
        let kind = ConstCounter::new(0u64).metric_type();
        let help = "Sessions that were ended because an earlier weir had begun them";
        let family = encoder.encode_descriptor("facade_expired", help, None, kind)?;
        ConstCounter::new(counts.expired).encode(family)?;
        let help = "Providers in ZooKeeper that the façade passed, by what became of their address";
        let mut family = encoder.encode_descriptor("facade_providers", help, None, kind)?;
        for (became, count) in [
            ("direct", counts.direct),
            ("inbound", counts.inbound),
            ("outbound", counts.outbound),
            ("refused", counts.refused),
        ] {
            let labels = [("address", became)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

type Gauge = fn(&RegistryRow) -> i64;
type Counter = fn(&RegistryRow) -> u64;

/// Name, help, which.
const GAUGES: [(&str, &str, Gauge); 2] = [
    ("registry_connected", "1 while the registry answers", |row| {
        i64::from(row.standing.is_connected)
    }),
    ("registry_published", "Services of this host that the registry says it holds", |row| {
        i64::try_from(row.published).unwrap_or(i64::MAX)
    }),
];
/// Name, help, which.
const COUNTERS: [(&str, &str, Counter); 5] = [
    ("registry_failures", "Attempts to connect that failed, and sessions that ended", |row| {
        row.standing.failures
    }),
    ("registry_refusals", "Publications, or ends of some, that the registry did not take", |row| {
        row.standing.refusals
    }),
    ("registry_sessions", "Sessions that began", |row| row.standing.sessions),
    ("registry_weights_clamped", "Weights above 10000, which were taken as 10000", |row| {
        row.standing.clamped
    }),
    ("registry_snapshots", "Times it said where a service lives", |row| row.standing.snapshots),
];
