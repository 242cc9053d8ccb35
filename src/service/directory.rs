// SPDX-License-Identifier: Apache-2.0
//! The control thread's own book of services, from which tables are made.
//!
//! An endpoint keeps its id for as long as it stays in its service, so that a worker's tally of it
//! outlives any number of tables. Services that did not change are shared between tables.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::table::{MEMBERS_MAX, Member, Service, Table};
use super::{Endpoint, EndpointId, Manner, ServiceId};
use crate::addr::canonical;

/// Every service, and which id belongs to whom.
#[derive(Debug, Default)]
pub struct Directory {
    free_services: Vec<ServiceId>,
    free_slots: Vec<u32>,
    names: Arc<HashMap<Box<str>, ServiceId>>,
    revision: u64,
    services: Vec<Option<Arc<Service>>>,
    slots: Vec<Slot>,
    /// What active checks have found dead.
    unhealthy: HashSet<SocketAddr>,
    virtuals: Arc<HashMap<SocketAddr, ServiceId>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    generation: u32,
    joined: Option<Instant>,
}

impl Directory {
    /// Makes `name` live at `endpoints` and nowhere else; an address that is there twice counts
    /// once, the last time. Says the id, which stays until the service is removed.
    pub fn set(
        &mut self,
        name: &str,
        manner: Manner,
        endpoints: Vec<Endpoint>,
        now: Instant,
    ) -> ServiceId {
        let id = self.names.get(name).copied().unwrap_or_else(|| self.enter(name));
        let before = self.services.get_mut(id.index as usize).and_then(Option::take);
        let mut old: HashMap<SocketAddr, EndpointId> = before
            .iter()
            .flat_map(|service| service.members())
            .map(|member| (member.endpoint.addr, member.id))
            .collect();
        // Whoever was there from the beginning has no need to start slowly.
        let joined = before.as_ref().map(|_| now);
        let mut members = Vec::with_capacity(endpoints.len());
        for endpoint in distinct(endpoints) {
            let id = old.remove(&endpoint.addr).unwrap_or_else(|| self.slot(joined));
            members.push(self.member(endpoint, id, &manner));
        }
        self.free_slots.extend(old.values().map(|id| id.slot));
        let name = before.map_or_else(|| name.into(), |service| Arc::clone(&service.name));
        self.services[id.index as usize] = Some(Arc::new(Service::new(id, name, manner, members)));
        self.forget(old.into_keys());
        self.revision += 1;
        id
    }

    /// Who dials `addr` means the service `id`, as long as there is one.
    pub fn place(&mut self, addr: SocketAddr, id: ServiceId) {
        Arc::make_mut(&mut self.virtuals).insert(canonical(addr), id);
        self.revision += 1;
    }

    /// Forgets a service. Who still holds its id finds nobody under it.
    pub fn remove(&mut self, name: &str) {
        let Some(id) = Arc::make_mut(&mut self.names).remove(name) else { return };
        if let Some(service) = self.services.get_mut(id.index as usize).and_then(Option::take) {
            self.free_slots.extend(service.members().iter().map(|member| member.id.slot));
            self.forget(service.members().iter().map(|member| member.endpoint.addr));
        }
        let generation = id.generation.wrapping_add(1);
        self.free_services.push(ServiceId { generation, ..id });
        self.revision += 1;
    }

    /// What an active check has found; true if that is news.
    pub fn set_health(&mut self, addr: SocketAddr, is_healthy: bool, now: Instant) -> bool {
        let is_news =
            if is_healthy { self.unhealthy.remove(&addr) } else { self.unhealthy.insert(addr) };
        if !is_news {
            return false;
        }
        for index in 0..self.services.len() {
            let Some(service) = &self.services[index] else { continue };
            let is_concerned = |member: &Member| member.endpoint.addr == addr;
            if service.manner.check.is_none() || !service.members().iter().any(is_concerned) {
                continue;
            }
            let (id, name, manner) =
                (service.id, Arc::clone(&service.name), service.manner.clone());
            let mut members = service.members().to_vec();
            for member in members.iter_mut().filter(|member| is_concerned(member)) {
                member.is_healthy = is_healthy;
                if is_healthy {
                    member.joined = Some(now);
                    self.slots[member.id.slot as usize].joined = Some(now);
                }
            }
            self.services[index] = Some(Arc::new(Service::new(id, name, manner, members)));
        }
        self.revision += 1;
        true
    }

    /// The directory as of now. Costs a pointer for each service.
    #[must_use]
    pub fn table(&self) -> Arc<Table> {
        Arc::new(Table {
            names: Arc::clone(&self.names),
            revision: self.revision,
            services: self.services.clone(),
            slots: u32::try_from(self.slots.len()).unwrap_or(u32::MAX),
            virtuals: Arc::clone(&self.virtuals),
        })
    }

    /// Goes up with every change.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    fn enter(&mut self, name: &str) -> ServiceId {
        let id = self.free_services.pop().unwrap_or_else(|| {
            self.services.push(None);
            let index = u32::try_from(self.services.len() - 1).unwrap_or(u32::MAX);
            ServiceId { generation: 0, index }
        });
        Arc::make_mut(&mut self.names).insert(name.into(), id);
        id
    }

    /// A slot that nobody has, under a generation that nobody has seen.
    fn slot(&mut self, joined: Option<Instant>) -> EndpointId {
        let slot = self.free_slots.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let place = &mut self.slots[slot as usize];
        *place = Slot { generation: place.generation.wrapping_add(1), joined };
        EndpointId { generation: place.generation, slot }
    }

    /// What checks have found at these addresses, unless another service has them: whoever comes back
    /// is new.
    fn forget(&mut self, gone: impl Iterator<Item = SocketAddr>) {
        for addr in gone {
            let is_it = |member: &Member| member.endpoint.addr == addr;
            let mut services = self.services.iter().flatten();
            if self.unhealthy.contains(&addr)
                && !services.any(|service| service.members().iter().any(is_it))
            {
                self.unhealthy.remove(&addr);
            }
        }
    }

    fn member(&self, endpoint: Endpoint, id: EndpointId, manner: &Manner) -> Member {
        let is_healthy = manner.check.is_none() || !self.unhealthy.contains(&endpoint.addr);
        let joined = self.slots[id.slot as usize].joined.filter(|_| !manner.slow_start.is_zero());
        Member { endpoint, id, is_healthy, joined }
    }
}

fn distinct(endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
    let mut seen: HashMap<SocketAddr, usize> = HashMap::with_capacity(endpoints.len());
    let mut distinct: Vec<Endpoint> = Vec::with_capacity(endpoints.len());
    for mut endpoint in endpoints {
        endpoint.addr = canonical(endpoint.addr);
        match seen.get(&endpoint.addr) {
            Some(index) => distinct[*index] = endpoint,
            None => {
                seen.insert(endpoint.addr, distinct.len());
                distinct.push(endpoint);
            }
        }
    }
    distinct.truncate(MEMBERS_MAX);
    distinct
}
