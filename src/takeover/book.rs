// SPDX-License-Identifier: Apache-2.0
//! By service, what each registry is believed to say: from its own mouth, or from an earlier life.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::belief::{Belief, Heard, Reason};
use super::{Provider, Snapshot};
use crate::config::Protection;

/// Of all services that are subscribed to.
#[derive(Debug)]
pub(super) struct Book {
    /// By service: a belief for each registry.
    beliefs: BTreeMap<String, Vec<Belief>>,
    /// By registry: how often it was doubted, by reason.
    doubted: Vec<[u64; Reason::ALL.len()]>,
    /// Services that somebody doubts something of.
    in_doubt: BTreeSet<String>,
    /// By registry: what it said in an earlier life of services nobody has asked for since.
    kept: Vec<BTreeMap<String, Snapshot>>,
    /// By registry: something is believed that is not on disk.
    news: Vec<bool>,
}

/// A list that became empty and is not believed: are they really gone?
#[derive(Clone, Debug, PartialEq)]
pub struct Suspect {
    /// Who was there.
    pub addrs: Vec<SocketAddr>,
    /// The registry, by its place in the config.
    pub(super) registry: usize,
    /// Whose list it is.
    pub(super) service: String,
    /// The doubt, of several that there may be one after the other.
    pub(super) since: Instant,
}

/// What one registry has to do with one service, for tables.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// Since the registry said what is believed; `None` if it was said in an earlier life.
    pub age: Option<Duration>,
    /// Why what it says now is not believed.
    pub doubt: Option<Reason>,
    /// How many it is believed to know.
    pub providers: usize,
    /// The registry.
    pub registry: String,
    /// The registry's own count.
    pub revision: u64,
}

impl Book {
    /// With what each registry said in an earlier life.
    pub(super) fn new(kept: Vec<BTreeMap<String, Snapshot>>) -> Book {
        Book {
            beliefs: BTreeMap::new(),
            doubted: vec![[0; Reason::ALL.len()]; kept.len()],
            in_doubt: BTreeSet::new(),
            news: vec![false; kept.len()],
            kept,
        }
    }

    pub(super) fn has(&self, service: &str) -> bool {
        self.beliefs.contains_key(service)
    }

    pub(super) fn len(&self) -> usize {
        self.beliefs.len()
    }

    pub(super) fn services(&self) -> impl Iterator<Item = &str> {
        self.beliefs.keys().map(String::as_str)
    }

    pub(super) fn enter(&mut self, service: &str) {
        let kept = |kept: &mut BTreeMap<String, Snapshot>| {
            kept.remove(service).map_or_else(Belief::default, Belief::kept)
        };
        let beliefs = self.kept.iter_mut().map(kept).collect();
        self.beliefs.insert(service.to_owned(), beliefs);
    }

    /// A registry has said something of `service`, in this life or an earlier one.
    pub(super) fn has_heard(&self, registry: usize, service: &str) -> bool {
        let belief = self.beliefs.get(service).and_then(|beliefs| beliefs.get(registry));
        belief.is_some_and(|belief| belief.trusted().is_some())
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, service: &str) -> bool {
        self.in_doubt.remove(service);
        self.beliefs.remove(service).is_some()
    }

    /// A registry says so. True if calls go by something else from now on.
    pub(super) fn hear(
        &mut self,
        registry: usize,
        said: Snapshot,
        rules: Option<&Protection>,
        now: Instant,
    ) -> bool {
        let service = said.service.clone();
        let beliefs = self.beliefs.get_mut(&service);
        let Some(belief) = beliefs.and_then(|beliefs| beliefs.get_mut(registry)) else {
            return false;
        };
        let heard = belief.hear(said, rules, now);
        if let Some(news) = self.news.get_mut(registry).filter(|_| heard == Heard::Changed) {
            *news = true;
        }
        match heard {
            Heard::Changed => true,
            Heard::Same => false,
            Heard::Doubted(reason) => {
                if let Some(counts) = self.doubted.get_mut(registry) {
                    counts[reason as usize] += 1;
                }
                self.in_doubt.insert(service);
                true
            }
        }
    }

    /// Drops that have lasted are believed of registries that `answer`; the services that this has
    /// changed.
    pub(super) fn ripen(
        &mut self,
        rules: &Protection,
        answers: impl Fn(usize) -> bool,
        now: Instant,
    ) -> Vec<String> {
        let mut changed = Vec::new();
        self.in_doubt.retain(|service| {
            let mut is_in_doubt = false;
            for (index, belief) in self.beliefs.get_mut(service).into_iter().flatten().enumerate() {
                if answers(index) && belief.ripen(rules, now) {
                    self.news[index] = true;
                    changed.push(service.clone());
                }
                is_in_doubt |= belief.reason().is_some();
            }
            is_in_doubt
        });
        changed
    }

    /// Lists that became empty and stayed so.
    pub(super) fn suspects(&self, rules: &Protection, now: Instant) -> Vec<Suspect> {
        let mut suspects = Vec::new();
        for service in &self.in_doubt {
            for (registry, belief) in self.beliefs.get(service).into_iter().flatten().enumerate() {
                if let Some((since, addrs)) = belief.suspects(rules, now) {
                    suspects.push(Suspect { addrs, registry, service: service.clone(), since });
                }
            }
        }
        suspects
    }

    /// The registry was right in that. True if calls go by something else now.
    pub(super) fn settle(&mut self, suspect: &Suspect, now: Instant) -> bool {
        let Suspect { registry, service, since, .. } = suspect;
        let beliefs = self.beliefs.get_mut(service);
        let belief = beliefs.and_then(|beliefs| beliefs.get_mut(*registry));
        let is_settled = belief.is_some_and(|belief| belief.settle(*since, now));
        if is_settled {
            self.keep_again(*registry);
        }
        is_settled
    }

    /// What is believed of this registry is not on disk.
    pub(super) fn keep_again(&mut self, registry: usize) {
        if let Some(news) = self.news.get_mut(registry) {
            *news = true;
        }
    }

    /// What calls go by: of all registries, none twice where it was said twice.
    pub(super) fn providers(&self, service: &str) -> impl Iterator<Item = Provider> {
        self.beliefs.get(service).into_iter().flatten().flat_map(Belief::providers)
    }

    /// What one registry has to do with that.
    pub(super) fn providers_of(&self, registry: usize, service: &str) -> Vec<Provider> {
        let belief = self.beliefs.get(service).and_then(|beliefs| beliefs.get(registry));
        belief.map(Belief::providers).unwrap_or_default()
    }

    /// What is believed of one registry, if that is not on disk yet.
    pub(super) fn take_news(&mut self, registry: usize) -> Option<Vec<&Snapshot>> {
        let news = self.news.get_mut(registry)?;
        if !std::mem::take(news) {
            return None;
        }
        let trusted = self.beliefs.values().filter_map(|beliefs| beliefs.get(registry)?.trusted());
        let kept = self.kept.get(registry).into_iter().flat_map(BTreeMap::values);
        Some(trusted.map(|(snapshot, _)| snapshot).chain(kept).collect())
    }

    /// How often a registry was doubted, by reason.
    pub(super) fn doubted(&self, registry: usize) -> [u64; Reason::ALL.len()] {
        self.doubted.get(registry).copied().unwrap_or_default()
    }

    /// Who has said something of `service`.
    pub(super) fn sources<'a>(
        &'a self,
        service: &str,
        names: impl Iterator<Item = &'a str>,
        now: Instant,
    ) -> Vec<Source> {
        let beliefs = self.beliefs.get(service).into_iter().flatten();
        let source = |(belief, name): (&Belief, &str)| {
            let (snapshot, heard) = belief.trusted()?;
            Some(Source {
                age: heard.map(|heard| now.saturating_duration_since(heard)),
                doubt: belief.reason(),
                providers: belief.providers().len(),
                registry: name.to_owned(),
                revision: snapshot.revision,
            })
        };
        beliefs.zip(names).filter_map(source).collect()
    }
}
