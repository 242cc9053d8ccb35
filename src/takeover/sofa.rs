// SPDX-License-Identifier: Apache-2.0
//! SOFARegistry as registry: what a session server holds of us, it holds as long as our connection
//! lives.
//!
//! Invariants: everything that is wanted is registered again in each session, under the same ids and
//! with higher versions, so what the server drops with an old connection is never what a new one has
//! registered; any session server will do, and the ones known last are tried when nobody says which
//! there are.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{MissedTickBehavior, interval, timeout};

use self::dialogue::{Dialogue, Said, Trouble, Whoami};
use self::discovery::{Unknown, session_servers};
use self::pushed::Pushed;
use super::link::{Backend, Link, random};
use crate::config::Sofa;

mod dialogue;
mod discovery;
mod frame;
mod message;
mod pushed;
#[cfg(test)]
mod tests;

/// A registry, with what outlives sessions.
pub(super) struct SofaRegistry {
    /// Nobody needs to be asked which session servers there are before the next one is tried.
    is_up_to_date: bool,
    /// Known session servers; the one to try next is the last.
    known: Vec<String>,
    pushed: Pushed,
    settings: Sofa,
    whoami: Whoami,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("the session server {server} has closed the connection")]
    Closed { server: String },
    #[error("connect to the session server {server}: {source}")]
    Connect { server: String, source: io::Error },
    #[error(transparent)]
    Discovery(#[from] Unknown),
    #[error("the connection to the session server {server}: {source}")]
    Io { server: String, source: io::Error },
    #[error("the session server {server}: {source}")]
    Trouble { server: String, source: Trouble },
}

impl SofaRegistry {
    pub(super) fn new(settings: &Sofa) -> SofaRegistry {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let version = i64::try_from(since.as_millis()).unwrap_or(0);
        let whoami = Whoami { client: format!("weir-{:016x}", random()), version };
        let (known, pushed, settings) = (Vec::new(), Pushed::default(), settings.clone());
        SofaRegistry { is_up_to_date: false, known, pushed, settings, whoami }
    }

    /// Until the connection is over.
    async fn serve(
        &mut self,
        link: &Link,
        server: &str,
        mut stream: TcpStream,
    ) -> Result<Infallible, Failure> {
        let failed = |source| Failure::Io { server: server.to_owned(), source };
        let trouble = |source| Failure::Trouble { server: server.to_owned(), source };
        let SofaRegistry { known, pushed, settings, whoami, .. } = self;
        let mut dialogue = Dialogue::new(settings, whoami, pushed, Instant::now());
        dialogue.want(link.wanted(), link.subscribed());
        let (mut input, mut output) = (Vec::new(), Vec::new());
        let (mut reader, mut writer) = stream.split();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut refresh = Box::pin(refreshed(link, settings));
        loop {
            dialogue.ask(Instant::now(), &mut output);
            tokio::select! {
                // A server that does not take what it is owed is not read from.
                read = reader.read_buf(&mut input), if output.len() < OUTPUT_BYTES_MAX => {
                    if read.map_err(failed)? == 0 {
                        return Err(Failure::Closed { server: server.to_owned() });
                    }
                    heed(link, &mut dialogue, &mut input, &mut output).map_err(trouble)?;
                }
                written = writer.write(&output), if !output.is_empty() => {
                    drop(output.drain(..written.map_err(failed)?));
                }
                () = link.asked() => dialogue.want(link.wanted(), link.subscribed()),
                _ = tick.tick() => {
                    let said = dialogue.tick(Instant::now(), &mut output).map_err(trouble)?;
                    said.into_iter().for_each(|said| note(link, said));
                }
                servers = &mut refresh => {
                    know(known, servers);
                    refresh = Box::pin(refreshed(link, settings));
                }
            }
        }
    }
}

impl Backend for SofaRegistry {
    type Failure = Failure;

    async fn session(&mut self, link: &Arc<Link>) -> Result<Infallible, Failure> {
        if !std::mem::take(&mut self.is_up_to_date) {
            match discover(link, &self.settings).await {
                Ok(servers) => know(&mut self.known, servers),
                Err(unknown) if self.known.is_empty() => return Err(unknown.into()),
                // They may well serve although nobody says so.
                Err(unknown) => tracing::debug!(registry = link.name(), "{unknown}"),
            }
        }
        let server = self.known.pop().unwrap_or_default();
        self.known.insert(0, server.clone());
        let failed = |source| Failure::Connect { server: server.clone(), source };
        let connect = timeout(CONNECT_WITHIN, link.dial(&server)).await;
        let stream = connect.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = stream.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        self.is_up_to_date = true;
        link.note_session();
        self.serve(link, &server, stream).await
    }
}

/// These are the servers; those that were there before keep their turn, and new ones are put in at
/// random, so that many weirs do not all go to the same one.
fn know(known: &mut Vec<String>, servers: Vec<String>) {
    known.retain(|server| servers.contains(server));
    for server in servers {
        if !known.contains(&server) {
            let places = known.len() as u64 + 1;
            let at = usize::try_from(random() % places).unwrap_or(0);
            known.insert(at, server);
        }
    }
}

/// Asks one after the other, from a random one on.
async fn discover(link: &Link, settings: &Sofa) -> Result<Vec<String>, Unknown> {
    let first = usize::try_from(random() % settings.servers.len().max(1) as u64).unwrap_or(0);
    let (before, after) = settings.servers.split_at(first);
    let mut trouble = None;
    for server in after.iter().chain(before) {
        match session_servers(link, server).await {
            Ok(servers) => return Ok(servers),
            Err(unknown) => trouble = Some(unknown),
        }
    }
    Err(trouble.unwrap_or(Unknown::None { server: String::new() }))
}

/// Waits until it is time to ask again, and until somebody has answered.
async fn refreshed(link: &Link, settings: &Sofa) -> Vec<String> {
    loop {
        tokio::time::sleep(REFRESH_EVERY).await;
        if let Ok(servers) = discover(link, settings).await {
            return servers;
        }
    }
}

/// Takes every whole frame out of `input`.
fn heed(
    link: &Link,
    dialogue: &mut Dialogue<'_>,
    input: &mut Vec<u8>,
    output: &mut Vec<u8>,
) -> Result<(), Trouble> {
    let mut at = 0;
    while let Some((frame, len)) = frame::read(&input[at..]).map_err(Trouble::Garbled)? {
        at += len;
        if let Some(said) = dialogue.hear(&frame, Instant::now(), output)? {
            note(link, said);
        }
    }
    input.drain(..at);
    Ok(())
}

fn note(link: &Link, said: Said) {
    match said {
        Said::Held(service, provider) => link.note_held(&service, provider.as_ref()),
        Said::Refused(service, why) => {
            link.note_refusal(&format!("registration of {service}"), &why);
        }
        Said::Snapshot(snapshot) => link.note_snapshot(snapshot),
    }
}

const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// As SOFARegistry's own client.
const REFRESH_EVERY: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_secs(1);
/// What may wait for a server to take it.
const OUTPUT_BYTES_MAX: usize = 4 << 20;
