// SPDX-License-Identifier: Apache-2.0
//! What applications want and what registries say, and what comes of both.
//!
//! Invariants: a registry holds the inbound listener's address or nothing, never the application's
//! own port; nothing is published before the application accepts connections; asking for the same
//! thing twice is asking once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

pub use self::disk::Page;
pub use self::facade::{FacadeRow, Passed};
use super::belief::Reason;
use super::book::{Book, Source, Suspect};
#[cfg(feature = "etcd")]
use super::etcd::Etcd;
#[cfg(any(feature = "etcd", feature = "sofa", feature = "zookeeper"))]
use super::link::Remote;
use super::shelf::Shelf;
#[cfg(feature = "sofa")]
use super::sofa::SofaRegistry;
#[cfg(feature = "zookeeper")]
use super::zookeeper::Zookeeper;
use super::{FileRegistry, FixedRegistry, Provider, Registry, Standing};
use crate::config::{RegistryKind, Takeover, is_service_name};
use crate::service::Endpoint;

mod disk;
mod facade;

/// The desk of one weir.
pub struct Desk {
    /// By name: applications that have said who they are.
    applications: BTreeSet<String>,
    /// Applications have subscribed to them, and the config does not want them anyway.
    asked: BTreeSet<String>,
    book: Book,
    config: Takeover,
    /// What the table of services does not know yet.
    changes: Vec<Change>,
    counts: Counts,
    faced: facade::Faced,
    health: Health,
    /// Nothing is published any more.
    is_leaving: bool,
    /// Of this weir: no application is there, and no provider but behind `inbound`.
    own_ports: Vec<u16>,
    /// By service: what this host provides.
    publications: BTreeMap<String, Publication>,
    registries: Vec<Box<dyn Registry>>,
    /// Where what must outlive this weir goes.
    shelf: Option<Shelf>,
    /// What applications have asked for is not on disk yet.
    to_keep: bool,
}

/// A registry, for metrics and tables.
#[derive(Clone, Debug, PartialEq)]
pub struct RegistryRow {
    /// Times a list that became empty, or lost most of itself, was not believed at once.
    pub doubted: [(&'static str, u64); Reason::ALL.len()],
    /// Its name.
    pub name: String,
    /// Publications that it has said it holds.
    pub published: usize,
    /// How it goes with it.
    pub standing: Standing,
}

/// What the table of services must learn.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The application listens here: calls from outside go there.
    Application(SocketAddr),
    /// Nobody wants this service any more.
    Gone(String),
    /// This service lives at these endpoints and nowhere else.
    Service {
        /// All of them.
        endpoints: Vec<Endpoint>,
        /// As its registry calls it.
        name: String,
    },
}

/// Why something was not done; told to the application.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The listener for calls from outside leads to one port.
    #[error(
        "calls from outside already lead to port {port}, and one application port is all there can be"
    )]
    AnotherPort {
        /// Where they lead.
        port: u16,
    },
    /// A name that cannot be one.
    #[error(
        "`{0}` is no name of a service: at most 512 letters without `/` and spaces, and before the \
         first `:` neither nothing nor `.` nor `..`"
    )]
    Name(String),
    /// This weir ends.
    #[error("weir is about to end: publish again when it is back")]
    Leaving,
    /// There is no address to publish.
    #[error("nothing can be published: set takeover.advertise to the address of this host")]
    NoAddress,
    /// The application's port is our own.
    #[error("port {0} is weir's own: publish the port of the application")]
    OwnPort(u16),
    /// Limits are there to be kept.
    #[error("too many services")]
    TooMany,
}

#[derive(Clone, Debug)]
struct Publication {
    port: u16,
    provider: Provider,
}

/// Of changes.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    ever: u64,
    /// Every worker goes by them.
    reached: u64,
}

/// Whether the application accepts connections.
#[derive(Debug, Default)]
struct Health {
    failures: u32,
    is_up: bool,
}

impl Desk {
    /// With the registries of a config, in a weir that listens on these ports, and whose connections need
    /// this `mark` not to be captured. What is wanted from the start is subscribed to, and what
    /// applications asked for in an earlier life.
    #[must_use]
    pub fn new(config: Takeover, own_ports: Vec<u16>, mark: Option<u32>) -> Desk {
        let shelf = config.state.as_deref().map(Shelf::new);
        let kept = config.registries.iter().map(|one| disk::kept_of(one, shelf.as_ref()));
        let mut desk = Desk {
            applications: BTreeSet::new(),
            asked: BTreeSet::new(),
            book: Book::new(kept.collect()),
            changes: Vec::new(),
            counts: Counts::default(),
            faced: facade::Faced::default(),
            health: Health::default(),
            is_leaving: false,
            own_ports,
            publications: BTreeMap::new(),
            registries: config.registries.iter().map(|one| registry(one, mark)).collect(),
            config,
            shelf,
            to_keep: false,
        };
        let wanted: Vec<String> = desk.config.services.iter().map(|one| one.name.clone()).collect();
        wanted.iter().for_each(|name| desk.enter(name));
        desk.replay();
        desk.hear();
        desk
    }

    /// An application says who it is. Again, or another one beside it: nothing is lost.
    pub fn configure(&mut self, application: &str) {
        if self.applications.len() < APPLICATIONS_MAX {
            self.to_keep |= self.applications.insert(application.to_owned());
        }
    }

    /// The applications that said who they are.
    pub fn applications(&self) -> impl Iterator<Item = &str> {
        self.applications.iter().map(String::as_str)
    }

    /// An application of this host provides `service`, at `port` if it says so. The registry gets
    /// to know as soon as the application accepts connections.
    ///
    /// # Errors
    ///
    /// It cannot be published from here.
    pub fn publish(
        &mut self,
        service: &str,
        port: Option<u16>,
        parameters: &str,
    ) -> Result<(), Refusal> {
        self.check(service, self.publications.len(), self.publications.contains_key(service))?;
        if self.is_leaving {
            return Err(Refusal::Leaving);
        }
        let advertise = self.config.advertise.ok_or(Refusal::NoAddress)?;
        let port = port.unwrap_or(self.config.app_port);
        if port == 0 || self.own_ports.contains(&port) {
            return Err(Refusal::OwnPort(port));
        }
        let mut others = self.publications.iter().filter(|(name, _)| *name != service);
        let other = others.find(|(_, other)| other.port != port).map(|(_, other)| other.port);
        if let Some(port) = other.or(self.faced_port().filter(|other| *other != port)) {
            return Err(Refusal::AnotherPort { port });
        }
        let addr = SocketAddr::new(advertise, self.config.inbound.port());
        let mark = if parameters.is_empty() { "" } else { "?" };
        let provider = Provider::parse(&format!("{addr}{mark}{parameters}"));
        let provider = provider.ok_or_else(|| Refusal::Name(parameters.to_owned()))?;
        let before = self.publications.get(service);
        if before.is_some_and(|before| before.provider == provider && before.port == port) {
            return Ok(());
        }
        // What is registered already stays so: one more service is no other application.
        if self.application().is_none_or(|known| known.port() != port) {
            self.lead_to(port);
        }
        self.to_keep = true;
        let publication = Publication { port, provider };
        self.publications.insert(service.to_owned(), publication);
        self.register();
        Ok(())
    }

    /// It provides `service` no more.
    pub fn unpublish(&mut self, service: &str) {
        if self.publications.remove(service).is_some() {
            self.to_keep = true;
            self.registries.iter_mut().for_each(|registry| registry.unpublish(service));
            self.hear();
        }
    }

    /// Withdraws everything, before the end: nobody shall be sent here any more. It is not forgotten:
    /// the next weir here publishes it again. Says what registries on the network have to forget.
    pub fn withdraw(&mut self) -> Vec<String> {
        self.is_leaving = true;
        // What the façade carries is withdrawn by it, and not kept.
        self.spend_sessions();
        self.to_keep = true;
        for service in self.publications.keys() {
            self.registries.iter_mut().for_each(|registry| registry.unpublish(service));
        }
        self.hear();
        self.publications.keys().filter(|service| self.is_held(service)).cloned().collect()
    }

    /// Registries are spoken with no more; calls go by what is known.
    pub fn leave(&mut self) {
        self.registries.iter_mut().for_each(|registry| registry.leave());
    }

    /// Some registry still holds what was published of `service`.
    #[must_use]
    pub fn is_held(&self, service: &str) -> bool {
        self.registries.iter().any(|registry| registry.holds(service))
    }

    /// An application wants to call `service`; says how its providers are to be called, at our own
    /// address. Nothing if no registry knows one yet.
    ///
    /// # Errors
    ///
    /// It cannot be subscribed to.
    pub fn subscribe(&mut self, service: &str) -> Result<Vec<String>, Refusal> {
        self.check(service, self.book.len(), self.book.has(service))?;
        self.enter(service);
        if !self.is_wanted(service) {
            self.to_keep |= self.asked.insert(service.to_owned());
        }
        self.hear();
        Ok(self.told(service))
    }

    /// Every registry has said where `service` lives, in this life or an earlier one. One that has been gone
    /// for a while is not waited for.
    #[must_use]
    pub fn has_heard(&self, service: &str) -> bool {
        let is_gone = |registry: &dyn Registry| {
            registry.standing().down_since.is_some_and(|since| since.elapsed() >= ANSWERS_WITHIN)
        };
        let mut registries = self.registries.iter().enumerate();
        registries.all(|(index, one)| self.book.has_heard(index, service) || is_gone(&**one))
    }

    /// How its providers are to be called, at our own address.
    #[must_use]
    pub fn told(&self, service: &str) -> Vec<String> {
        let mut told: Vec<String> = Vec::new();
        for provider in self.providers(service) {
            let text = provider.text_at(self.config.outbound);
            if !told.contains(&text) {
                told.push(text);
            }
        }
        told
    }

    /// It does so no more. What the config wants stays.
    pub fn unsubscribe(&mut self, service: &str) {
        self.to_keep |= self.asked.remove(service);
        self.release(service);
    }

    fn is_wanted(&self, service: &str) -> bool {
        self.config.services.iter().any(|one| one.name == service)
    }

    /// Forgets a service that nobody wants any more.
    fn release(&mut self, service: &str) {
        let is_wanted =
            self.is_wanted(service) || self.asked.contains(service) || self.is_faced(service);
        if is_wanted || !self.book.remove(service) {
            return;
        }
        self.to_keep = true;
        self.registries.iter_mut().for_each(|registry| registry.unsubscribe(service));
        self.change(Change::Gone(service.to_owned()));
    }

    /// Every service that is subscribed to, with the text of its providers.
    #[must_use]
    pub fn known(&self) -> BTreeMap<&str, Vec<String>> {
        let texts = |name: &str| self.providers(name).iter().map(Provider::text).collect();
        self.book.services().map(|name| (name, texts(name))).collect()
    }

    /// Every service that this host provides, and whether the registries know.
    pub fn published(&self) -> impl Iterator<Item = (&str, bool)> {
        self.publications.keys().map(|name| (name.as_str(), self.is_held(name)))
    }

    /// How long calls still arrive after registries have forgotten this host.
    #[must_use]
    pub fn propagation(&self) -> Duration {
        self.config.propagation
    }

    /// Where the application listens, if it has published anything.
    #[must_use]
    pub fn application(&self) -> Option<SocketAddr> {
        let published = self.publications.values().next().map(|one| one.port);
        let port = published.or(self.faced_port())?;
        Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))
    }

    /// What an attempt to reach the application has shown: one success publishes, some failures in
    /// a row withdraw.
    pub fn note_health(&mut self, accepts: bool) {
        let failures = if accepts { 0 } else { self.health.failures + 1 };
        let was_up = self.health.is_up;
        let is_up = accepts || (was_up && failures < FAILURES_MAX);
        self.health = Health { failures, is_up };
        if is_up != was_up {
            tracing::info!(is_up, "the application");
            self.register();
        }
    }

    /// Asks the registries for news, and takes out what the table of services must learn.
    pub fn changes(&mut self) -> Vec<Change> {
        self.hear();
        self.sweep_sessions(Instant::now());
        std::mem::take(&mut self.changes)
    }

    /// How many changes there ever were.
    #[must_use]
    pub fn changes_ever(&self) -> u64 {
        self.counts.ever
    }

    /// Calls go by as many of them.
    #[must_use]
    pub fn changes_reached(&self) -> u64 {
        self.counts.reached
    }

    /// So many of them have reached every worker.
    pub fn note_reached(&mut self, changes: u64) {
        self.counts.reached = changes;
    }

    fn check(&self, service: &str, count: usize, is_known: bool) -> Result<(), Refusal> {
        if !is_service_name(service) {
            return Err(Refusal::Name(service.chars().take(60).collect()));
        }
        if !is_known && count >= SERVICES_MAX { Err(Refusal::TooMany) } else { Ok(()) }
    }

    fn enter(&mut self, service: &str) {
        if self.book.has(service) {
            return;
        }
        self.to_keep = true;
        self.book.enter(service);
        self.registries.iter_mut().for_each(|registry| registry.subscribe(service));
        // It is known by name from now on, if only to have no endpoint.
        self.note_change(service);
    }

    fn hear(&mut self) {
        let now = Instant::now();
        let mut changed = BTreeSet::new();
        for (index, registry) in self.registries.iter_mut().enumerate() {
            for snapshot in registry.news() {
                let service = snapshot.service.clone();
                let rules = self.config.protection(&service);
                let rules = rules.filter(|_| !registry.is_beyond_doubt());
                if self.book.hear(index, snapshot, rules, now) {
                    changed.insert(service);
                }
            }
        }
        if let Some(rules) = &self.config.protect {
            let registries = &self.registries;
            let answers = |index: usize| answers(registries, index);
            changed.extend(self.book.ripen(rules, answers, now));
        }
        changed.iter().for_each(|service| self.note_change(service));
    }

    /// Lists that became empty and stayed so. Whoever has looked says with `settle` that they are gone.
    #[must_use]
    pub fn suspects(&self) -> Vec<Suspect> {
        let Some(rules) = &self.config.protect else { return Vec::new() };
        let mut suspects = self.book.suspects(rules, Instant::now());
        suspects.retain(|suspect| answers(&self.registries, suspect.registry));
        suspects
    }

    /// They are.
    pub fn settle(&mut self, suspect: &Suspect) {
        if self.book.settle(suspect, Instant::now()) {
            tracing::info!(service = suspect.service, "nobody is there any more");
            self.note_change(&suspect.service);
        }
    }

    /// How it goes with each registry.
    #[must_use]
    pub fn rows(&self) -> Vec<RegistryRow> {
        let mut rows = Vec::with_capacity(self.registries.len());
        for (index, registry) in self.registries.iter().enumerate() {
            let counts = self.book.doubted(index);
            let doubted = Reason::ALL.map(|reason| (reason.word(), counts[reason as usize]));
            let published = self.publications.keys().filter(|name| registry.holds(name)).count();
            let name = registry.name().to_owned();
            rows.push(RegistryRow { doubted, name, published, standing: registry.standing() });
        }
        rows
    }

    /// Who has said something of `service`.
    #[must_use]
    pub fn sources(&self, service: &str) -> Vec<Source> {
        let names = self.registries.iter().map(|registry| registry.name());
        self.book.sources(service, names, Instant::now())
    }

    /// Which registry names each address of `service`, the first of several.
    #[must_use]
    pub fn origins(&self, service: &str) -> BTreeMap<SocketAddr, String> {
        let mut origins = BTreeMap::new();
        for (index, registry) in self.registries.iter().enumerate() {
            for provider in self.book.providers_of(index, service) {
                let name = || registry.name().to_owned();
                origins.entry(provider.endpoint.addr).or_insert_with(name);
            }
        }
        origins
    }

    fn note_change(&mut self, service: &str) {
        let endpoints = self.providers(service).into_iter().map(|one| one.endpoint).collect();
        self.change(Change::Service { endpoints, name: service.to_owned() });
    }

    fn change(&mut self, change: Change) {
        self.counts.ever += 1;
        self.changes.push(change);
    }

    /// Of all registries, each address once; ours for consumers is nobody's endpoint.
    fn providers(&self, service: &str) -> Vec<Provider> {
        let mut seen = BTreeSet::new();
        // What this host provides is reached by its own inbound listener, and leads on from there.
        let Takeover { advertise, inbound, .. } = &self.config;
        let is_loop = |addr: SocketAddr| {
            let ip = addr.ip().to_canonical();
            let is_here = ip.is_loopback() || ip.is_unspecified() || ip == inbound.ip();
            addr.port() != inbound.port()
                && self.own_ports.contains(&addr.port())
                && (is_here || Some(ip) == *advertise)
        };
        let all = self.book.providers(service);
        all.filter(|one| !is_loop(one.endpoint.addr) && seen.insert(one.endpoint.addr)).collect()
    }

    /// Brings the registries in line with what is wanted and with how the application is.
    fn register(&mut self) {
        if self.is_leaving {
            return;
        }
        for (service, publication) in &self.publications {
            let mut is_taken = false;
            for registry in &mut self.registries {
                if self.health.is_up {
                    is_taken |= registry.publish(service, &publication.provider);
                } else {
                    registry.unpublish(service);
                }
            }
            if self.health.is_up && !is_taken {
                tracing::warn!(service, "no registry takes publications");
            }
        }
        self.hear();
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let registries: Vec<&str> = self.registries.iter().map(|one| one.name()).collect();
        f.debug_struct("Desk").field("registries", &registries).finish_non_exhaustive()
    }
}

#[cfg_attr(
    not(any(feature = "etcd", feature = "sofa", feature = "zookeeper")),
    expect(unused_variables, reason = "nobody dials")
)]
fn registry(one: &crate::config::Registry, mark: Option<u32>) -> Box<dyn Registry> {
    let name = &one.name;
    match &one.kind {
        #[cfg(feature = "etcd")]
        RegistryKind::Etcd(settings) => Box::new(Remote::spawn(name, mark, Etcd::new(settings))),
        RegistryKind::File(path) => Box::new(FileRegistry::new(name, path)),
        #[cfg(feature = "sofa")]
        RegistryKind::Sofa(settings) => {
            Box::new(Remote::spawn(name, mark, SofaRegistry::new(settings)))
        }
        RegistryKind::Static(services) => Box::new(FixedRegistry::new(name, services)),
        #[cfg(feature = "zookeeper")]
        RegistryKind::Zookeeper(settings) => {
            Box::new(Remote::spawn(name, mark, Zookeeper::new(settings)))
        }
        // The config has refused it.
        #[cfg(not(all(feature = "etcd", feature = "sofa", feature = "zookeeper")))]
        _ => Box::new(FixedRegistry::new(name, &[])),
    }
}

fn answers(registries: &[Box<dyn Registry>], index: usize) -> bool {
    registries.get(index).is_some_and(|registry| registry.standing().is_connected)
}

/// Who subscribes waits so long, at most, for a registry that has just gone or does not answer.
pub(super) const ANSWERS_WITHIN: Duration = Duration::from_secs(3);
/// Failed attempts in a row that withdraw an application.
const FAILURES_MAX: u32 = 3;
const APPLICATIONS_MAX: usize = 64;
const SERVICES_MAX: usize = 10_000;
