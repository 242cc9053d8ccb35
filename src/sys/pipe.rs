// SPDX-License-Identifier: Apache-2.0
//! Pipes, and moving bytes through them without copying.
#![expect(unsafe_code, reason = "splice(2) takes raw descriptors")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

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

/// Moves up to `bytes` bytes from a socket into a pipe or from a pipe into a socket, without
/// waiting for the pipe; whether it waits for the socket is up to the socket's `O_NONBLOCK`.
///
/// # Errors
///
/// `EAGAIN`: nothing could be moved just now. `EINVAL`: this socket cannot be spliced.
pub fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, bytes: u32) -> io::Result<u32> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: both descriptors are borrowed, so open for the call; without offsets the kernel
    // reads and writes no memory of ours.
    let moved = unsafe {
        libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), bytes as usize, flags)
    };
    u32::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// From now on calls on the socket do not wait; requests of a ring do as before, because they say
/// themselves whether they wait.
///
/// # Errors
///
/// Never for a socket.
pub fn set_nonblocking(socket: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_go_through_and_nothing_waits() {
        let (mut near, socket) = UnixStream::pair().unwrap();
        set_nonblocking(socket.as_fd()).unwrap();
        let pipe = Pipe::open(4096).unwrap();
        let empty = splice(socket.as_fd(), pipe.writer.as_fd(), 100).unwrap_err();
        assert_eq!(empty.raw_os_error(), Some(libc::EAGAIN));
        near.write_all(b"through").unwrap();
        assert_eq!(splice(socket.as_fd(), pipe.writer.as_fd(), 100).unwrap(), 7);
        assert_eq!(splice(pipe.reader.as_fd(), socket.as_fd(), 7).unwrap(), 7);
        let mut back = [0; 7];
        near.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"through");
        drop(near);
        assert_eq!(splice(socket.as_fd(), pipe.writer.as_fd(), 100).unwrap(), 0);
    }
}
