// SPDX-License-Identifier: Apache-2.0
//! The ZooKeeper façade as the control thread runs it: for each connection of an application one of its
//! own to the registry, and frames between them that the desk has had a look at.
//!
//! Nothing piles up: a frame is read when the one before it is passed on. When one side ends, so does
//! the other: an application sees its registry's troubles as they are.

#![expect(clippy::disallowed_types, reason = "no worker comes here, and nobody waits inside")]

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{sleep, timeout};

use self::frames::{Frames, write};
use super::takeover::TakingOver;
use super::{RunError, Running};
use crate::config::{self, Takeover};
use crate::takeover::{
    self, Broken, Claim, Desk, Dialogue, Heard, Hello, Names, Turn, claims, dial, expired,
    farewell, is_farewell, is_removed, removal,
};

mod frames;

/// Open and not served yet: whoever connects waits.
pub(super) struct Bound {
    listener: TcpListener,
    names: Names,
    registry: String,
    servers: Vec<String>,
}

/// What every connection needs.
pub(super) struct Facade {
    mark: Option<u32>,
    names: Names,
    /// The registry does not answer, and that has been said.
    is_unreachable: AtomicBool,
    next_server: AtomicUsize,
    /// Why a provider was not entered, as it was last said.
    refused: Mutex<String>,
    registry: String,
    running: Weak<Running>,
    servers: Vec<String>,
    taking_over: TakingOver,
}

/// A connection that belongs to a session.
struct Line<'a> {
    /// Of its session, which connection this is.
    connection: u64,
    dialogue: Mutex<Dialogue>,
    facade: &'a Facade,
    id: i64,
    /// The application has ended its session.
    is_over: AtomicBool,
    /// Some answer has come.
    room: Notify,
    /// As the server wants it.
    timeout: Duration,
    /// By path: what weir itself has asked the registry to take away, in the order of its answers.
    withdrawn: Mutex<VecDeque<String>>,
}

/// Why a connection ends before either side has ended it.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the session has another connection")]
    Replaced,
    #[error("{0} took too long")]
    Slow(&'static str),
    #[error("no server of the registry answers: {0}")]
    Unreachable(io::Error),
}

impl Bound {
    pub(super) fn open(facade: &config::Facade, takeover: &Takeover) -> Result<Bound, RunError> {
        let failed = |source| RunError::Facade { addr: facade.listen, source };
        let listener = std::net::TcpListener::bind(facade.listen).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Bound {
            listener: TcpListener::from_std(listener).map_err(failed)?,
            names: Names::new(takeover, &facade.tree),
            registry: facade.registry.clone(),
            servers: facade.tree.servers.clone(),
        })
    }

    /// Until it is dropped. Nobody is served before every worker accepts: what applications enter is
    /// called at once.
    pub(super) async fn serve(
        self,
        taking_over: TakingOver,
        running: Weak<Running>,
        mark: Option<u32>,
    ) {
        let Bound { listener, names, registry, servers } = self;
        let facade = Arc::new(Facade {
            mark,
            names,
            is_unreachable: AtomicBool::new(false),
            next_server: AtomicUsize::new(0),
            refused: Mutex::default(),
            registry,
            running,
            servers,
            taking_over,
        });
        let accepts = |running: Arc<Running>| running.accepting() == running.workers.len();
        while !facade.running.upgrade().is_some_and(accepts) {
            sleep(LOOK_EVERY).await;
        }
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        // The semaphore is never closed.
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let Ok((client, _)) = listener.accept().await else {
                // No descriptor left, most likely: the workers come first.
                sleep(ACCEPT_AGAIN).await;
                continue;
            };
            let facade = Arc::clone(&facade);
            tokio::spawn(async move {
                let _place = place;
                if let Err(end) = facade.meet(client).await {
                    facade.note(&end);
                }
            });
        }
    }
}

impl Facade {
    /// A connection, from its first word to its end.
    async fn meet(&self, client: TcpStream) -> Result<(), End> {
        client.set_nodelay(true)?;
        let (from_client, mut to_client) = client.into_split();
        let mut from_client = Frames::new(from_client, HELLO_BYTES_MAX);
        let hello = soon(HELLO_WITHIN, "its first word", from_client.next()).await?;
        let Some(hello) = hello else { return Ok(()) };
        let said = takeover::hello(&hello)?;
        self.taking_over.lock().touch_session(said.session);
        let (from_server, mut to_server) = self.dial().await?.into_split();
        let mut from_server = Frames::new(from_server, ANSWER_BYTES_MAX);
        write(&mut to_server, &hello).await?;
        let welcome = soon(WELCOME_WITHIN, "the registry's first word", from_server.next()).await?;
        let Some(welcome) = welcome else { return Ok(()) };
        let found = takeover::welcome(&welcome)?;
        let is_known = said.session == 0 || self.taking_over.lock().knows_session(said.session);
        match (found, is_known) {
            // The server has forgotten it, or the password is another one: time will tell.
            (Hello { timeout_ms: ..=0, .. } | Hello { session: 0, .. }, _) => {
                write(&mut to_client, &welcome).await?;
            }
            (_, false) => {
                self.end_unknown(&mut from_server, &mut to_server).await;
                write(&mut to_client, &expired(&hello)).await?;
            }
            (Hello { session, timeout_ms }, true) => {
                let line = Line::new(self, session, timeout_ms);
                write(&mut to_client, &welcome).await?;
                from_client.allow(REQUEST_BYTES_MAX);
                let result = line.carry((from_client, to_client), (from_server, to_server)).await;
                line.end();
                return result;
            }
        }
        Ok(())
    }

    /// A session of an earlier weir, which has not left behind what its application has entered: it
    /// is ended, so that nothing of it stands in the way when the application begins anew.
    async fn end_unknown(&self, from_server: &mut Frames, to_server: &mut OwnedWriteHalf) {
        let end = async {
            write(to_server, &farewell()).await?;
            from_server.next().await
        };
        // If it does not answer now, it forgets the session in its own time.
        let _ = timeout(WELCOME_WITHIN, end).await;
        self.taking_over.lock().count_expired();
        tracing::info!(
            registry = self.registry,
            "an application came with a session that this weir does not know: it has to begin anew"
        );
    }

    /// The next server that answers.
    async fn dial(&self) -> Result<TcpStream, End> {
        let first = self.next_server.fetch_add(1, Ordering::Relaxed);
        let mut trouble = io::Error::from(io::ErrorKind::NotConnected);
        for index in 0..self.servers.len() {
            let Some(server) = self.servers.get((first + index) % self.servers.len()) else {
                break;
            };
            match timeout(DIAL_WITHIN, self.reach(server)).await {
                Ok(Ok(stream)) => {
                    if self.is_unreachable.swap(false, Ordering::Relaxed) {
                        tracing::info!(registry = self.registry, "answers applications again");
                    }
                    return Ok(stream);
                }
                Ok(Err(error)) => trouble = error,
                Err(_) => trouble = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(End::Unreachable(trouble))
    }

    async fn reach(&self, server: &str) -> io::Result<TcpStream> {
        let stream = dial(server, self.mark).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// What an application or a registry can bring about at will is said once.
    fn note(&self, end: &End) {
        let registry = &self.registry;
        match end {
            End::Unreachable(_) if self.is_unreachable.swap(true, Ordering::Relaxed) => {}
            End::Unreachable(_) => tracing::warn!(registry, "an application asks for it: {end}"),
            _ => tracing::debug!(registry, "a connection through the façade ends: {end}"),
        }
    }

    fn note_refusal(&self, claim: &Claim, why: &impl ToString) {
        let mut said = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let text = format!("the provider at {} is not entered: {}", claim.place, why.to_string());
        if *said != text {
            tracing::warn!(registry = self.registry, "{text}");
            *said = text;
        }
    }
}

impl<'a> Line<'a> {
    fn new(facade: &'a Facade, id: i64, timeout_ms: i32) -> Line<'a> {
        let timeout = Duration::from_millis(u64::try_from(timeout_ms).unwrap_or(0));
        let connection = facade.taking_over.lock().open_session(id, timeout);
        Line {
            connection,
            dialogue: Mutex::default(),
            facade,
            id,
            is_over: AtomicBool::new(false),
            room: Notify::new(),
            timeout,
            withdrawn: Mutex::default(),
        }
    }

    /// Until one side ends.
    async fn carry(
        &self,
        client: (Frames, OwnedWriteHalf),
        server: (Frames, OwnedWriteHalf),
    ) -> Result<(), End> {
        let mut answers = pin!(self.answers(server.0, client.1));
        tokio::select! {
            end = answers.as_mut() => end,
            end = self.requests(client.0, server.1) => {
                end?;
                // It has said all, and may be waiting for the last answers.
                timeout(LAST_ANSWERS_WITHIN, answers).await.unwrap_or(Ok(()))
            }
        }
    }

    async fn requests(&self, mut from: Frames, mut to: OwnedWriteHalf) -> Result<(), End> {
        let mut leaving: watch::Receiver<bool> = self.facade.taking_over.leaving();
        let mut is_told = false;
        loop {
            while lock(&self.dialogue).is_full() {
                self.room.notified().await;
            }
            let frame = tokio::select! {
                frame = from.next() => frame?,
                // A sender that is gone is the end of weir.
                () = async { drop(leaving.wait_for(|leaving| *leaving).await) }, if !is_told => {
                    is_told = true;
                    self.take_away(&mut to).await?;
                    continue;
                }
            };
            let Some(frame) = frame else {
                to.shutdown().await?;
                return Ok(());
            };
            let passed = self.turn(frame).await?;
            write(&mut to, &passed).await?;
        }
    }

    /// A request, as the registry shall hear it; a provider is not entered before it can be called.
    async fn turn(&self, frame: Vec<u8>) -> Result<Vec<u8>, End> {
        let (mut granted, mut port) = (BTreeMap::new(), None);
        for claim in claims(&frame)? {
            let claimed = self.desk()?.claim(self.id, &claim);
            match claimed {
                Ok(real) => {
                    port = Some(claim.port);
                    granted.insert(claim.path, real);
                }
                Err(refusal) => self.facade.note_refusal(&claim, &refusal),
            }
        }
        if let Some(port) = port {
            self.await_application(port).await;
        }
        let desk = self.desk()?;
        if is_farewell(&frame)? {
            self.is_over.store(true, Ordering::Relaxed);
        }
        let real = |path: &str| desk.real(self.id, path);
        let turn = Turn { claims: desk.claims_ever(), granted: &granted, real: &real };
        let passed = lock(&self.dialogue).request(&turn, &frame)?;
        Ok(passed.unwrap_or(frame))
    }

    /// As long as the session has no other connection.
    fn desk(&self) -> Result<MutexGuard<'_, Desk>, End> {
        let desk = self.facade.taking_over.lock();
        if desk.is_session_at(self.id, self.connection) { Ok(desk) } else { Err(End::Replaced) }
    }

    async fn answers(&self, mut from: Frames, mut to: OwnedWriteHalf) -> Result<(), End> {
        while let Some(frame) = from.next().await? {
            if let Some(is_removed) = is_removed(&frame)? {
                let path = lock(&self.withdrawn).pop_front().unwrap_or_default();
                if is_removed {
                    self.facade.taking_over.lock().forget_entered(self.id, &path);
                } else {
                    tracing::warn!(registry = self.facade.registry, "does not remove {path:?}");
                }
                continue;
            }
            let heard = {
                let mut desk = self.facade.taking_over.lock();
                let original = |path: &str| desk.original(self.id, path);
                let heard = lock(&self.dialogue).answer(&self.facade.names, &original, &frame)?;
                desk.note_heard(self.id, &heard);
                heard
            };
            self.room.notify_one();
            if !heard.services.is_empty() {
                self.await_services(&heard).await;
            }
            write(&mut to, heard.frame.as_ref().unwrap_or(&frame)).await?;
        }
        Ok(())
    }

    /// Takes away what the application has entered, in its own session: weir is about to end.
    async fn take_away(&self, to: &mut OwnedWriteHalf) -> Result<(), End> {
        let entered = self.facade.taking_over.lock().entered_by(self.id);
        for path in entered {
            write(to, &removal(&path)).await?;
            lock(&self.withdrawn).push_back(path);
        }
        Ok(())
    }

    /// Until calls from outside reach the application, or it has had its time.
    async fn await_application(&self, port: u16) {
        let app = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let end = Instant::now() + self.patience();
        let changes = self.facade.taking_over.lock().changes_ever();
        let is_there = || self.facade.taking_over.answers(app, self.patience(), self.facade.mark);
        while !is_there().await {
            if Instant::now() >= end {
                tracing::warn!(%app, "an application enters a provider that does not answer there");
                break;
            }
            sleep(LOOK_EVERY).await;
        }
        self.until(end, |desk| desk.changes_reached() >= changes).await;
    }

    /// Until every worker can carry calls to what the application is about to call, or the registry has had
    /// its time.
    async fn await_services(&self, heard: &Heard) {
        let end = Instant::now() + self.patience();
        self.until(end, |desk| desk.has_providers(&heard.services)).await;
        let changes = self.facade.taking_over.lock().changes_ever();
        self.until(end, |desk| desk.changes_reached() >= changes).await;
    }

    async fn until(&self, end: Instant, is_so: impl Fn(&Desk) -> bool) {
        while !is_so(&self.facade.taking_over.lock()) && Instant::now() < end {
            sleep(LOOK_EVERY).await;
        }
    }

    /// How long something may be held without danger to the session.
    fn patience(&self) -> Duration {
        (self.timeout / 4).min(HOLD_MAX)
    }

    /// The connection is over; the session may come back with another one.
    fn end(&self) {
        if let Ok(mut desk) = self.desk() {
            desk.leave_session(self.id, self.connection);
            if self.is_over.load(Ordering::Relaxed) {
                desk.end_session(self.id);
            }
        }
    }
}

async fn soon<T>(
    within: Duration,
    what: &'static str,
    work: impl Future<Output = io::Result<T>>,
) -> Result<T, End> {
    Ok(timeout(within, work).await.map_err(|_| End::Slow(what))??)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An application has one or a few; two descriptors each.
pub(super) const CONNECTIONS_MAX: usize = 128;
const HELLO_BYTES_MAX: usize = 1024;
/// Servers take 1 MiB unless they are told otherwise, and answer with as much as a directory has.
const REQUEST_BYTES_MAX: usize = 4 << 20;
const ANSWER_BYTES_MAX: usize = 16 << 20;
const HELLO_WITHIN: Duration = Duration::from_secs(10);
const WELCOME_WITHIN: Duration = Duration::from_secs(10);
const DIAL_WITHIN: Duration = Duration::from_secs(1);
const LAST_ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// The registry's own word comes within milliseconds; without it calls would fail anyway.
const HOLD_MAX: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(5);
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
