// SPDX-License-Identifier: Apache-2.0
//! Changes of rules, routes and tables in a network namespace, told by the kernel.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// Listens in the network namespace in which it was made.
#[derive(Debug)]
pub struct Changes {
    /// Something has changed since `seen`.
    news: bool,
    sockets: [OwnedFd; 2],
}

impl Changes {
    /// Listens from now on.
    ///
    /// # Errors
    ///
    /// `EPERM`: the packet filter's changes are told to holders of CAP_NET_ADMIN only.
    pub fn listen() -> io::Result<Changes> {
        let routes = subscribe(SockProtocol::NetlinkRoute, ROUTES)?;
        let tables = subscribe(SockProtocol::NetlinkNetFilter, NFTABLES)?;
        // What changed before the first message could come is news too.
        Ok(Changes { news: true, sockets: [routes, tables] })
    }

    /// Something has changed since `seen` was called.
    pub fn any(&mut self) -> bool {
        for socket in &self.sockets {
            self.news |= drain(socket);
        }
        self.news
    }

    /// What has changed was looked at, and all was well.
    pub fn seen(&mut self) {
        self.news = false;
    }
}

fn subscribe(protocol: SockProtocol, groups: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// Whether there was a message. What they say does not matter, and more than fit are one, too.
fn drain(socket: &OwnedFd) -> bool {
    let mut news = false;
    let mut message = [0; MESSAGE_BYTES];
    for _ in 0..MESSAGES_MAX {
        match recv(socket.as_raw_fd(), &mut message, MsgFlags::MSG_DONTWAIT) {
            Ok(_) | Err(Errno::ENOBUFS) => news = true,
            Err(_) => break,
        }
    }
    news
}

/// `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV4_RULE`, `RTMGRP_IPV6_ROUTE` and `RTNLGRP_IPV6_RULE`
/// (linux/rtnetlink.h).
const ROUTES: u32 = 0x40 | 0x80 | 0x400 | 1 << 18;
/// `NFNLGRP_NFTABLES` (linux/netfilter/nfnetlink.h) is 7.
const NFTABLES: u32 = 1 << 6;
/// The rest of a longer message is dropped.
const MESSAGE_BYTES: usize = 512;
/// A storm of changes must not hold up who asks; the rest is there the next time.
const MESSAGES_MAX: u32 = 1000;
