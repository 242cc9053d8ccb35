// SPDX-License-Identifier: Apache-2.0
//! A ZooKeeper ensemble as registry: providers are ephemeral leaves, so whoever dies is forgotten
//! when its session ends.
//!
//! Invariants: a directory is read and watched in one step, and always read whole, so no change is
//! missed however events are lost or merged; a leaf counts as held only while this session owns it;
//! a leaf that an earlier session left behind is taken over in one transaction, so nobody ever sees
//! it gone.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval};
use zookeeper_client::{
    Acl, Acls, Client, CreateMode, Error, EventType, OneshotWatcher, Permission, SessionState,
    StateWatcher,
};

use super::link::{Backoff, Link};
use super::{Provider, Snapshot};
use crate::config::{Credentials, Zookeeper};

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
    /// By service: who follows its directory.
    watching: BTreeMap<String, AbortHandle>,
    watchers: JoinSet<()>,
    /// Paths at which there may be something of ours.
    written: BTreeSet<String>,
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
        let reader = Reader { client, link: Arc::clone(link), settings: Arc::clone(settings) };
        let (watching, watchers) = (BTreeMap::new(), JoinSet::new());
        Session { link, reader, states, watching, watchers, written: BTreeSet::new() }
    }

    /// Until the session is over.
    async fn serve(mut self) -> Result<Infallible, Failure> {
        let mut tick = interval(RECONCILE_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticks = 0;
        loop {
            self.follow();
            let audit = ticks >= AUDIT_TICKS;
            let reconciled = reconcile(&self.reader, &mut self.written, audit);
            tokio::select! {
                // A request waits while the connection is gone, and the session may end meanwhile.
                state = self.states.changed() => self.note(state)?,
                result = reconciled => match result {
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

    /// Follows the directories of what is wanted, and no others.
    fn follow(&mut self) {
        let wanted = self.link.subscribed();
        self.watching.retain(|service, watcher| {
            let is_wanted = wanted.contains(service);
            if !is_wanted {
                watcher.abort();
            }
            is_wanted
        });
        while self.watchers.try_join_next().is_some() {}
        for service in wanted {
            if !self.watching.contains_key(&service) {
                let follow = self.reader.clone().follow(service.clone());
                self.watching.insert(service, self.watchers.spawn(follow));
            }
        }
    }
}

/// Makes the ensemble hold what it shall hold, and nothing else of ours. Whatever this may have
/// `written` stands there, also if it is stopped half-way.
async fn reconcile(
    reader: &Reader,
    written: &mut BTreeSet<String>,
    audit: bool,
) -> Result<(), Error> {
    let Reader { client, link, settings } = reader;
    let path = |service: &str, provider: &Provider| {
        let directory = settings.layout.directory(&settings.root, service);
        format!("{directory}/{}", settings.layout.leaf(service, provider))
    };
    if audit {
        for (service, provider) in &link.held() {
            if !is_ours(client, &path(service, provider)).await? {
                tracing::warn!(registry = link.name(), service, "somebody removed it: again");
                link.note_held(service, None);
            }
        }
    }
    let (held, wanted) = (link.held(), link.wanted());
    let mut surplus = written.clone();
    for (service, provider) in &wanted {
        let path = path(service, provider);
        surplus.remove(&path);
        if held.get(service) != Some(provider) {
            written.insert(path.clone());
            enter(client, settings, &path, provider).await?;
            link.note_held(service, Some(provider));
        }
    }
    // Last of all: who changes what it says is never missing.
    for path in surplus {
        match client.delete(&path, None).await {
            Ok(()) | Err(Error::NoNode) => written.remove(&path),
            Err(error) => return Err(error),
        };
    }
    let gone = held.keys().filter(|service| !wanted.contains_key(*service));
    gone.for_each(|service| link.note_held(service, None));
    Ok(())
}

/// This session owns a leaf at `path` afterwards.
async fn enter(
    client: &Client,
    settings: &Zookeeper,
    path: &str,
    provider: &Provider,
) -> Result<(), Error> {
    let acls = acls(settings);
    let data = provider.endpoint.addr.ip().to_string();
    let data = if settings.layout == crate::config::Layout::Dubbo { data.as_bytes() } else { b"" };
    for _ in 0..ENTER_ATTEMPTS {
        match client.create(path, data, &CreateMode::Ephemeral.with_acls(acls)).await {
            Ok(_) => return Ok(()),
            Err(Error::NoNode) => {
                let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                client.mkdir(parent, &CreateMode::Persistent.with_acls(acls)).await?;
            }
            Err(Error::NodeExists) if is_ours(client, path).await? => return Ok(()),
            Err(Error::NodeExists) => {
                // Left by a session of ours that has not expired yet: it would take the leaf away
                // when it does.
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

async fn is_ours(client: &Client, path: &str) -> Result<bool, Error> {
    let stat = client.check_stat(path).await?;
    Ok(stat.is_some_and(|stat| stat.ephemeral_owner == client.session_id().0))
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

/// Whoever has the password may change what is ours, and everybody may read it.
fn acls(settings: &Zookeeper) -> Acls<'static> {
    static OWN: [Acl; 2] = [
        Acl::new_const(Permission::ALL, "auth", ""),
        Acl::new_const(Permission::READ, "world", "anyone"),
    ];
    if settings.credentials.is_some() { Acls::new(&OWN) } else { Acls::anyone_all() }
}

/// Publications that could not be brought in line are tried again.
const RECONCILE_EVERY: Duration = Duration::from_secs(1);
/// Every so many ticks weir looks whether its leaves are there.
const AUDIT_TICKS: u32 = 5;
/// Changes of one directory that come closer than this are one.
const COALESCE: Duration = Duration::from_millis(20);
const READ_AGAIN: Duration = Duration::from_millis(500);
/// Directories and rivals come and go between two steps; more than this is no accident.
const ENTER_ATTEMPTS: u32 = 5;
