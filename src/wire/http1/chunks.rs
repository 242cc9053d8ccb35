// SPDX-License-Identifier: Apache-2.0
//! HTTP/1: where a chunked body ends (RFC 9112, 7.1), however it is cut.
//!
//! Follows the bytes without keeping any. Strict: what two readers could understand differently is
//! refused.

use super::Stop;

/// How far a chunked body has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Chunks {
    state: State,
    /// Of sizes with their extensions and of the trailer, since data last came.
    words: u16,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Data(u64),
    DataCr,
    DataLf,
    Extension(u64),
    Over,
    Size(u64),
    SizeBegins,
    SizeLf(u64),
    Trailer,
    TrailerBegins,
    TrailerEndLf,
    TrailerLf,
}

impl Chunks {
    /// Before its first byte.
    #[must_use]
    pub const fn new() -> Chunks {
        Chunks { state: State::SizeBegins, words: 0 }
    }

    /// The body has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Takes in what comes next; says how many of these bytes belong to the body.
    ///
    /// # Errors
    ///
    /// It is broken.
    pub fn eat(&mut self, bytes: &[u8]) -> Result<usize, Stop> {
        let mut at = 0;
        while let Some(byte) = bytes.get(at).filter(|_| !self.is_over()) {
            if let State::Data(left) = self.state {
                let here = (bytes.len() - at).min(usize::try_from(left).unwrap_or(usize::MAX));
                at += here;
                let left = left - here as u64;
                self.state = if left == 0 { State::DataCr } else { State::Data(left) };
                continue;
            }
            self.words += 1;
            if self.words > WORDS_MAX {
                return Err(Stop::Bad("too much between chunks"));
            }
            self.state = self.after(*byte).ok_or(Stop::Bad("not a chunk"))?;
            at += 1;
        }
        Ok(at)
    }

    fn after(&mut self, byte: u8) -> Option<State> {
        Some(match (self.state, byte) {
            (State::SizeBegins, _) => State::Size(digit(byte)?),
            (State::Size(size) | State::Extension(size), b'\r') => State::SizeLf(size),
            (State::Size(size), b';' | b' ' | b'\t') => State::Extension(size),
            (State::Size(size), _) if size <= SIZE_MAX => State::Size(size << 4 | digit(byte)?),
            (State::Extension(size), b'\t' | b' '..=b'~' | 0x80..) => State::Extension(size),
            (State::SizeLf(0), b'\n') => State::TrailerBegins,
            (State::SizeLf(size), b'\n') => {
                self.words = 0;
                State::Data(size)
            }
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::SizeBegins,
            (State::TrailerBegins, b'\r') => State::TrailerEndLf,
            (State::TrailerEndLf, b'\n') => State::Over,
            (State::Trailer, b'\r') => State::TrailerLf,
            (State::TrailerLf, b'\n') => State::TrailerBegins,
            (State::Trailer | State::TrailerBegins, b'\t' | b' '..=b'~' | 0x80..) => State::Trailer,
            _ => return None,
        })
    }
}

impl Default for Chunks {
    fn default() -> Chunks {
        Chunks::new()
    }
}

fn digit(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}

/// One more digit must fit.
const SIZE_MAX: u64 = u64::MAX >> 8;
/// Of a size with its extension, or of a trailer.
const WORDS_MAX: u16 = 8192;
