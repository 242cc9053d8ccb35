// SPDX-License-Identifier: Apache-2.0
//! The registry in the config: what stands there, and what this host's own applications publish.

use std::collections::{BTreeMap, BTreeSet};

use super::{Provider, Registry, Snapshot, Standing};
use crate::config::Named;

/// Services that the config names.
#[derive(Debug)]
pub struct FixedRegistry {
    changed: BTreeSet<String>,
    /// Published here, by service.
    local: BTreeMap<String, Provider>,
    name: String,
    revision: u64,
    services: BTreeMap<String, Vec<Provider>>,
    subscribed: BTreeSet<String>,
}

impl FixedRegistry {
    /// With these services.
    #[must_use]
    pub fn new(name: &str, services: &[Named]) -> FixedRegistry {
        FixedRegistry {
            changed: BTreeSet::new(),
            local: BTreeMap::new(),
            name: name.to_owned(),
            revision: 0,
            services: by_name(services),
            subscribed: BTreeSet::new(),
        }
    }

    /// Holds these services from now on.
    pub(super) fn replace(&mut self, services: &[Named]) {
        let new = by_name(services);
        let names = new.keys().chain(self.services.keys());
        let changed = names.filter(|name| new.get(*name) != self.services.get(*name)).cloned();
        self.changed.extend(changed.collect::<Vec<_>>());
        self.services = new;
    }
}

impl Registry for FixedRegistry {
    fn name(&self) -> &str {
        &self.name
    }

    fn holds(&self, service: &str) -> bool {
        self.local.contains_key(service)
    }

    fn is_beyond_doubt(&self) -> bool {
        true
    }

    fn news(&mut self) -> Vec<Snapshot> {
        let changed = std::mem::take(&mut self.changed);
        let mut news = Vec::new();
        for service in changed.into_iter().filter(|service| self.subscribed.contains(service)) {
            self.revision += 1;
            let named = self.services.get(&service).into_iter().flatten();
            let mut providers: Vec<Provider> =
                self.local.get(&service).cloned().into_iter().collect();
            for provider in named {
                if providers.iter().all(|other| other.endpoint.addr != provider.endpoint.addr) {
                    providers.push(provider.clone());
                }
            }
            news.push(Snapshot { providers, revision: self.revision, service });
        }
        news
    }

    fn publish(&mut self, service: &str, provider: &Provider) -> bool {
        if self.local.get(service) != Some(provider) {
            self.local.insert(service.to_owned(), provider.clone());
            self.changed.insert(service.to_owned());
        }
        true
    }

    fn standing(&self) -> Standing {
        Standing { is_connected: true, snapshots: self.revision, ..Standing::default() }
    }

    fn unpublish(&mut self, service: &str) {
        if self.local.remove(service).is_some() {
            self.changed.insert(service.to_owned());
        }
    }

    fn subscribe(&mut self, service: &str) {
        self.subscribed.insert(service.to_owned());
        self.changed.insert(service.to_owned());
    }

    fn unsubscribe(&mut self, service: &str) {
        self.subscribed.remove(service);
    }
}

fn by_name(services: &[Named]) -> BTreeMap<String, Vec<Provider>> {
    let provider = |named: &Named, endpoint: &crate::service::Endpoint| Provider {
        endpoint: endpoint.clone(),
        parameters: named.parameters.clone(),
    };
    let providers =
        |named: &Named| named.endpoints.iter().map(|endpoint| provider(named, endpoint)).collect();
    services.iter().map(|named| (named.name.clone(), providers(named))).collect()
}
