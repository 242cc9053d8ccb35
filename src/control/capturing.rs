// SPDX-License-Identifier: Apache-2.0
//! Capture as the control thread sees it: planned from the config, installed last, watched while
//! weir runs, stopped first.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Running;
use crate::capture::{self, Capture, CaptureError, Plan};
use crate::config::{Config, SourceAddress};

/// What the config asks to capture, and whether it is.
pub(super) struct Capturing {
    capture: Option<Capture>,
    plan: Plan,
    retry_at: Instant,
}

/// The plan of a config; `None` if it captures nothing.
pub(super) fn plan(config: &Config) -> Option<Plan> {
    if config.inbound.is_none() && config.outbound.is_none() {
        return None;
    }
    let inbound = config.inbound.as_ref().map(|inbound| capture::Inbound {
        exclude: inbound.ports.exclude.clone(),
        include: inbound.ports.include.clone(),
        keep_source: inbound.source == SourceAddress::Keep,
        listen: inbound.listen,
    });
    let outbound_port = config.outbound.as_ref().map(|outbound| outbound.listen.port());
    Some(Plan { inbound, outbound_port, own_ports: own_ports(config) })
}

/// Every port that weir listens on with this config.
pub(super) fn own_ports(config: &Config) -> Vec<u16> {
    let forward = config.forward.iter().map(|forward| forward.listen);
    let inbound = config.inbound.iter().map(|inbound| inbound.listen);
    let outbound = config.outbound.iter().map(|outbound| outbound.listen);
    let all = forward.chain(inbound).chain(outbound).chain(config.admin.http);
    all.map(|addr| addr.port()).filter(|port| *port > 0).collect()
}

impl Capturing {
    /// Takes the traffic, and says so.
    pub(super) fn install(plan: Plan, running: &Running) -> Result<Capturing, CaptureError> {
        let capture = Some(plan.install()?);
        running.capturing.store(true, Ordering::Release);
        tracing::info!("capture is in place");
        Ok(Capturing { capture, plan, retry_at: Instant::now() })
    }

    /// Takes no more connections.
    pub(super) fn stop(&mut self, running: &Running) {
        running.capturing.store(false, Ordering::Release);
        if let Some(capture) = &mut self.capture {
            capture.stop();
        }
    }

    /// Puts back what somebody took away; while it is away, traffic flows directly.
    pub(super) fn watch(&mut self, running: &Running) {
        if self.capture.as_mut().is_some_and(Capture::stands) || Instant::now() < self.retry_at {
            return;
        }
        running.capturing.store(false, Ordering::Release);
        self.capture = None;
        self.retry_at = Instant::now() + RETRY_EVERY;
        match self.plan.install() {
            Ok(capture) => {
                tracing::warn!("capture had been removed by somebody: it is in place again");
                self.capture = Some(capture);
                running.capturing.store(true, Ordering::Release);
            }
            Err(error) => tracing::error!("capture is gone and traffic flows directly: {error}"),
        }
    }
}

const RETRY_EVERY: Duration = Duration::from_secs(1);
