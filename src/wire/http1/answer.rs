// SPDX-License-Identifier: Apache-2.0
//! HTTP/1: the head of an answer, and how long its body is (RFC 9112, 6.3).

use super::{Body, HEADERS_MAX, Stop, line, named, number, only};

/// The head of an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answer {
    /// How the body ends.
    pub body: Body,
    /// The connection ends behind it.
    pub closes: bool,
    /// Of the head, with the empty line.
    pub head_len: usize,
    /// 200 and its like.
    pub status: u16,
}

/// Reads the head at the front of `bytes`; how its body ends depends on what the request was.
///
/// # Errors
///
/// Too few bytes, or a head that two readers could understand differently.
pub fn parse_answer(bytes: &[u8], is_to_head: bool) -> Result<Answer, Stop> {
    let (first, mut at) = line(bytes, 0, false)?;
    let (version, status) = status_line(first).ok_or(Stop::Bad("not a status line"))?;
    let (mut is_chunked, mut length, mut closes) = (false, None, version == b"HTTP/1.0");
    for _ in 0..HEADERS_MAX {
        let (line, next) = line(bytes, at, false)?;
        at = next;
        if line.is_empty() {
            let has_none = is_to_head || matches!(status, 100..=199 | 204 | 304);
            let body = match (is_chunked, length) {
                (true, Some(_)) => return Err(Stop::Bad("two ways to end the body")),
                _ if has_none => Body::Length(0),
                (true, None) => Body::Chunked,
                (false, Some(length)) => Body::Length(length),
                (false, None) => Body::End,
            };
            return Ok(Answer { body, closes: closes || body == Body::End, head_len: at, status });
        }
        let (name, value) = named(line)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            only(&mut length, number(value)?)?;
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Stop::Bad("a transfer coding other than chunked"));
            }
            is_chunked = true;
        } else if name.eq_ignore_ascii_case(b"connection") {
            closes = super::closes(value, closes);
        }
    }
    Err(Stop::Bad("too many headers"))
}

/// `HTTP/1.1 200 OK`; the reason may be missing.
fn status_line(line: &[u8]) -> Option<(&[u8], u16)> {
    let (version, rest) = line.split_at_checked(8)?;
    let (digits, rest) = rest.strip_prefix(b" ")?.split_at_checked(3)?;
    let is_known = matches!(version, b"HTTP/1.1" | b"HTTP/1.0");
    let is_number = digits.iter().all(u8::is_ascii_digit) && digits.first() != Some(&b'0');
    let is_over = rest.first().is_none_or(|byte| *byte == b' ');
    let status =
        digits.iter().fold(0, |status, digit| status * 10 + u16::from(digit.wrapping_sub(b'0')));
    (is_known && is_number && is_over).then_some((version, status))
}
