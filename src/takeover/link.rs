// SPDX-License-Identifier: Apache-2.0
//! Between the desk, which never waits, and a task that talks to a registry on the network.
//!
//! Each side leaves notes for the other: what is wanted, what the registry holds, what it says. A
//! later note takes the place of an earlier one about the same service, so nothing piles up. The task
//! works until it is aborted: whatever happens to the registry, it comes back to it.

#![expect(clippy::disallowed_types, reason = "no worker comes here, and nobody waits inside")]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Display;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::dial::dial;
use super::{Provider, Registry, Snapshot, Standing};

/// A kind of registry on the network: how a session with it goes.
pub(super) trait Backend: Send + 'static {
    /// Why there is no session.
    type Failure: Display + Send;

    /// One session, from its beginning, which `link` is told, to its end.
    fn session(
        &mut self,
        link: &Arc<Link>,
    ) -> impl Future<Output = Result<Infallible, Self::Failure>> + Send;
}

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
    mark: Option<u32>,
    name: String,
    notes: Mutex<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    /// By service: what the registry has said it holds.
    held: BTreeMap<String, Provider>,
    /// By service: what the desk has not heard yet.
    news: BTreeMap<String, Snapshot>,
    /// Of the session that there is.
    since: Option<Instant>,
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

/// How long to wait before the next attempt: longer after each failure, and never in step with
/// others who lost the same registry.
struct Backoff(Duration);

impl Remote {
    /// A task of its own speaks with the registry until this is dropped; its connections have a `mark`
    /// if weir could capture them.
    pub(super) fn spawn(name: &str, mark: Option<u32>, backend: impl Backend) -> Remote {
        let standing = Standing { down_since: Some(Instant::now()), ..Standing::default() };
        let notes = Mutex::new(Notes { standing, ..Notes::default() });
        let link = Arc::new(Link { bell: Notify::new(), mark, name: name.to_owned(), notes });
        let task = tokio::spawn(run(Arc::clone(&link), backend)).abort_handle();
        Remote { link, task }
    }
}

/// One session after the other.
async fn run(link: Arc<Link>, mut backend: impl Backend) {
    let mut backoff = Backoff::new();
    loop {
        let Err(failure) = backend.session(&link).await;
        let lasted = link.note_failure(&failure);
        tokio::time::sleep(backoff.next(lasted)).await;
    }
}

#[cfg(all(test, feature = "zookeeper"))]
impl Remote {
    /// The other end.
    pub(super) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link)
    }
}

impl Registry for Remote {
    fn name(&self) -> &str {
        &self.link.name
    }

    fn holds(&self, service: &str) -> bool {
        self.link.notes().held.contains_key(service)
    }

    fn leave(&mut self) {
        self.task.abort();
        self.link.notes().note_connected(false);
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

impl Notes {
    fn note_connected(&mut self, is_connected: bool) {
        let Standing { down_since, .. } = self.standing;
        self.standing.is_connected = is_connected;
        self.standing.down_since =
            if is_connected { None } else { down_since.or(Some(Instant::now())) };
    }
}

/// The task's end.
impl Link {
    /// In logs.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A connection to `server`, a host and a port, that weir never captures.
    pub(super) async fn dial(&self, server: &str) -> io::Result<TcpStream> {
        dial(server, self.mark).await
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
    #[cfg(any(feature = "etcd", feature = "zookeeper"))]
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
        notes.since = Some(Instant::now());
        notes.standing.sessions += 1;
        notes.note_connected(true);
        tracing::info!(registry = self.name, "connected");
    }

    /// The connection is there, or is gone for now; the session may live on.
    #[cfg(feature = "zookeeper")]
    pub(super) fn note_connected(&self, is_connected: bool) {
        let mut notes = self.notes();
        if notes.standing.is_connected != is_connected {
            notes.note_connected(is_connected);
            tracing::info!(registry = self.name, is_connected, "the connection");
        }
    }

    /// There is no session, and with it nothing that the registry holds for us. Said once until it
    /// changes. How long there was one.
    fn note_failure(&self, why: &impl Display) -> Option<Duration> {
        let why = why.to_string();
        let mut notes = self.notes();
        notes.held.clear();
        notes.standing.failures += 1;
        let is_news = notes.standing.is_connected || notes.standing.trouble != why;
        notes.note_connected(false);
        if is_news {
            tracing::warn!(registry = self.name, "{why}; weir goes on with what it knows");
            notes.standing.trouble = why;
        }
        notes.since.take().map(|since| since.elapsed())
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

impl Backoff {
    const fn new() -> Backoff {
        Backoff(PAUSE_FIRST)
    }

    /// After a session that lasted so long. Who had served is missed by others: the next attempt is made
    /// at once, but not by everybody again and again.
    fn next(&mut self, lasted: Option<Duration>) -> Duration {
        if lasted.is_some_and(|lasted| lasted >= LASTING) {
            *self = Backoff::new();
            return Duration::ZERO;
        }
        let (least, most) = (self.0 / 2, self.0);
        self.0 = (self.0 * 2).min(PAUSE_MAX);
        least + (most - least).mul_f64(chance())
    }
}

/// The first line of its file.
#[cfg(any(feature = "etcd", feature = "zookeeper"))]
pub(super) fn password_of(credentials: &crate::config::Credentials) -> io::Result<String> {
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

/// A session that lasted so long was no accident of a server that cannot serve.
const LASTING: Duration = Duration::from_secs(10);
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_had_served_comes_back_at_once_and_who_cannot_serve_is_asked_ever_less_often() {
        let mut backoff = Backoff::new();
        for round in 0..10 {
            let lasted = (round % 2 == 0).then_some(Duration::from_secs(9));
            let (pause, most) =
                (backoff.next(lasted), (PAUSE_FIRST * 2_u32.pow(round)).min(PAUSE_MAX));
            assert!(pause >= most / 2 && pause <= most, "{round}: {pause:?}");
        }
        assert_eq!(backoff.next(Some(LASTING)), Duration::ZERO);
        assert!(backoff.next(None) <= PAUSE_FIRST);
    }
}
