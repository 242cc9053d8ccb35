// SPDX-License-Identifier: Apache-2.0
//! The services as the control thread has them, and which table each worker was given last.
//!
//! Whatever changes them only writes into the directory; the control thread's next look makes one
//! table of all changes and mails it. A worker whose mailbox is full gets it one look later.

#![expect(clippy::disallowed_types, reason = "no worker comes here, and nobody waits inside")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::takeover::TakingOver;
use super::view::{EndpointView, ServiceView};
use crate::config::Forward;
use crate::service::{Directory, EndpointId, Service, ServiceId, Table, Tally, Update};
use crate::worker::Handle;

/// Every service that weir forwards to.
#[derive(Debug, Default)]
pub(super) struct Services {
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    directory: Directory,
    table: Arc<Table>,
    /// By worker: the table it has.
    told: Vec<Arc<Table>>,
}

impl Services {
    /// Writes into the directory; workers hear of it soon. Do not wait for anything in `work`.
    pub(super) fn change<T>(&self, work: impl FnOnce(&mut Directory) -> T) -> T {
        self.with(|book| work(&mut book.directory))
    }

    /// The services of plain listeners, in their order.
    pub(super) fn enter(&self, forward: &[Forward]) -> Vec<ServiceId> {
        let now = Instant::now();
        let enter = |forward: &Forward| {
            let (manner, endpoints) = (forward.manner.clone(), forward.endpoints.clone());
            let key = key_of(&forward.name);
            self.change(|directory| directory.set(&key, manner, endpoints, now))
        };
        forward.iter().map(enter).collect()
    }

    /// A plain listener is no more.
    pub(super) fn leave(&self, forward: &str) {
        self.change(|directory| directory.remove(&key_of(forward)));
    }

    /// As of now.
    pub(super) fn table(&self) -> Arc<Table> {
        self.with(Book::latest)
    }

    /// For one more worker, to begin with.
    pub(super) fn first_update(&self) -> Update {
        self.with(|book| {
            let table = book.latest();
            book.told.push(Arc::clone(&table));
            Update::new(table, None)
        })
    }

    /// Tells every worker what it does not know yet, and says what they go by from now on.
    pub(super) fn tell(&self, workers: &[Handle]) -> Arc<Table> {
        self.with(|book| {
            let table = book.latest();
            for (worker, told) in workers.iter().zip(&mut book.told) {
                let is_news = told.revision < table.revision;
                if is_news && worker.update(Update::new(Arc::clone(&table), Some(told))) {
                    *told = Arc::clone(&table);
                }
            }
            table
        })
    }

    /// The revision of what is written there.
    pub(super) fn revision(&self) -> u64 {
        self.with(|book| book.directory.revision())
    }

    fn with<T>(&self, work: impl FnOnce(&mut Book) -> T) -> T {
        work(&mut self.book.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Book {
    fn latest(&mut self) -> Arc<Table> {
        if self.table.revision < self.directory.revision() {
            self.table = self.directory.table();
        }
        Arc::clone(&self.table)
    }
}

/// Every endpoint of `table`, with what the workers say of it.
pub(super) fn endpoint_views(table: &Table, tallies: &[Vec<Tally>]) -> Vec<EndpointView> {
    let mut sums: HashMap<EndpointId, (u64, usize)> = HashMap::new();
    for tally in tallies.iter().flatten() {
        let (flows, ejected) = sums.entry(tally.endpoint).or_default();
        *flows += u64::from(tally.flows);
        *ejected += usize::from(tally.is_ejected);
    }
    let views = |service: &Service| -> Vec<EndpointView> {
        let view = |member: &crate::service::Member| {
            let (flows, ejected_by) = sums.get(&member.id).copied().unwrap_or_default();
            let state = match (member.endpoint.weight, member.is_healthy, ejected_by) {
                (0, ..) => "drained",
                (_, false, _) => "unhealthy",
                (_, true, 0) => "in_use",
                (_, true, _) => "ejected",
            };
            EndpointView {
                address: member.endpoint.addr.to_string(),
                ejected_by,
                flows,
                registry: String::new(),
                service: shown(&service.name).to_owned(),
                state: state.to_owned(),
                weight: member.endpoint.weight,
                zone: member.endpoint.zone.to_string(),
            }
        };
        service.members().iter().map(view).collect()
    };
    table.services().flat_map(views).collect()
}

/// Says of each endpoint which registry it is from.
pub(super) fn name_registries(
    table: &Table,
    endpoints: &mut [EndpointView],
    taking_over: &TakingOver,
) {
    // They come in the order of the table.
    let mut endpoints = endpoints.iter_mut();
    for service in table.services() {
        let origins = taking_over.origins(&service.name);
        for endpoint in endpoints.by_ref().take(service.members().len()) {
            let addr = endpoint.address.parse().ok();
            let origin = addr.and_then(|addr| origins.get(&addr));
            endpoint.registry = origin.cloned().unwrap_or_default();
        }
    }
}

/// Every service of `table`, with sums over its endpoints.
pub(super) fn service_views(table: &Table, endpoints: &[EndpointView]) -> Vec<ServiceView> {
    let mut rest = endpoints;
    let view = |service: &Service| {
        // They come in the order of the table.
        let (own, others) = rest.split_at(service.members().len().min(rest.len()));
        rest = others;
        ServiceView {
            balance: service.manner.balance.word().to_owned(),
            endpoints: service.members().len(),
            flows: own.iter().map(|endpoint| endpoint.flows).sum(),
            in_use: own.iter().filter(|endpoint| endpoint.state == "in_use").count(),
            name: shown(&service.name).to_owned(),
            sources: Vec::new(),
        }
    };
    table.services().map(view).collect()
}

/// Under which key the endpoints of a plain listener stand: no service has a slash in its name, so that
/// neither is taken for the other, and no request can name it.
fn key_of(forward: &str) -> String {
    format!("/{forward}")
}

/// A key as people know it.
fn shown(key: &str) -> &str {
    key.strip_prefix('/').or_else(|| key.strip_suffix('/')).unwrap_or(key)
}

/// Where the application stands: neither a plain listener nor a service has such a key.
pub(super) const APPLICATION: &str = "takeover.inbound/";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{Balance, Endpoint, Manner};

    #[test]
    fn plain_listener_and_service_of_one_name_are_two() {
        let (services, now) = (Services::default(), Instant::now());
        let config =
            "forward: [{ name: a, listen: \"127.0.0.1:1\", endpoints: [\"127.0.0.1:2\"] }]\n";
        let config = crate::config::Config::parse("weir.yaml", None, config).unwrap();
        let forward = services.enter(&config.forward);
        let of = || Manner::of(Balance::RoundRobin);
        let addr = "127.0.0.1:3".parse().unwrap();
        for key in ["a", APPLICATION] {
            services.change(|directory| directory.set(key, of(), vec![Endpoint::new(addr)], now));
        }
        let table = services.table();
        let plain = table.service(forward[0]).unwrap();
        assert_eq!(plain.members()[0].endpoint.addr, "127.0.0.1:2".parse().unwrap());
        assert!(table.find("a").is_some() && table.find("takeover.inbound").is_none());
        assert!(table.find("/a").is_none() && table.find(APPLICATION).is_none(), "by no request");
        let endpoints = endpoint_views(&table, &[]);
        let addresses: Vec<&str> = endpoints.iter().map(|one| one.address.as_str()).collect();
        assert_eq!(addresses, ["127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:3"]);
        let views = service_views(&table, &endpoints);
        let names: Vec<(&str, usize)> =
            views.iter().map(|view| (view.name.as_str(), view.in_use)).collect();
        assert_eq!(names, [("a", 1), ("a", 1), ("takeover.inbound", 1)]);
        services.leave("a");
        assert!(services.table().find("a").is_some());
    }
}
