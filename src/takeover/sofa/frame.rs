// SPDX-License-Identifier: Apache-2.0
//! Bolt v1 frames as a client of SOFARegistry writes and reads them: a class that names the message,
//! no header map, and the message as content.

use prost::Message;

use crate::wire::Stop;
use crate::wire::bolt::{self, Kind};

/// A whole frame of the server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Frame<'a> {
    /// The last word of the class name.
    pub(super) class: &'a [u8],
    pub(super) content: &'a [u8],
    pub(super) id: u32,
    pub(super) kind: Kind,
    /// Of an answer; 0 is well.
    pub(super) status: u16,
}

/// The frame at the front of `bytes`, and how long it is; `None` if it is not whole yet.
///
/// # Errors
///
/// Whoever wrote this speaks something else.
pub(super) fn read(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, &'static str> {
    let frame = match bolt::parse(bytes) {
        Ok(frame) => frame,
        Err(Stop::NeedMore(_)) => return Ok(None),
        Err(Stop::NotMine) => return Err("it is not Bolt"),
        Err(Stop::Bad(why)) => return Err(why),
    };
    let len = usize::try_from(frame.frame_len).unwrap_or(usize::MAX);
    if len > FRAME_BYTES_MAX {
        return Err("a frame is larger than 32 MiB");
    }
    let Some(whole) = bytes.get(..len) else { return Ok(None) };
    if !bolt::is_intact(&frame, whole) {
        return Err("a checksum is wrong");
    }
    let (class, content) = parts(&frame, whole).ok_or("a frame is cut")?;
    let (id, kind, status) = (frame.request_id, frame.kind, frame.status);
    Ok(Some((Frame { class: last_word(class), content, id, kind, status }, len)))
}

/// Asks for something.
pub(super) fn request(out: &mut Vec<u8>, id: u32, class: &str, message: &impl Message) {
    let head = Head { direction: REQUEST, command: CALL, id, codec: PROTOBUF };
    head.write(out, &REQUEST_TIMEOUT_MS.to_be_bytes(), class, message);
}

/// Answers a request of the server.
pub(super) fn answer(out: &mut Vec<u8>, id: u32, class: &str, message: &impl Message) {
    let head = Head { direction: RESPONSE, command: ANSWER, id, codec: PROTOBUF };
    head.write(out, &STATUS_WELL, class, message);
}

/// "Are you there?"
pub(super) fn heartbeat(out: &mut Vec<u8>, id: u32) {
    out.extend(bolt::heartbeat(id));
}

/// "I am."
pub(super) fn heartbeat_answer(out: &mut Vec<u8>, id: u32) {
    let head = Head { direction: RESPONSE, command: HEARTBEAT, id, codec: HESSIAN };
    head.write(out, &STATUS_WELL, "", &());
}

struct Head {
    codec: u8,
    command: u16,
    direction: u8,
    id: u32,
}

impl Head {
    /// Requests carry a timeout where answers have a status.
    fn write(&self, out: &mut Vec<u8>, middle: &[u8], class: &str, message: &impl Message) {
        let class = if class.is_empty() { String::new() } else { format!("{PACKAGE}{class}") };
        out.extend([VERSION, self.direction]);
        out.extend(self.command.to_be_bytes());
        out.push(COMMAND_VERSION);
        out.extend(self.id.to_be_bytes());
        out.push(self.codec);
        out.extend(middle);
        let class_len = u16::try_from(class.len()).unwrap_or(0);
        out.extend(class_len.to_be_bytes());
        out.extend([0; 2]);
        let content_len = u32::try_from(message.encoded_len()).unwrap_or(u32::MAX);
        out.extend(content_len.to_be_bytes());
        out.extend(class.as_bytes());
        out.extend(message.encode_to_vec());
    }
}

/// Class and content of a whole frame.
fn parts<'a>(frame: &bolt::Frame<'_>, whole: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let is_answer = matches!(frame.kind, Kind::Response | Kind::HeartbeatAnswer);
    let lengths_at = match (frame.version, is_answer) {
        (1, true) => 12,
        (1, false) | (_, true) => 14,
        (_, false) => 16,
    };
    let len = |at: usize| {
        let bytes = whole.get(at..at + 2)?.try_into().ok()?;
        Some(usize::from(u16::from_be_bytes(bytes)))
    };
    let (class_at, class_len) = (lengths_at + 8, len(lengths_at)?);
    let content_at = class_at + class_len + len(lengths_at + 2)?;
    let end = whole.len() - if frame.has_crc { 4 } else { 0 };
    Some((whole.get(class_at..class_at + class_len)?, whole.get(content_at..end)?))
}

fn last_word(class: &[u8]) -> &[u8] {
    class.rsplit(|byte| *byte == b'.').next().unwrap_or_default()
}

/// A service with 50,000 providers fits.
const FRAME_BYTES_MAX: usize = 32 << 20;
/// Of every class name of this dialect.
const PACKAGE: &str = "com.alipay.sofa.registry.common.model.client.pb.";
const REQUEST_TIMEOUT_MS: i32 = 3_000;
const STATUS_WELL: [u8; 2] = [0; 2];
const VERSION: u8 = 1;
const COMMAND_VERSION: u8 = 1;
const RESPONSE: u8 = 0;
const REQUEST: u8 = 1;
const HEARTBEAT: u16 = 0;
const CALL: u16 = 1;
const ANSWER: u16 = 2;
const HESSIAN: u8 = 1;
const PROTOBUF: u8 = 11;
