// SPDX-License-Identifier: Apache-2.0
//! The connect hook: eBPF programs that lead a workload's TCP connects to us. The sockmap relay is
//! in `sockmap`.
//!
//! `load` asks the kernel's verifier, `attach` begins to take traffic. Programs hang on links that
//! only this process holds: the kernel detaches them when we are gone. For `on_exit: closed` those
//! that redirect are pinned, stay, and refuse. They stack with other people's programs.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::maps::{Array, Map, MapData, MapError};
use aya::programs::{CgroupSockAddr, ProgramError, SockOps};
use aya::{Ebpf, EbpfError, EbpfLoader};

use crate::sys::cgroup::{self, CgroupError};
use crate::sys::netns;
use crate::sys::process;
use crate::sys::socket::netns_cookie;

use attached::Attached;
use control::{Control, Mode, Pulse};
use filters::FilterMaps;
use links::Place;
use pins::Pins;

pub use filters::Filters;
pub use neighbours::{Neighbour, neighbours};
pub use pins::{PinError, Pinned, tidy};
pub use records::{Losses, Records};

pub mod sockmap;

mod attached;
mod control;
mod filters;
mod links;
mod neighbours;
mod pins;
mod records;

/// What to take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HookPlan {
    /// Whose connects; relative to the cgroup v2 mount, at least one.
    pub cgroups: Vec<PathBuf>,
    /// Connects are refused when we are gone, and not only while we drain.
    pub closed: bool,
    /// Which of their connects; none if it takes no more.
    pub filters: Filters,
    /// Sockets with this mark, under the mask that follows, are ours.
    pub own_mark: u32,
    /// See `own_mark`.
    pub own_mark_mask: u32,
    /// Where connects are led to, on 127.0.0.1 and ::1.
    pub port: u16,
    /// Connections that may wait to be accepted; more are reset, never misled.
    pub records_max: u32,
}

/// Loaded programs, attached or not. Dropping it detaches them, unless the plan says `closed`.
pub struct ConnectHook {
    attached: Vec<Attached>,
    bpf: Ebpf,
    closed: bool,
    control: Arc<Control>,
    filters: FilterMaps,
    namespace: u64,
    paths: Vec<PathBuf>,
    port: u16,
    /// `None` until connects are taken.
    pulse: Option<Pulse>,
    records: Arc<Records>,
}

/// One program of the object.
struct Part {
    name: &'static str,
    place: Place,
    /// Connects go where it says.
    redirects: bool,
}

/// Why there is no hook.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The workload's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The object file does not fit this program: a bug.
    #[error("connect hook: the built-in object has no {0}")]
    Built(&'static str),
    /// The kernel took no program or map.
    #[error(
        "connect hook: load: {said} (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, Linux 6.1 or newer with \
         CONFIG_CGROUP_BPF)"
    )]
    Load {
        /// In the kernel's words.
        said: String,
    },
    /// A map could not be filled.
    #[error("connect hook: {map}: {source}")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        source: MapError,
    },
    /// Our own network namespace has no number.
    #[error("connect hook: read SO_NETNS_COOKIE: {0} (Linux 5.14 or newer)")]
    Namespace(io::Error),
    /// What shall outlive us.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A program was refused.
    #[error(
        "connect hook: {step} {program}: {said} (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)"
    )]
    Program {
        /// Which.
        program: &'static str,
        /// In the kernel's words.
        said: String,
        /// Load or attach.
        step: &'static str,
    },
    /// The words that we share with the programs, or the thread that writes them.
    #[error("connect hook: {step}: {source}")]
    Pulse {
        /// What the kernel said.
        source: io::Error,
        /// What was tried.
        step: &'static str,
    },
}

impl HookPlan {
    /// Nothing more is taken; what was taken goes on.
    #[must_use]
    pub fn leaves(&self) -> bool {
        self.filters.include_ports.is_empty()
    }
}

impl ConnectHook {
    /// Loads the programs and fills their maps; takes nothing yet.
    ///
    /// # Errors
    ///
    /// A cgroup is not there, or the kernel refuses a program.
    pub fn load(plan: &HookPlan) -> Result<ConnectHook, HookError> {
        for path in &plan.cgroups {
            cgroup::open(path)?;
        }
        if plan.closed {
            Pins::open()?;
        }
        let namespace = netns_cookie().map_err(HookError::Namespace)?;
        let (port, mptcp) = (u32::from(plan.port), u32::from(Path::new(MPTCP).exists()));
        let mut bpf = EbpfLoader::new()
            .override_global("weir_netns", &namespace, true)
            .override_global("weir_mark", &plan.own_mark, true)
            .override_global("weir_mark_mask", &plan.own_mark_mask, true)
            .override_global("weir_mptcp", &mptcp, true)
            .override_global("weir_port", &port, true)
            .map_max_entries("records", plan.records_max)
            .load(&Aligned::OBJECT.0)
            .map_err(load_error)?;
        // The programs take hold of their maps while they are loaded: no map may go before.
        for part in PARTS {
            load_program(&mut bpf, part.name)?;
        }
        let control = control_of(&mut bpf)?;
        control.set_mode(if plan.closed { Mode::Closed } else { Mode::Open });
        let mut filters = FilterMaps::take(&mut bpf, Arc::clone(&control))?;
        filters.update(&plan.filters)?;
        let records = records_of(&mut bpf)?;
        let losses = Array::try_from(taken(&mut bpf, "losses")?).map_err(map_error("losses"))?;
        Ok(ConnectHook {
            attached: Vec::new(),
            bpf,
            closed: plan.closed,
            control,
            filters,
            namespace,
            paths: plan.cgroups.clone(),
            port: plan.port,
            pulse: None,
            records: Arc::new(Records::new(records, losses)),
        })
    }

    /// Pins what shall stay. Says where all of that is, and which pins are new.
    fn pin(&self, pins: &Pins, new: &mut NewPins) -> Result<Vec<PathBuf>, HookError> {
        let mut wanted = Vec::new();
        for attached in &self.attached {
            let Some(number) = number_of(&attached.cgroup) else { continue };
            for (part, link) in attached.links.iter().filter(|(part, _)| part.redirects) {
                let place = pins.place(self.namespace, number, part.name);
                if pins::adopt(&place, number).is_none() {
                    pins::pin(link, &place)?;
                    new.0.push(place.clone());
                }
                process::made(&format!("pin {}", part.name));
                wanted.push(place);
            }
        }
        Ok(wanted)
    }

    /// What is pinned for this network namespace goes.
    pub fn unpin(&self) {
        let Some(pins) = Pins::find() else { return };
        for pinned in pins.list().into_iter().filter(|pinned| pinned.netns == self.namespace) {
            // Best effort: the next start, or `weir rules clear`, finds what is left.
            let _ = pins::remove(&pinned.path);
        }
    }

    /// Takes no more connects; those taken keep the peer name that the application dialled. Under
    /// `closed` more are refused.
    pub fn stop(&mut self) {
        if self.closed {
            return self.control.set_mode(Mode::Refuse);
        }
        for attached in &mut self.attached {
            attached.links.retain(|(part, _)| !part.redirects);
        }
    }

    /// Of which listener it is: as long as it lives.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Where taken connects meant to go.
    #[must_use]
    pub fn records(&self) -> Arc<Records> {
        Arc::clone(&self.records)
    }
}

/// Pins what shall stay of all hooks of this network namespace, and removes what an earlier weir pinned
/// for it and what is not needed any more. The last step of an attach.
///
/// # Errors
///
/// There is no bpffs, it is not ours alone, or a step was refused; then nothing new is pinned.
pub fn settle(hooks: &[ConnectHook]) -> Result<NewPins, HookError> {
    let mut new = NewPins::default();
    match settle_into(hooks, &mut new) {
        Ok(()) => Ok(new),
        Err(error) => {
            new.undo();
            Err(error)
        }
    }
}

fn settle_into(hooks: &[ConnectHook], new: &mut NewPins) -> Result<(), HookError> {
    let mut wanted = Vec::new();
    for hook in hooks.iter().filter(|hook| hook.closed) {
        wanted.extend(hook.pin(&Pins::open()?, new)?);
    }
    let Some(pins) = Pins::find() else { return Ok(()) };
    let all = pins.list();
    if all.is_empty() {
        return Ok(());
    }
    let namespace = netns_cookie().map_err(HookError::Namespace)?;
    for pinned in over(all, namespace).filter(|pinned| !wanted.contains(&pinned.path)) {
        pins::remove(&pinned.path)?;
    }
    if wanted.is_empty() {
        pins.tidy();
    }
    Ok(())
}

/// Those for `namespace`, and for namespaces that are gone: they refuse nobody, and take up places on
/// a cgroup, of which there are 64.
fn over(all: Vec<Pinned>, namespace: u64) -> impl Iterator<Item = Pinned> {
    let is_elsewhere = all.iter().any(|pinned| pinned.netns != namespace);
    let living = is_elsewhere.then(netns::living).flatten();
    let is_gone = move |netns| living.as_ref().is_some_and(|living| !living.contains(&netns));
    let is_over = move |pinned: &Pinned| pinned.netns == namespace || is_gone(pinned.netns);
    all.into_iter().filter(is_over)
}

/// Pins that were not there before.
#[derive(Debug, Default)]
pub struct NewPins(Vec<PathBuf>);

impl NewPins {
    /// Best effort: what is left is said by `weir rules show`.
    pub fn undo(self) {
        for path in self.0 {
            let _ = pins::remove(&path);
        }
        if let Some(pins) = Pins::find() {
            pins.tidy();
        }
    }
}

/// The pins that keep connects refused in this network namespace without a weir, and those for
/// namespaces that are gone.
///
/// # Errors
///
/// Our own network namespace has no number (Linux 5.14 or newer).
pub fn pinned() -> Result<Vec<Pinned>, HookError> {
    let namespace = netns_cookie().map_err(HookError::Namespace)?;
    let all = Pins::find().map(|pins| pins.list()).unwrap_or_default();
    Ok(over(all, namespace).collect())
}

/// Takes those pins away: connects go directly again.
///
/// # Errors
///
/// One cannot be removed.
pub fn unpin() -> Result<(), HookError> {
    for pinned in pinned()? {
        pins::remove(&pinned.path)?;
    }
    if let Some(pins) = Pins::find() {
        pins.tidy();
    }
    Ok(())
}

/// The number of the cgroup at `path`, and those of our programs that the connects of its processes
/// meet.
///
/// # Errors
///
/// There is no such cgroup, or we may not ask.
pub fn programs_on(path: &Path) -> Result<(u64, Vec<String>), HookError> {
    let number = number_of(&cgroup::open(path)?).unwrap_or_default();
    let all = neighbours::on_the_way(path)?;
    let names = all.into_iter().map(|(_, _, name)| name).filter(|name| neighbours::is_ours(name));
    Ok((number, names.collect()))
}

/// The numbers of our programs that hang on the cgroup at `path`, or above it.
///
/// # Errors
///
/// There is no such cgroup, or we may not ask.
pub fn numbers_on(path: &Path) -> Result<Vec<u32>, HookError> {
    let cgroup = cgroup::open(path)?;
    let mut all = Vec::new();
    for part in PARTS {
        let failed = |source: io::Error| HookError::Program {
            program: part.name,
            said: source.to_string(),
            step: "list",
        };
        all.extend(links::attached(cgroup.as_fd(), part.place).map_err(failed)?);
    }
    all.sort_unstable();
    all.dedup();
    Ok(neighbours::ours_of(&all))
}

impl Drop for ConnectHook {
    fn drop(&mut self) {
        // What is pinned stays, and need not wait until it notices the silence.
        if self.closed {
            self.control.set_mode(Mode::Refuse);
        }
    }
}

impl std::fmt::Debug for ConnectHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectHook").field("cgroups", &self.paths).finish_non_exhaustive()
    }
}

/// A cgroup's number, as programs see it, is the inode of its directory.
fn number_of(cgroup: &File) -> Option<u64> {
    cgroup.metadata().map(|metadata| metadata.ino()).ok()
}

fn load_program(bpf: &mut Ebpf, name: &'static str) -> Result<(), HookError> {
    let refused = |error: ProgramError| program_error(name, "load", &error);
    let program = bpf.program_mut(name).ok_or(HookError::Built(name))?;
    if name == SOCKOPS {
        let program: &mut SockOps = program.try_into().map_err(refused)?;
        program.load().map_err(refused)
    } else {
        let program: &mut CgroupSockAddr = program.try_into().map_err(refused)?;
        program.load().map_err(refused)
    }
}

fn control_of(bpf: &mut Ebpf) -> Result<Arc<Control>, HookError> {
    let Map::Array(map) = taken(bpf, "control")? else {
        return Err(HookError::Built("map control of the right shape"));
    };
    let failed = |source| HookError::Pulse { source, step: "share memory with the programs" };
    Control::map(map.fd().as_fd()).map(Arc::new).map_err(failed)
}

fn records_of(bpf: &mut Ebpf) -> Result<MapData, HookError> {
    match taken(bpf, "records")? {
        Map::HashMap(map) if layout(&map) => Ok(map),
        _ => Err(HookError::Built("map records of the right shape")),
    }
}

fn layout(map: &MapData) -> bool {
    map.info().is_ok_and(|info| {
        info.key_size() == records::KEY_BYTES && info.value_size() == records::RECORD_BYTES
    })
}

fn taken(bpf: &mut Ebpf, name: &'static str) -> Result<Map, HookError> {
    bpf.take_map(name).ok_or(HookError::Built(name))
}

fn map_error(map: &'static str) -> impl Fn(MapError) -> HookError {
    move |source| HookError::Map { map, source }
}

fn program_error(program: &'static str, step: &'static str, error: &ProgramError) -> HookError {
    HookError::Program { program, said: root_cause(error), step }
}

fn load_error(error: EbpfError) -> HookError {
    HookError::Load { said: root_cause(&error) }
}

/// The innermost error, and the first line that the verifier had to say.
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string().lines().next().unwrap_or_default().to_owned()
}

/// An ELF file is read in place and wants to be aligned.
#[repr(C, align(8))]
struct Aligned<const N: usize>([u8; N]);

impl Aligned<{ OBJECT.len() }> {
    const OBJECT: &Aligned<{ OBJECT.len() }> = &Aligned(*OBJECT);
}

const OBJECT: &[u8; include_bytes!("bpf/prebuilt/connect.bpf.o").len()] =
    include_bytes!("bpf/prebuilt/connect.bpf.o");
const SOCKOPS: &str = "weir_sockops";
/// In the order in which they are attached; those that redirect come last.
const PARTS: &[Part] = &[
    Part { name: "weir_peer4", place: Place::Peer4, redirects: false },
    Part { name: "weir_peer6", place: Place::Peer6, redirects: false },
    Part { name: SOCKOPS, place: Place::Sockops, redirects: false },
    Part { name: "weir_connect4", place: Place::Connect4, redirects: true },
    Part { name: "weir_connect6", place: Place::Connect6, redirects: true },
];
/// The programs by their names.
pub const PROGRAMS: [&str; 5] =
    ["weir_peer4", "weir_peer6", SOCKOPS, "weir_connect4", "weir_connect6"];
/// There where the kernel has MPTCP.
const MPTCP: &str = "/proc/sys/net/mptcp/enabled";
