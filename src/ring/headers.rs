// SPDX-License-Identifier: Apache-2.0
//! Buffers for what weir itself says before a flow's bytes: small, few, never shown to the kernel
//! as room to receive into.
//!
//! Invariant: a header is free, or lent to one flow.
#![expect(unsafe_code, reason = "writes into a mapping")]

use std::io;

use crate::op::{BufferId, Segment};
use crate::sys::memory::Mapping;

/// Headers by the number of their buffer.
#[derive(Debug)]
pub(super) struct Headers {
    count: u16,
    data: Mapping,
    first: u16,
    free: Vec<u16>,
}

impl Headers {
    /// `count` of them, with buffer ids from `first` on.
    pub(super) fn new(first: u16, count: u16) -> io::Result<Headers> {
        let data = Mapping::new(usize::from(count) * HEADER_BYTES_MAX)?;
        // The lowest is lent first, so that only as many pages are touched as are needed at once.
        let free = (first..first + count).rev().collect();
        Ok(Headers { count, data, first, free })
    }

    /// A copy of `text`, to be sent; `None` if all are lent.
    pub(super) fn lend(&mut self, text: &[u8]) -> Option<Segment> {
        let len = u32::try_from(text.len()).ok().filter(|len| *len as usize <= HEADER_BYTES_MAX)?;
        let buffer = BufferId(self.free.pop()?);
        // SAFETY: `address` leads to `HEADER_BYTES_MAX` bytes of our own mapping, `text` is no
        // longer, and the buffer was free: the kernel reads it only after this.
        unsafe { self.address(buffer).copy_from_nonoverlapping(text.as_ptr(), text.len()) };
        Some(Segment { buffer, offset: 0, len })
    }

    /// At least one is free.
    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// A header comes home.
    pub(super) fn recycle(&mut self, buffer: BufferId) {
        debug_assert!(self.owns(buffer));
        if self.free.len() < usize::from(self.count) {
            self.free.push(buffer.0);
        }
    }

    /// Whether `buffer` is a header.
    pub(super) fn owns(&self, buffer: BufferId) -> bool {
        (self.first..self.first + self.count).contains(&buffer.0)
    }

    /// Its size, if it is a header.
    pub(super) fn bytes_of(&self, buffer: BufferId) -> Option<u32> {
        self.owns(buffer).then_some(HEADER_BYTES)
    }

    /// The first byte of `buffer`, which must be a header.
    pub(super) fn address(&self, buffer: BufferId) -> *mut u8 {
        debug_assert!(self.owns(buffer));
        let index = usize::from(buffer.0.wrapping_sub(self.first));
        self.data.as_ptr().wrapping_add(index * HEADER_BYTES_MAX)
    }
}

/// The longest text of a PROXY header, version 1, is 107 bytes; a power of two keeps each header
/// within two cache lines.
pub(super) const HEADER_BYTES_MAX: usize = 128;
const HEADER_BYTES: u32 = 128;
const _: () = assert!(HEADER_BYTES as usize == HEADER_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_lent_once_and_comes_home() {
        let mut headers = Headers::new(7, 2).unwrap();
        let one = headers.lend(b"one").unwrap();
        assert_eq!(one, Segment { buffer: BufferId(7), offset: 0, len: 3 });
        assert_eq!(headers.lend(b"other").unwrap().buffer, BufferId(8));
        assert_eq!(headers.lend(b"third"), None);
        headers.recycle(one.buffer);
        assert_eq!(headers.lend(&[0; HEADER_BYTES_MAX + 1]), None);
        assert_eq!(headers.lend(b"third").unwrap().buffer, BufferId(7));
    }
}
