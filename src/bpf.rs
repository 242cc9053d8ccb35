// SPDX-License-Identifier: Apache-2.0
//! The connect hook: eBPF programs that lead a workload's TCP connects to us. The sockmap relay is
//! in `sockmap`.
//!
//! `load` asks the kernel's verifier, `attach` begins to take traffic. Programs hang on links that
//! only this process holds, never on pins: the kernel detaches them when we are gone. They stack
//! with other people's programs in the same cgroup.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, Map, MapData, MapError};
use aya::programs::{CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SockOps};
use aya::{Ebpf, EbpfError, EbpfLoader};
use ipnet::IpNet;

use crate::sys::cgroup::{self, CgroupError};
use crate::sys::socket::netns_cookie;

pub use records::{Losses, Records};

pub mod sockmap;

mod records;

/// What to take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HookPlan {
    /// Whose connects; relative to the cgroup v2 mount.
    pub cgroup: PathBuf,
    /// Destinations to leave alone; wins over `include`.
    pub exclude: Vec<IpNet>,
    /// Destination ports to leave alone.
    pub exclude_ports: Vec<RangeInclusive<u16>>,
    /// Destinations to take; loopback is never taken.
    pub include: Vec<IpNet>,
    /// Destination ports to take.
    pub include_ports: Vec<RangeInclusive<u16>>,
    /// Sockets with this mark, under the mask that follows, are ours.
    pub own_mark: u32,
    /// See `own_mark`.
    pub own_mark_mask: u32,
    /// Where connects are led to, on 127.0.0.1 and ::1.
    pub port: u16,
    /// Connections that may wait to be accepted; more are reset, never misled.
    pub records_max: u32,
}

/// Loaded programs, attached or not. Dropping it detaches them.
pub struct ConnectHook {
    bpf: Ebpf,
    /// To which the programs are attached.
    cgroup: File,
    path: PathBuf,
    records: Arc<Records>,
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
        "connect hook: load: {said} (needs CAP_BPF and CAP_NET_ADMIN, Linux 5.14 or newer with CONFIG_CGROUP_BPF)"
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
    /// A program was refused.
    #[error("connect hook: {step} {program}: {said} (needs CAP_BPF and CAP_NET_ADMIN)")]
    Program {
        /// Which.
        program: &'static str,
        /// In the kernel's words.
        said: String,
        /// Load or attach.
        step: &'static str,
    },
}

impl ConnectHook {
    /// Loads the programs and fills their maps; takes nothing yet.
    ///
    /// # Errors
    ///
    /// The cgroup is not there, or the kernel refuses a program.
    pub fn load(plan: &HookPlan) -> Result<ConnectHook, HookError> {
        let cgroup = cgroup::open(&plan.cgroup)?;
        let namespace = netns_cookie().map_err(HookError::Namespace)?;
        let port = u32::from(plan.port);
        let mut bpf = EbpfLoader::new()
            .override_global("weir_netns", &namespace, true)
            .override_global("weir_mark", &plan.own_mark, true)
            .override_global("weir_mark_mask", &plan.own_mark_mask, true)
            .override_global("weir_port", &port, true)
            .map_max_entries("records", plan.records_max)
            .load(&Aligned::OBJECT.0)
            .map_err(load_error)?;
        fill(&mut bpf, plan)?;
        // The programs take hold of their maps while they are loaded: no map may go before.
        for (program, _) in PROGRAMS {
            load_program(&mut bpf, program)?;
        }
        let records = records_of(&mut bpf)?;
        let losses = Array::try_from(taken(&mut bpf, "losses")?).map_err(map_error("losses"))?;
        let (path, records) = (plan.cgroup.clone(), Arc::new(Records::new(records, losses)));
        Ok(ConnectHook { bpf, cgroup, path, records })
    }

    /// Begins to take connects, and begins again with a cgroup that was made anew. What makes
    /// records and names goes before what redirects.
    ///
    /// # Errors
    ///
    /// The kernel refuses to attach a program; those before it stay until the hook is dropped.
    pub fn attach(&mut self) -> Result<(), HookError> {
        self.cgroup = cgroup::open(&self.path)?;
        PROGRAMS.iter().try_for_each(|(program, _)| self.attach_program(program))
    }

    /// The cgroup to which the programs are attached is still the one at its path.
    #[must_use]
    pub fn stands(&self) -> bool {
        let inode = |file: &File| file.metadata().map(|metadata| metadata.ino()).ok();
        cgroup::open(&self.path).is_ok_and(|now| inode(&now) == inode(&self.cgroup))
    }

    /// Takes no more connects; those taken keep the peer name that the application dialled.
    pub fn stop(&mut self) {
        for (program, redirects) in PROGRAMS {
            let program = self.bpf.program_mut(program).filter(|_| *redirects);
            if let Some(Program::CgroupSockAddr(program)) = program {
                // Unloading drops its links; what is unloaded already has none.
                let _ = program.unload();
            }
        }
    }

    /// Where taken connects meant to go.
    #[must_use]
    pub fn records(&self) -> Arc<Records> {
        Arc::clone(&self.records)
    }

    fn attach_program(&mut self, name: &'static str) -> Result<(), HookError> {
        let refused = |error: ProgramError| HookError::Program {
            program: name,
            said: root_cause(&error),
            step: "attach",
        };
        let program = self.bpf.program_mut(name).ok_or(HookError::Built(name))?;
        // Links always stack with others (`cgroup_bpf_link_attach` in kernel/bpf/cgroup.c).
        let mode = CgroupAttachMode::Single;
        if name == SOCKOPS {
            let program: &mut SockOps = program.try_into().map_err(refused)?;
            program.attach(&self.cgroup, mode).map(drop).map_err(refused)
        } else {
            let program: &mut CgroupSockAddr = program.try_into().map_err(refused)?;
            program.attach(&self.cgroup, mode).map(drop).map_err(refused)
        }
    }
}

impl std::fmt::Debug for ConnectHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectHook").field("cgroup", &self.cgroup).finish_non_exhaustive()
    }
}

fn load_program(bpf: &mut Ebpf, name: &'static str) -> Result<(), HookError> {
    let refused = |error: ProgramError| HookError::Program {
        program: name,
        said: root_cause(&error),
        step: "load",
    };
    let program = bpf.program_mut(name).ok_or(HookError::Built(name))?;
    if name == SOCKOPS {
        let program: &mut SockOps = program.try_into().map_err(refused)?;
        program.load().map_err(refused)
    } else {
        let program: &mut CgroupSockAddr = program.try_into().map_err(refused)?;
        program.load().map_err(refused)
    }
}

fn fill(bpf: &mut Ebpf, plan: &HookPlan) -> Result<(), HookError> {
    fill_networks(bpf, "include_nets", &plan.include)?;
    fill_networks(bpf, "exclude_nets", &plan.exclude)?;
    let map = bpf.map_mut("ports").ok_or(HookError::Built("ports"))?;
    let mut ports: Array<&mut MapData, u64> = Array::try_from(map).map_err(map_error("ports"))?;
    let within = |ranges: &[RangeInclusive<u16>], port: u16| {
        ranges.iter().any(|range| range.contains(&port))
    };
    let is_taken =
        |port: u16| within(&plan.include_ports, port) && !within(&plan.exclude_ports, port);
    for word in 0..=PORT_WORD_LAST {
        let bits = (0..64u16).filter(|bit| is_taken(word * 64 + bit));
        let value = bits.fold(0u64, |value, bit| value | 1 << bit);
        ports.set(u32::from(word), value, 0).map_err(map_error("ports"))?;
    }
    Ok(())
}

fn fill_networks(bpf: &mut Ebpf, name: &'static str, list: &[IpNet]) -> Result<(), HookError> {
    let map = bpf.map_mut(name).ok_or(HookError::Built(name))?;
    let mut trie: LpmTrie<&mut MapData, [u8; 20], u32> =
        LpmTrie::try_from(map).map_err(map_error(name))?;
    for network in list {
        // `struct network` of shared.h after its prefix: family, address.
        let mut whole = [0; 20];
        match network.addr() {
            IpAddr::V4(ip) => {
                whole[..4].copy_from_slice(&4u32.to_ne_bytes());
                whole[4..8].copy_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                whole[..4].copy_from_slice(&6u32.to_ne_bytes());
                whole[4..].copy_from_slice(&ip.octets());
            }
        }
        let key = Key::new(FAMILY_BITS + u32::from(network.prefix_len()), whole);
        trie.insert(&key, 1, 0).map_err(map_error(name))?;
    }
    Ok(())
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
const PROGRAMS: &[(&str, bool)] = &[
    ("weir_peer4", false),
    ("weir_peer6", false),
    (SOCKOPS, false),
    ("weir_connect4", true),
    ("weir_connect6", true),
];
/// The family stands before the address.
const FAMILY_BITS: u32 = 32;
/// 65,536 ports, 64 to a word.
const PORT_WORD_LAST: u16 = 1023;
