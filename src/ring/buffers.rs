// SPDX-License-Identifier: Apache-2.0
//! A pool of provided buffers: our end of one kernel buffer ring.
//!
//! The kernel takes buffers from the ring first in, first out, so every buffer in the ring is
//! part of the cache footprint. A pool therefore shows the kernel only as many as were ever
//! needed at once and keeps the others, untouched, in reserve (last in, first out).
//! Invariant: a buffer is in the ring, in the reserve, or out with a flow.
#![expect(unsafe_code, reason = "writes the entries that the kernel reads")]

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::Submitter;
use io_uring::types::BufRingEntry;

use crate::op::BufferId;
use crate::sys::memory::Mapping;

/// Buffers of one size, and the ring through which the kernel takes them.
#[derive(Debug)]
pub(super) struct Buffers {
    bytes: u32,
    count: u16,
    data: Mapping,
    entries: Mapping,
    first: u16,
    /// How many the kernel may see at once.
    shown_max: u16,
    reserve: Vec<u16>,
    /// In the kernel's ring now.
    shown: u16,
    tail: u16,
}

impl Buffers {
    /// `count` buffers with ids from `first` on, offered to the ring as `group`. `count` must be a
    /// power of two up to 32768 (io_uring_register(2)).
    pub(super) fn register(
        submitter: &Submitter<'_>,
        group: u16,
        first: u16,
        count: u16,
        bytes: u32,
    ) -> io::Result<Buffers> {
        let data = Mapping::new(usize::from(count) * bytes as usize)?;
        let entries = Mapping::new(usize::from(count) * size_of::<BufRingEntry>())?;
        // SAFETY: `entries` is page-aligned, holds `count` entries, and lives as long as the
        // ring: `Ring` drops its buffers after the ring itself.
        unsafe {
            submitter.register_buf_ring_with_flags(entries.as_ptr() as u64, count, group, 0)?
        };
        let mut buffers = Buffers {
            bytes,
            count,
            data,
            entries,
            first,
            shown_max: count.min(SHOWN_FIRST),
            reserve: (first..first + count).rev().collect(),
            shown: 0,
            tail: 0,
        };
        buffers.publish();
        Ok(buffers)
    }

    /// The kernel has taken a buffer from the ring.
    pub(super) fn taken(&mut self) {
        self.shown = self.shown.saturating_sub(1);
    }

    /// The kernel found the ring empty: show it more from now on.
    pub(super) fn ran_dry(&mut self) {
        if self.shown == 0 {
            self.shown_max = self.shown_max.saturating_mul(2).min(self.count);
        }
    }

    /// A buffer comes home.
    pub(super) fn recycle(&mut self, buffer: BufferId) {
        debug_assert!(self.owns(buffer));
        if self.reserve.len() < usize::from(self.count) {
            self.reserve.push(buffer.0);
        }
    }

    /// Fills the ring from the reserve and lets the kernel see it; once a turn.
    pub(super) fn publish(&mut self) {
        let before = self.tail;
        while self.shown < self.shown_max {
            let Some(id) = self.reserve.pop() else { break };
            self.place(id);
            self.shown += 1;
        }
        if self.tail != before {
            self.store_tail();
        }
    }

    /// Buffers that nobody holds.
    pub(super) fn free(&self) -> u16 {
        self.shown + u16::try_from(self.reserve.len()).unwrap_or(self.count)
    }

    /// Whether `buffer` is one of this pool's.
    pub(super) fn owns(&self, buffer: BufferId) -> bool {
        (self.first..self.first + self.count).contains(&buffer.0)
    }

    /// Its size, if it is this pool's.
    pub(super) fn bytes_of(&self, buffer: BufferId) -> Option<u32> {
        self.owns(buffer).then_some(self.bytes)
    }

    /// The first byte of `buffer`, which must be this pool's.
    pub(super) fn address(&self, buffer: BufferId) -> *mut u8 {
        debug_assert!(self.owns(buffer));
        let index = usize::from(buffer.0.wrapping_sub(self.first)) % usize::from(self.count);
        self.data.as_ptr().wrapping_add(index * self.bytes as usize)
    }

    fn place(&mut self, id: u16) {
        let address = self.address(BufferId(id)) as u64;
        let index = usize::from(self.tail) & (usize::from(self.count) - 1);
        let entry = self.entry(index);
        // SAFETY: `index` is below `count`, so the entry lies in our mapping; the kernel reads
        // it only once the tail has passed it. Writing address, length and id leaves alone the
        // field of entry 0 that serves as the tail.
        let entry = unsafe { &mut *entry };
        entry.set_addr(address);
        entry.set_len(self.bytes);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
    }

    #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
    fn entry(&self, index: usize) -> *mut BufRingEntry {
        self.entries.as_ptr().cast::<BufRingEntry>().wrapping_add(index)
    }

    fn store_tail(&self) {
        let base = self.entry(0);
        // SAFETY: `base` is the first entry of a registered ring, aligned to a page.
        let tail = unsafe { BufRingEntry::tail(base) }.cast::<AtomicU16>();
        // SAFETY: the tail is two aligned bytes in our mapping that the kernel only reads.
        // Release: the entries before it must be visible first.
        unsafe { (*tail).store(self.tail, Ordering::Release) };
    }
}

/// Buffers shown at first; doubled whenever the kernel runs dry.
const SHOWN_FIRST: u16 = 64;
