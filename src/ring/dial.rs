// SPDX-License-Identifier: Apache-2.0
//! The options of every dialled socket, in a form that linked requests can point to.

use std::net::SocketAddr;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};

use crate::profile::Sockets;

/// The options of every dialled socket. Boxed by the ring: the kernel reads the values when a
/// step of the chain runs, which may be after the submit.
#[derive(Debug)]
pub struct DialOptions {
    list: Vec<DialOption>,
}

/// One `setsockopt`.
#[derive(Debug)]
pub(super) struct DialOption {
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
    BoundV4,
    BoundV6,
}

impl DialOptions {
    /// As the profile says, marked with `mark`.
    #[must_use]
    pub fn new(sockets: &Sockets, mark: Option<u32>) -> DialOptions {
        let mut options = DialOptions { list: Vec::new() };
        options.add(When::BoundV4, libc::SOL_IP, libc::IP_TRANSPARENT, 1);
        options.add(When::BoundV6, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1);
        // Let connect choose the port, when it knows the destination: bind would have to find one
        // that is free for every destination (ip(7)).
        options.add(When::BoundV4, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1);
        options.add(When::BoundV6, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1);
        // A port is free again for another destination while it lingers in TIME_WAIT.
        options.add(When::BoundV4, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        options.add(When::BoundV6, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        if let Some(mark) = mark {
            options.add(When::Always, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed());
        }
        if sockets.nodelay {
            options.add(When::Always, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
        }
        options.add_sizes(sockets);
        options.add_keepalive(sockets);
        if let Some(name) = &sockets.congestion {
            options.list.push(DialOption {
                level: libc::IPPROTO_TCP,
                name: libc::TCP_CONGESTION,
                value: Value::Text(name.clone()),
                when: When::Always,
            });
        }
        options
    }

    /// How many options there are, for iterating while the ring is borrowed otherwise.
    pub(super) fn count(&self) -> usize {
        self.list.len()
    }

    /// Option `index`, if a socket bound to `from` needs it.
    pub(super) fn option(&self, index: usize, from: Option<SocketAddr>) -> Option<&DialOption> {
        self.list.get(index).filter(|option| match option.when {
            When::Always => true,
            When::BoundV4 => from.is_some_and(|addr| addr.is_ipv4()),
            When::BoundV6 => from.is_some_and(|addr| addr.is_ipv6()),
        })
    }

    fn add_sizes(&mut self, sockets: &Sockets) {
        let bytes = [
            (libc::SO_RCVBUF, sockets.receive_buffer_bytes),
            (libc::SO_SNDBUF, sockets.send_buffer_bytes),
        ];
        for (name, bytes) in bytes.into_iter().filter(|(_, bytes)| *bytes > 0) {
            self.add(When::Always, libc::SOL_SOCKET, name, bytes.cast_signed());
        }
        if !sockets.busy_poll.is_zero() {
            let micros = i32::try_from(sockets.busy_poll.as_micros()).unwrap_or(i32::MAX);
            self.add(When::Always, libc::SOL_SOCKET, libc::SO_BUSY_POLL, micros);
        }
    }

    fn add_keepalive(&mut self, sockets: &Sockets) {
        if let Some(keepalive) = sockets.keepalive {
            let tcp = libc::IPPROTO_TCP;
            let probes = i32::try_from(keepalive.probes).unwrap_or(i32::MAX);
            self.add(When::Always, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
            self.add(When::Always, tcp, libc::TCP_KEEPIDLE, seconds(keepalive.idle));
            self.add(When::Always, tcp, libc::TCP_KEEPINTVL, seconds(keepalive.interval));
            self.add(When::Always, tcp, libc::TCP_KEEPCNT, probes);
        }
        if !sockets.user_timeout.is_zero() {
            let millis = i32::try_from(sockets.user_timeout.as_millis()).unwrap_or(i32::MAX);
            self.add(When::Always, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, millis);
        }
    }

    fn add(&mut self, when: When, level: i32, name: i32, value: i32) {
        self.list.push(DialOption { level, name, value: Value::Number(value), when });
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
