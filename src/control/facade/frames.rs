// SPDX-License-Identifier: Apache-2.0
//! Frames of ZooKeeper's protocol on a connection: four bytes of length, then so many bytes.
//!
//! Invariant: no more is kept than one frame, of a length that is allowed, and what came with its end.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;

/// What comes, frame by frame.
pub(super) struct Frames<R = OwnedReadHalf> {
    bytes: Vec<u8>,
    from: R,
    len_max: usize,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    /// Of at most so many bytes each.
    pub(super) fn new(from: R, len_max: usize) -> Frames<R> {
        Frames { bytes: Vec::new(), from, len_max }
    }

    /// From now on so many.
    pub(super) fn allow(&mut self, len_max: usize) {
        self.len_max = len_max;
    }

    /// The next one, without its length; `None` at the end. Whoever stops waiting has lost nothing.
    pub(super) async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some((head, rest)) = self.bytes.split_first_chunk::<4>() {
                let len = usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX);
                if len > self.len_max {
                    let text = format!("a frame of {len} bytes, and {} are allowed", self.len_max);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                if let Some(frame) = rest.get(..len) {
                    let frame = frame.to_vec();
                    self.bytes.drain(..4 + len);
                    // One large frame shall not be paid for ever after.
                    self.bytes.shrink_to(READ_BYTES * 2);
                    return Ok(Some(frame));
                }
            }
            self.bytes.reserve(READ_BYTES);
            match (self.from.read_buf(&mut self.bytes).await?, self.bytes.is_empty()) {
                (0, true) => return Ok(None),
                (0, false) => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => {}
            }
        }
    }
}

/// With its length, and waits until it is taken.
pub(super) async fn write(to: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> io::Result<()> {
    let len = u32::try_from(frame.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    to.write_all(&[&len.to_be_bytes(), frame].concat()).await
}

const READ_BYTES: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    /// Comes in pieces of so many bytes.
    fn frames(bytes: &[u8], piece: usize, len_max: usize) -> Frames<impl AsyncRead + Unpin> {
        struct Pieces(Vec<u8>, usize);
        impl AsyncRead for Pieces {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                into: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                let len = self.1.min(self.0.len());
                into.put_slice(&self.0.drain(..len).collect::<Vec<u8>>());
                std::task::Poll::Ready(Ok(()))
            }
        }
        Frames::new(Pieces(bytes.to_vec(), piece), len_max)
    }

    #[test]
    fn frames_are_whole_however_they_come() {
        let mut bytes = Vec::new();
        let large = vec![7; 100_000];
        block_on(async {
            for frame in [b"one".as_slice(), b"", &large, b"last"] {
                write(&mut bytes, frame).await.unwrap();
            }
            for piece in [1, 3, 5, 16_000] {
                let mut frames = frames(&bytes, piece, 100_000);
                for expected in [b"one".as_slice(), b"", &large, b"last"] {
                    assert_eq!(frames.next().await.unwrap().as_deref(), Some(expected));
                }
                assert!(frames.next().await.unwrap().is_none());
                assert!(frames.bytes.capacity() <= READ_BYTES * 3);
            }
        });
    }

    #[test]
    fn frame_that_is_too_long_or_cut_is_an_error() {
        block_on(async {
            let mut long = frames(b"ruok", 4, 1000);
            assert_eq!(long.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
            let mut cut = frames(b"\0\0\0\x05abcd", 4, 1000);
            assert_eq!(cut.next().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        });
    }
}
