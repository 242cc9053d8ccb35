// SPDX-License-Identifier: Apache-2.0
//! Listening sockets: for each worker its own socket of every listener, in the network namespace in
//! which it is wanted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RunError;
use super::places::Place;
use super::routes::Plain;
use crate::capture::{OWN_MARK, Prepared, Records};
use crate::config::{
    Captured, Config, Inbound, InboundCapture, Outbound, OutboundCapture, ProxyProtocol, Reach,
    SourceAddress,
};
use crate::metrics::Origin;
use crate::profile::Profile;
use crate::sys::netns;
use crate::sys::socket::{ListenError, ListenOptions, listen};
use crate::worker::{self, Listener, Route, Source};

/// The listeners of every worker.
pub(super) fn open(
    config: &Config,
    prepared: &[(Place, Option<Prepared>)],
    routes: &[Plain],
    workers: usize,
) -> Result<Vec<Vec<Listener>>, RunError> {
    let mut all: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
    for (index, (place, prepared)) in prepared.iter().enumerate() {
        let is_home = index == 0;
        let routes = if is_home { routes } else { &[] };
        let records = prepared.as_ref().map(Prepared::records).unwrap_or_default();
        open_in(place, &records, routes, &config.profile, &mut all)?;
    }
    Ok(all)
}

/// The listeners of one place, for every worker. `records` are those of its connect hooks, by port.
pub(super) fn open_in(
    place: &Place,
    records: &[(u16, Arc<Records>)],
    routes: &[Plain],
    profile: &Profile,
    all: &mut [Vec<Listener>],
) -> Result<(), RunError> {
    let options = options(profile, all.len());
    let opening = Opening { options, place, records, routes };
    Ok(place.within(|| opening.open(all))??)
}

/// More plain listeners while weir runs: a socket for each worker of each address, in its order.
pub(super) fn open_more(
    addrs: &[SocketAddr],
    profile: &Profile,
    workers: usize,
) -> Result<Vec<Vec<OwnedFd>>, ListenError> {
    let options = options(profile, workers);
    let probe = ListenOptions { shared: false, ..options };
    addrs.iter().try_for_each(|addr| listen_patiently(*addr, &probe).map(drop))?;
    let open = |addr: &SocketAddr| listen_patiently(*addr, &options);
    (0..workers).map(|_| addrs.iter().map(open).collect()).collect()
}

/// Where the traffic of a workload is let in, under `inbound`.
pub(super) fn inbound_route(inbound: &Inbound) -> Route {
    let source = match inbound.source {
        SourceAddress::Keep => Source::Keep(inbound.source_ports.clone()),
        SourceAddress::Own => Source::Own,
    };
    match inbound.capture {
        InboundCapture::Redirect => Route::Rewritten { origin: Origin::InboundRedirect, source },
        InboundCapture::Tproxy => Route::Socket {
            any_destination: inbound.destinations == Reach::Any,
            origin: Origin::InboundTproxy,
            source,
        },
    }
}

fn options(profile: &Profile, workers: usize) -> ListenOptions {
    ListenOptions {
        backlog: profile.limits.backlog,
        nodelay: profile.sockets.nodelay,
        shared: workers > 1,
        ..ListenOptions::default()
    }
}

/// What is opened in one place.
struct Opening<'a> {
    options: ListenOptions,
    place: &'a Place,
    /// Of the connect hooks there, by port.
    records: &'a [(u16, Arc<Records>)],
    /// Of listeners that need no capture.
    routes: &'a [Plain],
}

impl Opening<'_> {
    fn open(&self, all: &mut [Vec<Listener>]) -> Result<(), ListenError> {
        self.probe_ports()?;
        for worker in all {
            for plain in self.routes {
                let fd = listen_patiently(plain.listen, &self.options)?;
                worker.push(self.listener(fd, "", plain.route()));
            }
            for captured in &self.place.captured {
                if let Some(inbound) = &captured.inbound {
                    worker.push(self.inbound(captured, inbound)?);
                }
                if let Some(outbound) = &captured.outbound {
                    self.outbound(captured, outbound, worker)?;
                }
            }
        }
        Ok(())
    }

    /// Sockets that share a port would share it with another weir too: each must be free first.
    fn probe_ports(&self) -> Result<(), ListenError> {
        let options = ListenOptions { shared: false, ..self.options };
        let forward = self.routes.iter().map(|plain| plain.listen);
        let captured = &self.place.captured;
        let inbound = captured.iter().filter_map(|captured| captured.inbound.as_ref());
        let outbound = captured.iter().filter_map(|captured| captured.outbound.as_ref());
        let inbound = inbound.map(|inbound| inbound.listen);
        let mut all = forward.chain(inbound).chain(outbound.flat_map(outbound_addrs));
        all.try_for_each(|addr| listen_patiently(addr, &options).map(drop))
    }

    fn inbound(&self, captured: &Captured, inbound: &Inbound) -> Result<Listener, ListenError> {
        let options = match inbound.capture {
            InboundCapture::Redirect => self.options,
            InboundCapture::Tproxy => self.marked(true),
        };
        let fd = listen_patiently(inbound.listen, &options)?;
        let route = inbound_route(inbound);
        let listener = self.listener(fd, &captured.name, route);
        Ok(Listener { proxy_protocol: inbound.proxy_protocol, ..listener })
    }

    /// One for each family, on loopback.
    fn outbound(
        &self,
        captured: &Captured,
        outbound: &Outbound,
        worker: &mut Vec<Listener>,
    ) -> Result<(), ListenError> {
        let source = Source::Own;
        let records = self.records.iter().find(|(port, _)| *port == outbound.listen.port());
        for addr in outbound_addrs(outbound) {
            let (options, route) = match (outbound.capture, records) {
                (OutboundCapture::Connect, Some((_, records))) => {
                    (self.marked(false), Route::Recorded(Arc::clone(records)))
                }
                // Without a hook there is nothing to accept.
                (OutboundCapture::Connect, None) => return Ok(()),
                (OutboundCapture::Redirect, _) => {
                    let origin = Origin::OutboundRedirect;
                    (self.options, Route::Rewritten { origin, source: source.clone() })
                }
                (OutboundCapture::Tproxy, _) => {
                    let origin = Origin::OutboundTproxy;
                    let (any_destination, source) = (false, source.clone());
                    (self.marked(true), Route::Socket { any_destination, origin, source })
                }
            };
            let fd = listen_patiently(addr, &options)?;
            worker.push(self.listener(fd, &captured.name, route));
        }
        Ok(())
    }

    /// Accepted sockets inherit the mark, by which their packets are told and not tracked. Under
    /// redirect there is none: what is rewritten must be tracked both ways.
    const fn marked(&self, transparent: bool) -> ListenOptions {
        ListenOptions { mark: Some(OWN_MARK), transparent, ..self.options }
    }

    fn listener(&self, fd: OwnedFd, workload: &str, route: Route) -> Listener {
        let place: Arc<worker::Place> = Arc::clone(&self.place.for_workers);
        let proxy_protocol = ProxyProtocol::Off;
        Listener { fd: fd.into(), place, proxy_protocol, route, workload: workload.into() }
    }
}

/// Where a workload's connections are waited for.
pub(super) fn addrs(captured: &Captured) -> Vec<SocketAddr> {
    let inbound = captured.inbound.iter().map(|inbound| inbound.listen);
    inbound.chain(captured.outbound.iter().flat_map(outbound_addrs)).collect()
}

/// On 127.0.0.1, and on ::1 unless IPv6 is switched off.
pub(super) fn outbound_addrs(outbound: &Outbound) -> impl Iterator<Item = SocketAddr> + use<> {
    let (port, v6) = (outbound.listen.port(), netns::has_ipv6());
    let ips: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    ips.into_iter().take(1 + usize::from(v6)).map(move |ip| SocketAddr::new(ip, port))
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

/// A killed ring gives its ports back within 20 ms, with thousands of connections.
const PORT_WITHIN: Duration = Duration::from_secs(1);
const PORT_RETRY: Duration = Duration::from_millis(10);
