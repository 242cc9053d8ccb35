// SPDX-License-Identifier: Apache-2.0
//! Links of programs to cgroups: made, led to another program, pinned, found again.
//!
//! A link lives as long as a descriptor or a pin of it; with it the kernel detaches the program.
//! Links stack with other people's (`cgroup_bpf_link_attach` in kernel/bpf/cgroup.c).
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper for these commands")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Where a program hangs on a cgroup; the numbers of `enum bpf_attach_type` (linux/bpf.h).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(super) enum Place {
    Connect4 = 10,
    Connect6 = 11,
    Peer4 = 29,
    Peer6 = 30,
    Sockops = 3,
}

/// What a link holds together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Linked {
    /// The cgroup's number; 0 once it is removed.
    pub(super) cgroup: u64,
    /// The program's number.
    pub(super) program: u32,
}

/// `program` hangs on `cgroup` while the link is held.
pub(super) fn create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    place: Place,
) -> io::Result<OwnedFd> {
    let mut command = Create {
        program: number(program),
        cgroup: number(cgroup),
        place: place as u32,
        ..Create::default()
    };
    // SAFETY: a link_create command of this kind holds numbers only.
    let link = unsafe { bpf(LINK_CREATE, &mut command) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// `link` holds `program` from now on; there is no moment without one of them.
pub(super) fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut command = Update { link: number(link), program: number(program), ..Update::default() };
    // SAFETY: the command holds numbers only.
    unsafe { bpf(LINK_UPDATE, &mut command) }.map(drop)
}

/// The link outlives its descriptors, under `path` of a bpffs.
pub(super) fn pin(link: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let name = path.as_ptr().addr() as u64;
    let mut command = Object { name, object: number(link), flags: 0 };
    // SAFETY: `name` is the address of `path`, which ends with a zero byte and outlives the call.
    unsafe { bpf(OBJ_PIN, &mut command) }.map(drop)
}

/// The object that is pinned at `path`.
pub(super) fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let name = path.as_ptr().addr() as u64;
    let mut command = Object { name, object: 0, flags: 0 };
    // SAFETY: `name` is the address of `path`, which ends with a zero byte and outlives the call.
    let object = unsafe { bpf(OBJ_GET, &mut command) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(object) })
}

/// What `link` holds together; an error for anything that is no link.
pub(super) fn linked(link: BorrowedFd<'_>) -> io::Result<Linked> {
    let mut info = Info::default();
    let mut command =
        Ask { object: number(link), bytes: INFO_BYTES, info: (&raw mut info).addr() as u64 };
    // SAFETY: the kernel writes at most `bytes` bytes, the size of `info`, which outlives the call.
    unsafe { bpf(OBJ_INFO, &mut command) }?;
    let Info { kind, program, cgroup, .. } = info;
    if kind != LINK_TYPE_CGROUP {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(Linked { cgroup, program })
}

/// The numbers of the programs that run at `place` for `cgroup`, in their order, those of the
/// cgroups above it included.
pub(super) fn attached(cgroup: BorrowedFd<'_>, place: Place) -> io::Result<Vec<u32>> {
    let mut programs = [0u32; PROGRAMS_MAX];
    let mut command = Query {
        cgroup: number(cgroup),
        place: place as u32,
        flags: QUERY_EFFECTIVE,
        programs: programs.as_mut_ptr().addr() as u64,
        count: u32::try_from(PROGRAMS_MAX).unwrap_or_default(),
        ..Query::default()
    };
    // SAFETY: the kernel writes at most `count` numbers of four bytes, which is the room that
    // `programs` has, and it outlives the call.
    unsafe { bpf(PROG_QUERY, &mut command) }?;
    let count = usize::try_from(command.count).unwrap_or_default();
    Ok(programs.into_iter().take(count).collect())
}

/// # Safety
///
/// Every address in `command` must be good for what the command does with it.
unsafe fn bpf<C>(number: libc::c_long, command: &mut C) -> io::Result<i32> {
    // SAFETY: `command` is as large as we say; the kernel takes what is missing of its union as
    // zero, keeps no pointer to it, and the caller vouches for the addresses in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, number, &raw mut *command, size_of::<C>()) };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// The parts of `union bpf_attr` (linux/bpf.h), one for each kind of command.
#[derive(Default)]
#[repr(C)]
struct Create {
    program: u32,
    cgroup: u32,
    place: u32,
    flags: u32,
}

#[derive(Default)]
#[repr(C)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct Object {
    name: u64,
    object: u32,
    flags: u32,
}

#[repr(C)]
struct Ask {
    object: u32,
    bytes: u32,
    info: u64,
}

#[derive(Default)]
#[repr(C)]
struct Query {
    cgroup: u32,
    place: u32,
    flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
}

/// The beginning of `struct bpf_link_info`, as links to cgroups fill it.
#[derive(Default)]
#[repr(C)]
struct Info {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    cgroup: u64,
    place: u32,
    rest: [u32; 9],
}

const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_INFO: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
/// `BPF_F_QUERY_EFFECTIVE`.
const QUERY_EFFECTIVE: u32 = 1;
/// `BPF_LINK_TYPE_CGROUP`.
const LINK_TYPE_CGROUP: u32 = 3;
/// `BPF_CGROUP_MAX_PROGS` for one cgroup; more above it are an error to the kernel, and to us.
const PROGRAMS_MAX: usize = 64;
const INFO_BYTES: u32 = 64;
const _: () = assert!(size_of::<Info>() == INFO_BYTES as usize);
