// SPDX-License-Identifier: Apache-2.0
//! Takeover as the control thread runs it: serves the application API, carries what the desk has
//! decided into the table of services, and looks whether the application accepts connections.

#![expect(clippy::disallowed_types, reason = "no worker comes here, and nobody waits inside")]

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::services::{self, Services};
use super::serving::{Bounds, serve};
use super::{RunError, Running, checks, facade};
use crate::config::{Config, Takeover, Wanted};
use crate::service::{Balance, CheckKind, Endpoint, Manner, ServiceId};
use crate::takeover::{Change, Desk, FacadeRow, Page, RegistryRow, Source, router};
use crate::worker::Handle;

/// The application API and the façade, open and not served yet: whoever asks waits.
pub(super) struct Bound {
    api: TcpListener,
    facade: Option<facade::Bound>,
}

/// Takeover while weir runs.
#[derive(Clone, Debug)]
pub(super) struct TakingOver {
    desk: Arc<Mutex<Desk>>,
    /// Set before the end: what applications have entered by the façade is taken away.
    leaving: watch::Sender<bool>,
    /// How services are balanced.
    manner: Manner,
    services: Arc<Services>,
    /// One writes at a time, so that the disk has the latest.
    writing: Arc<tokio::sync::Mutex<()>>,
}

/// The ids of what takeover's listeners lead to.
#[derive(Debug)]
pub(super) struct Entered {
    /// Of the application.
    pub(super) inbound: ServiceId,
    /// Of the services wanted from the start, in their order.
    pub(super) wanted: Vec<ServiceId>,
}

/// Writes into the directory what listeners need from the start.
pub(super) fn enter(takeover: &Takeover, services: &Services) -> Entered {
    let now = Instant::now();
    services.change(|directory| {
        let of = Manner::of(Balance::RoundRobin);
        let inbound = directory.set(services::APPLICATION, of, Vec::new(), now);
        let enter = |one: &Wanted| {
            let id = directory.set(&one.name, takeover.manner.clone(), Vec::new(), now);
            one.dialled_at.into_iter().for_each(|addr| directory.place(addr, id));
            id
        };
        let wanted = takeover.services.iter().map(enter).collect();
        Entered { inbound, wanted }
    })
}

impl Bound {
    /// `None` if the config has no takeover.
    pub(super) fn open(config: &Config) -> Result<Option<Bound>, RunError> {
        let Some(takeover) = &config.takeover else { return Ok(None) };
        let listen = |addr: SocketAddr| -> io::Result<TcpListener> {
            let listener = std::net::TcpListener::bind(addr)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        let api = listen(takeover.api)
            .map_err(|source| RunError::TakeoverApi { addr: takeover.api, source })?;
        let facade = takeover.facade.as_ref();
        let facade = facade.map(|facade| facade::Bound::open(facade, takeover)).transpose()?;
        Ok(Some(Bound { api, facade }))
    }
}

impl TakingOver {
    /// With registries that are asked from now on. What is known at once (a list in the config or in a
    /// file, and what the disk remembers) is in the table of services when this returns.
    pub(super) fn new(
        config: &Takeover,
        own_ports: Vec<u16>,
        mark: Option<u32>,
        services: &Arc<Services>,
    ) -> TakingOver {
        let desk = Arc::new(Mutex::new(Desk::new(config.clone(), own_ports, mark)));
        let manner = config.manner.clone();
        let leaving = watch::Sender::new(false);
        let services = Arc::clone(services);
        let taking_over = TakingOver { desk, leaving, manner, services, writing: Arc::default() };
        taking_over.carry();
        taking_over
    }

    /// Works beside the caller, from now on.
    pub(super) fn serve(&self, bound: Bound, running: &Arc<Running>, mark: Option<u32>) {
        let Bound { api, facade } = bound;
        tokio::spawn(serve(api, router(Arc::clone(&self.desk)), Bounds::USUAL));
        if let Some(facade) = facade {
            tokio::spawn(facade.serve(self.clone(), Arc::downgrade(running), mark));
        }
        tokio::spawn(self.clone().keep_carrying(Arc::downgrade(running)));
        tokio::spawn(self.clone().keep());
        tokio::spawn(self.clone().settle(mark));
        tokio::spawn(self.clone().watch(Arc::downgrade(running), mark));
    }

    /// Nobody shall be sent here any more: registries forget this host, and who had heard of it
    /// gets the time to hear that. Then they are left: a connection to one may be a flow of our own, for
    /// which a drain would wait.
    pub(super) async fn withdraw(self) {
        let (withdrawn, is_entered, propagation) = {
            let mut desk = self.lock();
            (desk.withdraw(), desk.is_anything_entered(), desk.propagation())
        };
        // The next weir must not take up sessions of which this one takes something away, whenever
        // this one dies.
        self.keep_now().await;
        self.leaving.send_replace(true);
        if !withdrawn.is_empty() || is_entered {
            self.until_forgotten(&withdrawn).await;
            tokio::time::sleep(propagation).await;
        }
        self.lock().leave();
    }

    async fn until_forgotten(&self, withdrawn: &[String]) {
        let end = Instant::now() + WITHDRAW_WITHIN;
        let is_there = || {
            let desk = self.lock();
            desk.is_anything_entered() || withdrawn.iter().any(|service| desk.is_held(service))
        };
        while is_there() {
            if Instant::now() >= end {
                tracing::warn!("a registry did not say that it has forgotten this host");
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The façade's metrics, if there is one.
    pub(super) fn facade_row(&self) -> Option<FacadeRow> {
        self.lock().facade_row()
    }

    /// Becomes true before the end.
    pub(super) fn leaving(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }

    /// How it goes with each registry.
    pub(super) fn rows(&self) -> Vec<RegistryRow> {
        self.lock().rows()
    }

    /// Who has said something of `service`.
    pub(super) fn sources(&self, service: &str) -> Vec<Source> {
        self.lock().sources(service)
    }

    /// Which registry names each address of `service`, the first of several.
    pub(super) fn origins(&self, service: &str) -> BTreeMap<SocketAddr, String> {
        self.lock().origins(service)
    }

    /// Puts on disk what must outlive this weir, soon after it has changed.
    async fn keep(self) {
        let mut trouble = String::new();
        loop {
            tokio::time::sleep(if trouble.is_empty() { KEEP_EVERY } else { KEEP_AGAIN }).await;
            let Some(said) = self.keep_now().await else { continue };
            match (said.as_str(), said == trouble) {
                (_, true) => {}
                ("", false) => tracing::info!("takeover.state is written again"),
                (why, false) => tracing::warn!("{why}; tried again every second"),
            }
            trouble = said;
        }
    }

    /// Says what went wrong, if anything; `None` if there was nothing to write.
    async fn keep_now(&self) -> Option<String> {
        let _writing = self.writing.lock().await;
        let pages = self.lock().pages();
        if pages.is_empty() {
            return None;
        }
        let failures = write(pages).await;
        let mut desk = self.lock();
        failures.iter().for_each(|(page, _)| desk.keep_again(page));
        Some(failures.into_iter().next().map(|(_, why)| why).unwrap_or_default())
    }

    /// Looks whether the endpoints that a registry names no more are really gone.
    async fn settle(self, mark: Option<u32>) {
        loop {
            tokio::time::sleep(SETTLE_EVERY).await;
            let suspects = self.lock().suspects();
            for suspect in suspects {
                let look = |addr: &SocketAddr| checks::stays(*addr, mark);
                let addrs = suspect.addrs.iter().take(SUSPECTS_MAX);
                let looks: JoinSet<bool> = addrs.map(look).collect();
                if !looks.join_all().await.contains(&true) {
                    self.lock().settle(&suspect);
                }
            }
        }
    }

    /// Who subscribes waits until workers know what the desk does.
    async fn keep_carrying(self, running: Weak<Running>) {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        // Changes there ever were, and the revision with which workers know them.
        let mut awaited: Option<(u64, u64)> = None;
        loop {
            tick.tick().await;
            let changes = self.carry();
            let Some(running) = running.upgrade() else { return };
            let (changes, revision) =
                *awaited.get_or_insert_with(|| (changes, self.services.revision()));
            let knows = |worker: &Handle| worker.services_revision() >= revision;
            if running.workers.iter().all(knows) {
                self.lock().note_reached(changes);
                awaited = None;
            }
        }
    }

    /// What the desk has decided goes into the table of services. How many changes there ever were.
    fn carry(&self) -> u64 {
        let (changes, ever) = {
            let mut desk = self.lock();
            (desk.changes(), desk.changes_ever())
        };
        let now = Instant::now();
        for change in changes {
            self.services.change(|directory| match change {
                Change::Application(addr) => {
                    let of = Manner::of(Balance::RoundRobin);
                    directory.set(services::APPLICATION, of, vec![Endpoint::new(addr)], now);
                }
                Change::Gone(name) => directory.remove(&name),
                Change::Service { endpoints, name } => {
                    directory.set(&name, self.manner.clone(), endpoints, now);
                }
            });
        }
        ever
    }

    /// Often until the application is there, then now and then. Nothing is known of it before every
    /// worker accepts: nobody shall be sent to a listener that is not there yet.
    async fn watch(self, running: Weak<Running>, mark: Option<u32>) {
        let accepts = |running: Arc<Running>| running.accepting() == running.workers.len();
        let mut is_up = false;
        loop {
            tokio::time::sleep(if is_up { WATCH_EVERY } else { WAIT_EVERY }).await;
            if !is_up && !running.upgrade().is_some_and(accepts) {
                continue;
            }
            let application = self.lock().application();
            let Some(addr) = application else { continue };
            is_up = self.answers(addr, WATCH_EVERY, mark).await;
            let mut desk = self.lock();
            if desk.application() == Some(addr) {
                desk.note_health(is_up);
            }
        }
    }

    /// An application answers there, as checks want it.
    pub(super) async fn answers(
        &self,
        app: SocketAddr,
        within: Duration,
        mark: Option<u32>,
    ) -> bool {
        let kind = self.manner.check.map_or(CheckKind::Tcp, |check| check.kind);
        checks::answers(app, kind, within, mark).await
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What could not be written, and why.
async fn write(pages: Vec<Page>) -> Vec<(Page, String)> {
    // The disk may be slow, and the control thread has others to serve.
    let write = move || {
        let failure = |page: Page| page.write().err().map(|why| (page, why.to_string()));
        pages.into_iter().filter_map(failure).collect::<Vec<_>>()
    };
    tokio::task::spawn_blocking(write).await.unwrap_or_default()
}

/// What was asked for within this time before a crash may have to be asked for again.
const KEEP_EVERY: Duration = Duration::from_millis(100);
/// A disk that refuses is asked again so often.
const KEEP_AGAIN: Duration = Duration::from_secs(1);
const SETTLE_EVERY: Duration = Duration::from_secs(1);
/// Endpoints of one service that are looked at; one that answers is enough.
const SUSPECTS_MAX: usize = 64;
/// Pushes that come closer than this are one change.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A registry that does not answer forgets by itself when the session ends.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(3);
const WAIT_EVERY: Duration = Duration::from_millis(100);
const WATCH_EVERY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_at_once_is_there_before_the_first_worker() {
        let lab = tempfile::TempDir::new().unwrap();
        let file = lab.path().join("services.yaml");
        std::fs::write(&file, "services: [{ name: b, endpoints: [\"127.0.0.1:3\"] }]\n").unwrap();
        let config = format!(
            "takeover: {{ registries: [{{ name: x, kind: static, services: [{{ name: a, endpoints: [\"127.0.0.1:2\"] }}] }}, \
             {{ name: y, kind: file, path: \"{}\" }}], services: [{{ name: a }}, {{ name: b }}] }}\n",
            file.display()
        );
        let config = Config::parse("weir.yaml", None, &config).unwrap();
        let (takeover, services) = (config.takeover.unwrap(), Arc::new(Services::default()));
        let entered = enter(&takeover, &services);
        let _taking_over = TakingOver::new(&takeover, Vec::new(), None, &services);
        let table = services.table();
        for (id, addr) in entered.wanted.into_iter().zip(["127.0.0.1:2", "127.0.0.1:3"]) {
            let members = table.service(id).unwrap().members();
            assert_eq!(members[0].endpoint.addr, addr.parse().unwrap());
        }
    }
}
