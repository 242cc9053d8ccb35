// SPDX-License-Identifier: Apache-2.0
//! Addresses that cannot be swapped by accident.
//!
//! Always canonical: a v4-mapped IPv6 address is kept as the IPv4 address it stands for.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

macro_rules! address {
    ($(#[$text:meta])* $name:ident) => {
        $(#[$text])*
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(SocketAddr);

        impl $name {
            /// Takes any form of the address and keeps the canonical one.
            #[must_use]
            pub fn new(addr: SocketAddr) -> $name {
                $name(canonical(addr))
            }

            /// The address itself.
            #[must_use]
            pub const fn addr(self) -> SocketAddr {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

address!(
    /// The peer of an accepted socket.
    Downstream
);
address!(
    /// Where the application meant to go, before capture.
    OriginalDst
);
address!(
    /// What a flow dials.
    Upstream
);

/// `::ffff:a.b.c.d` as `a.b.c.d`; anything else unchanged, without flow label and scope of
/// global addresses.
#[must_use]
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), addr.port()),
        IpAddr::V6(_) => addr,
    }
}

/// The same ports, sorted and disjoint.
#[must_use]
pub fn join_ports(mut ranges: Vec<RangeInclusive<u16>>) -> Vec<RangeInclusive<u16>> {
    ranges.sort_unstable_by_key(|range| *range.start());
    let mut joined: Vec<RangeInclusive<u16>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if *range.start() <= last.end().saturating_add(1) => {
                *last = *last.start()..=*range.end().max(last.end());
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v4_mapped_becomes_v4() {
        let mapped: SocketAddr = "[::ffff:10.1.2.3]:80".parse().unwrap();
        assert_eq!(OriginalDst::new(mapped).addr(), "10.1.2.3:80".parse().unwrap());
    }

    #[test]
    fn ports_are_sorted_and_joined() {
        assert_eq!(join_ports(vec![80..=80, 1..=5, 6..=9, 8..=8]), [1..=9, 80..=80]);
        assert_eq!(join_ports(vec![1..=65_535, 22..=22]), [1..=65_535]);
    }
}
