// SPDX-License-Identifier: Apache-2.0
//! A ZooKeeper ensemble as registry: providers are ephemeral leaves, so whoever dies is forgotten
//! when its session ends.
//!
//! Invariants: a directory is read and watched in one step, and always read whole, so no change is
//! missed however events are lost or merged.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};
use zookeeper_client::{
    Acl, Acls, Client, CreateMode, Error, EventType, OneshotWatcher, Permission, SessionState,
    StateWatcher, TlsOptions,
};

use self::followers::Followers;
use super::Provider;
use super::link::{Backend, Link, password_of};
use super::tls::{Unusable, Wrapper};
use super::writer::{Owner, Store, Writer};
use crate::config::{Credentials, Identity, Layout, Tls, Tree};

mod followers;

/// An ensemble.
pub(super) struct Zookeeper(Arc<Tree>);

impl Zookeeper {
    pub(super) fn new(settings: &Tree) -> Zookeeper {
        Zookeeper(Arc::new(settings.clone()))
    }
}

impl Backend for Zookeeper {
    type Failure = Failure;

    async fn session(&mut self, link: &Arc<Link>) -> Result<Infallible, Failure> {
        let client = connect(link, &self.0).await?;
        link.note_session();
        Session::new(link, &self.0, client).serve().await
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("connect to ZooKeeper at {servers}: {source}")]
    Connect { servers: String, source: Error },
    #[error("read the password in {path}: {source}")]
    Password { path: String, source: io::Error },
    #[error("the session at ZooKeeper has ended: {0}")]
    Session(SessionState),
    #[error("TLS to ZooKeeper at {server}: {source} (tls.ca decides who it must be)")]
    Tls { server: String, source: io::Error },
    #[error("TLS to ZooKeeper: {0}")]
    TlsOptions(Error),
    #[error(transparent)]
    Unusable(#[from] Unusable),
}

async fn connect(link: &Link, settings: &Tree) -> Result<Client, Failure> {
    let servers = settings.servers.join(",");
    let mut connector = Client::connector().with_session_timeout(settings.session_timeout);
    if let Some(credentials) = &settings.credentials {
        connector = connector.with_auth("digest", digest(credentials)?.as_bytes());
    }
    let failed = |source| Failure::Connect { servers: servers.clone(), source };
    let Some(tls) = &settings.tls else { return connector.connect(&servers).await.map_err(failed) };
    let wrapper = Wrapper::read(tls)?;
    // The client takes it for granted that they have one.
    settings.servers.iter().try_for_each(|server| wrapper.name_of(server).map(drop))?;
    let options = options(tls).map_err(Failure::TlsOptions)?;
    match connector.with_tls(options).secure_connect(&servers).await {
        Ok(client) => Ok(client),
        Err(error) => Err(why(link, &settings.servers, &wrapper).await.unwrap_or(failed(error))),
    }
}

fn options(tls: &Tls) -> Result<TlsOptions, Error> {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let options = TlsOptions::new().with_pem_ca(&read(&tls.ca))?;
    match &tls.identity {
        None => Ok(options),
        Some(Identity { certificate, key }) => {
            options.with_pem_identity(&read(certificate), &read(key))
        }
    }
}

/// The client does not say why nobody could be reached: perhaps a server is not who it must be.
async fn why(link: &Link, servers: &[String], wrapper: &Wrapper) -> Option<Failure> {
    for server in servers {
        let Ok(Ok(stream)) = timeout(LOOK_WITHIN, link.dial(server)).await else { continue };
        if let Ok(Err(source)) = timeout(LOOK_WITHIN, wrapper.wrap(server, stream)).await {
            return Some(Failure::Tls { server: server.clone(), source });
        }
    }
    None
}

fn digest(credentials: &Credentials) -> Result<String, Failure> {
    let Credentials { password_file, user } = credentials;
    let password = password_of(credentials).map_err(|source| Failure::Password {
        path: password_file.display().to_string(),
        source,
    })?;
    Ok(format!("{user}:{password}"))
}

/// What is done while one session lives.
struct Session<'a> {
    link: &'a Arc<Link>,
    reader: Reader,
    states: StateWatcher,
    followers: Followers,
    writer: Writer<Reader>,
}

/// The ensemble, as one session sees it.
#[derive(Clone)]
struct Reader {
    client: Client,
    link: Arc<Link>,
    settings: Arc<Tree>,
}

impl<'a> Session<'a> {
    fn new(link: &'a Arc<Link>, settings: &'a Arc<Tree>, client: Client) -> Session<'a> {
        let states = client.state_watcher();
        let reader = Reader { client, link: Arc::clone(link), settings: Arc::clone(settings) };
        let writer = Writer::new(Arc::clone(link), reader.clone());
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
        let directory = self.settings.directory(&service);
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
                    let leaves = leaves.iter().map(String::as_str);
                    self.link.note_snapshot(self.settings.snapshot(service, leaves, stat.pzxid));
                    return Ok(watcher);
                }
                Err(Error::NoNode) => {}
                Err(error) => return Err(error),
            }
            let (stat, watcher) = self.client.check_and_watch_stat(directory).await?;
            if stat.is_none() {
                self.link.note_snapshot(self.settings.snapshot(service, [], 0));
                return Ok(watcher);
            }
        }
    }
}

impl Store for Reader {
    type Error = Error;

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

    fn path(&self, service: &str, provider: &Provider) -> String {
        self.settings.path(service, provider)
    }

    async fn owner(&self, path: &str) -> Result<Owner, Error> {
        let stat = self.client.check_stat(path).await?;
        Ok(match stat.map(|stat| stat.ephemeral_owner) {
            None => Owner::Nobody,
            Some(owner) if owner == self.client.session_id().0 => Owner::Us,
            Some(_) => Owner::Other,
        })
    }

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

    /// There is no way to remove a node only if one owns it: who takes it between the two steps writes it
    /// again when it looks.
    async fn remove(&self, path: &str) -> Result<(), Error> {
        if self.owner(path).await? != Owner::Us {
            return Ok(());
        }
        match self.client.delete(path, None).await {
            Err(Error::NoNode) => Ok(()),
            result => result,
        }
    }
}

/// Whoever has the password may change what is ours, and everybody may read it.
fn acls(settings: &Tree) -> Acls<'static> {
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
/// Of a server that takes connections and no session.
const LOOK_WITHIN: Duration = Duration::from_secs(1);
const READ_AGAIN: Duration = Duration::from_millis(500);
/// Directories and rivals come and go between two steps; more than this is no accident.
const ENTER_ATTEMPTS: u32 = 5;
