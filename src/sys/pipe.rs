// SPDX-License-Identifier: Apache-2.0
//! Pipes, and moving bytes through them without copying.
#![expect(unsafe_code, reason = "splice(2) takes raw descriptors")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Both ends of a pipe.
#[derive(Debug)]
pub struct Pipe {
    /// Where bytes come out.
    pub reader: OwnedFd,
    /// Where bytes go in.
    pub writer: OwnedFd,
}

impl Pipe {
    /// A pipe for about `bytes` bytes: the kernel rounds up, and an unprivileged user above
    /// `fs.pipe-user-pages-soft` gets a smaller one, which is no error (pipe(7)).
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`: no descriptor is left, or the user's pipes hold too many pages.
    pub fn open(bytes: u32) -> io::Result<Pipe> {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(i32::try_from(bytes).unwrap_or(i32::MAX)));
        Ok(Pipe { reader, writer })
    }
}

/// Moves up to `bytes` bytes from `socket` into the pipe, without waiting; 0 for EOF.
///
/// # Errors
///
/// `EAGAIN`: the socket is empty or the pipe full. `EINVAL`: this socket cannot be spliced.
pub fn fill(pipe: &Pipe, socket: BorrowedFd<'_>, bytes: u32) -> io::Result<u32> {
    without_waiting(socket, || splice(socket, pipe.writer.as_fd(), bytes))
}

/// Moves up to `bytes` bytes out of the pipe into `socket`, without waiting.
///
/// # Errors
///
/// `EAGAIN`: the pipe is empty or the socket full.
pub fn drain(pipe: &Pipe, socket: BorrowedFd<'_>, bytes: u32) -> io::Result<u32> {
    without_waiting(socket, || splice(pipe.reader.as_fd(), socket, bytes))
}

/// `SPLICE_F_NONBLOCK` is about the pipe; whether a call waits for the socket is up to the socket's
/// `O_NONBLOCK` (`splice_to_socket` in fs/splice.c). It is set for the call alone: a send that waits
/// in a ring on the same socket would end short of what it was asked to send.
fn without_waiting(
    socket: BorrowedFd<'_>,
    call: impl FnOnce() -> io::Result<u32>,
) -> io::Result<u32> {
    fcntl(socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let moved = call();
    fcntl(socket, FcntlArg::F_SETFL(OFlag::empty()))?;
    moved
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, bytes: u32) -> io::Result<u32> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: both descriptors are borrowed, so open for the call; without offsets the kernel
    // reads and writes no memory of ours.
    let moved = unsafe {
        libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), bytes as usize, flags)
    };
    u32::try_from(moved).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_go_through_and_nothing_waits() {
        let (mut near, socket) = UnixStream::pair().unwrap();
        let pipe = Pipe::open(4096).unwrap();
        let empty = fill(&pipe, socket.as_fd(), 100).unwrap_err();
        assert_eq!(empty.raw_os_error(), Some(libc::EAGAIN));
        near.write_all(b"through").unwrap();
        assert_eq!(fill(&pipe, socket.as_fd(), 100).unwrap(), 7);
        assert_eq!(drain(&pipe, socket.as_fd(), 7).unwrap(), 7);
        let mut back = [0; 7];
        near.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"through");
        drop(near);
        assert_eq!(fill(&pipe, socket.as_fd(), 100).unwrap(), 0);
    }
}
