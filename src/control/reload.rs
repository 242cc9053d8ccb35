// SPDX-License-Identifier: Apache-2.0
//! SIGHUP: the config file is read again, and what can change changes without dropping a flow.
//!
//! All or nothing: everything that can be refused is refused before a worker hears of it, and then
//! the old config stays in force. What cannot change while weir runs is named, and kept.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::capturing::{Capturing, Coming, Going, Turn};
use super::places::Place;
use super::{InForce, RunError, Running, listeners, start};
use crate::capture::OwnPorts;
use crate::config::{Captured, Config, Forward, Namespace, ProxyProtocol, SourceAddress, overlap};
use crate::metrics::Origin;
use crate::service::ServiceId;
use crate::worker::{self, Alteration, Change, Handle, Listener, Route};

/// The config in force, and where it came from.
pub(super) struct Reloader {
    config: Config,
    file: Option<PathBuf>,
    home: Arc<worker::Place>,
}

/// Why the config stays.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    /// A worker has too many letters to read.
    #[error("a worker does not read its mail: try again")]
    Busy,
    /// The file.
    #[error("{0}")]
    Mistakes(String),
    /// `weir forward`.
    #[error("it was given on the command line")]
    NoFile,
    /// A listener cannot be had before another one of ours is gone.
    #[error(
        "forward listen {new}: this weir listens on {old} until the reload is done, and both cannot \
         be had (take the old one out by one reload, and bring the new one in by the next)"
    )]
    Overlap {
        /// What is wanted.
        new: SocketAddr,
        /// What is there.
        old: SocketAddr,
    },
    /// A step was refused.
    #[error(transparent)]
    Run(#[from] RunError),
}

impl Reloader {
    pub(super) fn new(config: Config, file: Option<&Path>, home: Arc<worker::Place>) -> Reloader {
        // As it was given, so that paths in it lead where they led at the start: weir stays in the
        // directory in which it was started.
        Reloader { config, file: file.map(Path::to_owned), home }
    }

    /// In force.
    pub(super) const fn config(&self) -> &Config {
        &self.config
    }

    /// Reads the file again, and says what came of it.
    pub(super) fn reload(&mut self, running: &Running, capturing: Option<&mut Capturing>) {
        // systemd may not be there; then there is nobody to tell.
        let now = sd_notify::NotifyState::monotonic_usec_now().into_iter();
        let states: Vec<_> = [sd_notify::NotifyState::Reloading].into_iter().chain(now).collect();
        let _ = sd_notify::notify(&states);
        match self.try_reload(running, capturing) {
            Ok(kept) => {
                for what in kept {
                    tracing::warn!(
                        "reload: {what} cannot change while weir runs, and stays as it was"
                    );
                }
                tracing::info!("the config is reloaded");
            }
            Err(error) => {
                tracing::error!("the config is not reloaded and stays as it was: {error}")
            }
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    }

    fn try_reload(
        &mut self,
        running: &Running,
        mut capturing: Option<&mut Capturing>,
    ) -> Result<Vec<String>, ReloadError> {
        let file = self.file.as_deref().ok_or(ReloadError::NoFile)?;
        let loaded = Config::load(file);
        let mut new = loaded.map_err(|mistakes| ReloadError::Mistakes(mistakes.to_string()))?;
        let kept = keep(&self.config, &mut new, running.captures);
        start::fit_timers(&mut new, |new| Ok(Place::reachable(new)))?;
        refuse(&new, running)?;
        let turns = capturing.as_deref().map(|capturing| capturing.turns(&new, running));
        let mut turns = turns.transpose()?.unwrap_or_default();
        let coming = self.coming(&new, running, capturing.as_deref())?;
        let is_new = |addr: &SocketAddr| !has_listener(&self.config, *addr);
        let added: Vec<SocketAddr> =
            new.forward.iter().map(|forward| forward.listen).filter(is_new).collect();
        refuse_overlap(&self.config, &added)?;
        let workers = &running.workers;
        let sockets = listeners::open_more(&added, &new.profile, workers.len());
        let sockets = sockets.map_err(RunError::from)?;
        await_room(workers)?;
        if let Some(capturing) = &mut capturing {
            capturing.take_turns(&mut turns, running)?;
        }
        // From here on nothing is refused any more.
        let services = running.services.enter(&new.forward);
        running.services.tell(workers);
        let retire = || self.config.forward.iter().map(|forward| forward.listen);
        for (index, (worker, sockets)) in workers.iter().zip(sockets).enumerate() {
            let mut add = self.added(&new, &services, &added, sockets);
            add.extend(turns.iter_mut().flat_map(|turn| turn.listeners_of(index)));
            let going = || turns.iter().filter_map(Turn::going).flat_map(Going::listeners);
            let gone = going().map(|(_, _, place, addr)| (place.number, addr));
            let mut alter = self.altered(&new, &services, capturing.as_deref());
            alter.extend(going().map(set_aside));
            worker.change(Change {
                add,
                alter,
                retire: retire()
                    .filter(|addr| !has_listener(&new, *addr))
                    .map(|addr| (self.home.number, addr))
                    .chain(gone)
                    .collect(),
                timeouts: new.profile.timeouts,
            });
        }
        drop(turns);
        for one in coming {
            let Some(capturing) = &mut capturing else { break };
            await_room(workers)?;
            if let Err(error) = capturing.take_up(one, &new, running) {
                tracing::error!("a workload is not captured yet: {error}");
            }
        }
        for old in &self.config.forward {
            if new.forward.iter().all(|forward| forward.name != old.name) {
                running.services.leave(&old.name);
            }
        }
        running.in_force.send_replace(InForce::of(&new));
        self.config = new;
        Ok(kept)
    }

    /// Places that are new in `new`, ready to be taken up.
    fn coming(
        &self,
        new: &Config,
        running: &Running,
        capturing: Option<&Capturing>,
    ) -> Result<Vec<Coming>, RunError> {
        let Some(capturing) = capturing else { return Ok(Vec::new()) };
        let is_new = |captured: &&Captured| {
            self.config.workloads.iter().all(|old| old.namespace != captured.namespace)
        };
        let elsewhere = capturing.lacks(new).filter(is_new).cloned().map(Place::elsewhere);
        let home = capturing.lacks_home().then(|| Ok(Place::home(new)));
        let coming = home.into_iter().chain(elsewhere);
        coming
            .filter_map(|place| match place {
                Ok(place) => Coming::prepare(place, new, running).transpose(),
                Err(error) => Some(Err(error)),
            })
            .collect()
    }

    /// Listeners that there are not yet, each with its socket.
    fn added(
        &self,
        new: &Config,
        services: &[ServiceId],
        added: &[SocketAddr],
        sockets: Vec<OwnedFd>,
    ) -> Vec<Listener> {
        let forwards = new.forward.iter().zip(services);
        let forwards = forwards.filter(|(forward, _)| added.contains(&forward.listen));
        let listener = |((forward, id), fd): ((&Forward, &ServiceId), OwnedFd)| Listener {
            fd: fd.into(),
            place: Arc::clone(&self.home),
            proxy_protocol: ProxyProtocol::Off,
            route: service_route(forward, *id),
            workload: Arc::default(),
        };
        forwards.zip(sockets).map(listener).collect()
    }

    /// Listeners that go on in another way; those that do not change are among them.
    fn altered(
        &self,
        new: &Config,
        services: &[ServiceId],
        capturing: Option<&Capturing>,
    ) -> Vec<Alteration> {
        let forwards = new.forward.iter().zip(services);
        let forwards = forwards.map(|(forward, id)| Alteration {
            addr: forward.listen,
            from: self.home.number,
            place: Arc::clone(&self.home),
            proxy_protocol: ProxyProtocol::Off,
            route: Some(service_route(forward, *id)),
            workload: Arc::default(),
        });
        let places = capturing.into_iter().flat_map(Capturing::places);
        forwards.chain(places.flat_map(captured)).collect()
    }
}

fn captured(place: &Place) -> impl Iterator<Item = Alteration> {
    let to = |addr, proxy_protocol, route, name: &str| Alteration {
        addr,
        from: place.for_workers.number,
        place: Arc::clone(&place.for_workers),
        proxy_protocol,
        route,
        workload: name.into(),
    };
    place.captured.iter().flat_map(move |Captured { inbound, name, outbound, .. }| {
        let inbound = inbound.iter().map(move |inbound| {
            let route = listeners::inbound_route(inbound);
            to(inbound.listen, inbound.proxy_protocol, Some(route), name)
        });
        let outbound = outbound.iter().flat_map(listeners::outbound_addrs);
        let outbound = outbound.map(move |addr| to(addr, ProxyProtocol::Off, None, name));
        inbound.chain(outbound).collect::<Vec<_>>()
    })
}

/// A listener that goes gets a place of its own first, by which it is told when its last flow is over.
fn set_aside(
    (from, part, place, addr): (u32, &Captured, &Arc<worker::Place>, SocketAddr),
) -> Alteration {
    let proxy_protocol = part.inbound.as_ref().map_or(ProxyProtocol::Off, |one| one.proxy_protocol);
    let (place, workload) = (Arc::clone(place), part.name.as_str().into());
    Alteration { addr, from, place, proxy_protocol, route: None, workload }
}

fn service_route(forward: &Forward, id: ServiceId) -> Route {
    Route::Service { balance: forward.manner.balance, id, origin: Origin::Forward }
}

fn has_listener(config: &Config, addr: SocketAddr) -> bool {
    config.forward.iter().any(|forward| forward.listen == addr)
}

/// Puts what cannot change back into `new`, and names it.
fn keep(old: &Config, new: &mut Config, captures: bool) -> Vec<String> {
    let mut profile = old.profile.clone();
    profile.timeouts = new.profile.timeouts;
    let changes = [
        (old.admin != new.admin, "admin"),
        (old.on_change != new.on_change, "on_change"),
        (old.on_exit != new.on_exit, "on_exit"),
        (old.takeover != new.takeover, "takeover"),
        (profile != new.profile, "profile (but for its timeouts)"),
        (old.workers != new.workers, "workers"),
    ];
    new.admin = old.admin.clone();
    (new.on_change, new.on_exit) = (old.on_change, old.on_exit);
    new.profile = profile;
    new.takeover = old.takeover.clone();
    new.workers = old.workers.clone();
    let mut kept: Vec<String> = changes
        .into_iter()
        .filter(|(changed, _)| *changed)
        .map(|(_, what)| what.to_owned())
        .collect();
    // Workers' sockets have no marks then.
    if !captures && !new.workloads.is_empty() {
        new.workloads.clear();
        kept.push("who is captured (until now: nobody)".to_owned());
    }
    kept
}

/// As at a start.
fn refuse(new: &Config, running: &Running) -> Result<(), RunError> {
    let here = |captured: &&Captured| captured.namespace == Namespace::Own;
    let here: Vec<Captured> = new.workloads.iter().filter(here).cloned().collect();
    let own_ports = OwnPorts::new(super::capturing::own_ports(new, &here));
    start::refuse_loops(new, &own_ports)?;
    let mut inbounds = new.workloads.iter().filter_map(|captured| captured.inbound.as_ref());
    let keeps = inbounds.any(|inbound| inbound.source == SourceAddress::Keep);
    if keeps && running.workers.iter().any(|worker| !worker.features().bind) {
        return Err(RunError::NoBind);
    }
    Ok(())
}

/// A listener of ours that retires is there until the new ones are.
fn refuse_overlap(old: &Config, added: &[SocketAddr]) -> Result<(), ReloadError> {
    for new in added {
        let mut there = old.forward.iter().map(|forward| forward.listen);
        if let Some(old) = there.find(|old| overlap(*old, *new)) {
            return Err(ReloadError::Overlap { new: *new, old });
        }
    }
    Ok(())
}

/// Workers read their mail every turn.
fn await_room(workers: &[Handle]) -> Result<(), ReloadError> {
    let deadline = Instant::now() + ROOM_WITHIN;
    while !workers.iter().all(Handle::has_room) {
        if Instant::now() > deadline {
            return Err(ReloadError::Busy);
        }
        std::thread::sleep(ROOM_LOOK);
    }
    Ok(())
}

/// A turn takes a millisecond at most.
const ROOM_WITHIN: Duration = Duration::from_secs(1);
const ROOM_LOOK: Duration = Duration::from_millis(1);
