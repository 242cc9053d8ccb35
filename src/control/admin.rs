// SPDX-License-Identifier: Apache-2.0
//! The admin listener: one router, on a Unix socket for commands and, if asked for, on HTTP.
//!
//! Whoever may connect to the Unix socket is root or the user weir runs as; only there can
//! anything be changed. HTTP is read-only.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use tokio::net::unix::SocketAddr as UnixAddr;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::view::{FlowView, Status};
use super::{RunError, Running, exposition};
use crate::config::Admin;
use crate::worker::FlowRow;

/// Opens what was asked for and serves it beside the caller.
pub(super) fn serve(admin: &Admin, running: &Arc<Running>) -> Result<(), RunError> {
    if let Some(path) = &admin.socket {
        let listener = bind(path).map_err(|source| RunError::Admin {
            cure: cure(&source),
            place: path.display().to_string(),
            source,
        })?;
        let router = read_only().route("/drain", post(drain)).with_state(Arc::clone(running));
        tokio::spawn(axum::serve(Guarded(listener), router).into_future());
    }
    if let Some(addr) = admin.http {
        let failed =
            |source| RunError::Admin { cure: cure(&source), place: addr.to_string(), source };
        let listener = std::net::TcpListener::bind(addr).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        let router = read_only().with_state(Arc::clone(running));
        tokio::spawn(axum::serve(listener, router).into_future());
    }
    Ok(())
}

/// Takes the socket's file away; it may be gone already.
pub(super) fn remove(admin: &Admin) {
    if let Some(path) = &admin.socket {
        let _ = std::fs::remove_file(path);
    }
}

fn read_only() -> Router<Arc<Running>> {
    Router::new()
        .route("/flows", get(flows))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
}

/// A socket file that nobody listens on is left over from a weir that was killed: replaced. One
/// that answers belongs to a running weir: refused.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

fn cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => " (is another weir running? `weir status` asks it)",
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
    ([(header::CONTENT_TYPE, exposition::CONTENT_TYPE)], exposition::render(&counters))
}

async fn flows(State(running): State<Arc<Running>>) -> impl IntoResponse {
    let mut views: Vec<FlowView> = Vec::new();
    for worker in &running.workers {
        match rows(worker.flows()).await {
            Some(rows) => views.extend(rows.into_iter().map(FlowView::from)),
            None if worker.is_finished() => {}
            None => return Err((StatusCode::SERVICE_UNAVAILABLE, "a worker did not answer\n")),
        }
    }
    Ok(axum::Json(views))
}

async fn drain(State(running): State<Arc<Running>>) -> &'static str {
    running.ask_to_drain();
    "draining\n"
}

/// Waits for a worker's list without holding up the control thread.
async fn rows(from: std::sync::mpsc::Receiver<Vec<FlowRow>>) -> Option<Vec<FlowRow>> {
    for _ in 0..ROWS_LOOKS_MAX {
        match from.try_recv() {
            Ok(rows) => return Some(rows),
            Err(std::sync::mpsc::TryRecvError::Empty) => tokio::time::sleep(ROWS_LOOK).await,
            Err(std::sync::mpsc::TryRecvError::Disconnected) => return None,
        }
    }
    None
}

/// A worker answers within a turn, far below a millisecond.
const ROWS_LOOK: Duration = Duration::from_millis(1);
/// Two seconds in all.
const ROWS_LOOKS_MAX: u32 = 2000;
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
