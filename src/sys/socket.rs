// SPDX-License-Identifier: Apache-2.0
//! Sockets: listeners and what is read from and set on accepted ones.
#![expect(unsafe_code, reason = "descriptors and addresses come raw from the kernel")]

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockRef, Socket, Type};

use crate::addr;

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
        .map_err(failed("make a socket", if addr.is_ipv6() { NO_IPV6 } else { "" }))?;
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

/// Sets one option, whose value the kernel copies (setsockopt(2)).
///
/// # Errors
///
/// As the option's manual says.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let bytes = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: `fd` is borrowed, so open for the call; the kernel reads `bytes` bytes of `value`
    // and keeps no pointer.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), bytes) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The descriptor that an accept brought.
#[must_use]
pub fn accepted(number: i32) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for the accept whose completion carried it, and
    // each completion is read once, so nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Reads what has come and leaves it where it is; never waits (`MSG_PEEK`, recv(2)).
///
/// # Errors
///
/// `WouldBlock`: nothing has come. Others: the connection broke.
pub fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    use nix::sys::socket::{MsgFlags, recv};
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    Ok(recv(fd.as_raw_fd(), buffer, flags)?)
}

/// Lets the socket be readable only once so many bytes have come (`SO_RCVLOWAT`); the kernel makes
/// room for them (`tcp_set_rcvlowat` in net/ipv4/tcp.c).
///
/// # Errors
///
/// Not for a TCP socket.
pub fn set_low_water(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &bytes.to_ne_bytes())
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

/// Where the connection meant to go before nft's redirect, canonical (`SO_ORIGINAL_DST`). Connection
/// tracking keeps it, by the family of the packets: a client that came to a `[::]` socket over IPv4
/// is asked for as IPv4 (`nf_getorigdst` and `ipv6_getorigdst` in net/netfilter/nf_conntrack_proto.c).
///
/// # Errors
///
/// `ENOENT`: the connection is not tracked, or no longer.
pub fn original_dst(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let socket = SockRef::from(&fd);
    match local_name(fd)? {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    }
    .and_then(ip_address)
}

/// Connections that wait in a listener's accept queue (`TCP_INFO`: `tcp_get_info` in net/ipv4/tcp.c
/// tells a listener's backlog as `tcpi_unacked`).
///
/// # Errors
///
/// Not for a TCP socket.
pub fn waiting(listener: BorrowedFd<'_>) -> io::Result<u32> {
    tcp_info(listener, std::mem::offset_of!(libc::tcp_info, tcpi_unacked))
}

/// Milliseconds since bytes were last sent, for the first time or again; probes of a window that is
/// shut do not count (`tcp_event_data_sent` in net/ipv4/tcp_output.c).
///
/// # Errors
///
/// Not for a TCP socket.
pub fn last_sent_ms(fd: BorrowedFd<'_>) -> io::Result<u32> {
    tcp_info(fd, std::mem::offset_of!(libc::tcp_info, tcpi_last_data_sent))
}

/// The number at `offset` of a `tcp_info`.
fn tcp_info(fd: BorrowedFd<'_>, offset: usize) -> io::Result<u32> {
    let mut info = [0u32; TCP_INFO_WORDS];
    let mut bytes = libc::socklen_t::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    // SAFETY: `fd` is borrowed, so open for the call; the kernel writes at most `bytes` bytes, the
    // size of `info`, and keeps no pointer; every bit pattern is a number.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.get(offset / size_of::<u32>()).copied().unwrap_or(0))
}

/// Whether dialling `ip` would reach this host: an address can be bound only where it is local
/// (where `ip_nonlocal_bind` is set, every one counts as local). One that holds on its link only
/// cannot be bound without saying which link: there the kernel's list is asked.
#[must_use]
pub fn is_local_address(ip: IpAddr) -> bool {
    let is_listed = || match ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            // Of this thread's network namespace.
            std::fs::read_to_string("/proc/thread-self/net/if_inet6")
                .is_ok_and(|list| is_in_list(&list, ip))
        }
        _ => false,
    };
    ip.is_loopback()
        || ip.is_unspecified()
        || std::net::UdpSocket::bind((ip, 0)).is_ok()
        || is_listed()
}

/// A line for each address, which comes first, in hexadecimal (`if6_seq_show` in net/ipv6/addrconf.c).
fn is_in_list(list: &str, ip: Ipv6Addr) -> bool {
    let wanted = format!("{:032x}", ip.to_bits());
    list.lines().any(|line| line.split(' ').next() == Some(wanted.as_str()))
}

/// The number of the network namespace we are in, as BPF programs see it (`SO_NETNS_COOKIE`,
/// socket(7), Linux 5.14).
///
/// # Errors
///
/// `ENOPROTOOPT`: the kernel is older.
pub fn netns_cookie() -> io::Result<u64> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), None)?;
    let (mut cookie, mut bytes) = (0u64, SO_NETNS_COOKIE_BYTES);
    // SAFETY: `socket` is open for the call; the kernel writes at most `bytes` bytes, the size of
    // `cookie`, and keeps no pointer.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut bytes,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// The number of a socket, as BPF programs see it; no other socket ever has it (`SO_COOKIE`,
/// socket(7)).
///
/// # Errors
///
/// Not for a socket.
pub fn cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    SockRef::from(&fd).cookie()
}

/// Has the kernel look again at what the socket has received: setting `SO_RCVLOWAT` reports bytes
/// that wait (`tcp_set_rcvlowat` in net/ipv4/tcp_input.c), and reads none.
///
/// # Errors
///
/// Not for a TCP socket.
pub fn report_received(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &1_i32.to_ne_bytes())
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

/// Whether the peer has sent FIN and everything before it was read (recv(2) with `MSG_PEEK`).
///
/// # Errors
///
/// `EAGAIN`: neither bytes nor FIN are here.
pub fn is_at_end(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    Ok(recv(fd.as_raw_fd(), &mut [0], flags)? == 0)
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
        set_option(socket.as_fd(), libc::SOL_IPV6, libc::IPV6_TRANSPARENT, &1_i32.to_ne_bytes())
    } else {
        socket.set_ip_transparent_v4(true)
    }
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

const SO_NETNS_COOKIE_BYTES: libc::socklen_t = 8;
const NO_IPV6: &str = " (is IPv6 switched off here? listen on an IPv4 address)";
const NEEDS_NET_ADMIN: &str = " (needs CAP_NET_ADMIN)";

/// The first numbers of a `tcp_info`; the kernel tells as many as there is room for.
const TCP_INFO_WORDS: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    const OPTIONS: ListenOptions =
        ListenOptions { backlog: 16, mark: None, nodelay: true, shared: true, transparent: false };

    #[test]
    fn link_local_addresses_of_this_host_are_found_without_their_link() {
        let list = "fe80000000000000000000fffe000001 02 40 20 80     eth0\n\
                    00000000000000000000000000000001 01 80 10 80       lo\n";
        assert!(is_in_list(list, "fe80::ff:fe00:1".parse().unwrap()));
        assert!(!is_in_list(list, "fe80::ff:fe00:2".parse().unwrap()));
        assert!(!is_local_address("fe80::dead:beef".parse().unwrap()));
    }

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
}
