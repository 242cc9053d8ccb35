// SPDX-License-Identifier: Apache-2.0
//! From a config to running workers. Everything that can be refused is refused before anything
//! is changed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::services::Services;
use super::{RunError, Running, capturing, descriptors, shown};
use crate::capture::{OWN_MARK, OwnPorts, PortCounts, Prepared, Records, STEER_MARK, SourcePorts};
use crate::config::{Config, ProxyProtocol, SourceAddress, Workers};
use crate::metrics::Origin;
use crate::profile::{Profile, RelayMode};
use crate::ring::Marks;
use crate::service::ServiceId;
use crate::sys::process;
use crate::sys::socket::{ListenError, ListenOptions, listen};
use crate::worker::{self, Listener, Route, Setup, Source};

/// Opens listeners and starts workers.
pub(super) fn start(config: &Config, prepared: Option<&Prepared>) -> Result<Running, RunError> {
    refuse_what_is_missing(config)?;
    let captures = prepared.is_some();
    let records = prepared.map(Prepared::records).unwrap_or_default().pop();
    let own_ports = Arc::new(OwnPorts::new(capturing::own_ports(config)));
    refuse_loops(config, &own_ports)?;
    let cpus = cpus(&config.workers)?;
    let share = descriptors::share(config, cpus.len())?;
    let services = Arc::new(Services::default());
    let plain = services.enter(&config.forward);
    let mut sockets = open_listeners(config, &plain, records.as_ref(), cpus.len())?;
    let profile = Arc::new(config.profile.clone());
    let port_counts = PortCounts::new();
    let count = u16::try_from(cpus.len()).unwrap_or(u16::MAX);
    let marks = captures.then_some(Marks { bound: STEER_MARK, unbound: OWN_MARK });
    let mut workers = Vec::with_capacity(cpus.len());
    for (index, cpu) in (0u16..).zip(&cpus) {
        let setup = Setup {
            cpu: *cpu,
            index,
            listeners: sockets.pop().unwrap_or_default(),
            marks,
            own_ports: Arc::clone(&own_ports),
            profile: Arc::clone(&profile),
            services: services.first_update(),
            share,
            source_ports: SourcePorts::new(Arc::clone(&port_counts), index, count),
        };
        workers.push(worker::spawn(setup)?);
    }
    let keeps =
        config.inbound.as_ref().is_some_and(|inbound| inbound.source == SourceAddress::Keep);
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
        config: shown::config(config),
        draining,
        on_change: config.on_change,
        profile,
        records,
        rules_lost: capturing::RulesLost::default(),
        services,
        workers,
    })
}

fn refuse_what_is_missing(config: &Config) -> Result<(), RunError> {
    if config.profile.relay.mode != RelayMode::Sockmap {
        return Ok(());
    }
    let missing = "relay sockmap is not in this version: use copy, splice or auto";
    Err(RunError::NotYet(missing.to_owned()))
}

fn refuse_loops(config: &Config, own_ports: &OwnPorts) -> Result<(), RunError> {
    for forward in &config.forward {
        let mut addrs = forward.endpoints.iter().map(|endpoint| endpoint.addr);
        if let Some(endpoint) = addrs.find(|addr| own_ports.forbids(*addr)) {
            return Err(RunError::Loop { endpoint, name: forward.name.clone() });
        }
    }
    Ok(())
}

/// One entry a worker: its CPU, if it has one of its own.
fn cpus(workers: &Workers) -> Result<Vec<Option<usize>>, RunError> {
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

/// For each worker its own socket of every listener.
fn open_listeners(
    config: &Config,
    services: &[ServiceId],
    records: Option<&Arc<Records>>,
    workers: usize,
) -> Result<Vec<Vec<Listener>>, RunError> {
    let Profile { limits, sockets, .. } = &config.profile;
    let options = ListenOptions {
        backlog: limits.backlog,
        nodelay: sockets.nodelay,
        shared: workers > 1,
        ..ListenOptions::default()
    };
    let mut all: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
    probe_ports(config, &options)?;
    for worker in &mut all {
        for (forward, id) in config.forward.iter().zip(services) {
            let fd = listen_patiently(forward.listen, &options)?;
            let route = Route::Service { balance: forward.manner.balance, id: *id };
            worker.push(Listener {
                fd,
                name: forward.name.as_str().into(),
                proxy_protocol: OFF,
                route,
            });
        }
        if let Some(inbound) = &config.inbound {
            let mark = Some(OWN_MARK);
            let options = ListenOptions { mark, transparent: true, ..options };
            let fd = listen_patiently(inbound.listen, &options)?;
            let proxy_protocol = inbound.proxy_protocol;
            let source = match inbound.source {
                SourceAddress::Keep => Source::Keep(inbound.source_ports.clone()),
                SourceAddress::Own => Source::Own,
            };
            let route = Route::Socket { origin: Origin::InboundTproxy, source };
            worker.push(Listener { fd, name: "inbound".into(), proxy_protocol, route });
        }
        let Some((outbound, records)) = config.outbound.as_ref().zip(records) else { continue };
        for ip in loopbacks() {
            let options = ListenOptions { mark: Some(OWN_MARK), ..options };
            let fd = listen_patiently(SocketAddr::new(ip, outbound.listen.port()), &options)?;
            let route = Route::Recorded(Arc::clone(records));
            worker.push(Listener { fd, name: "outbound".into(), proxy_protocol: OFF, route });
        }
    }
    Ok(all)
}

/// Sockets that share a port would share it with another weir too: each must be free first.
fn probe_ports(config: &Config, options: &ListenOptions) -> Result<(), ListenError> {
    let options = ListenOptions { shared: false, ..*options };
    let forward = config.forward.iter().map(|forward| forward.listen);
    let inbound = config.inbound.iter().map(|inbound| inbound.listen);
    let port = config.outbound.as_ref().map(|outbound| outbound.listen.port());
    let outbound = port.into_iter().flat_map(|port| loopbacks().map(move |ip| (ip, port).into()));
    let mut all = forward.chain(inbound).chain(outbound);
    all.try_for_each(|addr| listen_patiently(addr, &options).map(drop))
}

/// 127.0.0.1, and ::1 unless IPv6 is switched off.
fn loopbacks() -> impl Iterator<Item = IpAddr> {
    let v6 = Path::new("/proc/net/if_inet6").exists();
    [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()].into_iter().take(1 + usize::from(v6))
}

/// A weir that was killed a moment ago may still hold the port: its ring is torn down behind it.
fn listen_patiently(addr: SocketAddr, options: &ListenOptions) -> Result<OwnedFd, ListenError> {
    let began = Instant::now();
    loop {
        match listen(addr, options) {
            Err(ListenError::InUse { .. }) if began.elapsed() < PORT_WITHIN => {
                std::thread::sleep(PORT_RETRY);
            }
            result => return result,
        }
    }
}

const OFF: ProxyProtocol = ProxyProtocol::Off;
/// A killed ring gives its ports back within 20 ms, with thousands of connections.
const PORT_WITHIN: Duration = Duration::from_secs(1);
const PORT_RETRY: Duration = Duration::from_millis(10);
