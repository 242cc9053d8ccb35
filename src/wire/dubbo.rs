// SPDX-License-Identifier: Apache-2.0
//! Dubbo 2.x: frames whose body begins with the interface and its version.
//!
//! The group of a service stands behind its arguments and is not read: interface and version name
//! it. Of the serializations only Hessian2 can be read; a request in another one has no service.

use super::{Reader, Stop, hessian};

/// What a frame says of itself, before its arguments.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Frame<'a> {
    /// From the first byte to the last.
    pub frame_len: u64,
    /// It is no call, and answers none.
    pub is_event: bool,
    /// What it is for.
    pub kind: Kind,
    /// Of the sender's choice; a response repeats it.
    pub request_id: u64,
    /// How the body is written: 2 Hessian2.
    pub serialization: u8,
    /// Only in requests whose body can be read.
    pub service: Option<Service<'a>>,
    /// Of a response; 20 is well.
    pub status: u8,
}

/// What a request is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Service<'a> {
    /// The interface.
    pub path: &'a [u8],
    /// Empty where there is none.
    pub version: &'a [u8],
}

/// What a frame is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Heartbeat or read-only; wants an answer only as `Event { two_way: true }`.
    Event {
        /// It wants an answer.
        two_way: bool,
    },
    /// Nobody may answer.
    OneWay,
    /// Wants an answer.
    Request,
    /// An answer, to a request or an event.
    Response,
}

/// Reads the frame at the front of `bytes`, up to its arguments.
///
/// # Errors
///
/// Too few bytes, another protocol, or a frame that a peer would not write.
pub fn parse(bytes: &[u8]) -> Result<Frame<'_>, Stop> {
    let mut reader = Reader::new(bytes);
    if reader.u8()? != MAGIC[0] || reader.u8()? != MAGIC[1] {
        return Err(Stop::NotMine);
    }
    let flags = reader.u8()?;
    let status = reader.u8()?;
    let request_id = reader.u64()?;
    let body_len = reader.u32()?;
    if body_len > i32::MAX.cast_unsigned() {
        return Err(Stop::Bad("a length that Java would read as negative"));
    }
    let kind = match (flags & REQUEST != 0, flags & EVENT != 0, flags & TWO_WAY != 0) {
        (false, ..) => Kind::Response,
        (true, true, two_way) => Kind::Event { two_way },
        (true, false, true) => Kind::Request,
        (true, false, false) => Kind::OneWay,
    };
    let serialization = flags & SERIALIZATION;
    let can_read = matches!(serialization, HESSIAN2 | HESSIAN2_NATIVE);
    let service = match kind {
        Kind::Request | Kind::OneWay if can_read => {
            let end = reader.at + usize::try_from(body_len).unwrap_or(usize::MAX);
            Some(service(&mut reader, end)?)
        }
        _ => None,
    };
    let frame_len = HEADER_BYTES + u64::from(body_len);
    let is_event = flags & EVENT != 0;
    Ok(Frame { frame_len, is_event, kind, request_id, serialization, service, status })
}

/// "Are you there?": an event that wants an answer, with nothing in it.
#[must_use]
pub fn heartbeat(request_id: u64) -> [u8; 17] {
    let [a, b, c, d, e, f, g, h] = request_id.to_be_bytes();
    let flags = REQUEST | TWO_WAY | EVENT | HESSIAN2;
    [MAGIC[0], MAGIC[1], flags, 0, a, b, c, d, e, f, g, h, 0, 0, 0, 1, hessian::NULL]
}

/// The first three strings: Dubbo's own version, the interface, the interface's version.
fn service<'a>(reader: &mut Reader<'a>, end: usize) -> Result<Service<'a>, Stop> {
    // Nothing behind the body belongs to it.
    let whole = reader.bytes;
    reader.bytes = whole.get(..end).unwrap_or(whole);
    let is_whole = whole.len() >= end;
    let mut string = || match hessian::string(reader) {
        Err(Stop::NeedMore(needed)) if is_whole || needed > end => {
            Err(Stop::Bad("the body is cut"))
        }
        result => result,
    };
    let _protocol = string()?;
    let path = string()?.filter(|path| !path.is_empty());
    let path = path.ok_or(Stop::Bad("no interface is named"))?;
    let version = string()?.filter(|version| *version != b"0.0.0").unwrap_or_default();
    Ok(Service { path, version })
}

const MAGIC: [u8; 2] = [0xda, 0xbb];
const HEADER_BYTES: u64 = 16;
const REQUEST: u8 = 0x80;
const TWO_WAY: u8 = 0x40;
const EVENT: u8 = 0x20;
const SERIALIZATION: u8 = 0x1f;
const HESSIAN2: u8 = 2;
const HESSIAN2_NATIVE: u8 = 10;
