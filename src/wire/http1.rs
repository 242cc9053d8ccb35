// SPDX-License-Identifier: Apache-2.0
//! HTTP/1: the head of a request, and how long its body is.
//!
//! Strict where two readers could differ: what could smuggle a second request is refused.

use super::Stop;

pub use answer::{Answer, parse_answer};
pub use chunks::Chunks;

mod answer;
mod chunks;

/// The head of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Head<'a> {
    /// How the body ends.
    pub body: Body,
    /// The client asks no more on this connection.
    pub closes: bool,
    /// The client waits for "100 Continue".
    pub expects_continue: bool,
    /// Of the head, with the empty line.
    pub head_len: usize,
    /// Of the `Host` header, or of an absolute target; without port, as it was written.
    pub host: &'a [u8],
    /// The connection may turn into something else.
    pub is_upgrade: bool,
    /// `GET`.
    pub method: &'a [u8],
    /// Of the header `Target-Service` or `sofa_head_target_service`; empty if there is none.
    pub target_service: &'a [u8],
    /// The path, as it was written.
    pub target: &'a [u8],
}

/// How a body ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Body {
    /// With a chunk of length 0 and a trailer.
    Chunked,
    /// With the connection; only in answers.
    End,
    /// After so many bytes.
    Length(u64),
}

/// Reads the head at the front of `bytes`.
///
/// # Errors
///
/// Too few bytes, another protocol, or a head that two readers could understand differently.
pub fn parse(bytes: &[u8]) -> Result<Head<'_>, Stop> {
    let (line, mut at) = line(bytes, 0, true)?;
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let version = words.next().unwrap_or_default();
    if !matches!(version, b"HTTP/1.1" | b"HTTP/1.0")
        || words.next().is_some()
        || target.is_empty()
        || !is_token(method)
    {
        return Err(Stop::Bad("not a request line"));
    }
    let mut seen = Seen { closes: version == b"HTTP/1.0", ..Seen::default() };
    for _ in 0..HEADERS_MAX {
        let (line, next) = self::line(bytes, at, false)?;
        at = next;
        if line.is_empty() {
            return seen.head(method, target, at);
        }
        seen.header(line)?;
    }
    Err(Stop::Bad("too many headers"))
}

/// What the headers have said so far.
#[derive(Default)]
struct Seen<'a> {
    closes: bool,
    expects_continue: bool,
    host: Option<&'a [u8]>,
    is_chunked: bool,
    is_upgrade: bool,
    length: Option<u64>,
    target_service: Option<&'a [u8]>,
}

impl<'a> Seen<'a> {
    fn header(&mut self, line: &'a [u8]) -> Result<(), Stop> {
        let (name, value) = named(line)?;
        let is = |other: &[u8]| name.eq_ignore_ascii_case(other);
        if is(b"host") {
            return only(&mut self.host, value);
        }
        if is(b"content-length") {
            return only(&mut self.length, number(value)?);
        }
        if is(b"transfer-encoding") {
            if self.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Stop::Bad("a transfer coding other than chunked"));
            }
            self.is_chunked = true;
        } else if is(b"connection") {
            self.closes = closes(value, self.closes);
        } else if is(b"upgrade") {
            self.is_upgrade = true;
        } else if is(b"expect") {
            self.expects_continue = value.eq_ignore_ascii_case(b"100-continue");
        } else if is(b"target-service") || is(b"sofa_head_target_service") {
            return only(&mut self.target_service, value);
        }
        Ok(())
    }

    fn head(self, method: &'a [u8], target: &'a [u8], head_len: usize) -> Result<Head<'a>, Stop> {
        let body = match (self.is_chunked, self.length) {
            (true, Some(_)) => return Err(Stop::Bad("two ways to end the body")),
            (true, None) => Body::Chunked,
            (false, length) => Body::Length(length.unwrap_or(0)),
        };
        let host = authority(target).or(self.host).unwrap_or_default();
        Ok(Head {
            body,
            closes: self.closes,
            expects_continue: self.expects_continue,
            head_len,
            host: without_port(host),
            is_upgrade: self.is_upgrade || method == b"CONNECT",
            method,
            target_service: self.target_service.unwrap_or_default(),
            target,
        })
    }
}

/// A header's name and value.
fn named(line: &[u8]) -> Result<(&[u8], &[u8]), Stop> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or(Stop::Bad("no colon"))?;
    let (name, value) = line.split_at(colon);
    if !is_token(name) {
        // Folded lines begin with a space, and a space before the colon hides a header.
        return Err(Stop::Bad("not a header name"));
    }
    Ok((name, value.get(1..).unwrap_or_default().trim_ascii()))
}

/// Whether the connection ends, after one more `Connection` header.
fn closes(value: &[u8], so_far: bool) -> bool {
    let says = |word: &[u8]| {
        value.split(|byte| *byte == b',').any(|item| item.trim_ascii().eq_ignore_ascii_case(word))
    };
    says(b"close") || (so_far && !says(b"keep-alive"))
}

/// Takes what may be said once.
fn only<T>(place: &mut Option<T>, value: T) -> Result<(), Stop> {
    match place.replace(value) {
        Some(_) => Err(Stop::Bad("a header that may stand only once is there twice")),
        None => Ok(()),
    }
}

/// The line that begins at `start`, and where the next one begins. Where a method has not ended
/// yet, it may be another protocol.
fn line(bytes: &[u8], start: usize, mut is_method: bool) -> Result<(&[u8], usize), Stop> {
    let rest = bytes.get(start..).unwrap_or_default();
    for (index, byte) in rest.iter().enumerate() {
        if start + index >= HEAD_BYTES_MAX {
            return Err(Stop::Bad("the head is too long"));
        }
        is_method &= index == 0 || *byte != b' ';
        if is_method && (!is_token_byte(*byte) || index >= METHOD_BYTES_MAX) {
            return Err(Stop::NotMine);
        }
        match (byte, rest.get(index + 1)) {
            (b'\r', Some(b'\n')) => {
                let line = rest.get(..index).unwrap_or_default();
                return Ok((line, start + index + 2));
            }
            (b'\r', Some(_)) => return Err(Stop::Bad("a bare CR")),
            (b'\r', None) => return Err(Stop::NeedMore(start + index + 2)),
            (b'\t' | b' '..=b'~' | 0x80.., _) => {}
            _ => return Err(Stop::Bad("a control character")),
        }
    }
    Err(Stop::NeedMore(bytes.len() + 1))
}

fn number(value: &[u8]) -> Result<u64, Stop> {
    let is_number = !value.is_empty() && value.len() <= 18 && value.iter().all(u8::is_ascii_digit);
    if !is_number {
        return Err(Stop::Bad("not a length"));
    }
    Ok(value.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

/// `http://host:port/path` names the host better than the header (RFC 9112, 3.2.2).
fn authority(target: &[u8]) -> Option<&[u8]> {
    let scheme = [&b"http://"[..], b"https://"].into_iter().find(|scheme| {
        target.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    })?;
    let rest = target.get(scheme.len()..)?;
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
    rest.get(..end)
}

/// `host:80` as `host`, `[::1]:80` as `[::1]`.
pub(super) fn without_port(host: &[u8]) -> &[u8] {
    let colon = host.iter().rposition(|byte| *byte == b':');
    match colon {
        Some(colon) if host.get(colon..).is_some_and(|end| !end.contains(&b']')) => {
            host.get(..colon).unwrap_or_default()
        }
        _ => host,
    }
}

fn is_token(word: &[u8]) -> bool {
    !word.is_empty() && word.iter().all(|byte| is_token_byte(*byte))
}

/// RFC 9110, 5.6.2.
const fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~')
}

/// Of a head with all its headers.
const HEAD_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 128;
/// No method is longer.
const METHOD_BYTES_MAX: usize = 24;
