// SPDX-License-Identifier: Apache-2.0
//! HTTP/2: what every request of a connection is for, one after the other.
//!
//! Unlike the other parsers it remembers: HPACK's table is the connection's. It takes in a frame only
//! when all of it is there that it must read.

use std::hash::{DefaultHasher, Hasher};

use super::{
    Block, CONTINUATION, END_HEADERS, Frame, HEADERS, Name, PREFACE, Reader, Stop, service_in,
};
use crate::wire::hpack::{Memory, Tag};
use crate::wire::http1::without_port;

/// A connection's requests so far.
#[derive(Debug)]
pub struct Streams {
    has_begun: bool,
    memory: Memory,
}

/// Whom a request is for, as far as it takes to tell it from another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Requested {
    host: Tag,
    service: Tag,
}

impl Requested {
    /// It goes where `other` goes: by the service in its path if that is known, else by its host.
    #[must_use]
    pub fn is_like(self, other: Requested) -> bool {
        match (self.service.is_known, other.service.is_known) {
            (true, true) => self.service.hash == other.service.hash,
            (false, false) => self.host.hash == other.host.hash,
            _ => false,
        }
    }
}

impl Streams {
    /// Before the preface.
    #[must_use]
    pub const fn new() -> Streams {
        Streams { has_begun: false, memory: Memory::new() }
    }

    /// The next frame, or the preface: how long it is (a header block with its continuations), and the
    /// request in it. `is_known` says whether a service has this name.
    ///
    /// # Errors
    ///
    /// Too few bytes, or frames that no client would send.
    pub fn next(
        &mut self,
        bytes: &[u8],
        is_known: impl Fn(&[u8]) -> bool,
    ) -> Result<(u64, Option<Requested>), Stop> {
        let mut reader = Reader::new(bytes);
        if !self.has_begun {
            reader.take(PREFACE.len())?;
            self.has_begun = true;
            return Ok((PREFACE.len() as u64, None));
        }
        let frame = Frame::any(&mut reader)?;
        let end = reader.at + frame.len;
        if frame.kind == CONTINUATION {
            return Err(Stop::Bad("a header block goes on that has not begun"));
        }
        if frame.kind != HEADERS {
            return Ok((end as u64, None));
        }
        is_whole(bytes, end, frame)?;
        let mut block = Block::open(reader, frame)?;
        let tag = |name: &Name, is_path: bool| tag(name, is_path, &is_known);
        let [host, service] = self.memory.decode(&mut block, tag)?;
        let (host, service) = (host.unwrap_or_default(), service);
        // Trailers have no names.
        let requested = service.map(|service| Requested { host, service });
        Ok((block.next_frame as u64, requested))
    }
}

impl Default for Streams {
    fn default() -> Streams {
        Streams::new()
    }
}

/// The block and its continuations are there.
fn is_whole(bytes: &[u8], mut end: usize, mut frame: Frame) -> Result<(), Stop> {
    while frame.flags & END_HEADERS == 0 {
        let mut reader = Reader { at: end, bytes };
        frame = Frame::read(&mut reader)?;
        end = reader.at + frame.len;
    }
    if bytes.len() < end { Err(Stop::NeedMore(end)) } else { Ok(()) }
}

fn tag(name: &Name, is_path: bool, is_known: impl Fn(&[u8]) -> bool) -> Tag {
    let mut hasher = DefaultHasher::new();
    if is_path {
        let service = service_in(name).unwrap_or_default();
        hasher.write(service);
        return Tag { hash: hasher.finish(), is_known: is_known(service) };
    }
    let host = without_port(name.as_bytes());
    host.iter().for_each(|byte| hasher.write_u8(byte.to_ascii_lowercase()));
    Tag { hash: hasher.finish(), is_known: false }
}
