// SPDX-License-Identifier: Apache-2.0
//! What requests point to until they are submitted: addresses, message headers, descriptors.
//!
//! Bump arenas with a fixed room, emptied by every submit. The kernel copies all of it while it
//! submits (`IORING_FEAT_SUBMIT_STABLE`), so nothing here outlives that.
#![expect(unsafe_code, reason = "message headers are plain C structs")]

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use socket2::SockAddr;

use crate::op::SEGMENTS_PER_SEND_MAX;

/// Room for what one submission queue can point to.
pub(super) struct Scratch {
    addresses: Vec<SockAddr>,
    descriptors: Vec<OwnedFd>,
    messages: Vec<libc::msghdr>,
    numbers: Vec<RawFd>,
    vectors: Vec<libc::iovec>,
}

impl Scratch {
    pub(super) fn new() -> Scratch {
        Scratch {
            addresses: Vec::with_capacity(ADDRESSES_MAX),
            descriptors: Vec::with_capacity(DESCRIPTORS_MAX),
            messages: Vec::with_capacity(MESSAGES_MAX),
            numbers: Vec::with_capacity(DESCRIPTORS_MAX),
            vectors: Vec::with_capacity(MESSAGES_MAX * usize::from(SEGMENTS_PER_SEND_MAX)),
        }
    }

    /// Room for `requests` more of any kind (a dial points to two addresses).
    pub(super) fn has_room(&self, requests: usize) -> bool {
        self.addresses.len() + 2 * requests <= ADDRESSES_MAX
            && self.descriptors.len() + requests <= DESCRIPTORS_MAX
            && self.messages.len() + requests <= MESSAGES_MAX
    }

    /// Everything was submitted. Closes the descriptors whose slots hold the sockets now.
    pub(super) fn clear(&mut self) {
        self.addresses.clear();
        self.descriptors.clear();
        self.messages.clear();
        self.numbers.clear();
        self.vectors.clear();
    }

    pub(super) fn address(&mut self, addr: SocketAddr) -> (*const libc::sockaddr, libc::socklen_t) {
        debug_assert!(self.addresses.len() < ADDRESSES_MAX);
        self.addresses.push(SockAddr::from(addr));
        self.addresses
            .last()
            .map_or((std::ptr::null(), 0), |addr| (addr.as_ptr().cast(), addr.len()))
    }

    pub(super) fn keep_descriptor(&mut self, fd: OwnedFd) -> *const RawFd {
        debug_assert!(self.numbers.len() < DESCRIPTORS_MAX);
        self.numbers.push(fd.as_raw_fd());
        self.descriptors.push(fd);
        self.numbers.last().map_or(std::ptr::null(), |number| &raw const *number)
    }

    pub(super) fn message(
        &mut self,
        vectors: impl Iterator<Item = libc::iovec>,
    ) -> *const libc::msghdr {
        debug_assert!(self.messages.len() < MESSAGES_MAX);
        let start = self.vectors.len();
        self.vectors.extend(vectors.take(usize::from(SEGMENTS_PER_SEND_MAX)));
        // SAFETY: all-zero is a valid `msghdr`: no name, no control, no flags.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr().wrapping_add(start);
        message.msg_iovlen = self.vectors.len() - start;
        self.messages.push(message);
        self.messages.last().map_or(std::ptr::null(), |message| &raw const *message)
    }
}

/// Addresses between two submits; a dial needs two.
const ADDRESSES_MAX: usize = 256;
/// Adopted connections between two submits.
const DESCRIPTORS_MAX: usize = 128;
/// Gathered sends between two submits.
const MESSAGES_MAX: usize = 256;
