// SPDX-License-Identifier: Apache-2.0
//! Makes a registry's tree hold what it shall hold, and nothing else of ours.
//!
//! Invariants: a leaf that an earlier session left behind is taken over and never seen gone; a leaf
//! that another session has taken from us is left to it, and never removed; what is refused stops
//! nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::Arc;

use super::Provider;
use super::link::Link;

/// A registry's tree, as one session of ours sees it.
pub(super) trait Store: Send + Sync {
    type Error: Display + Send;

    /// Nothing else will be done either: the connection or the session is gone.
    fn is_of_session(error: &Self::Error) -> bool;

    /// Where `provider` of `service` stands.
    fn path(&self, service: &str, provider: &Provider) -> String;

    /// Whose leaf is there.
    fn owner(&self, path: &str) -> impl Future<Output = Result<Owner, Self::Error>> + Send;

    /// This session owns the leaf at `path` afterwards, whoever had it before.
    fn enter(
        &self,
        path: &str,
        provider: &Provider,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// No leaf of this session is at `path` afterwards.
    fn remove(&self, path: &str) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// Of one session.
pub(super) struct Writer<S> {
    link: Arc<Link>,
    /// By path: why it was not done, as it was last said.
    refused: BTreeMap<String, Refusal>,
    store: S,
    /// Paths at which there may be something of ours.
    written: BTreeSet<String>,
}

/// Why the registry does not hold something, or holds it still.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
enum Refusal {
    /// It was ours, and a session that lives has written it anew.
    #[error("another session has taken it: is there a second weir with this address?")]
    Contested,
    #[error("{0}")]
    Said(String),
}

/// Who owns a leaf.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Owner {
    Nobody,
    Other,
    Us,
}

impl<S: Store> Writer<S> {
    pub(super) fn new(link: Arc<Link>, store: S) -> Writer<S> {
        Writer { link, refused: BTreeMap::new(), store, written: BTreeSet::new() }
    }

    /// Whatever this may have written is known afterwards, also if it is stopped half-way. With
    /// `audit` it looks whether all is there, and tries again what was refused.
    ///
    /// An error is one of the session; of a publication it is said and counted.
    pub(super) async fn reconcile(&mut self, audit: bool) -> Result<(), S::Error> {
        self.look(audit).await?;
        let (held, wanted) = (self.link.held(), self.link.wanted());
        let mut surplus = self.written.clone();
        for (service, provider) in &wanted {
            let path = self.store.path(service, provider);
            surplus.remove(&path);
            let is_due = audit || !self.refused.contains_key(&path);
            if held.get(service) != Some(provider) && is_due {
                self.written.insert(path.clone());
                let entered = self.store.enter(&path, provider).await;
                if self.note("publish", &path, entered)? {
                    self.link.note_held(service, Some(provider));
                }
            }
        }
        // Last of all: who changes what it says is never missing.
        for path in surplus {
            let removed = self.store.remove(&path).await;
            if self.note("withdraw", &path, removed)? {
                self.written.remove(&path);
            }
        }
        let is_there = |service: &str| {
            let mut left = held.get(service).into_iter();
            left.any(|provider| self.written.contains(&self.store.path(service, provider)))
        };
        let gone = held.keys().filter(|service| !wanted.contains_key(*service));
        let gone: Vec<&String> = gone.filter(|service| !is_there(service)).collect();
        gone.into_iter().for_each(|service| self.link.note_held(service, None));
        Ok(())
    }

    /// Whether what the registry was said to hold is there: always of what another session has, of
    /// everything with `audit`.
    async fn look(&mut self, audit: bool) -> Result<(), S::Error> {
        let wanted = self.link.wanted();
        for (service, provider) in &self.link.held() {
            let path = self.store.path(service, provider);
            let is_contested = self.refused.get(&path) == Some(&Refusal::Contested);
            if wanted.get(service) != Some(provider) || !(audit || is_contested) {
                continue;
            }
            match self.store.owner(&path).await {
                Ok(Owner::Us) => drop(self.refused.remove(&path)),
                // It is there. Taking it back would begin a fight that never ends.
                Ok(Owner::Other) => self.refuse("keep", &path, Refusal::Contested),
                Ok(Owner::Nobody) => {
                    let registry = self.link.name();
                    tracing::warn!(registry, service, "somebody removed it: again");
                    self.refused.remove(&path);
                    self.link.note_held(service, None);
                }
                Err(error) if S::is_of_session(&error) => return Err(error),
                Err(error) => self.refuse("look at", &path, Refusal::Said(error.to_string())),
            }
        }
        Ok(())
    }

    /// Whether it was done; what is refused is said once.
    fn note(
        &mut self,
        what: &str,
        path: &str,
        result: Result<(), S::Error>,
    ) -> Result<bool, S::Error> {
        match result {
            Ok(()) => {
                self.refused.remove(path);
                Ok(true)
            }
            Err(error) if S::is_of_session(&error) => Err(error),
            Err(error) => {
                self.refuse(what, path, Refusal::Said(error.to_string()));
                Ok(false)
            }
        }
    }

    fn refuse(&mut self, what: &str, path: &str, why: Refusal) {
        if self.refused.get(path) != Some(&why) {
            self.link.note_refusal(&format!("{what} {path}"), &why);
            self.refused.insert(path.to_owned(), why);
        }
    }
}
