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
            self.change(|directory| directory.set(&forward.name, manner, endpoints, now))
        };
        forward.iter().map(enter).collect()
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
                service: service.name.to_string(),
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
    for service in table.services() {
        let origins = taking_over.origins(&service.name);
        for endpoint in endpoints.iter_mut().filter(|one| one.service == *service.name) {
            let addr = endpoint.address.parse().ok();
            let origin = addr.and_then(|addr| origins.get(&addr));
            endpoint.registry = origin.cloned().unwrap_or_default();
        }
    }
}

/// Every service of `table`, with sums over its endpoints.
pub(super) fn service_views(table: &Table, endpoints: &[EndpointView]) -> Vec<ServiceView> {
    let mut sums: HashMap<&str, (u64, usize)> = HashMap::new();
    for endpoint in endpoints {
        let (flows, in_use) = sums.entry(&endpoint.service).or_default();
        *flows += endpoint.flows;
        *in_use += usize::from(endpoint.state == "in_use");
    }
    let view = |service: &Service| {
        let (flows, in_use) = sums.get(&*service.name).copied().unwrap_or_default();
        ServiceView {
            balance: service.manner.balance.word().to_owned(),
            endpoints: service.members().len(),
            flows,
            in_use,
            name: service.name.to_string(),
            sources: Vec::new(),
        }
    };
    table.services().map(view).collect()
}
