// SPDX-License-Identifier: Apache-2.0
//! One syscall a function: what the rest of weir asks of the kernel outside the ring.
//!
//! Borrowed descriptors in, typed errors out; no policy.

pub mod cgroup;
pub mod closing;
pub mod conntrack;
pub mod memory;
pub mod netlink;
pub mod netns;
pub mod pipe;
pub mod process;
pub mod signals;
pub mod socket;
