// SPDX-License-Identifier: Apache-2.0
//! Between the desk, which never waits, and a task that talks to a registry on the network.
//!
//! Each side leaves notes for the other: what is wanted, what the registry holds, what it says. A
//! later note takes the place of an earlier one about the same service, so nothing piles up.

#![expect(clippy::disallowed_types, reason = "no worker comes here, and nobody waits inside")]

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};

use super::{Provider, Registry, Snapshot, Standing};

/// The desk's end: a registry on the network, whatever its kind.
#[derive(Debug)]
pub(super) struct Remote {
    link: Arc<Link>,
    task: AbortHandle,
}

/// The notes.
#[derive(Debug)]
pub(super) struct Link {
    bell: Notify,
    name: String,
    notes: Mutex<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    /// By service: what the registry has said it holds.
    held: BTreeMap<String, Provider>,
    /// By service: what the desk has not heard yet.
    news: BTreeMap<String, Snapshot>,
    standing: Standing,
    /// Snapshots of these are wanted; by service, in which life of the subscription.
    subscribed: BTreeMap<String, Life>,
    /// Subscriptions there ever were.
    subscriptions: u64,
    /// By service: what the registry shall hold.
    wanted: BTreeMap<String, Provider>,
}

/// Who subscribes again has heard nothing yet, also if the task has not noticed that he was gone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Life(pub(super) u64);

/// The task's own tasks: one for each service that is subscribed to, for each life of its subscription.
#[derive(Debug, Default)]
pub(super) struct Followers {
    by_service: BTreeMap<String, (Life, AbortHandle)>,
    tasks: JoinSet<()>,
}

/// How long to wait before the next attempt: longer after each failure, and never in step with
/// others who lost the same registry.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Remote {
    /// The task that `run` makes of the link works until this registry is dropped.
    pub(super) fn spawn<T>(name: &str, run: impl FnOnce(Arc<Link>) -> T) -> Remote
    where
        T: Future<Output = ()> + Send + 'static,
    {
        let notes = Mutex::new(Notes::default());
        let link = Arc::new(Link { bell: Notify::new(), name: name.to_owned(), notes });
        let task = tokio::spawn(run(Arc::clone(&link))).abort_handle();
        Remote { link, task }
    }
}

impl Registry for Remote {
    fn name(&self) -> &str {
        &self.link.name
    }

    fn holds(&self, service: &str) -> bool {
        self.link.notes().held.contains_key(service)
    }

    fn news(&mut self) -> Vec<Snapshot> {
        std::mem::take(&mut self.link.notes().news).into_values().collect()
    }

    fn publish(&mut self, service: &str, provider: &Provider) -> bool {
        self.link.ask(|notes| {
            notes.wanted.insert(service.to_owned(), provider.clone());
        });
        true
    }

    fn standing(&self) -> Standing {
        self.link.notes().standing.clone()
    }

    fn subscribe(&mut self, service: &str) {
        self.link.ask(|notes| {
            notes.subscriptions += 1;
            let life = Life(notes.subscriptions);
            notes.subscribed.entry(service.to_owned()).or_insert(life);
        });
    }

    fn unpublish(&mut self, service: &str) {
        self.link.ask(|notes| {
            notes.wanted.remove(service);
        });
    }

    fn unsubscribe(&mut self, service: &str) {
        self.link.ask(|notes| {
            notes.subscribed.remove(service);
            notes.news.remove(service);
        });
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The task's end.
impl Link {
    /// In logs.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The desk wants something else than before.
    pub(super) async fn asked(&self) {
        self.bell.notified().await;
    }

    /// By service: what the registry shall hold.
    pub(super) fn wanted(&self) -> BTreeMap<String, Provider> {
        self.notes().wanted.clone()
    }

    /// What snapshots are wanted of, and in which life of the subscription.
    pub(super) fn subscribed(&self) -> BTreeMap<String, Life> {
        self.notes().subscribed.clone()
    }

    /// What the registry holds, as it has last said.
    pub(super) fn held(&self) -> BTreeMap<String, Provider> {
        self.notes().held.clone()
    }

    /// The registry holds `service`, or does so no more.
    pub(super) fn note_held(&self, service: &str, provider: Option<&Provider>) {
        let mut notes = self.notes();
        match provider {
            Some(provider) => notes.held.insert(service.to_owned(), provider.clone()),
            None => notes.held.remove(service),
        };
    }

    /// The registry says so.
    pub(super) fn note_snapshot(&self, snapshot: Snapshot) {
        let mut notes = self.notes();
        notes.standing.snapshots += 1;
        let clamped = snapshot.providers.iter().filter(|provider| provider.is_clamped()).count();
        notes.standing.clamped += clamped as u64;
        if notes.subscribed.contains_key(&snapshot.service) {
            notes.news.insert(snapshot.service.clone(), snapshot);
        }
    }

    /// A session has begun: the registry holds nothing of it yet.
    pub(super) fn note_session(&self) {
        let mut notes = self.notes();
        notes.held.clear();
        notes.standing.sessions += 1;
        notes.standing.is_connected = true;
        tracing::info!(registry = self.name, "connected");
    }

    /// The connection is there, or is gone for now; the session may live on.
    pub(super) fn note_connected(&self, is_connected: bool) {
        let mut notes = self.notes();
        if notes.standing.is_connected != is_connected {
            notes.standing.is_connected = is_connected;
            tracing::info!(registry = self.name, is_connected, "the connection");
        }
    }

    /// There is no session, and with it nothing that the registry holds for us. Said once until it
    /// changes.
    pub(super) fn note_failure(&self, why: &impl Display) {
        let why = why.to_string();
        let mut notes = self.notes();
        notes.held.clear();
        notes.standing.failures += 1;
        let is_news = notes.standing.is_connected || notes.standing.trouble != why;
        notes.standing.is_connected = false;
        if is_news {
            tracing::warn!(registry = self.name, "{why}; weir goes on with what it knows");
            notes.standing.trouble = why;
        }
    }

    /// The registry does not take something, and goes on with everything else.
    pub(super) fn note_refusal(&self, what: &str, why: &impl Display) {
        self.notes().standing.refusals += 1;
        tracing::warn!(registry = self.name, "{what}: {why}; tried again every few seconds");
    }

    fn ask(&self, what: impl FnOnce(&mut Notes)) {
        what(&mut self.notes());
        self.bell.notify_one();
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Followers {
    /// Starts who is missing with `start`, and ends who is wanted no more.
    pub(super) fn follow<T>(&mut self, link: &Link, start: impl Fn(String) -> T)
    where
        T: Future<Output = ()> + Send + 'static,
    {
        let wanted = link.subscribed();
        self.by_service.retain(|service, (life, task)| {
            let is_wanted = wanted.get(service) == Some(life);
            if !is_wanted {
                task.abort();
            }
            is_wanted
        });
        while self.tasks.try_join_next().is_some() {}
        for (service, life) in wanted {
            let tasks = &mut self.tasks;
            let begin = || (life, tasks.spawn(start(service.clone())));
            self.by_service.entry(service.clone()).or_insert_with(begin);
        }
    }
}

impl Backoff {
    pub(super) const fn new() -> Backoff {
        Backoff(PAUSE_FIRST)
    }

    /// Waits; the next time is longer.
    pub(super) async fn pause(&mut self) {
        let (least, most) = (self.0 / 2, self.0);
        self.0 = (self.0 * 2).min(PAUSE_MAX);
        tokio::time::sleep(least + (most - least).mul_f64(chance())).await;
    }

    /// It went well: the next pause is short again.
    pub(super) fn reset(&mut self) {
        self.0 = PAUSE_FIRST;
    }
}

/// The first line of its file.
#[cfg(any(feature = "etcd", feature = "zookeeper"))]
pub(super) fn password_of(credentials: &crate::config::Credentials) -> std::io::Result<String> {
    let text = std::fs::read_to_string(&credentials.password_file)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// From 0 to 1.
fn chance() -> f64 {
    f64::from(u32::try_from(random() >> 32).unwrap_or(0)) / f64::from(u32::MAX)
}

/// Good enough to keep many weirs out of step, and to tell them apart.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    /// A consumer that leaves and comes back while the registry does not answer hears where the
    /// service lives, although nothing has changed there.
    #[tokio::test]
    async fn who_subscribes_again_hears_again() {
        let mut followers = Followers::default();
        let mut remote = Remote::spawn("main", |_| std::future::pending());
        let link = Arc::clone(&remote.link);
        let say = |service: String| {
            let link = Arc::clone(&link);
            async move {
                link.note_snapshot(Snapshot { providers: vec![], revision: 1, service });
                std::future::pending::<()>().await;
            }
        };
        for round in 1..=2 {
            remote.subscribe("a");
            for _ in 0..2 {
                followers.follow(&link, say);
                tokio::task::yield_now().await;
            }
            let heard = remote.news();
            assert_eq!(heard.len(), 1, "round {round}: {heard:?}");
            remote.unsubscribe("a");
        }
        followers.follow(&link, say);
        assert!(followers.by_service.is_empty());
    }
}
