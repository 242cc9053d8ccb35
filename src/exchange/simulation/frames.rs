// SPDX-License-Identifier: Apache-2.0
//! What the clients and servers of the simulation say to each other. Every frame carries a word that
//! tells whose it is, so that whoever gets it can tell whether it was meant for them.

use crate::wire::bolt::Crc;
use crate::wire::detect::Protocol;
use crate::wire::http1::{Body, Chunks};
use crate::wire::{Stop, bolt, dubbo, http1};

/// A request or an answer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Word {
    /// Of HTTP: the client says that it asks no more.
    pub(super) closes: bool,
    pub(super) id: u64,
    pub(super) len: usize,
    /// Its id as frames say it; those that servers ask are not told apart by it.
    pub(super) number: u64,
    /// Of its head, besides.
    pub(super) pad: usize,
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
            for part in ["uid", &"u".repeat(word.pad), "service", &name] {
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
            dubbo_frame(if one_way { 0x82 } else { 0xc2 }, 0, word.number, &body)
        }
        _ => {
            let host = if word.style == 1 { name.to_uppercase() + ":80" } else { name };
            let close = if word.closes { "Connection: close\r\n" } else { "" };
            let pad = "p".repeat(word.pad);
            let head = format!("POST /{pad} HTTP/1.1\r\nHost: {host}\r\n{close}");
            http_body(head, text, word.style.is_multiple_of(2))
        }
    }
}

/// A heartbeat; nothing in HTTP.
pub(super) fn heartbeat(protocol: Protocol, id: u64) -> Vec<u8> {
    match protocol {
        Protocol::Bolt => {
            let word = Word { number: id, ..Word::default() };
            bolt_frame(word, (1, 0), &[0, 0, 0x0b, 0xb8], &[], &[])
        }
        Protocol::Dubbo => dubbo_frame(0xe2, 0, id, b"N"),
        _ => Vec::new(),
    }
}

/// What a server says to one of ours.
pub(super) fn heartbeat_answer(protocol: Protocol, number: u64) -> Vec<u8> {
    match protocol {
        Protocol::Bolt => bolt_frame(Word { number, ..Word::default() }, (0, 0), &[0, 0], &[], &[]),
        _ => dubbo_frame(0x22, 20, number, b"N"),
    }
}

/// The answer to a request.
pub(super) fn answer(protocol: Protocol, word: Word, closes: bool) -> Vec<u8> {
    let text = word.text();
    match protocol {
        Protocol::Bolt => bolt_frame(word, (0, 2), &[0, 0], &[], text.as_bytes()),
        Protocol::Dubbo => dubbo_frame(2, 20, word.number, text.as_bytes()),
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
    frame.extend((word.number as u32).to_be_bytes());
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
    /// An answer with a word in it; with `closes` the last.
    Answers { closes: bool, number: u64, text: String },
    /// A request with a word in it, and whether it wants an answer.
    Asks { text: String, wants: bool },
    /// A heartbeat, which wants an answer or is one.
    Beat { number: u64, wants: bool },
    /// What comes before an answer of HTTP.
    Early,
    /// An answer that says no.
    Refused { closes: bool, number: u64 },
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
        Protocol::Bolt => find_bolt(bytes),
        Protocol::Dubbo => find_dubbo(bytes),
        _ if is_answer => {
            let head = read(http1::parse_answer(bytes, false), bytes)?;
            if head.status == 103 {
                return Some((Found::Early, head.head_len));
            }
            let len = http_len(bytes, head.head_len, head.body, end)?;
            let (closes, number, whole) = (head.closes, 0, &bytes[..len]);
            let found = match head.status {
                200 => Found::Answers { closes, number, text: word_in(whole) },
                _ => Found::Refused { closes, number },
            };
            Some((found, len))
        }
        _ => {
            let head = read(http1::parse(bytes), bytes)?;
            let len = http_len(bytes, head.head_len, head.body, end)?;
            Some((Found::Asks { text: word_in(&bytes[..len]), wants: true }, len))
        }
    }
}

fn find_bolt(bytes: &[u8]) -> Option<(Found, usize)> {
    let frame = read(bolt::parse(bytes), bytes)?;
    let whole = bytes.get(..frame.frame_len as usize)?;
    assert!(bolt::is_intact(&frame, whole));
    let number = u64::from(frame.request_id);
    let found = match frame.kind {
        bolt::Kind::Heartbeat => Found::Beat { number, wants: true },
        bolt::Kind::HeartbeatAnswer => Found::Beat { number, wants: false },
        bolt::Kind::Response if frame.status != 0 => Found::Refused { closes: false, number },
        bolt::Kind::Response => Found::Answers { closes: false, number, text: word_in(whole) },
        kind => Found::Asks { text: word_in(whole), wants: kind == bolt::Kind::Request },
    };
    Some((found, whole.len()))
}

fn find_dubbo(bytes: &[u8]) -> Option<(Found, usize)> {
    let frame = read(dubbo::parse(bytes), bytes)?;
    let whole = bytes.get(..frame.frame_len as usize)?;
    let number = frame.request_id;
    let found = match (frame.kind, frame.status) {
        (dubbo::Kind::Event { two_way: wants }, _) => Found::Beat { number, wants },
        (dubbo::Kind::Response, _) if frame.is_event => Found::Beat { number, wants: false },
        (dubbo::Kind::Response, 20) => {
            Found::Answers { closes: false, number, text: word_in(whole) }
        }
        (dubbo::Kind::Response, _) => Found::Refused { closes: false, number },
        (kind, _) => Found::Asks { text: word_in(whole), wants: kind == dubbo::Kind::Request },
    };
    Some((found, whole.len()))
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
