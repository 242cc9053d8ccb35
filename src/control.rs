// SPDX-License-Identifier: Apache-2.0
//! The control thread: starts everything, answers questions, and ends everything in order.
//!
//! It runs beside the workers and never makes one wait: it reads their counters and drops letters
//! into their mailboxes. Order of start: listeners, workers, admin, then ready; the end is the
//! reverse.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};

use crate::bpf::sockmap::SockmapError;
use crate::capture::{CaptureError, OWN_MARK};
use crate::config::{Config, OnChange};
use crate::profile::Profile;
use crate::ring::Fallback;
use crate::sys::socket::ListenError;
use crate::worker::{Handle, WorkerError};

use capturing::{Capturing, RulesLost};
use looped::Looped;
use reload::Reloader;
use rescue::Rescue;
use services::Services;
use takeover::TakingOver;

mod admin;
mod capturing;
pub mod check;
mod checks;
pub mod client;
mod descriptors;
mod exposition;
mod facade;
mod forwarding;
mod listeners;
mod looped;
mod places;
mod registries;
mod reload;
mod rescue;
mod routes;
pub mod rules;
mod services;
mod serving;
pub mod shown;
mod start;
mod takeover;
mod tracking;
pub mod view;

/// Why weir did not start or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The admin listener.
    #[error("admin listener {place}: {source}{cure}")]
    Admin {
        /// What to do about it.
        cure: &'static str,
        /// Socket path or address.
        place: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Traffic cannot be captured here.
    #[error("capture: {0}")]
    Capture(#[from] CaptureError),
    /// More descriptors are needed than there can be.
    #[error(
        "limits.flows_max {flows_max} on {workers} workers needs RLIMIT_NOFILE of at least \
         {needed}, and it is {limit} (raise it with `ulimit -n` or LimitNOFILE=, or lower \
         limits.flows_max in the profile)"
    )]
    Descriptors {
        /// In the profile.
        flows_max: u32,
        /// Of this process.
        limit: u64,
        /// Two for each flow of one worker.
        needed: u64,
        /// How many.
        workers: usize,
    },
    /// SIGINT.
    #[error("interrupted")]
    Interrupted,
    /// A listener.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A listener would dial itself.
    #[error("forward {name}: endpoint {endpoint} is a port of this weir: it would loop")]
    Loop {
        /// What it would dial.
        endpoint: SocketAddr,
        /// Of the listener.
        name: String,
    },
    /// Where a workload lives.
    #[error(
        "workload {name}: enter the network namespace {}: {source} (does it exist? needs \
         CAP_SYS_ADMIN)",
        path.display()
    )]
    Namespace {
        /// Of the workload.
        name: String,
        /// The namespace's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The ring cannot bind.
    #[error(
        "inbound.source keep needs to bind sockets in the ring, which this kernel cannot do (Linux \
         6.11 or newer, or `source: own`)"
    )]
    NoBind,
    /// A listener cannot be had before another one of ours is gone.
    #[error(
        "workload `{name}`: weir listens on {listen} for what it captures by another means, until the          reload is done (give it another `listen`, or take the old one out by one reload and bring          the new one in by the next)"
    )]
    Overlap {
        /// What is wanted.
        listen: SocketAddr,
        /// Of the workload; empty for what stands at the top of the file.
        name: String,
    },
    /// The kernel cannot splice, or may not.
    #[error(
        "relay splice needs splice(2) and descriptors lent by the ring, which this kernel lacks or \
         a seccomp filter forbids (Linux 6.8 or newer, or relay copy or auto)"
    )]
    NoSplice,
    /// Spliced flows and pipes need more descriptors than there can be.
    #[error(
        "relay splice needs RLIMIT_NOFILE of at least {needed}, and it is {limit}: two for each of \
         limits.spliced_flows_max and limits.pipes_max (raise it with `ulimit -n` or LimitNOFILE=, \
         lower these two in the profile, or take relay auto)"
    )]
    SpliceDescriptors {
        /// Of this process.
        limit: u64,
        /// For everything.
        needed: u64,
    },
    /// One is enough.
    #[error(
        "weir runs already: process {pid} answers at {} (stop it, or give this one an \
         admin.socket of its own)",
        path.display()
    )]
    Second {
        /// The admin socket.
        path: PathBuf,
        /// Of the one that runs.
        pid: i32,
    },
    /// The control thread's own runtime.
    #[error("start the control thread: {0}")]
    Runtime(io::Error),
    /// The kernel does not forward, or not as it must.
    #[error("relay {0}; or use relay auto or copy")]
    Sockmap(SockmapError),
    /// The façade of takeover.
    #[error("listen on takeover.facade {addr}: {source} (`ss -ltnp` shows who is there)")]
    Facade {
        /// Where.
        addr: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The application API of takeover.
    #[error("listen on takeover.api {addr}: {source} (`ss -ltnp` shows who is there)")]
    TakeoverApi {
        /// Where.
        addr: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// A worker failed while it ran.
    #[error("a worker stopped: {0}")]
    Stopped(WorkerError),
    /// A worker could not be started.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

impl RunError {
    /// It could not start, and nothing was changed.
    #[must_use]
    pub const fn is_preflight(&self) -> bool {
        !matches!(self, RunError::Interrupted | RunError::Stopped(_))
    }
}

/// A running weir, as the admin listener sees it.
#[derive(Debug)]
struct Running {
    /// Something shall be captured.
    captures: bool,
    /// It is being captured just now.
    capturing: AtomicBool,
    /// By the rules of the capture.
    counted: tracking::Counted,
    draining: AtomicBool,
    /// The sockmap relay was to be used where it serves, and cannot be.
    fallback: Option<Fallback>,
    in_force: watch::Sender<InForce>,
    /// Rung when somebody asks to drain.
    bell: Notify,
    on_change: OnChange,
    profile: Arc<Profile>,
    /// Of the connect hooks.
    records: watch::Sender<capturing::Recorded>,
    /// What others did to the capture.
    rules_lost: RulesLost,
    services: Arc<Services>,
    /// If the config wants it.
    taking_over: Option<TakingOver>,
    workers: Vec<Handle>,
}

/// What a reload can change.
#[derive(Debug)]
struct InForce {
    /// How long a drain may take.
    drain: Duration,
    /// The config, as `/config` shows it.
    shown: serde_json::Value,
}

impl InForce {
    fn of(config: &Config) -> InForce {
        InForce { drain: config.profile.timeouts.drain, shown: shown::config(config) }
    }
}

/// Runs until drained by a signal or by command. SIGHUP reads `file` again.
///
/// # Errors
///
/// It cannot start (nothing was changed), or a worker failed.
pub fn run(config: Config, file: Option<&Path>) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RunError::Runtime)?;
    let (running, interrupted) = runtime.block_on(serve(config, file))?;
    // Its tasks hold the workers too, those of connections that are open just now among them.
    runtime.shutdown_timeout(TASKS_END_WITHIN);
    let result = finish(running, interrupted);
    tracing::info!("weir ends");
    result
}

/// Until the end, and whether somebody was in a hurry.
async fn serve(mut config: Config, file: Option<&Path>) -> Result<(Arc<Running>, bool), RunError> {
    // First of all: a signal that comes while starting shall not kill half a weir.
    let mut signals = Signals::listen().map_err(RunError::Runtime)?;
    let mut admin = admin::Bound::open(&config.admin)?;
    start::fit_timers(&mut config, places::Place::all)?;
    let prepared = start::prepare(&config)?;
    let api = takeover::Bound::open(&config)?;
    let running = Arc::new(start::start(&config, &prepared)?);
    admin.serve(&running);
    let mark = running.captures.then_some(OWN_MARK);
    let checks = tokio::spawn(checks::run(Arc::clone(&running.services), mark));
    if let (Some(taking_over), Some(api)) = (&running.taking_over, api) {
        taking_over.serve(api, &running, mark);
    }
    let home = start::home(&prepared)?;
    // Last of all: what is taken now must be served.
    let capturing = running.captures.then(|| Capturing::install(prepared, &running));
    let mut capturing = capturing.transpose()?;
    for (index, worker) in running.workers.iter().enumerate() {
        for Fallback { from, since, to } in worker.features().fallbacks() {
            let text = "this kernel lacks a better way";
            tracing::warn!(worker = index, from, to, linux = since, "{text}");
        }
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        workers = running.workers.len(),
        profile = %running.profile.name,
        "weir forwards"
    );
    // systemd may not be there; then there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let reloader = Reloader::new(config, file, home);
    let interrupted = running.until_over(&mut signals, reloader, capturing.as_mut()).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    checks.abort();
    if let Some(capturing) = capturing.as_ref().filter(|_| !interrupted) {
        tokio::select! {
            () = capturing.last_acks() => {}
            () = signals.stop() => {} // Somebody is in a hurry.
        }
    }
    drop(capturing);
    drop(admin);
    Ok((running, interrupted))
}

/// Waits for the workers' threads, unless somebody is in a hurry.
fn finish(running: Arc<Running>, interrupted: bool) -> Result<(), RunError> {
    if interrupted {
        return Err(RunError::Interrupted);
    }
    let Some(running) = Arc::into_inner(running) else { return Ok(()) };
    running.workers.into_iter().try_for_each(Handle::join).map_err(RunError::Stopped)
}

impl Running {
    /// True if a second signal cut the drain short with SIGINT.
    async fn until_over(
        &self,
        signals: &mut Signals,
        mut reloader: Reloader,
        mut capturing: Option<&mut Capturing>,
    ) -> bool {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        let mut told = false;
        let mut drain: Option<Drain> = None;
        let mut looped = Looped::new();
        let mut rescue = Rescue::new(self.workers.len());
        let withdrawn = Notify::new();
        let withdraw = async {
            self.bell.notified().await;
            // Before the listeners close, so that nobody is sent to a closed one.
            if let Some(taking_over) = self.taking_over.clone() {
                taking_over.withdraw().await;
            }
            withdrawn.notify_one();
            std::future::pending::<()>().await;
        };
        let mut withdraw = std::pin::pin!(withdraw);
        loop {
            tokio::select! {
                () = &mut withdraw => {}
                asked = signals.next() => match asked {
                    Asked::Reload if self.is_draining() => {
                        tracing::warn!("SIGHUP: weir drains; the config stays");
                    }
                    Asked::Reload => reloader.reload(self, capturing.as_deref_mut()),
                    Asked::Stop { by_user } if self.is_draining() => {
                        drain = Some(self.drain(Duration::ZERO));
                        if by_user {
                            return true;
                        }
                    }
                    Asked::Stop { .. } => self.ask_to_drain(),
                },
                () = withdrawn.notified(), if !told => {
                    told = true;
                    self.stop_taking(capturing.as_deref_mut()).await;
                    let within = self.in_force.borrow().drain;
                    // Who was in a hurry still is.
                    drain.get_or_insert_with(|| self.drain(within));
                }
                _ = tick.tick() => {
                    self.services.tell(&self.workers);
                    looped.say(&self.workers);
                    rescue.look(&self.workers);
                    if self.workers.iter().any(Handle::is_finished) && !self.is_draining() {
                        self.ask_to_drain(); // One worker has failed: end the others.
                        drain = Some(self.drain(Duration::ZERO));
                    }
                    drain.iter_mut().for_each(|drain| drain.tell(&self.workers));
                    if let Some(capturing) = capturing.as_mut().filter(|_| !told) {
                        capturing.watch(self, reloader.config());
                    }
                    if self.workers.iter().all(Handle::is_finished) {
                        return false;
                    }
                }
            }
        }
    }

    /// No more connections are taken; those that were taken already get through the door.
    async fn stop_taking(&self, capturing: Option<&mut Capturing>) {
        if let Some(capturing) = capturing {
            capturing.stop(self);
            tokio::time::sleep(QUEUES_EMPTY).await;
        }
    }

    /// The control thread drains when it hears the bell.
    fn ask_to_drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.bell.notify_one();
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn drain(&self, within: Duration) -> Drain {
        tracing::info!(within_ms = within.as_millis(), "drain");
        let mut drain = Drain::new(self.workers.len(), within);
        drain.tell(&self.workers);
        drain
    }

    fn accepting(&self) -> usize {
        self.workers.iter().filter(|worker| worker.is_accepting()).count()
    }

    fn is_ready(&self) -> bool {
        let captured = !self.captures || self.capturing.load(Ordering::Acquire);
        !self.is_draining() && captured && self.accepting() == self.workers.len()
    }
}

/// A drain, and the workers that could not be told of it yet: their mailboxes were full.
struct Drain {
    until: Instant,
    untold: Vec<usize>,
}

impl Drain {
    fn new(workers: usize, within: Duration) -> Drain {
        Drain { until: Instant::now() + within, untold: (0..workers).collect() }
    }

    fn tell(&mut self, workers: &[Handle]) {
        self.tell_by(|index, within| {
            workers.get(index).is_none_or(|worker| worker.is_finished() || worker.drain(within))
        });
    }

    /// By a way to send that says whether it did.
    fn tell_by(&mut self, send: impl Fn(usize, Duration) -> bool) {
        let within = self.until.saturating_duration_since(Instant::now());
        self.untold.retain(|index| !send(*index, within));
    }
}

enum Asked {
    Reload,
    Stop { by_user: bool },
}

struct Signals {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Signals> {
        Ok(Signals {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.hangup.recv() => Asked::Reload,
            _ = self.interrupt.recv() => Asked::Stop { by_user: true },
            _ = self.terminate.recv() => Asked::Stop { by_user: false },
        }
    }

    /// The next one that asks for the end.
    async fn stop(&mut self) {
        while matches!(self.next().await, Asked::Reload) {
            tracing::warn!("SIGHUP: weir ends; the config stays");
        }
    }
}

/// How long workers need to accept what waits in their queues; they need far less.
const QUEUES_EMPTY: Duration = Duration::from_millis(50);
/// A task that is stuck in a system call, as on a disk that does not answer, is left alone.
const TASKS_END_WITHIN: Duration = Duration::from_secs(1);
/// How often the control thread looks whether the workers still run.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn drain_is_told_again_to_those_whose_mailbox_was_full() {
        let mut drain = Drain::new(3, Duration::from_secs(60));
        let told = RefCell::new(Vec::new());
        let send = |is_full: bool| {
            let told = &told;
            move |index: usize, within: Duration| {
                assert!(within <= Duration::from_secs(60) && within > Duration::from_secs(50));
                told.borrow_mut().push(index);
                !(is_full && index == 1)
            }
        };
        drain.tell_by(send(true));
        drain.tell_by(send(true));
        drain.tell_by(send(false));
        drain.tell_by(send(false));
        assert_eq!(*told.borrow(), [0, 1, 2, 1, 1]);
    }
}
