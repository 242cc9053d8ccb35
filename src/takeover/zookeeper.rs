// SPDX-License-Identifier: Apache-2.0
//! A ZooKeeper ensemble as registry: providers are ephemeral leaves, so whoever dies is forgotten
//! when its session ends.
//!
//! Invariants: a directory is read and watched in one step, and always read whole, so no change is
//! missed however events are lost or merged.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use zookeeper_client::{Client, Error, EventType, OneshotWatcher, SessionState, StateWatcher};

use self::writer::Writer;
use super::link::{Backoff, Followers, Link};
use super::{Provider, Snapshot};
use crate::config::{Credentials, Zookeeper};

mod writer;

/// Works until it is aborted: whatever happens to the ensemble, it comes back to it.
pub(super) async fn run(link: Arc<Link>, settings: Zookeeper) {
    let settings = Arc::new(settings);
    let mut backoff = Backoff::new();
    loop {
        let Err(failure) = attempt(&link, &settings, &mut backoff).await;
        link.note_failure(&failure);
        backoff.pause().await;
    }
}

/// One session, from its beginning to its end.
async fn attempt(
    link: &Arc<Link>,
    settings: &Arc<Zookeeper>,
    backoff: &mut Backoff,
) -> Result<Infallible, Failure> {
    let client = connect(settings).await?;
    backoff.reset();
    link.note_session();
    Session::new(link, settings, client).serve().await
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("connect to ZooKeeper at {servers}: {source}")]
    Connect { servers: String, source: Error },
    #[error("read the password in {path}: {source}")]
    Password { path: String, source: io::Error },
    #[error("the session at ZooKeeper has ended: {0}")]
    Session(SessionState),
}

async fn connect(settings: &Zookeeper) -> Result<Client, Failure> {
    let servers = settings.servers.join(",");
    let mut connector = Client::connector().with_session_timeout(settings.session_timeout);
    if let Some(credentials) = &settings.credentials {
        connector = connector.with_auth("digest", digest(credentials)?.as_bytes());
    }
    connector.connect(&servers).await.map_err(|source| Failure::Connect { servers, source })
}

fn digest(credentials: &Credentials) -> Result<String, Failure> {
    let Credentials { password_file, user } = credentials;
    let text = std::fs::read_to_string(password_file).map_err(|source| Failure::Password {
        path: password_file.display().to_string(),
        source,
    })?;
    Ok(format!("{user}:{}", text.lines().next().unwrap_or_default()))
}

/// What is done while one session lives.
struct Session<'a> {
    link: &'a Arc<Link>,
    reader: Reader,
    states: StateWatcher,
    followers: Followers,
    writer: Writer,
}

/// Follows directories and says what stands there.
#[derive(Clone)]
struct Reader {
    client: Client,
    link: Arc<Link>,
    settings: Arc<Zookeeper>,
}

impl<'a> Session<'a> {
    fn new(link: &'a Arc<Link>, settings: &'a Arc<Zookeeper>, client: Client) -> Session<'a> {
        let states = client.state_watcher();
        let writer = Writer::new(client.clone(), Arc::clone(link), Arc::clone(settings));
        let reader = Reader { client, link: Arc::clone(link), settings: Arc::clone(settings) };
        Session { followers: Followers::default(), link, reader, states, writer }
    }

    /// Until the session is over.
    async fn serve(mut self) -> Result<Infallible, Failure> {
        let mut tick = interval(RECONCILE_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticks = 0;
        loop {
            self.followers.follow(self.link, |service| self.reader.clone().follow(service));
            let audit = ticks >= AUDIT_TICKS;
            tokio::select! {
                // A request waits while the connection is gone, and the session may end meanwhile.
                state = self.states.changed() => self.note(state)?,
                result = self.writer.reconcile(audit) => match result {
                    Ok(()) if audit => ticks = 0,
                    Ok(()) => {}
                    Err(error) => {
                        tracing::debug!(registry = self.link.name(), %error, "again soon");
                    }
                },
            }
            tokio::select! {
                state = self.states.changed() => self.note(state)?,
                () = self.link.asked() => {}
                _ = tick.tick() => ticks += 1,
            }
        }
    }

    fn note(&self, state: SessionState) -> Result<(), Failure> {
        self.link.note_connected(state == SessionState::SyncConnected);
        if state.is_terminated() { Err(Failure::Session(state)) } else { Ok(()) }
    }
}

impl Reader {
    /// Until the session is over.
    async fn follow(self, service: String) {
        let directory = self.settings.layout.directory(&self.settings.root, &service);
        let mut trouble = None;
        loop {
            match self.read(&directory, &service).await {
                Ok(watcher) => {
                    trouble = None;
                    let event = watcher.changed().await;
                    if event.event_type == EventType::Session && event.session_state.is_terminated()
                    {
                        return;
                    }
                    tokio::time::sleep(COALESCE).await;
                }
                Err(Error::SessionExpired | Error::ClientClosed | Error::AuthFailed) => return,
                Err(error) => {
                    if trouble.as_ref() != Some(&error) {
                        tracing::warn!(registry = self.link.name(), directory, "read: {error}");
                    }
                    trouble = Some(error);
                    tokio::time::sleep(READ_AGAIN).await;
                }
            }
        }
    }

    /// Says what stands there; the watcher knows when that is no longer so.
    async fn read(&self, directory: &str, service: &str) -> Result<OneshotWatcher, Error> {
        loop {
            match self.client.get_and_watch_children(directory).await {
                Ok((leaves, stat, watcher)) => {
                    self.say(service, &leaves, stat.pzxid);
                    return Ok(watcher);
                }
                Err(Error::NoNode) => {}
                Err(error) => return Err(error),
            }
            let (stat, watcher) = self.client.check_and_watch_stat(directory).await?;
            if stat.is_none() {
                self.say(service, &[], 0);
                return Ok(watcher);
            }
        }
    }

    fn say(&self, service: &str, leaves: &[String], revision: i64) {
        let provider = |leaf: &String| self.settings.layout.provider(service, leaf);
        let mut providers: Vec<Provider> = leaves.iter().filter_map(provider).collect();
        providers.sort_by_key(|provider| provider.endpoint.addr);
        providers.dedup_by_key(|provider| provider.endpoint.addr);
        let revision = u64::try_from(revision).unwrap_or(0);
        self.link.note_snapshot(Snapshot { providers, revision, service: service.to_owned() });
    }
}

/// Publications that could not be brought in line are tried again.
const RECONCILE_EVERY: Duration = Duration::from_secs(1);
/// Every so many ticks weir looks whether its leaves are there.
const AUDIT_TICKS: u32 = 5;
/// Changes of one directory that come closer than this are one.
const COALESCE: Duration = Duration::from_millis(20);
const READ_AGAIN: Duration = Duration::from_millis(500);
