// SPDX-License-Identifier: Apache-2.0
//! What requests and answers say that matters for their way, in the same words for every protocol.
//!
//! Pure functions over `wire`; names are looked up in the table in force.

use super::naming;
use crate::service::{ServiceId, Table};
use crate::wire::detect::Protocol;
use crate::wire::http1::{Body, Chunks};
use crate::wire::{Stop, bolt, dubbo, http1};

/// How long a frame is, from its first byte.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Extent {
    /// So many bytes.
    Bytes(u64),
    /// So many, and then a body in chunks.
    Chunked(u64),
    /// To the end of the connection.
    End,
}

/// A frame of the downstream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Ask {
    pub(super) extent: Extent,
    pub(super) kind: AskKind,
    pub(super) mark: Mark,
    /// As the frame says; `None` for the usual time.
    pub(super) timeout_ms: Option<u32>,
}

/// What a frame of the downstream wants.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum AskKind {
    /// An answer to what an upstream has asked.
    Answer,
    /// Whether we are there.
    Heartbeat,
    /// Nothing.
    Nothing,
    /// Something of a service (`None`: of nobody known here), without an answer.
    OneWay(Option<ServiceId>),
    /// An answer of a service.
    Request(Option<ServiceId>),
}

/// What must be remembered of a request to answer it ourselves.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Mark {
    /// Of HTTP: its answer is the last on the connection.
    pub(super) closes: bool,
    /// Of Bolt: how contents are written; of Dubbo: how bodies are.
    pub(super) codec: u8,
    /// Of HTTP: its body may never come once we have answered ourselves.
    pub(super) expects: bool,
    pub(super) id: u64,
    /// Of HTTP: its answer has no body.
    pub(super) is_head: bool,
    /// Of HTTP: a good answer makes the connection something else.
    pub(super) may_open: bool,
    /// Of Bolt: 1 or 2.
    pub(super) version: u8,
}

/// A frame of an upstream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Reply {
    /// The upstream will take no more requests on this connection.
    pub(super) closes: bool,
    pub(super) extent: Extent,
    pub(super) kind: ReplyKind,
}

/// What a frame of an upstream is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ReplyKind {
    /// To the request of this id.
    Answer(u64),
    /// Before the answer, which is still to come.
    Before,
    /// It asks something of the downstream.
    Callback(Mark),
    Heartbeat(Mark),
    Nothing,
    /// The answer, and from now on both sides say what they like.
    Open,
    /// It tells the downstream something.
    Push(Mark),
}

/// The frame at the front of what the downstream has said; it may be for the service it `called` last.
pub(super) fn ask(
    protocol: Protocol,
    bytes: &[u8],
    called: Option<ServiceId>,
    table: &Table,
) -> Result<Ask, Stop> {
    match protocol {
        Protocol::Bolt => ask_bolt(&bolt::parse(bytes)?, called, table),
        Protocol::Dubbo => ask_dubbo(&dubbo::parse(bytes)?, table),
        Protocol::Http1 if bytes.first() == Some(&b'\r') => empty_line(bytes),
        Protocol::Http1 => ask_http1(&http1::parse(bytes)?, table),
        Protocol::Http2 | Protocol::Tls => Err(Stop::NotMine),
    }
}

fn ask_bolt(
    frame: &bolt::Frame<'_>,
    called: Option<ServiceId>,
    table: &Table,
) -> Result<Ask, Stop> {
    let service = frame.service.and_then(|name| {
        let again = called.filter(|id| naming::is_named(*id, name, table));
        again.or_else(|| naming::by_name(name, table))
    });
    let kind = match frame.kind {
        bolt::Kind::Goaway | bolt::Kind::HeartbeatAnswer => AskKind::Nothing,
        bolt::Kind::Heartbeat => AskKind::Heartbeat,
        bolt::Kind::OneWay => AskKind::OneWay(service),
        bolt::Kind::Request => AskKind::Request(service),
        bolt::Kind::Response => AskKind::Answer,
    };
    let extent = Extent::Bytes(frame.frame_len);
    Ok(Ask {
        extent,
        kind,
        mark: mark_of_bolt(frame),
        timeout_ms: u32::try_from(frame.timeout_ms).ok(),
    })
}

fn mark_of_bolt(frame: &bolt::Frame<'_>) -> Mark {
    let id = u64::from(frame.request_id);
    Mark { codec: frame.codec, id, version: frame.version, ..Mark::default() }
}

fn ask_dubbo(frame: &dubbo::Frame<'_>, table: &Table) -> Result<Ask, Stop> {
    let service = frame.service.and_then(|service| naming::of_dubbo(service, table));
    let kind = match frame.kind {
        dubbo::Kind::Event { two_way: true } => AskKind::Heartbeat,
        dubbo::Kind::Event { two_way: false } => AskKind::Nothing,
        dubbo::Kind::OneWay => AskKind::OneWay(service),
        dubbo::Kind::Request => AskKind::Request(service),
        dubbo::Kind::Response => AskKind::Answer,
    };
    let extent = Extent::Bytes(frame.frame_len);
    Ok(Ask { extent, kind, mark: mark_of_dubbo(frame), timeout_ms: None })
}

fn mark_of_dubbo(frame: &dubbo::Frame<'_>) -> Mark {
    Mark { codec: frame.serialization, id: frame.request_id, ..Mark::default() }
}

fn ask_http1(head: &http1::Head<'_>, table: &Table) -> Result<Ask, Stop> {
    let extent = match head.body {
        Body::Chunked => Extent::Chunked(head.head_len as u64),
        Body::Length(len) => Extent::Bytes(head.head_len as u64 + len),
        Body::End => return Err(Stop::Bad("a request without end")),
    };
    let is_head = head.method == b"HEAD";
    let codec = if head.method == b"CONNECT" { CONNECT } else { 0 };
    let (closes, expects, may_open) = (head.closes, head.expects_continue, head.is_upgrade);
    let mark = Mark { closes, codec, expects, is_head, may_open, ..Mark::default() };
    let kind = AskKind::Request(naming::of_http1(head, table));
    Ok(Ask { extent, kind, mark, timeout_ms: None })
}

/// Before a request it means nothing (RFC 9112, 2.2): some clients put it behind a body.
fn empty_line(bytes: &[u8]) -> Result<Ask, Stop> {
    match bytes.get(1) {
        None => Err(Stop::NeedMore(2)),
        Some(b'\n') => Ok(Ask {
            extent: Extent::Bytes(2),
            kind: AskKind::Nothing,
            mark: Mark::default(),
            timeout_ms: None,
        }),
        Some(_) => Err(Stop::Bad("a bare CR")),
    }
}

/// The frame at the front of what an upstream has said; `to` is the request that HTTP answers.
pub(super) fn reply(protocol: Protocol, bytes: &[u8], to: Option<Mark>) -> Result<Reply, Stop> {
    match protocol {
        Protocol::Bolt => Ok(reply_bolt(&bolt::parse(bytes)?)),
        Protocol::Dubbo => {
            let frame = dubbo::parse(bytes)?;
            // Whether an event says read only stands in its body.
            let needed =
                usize::try_from(frame.frame_len).map_or(EVENT_BYTES, |len| len.min(EVENT_BYTES));
            let is_there = !frame.is_event || bytes.len() >= needed;
            if is_there { Ok(reply_dubbo(&frame, bytes)) } else { Err(Stop::NeedMore(needed)) }
        }
        Protocol::Http1 => {
            let to = to.ok_or(Stop::Bad("an answer that nobody has asked for"))?;
            Ok(reply_http1(http1::parse_answer(bytes, to.is_head)?, to))
        }
        // All of it is for whoever opened the connection.
        Protocol::Http2 => {
            Ok(Reply { closes: false, extent: Extent::End, kind: ReplyKind::Before })
        }
        Protocol::Tls => Err(Stop::NotMine),
    }
}

fn reply_bolt(frame: &bolt::Frame<'_>) -> Reply {
    let kind = match frame.kind {
        bolt::Kind::Goaway | bolt::Kind::HeartbeatAnswer => ReplyKind::Nothing,
        bolt::Kind::Heartbeat => ReplyKind::Heartbeat(mark_of_bolt(frame)),
        bolt::Kind::OneWay => ReplyKind::Push(mark_of_bolt(frame)),
        bolt::Kind::Request => ReplyKind::Callback(mark_of_bolt(frame)),
        bolt::Kind::Response => ReplyKind::Answer(u64::from(frame.request_id)),
    };
    let closes = frame.kind == bolt::Kind::Goaway;
    Reply { closes, extent: Extent::Bytes(frame.frame_len), kind }
}

fn reply_dubbo(frame: &dubbo::Frame<'_>, bytes: &[u8]) -> Reply {
    let kind = match frame.kind {
        dubbo::Kind::Event { two_way: true } => ReplyKind::Heartbeat(mark_of_dubbo(frame)),
        dubbo::Kind::Event { two_way: false } => ReplyKind::Nothing,
        dubbo::Kind::OneWay => ReplyKind::Push(mark_of_dubbo(frame)),
        dubbo::Kind::Request => ReplyKind::Callback(mark_of_dubbo(frame)),
        dubbo::Kind::Response if frame.is_event => ReplyKind::Nothing,
        dubbo::Kind::Response => ReplyKind::Answer(frame.request_id),
    };
    // A provider that shuts down says `R`, read only, as the body of an event.
    let is_event = matches!(frame.kind, dubbo::Kind::Event { .. });
    let closes = is_event && bytes.get(16..EVENT_BYTES) == Some(b"\x01R");
    Reply { closes, extent: Extent::Bytes(frame.frame_len), kind }
}

fn reply_http1(answer: http1::Answer, to: Mark) -> Reply {
    let http1::Answer { body, closes, head_len, status } = answer;
    let head = head_len as u64;
    let kind = match status {
        101 if to.may_open => ReplyKind::Open,
        200..=299 if to.codec == CONNECT => ReplyKind::Open,
        100..=199 => ReplyKind::Before,
        _ => ReplyKind::Answer(to.id),
    };
    let extent = match body {
        _ if kind == ReplyKind::Open => Extent::End,
        Body::Chunked => Extent::Chunked(head),
        Body::End => Extent::End,
        Body::Length(len) => Extent::Bytes(head + len),
    };
    Reply { closes: closes && kind != ReplyKind::Open, extent, kind }
}

/// Where a frame goes on after its head was read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Reading {
    /// The next frame is to begin.
    Between,
    /// So many bytes are left of it.
    Bytes(u64),
    /// A body in chunks follows so many bytes.
    Chunked(u64, Chunks),
    /// To the end of the connection.
    Rest,
}

impl Reading {
    pub(super) const fn of(extent: Extent) -> Reading {
        match extent {
            Extent::Bytes(bytes) => Reading::Bytes(bytes),
            Extent::Chunked(head) => Reading::Chunked(head, Chunks::new()),
            Extent::End => Reading::Rest,
        }
    }

    /// How many of these bytes belong to the frame.
    pub(super) fn eat(&mut self, bytes: &[u8]) -> Result<u32, Stop> {
        let count = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        let here = bytes.len() as u64;
        Ok(match self {
            Reading::Between => 0,
            Reading::Bytes(left) | Reading::Chunked(left @ 1.., _) => {
                let eaten = here.min(*left);
                *left -= eaten;
                if *self == Reading::Bytes(0) {
                    *self = Reading::Between;
                }
                count(eaten)
            }
            Reading::Chunked(_, chunks) => {
                let eaten = chunks.eat(bytes)? as u64;
                if chunks.is_over() {
                    *self = Reading::Between;
                }
                count(eaten)
            }
            Reading::Rest => count(here),
        })
    }
}

/// Of a Dubbo event up to the end of a body of one letter.
const EVENT_BYTES: usize = 18;
/// `Mark::codec` of an HTTP request that asks for a tunnel.
pub(super) const CONNECT: u8 = 1;
