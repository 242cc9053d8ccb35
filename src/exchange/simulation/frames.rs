// SPDX-License-Identifier: Apache-2.0
//! What the clients and servers of the simulation say to each other. Every frame carries a word that
//! tells whose it is, so that whoever gets it can tell whether it was meant for them.

use crate::wire::bolt::Crc;
use crate::wire::detect::Protocol;
use crate::wire::http1::{Body, Chunks};
use crate::wire::{Stop, bolt, dubbo, http1};

/// A request or an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Word {
    pub(super) id: u64,
    pub(super) len: usize,
    /// Number of the service; `STRANGER` is nobody's.
    pub(super) service: u64,
    /// Of four ways to write it.
    pub(super) style: u64,
}

pub(super) const STRANGER: u64 = 9;

impl Word {
    /// What tells it from all others.
    pub(super) fn text(self) -> String {
        let Word { id, len, service, .. } = self;
        format!("word/{service}/{id}/{}/end", "x".repeat(len))
    }

    pub(super) fn name(self) -> String {
        format!("com.s{}", self.service)
    }
}

/// A request; nobody answers one that is `one_way`.
pub(super) fn request(protocol: Protocol, word: Word, one_way: bool) -> Vec<u8> {
    let (text, name) = (word.text(), word.name());
    match protocol {
        Protocol::Bolt => {
            let mut header = Vec::new();
            for part in ["uid", "", "service", &name] {
                header.extend((part.len() as u32).to_be_bytes());
                header.extend(part.bytes());
            }
            let direction = if one_way { 2 } else { 1 };
            bolt_frame(word, (direction, 1), &[0, 0, 0x0b, 0xb8], &header, text.as_bytes())
        }
        Protocol::Dubbo => {
            let mut body = Vec::new();
            for part in ["2.0.2", &name, ""] {
                body.push(part.len() as u8);
                body.extend(part.bytes());
            }
            body.extend(text.bytes());
            dubbo_frame(if one_way { 0x82 } else { 0xc2 }, 0, word.id, &body)
        }
        _ => {
            let host = if word.style == 1 { name.to_uppercase() + ":80" } else { name };
            let head = format!("POST /{} HTTP/1.1\r\nHost: {host}\r\n", word.id);
            http_body(head, text, word.style.is_multiple_of(2))
        }
    }
}

/// A heartbeat of the client; nothing in HTTP.
pub(super) fn heartbeat(protocol: Protocol, id: u64) -> Vec<u8> {
    match protocol {
        Protocol::Bolt => {
            let word = Word { id, len: 0, service: 0, style: 0 };
            bolt_frame(word, (1, 0), &[0, 0, 0x0b, 0xb8], &[], &[])
        }
        Protocol::Dubbo => dubbo_frame(0xe2, 0, id, b"N"),
        _ => Vec::new(),
    }
}

/// The answer to a request.
pub(super) fn answer(protocol: Protocol, word: Word, closes: bool) -> Vec<u8> {
    let text = word.text();
    match protocol {
        Protocol::Bolt => bolt_frame(word, (0, 2), &[0, 0], &[], text.as_bytes()),
        Protocol::Dubbo => dubbo_frame(2, 20, word.id, text.as_bytes()),
        _ if closes && word.style < 2 => {
            format!("HTTP/1.1 200 OK\r\nX: y\r\n\r\n{text}").into_bytes()
        }
        _ => {
            let before = if word.style == 3 { "HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" } else { "" };
            let close = if closes { "Connection: close\r\n" } else { "" };
            let head = format!("{before}HTTP/1.1 200 OK\r\n{close}");
            http_body(head, text, word.style.is_multiple_of(2))
        }
    }
}

fn bolt_frame(
    word: Word,
    (direction, command): (u8, u8),
    middle: &[u8],
    header: &[u8],
    content: &[u8],
) -> Vec<u8> {
    let is_v2 = word.style >= 2;
    let mut frame = if is_v2 { vec![2, 2, direction] } else { vec![1, direction] };
    frame.extend([0, command, 1]);
    frame.extend((word.id as u32).to_be_bytes());
    frame.push(11);
    frame.extend(is_v2.then_some(1));
    frame.extend(middle);
    frame.extend(0u16.to_be_bytes());
    frame.extend((header.len() as u16).to_be_bytes());
    frame.extend((content.len() as u32).to_be_bytes());
    frame.extend(header);
    frame.extend(content);
    if is_v2 {
        let mut crc = Crc::new();
        crc.add(&frame);
        frame.extend(crc.value().to_be_bytes());
    }
    frame
}

fn dubbo_frame(flags: u8, status: u8, id: u64, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xda, 0xbb, flags, status];
    frame.extend(id.to_be_bytes());
    frame.extend((body.len() as u32).to_be_bytes());
    frame.extend(body);
    frame
}

fn http_body(head: String, text: String, chunked: bool) -> Vec<u8> {
    if !chunked {
        return format!("{head}Content-Length: {}\r\n\r\n{text}", text.len()).into_bytes();
    }
    let len = text.len();
    format!("{head}Transfer-Encoding: chunked\r\n\r\n{len:x};a=b\r\n{text}\r\n0\r\nT: u\r\n\r\n")
        .into()
}

/// A whole frame at the front of a stream.
#[derive(Debug)]
pub(super) enum Found {
    /// Nobody wants an answer to it, or it is one to a heartbeat.
    Beat,
    /// A request or an answer with a word in it, and whether it wants an answer or is the last.
    Full(u64, String, bool),
    /// An answer that says no, to this id.
    Refused(u64, bool),
}

/// The first frame of `bytes`, and its length; `None` if it is not whole. At the `end` of a stream an
/// answer may have no other end.
pub(super) fn find(
    protocol: Protocol,
    bytes: &[u8],
    is_answer: bool,
    end: bool,
) -> Option<(Found, usize)> {
    match protocol {
        Protocol::Bolt => {
            let frame = read(bolt::parse(bytes), bytes)?;
            let whole = bytes.get(..frame.frame_len as usize)?;
            assert!(bolt::is_intact(&frame, whole));
            let id = u64::from(frame.request_id);
            let found = match frame.kind {
                bolt::Kind::Heartbeat | bolt::Kind::HeartbeatAnswer => Found::Beat,
                _ if frame.status != 0 => Found::Refused(id, false),
                kind => Found::Full(id, word_in(whole), kind == bolt::Kind::Request),
            };
            Some((found, whole.len()))
        }
        Protocol::Dubbo => {
            let frame = read(dubbo::parse(bytes), bytes)?;
            let whole = bytes.get(..frame.frame_len as usize)?;
            let found = match (frame.is_event, frame.status) {
                (true, _) => Found::Beat,
                (_, 0 | 20) => {
                    let wants = frame.kind == dubbo::Kind::Request;
                    Found::Full(frame.request_id, word_in(whole), wants)
                }
                _ => Found::Refused(frame.request_id, false),
            };
            Some((found, whole.len()))
        }
        _ if is_answer => {
            let head = read(http1::parse_answer(bytes, false), bytes)?;
            if head.status == 103 {
                return Some((Found::Beat, head.head_len));
            }
            let len = http_len(bytes, head.head_len, head.body, end)?;
            let whole = &bytes[..len];
            let found = match head.status {
                200 => Found::Full(0, word_in(whole), head.closes),
                _ => Found::Refused(0, head.closes),
            };
            Some((found, len))
        }
        _ => {
            let head = read(http1::parse(bytes), bytes)?;
            let len = http_len(bytes, head.head_len, head.body, end)?;
            Some((Found::Full(0, word_in(&bytes[..len]), true), len))
        }
    }
}

fn read<T>(result: Result<T, Stop>, bytes: &[u8]) -> Option<T> {
    match result {
        Ok(found) => Some(found),
        Err(Stop::NeedMore(_)) => None,
        Err(stop) => panic!("{stop:?} in {:?}", String::from_utf8_lossy(bytes)),
    }
}

fn http_len(bytes: &[u8], head: usize, body: Body, end: bool) -> Option<usize> {
    let len = match body {
        Body::Length(len) => head + len as usize,
        Body::End => return end.then_some(bytes.len()),
        Body::Chunked => {
            let mut chunks = Chunks::new();
            let eaten = chunks.eat(&bytes[head..]).expect("chunks as they were sent");
            return chunks.is_over().then_some(head + eaten);
        }
    };
    (bytes.len() >= len).then_some(len)
}

fn word_in(frame: &[u8]) -> String {
    let text = String::from_utf8_lossy(frame);
    let word = &text[text.find("word/").expect("a word")..];
    word[..word.find("/end").expect("its end") + 4].to_owned()
}
