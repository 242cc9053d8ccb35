// SPDX-License-Identifier: Apache-2.0
//! weir from outside: the real binary between real sockets, in network namespaces of its own.
//!
//! Each test is named by the fact it holds; its comment names the rows of the failure catalogue.
//! They need root, and leave nothing behind.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod applications;
mod checks;
mod coming;
mod copy;
mod crash;
mod etcd;
mod facade;
mod gateway;
mod half_close;
mod harness;
mod hook;
mod inbound;
mod life;
mod limits;
mod loops;
mod modes;
mod outbound;
mod outbound_connect;
mod outbound_nft;
mod peers;
mod programs;
mod proxy_protocol;
mod redirect;
mod relays;
mod reload;
mod ring;
mod routing;
mod rules;
mod services;
mod sockmap;
mod sofaregistry;
mod sofarpc;
mod splice;
mod takeover;
mod tune;
mod workloads;
mod zookeeper;
