// SPDX-License-Identifier: Apache-2.0
//! HTTP/2: what a connection's first request is for.
//!
//! Reads the preface, the frames before the first HEADERS, and that header block with its
//! CONTINUATIONs. Later requests of the connection may name other services: whoever routes by this
//! routes the connection.

use super::{Name, Reader, Stop, hpack};

pub use streams::{Requested, Streams};

mod streams;

/// The first request of a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Opening {
    /// `host:port` as the client wrote it; empty if it did not.
    pub authority: Name,
    /// Bytes up to the end of the header block.
    pub len: usize,
    /// With its query, cut at the longest name.
    pub path: Name,
}

impl Opening {
    /// Of gRPC and Triple: `/package.Service/Method` without slashes and method.
    #[must_use]
    pub fn grpc_service(&self) -> Option<&[u8]> {
        service_in(&self.path)
    }

    /// The authority without its port.
    #[must_use]
    pub fn host(&self) -> &[u8] {
        super::http1::without_port(self.authority.as_bytes())
    }
}

fn service_in(path: &Name) -> Option<&[u8]> {
    let mut parts = path.as_bytes().strip_prefix(b"/")?.splitn(2, |byte| *byte == b'/');
    let service = parts.next().filter(|service| !service.is_empty())?;
    parts.next().map(|_| service)
}

/// Reads from the preface on.
///
/// # Errors
///
/// Too few bytes, another protocol, or frames that no client would begin with.
pub fn parse(bytes: &[u8]) -> Result<Opening, Stop> {
    let common = bytes.iter().zip(PREFACE).take_while(|(one, other)| *one == *other).count();
    if common < bytes.len().min(PREFACE.len()) {
        return Err(Stop::NotMine);
    }
    let mut reader = Reader::new(bytes);
    reader.take(PREFACE.len())?;
    let mut is_first = true;
    loop {
        let frame = Frame::read(&mut reader)?;
        match (is_first, frame.kind) {
            (true, SETTINGS) | (false, SETTINGS | WINDOW_UPDATE | PRIORITY | PING) => {
                reader.take(frame.len)?;
            }
            (false, HEADERS) if frame.stream % 2 == 1 => {
                let mut block = Block::open(reader, frame)?;
                let hpack::Names { authority, path } = hpack::decode(&mut block)?;
                return Ok(Opening { authority, len: block.next_frame, path });
            }
            _ => return Err(Stop::Bad("a frame that no client begins with")),
        }
        is_first = false;
    }
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    flags: u8,
    kind: u8,
    len: usize,
    stream: u32,
}

impl Frame {
    fn read(reader: &mut Reader<'_>) -> Result<Frame, Stop> {
        if reader.at > OPENING_BYTES_MAX {
            return Err(Stop::Bad("too much before the first request"));
        }
        let frame = Frame::any(reader)?;
        if frame.len > FRAME_BYTES_MAX {
            return Err(Stop::Bad("a frame larger than allowed"));
        }
        Ok(frame)
    }

    /// Of any size: a server may have allowed more than we know.
    fn any(reader: &mut Reader<'_>) -> Result<Frame, Stop> {
        let len = reader.u24()? as usize;
        let (kind, flags) = (reader.u8()?, reader.u8()?);
        let stream = reader.u32()? & 0x7fff_ffff;
        Ok(Frame { flags, kind, len, stream })
    }
}

/// A header block, read byte by byte over the frames that it is in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a> {
    at: usize,
    bytes: &'a [u8],
    end: usize,
    is_last: bool,
    next_frame: usize,
    stream: u32,
}

impl<'a> Block<'a> {
    /// Of a HEADERS frame, whose head was just read.
    fn open(reader: Reader<'a>, frame: Frame) -> Result<Block<'a>, Stop> {
        let next_frame = reader.at + frame.len;
        let mut reader = reader;
        let mut front = |flag: u8, len: usize| {
            if frame.flags & flag == 0 {
                return Ok(0);
            }
            let at = reader.at;
            let taken = reader.take(len)?;
            if at + len > next_frame {
                return Err(Stop::Bad(CUT));
            }
            Ok(taken.first().copied().map_or(0, usize::from))
        };
        let padding = front(PADDED, 1)?;
        front(PRIORITY_FLAG, 5)?;
        let end = next_frame.checked_sub(padding).filter(|end| *end >= reader.at);
        let end = end.ok_or(Stop::Bad(CUT))?;
        let is_last = frame.flags & END_HEADERS != 0;
        let Reader { at, bytes } = reader;
        Ok(Block { at, bytes, end, is_last, next_frame, stream: frame.stream })
    }

    /// The next byte; `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<u8>, Stop> {
        while self.at == self.end {
            if self.is_last {
                // The padding, too, must be there.
                let is_there = self.bytes.len() >= self.next_frame;
                return if is_there { Ok(None) } else { Err(Stop::NeedMore(self.next_frame)) };
            }
            let mut reader = Reader { at: self.next_frame, bytes: self.bytes };
            let frame = Frame::read(&mut reader)?;
            if frame.kind != CONTINUATION || frame.stream != self.stream {
                return Err(Stop::Bad("a header block is interrupted"));
            }
            (self.at, self.end) = (reader.at, reader.at + frame.len);
            (self.is_last, self.next_frame) = (frame.flags & END_HEADERS != 0, self.end);
        }
        let byte = self.bytes.get(self.at).copied().ok_or(Stop::NeedMore(self.at + 1))?;
        self.at += 1;
        Ok(Some(byte))
    }

    /// A byte that must come.
    pub(super) fn must(&mut self) -> Result<u8, Stop> {
        self.next()?.ok_or(Stop::Bad(CUT))
    }

    /// An integer whose first bits are in `first` below `mask` (RFC 7541, 5.1).
    pub(super) fn number(&mut self, first: u8, mask: u8) -> Result<usize, Stop> {
        let mut number = usize::from(first & mask);
        if first & mask != mask {
            return Ok(number);
        }
        for shift in [0, 7, 14] {
            let byte = self.must()?;
            number += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Stop::Bad("a number too large"))
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const CUT: &str = "a header block is cut";
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY_FLAG: u8 = 0x20;
/// SETTINGS_MAX_FRAME_SIZE as it is until we say otherwise.
const FRAME_BYTES_MAX: usize = 16_384;
/// Up to the last frame that may begin.
const OPENING_BYTES_MAX: usize = 64 * 1024;
