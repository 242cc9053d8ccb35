// SPDX-License-Identifier: Apache-2.0
//! The options of every socket of a flow, in a form that linked requests can point to.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};

use super::RingError;
use crate::profile::Sockets;
use crate::sys::socket;

/// The options of every socket of a flow: dialled ones get them in the dial chain, accepted ones
/// inherit them from their listener. Boxed by the ring: the kernel reads the values when a step of
/// the chain runs, which may be after the submit.
#[derive(Debug)]
pub struct DialOptions {
    list: Vec<DialOption>,
}

/// One `setsockopt`.
#[derive(Debug)]
pub(super) struct DialOption {
    /// As the manuals call it.
    label: &'static str,
    level: i32,
    name: i32,
    value: Value,
    when: When,
}

#[derive(Debug)]
enum Value {
    Number(i32),
    Text(String),
}

/// For which sockets an option is set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum When {
    Always,
    /// Bound to somebody else's address.
    Bound,
    BoundV4,
    BoundV6,
    /// Bound to somebody else's address, and to an address of this host.
    Here,
    /// Of flows that last, see `Ring::keep_alive`.
    Lasting,
    /// All but these.
    NotHere,
}

/// Somebody else's address to dial from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DialFrom {
    /// What is dialled is not of this host: no mark leads its answers here.
    pub abroad: bool,
    /// To bind to.
    pub addr: SocketAddr,
}

/// `SO_MARK` of dialled sockets; needs `CAP_NET_ADMIN`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Marks {
    /// Of those bound to somebody else's address that dial an address of this host.
    pub bound: u32,
    /// Of all others.
    pub unbound: u32,
}

impl DialOptions {
    /// As the profile says, marked with `marks`.
    #[must_use]
    pub fn new(sockets: &Sockets, marks: Option<Marks>) -> DialOptions {
        let mut options = DialOptions { list: Vec::new() };
        options.add(When::BoundV4, "IP_TRANSPARENT", (libc::SOL_IP, libc::IP_TRANSPARENT), 1);
        options.add(When::BoundV6, "IPV6_TRANSPARENT", (libc::SOL_IPV6, libc::IPV6_TRANSPARENT), 1);
        // A port is free again for another destination while it lingers in TIME_WAIT.
        options.add(When::Bound, "SO_REUSEADDR", (libc::SOL_SOCKET, libc::SO_REUSEADDR), 1);
        if let Some(Marks { bound, unbound }) = marks {
            let option = (libc::SOL_SOCKET, libc::SO_MARK);
            options.add(When::Here, "SO_MARK", option, bound.cast_signed());
            options.add(When::NotHere, "SO_MARK", option, unbound.cast_signed());
        }
        if sockets.nodelay {
            options.add(When::Always, "TCP_NODELAY", (libc::IPPROTO_TCP, libc::TCP_NODELAY), 1);
        }
        options.add_sizes(sockets);
        options.add_keepalive(sockets);
        if let Some(name) = &sockets.congestion {
            options.list.push(DialOption {
                label: "TCP_CONGESTION",
                level: libc::IPPROTO_TCP,
                name: libc::TCP_CONGESTION,
                value: Value::Text(name.clone()),
                when: When::Always,
            });
        }
        options
    }

    /// Sets them on a listener, from which accepted sockets inherit all of it (`sk_clone_lock` in
    /// net/core/sock.c); all but the mark, by which a listener's own handshakes are told apart, and
    /// keepalive itself, of which they inherit only how often.
    ///
    /// # Errors
    ///
    /// `RingError::Option`, with the name of the option that the kernel refuses.
    pub fn tune(&self, listener: BorrowedFd<'_>) -> Result<(), RingError> {
        for option in &self.list {
            let DialOption { label, level, name, when, .. } = *option;
            if !matches!(when, When::Always | When::Lasting) || name == libc::SO_KEEPALIVE {
                continue;
            }
            let set = match &option.value {
                Value::Number(number) => {
                    socket::set_option(listener, level, name, &number.to_ne_bytes())
                }
                Value::Text(text) => socket::set_option(listener, level, name, text.as_bytes()),
            };
            set.map_err(|source| RingError::Option { option: label, source })?;
        }
        Ok(())
    }

    /// How many options there are, for iterating while the ring is borrowed otherwise.
    pub(super) fn count(&self) -> usize {
        self.list.len()
    }

    /// Option `index`, if a socket bound to `from` needs it.
    pub(super) fn option(&self, index: usize, from: Option<DialFrom>) -> Option<&DialOption> {
        self.list.get(index).filter(|option| match option.when {
            When::Always => true,
            When::Bound => from.is_some(),
            When::Here => from.is_some_and(|from| !from.abroad),
            When::Lasting => false,
            When::NotHere => from.is_none_or(|from| from.abroad),
            When::BoundV4 => from.is_some_and(|from| from.addr.is_ipv4()),
            When::BoundV6 => from.is_some_and(|from| from.addr.is_ipv6()),
        })
    }

    /// Option `index`, if it is for flows that last.
    pub(super) fn lasting(&self, index: usize) -> Option<&DialOption> {
        self.list.get(index).filter(|option| option.when == When::Lasting)
    }

    fn add_sizes(&mut self, sockets: &Sockets) {
        let bytes = [
            ("SO_RCVBUF", libc::SO_RCVBUF, sockets.receive_buffer_bytes),
            ("SO_SNDBUF", libc::SO_SNDBUF, sockets.send_buffer_bytes),
        ];
        for (label, name, bytes) in bytes.into_iter().filter(|(.., bytes)| *bytes > 0) {
            self.add(When::Always, label, (libc::SOL_SOCKET, name), bytes.cast_signed());
        }
        if !sockets.busy_poll.is_zero() {
            let micros = i32::try_from(sockets.busy_poll.as_micros()).unwrap_or(i32::MAX);
            self.add(When::Always, "SO_BUSY_POLL", (libc::SOL_SOCKET, libc::SO_BUSY_POLL), micros);
        }
    }

    fn add_keepalive(&mut self, sockets: &Sockets) {
        if let Some(keepalive) = sockets.keepalive {
            let tcp = libc::IPPROTO_TCP;
            let probes = i32::try_from(keepalive.probes).unwrap_or(i32::MAX);
            let (idle, interval) = (seconds(keepalive.idle), seconds(keepalive.interval));
            let on = (libc::SOL_SOCKET, libc::SO_KEEPALIVE);
            // In this order: the time that a flow was idle already counts (`tcp_sock_set_keepidle`
            // in net/ipv4/tcp.c).
            self.add(When::Lasting, "SO_KEEPALIVE", on, 1);
            self.add(When::Lasting, "TCP_KEEPIDLE", (tcp, libc::TCP_KEEPIDLE), idle);
            self.add(When::Lasting, "TCP_KEEPINTVL", (tcp, libc::TCP_KEEPINTVL), interval);
            self.add(When::Lasting, "TCP_KEEPCNT", (tcp, libc::TCP_KEEPCNT), probes);
        }
        if !sockets.user_timeout.is_zero() {
            let millis = i32::try_from(sockets.user_timeout.as_millis()).unwrap_or(i32::MAX);
            self.add(
                When::Always,
                "TCP_USER_TIMEOUT",
                (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
                millis,
            );
        }
    }

    fn add(&mut self, when: When, label: &'static str, (level, name): (i32, i32), value: i32) {
        self.list.push(DialOption { label, level, name, value: Value::Number(value), when });
    }
}

impl DialOption {
    /// The request that sets it on `fd`.
    pub(super) fn request(&self, fd: types::Fixed) -> Entry {
        let (pointer, bytes) = match &self.value {
            Value::Number(number) => ((&raw const *number).cast(), 4),
            Value::Text(text) => (text.as_ptr().cast(), u32::try_from(text.len()).unwrap_or(0)),
        };
        let (level, name) = (self.level.cast_unsigned(), self.name.cast_unsigned());
        opcode::SetSockOpt::new(fd, level, name, pointer, bytes).build()
    }
}

/// Whole seconds, at least one: what the keepalive options count in.
fn seconds(span: Duration) -> i32 {
    i32::try_from(span.as_secs().max(1)).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use socket2::SockRef;

    use super::*;
    use crate::profile::Keepalive;

    #[test]
    fn accepted_socket_inherits_what_its_listener_was_tuned_to() {
        let keepalive = Keepalive {
            idle: Duration::from_secs(61),
            interval: Duration::from_secs(7),
            probes: 3,
        };
        let sockets = Sockets {
            busy_poll: Duration::ZERO,
            congestion: Some("reno".to_owned()),
            keepalive: Some(keepalive),
            nodelay: true,
            receive_buffer_bytes: 65536,
            send_buffer_bytes: 32768,
            user_timeout: Duration::from_millis(4321),
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        DialOptions::new(&sockets, Some(Marks { bound: 2, unbound: 1 }))
            .tune(listener.as_fd())
            .unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let socket = SockRef::from(&accepted);
        assert!(socket.tcp_nodelay().unwrap() && !socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(61));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(7));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_millis(4321)));
        assert!(socket.tcp_congestion().unwrap().starts_with(b"reno"));
        // The kernel doubles what is asked for (socket(7)).
        assert_eq!(socket.recv_buffer_size().unwrap(), 131_072);
        assert_eq!(socket.send_buffer_size().unwrap(), 65_536);
        assert_eq!(socket.mark().unwrap(), 0);
    }

    #[test]
    fn refused_option_is_named() {
        let sockets = Sockets {
            busy_poll: Duration::ZERO,
            congestion: Some("no_such_control".to_owned()),
            keepalive: None,
            nodelay: true,
            receive_buffer_bytes: 0,
            send_buffer_bytes: 0,
            user_timeout: Duration::ZERO,
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let error = DialOptions::new(&sockets, None).tune(listener.as_fd()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "set TCP_CONGESTION: No such file or directory (os error 2) (see `sockets` in the \
             profile)"
        );
    }
}
