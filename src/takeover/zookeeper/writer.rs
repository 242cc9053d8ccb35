// SPDX-License-Identifier: Apache-2.0
//! Makes an ensemble hold what it shall hold, and nothing else of ours.
//!
//! Invariants: a leaf that an earlier session left behind is taken over in one transaction, so nobody
//! ever sees it gone; a leaf that another session has taken from us is left to it, and never removed;
//! what is refused stops nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use zookeeper_client::{Acl, Acls, Client, CreateMode, Error, Permission};

use super::super::Provider;
use super::super::link::Link;
use crate::config::{Layout, Zookeeper};

/// Of one session.
pub(super) struct Writer {
    client: Client,
    link: Arc<Link>,
    /// By path: why it was not done, as it was last said.
    refused: BTreeMap<String, Refusal>,
    settings: Arc<Zookeeper>,
    /// Paths at which there may be something of ours.
    written: BTreeSet<String>,
}

/// Why the ensemble does not hold something, or holds it still.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
enum Refusal {
    /// It was ours, and a session that lives has written it anew.
    #[error("another session has taken it: is there a second weir with this address?")]
    Contested,
    #[error(transparent)]
    Error(#[from] Error),
}

/// Who owns a leaf.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Owner {
    Nobody,
    Other,
    Us,
}

impl Writer {
    pub(super) fn new(client: Client, link: Arc<Link>, settings: Arc<Zookeeper>) -> Writer {
        Writer { client, link, refused: BTreeMap::new(), settings, written: BTreeSet::new() }
    }

    /// Whatever this may have written is known afterwards, also if it is stopped half-way. With
    /// `audit` it looks whether all is there, and tries again what was refused.
    ///
    /// An error is one of the session; of a publication it is said and counted.
    pub(super) async fn reconcile(&mut self, audit: bool) -> Result<(), Error> {
        self.look(audit).await?;
        let (held, wanted) = (self.link.held(), self.link.wanted());
        let mut surplus = self.written.clone();
        for (service, provider) in &wanted {
            let path = self.path(service, provider);
            surplus.remove(&path);
            let is_due = audit || !self.refused.contains_key(&path);
            if held.get(service) != Some(provider) && is_due {
                self.written.insert(path.clone());
                let entered = self.enter(&path, provider).await;
                if self.note("publish", &path, entered)? {
                    self.link.note_held(service, Some(provider));
                }
            }
        }
        // Last of all: who changes what it says is never missing.
        for path in surplus {
            let removed = self.remove(&path).await;
            if self.note("withdraw", &path, removed)? {
                self.written.remove(&path);
            }
        }
        let is_there = |service: &str| {
            let mut left = held.get(service).into_iter();
            left.any(|provider| self.written.contains(&self.path(service, provider)))
        };
        let gone = held.keys().filter(|service| !wanted.contains_key(*service));
        let gone: Vec<&String> = gone.filter(|service| !is_there(service)).collect();
        gone.into_iter().for_each(|service| self.link.note_held(service, None));
        Ok(())
    }

    /// Whether what the ensemble was said to hold is there: always of what another session has, of
    /// everything with `audit`.
    async fn look(&mut self, audit: bool) -> Result<(), Error> {
        let wanted = self.link.wanted();
        for (service, provider) in &self.link.held() {
            let path = self.path(service, provider);
            let is_contested = self.refused.get(&path) == Some(&Refusal::Contested);
            if wanted.get(service) != Some(provider) || !(audit || is_contested) {
                continue;
            }
            match self.owner(&path).await {
                Ok(Owner::Us) => drop(self.refused.remove(&path)),
                // It is there. Taking it back would begin a fight that never ends.
                Ok(Owner::Other) => self.refuse("keep", &path, Refusal::Contested),
                Ok(Owner::Nobody) => {
                    let registry = self.link.name();
                    tracing::warn!(registry, service, "somebody removed it: again");
                    self.refused.remove(&path);
                    self.link.note_held(service, None);
                }
                Err(error) if is_of_session(&error) => return Err(error),
                Err(error) => self.refuse("look at", &path, error.into()),
            }
        }
        Ok(())
    }

    /// This session owns a leaf at `path` afterwards.
    async fn enter(&self, path: &str, provider: &Provider) -> Result<(), Error> {
        let (client, acls) = (&self.client, acls(&self.settings));
        let data = provider.endpoint.addr.ip().to_string();
        let data = if self.settings.layout == Layout::Dubbo { data.as_bytes() } else { b"" };
        for _ in 0..ENTER_ATTEMPTS {
            match client.create(path, data, &CreateMode::Ephemeral.with_acls(acls)).await {
                Ok(_) => return Ok(()),
                Err(Error::NoNode) => {
                    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                    client.mkdir(parent, &CreateMode::Persistent.with_acls(acls)).await?;
                }
                Err(Error::NodeExists) if self.owner(path).await? == Owner::Us => return Ok(()),
                Err(Error::NodeExists) => {
                    // Left by a session of ours that has not expired yet: it would take the leaf
                    // away when it does.
                    let mut both = client.new_multi_writer();
                    both.add_delete(path, None)?;
                    both.add_create(path, data, &CreateMode::Ephemeral.with_acls(acls))?;
                    match both.commit().await.map_err(Error::from) {
                        Ok(_) => return Ok(()),
                        Err(Error::NoNode) => {}
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::NodeExists)
    }

    /// No leaf of this session is at `path` afterwards. There is no way to remove a node only if one
    /// owns it: who takes it between the two steps writes it again when it looks.
    async fn remove(&self, path: &str) -> Result<(), Error> {
        if self.owner(path).await? != Owner::Us {
            return Ok(());
        }
        match self.client.delete(path, None).await {
            Err(Error::NoNode) => Ok(()),
            result => result,
        }
    }

    async fn owner(&self, path: &str) -> Result<Owner, Error> {
        let stat = self.client.check_stat(path).await?;
        Ok(match stat.map(|stat| stat.ephemeral_owner) {
            None => Owner::Nobody,
            Some(owner) if owner == self.client.session_id().0 => Owner::Us,
            Some(_) => Owner::Other,
        })
    }

    /// Whether it was done; what is refused is said once.
    fn note(&mut self, what: &str, path: &str, result: Result<(), Error>) -> Result<bool, Error> {
        match result {
            Ok(()) => {
                self.refused.remove(path);
                Ok(true)
            }
            Err(error) if is_of_session(&error) => Err(error),
            Err(error) => {
                self.refuse(what, path, error.into());
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

    fn path(&self, service: &str, provider: &Provider) -> String {
        let Zookeeper { layout, root, .. } = &*self.settings;
        format!("{}/{}", layout.directory(root, service), layout.leaf(service, provider))
    }
}

/// Nothing else will be done either: the connection or the session is gone.
fn is_of_session(error: &Error) -> bool {
    matches!(
        error,
        Error::AuthFailed
            | Error::ClientClosed
            | Error::ConnectionLoss
            | Error::NoHosts
            | Error::NotReadOnly
            | Error::SessionExpired
            | Error::SessionMoved
            | Error::Throttled
            | Error::Timeout
    )
}

/// Whoever has the password may change what is ours, and everybody may read it.
fn acls(settings: &Zookeeper) -> Acls<'static> {
    static OWN: [Acl; 2] = [
        Acl::new_const(Permission::ALL, "auth", ""),
        Acl::new_const(Permission::READ, "world", "anyone"),
    ];
    if settings.credentials.is_some() { Acls::new(&OWN) } else { Acls::anyone_all() }
}

/// Directories and rivals come and go between two steps; more than this is no accident.
const ENTER_ATTEMPTS: u32 = 5;
