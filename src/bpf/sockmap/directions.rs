// SPDX-License-Identifier: Apache-2.0
//! The verdict program's notes, read as memory: no syscall, at any time.
#![expect(unsafe_code, reason = "reads and writes memory that the kernel shares")]

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use aya::maps::MapData;

use super::SockmapError;
use crate::sys::memory::Mapping;

/// The map `directions`.
pub(super) struct Directions {
    count: u32,
    memory: Mapping,
}

// SAFETY: the mapping belongs to nobody else in the process, and what the kernel shares in it is
// read and written by atomics alone.
unsafe impl Send for Directions {}

/// What went through one direction, at least: the kernel may be a segment further.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Bytes that the kernel has taken upon itself to deliver.
    pub forwarded: u64,
    /// The stream has a hole or could not be mended: reset the flow.
    pub is_broken: bool,
    /// Why bytes are left to user space, if they are.
    pub pass: Option<Pass>,
    /// Bytes that were left to user space.
    pub passed: u64,
    /// Bytes that came twice and were cut off.
    pub trimmed: u64,
}

/// Why a direction is left to user space: `enum pass` of sockmap.h.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pass {
    /// `Sockmap::pass` was called.
    Asked,
    /// The peer is behind by more than the credit.
    Credit,
    /// The other direction was left to user space, and not because weir wanted it.
    Partner,
    /// The target's send buffer is half full.
    Room,
    /// The target has been reset or closed.
    TargetGone,
}

/// `struct direction` of sockmap.h.
#[repr(C)]
struct Direction {
    forwarded: AtomicU64,
    passed: AtomicU64,
    trimmed: AtomicU64,
    next_sequence: AtomicU32,
    first_write: AtomicU32,
    is_begun: AtomicU32,
    is_broken: AtomicU32,
    passes: AtomicU32,
    pad: [AtomicU32; 5],
}

impl Directions {
    pub(super) fn new(map: &MapData, count: u32) -> Result<Directions, SockmapError> {
        let layout =
            map.info().map_err(|source| SockmapError::Map { map: "directions", source })?;
        if layout.value_size() as usize != size_of::<Direction>() || layout.max_entries() < count {
            return Err(SockmapError::Built("map directions of the right shape"));
        }
        let bytes = size_of::<Direction>() * count as usize;
        let memory = Mapping::shared(map.fd().as_fd(), bytes).map_err(SockmapError::Memory)?;
        Ok(Directions { count, memory })
    }

    pub(super) fn progress(&self, place: u32) -> Progress {
        let direction = self.at(place);
        let pass = match direction.passes.load(Relaxed) {
            0 => None,
            PASS_ASKED => Some(Pass::Asked),
            2 => Some(Pass::Credit),
            3 => Some(Pass::Room),
            5 => Some(Pass::Partner),
            _ => Some(Pass::TargetGone),
        };
        Progress {
            forwarded: direction.forwarded.load(Relaxed),
            is_broken: direction.is_broken.load(Relaxed) != 0,
            pass,
            passed: direction.passed.load(Relaxed),
            trimmed: direction.trimmed.load(Relaxed),
        }
    }

    pub(super) const fn places(&self) -> u32 {
        self.count
    }

    /// The program only ever sets it, too: whoever is last is as right as whoever is first.
    pub(super) fn pass(&self, place: u32) {
        let passes = &self.at(place).passes;
        // Nothing to order: both sides take the socket's lock before they rely on it.
        let _ = passes.compare_exchange(0, PASS_ASKED, Relaxed, Relaxed);
    }

    /// For a new pair, whose sockets are in no map yet.
    pub(super) fn reset(&self, place: u32) {
        let direction = self.at(place);
        for number in [&direction.forwarded, &direction.passed, &direction.trimmed] {
            number.store(0, Relaxed);
        }
        for word in [
            &direction.next_sequence,
            &direction.first_write,
            &direction.is_begun,
            &direction.is_broken,
            &direction.passes,
        ] {
            word.store(0, Relaxed);
        }
    }

    #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
    fn at(&self, place: u32) -> &Direction {
        let place = place.min(self.count - 1) as usize;
        let first = self.memory.as_ptr().cast_const().cast::<Direction>();
        // SAFETY: `new` has mapped `count` structures of exactly this layout, at a page boundary,
        // for as long as `self` lives; `place` is below `count`; every field is atomic, because
        // the kernel writes to the same memory.
        unsafe { &*first.add(place) }
    }
}

/// See sockmap.h.
const PASS_ASKED: u32 = 1;
const _: () = assert!(size_of::<Direction>() == 64);
