// SPDX-License-Identifier: Apache-2.0
//! Sockets: listeners and what is read from and set on accepted ones.
#![expect(unsafe_code, reason = "descriptors and addresses come raw from the kernel")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockRef, Socket, TcpKeepalive, Type};

use crate::addr;
use crate::profile::{Keepalive, Sockets};

/// How a listener differs from a plain one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ListenOptions {
    /// Length of the accept queue; the kernel caps it at `net.core.somaxconn`.
    pub backlog: u32,
    /// `SO_MARK`: accepted sockets inherit it. Needs `CAP_NET_ADMIN`.
    pub mark: Option<u32>,
    /// `TCP_NODELAY`: accepted sockets inherit it.
    pub nodelay: bool,
    /// Several sockets share the address (`SO_REUSEPORT`).
    pub shared: bool,
    /// Accept connections to any address (`IP_TRANSPARENT`). Needs `CAP_NET_ADMIN`.
    pub transparent: bool,
}

/// What went wrong while a listener was made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another socket has the port.
    #[error("listen on {addr}: the address is in use (`ss -ltnp` shows by whom)")]
    InUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// The address is of no interface here.
    #[error("listen on {addr}: no interface has this address (`ip addr` lists them)")]
    NotLocal {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// Ports below 1024.
    #[error("listen on {addr}: permission denied (ports below 1024 need CAP_NET_BIND_SERVICE)")]
    Permission {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// Another step.
    #[error("{step} on {addr}: {source}{cure}")]
    Step {
        /// The address asked for.
        addr: SocketAddr,
        /// What to do about it.
        cure: &'static str,
        /// What the kernel said.
        source: io::Error,
        /// The step that failed.
        step: &'static str,
    },
}

/// A listening TCP socket. `[::]` takes IPv4 too; every listener has `SO_REUSEADDR`, so that a
/// port is free again while old connections linger.
///
/// # Errors
///
/// Names the step, the address and the cure.
pub fn listen(addr: SocketAddr, options: &ListenOptions) -> Result<OwnedFd, ListenError> {
    let failed = |step, cure| move |source| ListenError::Step { addr, cure, source, step };
    let domain = Domain::for_address(addr);
    let socket = Socket::new(domain, Type::STREAM.cloexec(), Some(Protocol::TCP))
        .map_err(failed("make a socket", ""))?;
    socket.set_reuse_address(true).map_err(failed("set SO_REUSEADDR", ""))?;
    if options.shared {
        socket.set_reuse_port(true).map_err(failed("set SO_REUSEPORT", ""))?;
    }
    if addr.is_ipv6() {
        let only = !addr.ip().is_unspecified();
        socket.set_only_v6(only).map_err(failed("set IPV6_V6ONLY", ""))?;
    }
    if let Some(mark) = options.mark {
        socket.set_mark(mark).map_err(failed("set SO_MARK", NEEDS_NET_ADMIN))?;
    }
    if options.transparent {
        set_transparent(&socket, addr).map_err(failed("set IP_TRANSPARENT", NEEDS_NET_ADMIN))?;
    }
    if options.nodelay {
        socket.set_tcp_nodelay(true).map_err(failed("set TCP_NODELAY", ""))?;
    }
    socket.bind(&addr.into()).map_err(|source| bind_error(addr, source))?;
    let backlog = i32::try_from(options.backlog).unwrap_or(i32::MAX);
    socket.listen(backlog).map_err(|source| bind_error(addr, source))?;
    Ok(socket.into())
}

/// Sets what a profile wants of a flow's downstream sockets on their listener: accepted sockets
/// inherit all of it (`sk_clone_lock` in net/core/sock.c). `TCP_NODELAY` is a `ListenOptions` too.
///
/// # Errors
///
/// Names the option, the address and the cure.
pub fn tune_listener(fd: BorrowedFd<'_>, sockets: &Sockets) -> Result<(), ListenError> {
    let addr = local_name(fd).unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    let failed = |step, cure| move |source| ListenError::Step { addr, cure, source, step };
    let socket = SockRef::from(&fd);
    if let Some(name) = &sockets.congestion {
        let cure = " (net.ipv4.tcp_available_congestion_control lists what there is)";
        socket.set_tcp_congestion(name.as_bytes()).map_err(failed("set TCP_CONGESTION", cure))?;
    }
    if let Some(Keepalive { idle, interval, probes }) = sockets.keepalive {
        let keepalive =
            TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
        socket.set_tcp_keepalive(&keepalive).map_err(failed("set SO_KEEPALIVE", ""))?;
    }
    if !sockets.user_timeout.is_zero() {
        let timeout = Some(sockets.user_timeout);
        socket.set_tcp_user_timeout(timeout).map_err(failed("set TCP_USER_TIMEOUT", ""))?;
    }
    if sockets.receive_buffer_bytes > 0 {
        let bytes = sockets.receive_buffer_bytes as usize;
        socket.set_recv_buffer_size(bytes).map_err(failed("set SO_RCVBUF", ""))?;
    }
    if sockets.send_buffer_bytes > 0 {
        let bytes = sockets.send_buffer_bytes as usize;
        socket.set_send_buffer_size(bytes).map_err(failed("set SO_SNDBUF", ""))?;
    }
    if !sockets.busy_poll.is_zero() {
        let micros = u32::try_from(sockets.busy_poll.as_micros()).unwrap_or(u32::MAX);
        socket.set_busy_poll(micros).map_err(failed("set SO_BUSY_POLL", NEEDS_NET_ADMIN))?;
    }
    Ok(())
}

/// The descriptor that an accept brought.
#[must_use]
pub fn accepted(number: i32) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for the accept whose completion carried it, and
    // each completion is read once, so nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// The address the socket is connected to, canonical (getpeername(2)).
///
/// # Errors
///
/// `ENOTCONN`: the peer has reset the connection.
pub fn peer_name(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    SockRef::from(&fd).peer_addr().and_then(ip_address)
}

/// The address the socket is bound to, canonical (getsockname(2)); under tproxy the original
/// destination.
///
/// # Errors
///
/// Not for a TCP socket.
pub fn local_name(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    SockRef::from(&fd).local_addr().and_then(ip_address)
}

/// A raw address as the kernel wrote it, canonical; `None` if it is of no IP family.
#[must_use]
pub fn address_of(raw: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let mut storage = SockAddrStorage::zeroed();
    let bytes = storage.size_of();
    // SAFETY: the storage is a `sockaddr_storage` and nothing else.
    *unsafe { storage.view_as() } = *raw;
    // SAFETY: `raw` is initialised to its whole length; socket2 looks at the family before it
    // reads more, and both IP families fit.
    let address = unsafe { SockAddr::new(storage, bytes) };
    address.as_socket().map(addr::canonical)
}

/// Room for an address: family 0, which is none.
#[must_use]
pub fn no_address() -> libc::sockaddr_storage {
    // SAFETY: all-zero is a valid `sockaddr_storage`.
    unsafe { std::mem::zeroed() }
}

/// Closing the socket shall send RST and forget unsent bytes (`SO_LINGER` 0, socket(7)).
///
/// # Errors
///
/// Not for a TCP socket.
pub fn set_reset_on_close(fd: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&fd).set_linger(Some(Duration::ZERO))
}

/// Sends FIN (shutdown(2) with `SHUT_WR`).
///
/// # Errors
///
/// `ENOTCONN`: the peer has reset the connection.
pub fn shutdown_write(fd: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&fd).shutdown(std::net::Shutdown::Write)
}

/// An eventfd, non-blocking: the bell of a mailbox.
///
/// # Errors
///
/// `EMFILE`: no descriptor is left.
pub fn bell() -> io::Result<OwnedFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?.into())
}

fn set_transparent(socket: &Socket, addr: SocketAddr) -> io::Result<()> {
    if addr.is_ipv6() {
        set_ipv6_transparent(socket.as_fd())
    } else {
        socket.set_ip_transparent_v4(true)
    }
}

fn set_ipv6_transparent(fd: BorrowedFd<'_>) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let on: libc::c_int = 1;
    // SAFETY: `fd` is borrowed, so open for the call; the kernel copies four bytes from `on` and
    // keeps no pointer.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_IPV6,
            libc::IPV6_TRANSPARENT,
            (&raw const on).cast(),
            4,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn ip_address(address: SockAddr) -> io::Result<SocketAddr> {
    let address = address.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok(addr::canonical(address))
}

fn bind_error(addr: SocketAddr, source: io::Error) -> ListenError {
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => ListenError::InUse { addr },
        Some(libc::EADDRNOTAVAIL) => ListenError::NotLocal { addr },
        Some(libc::EACCES) => ListenError::Permission { addr },
        _ => ListenError::Step { addr, cure: "", source, step: "bind" },
    }
}

const NEEDS_NET_ADMIN: &str = " (needs CAP_NET_ADMIN)";

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    const OPTIONS: ListenOptions =
        ListenOptions { backlog: 16, mark: None, nodelay: true, shared: true, transparent: false };

    #[test]
    fn port_in_use_names_the_address_and_the_cure() {
        let options = ListenOptions { shared: false, ..OPTIONS };
        let first = listen("127.0.0.1:0".parse().unwrap(), &options).unwrap();
        let addr = local_name(first.as_fd()).unwrap();
        let error = listen(addr, &options).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("listen on {addr}: the address is in use (`ss -ltnp` shows by whom)")
        );
    }

    #[test]
    fn unspecified_v6_listener_takes_v4_and_names_come_out_canonical() {
        let listener = listen("[::]:0".parse().unwrap(), &OPTIONS).unwrap();
        let port = local_name(listener.as_fd()).unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let listener = std::net::TcpListener::from(listener);
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!(peer_name(accepted.as_fd()).unwrap(), client.local_addr().unwrap());
        assert_eq!(local_name(accepted.as_fd()).unwrap(), client.peer_addr().unwrap());
    }

    #[test]
    fn accepted_socket_inherits_what_its_listener_was_tuned_to() {
        let fd = listen("127.0.0.1:0".parse().unwrap(), &OPTIONS).unwrap();
        let sockets = Sockets {
            busy_poll: Duration::ZERO,
            congestion: Some("reno".to_owned()),
            keepalive: Some(Keepalive {
                idle: Duration::from_secs(61),
                interval: Duration::from_secs(7),
                probes: 3,
            }),
            nodelay: true,
            receive_buffer_bytes: 65536,
            send_buffer_bytes: 32768,
            user_timeout: Duration::from_millis(4321),
        };
        tune_listener(fd.as_fd(), &sockets).unwrap();
        let listener = std::net::TcpListener::from(fd);
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let socket = SockRef::from(&accepted);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(61));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(7));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_millis(4321)));
        assert!(socket.tcp_congestion().unwrap().starts_with(b"reno"));
        // The kernel doubles what is asked for (socket(7)).
        assert_eq!(socket.recv_buffer_size().unwrap(), 131_072);
        assert_eq!(socket.send_buffer_size().unwrap(), 65_536);
    }

    #[test]
    fn unknown_congestion_control_names_the_cure() {
        let fd = listen("127.0.0.1:0".parse().unwrap(), &OPTIONS).unwrap();
        let congestion = Some("no_such_control".to_owned());
        let sockets = Sockets {
            busy_poll: Duration::ZERO,
            congestion,
            keepalive: None,
            nodelay: true,
            receive_buffer_bytes: 0,
            send_buffer_bytes: 0,
            user_timeout: Duration::ZERO,
        };
        let error = tune_listener(fd.as_fd(), &sockets).unwrap_err().to_string();
        let addr = local_name(fd.as_fd()).unwrap();
        assert_eq!(
            error,
            format!(
                "set TCP_CONGESTION on {addr}: No such file or directory (os error 2) \
                 (net.ipv4.tcp_available_congestion_control lists what there is)"
            )
        );
    }
}
