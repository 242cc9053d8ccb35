// SPDX-License-Identifier: Apache-2.0
//! etcd as registry: a provider is a key that lives as long as our lease, so whoever dies is forgotten
//! when it ends.
//!
//! Invariants: a prefix is read whole and watched from the revision after that, so no change is missed
//! however a watch ends; what one session knows, the next one reads anew, because a revision of a
//! server that was wiped means nothing; a key is put with the lease of this session, so an earlier
//! lease that ends does not take it away.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use self::gateway::{Failure, Gateway, Watch, Why, decoded, encoded, number};
use super::Provider;
use super::link::{Backend, Life, Link, password_of};
use super::tls::{Unusable, Wrapper};
use super::writer::{Owner, Store, Writer};
use crate::config::{Credentials, Tree};

mod gateway;

/// A cluster.
pub(super) struct Etcd(Arc<Tree>);

impl Etcd {
    pub(super) fn new(settings: &Tree) -> Etcd {
        Etcd(Arc::new(settings.clone()))
    }
}

impl Backend for Etcd {
    type Failure = Trouble;

    async fn session(&mut self, link: &Arc<Link>) -> Result<Infallible, Trouble> {
        let Etcd(settings) = self;
        let (gateway, lease) = open(link, settings).await?;
        link.note_session();
        let keeper = keep_alive(gateway.twin(), lease.clone());
        let mut session = Session::new(link, settings, gateway, lease);
        tokio::select! {
            ended = keeper => Ok(ended?),
            ended = session.serve() => Ok(ended?),
        }
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error(transparent)]
    Call(#[from] Failure),
    #[error("read the password in {path}: {source}")]
    Password { path: String, source: io::Error },
    #[error(transparent)]
    Tls(#[from] Unusable),
}

/// A lease, and how long the cluster grants it without a word.
#[derive(Clone, Debug)]
struct Lease {
    id: String,
    ttl: Duration,
}

/// At the first server that grants a lease.
async fn open(link: &Arc<Link>, settings: &Tree) -> Result<(Gateway, Lease), Trouble> {
    let password = settings.credentials.as_ref().map(password).transpose()?;
    let tls = settings.tls.as_ref().map(Wrapper::read).transpose()?;
    let mut opened = Err(Gateway::new(link, "", None).failure("connect", Why::Ended));
    for server in &settings.servers {
        let gateway = Gateway::new(link, server, tls.clone());
        opened = open_at(gateway, settings, password.as_ref()).await;
        if opened.is_ok() {
            break;
        }
    }
    Ok(opened?)
}

async fn open_at(
    mut gateway: Gateway,
    settings: &Tree,
    password: Option<&(&str, String)>,
) -> Result<(Gateway, Lease), Failure> {
    const STEP: &str = "lease/grant";
    if let Some((user, password)) = password {
        gateway.log_in(user, password).await?;
    }
    let ttl = settings.session_timeout.as_millis().div_ceil(1000);
    let granted = gateway.call(STEP, &json!({ "TTL": ttl.to_string() })).await?;
    let id = granted["ID"].as_str().map(str::to_owned);
    let id = id.ok_or_else(|| gateway.failure(STEP, Why::Unreadable))?;
    // The cluster may grant more than was asked for.
    let ttl = Duration::from_secs(u64::try_from(number(&granted["TTL"])).unwrap_or(0).max(1));
    Ok((gateway, Lease { id, ttl }))
}

fn password(credentials: &Credentials) -> Result<(&str, String), Trouble> {
    let password = password_of(credentials).map_err(|source| Trouble::Password {
        path: credentials.password_file.display().to_string(),
        source,
    })?;
    Ok((&credentials.user, password))
}

/// Until the lease has ended. The answer says how long it lives: of a dead one it says nothing.
async fn keep_alive(gateway: Gateway, lease: Lease) -> Result<Infallible, Failure> {
    const STEP: &str = "lease/keepalive";
    loop {
        sleep(lease.ttl / 3).await;
        let answer = gateway.call(STEP, &json!({ "ID": lease.id })).await?;
        if number(&answer["TTL"]) <= 0 {
            return Err(gateway.failure(STEP, Why::Lease));
        }
    }
}

/// What is done while one lease lives.
struct Session<'a> {
    /// Services whose prefix has changed, to be read when this has come.
    dirty: Option<(Instant, BTreeSet<String>)>,
    gateway: Arc<Gateway>,
    /// By service: for which life of its subscription it was read, and as of which revision.
    known: BTreeMap<String, (Life, i64)>,
    link: &'a Arc<Link>,
    settings: &'a Arc<Tree>,
    /// Services that may not be read, as far as was said.
    unreadable: BTreeSet<String>,
    /// In the order of their ids: whom the watch follows.
    watched: Vec<String>,
    watch: Option<Watch>,
    writer: Writer<Keys>,
}

/// The cluster, as one session sees it.
struct Keys {
    gateway: Arc<Gateway>,
    lease: String,
    settings: Arc<Tree>,
}

impl<'a> Session<'a> {
    fn new(
        link: &'a Arc<Link>,
        settings: &'a Arc<Tree>,
        gateway: Gateway,
        lease: Lease,
    ) -> Session<'a> {
        let gateway = Arc::new(gateway);
        let keys =
            Keys { gateway: Arc::clone(&gateway), lease: lease.id, settings: Arc::clone(settings) };
        Session {
            dirty: None,
            gateway,
            known: BTreeMap::new(),
            link,
            settings,
            unreadable: BTreeSet::new(),
            watch: None,
            watched: Vec::new(),
            writer: Writer::new(Arc::clone(link), keys),
        }
    }

    /// Until the session is over.
    async fn serve(&mut self) -> Result<Infallible, Failure> {
        let mut tick = interval(RECONCILE_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut ticks, mut is_due) = (0, true);
        loop {
            if is_due {
                let audit = ticks >= AUDIT_TICKS;
                self.follow(audit).await?;
                self.writer.reconcile(audit).await?;
                ticks = if audit { 0 } else { ticks };
            }
            is_due = false;
            let read_at = self.dirty.as_ref().map(|(at, _)| *at);
            tokio::select! {
                said = next(&mut self.watch) => is_due = self.note(&said?)?,
                () = sleep_until(read_at.unwrap_or_else(Instant::now)), if read_at.is_some() => {
                    self.read_dirty().await?;
                }
                () = self.link.asked() => is_due = true,
                _ = tick.tick() => (ticks, is_due) = (ticks + 1, true),
            }
        }
    }

    /// Follows the prefixes of what is wanted, and no others.
    async fn follow(&mut self, audit: bool) -> Result<(), Failure> {
        let wanted = self.link.subscribed();
        let count = self.known.len();
        self.known.retain(|service, (life, _)| wanted.get(service) == Some(life));
        let mut is_news = self.known.len() != count;
        for (service, life) in wanted {
            if self.known.contains_key(&service) || (self.unreadable.contains(&service) && !audit) {
                continue;
            }
            if let Some(revision) = self.read(&service).await? {
                self.known.insert(service, (life, revision));
                is_news = true;
            }
        }
        if is_news {
            self.begin_watch().await?;
        }
        Ok(())
    }

    /// One watch for all of them, each from where it was read.
    async fn begin_watch(&mut self) -> Result<(), Failure> {
        self.watch = None;
        self.watched = self.known.keys().cloned().collect();
        let mut watches = Vec::with_capacity(self.known.len());
        for (id, (service, (_, revision))) in (1..).zip(&self.known) {
            let mut range = prefix(self.settings, service);
            range["watch_id"] = Value::from(id);
            range["start_revision"] = (revision + 1).to_string().into();
            watches.push(range);
        }
        if !watches.is_empty() {
            self.watch = Some(self.gateway.watch(&watches).await?);
        }
        Ok(())
    }

    /// Something has changed; what, is read afterwards, once for changes that come together. True if the
    /// watch has lost something: it was compacted away.
    fn note(&mut self, said: &Value) -> Result<bool, Failure> {
        let index = usize::try_from(number(&said["watch_id"]) - 1).ok();
        let service = index.and_then(|index| self.watched.get(index));
        let Some(service) = service else { return Ok(false) };
        if said["canceled"] == true {
            self.known.remove(service);
            return Ok(true);
        }
        // Of a future revision a watch never says anything.
        let read = self.known.get(service).map_or(0, |(_, revision)| *revision);
        if said["created"] == true && number(&said["header"]["revision"]) < read {
            return Err(self.gateway.failure("watch", Why::Wiped));
        }
        if said["events"].as_array().is_some_and(|events| !events.is_empty()) {
            let at = Instant::now() + COALESCE;
            self.dirty.get_or_insert((at, BTreeSet::new())).1.insert(service.clone());
        }
        Ok(false)
    }

    async fn read_dirty(&mut self) -> Result<(), Failure> {
        let (_, services) = self.dirty.take().unwrap_or((Instant::now(), BTreeSet::new()));
        for service in services {
            // Who is followed no more needs no reading.
            if self.known.contains_key(&service) {
                let read = self.read(&service).await?;
                if let Some((known, read)) = self.known.get_mut(&service).zip(read) {
                    known.1 = read;
                }
            }
        }
        Ok(())
    }

    /// Says what stands below a prefix, and the revision as of which it does; `None` if it may not be read.
    async fn read(&mut self, service: &str) -> Result<Option<i64>, Failure> {
        let mut range = prefix(self.settings, service);
        range["keys_only"] = true.into();
        let answer = match self.gateway.call("kv/range", &range).await {
            Ok(answer) => answer,
            Err(failure) if Keys::is_of_session(&failure) => return Err(failure),
            Err(failure) => {
                if self.unreadable.insert(service.to_owned()) {
                    self.link.note_refusal(&format!("read {service}"), &failure);
                }
                return Ok(None);
            }
        };
        self.unreadable.remove(service);
        let directory = format!("{}/", self.settings.directory(service));
        let kvs = answer["kvs"].as_array();
        let keys: Vec<String> =
            kvs.into_iter().flatten().filter_map(|kv| decoded(&kv["key"])).collect();
        let leaves = keys.iter().filter_map(|key| key.strip_prefix(&directory));
        let revision = number(&answer["header"]["revision"]);
        self.link.note_snapshot(self.settings.snapshot(service, leaves, revision));
        Ok(Some(revision))
    }
}

impl Store for Keys {
    type Error = Failure;

    fn is_of_session(error: &Failure) -> bool {
        !matches!(&error.why, Why::Said { code, .. } if REFUSALS.contains(code))
    }

    fn path(&self, service: &str, provider: &Provider) -> String {
        self.settings.path(service, provider)
    }

    async fn owner(&self, path: &str) -> Result<Owner, Failure> {
        let range = json!({ "key": encoded(path), "keys_only": true });
        let answer = self.gateway.call("kv/range", &range).await?;
        Ok(match answer["kvs"].get(0) {
            None => Owner::Nobody,
            Some(kv) if kv["lease"] == *self.lease => Owner::Us,
            Some(_) => Owner::Other,
        })
    }

    async fn enter(&self, path: &str, provider: &Provider) -> Result<(), Failure> {
        let value = encoded(&provider.endpoint.addr.to_string());
        let put = json!({ "key": encoded(path), "value": value, "lease": self.lease });
        self.gateway.call("kv/put", &put).await.map(drop)
    }

    async fn remove(&self, path: &str) -> Result<(), Failure> {
        let key = encoded(path);
        let ours = json!({ "key": key, "target": "LEASE", "result": "EQUAL", "lease": self.lease });
        let delete = json!({ "request_delete_range": { "key": key } });
        let both = json!({ "compare": [ours], "success": [delete] });
        self.gateway.call("kv/txn", &both).await.map(drop)
    }
}

async fn next(watch: &mut Option<Watch>) -> Result<Value, Failure> {
    match watch {
        None => std::future::pending().await,
        Some(watch) => watch.next().await,
    }
}

/// All keys of a directory: its slash is followed by `0`.
fn prefix(settings: &Tree, service: &str) -> Value {
    let directory = settings.directory(service);
    let (begin, end) = (encoded(&format!("{directory}/")), encoded(&format!("{directory}0")));
    json!({ "key": begin, "range_end": end })
}

/// Codes of gRPC that are about one key: invalid argument, permission denied, resource exhausted.
const REFUSALS: [u64; 3] = [3, 7, 8];
/// Publications that could not be brought in line are tried again.
const RECONCILE_EVERY: Duration = Duration::from_secs(1);
/// Every so many ticks weir looks whether its keys are there.
const AUDIT_TICKS: u32 = 5;
/// Changes that come closer than this are one.
const COALESCE: Duration = Duration::from_millis(20);
