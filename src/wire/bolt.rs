// SPDX-License-Identifier: Apache-2.0
//! SOFABolt v1 and v2: frames with a header map that names the service.
//!
//! The Java peer reads the lengths of class and header as signed, so what is above 32767 is refused
//! rather than read differently from the one who gets it.

use super::{Reader, Stop, inside};

/// What a frame says of itself, before its content.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Frame<'a> {
    /// How the content is written: 1 Hessian2, 11 protobuf, 12 JSON.
    pub codec: u8,
    /// From the first byte to the last, the checksum included.
    pub frame_len: u64,
    /// It ends with a CRC-32 of everything before it.
    pub has_crc: bool,
    /// What it is for.
    pub kind: Kind,
    /// Of the sender's choice; a response repeats it.
    pub request_id: u32,
    /// `interface:version[:uniqueId]`; only in requests, and not in all of them.
    pub service: Option<&'a [u8]>,
    /// Of a response; 0 is well.
    pub status: u16,
    /// Of a request, in milliseconds; -1 is none.
    pub timeout_ms: i32,
    /// 1 or 2.
    pub version: u8,
}

/// What a frame is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// "Finish and connect again": only Go peers know it.
    Goaway,
    /// "Are you there?"
    Heartbeat,
    /// "I am."
    HeartbeatAnswer,
    /// Nobody may answer.
    OneWay,
    /// Wants an answer.
    Request,
    /// An answer.
    Response,
}

/// Reads the frame at the front of `bytes`, up to its content.
///
/// # Errors
///
/// Too few bytes, another protocol, or a frame that a peer would not write.
pub fn parse(bytes: &[u8]) -> Result<Frame<'_>, Stop> {
    let mut reader = Reader::new(bytes);
    let version = reader.u8()?;
    let has_trailer = match version {
        1 => false,
        2 => match reader.u8()? {
            1 => false,
            2 => true,
            _ => return Err(Stop::NotMine),
        },
        _ => return Err(Stop::NotMine),
    };
    let direction = reader.u8()?;
    if direction > ONE_WAY {
        return Err(Stop::NotMine);
    }
    let kind = kind(direction, reader.u16()?)?;
    let _command_version = reader.u8()?;
    let request_id = reader.u32()?;
    let codec = reader.u8()?;
    let has_crc = version == 2 && reader.u8()? & CRC_SWITCH != 0 && has_trailer;
    let (mut status, mut timeout_ms) = (0, 0);
    if direction == RESPONSE {
        status = reader.u16()?;
    } else {
        timeout_ms = reader.u32()?.cast_signed();
    }
    let (class_len, header_len) = (reader.u16()?, reader.u16()?);
    let content_len = reader.u32()?;
    if class_len > LENGTH_MAX || header_len > LENGTH_MAX || content_len > i32::MAX.cast_unsigned() {
        return Err(Stop::Bad("a length that Java would read as negative"));
    }
    let trailer = if has_crc { CRC_BYTES } else { 0 };
    let body = u64::from(class_len) + u64::from(header_len) + u64::from(content_len);
    let frame_len = reader.at as u64 + body + trailer;
    let service = match kind {
        Kind::Request | Kind::OneWay => {
            reader.take(usize::from(class_len))?;
            service(reader.take(usize::from(header_len))?)?
        }
        _ => None,
    };
    Ok(Frame { codec, frame_len, has_crc, kind, request_id, service, status, timeout_ms, version })
}

/// "Are you there?", as a client of v1 asks it.
#[must_use]
pub fn heartbeat(request_id: u32) -> [u8; 22] {
    let [a, b, c, d] = request_id.to_be_bytes();
    let [e, f, g, h] = HEARTBEAT_TIMEOUT_MS.to_be_bytes();
    let [high, low] = HEARTBEAT.to_be_bytes();
    [1, REQUEST, high, low, 1, a, b, c, d, HESSIAN, e, f, g, h, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// Whether the checksum of a whole frame is right; true for one that has none.
#[must_use]
pub fn is_intact(frame: &Frame<'_>, bytes: &[u8]) -> bool {
    if !frame.has_crc {
        return true;
    }
    let whole = usize::try_from(frame.frame_len).ok().and_then(|len| bytes.get(..len));
    let Some((before, trailer)) = whole.and_then(|whole| whole.split_last_chunk()) else {
        return false;
    };
    let mut crc = Crc::new();
    crc.add(before);
    crc.value() == u32::from_be_bytes(*trailer)
}

/// CRC-32 as zlib has it, byte by byte as they come.
#[derive(Clone, Copy, Debug)]
pub struct Crc(u32);

impl Crc {
    /// Of nothing.
    #[must_use]
    pub const fn new() -> Crc {
        Crc(u32::MAX)
    }

    /// Takes in more.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let [low, ..] = self.0.to_le_bytes();
            let entry = CRC_TABLE.get(usize::from(low ^ byte)).copied().unwrap_or_default();
            self.0 = entry ^ (self.0 >> 8);
        }
    }

    /// Of all bytes so far.
    #[must_use]
    pub const fn value(&self) -> u32 {
        !self.0
    }
}

impl Default for Crc {
    fn default() -> Crc {
        Crc::new()
    }
}

fn kind(direction: u8, command: u16) -> Result<Kind, Stop> {
    Ok(match (direction, command) {
        (RESPONSE, HEARTBEAT) => Kind::HeartbeatAnswer,
        (RESPONSE, _) => Kind::Response,
        (REQUEST, HEARTBEAT) => Kind::Heartbeat,
        (REQUEST, 1) => Kind::Request,
        (ONE_WAY, 1) => Kind::OneWay,
        (REQUEST | ONE_WAY, GOAWAY) => Kind::Goaway,
        _ => return Err(Stop::Bad("an unknown command")),
    })
}

/// The header map in any order: `service` says it, `sofa_head_target_service` may say it too, and
/// all that say it must agree.
fn service(header: &[u8]) -> Result<Option<&[u8]>, Stop> {
    let mut reader = Reader::new(header);
    let mut found: Option<&[u8]> = None;
    while reader.at < header.len() {
        let (key, value) = (text(&mut reader)?, text(&mut reader)?);
        let Some((key, value)) = key.zip(value) else { continue };
        if key != b"service" && key != b"sofa_head_target_service" {
            continue;
        }
        if found.is_some_and(|found| found != value) {
            return Err(Stop::Bad("two services are named"));
        }
        found = Some(value);
    }
    Ok(found.filter(|name| !name.is_empty()))
}

/// A length and so many bytes; a length of -1 is null.
fn text<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a [u8]>, Stop> {
    let len = inside(reader.u32(), CUT)?;
    if len == u32::MAX {
        return Ok(None);
    }
    let len = usize::try_from(len).map_err(|_| Stop::Bad(CUT))?;
    inside(reader.take(len), CUT).map(Some)
}

const CUT: &str = "the header map is cut";
const RESPONSE: u8 = 0;
const REQUEST: u8 = 1;
const ONE_WAY: u8 = 2;
const HEARTBEAT: u16 = 0;
const GOAWAY: u16 = 100;
const CRC_SWITCH: u8 = 1;
const CRC_BYTES: u64 = 4;
const LENGTH_MAX: u16 = 32_767;
/// What Java peers say; nobody looks at it.
const HEARTBEAT_TIMEOUT_MS: u32 = 3_000;
/// A codec: of nothing, here.
const HESSIAN: u8 = 1;

/// The remainders of all bytes by the polynomial 0xedb88320.
const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    #[expect(clippy::indexing_slicing, reason = "the compiler checks it")]
    #[expect(clippy::cast_possible_truncation, reason = "it is below 256")]
    while byte < 256 {
        let (mut remainder, mut bit) = (byte as u32, 0);
        while bit < 8 {
            remainder =
                if remainder & 1 == 1 { 0xedb8_8320 ^ (remainder >> 1) } else { remainder >> 1 };
            bit += 1;
        }
        table[byte] = remainder;
        byte += 1;
    }
    table
};
