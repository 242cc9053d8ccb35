// SPDX-License-Identifier: Apache-2.0
//! From a config to running workers. Everything that can be refused is refused before anything
//! is changed.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::sync::{Notify, watch};

use super::forwarding::Forwarding;
use super::places::Place;
use super::services::Services;
use super::takeover::TakingOver;
use super::tracking::{Counted, keep_below};
use super::{InForce, RunError, Running, capturing, descriptors, listeners, routes, takeover};
use crate::capture::{OWN_MARK, OwnPorts, PortCounts, Prepared, STEER_MARK, SourcePorts};
use crate::config::{Config, SourceAddress, Workers};
use crate::profile::RelayMode;
use crate::ring::Marks;
use crate::sys::process;
use crate::worker::{self, Setup};

/// Timers are below those of connection tracking, wherever it matters.
pub(super) fn fit_timers(
    config: &mut Config,
    places: impl FnOnce(&Config) -> Result<Vec<Place>, RunError>,
) -> Result<(), RunError> {
    for place in places(config)? {
        if let Some(plan) = place.plan(config) {
            place.within(|| keep_below(&mut config.profile, &plan))?;
        }
    }
    Ok(())
}

/// What is asked for in every place, as far as it can be tried without a change.
pub(super) fn prepare(config: &Config) -> Result<Vec<(Place, Option<Prepared>)>, RunError> {
    let mut all = Vec::new();
    for place in Place::all(config)? {
        let plan = place.plan(config);
        let prepared = plan.map(|plan| place.within(|| plan.prepare())).transpose()?.transpose()?;
        all.push((place, prepared));
    }
    Ok(all)
}

/// Where weir was started, as workers see it.
pub(super) fn home(prepared: &[(Place, Option<Prepared>)]) -> Result<Arc<worker::Place>, RunError> {
    let first = prepared.first().map(|(home, _)| Arc::clone(&home.for_workers));
    first.ok_or_else(|| RunError::Runtime(std::io::ErrorKind::NotFound.into()))
}

/// Opens listeners and starts workers.
pub(super) fn start(
    config: &Config,
    prepared: &[(Place, Option<Prepared>)],
) -> Result<Running, RunError> {
    let home = home(prepared)?;
    let captures = prepared.iter().any(|(_, prepared)| prepared.is_some());
    let prepared_here = prepared.iter().filter_map(|(_, prepared)| prepared.as_ref());
    let mut records = capturing::Recorded::default();
    prepared_here.for_each(|prepared| records.meet(&prepared.records()));
    refuse_loops(config, &home.own_ports)?;
    let cpus = cpus(&config.workers)?;
    let share = descriptors::share(config, cpus.len())?;
    let Forwarding { fallback, mut sockmaps } =
        Forwarding::prepare(&config.profile, share.sockmap_flows_max, cpus.len())?;
    let services = Arc::new(Services::default());
    let plain = services.enter(&config.forward);
    let entered = config.takeover.as_ref().map(|takeover| takeover::enter(takeover, &services));
    let routes = routes::all(config, &plain, entered.as_ref());
    let mut sockets = listeners::open(config, prepared, &routes, cpus.len())?;
    let own_ports = capturing::own_ports(config, &config.workloads);
    let takeover = config.takeover.as_ref();
    let mark = captures.then_some(OWN_MARK);
    let taking_over =
        takeover.map(|takeover| TakingOver::new(takeover, own_ports, mark, &services));
    let profile = Arc::new(config.profile.clone());
    let port_counts = PortCounts::new();
    let count = u16::try_from(cpus.len()).unwrap_or(u16::MAX);
    let marks = captures.then_some(Marks { bound: STEER_MARK, unbound: OWN_MARK });
    let mut workers = Vec::with_capacity(cpus.len());
    for (index, cpu) in (0u16..).zip(&cpus) {
        let setup = Setup {
            cpu: *cpu,
            home: Arc::clone(&home),
            index,
            listeners: sockets.pop().unwrap_or_default(),
            marks,
            profile: Arc::clone(&profile),
            services: services.first_update(),
            share,
            sockmap: sockmaps.pop(),
            source_ports: SourcePorts::new(Arc::clone(&port_counts), index, count),
        };
        workers.push(worker::spawn(setup)?);
    }
    let mut inbounds = config.workloads.iter().filter_map(|captured| captured.inbound.as_ref());
    let keeps = inbounds.any(|inbound| inbound.source == SourceAddress::Keep);
    if keeps && workers.iter().any(|worker| !worker.features().bind) {
        return Err(RunError::NoBind);
    }
    let splices = config.profile.relay.mode == RelayMode::Splice;
    if splices && workers.iter().any(|worker| !worker.features().splice) {
        return Err(RunError::NoSplice);
    }
    let (capturing, draining) = (AtomicBool::new(false), AtomicBool::new(false));
    Ok(Running {
        bell: Notify::new(),
        captures,
        capturing,
        counted: Counted::default(),
        draining,
        fallback,
        in_force: watch::Sender::new(InForce::of(config)),
        on_change: config.on_change,
        profile,
        records: watch::Sender::new(records),
        rules_lost: capturing::RulesLost::default(),
        services,
        taking_over,
        workers,
    })
}

pub(super) fn refuse_loops(config: &Config, own_ports: &OwnPorts) -> Result<(), RunError> {
    for forward in &config.forward {
        let mut addrs = forward.endpoints.iter().map(|endpoint| endpoint.addr);
        if let Some(endpoint) = addrs.find(|addr| own_ports.forbids(*addr)) {
            return Err(RunError::Loop { endpoint, name: forward.name.clone() });
        }
    }
    Ok(())
}

/// One entry a worker: its CPU, if it has one of its own.
pub(super) fn cpus(workers: &Workers) -> Result<Vec<Option<usize>>, RunError> {
    let allowed = process::allowed_cpus().map_err(RunError::Runtime)?;
    Ok(match workers {
        Workers::Auto => allowed.into_iter().map(Some).collect(),
        Workers::Count(count) => {
            let on = |index: u16| allowed.get(usize::from(index)).copied();
            (0..count.get()).map(on).collect()
        }
        Workers::Cpus(cpus) => cpus.iter().copied().map(Some).collect(),
    })
}
