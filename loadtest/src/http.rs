// SPDX-License-Identifier: Apache-2.0
//! As much of HTTP/1.1 as a load test needs: where one message ends and the next begins.
//!
//! Never looks at a body. Bodies have a Content-Length or are not there; chunks are refused.

/// Reads a stream of messages, in whatever pieces it comes.
#[derive(Debug)]
pub(crate) struct Reader {
    body: usize,
    head: Vec<u8>,
}

/// Why a stream is no HTTP that is known here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Unknown;

impl Reader {
    pub(crate) const fn new() -> Reader {
        Reader { body: 0, head: Vec::new() }
    }

    /// Takes bytes; answers how many messages they have ended.
    pub(crate) fn take(&mut self, mut bytes: &[u8]) -> Result<u32, Unknown> {
        let mut ended = 0;
        while !bytes.is_empty() {
            if self.body > 0 {
                let part = self.body.min(bytes.len());
                self.body -= part;
                bytes = &bytes[part..];
                ended += u32::from(self.body == 0);
                continue;
            }
            let before = self.head.len();
            self.head.extend_from_slice(bytes);
            let Some(end) = find_end(&self.head, before.saturating_sub(3)) else {
                return if self.head.len() > HEAD_BYTES_MAX { Err(Unknown) } else { Ok(ended) };
            };
            self.body = body_of(&self.head[..end])?;
            bytes = &bytes[end - before..];
            self.head.clear();
            ended += u32::from(self.body == 0);
        }
        Ok(ended)
    }
}

/// An answer with a body of so many bytes.
pub(crate) fn answer(body: usize) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 200 OK\r\nContent-Length: {body}\r\n\r\n").into_bytes();
    text.resize(text.len() + body, b'z');
    text
}

/// What is asked.
pub(crate) fn request(host: std::net::SocketAddr) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

/// Where the empty line ends.
fn find_end(head: &[u8], from: usize) -> Option<usize> {
    head[from..].windows(4).position(|four| four == b"\r\n\r\n").map(|at| from + at + 4)
}

fn body_of(head: &[u8]) -> Result<usize, Unknown> {
    let text = std::str::from_utf8(head).map_err(|_| Unknown)?;
    let mut lines = text.split("\r\n");
    if !lines.next().is_some_and(|line| line.contains("HTTP/1.")) {
        return Err(Unknown);
    }
    let mut body = 0;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            body = value.trim().parse().map_err(|_| Unknown)?;
        }
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Unknown);
        }
    }
    Ok(body)
}

const HEAD_BYTES_MAX: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::{Reader, Unknown, answer};

    #[test]
    fn messages_end_where_they_end_whatever_the_pieces() {
        let stream = [answer(5), answer(0), answer(700)].concat();
        for size in [1, 2, 3, 7, 64, stream.len()] {
            let mut reader = Reader::new();
            let ended = stream.chunks(size).map(|part| reader.take(part)).sum::<Result<u32, _>>();
            assert_eq!(ended, Ok(3), "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert_eq!(Reader::new().take(b"SSH-2.0\r\n\r\n"), Err(Unknown));
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(Reader::new().take(chunked), Err(Unknown));
        assert_eq!(Reader::new().take(&[b'a'; 20_000]), Err(Unknown));
    }
}
