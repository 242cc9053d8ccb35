// SPDX-License-Identifier: Apache-2.0
//! What captured traffic may never reach: ourselves.

use std::net::{IpAddr, SocketAddr};

use crate::addr::canonical;

/// The ports weir listens on, and the addresses of this host: together, what would loop.
#[derive(Debug, Default)]
pub struct OwnPorts {
    addresses: Vec<IpAddr>,
    ports: Vec<u16>,
}

impl OwnPorts {
    /// `ports` on any of `addresses`, on loopback, and on the unspecified address (which the
    /// kernel takes for loopback when it is dialled).
    #[must_use]
    pub fn new(mut ports: Vec<u16>, addresses: Vec<IpAddr>) -> OwnPorts {
        ports.sort_unstable();
        let addresses = addresses.into_iter().map(|ip| ip.to_canonical()).collect();
        OwnPorts { addresses, ports }
    }

    /// Whether dialling `dst` would reach ourselves. Port 0 reaches nobody and is forbidden too.
    #[must_use]
    pub fn forbids(&self, dst: SocketAddr) -> bool {
        let dst = canonical(dst);
        let ip = dst.ip();
        let is_local = ip.is_loopback() || ip.is_unspecified() || self.addresses.contains(&ip);
        dst.port() == 0 || (is_local && self.ports.binary_search(&dst.port()).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_ports_are_forbidden_on_every_form_of_a_local_address() {
        let own = OwnPorts::new(vec![15006, 15001], vec!["10.0.0.2".parse().unwrap()]);
        let local = [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.0.0.2",
            "[::1]",
            "[::]",
            "[::ffff:10.0.0.2]",
            "[::ffff:127.0.0.1]",
        ];
        for ip in local {
            for port in [15001, 15006, 0] {
                assert!(own.forbids(format!("{ip}:{port}").parse().unwrap()), "{ip}:{port}");
            }
            assert!(!own.forbids(format!("{ip}:80").parse().unwrap()), "{ip}:80");
        }
        assert!(!own.forbids("10.0.0.3:15006".parse().unwrap()));
    }
}
