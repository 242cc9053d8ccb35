// SPDX-License-Identifier: Apache-2.0
//! Parsers that find the service a request is for, in the bytes that have come so far.
//!
//! Pure functions of those bytes: no I/O, no allocation, no state between calls. What always
//! holds: an answer never changes when more bytes come; `NeedMore` says how many bytes must be
//! there at least, always more than there are, and what would exceed a parser's limit is `Bad`.
#![deny(clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "hot path")]

pub mod bolt;
pub mod detect;
pub mod dubbo;
mod hessian;
mod hpack;
pub mod http1;
pub mod http2;
#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests;
pub mod tls;
pub mod zookeeper;

/// Why there is nothing to say, or nothing good.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stop {
    /// It is this protocol, and it is broken.
    Bad(&'static str),
    /// Before so many bytes are there in all, nothing can be found; what is wrong may show sooner.
    NeedMore(usize),
    /// It is another protocol.
    NotMine,
}

/// A name that had to be put together: it was cut, coded, or spread over records.
#[derive(Clone, Copy)]
pub struct Name {
    bytes: [u8; Name::BYTES_MAX],
    len: u16,
}

impl Name {
    /// The longest one taken; a DNS name has 253, a path of gRPC rarely more than 100.
    pub const BYTES_MAX: usize = 512;

    /// Without a letter yet.
    const EMPTY: Name = Name { bytes: [0; Name::BYTES_MAX], len: 0 };

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }

    fn push(&mut self, byte: u8) -> Result<(), Stop> {
        let place = self.bytes.get_mut(usize::from(self.len)).ok_or(Stop::Bad("name too long"))?;
        *place = byte;
        self.len += 1;
        Ok(())
    }
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.as_bytes()))
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Name) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

/// Reads big-endian numbers and slices from the front; what is not there yet is asked for.
#[derive(Clone, Copy, Debug)]
struct Reader<'a> {
    at: usize,
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    const fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { at: 0, bytes }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let end = self.at.saturating_add(len);
        let taken = self.bytes.get(self.at..end).ok_or(Stop::NeedMore(end))?;
        self.at = end;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, Stop> {
        self.take(1).map(|bytes| bytes.first().copied().unwrap_or_default())
    }

    fn u16(&mut self) -> Result<u16, Stop> {
        let bytes = self.take(2)?.first_chunk().copied().unwrap_or_default();
        Ok(u16::from_be_bytes(bytes))
    }

    fn u24(&mut self) -> Result<u32, Stop> {
        Ok(u32::from(self.u8()?) << 16 | u32::from(self.u16()?))
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        let bytes = self.take(4)?.first_chunk().copied().unwrap_or_default();
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64, Stop> {
        let bytes = self.take(8)?.first_chunk().copied().unwrap_or_default();
        Ok(u64::from_be_bytes(bytes))
    }
}

/// Inside something whose length is known, what is missing will never come.
fn inside<T>(result: Result<T, Stop>, what: &'static str) -> Result<T, Stop> {
    result.map_err(|stop| match stop {
        Stop::NeedMore(_) => Stop::Bad(what),
        stop => stop,
    })
}
