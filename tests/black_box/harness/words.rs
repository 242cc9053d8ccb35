// SPDX-License-Identifier: Apache-2.0
//! Payload that tells loss, doubling, reordering and mixing apart: every 8-byte word carries its
//! flow's seed and its own position.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;

/// A small generator, the same numbers for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 to `bound`, not included.
    pub(crate) const fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Sends `bytes` bytes of the flow `seed`, in chunks of random length.
pub(crate) fn send(stream: &mut impl Write, seed: u64, bytes: u64) -> io::Result<()> {
    let mut random = Random::new(seed + 1);
    let mut chunk = vec![0; CHUNK_BYTES_MAX];
    let mut sent = 0;
    while sent < bytes {
        let len = (random.below(CHUNK_BYTES_MAX as u64) + 1).min(bytes - sent);
        let chunk = &mut chunk[..usize::try_from(len).unwrap()];
        fill(chunk, seed, sent);
        stream.write_all(chunk)?;
        sent += len;
    }
    Ok(())
}

/// Receives until EOF or `bytes` bytes, checking every one; says how many came.
pub(crate) fn receive(stream: &mut impl Read, seed: u64, bytes: u64) -> io::Result<u64> {
    let mut random = Random::new(seed + 2);
    let mut chunk = vec![0; CHUNK_BYTES_MAX];
    let mut wanted = vec![0; CHUNK_BYTES_MAX];
    let mut received = 0;
    while received < bytes {
        let len = (random.below(CHUNK_BYTES_MAX as u64) + 1).min(bytes - received);
        let len = stream.read(&mut chunk[..usize::try_from(len).unwrap()])?;
        if len == 0 {
            break;
        }
        fill(&mut wanted[..len], seed, received);
        assert!(chunk[..len] == wanted[..len], "flow {seed}: wrong bytes after {received}");
        received += len as u64;
    }
    Ok(received)
}

/// Exactly `bytes` bytes of flow `seed` come.
pub(crate) fn check(stream: &mut impl Read, seed: u64, bytes: u64) {
    assert_eq!(receive(stream, seed, bytes).unwrap(), bytes, "flow {seed}");
}

/// The peer has sent FIN, and nothing before it.
pub(crate) fn expect_eof(mut stream: &TcpStream) {
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0, "EOF");
}

/// The peer's connection broke, after whatever it had sent.
pub(crate) fn expect_reset(stream: &mut TcpStream) {
    let error = io::copy(stream, &mut io::sink()).expect_err("a reset, not EOF");
    let kind = error.kind();
    assert!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
}

/// Sends everything back, each connection until its EOF; ends with the listener's last clone.
pub(crate) fn echo(listener: TcpListener) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let Ok(mut from) = stream.try_clone() else { return };
                // A reset is the test's own doing.
                let _ = io::copy(&mut from, &mut stream);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    })
}

/// Word by word; the first and the last may be cut. A plain loop, because nobody optimises tests.
fn fill(chunk: &mut [u8], seed: u64, from: u64) {
    let cut = usize::try_from(from % 8).unwrap();
    let mut words = [[0; 8]; CHUNK_BYTES_MAX / 8 + 1];
    let count = (cut + chunk.len()).div_ceil(8);
    let (mut index, mut position) = (0, from / 8);
    while index < count {
        words[index] = (seed << 40 ^ position).to_le_bytes();
        index += 1;
        position += 1;
    }
    chunk.copy_from_slice(&words.as_flattened()[cut..][..chunk.len()]);
}

const CHUNK_BYTES_MAX: usize = 100_000;
