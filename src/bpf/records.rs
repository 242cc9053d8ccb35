// SPDX-License-Identifier: Apache-2.0
//! Where captured connects meant to go, asked by workers at accept.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper for this command")]

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use aya::maps::{Array, MapData};

use crate::addr::{Downstream, OriginalDst};

/// The hook's records. Shared by all workers; the kernel's map is the only lock.
pub struct Records {
    losses: Array<MapData, u64>,
    map: MapData,
}

/// Connects that were wanted and did not come to us whole, by reason.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Losses {
    /// A later program of somebody else led the connect elsewhere.
    pub overruled: u64,
    /// We were silent: the connect went on untouched.
    pub passed: u64,
    /// A source port was used again before its last record was taken: both are reset.
    pub record_clash: u64,
    /// More connections wait than there is room for records: reset at accept.
    pub records_full: u64,
    /// We were silent, or took no more: the connect was refused.
    pub refused: u64,
    /// No memory to remember the destination: the connect was refused.
    pub storage: u64,
}

impl Losses {
    /// The sum of both.
    #[must_use]
    pub const fn and(self, other: Losses) -> Losses {
        Losses {
            overruled: self.overruled + other.overruled,
            passed: self.passed + other.passed,
            record_clash: self.record_clash + other.record_clash,
            records_full: self.records_full + other.records_full,
            refused: self.refused + other.refused,
            storage: self.storage + other.storage,
        }
    }
}

/// `struct record_key` of shared.h.
#[derive(Clone, Copy)]
#[repr(C)]
struct Key {
    ip: [u8; 16],
    port: u32,
}

/// `struct record` of shared.h.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Record {
    ip: [u8; 16],
    port: u32,
    pad: u32,
    cookie: u64,
}

/// The part of `union bpf_attr` that map element commands use (linux/bpf.h).
#[repr(C)]
struct ElementCommand {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records").field("map", &self.map).finish_non_exhaustive()
    }
}

impl Records {
    pub(super) const fn new(map: MapData, losses: Array<MapData, u64>) -> Records {
        Records { losses, map }
    }

    /// What was lost so far.
    #[must_use]
    pub fn losses(&self) -> Losses {
        // In the order of `enum loss` in shared.h. Reading an element that exists does not fail.
        let loss = |index| self.losses.get(&index, 0).unwrap_or_default();
        Losses {
            overruled: loss(3),
            passed: loss(4),
            record_clash: loss(1),
            records_full: loss(0),
            refused: loss(5),
            storage: loss(2),
        }
    }

    /// Where the connection that came from `downstream` meant to go, and forgets it. `None`: nobody
    /// recorded it. One syscall (`BPF_MAP_LOOKUP_AND_DELETE_ELEM`, for hashes since 5.14).
    #[must_use]
    pub fn take(&self, downstream: Downstream) -> Option<OriginalDst> {
        let key = key_of(downstream.addr());
        let mut record = Record::default();
        self.lookup_and_delete(&key, &mut record).ok()?;
        let port = u16::try_from(record.port).ok()?;
        Some(OriginalDst::new(SocketAddr::new(Ipv6Addr::from(record.ip).into(), port)))
    }

    fn lookup_and_delete(&self, key: &Key, record: &mut Record) -> io::Result<()> {
        let command = ElementCommand {
            map_fd: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
            pad: 0,
            key: (&raw const *key).addr() as u64,
            value: (&raw mut *record).addr() as u64,
            flags: 0,
        };
        // SAFETY: the map's keys and values have exactly the sizes of `Key` and `Record` (asserted
        // below and checked by `layout` when loaded); both outlive the call, and the kernel keeps
        // no pointer.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                LOOKUP_AND_DELETE,
                &raw const command,
                size_of::<ElementCommand>(),
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn key_of(addr: SocketAddr) -> Key {
    let ip = match addr.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    Key { ip: ip.octets(), port: u32::from(addr.port()) }
}

/// `BPF_MAP_LOOKUP_AND_DELETE_ELEM` in linux/bpf.h.
const LOOKUP_AND_DELETE: libc::c_long = 21;
/// The map's sizes, as shared.h has them.
pub(super) const KEY_BYTES: u32 = 20;
pub(super) const RECORD_BYTES: u32 = 32;
const _: () = assert!(size_of::<Key>() == KEY_BYTES as usize);
const _: () = assert!(size_of::<Record>() == RECORD_BYTES as usize);
