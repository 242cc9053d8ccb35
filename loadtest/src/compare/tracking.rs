// SPDX-License-Identifier: Apache-2.0
//! Empties the connection tracking table of this thread's network namespace: what `conntrack -F`
//! does, without the program.

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

/// A message of netlink without a filter, which is about every entry.
pub(super) fn forget_all() -> Result<()> {
    let family = Domain::from(libc::AF_NETLINK);
    let protocol = Protocol::from(libc::NETLINK_NETFILTER);
    let mut socket = Socket::new(family, Type::RAW, Some(protocol)).context(WHAT)?;
    // Not connected, it goes to the kernel.
    socket.write_all(&request()).context(WHAT)?;
    let mut answer = [0; 256];
    let bytes = socket.read(&mut answer).context(WHAT)?;
    let code = answer.get(HEADER_BYTES..HEADER_BYTES + 4).filter(|_| bytes >= HEADER_BYTES + 4);
    let code = code.and_then(|code| code.try_into().ok()).map_or(-libc::EPROTO, i32::from_ne_bytes);
    ensure!(code == 0, "{WHAT}: {}", std::io::Error::from_raw_os_error(-code));
    Ok(())
}

/// `nlmsghdr` and `nfgenmsg` (linux/netlink.h, linux/netfilter/nfnetlink.h), to be acknowledged.
fn request() -> Vec<u8> {
    let mut bytes = Vec::from(REQUEST_BYTES.to_ne_bytes());
    bytes.extend(((SUBSYSTEM_CONNTRACK << 8) | MESSAGE_DELETE).to_ne_bytes());
    bytes.extend(FLAGS_REQUEST_ACK.to_ne_bytes());
    // Sequence and sender; then any family, version 0, no resource.
    bytes.extend([0; 8]);
    bytes.extend([0; 4]);
    bytes
}

const FLAGS_REQUEST_ACK: u16 = 5;
const HEADER_BYTES: usize = 16;
const MESSAGE_DELETE: u16 = 2;
const REQUEST_BYTES: u32 = 20;
const SUBSYSTEM_CONNTRACK: u16 = 1;
const WHAT: &str = "empty the table of tracked connections of the lab";
