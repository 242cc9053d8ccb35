// SPDX-License-Identifier: Apache-2.0
//! What weir says itself, in the caller's own protocol: errors, and answers to heartbeats.

use super::speech::Mark;
use crate::wire::detect::Protocol;

/// Why a request gets no answer of its service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Failure {
    /// It cannot be read, and nothing behind it.
    Bad,
    /// The upstream was lost with the request in its hands.
    Broken,
    /// No endpoint can be reached.
    NoEndpoint,
    /// Too many upstreams or too much else at once.
    Overload,
    /// No answer came in time.
    Timeout,
    /// Nobody knows the service here.
    UnknownService,
}

/// A frame of our own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text {
    bytes: [u8; Text::BYTES_MAX],
    len: usize,
}

impl Text {
    /// What one header of the ring holds.
    const BYTES_MAX: usize = 128;

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    const fn empty() -> Text {
        Text { bytes: [0; Text::BYTES_MAX], len: 0 }
    }

    fn put(mut self, more: &[u8]) -> Text {
        let end = self.len + more.len();
        if let Some(place) = self.bytes.get_mut(self.len..end) {
            place.copy_from_slice(more);
            self.len = end;
        }
        self
    }
}

/// The answer to a request that failed.
pub(super) fn refusal(protocol: Protocol, mark: Mark, failure: Failure) -> Text {
    match protocol {
        Protocol::Bolt => bolt(mark, RESPONSE, bolt_status(failure)),
        Protocol::Dubbo => {
            let why = dubbo_text(failure).as_bytes();
            let len = u8::try_from(why.len()).unwrap_or(0);
            // Below 32 characters the first byte of a Hessian2 string is its length.
            dubbo(HESSIAN2, dubbo_status(failure), mark.id, &[&[len], why])
        }
        _ => {
            let is_last = mark.closes || mark.expects || failure == Failure::Bad;
            let close = if is_last { "Connection: close\r\n" } else { "" };
            let parts =
                ["HTTP/1.1 ", http1_status(failure), "\r\nContent-Length: 0\r\n", close, "\r\n"];
            parts.into_iter().fold(Text::empty(), |text, part| text.put(part.as_bytes()))
        }
    }
}

/// The answer to a heartbeat; empty where there are none.
pub(super) fn heartbeat(protocol: Protocol, mark: Mark) -> Text {
    match protocol {
        Protocol::Bolt => bolt(mark, HEARTBEAT, 0),
        Protocol::Dubbo => dubbo(EVENT | mark.codec, DUBBO_OK, mark.id, &[NULL]),
        _ => Text::empty(),
    }
}

/// Whether the upstream is still there, in the words of the last that it has said.
pub(super) fn probe(protocol: Protocol, mark: Mark) -> Text {
    match protocol {
        Protocol::Bolt => bolt_head(mark, REQUEST, HEARTBEAT).put(&PROBE_TIMEOUT_MS).put(&[0; 8]),
        Protocol::Dubbo => dubbo(PROBE | EVENT | mark.codec, 0, mark.id, &[NULL]),
        _ => Text::empty(),
    }
}

/// Without class, header, content and checksum.
fn bolt(mark: Mark, command: u8, status: u8) -> Text {
    bolt_head(mark, 0, command).put(&[0, status]).put(&[0; 8])
}

fn bolt_head(mark: Mark, direction: u8, command: u8) -> Text {
    let [.., a, b, c, d] = mark.id.to_be_bytes();
    let (version, edition): (&[u8], _) =
        if mark.version == 2 { (&[2, 1], &[0][..]) } else { (&[1], &[][..]) };
    let head = [direction, 0, command, 1, a, b, c, d, mark.codec];
    Text::empty().put(version).put(&head).put(edition)
}

fn dubbo(flags: u8, status: u8, id: u64, body: &[&[u8]]) -> Text {
    let len = body.iter().map(|part| part.len()).sum::<usize>();
    let len = u32::try_from(len).unwrap_or(0).to_be_bytes();
    let head = Text::empty().put(&[0xda, 0xbb, flags, status]).put(&id.to_be_bytes()).put(&len);
    body.iter().fold(head, |text, part| text.put(part))
}

const fn bolt_status(failure: Failure) -> u8 {
    match failure {
        Failure::Bad => 9,
        Failure::Broken => 16,
        Failure::NoEndpoint | Failure::UnknownService => 6,
        Failure::Overload => 4,
        Failure::Timeout => 7,
    }
}

const fn dubbo_status(failure: Failure) -> u8 {
    match failure {
        Failure::Bad => 40,
        Failure::Broken => 80,
        Failure::NoEndpoint | Failure::UnknownService => 60,
        Failure::Overload => 100,
        Failure::Timeout => 31,
    }
}

const fn dubbo_text(failure: Failure) -> &'static str {
    match failure {
        Failure::Bad => "weir: bad request",
        Failure::Broken => "weir: the provider was lost",
        Failure::NoEndpoint => "weir: no provider is reached",
        Failure::Overload => "weir: too much at once",
        Failure::Timeout => "weir: no answer in time",
        Failure::UnknownService => "weir: unknown service",
    }
}

const fn http1_status(failure: Failure) -> &'static str {
    match failure {
        Failure::Bad => "400 Bad Request",
        Failure::Broken => "502 Bad Gateway",
        Failure::NoEndpoint | Failure::Overload => "503 Service Unavailable",
        Failure::Timeout => "504 Gateway Timeout",
        Failure::UnknownService => "404 Not Found",
    }
}

const RESPONSE: u8 = 2;
const HEARTBEAT: u8 = 0;
/// Of Bolt: wants an answer.
const REQUEST: u8 = 1;
const PROBE_TIMEOUT_MS: [u8; 4] = 3000u32.to_be_bytes();
/// Of Dubbo: a request that wants an answer.
const PROBE: u8 = 0xc0;
const EVENT: u8 = 0x20;
const HESSIAN2: u8 = 2;
const DUBBO_OK: u8 = 20;
/// Of Hessian2, and what Dubbo compares with.
const NULL: &[u8] = b"N";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{self, http1};

    #[test]
    fn what_we_say_is_read_as_it_is_meant() {
        for version in [1, 2] {
            let mark = Mark { codec: 11, id: 70_000, version, ..Mark::default() };
            let text = refusal(Protocol::Bolt, mark, Failure::Broken);
            let frame = wire::bolt::parse(text.as_bytes()).unwrap();
            assert_eq!(frame.frame_len, text.as_bytes().len() as u64);
            let kind = wire::bolt::Kind::Response;
            assert_eq!((frame.kind, frame.status, frame.request_id), (kind, 16, 70_000));
            assert_eq!((frame.codec, frame.version, frame.has_crc), (11, version, false));
            let text = heartbeat(Protocol::Bolt, mark);
            let frame = wire::bolt::parse(text.as_bytes()).unwrap();
            assert_eq!((frame.kind, frame.request_id), (wire::bolt::Kind::HeartbeatAnswer, 70_000));
        }
        let mark = Mark { codec: 2, id: 1 << 40, ..Mark::default() };
        for failure in [Failure::UnknownService, Failure::NoEndpoint, Failure::Broken] {
            let text = refusal(Protocol::Dubbo, mark, failure);
            let frame = wire::dubbo::parse(text.as_bytes()).unwrap();
            assert_eq!(frame.frame_len, text.as_bytes().len() as u64);
            assert_eq!((frame.kind, frame.request_id), (wire::dubbo::Kind::Response, 1 << 40));
            assert_eq!(frame.status, dubbo_status(failure));
            let text = refusal(Protocol::Http1, mark, failure);
            let answer = http1::parse_answer(text.as_bytes(), false).unwrap();
            assert_eq!((answer.head_len, answer.closes), (text.as_bytes().len(), false));
        }
        let text = refusal(Protocol::Http1, mark, Failure::Bad);
        assert!(http1::parse_answer(text.as_bytes(), false).unwrap().closes);
        assert_eq!(heartbeat(Protocol::Dubbo, mark).as_bytes().len(), 17);
    }
}
