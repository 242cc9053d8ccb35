// SPDX-License-Identifier: Apache-2.0
//! What captured traffic may never reach: ourselves.

use std::net::SocketAddr;

use crate::addr::canonical;
use crate::sys::socket::is_local_address;

/// The ports weir listens on: dialling one of them on an address of this host would loop.
#[derive(Clone, Debug, Default)]
pub struct OwnPorts {
    ports: Vec<u16>,
}

impl OwnPorts {
    /// Any number of ports, in any order.
    #[must_use]
    pub fn new(mut ports: Vec<u16>) -> OwnPorts {
        ports.sort_unstable();
        OwnPorts { ports }
    }

    /// Whether dialling `dst` would reach ourselves. Port 0 reaches nobody and is forbidden too.
    /// The address is looked at only if the port is ours, and then the kernel is asked: addresses
    /// come and go.
    #[must_use]
    pub fn forbids(&self, dst: SocketAddr) -> bool {
        let dst = canonical(dst);
        let is_ours = self.ports.binary_search(&dst.port()).is_ok();
        dst.port() == 0 || (is_ours && is_local_address(dst.ip()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_ports_are_forbidden_on_every_form_of_a_local_address() {
        let own = OwnPorts::new(vec![15006, 15001]);
        for ip in ["127.0.0.1", "127.9.9.9", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"] {
            for port in [15001, 15006, 0] {
                assert!(own.forbids(format!("{ip}:{port}").parse().unwrap()), "{ip}:{port}");
            }
            assert!(!own.forbids(format!("{ip}:80").parse().unwrap()), "{ip}:80");
        }
        // TEST-NET-1 of RFC 5737 is nobody's.
        assert!(!own.forbids("192.0.2.3:15006".parse().unwrap()));
    }
}
