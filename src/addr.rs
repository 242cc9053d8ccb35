// SPDX-License-Identifier: Apache-2.0
//! Addresses that cannot be swapped by accident.
//!
//! Always canonical: a v4-mapped IPv6 address is kept as the IPv4 address it stands for.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v4_mapped_becomes_v4() {
        let mapped: SocketAddr = "[::ffff:10.1.2.3]:80".parse().unwrap();
        assert_eq!(OriginalDst::new(mapped).addr(), "10.1.2.3:80".parse().unwrap());
    }
}
