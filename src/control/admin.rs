// SPDX-License-Identifier: Apache-2.0
//! The admin listener: one router, on a Unix socket for commands and, if asked for, on HTTP.
//!
//! Whoever may connect to the Unix socket is root or the user weir runs as; only there can
//! anything be changed. HTTP is read-only.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use tokio::net::unix::SocketAddr as UnixAddr;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::services::{endpoint_views, name_registries, service_views};
use super::serving::{Bounds, serve};
use super::takeover::TakingOver;
use super::view::{EndpointView, FlowView, SourceView, Status};
use super::{RunError, Running, exposition};
use crate::config::Admin;
use crate::service::Table;

/// What was asked for, open and not served yet: whoever asks waits. First of all at a start, so
/// that a second weir stops before it has done anything. Dropping it takes the file away.
pub(super) struct Bound {
    http: Option<TcpListener>,
    path: Option<PathBuf>,
    socket: Option<UnixListener>,
}

impl Bound {
    pub(super) fn open(admin: &Admin) -> Result<Bound, RunError> {
        let mut bound = Bound { http: None, path: None, socket: None };
        if let Some(path) = &admin.socket {
            refuse_second(path)?;
            let failed = |source| refused(path.display().to_string(), source);
            bound.socket = Some(bind(path).map_err(failed)?);
            bound.path = Some(path.clone());
        }
        if let Some(addr) = admin.http {
            let failed = |source| refused(addr.to_string(), source);
            let listener = std::net::TcpListener::bind(addr).map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            bound.http = Some(TcpListener::from_std(listener).map_err(failed)?);
        }
        Ok(bound)
    }

    /// Answers beside the caller.
    pub(super) fn serve(&mut self, running: &Arc<Running>) {
        if let Some(listener) = self.socket.take() {
            let router = read_only().route("/drain", post(drain)).with_state(Arc::clone(running));
            tokio::spawn(axum::serve(Guarded(listener), router).into_future());
        }
        if let Some(listener) = self.http.take() {
            let router = read_only().with_state(Arc::clone(running));
            tokio::spawn(serve(listener, router, Bounds::USUAL));
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It may be gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A socket that answers belongs to a running weir.
fn refuse_second(path: &Path) -> Result<(), RunError> {
    let Ok(other) = std::os::unix::net::UnixStream::connect(path) else { return Ok(()) };
    let peer = nix::sys::socket::getsockopt(&other, nix::sys::socket::sockopt::PeerCredentials);
    let pid = peer.map_or(0, |peer| peer.pid());
    Err(RunError::Second { path: path.to_owned(), pid })
}

fn refused(place: String, source: io::Error) -> RunError {
    RunError::Admin { cure: cure(&source), place, source }
}

/// A socket file that nobody listens on is left over from a weir that was killed: replaced.
/// Anything else that is there is somebody's.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) => {}
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

fn read_only() -> Router<Arc<Running>> {
    Router::new()
        .route("/config", get(config))
        .route("/endpoints", get(endpoints))
        .route("/flows", get(flows))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics))
        .route("/readyz", get(readyz))
        .route("/services", get(services))
        .route("/status", get(status))
}

fn cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AlreadyExists => {
            " (what is there is no socket and stays: give admin.socket another path, or move it away)"
        }
        io::ErrorKind::AddrInUse => " (`ss -ltnp` shows by whom)",
        io::ErrorKind::PermissionDenied => " (choose a place this user may write to)",
        _ => "",
    }
}

/// Lets in only root and our own user.
struct Guarded(UnixListener);

impl axum::serve::Listener for Guarded {
    type Addr = UnixAddr;
    type Io = UnixStream;

    async fn accept(&mut self) -> (UnixStream, UnixAddr) {
        loop {
            match self.0.accept().await {
                Ok((stream, addr)) if is_trusted(&stream) => return (stream, addr),
                Ok(_) => {} // Dropped: the other end sees the connection close.
                // No descriptor left, most likely: the workers come first.
                Err(_) => tokio::time::sleep(ACCEPT_AGAIN).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<UnixAddr> {
        self.0.local_addr()
    }
}

fn is_trusted(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

async fn config(State(running): State<Arc<Running>>) -> impl IntoResponse {
    axum::Json(running.in_force.borrow().shown.clone())
}

async fn status(State(running): State<Arc<Running>>) -> impl IntoResponse {
    let flows = running.workers.iter().map(|worker| worker.counters().flows_active.value()).sum();
    axum::Json(Status {
        accepting: running.accepting(),
        draining: running.is_draining(),
        flows,
        pid: std::process::id(),
        profile: running.profile.name.clone(),
        ready: running.is_ready(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        workers: running.workers.len(),
    })
}

async fn readyz(State(running): State<Arc<Running>>) -> impl IntoResponse {
    if running.is_ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

async fn metrics(State(running): State<Arc<Running>>) -> impl IntoResponse {
    let counters: Vec<_> = running.workers.iter().map(|worker| worker.counters()).collect();
    let fallbacks = running.workers.iter().flat_map(|worker| worker.features().fallbacks());
    let extra = exposition::Extra {
        counted: running.counted.counts(),
        facade: running.taking_over.as_ref().and_then(TakingOver::facade_row),
        fallbacks: fallbacks.chain(running.fallback).collect(),
        losses: running.records.borrow().losses(),
        registries: running.taking_over.as_ref().map(TakingOver::rows).unwrap_or_default(),
        rules_lost: running.rules_lost.counts(),
    };
    ([(header::CONTENT_TYPE, exposition::CONTENT_TYPE)], exposition::render(&counters, extra))
}

async fn endpoints(State(running): State<Arc<Running>>) -> impl IntoResponse {
    let (table, mut endpoints) = endpoint_list(&running).await.ok_or(SILENT)?;
    if let Some(taking_over) = &running.taking_over {
        name_registries(&table, &mut endpoints, taking_over);
    }
    Ok::<_, Refusal>(axum::Json(endpoints))
}

async fn services(State(running): State<Arc<Running>>) -> impl IntoResponse {
    let (table, endpoints) = endpoint_list(&running).await.ok_or(SILENT)?;
    let mut services = service_views(&table, &endpoints);
    if let Some(taking_over) = &running.taking_over {
        for (service, view) in table.services().zip(&mut services) {
            let sources = taking_over.sources(&service.name);
            view.sources = sources.into_iter().map(SourceView::from).collect();
        }
    }
    Ok::<_, Refusal>(axum::Json(services))
}

/// The endpoints of the table that the workers go by, and that table.
async fn endpoint_list(running: &Running) -> Option<(Arc<Table>, Vec<EndpointView>)> {
    let table = running.services.tell(&running.workers);
    let mut tallies = Vec::with_capacity(running.workers.len());
    for worker in &running.workers {
        match list(worker.endpoints()).await {
            Some(list) => tallies.push(list),
            None if worker.is_finished() => {}
            None => return None,
        }
    }
    let views = endpoint_views(&table, &tallies);
    Some((table, views))
}

async fn flows(State(running): State<Arc<Running>>) -> impl IntoResponse {
    // A list of a million flows is large: one at a time.
    let _turn = LISTING.acquire().await;
    let mut views: Vec<FlowView> = Vec::new();
    for worker in &running.workers {
        match list(worker.flows()).await {
            Some(rows) => views.extend(rows.into_iter().map(FlowView::from)),
            None if worker.is_finished() => {}
            None => return Err(SILENT),
        }
    }
    Ok(axum::Json(views))
}

async fn drain(State(running): State<Arc<Running>>) -> &'static str {
    running.ask_to_drain();
    "draining\n"
}

/// Waits for a worker's list without holding up the control thread.
async fn list<T>(from: std::sync::mpsc::Receiver<Vec<T>>) -> Option<Vec<T>> {
    for _ in 0..ROWS_LOOKS_MAX {
        match from.try_recv() {
            Ok(rows) => return Some(rows),
            Err(std::sync::mpsc::TryRecvError::Empty) => tokio::time::sleep(ROWS_LOOK).await,
            Err(std::sync::mpsc::TryRecvError::Disconnected) => return None,
        }
    }
    None
}

type Refusal = (StatusCode, &'static str);

const SILENT: Refusal = (StatusCode::SERVICE_UNAVAILABLE, "a worker did not answer\n");
static LISTING: Semaphore = Semaphore::const_new(1);
/// A worker answers within a turn, far below a millisecond.
const ROWS_LOOK: Duration = Duration::from_millis(1);
/// Two seconds in all.
const ROWS_LOOKS_MAX: u32 = 2000;
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
