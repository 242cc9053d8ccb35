// SPDX-License-Identifier: Apache-2.0
//! What applications want and what registries say, and what comes of both.
//!
//! Invariants: a registry holds the inbound listener's address or nothing, never the application's
//! own port; nothing is published before the application accepts connections; asking for the same
//! thing twice is asking once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::link::Remote;
#[cfg(feature = "zookeeper")]
use super::zookeeper;
use super::{FileRegistry, FixedRegistry, Provider, Registry, Snapshot};
use crate::config::{RegistryKind, Takeover, is_service_name};
use crate::service::Endpoint;

/// The desk of one weir.
pub struct Desk {
    /// By name: applications that have said who they are.
    applications: BTreeSet<String>,
    config: Takeover,
    /// What the table of services does not know yet.
    changes: Vec<Change>,
    health: Health,
    /// Nothing is published any more.
    is_leaving: bool,
    /// Of this weir: no application is there.
    own_ports: Vec<u16>,
    /// By service: what this host provides.
    publications: BTreeMap<String, Publication>,
    registries: Vec<Box<dyn Registry>>,
    /// By service: the last word of each registry.
    subscriptions: BTreeMap<String, Vec<Option<Snapshot>>>,
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
    #[error("`{0}` is no name of a service")]
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

/// Whether the application accepts connections.
#[derive(Debug, Default)]
struct Health {
    failures: u32,
    is_up: bool,
}

impl Desk {
    /// With the registries of a config, in a weir that listens on these ports. What is wanted from the start is subscribed to.
    #[must_use]
    pub fn new(config: Takeover, own_ports: Vec<u16>) -> Desk {
        let registry = |one: &crate::config::Registry| -> Box<dyn Registry> {
            match &one.kind {
                RegistryKind::File(path) => Box::new(FileRegistry::new(&one.name, path)),
                RegistryKind::Static(services) => Box::new(FixedRegistry::new(&one.name, services)),
                #[cfg(feature = "zookeeper")]
                RegistryKind::Zookeeper(settings) => {
                    let settings = settings.clone();
                    Box::new(Remote::spawn(&one.name, |link| zookeeper::run(link, settings)))
                }
                #[cfg(not(feature = "zookeeper"))]
                RegistryKind::Zookeeper(_) => Box::new(FixedRegistry::new(&one.name, &[])),
            }
        };
        let registries = config.registries.iter().map(registry).collect();
        let wanted: Vec<String> = config.services.iter().map(|one| one.name.clone()).collect();
        let mut desk = Desk {
            applications: BTreeSet::new(),
            config,
            changes: Vec::new(),
            health: Health::default(),
            is_leaving: false,
            own_ports,
            publications: BTreeMap::new(),
            registries,
            subscriptions: BTreeMap::new(),
        };
        wanted.iter().for_each(|name| desk.enter(name));
        desk.hear();
        desk
    }

    /// An application says who it is. Again, or another one beside it: nothing is lost.
    pub fn configure(&mut self, application: &str) {
        if self.applications.len() < APPLICATIONS_MAX {
            self.applications.insert(application.to_owned());
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
        if let Some((_, other)) = others.find(|(_, other)| other.port != port) {
            return Err(Refusal::AnotherPort { port: other.port });
        }
        let addr = SocketAddr::new(advertise, self.config.inbound.port());
        let mark = if parameters.is_empty() { "" } else { "?" };
        let provider = Provider::parse(&format!("{addr}{mark}{parameters}"));
        let provider = provider.ok_or_else(|| Refusal::Name(parameters.to_owned()))?;
        let before = self.publications.get(service);
        if before.is_some_and(|before| before.provider == provider && before.port == port) {
            return Ok(());
        }
        if before.is_none_or(|before| before.port != port) {
            let app = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
            self.health = Health::default();
            self.changes.push(Change::Application(app));
        }
        let publication = Publication { port, provider };
        self.publications.insert(service.to_owned(), publication);
        self.register();
        Ok(())
    }

    /// It provides `service` no more.
    pub fn unpublish(&mut self, service: &str) {
        if self.publications.remove(service).is_some() {
            self.registries.iter_mut().for_each(|registry| registry.unpublish(service));
            self.hear();
        }
    }

    /// Withdraws everything, before the end: nobody shall be sent here any more. Says what
    /// registries on the network have to forget.
    pub fn withdraw(&mut self) -> Vec<String> {
        self.is_leaving = true;
        let services: Vec<String> = self.publications.keys().cloned().collect();
        services.iter().for_each(|service| self.unpublish(service));
        services.into_iter().filter(|service| self.is_held(service)).collect()
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
        self.check(service, self.subscriptions.len(), self.subscriptions.contains_key(service))?;
        self.enter(service);
        self.hear();
        let mut told: Vec<String> = Vec::new();
        for provider in self.providers(service) {
            let text = provider.text_at(self.config.outbound);
            if !told.contains(&text) {
                told.push(text);
            }
        }
        Ok(told)
    }

    /// It does so no more. What the config wants stays.
    pub fn unsubscribe(&mut self, service: &str) {
        let is_wanted = self.config.services.iter().any(|one| one.name == service);
        if is_wanted || self.subscriptions.remove(service).is_none() {
            return;
        }
        self.registries.iter_mut().for_each(|registry| registry.unsubscribe(service));
        self.changes.push(Change::Gone(service.to_owned()));
    }

    /// Every service that is subscribed to, with the text of its providers.
    #[must_use]
    pub fn known(&self) -> BTreeMap<&str, Vec<String>> {
        let texts = |name: &str| self.providers(name).iter().map(Provider::text).collect();
        self.subscriptions.keys().map(|name| (name.as_str(), texts(name))).collect()
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
        let port = self.publications.values().next()?.port;
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
        std::mem::take(&mut self.changes)
    }

    fn check(&self, service: &str, count: usize, is_known: bool) -> Result<(), Refusal> {
        if !is_service_name(service) {
            return Err(Refusal::Name(service.chars().take(60).collect()));
        }
        if !is_known && count >= SERVICES_MAX { Err(Refusal::TooMany) } else { Ok(()) }
    }

    fn enter(&mut self, service: &str) {
        if self.subscriptions.contains_key(service) {
            return;
        }
        self.subscriptions.insert(service.to_owned(), vec![None; self.registries.len()]);
        self.registries.iter_mut().for_each(|registry| registry.subscribe(service));
        // It is known by name from now on, if only to have no endpoint.
        self.changes.push(Change::Service { endpoints: Vec::new(), name: service.to_owned() });
    }

    fn hear(&mut self) {
        let mut changed = BTreeSet::new();
        for (index, registry) in self.registries.iter_mut().enumerate() {
            for snapshot in registry.news() {
                let service = snapshot.service.clone();
                let places = self.subscriptions.get_mut(&service);
                let Some(place) = places.and_then(|places| places.get_mut(index)) else { continue };
                if place.as_ref().is_none_or(|old| old.providers != snapshot.providers) {
                    changed.insert(service);
                }
                *place = Some(snapshot);
            }
        }
        for name in changed {
            let endpoints = self.providers(&name).into_iter().map(|one| one.endpoint).collect();
            self.changes.push(Change::Service { endpoints, name });
        }
    }

    /// Of all registries, each address once; ours for consumers is nobody's endpoint.
    fn providers(&self, service: &str) -> Vec<Provider> {
        let mut seen = BTreeSet::new();
        let snapshots = self.subscriptions.get(service).into_iter().flatten().flatten();
        let all = snapshots.flat_map(|snapshot| &snapshot.providers);
        let is_loop = |addr: SocketAddr| {
            addr.port() == self.config.outbound.port() && addr.ip().is_loopback()
        };
        all.filter(|one| !is_loop(one.endpoint.addr) && seen.insert(one.endpoint.addr))
            .cloned()
            .collect()
    }

    /// Brings the registries in line with what is wanted and with how the application is.
    fn register(&mut self) {
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

/// Failed attempts in a row that withdraw an application.
const FAILURES_MAX: u32 = 3;
const APPLICATIONS_MAX: usize = 64;
const SERVICES_MAX: usize = 10_000;
