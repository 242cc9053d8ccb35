// SPDX-License-Identifier: Apache-2.0
//! The PROXY protocol header, versions 1 and 2: tells the workload who the client is and whom it
//! dialled (haproxy's doc/proxy-protocol.txt).
//!
//! Pure, and allocates nothing. Addresses are canonical: a v4-mapped address is an IPv4 one.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use crate::addr::{Downstream, OriginalDst};
use crate::config::ProxyProtocol;

/// A header, as it goes out.
pub(super) struct Header {
    bytes: [u8; BYTES_MAX],
    len: usize,
}

impl Header {
    /// The header of one connection; `None` if there shall be none.
    pub(super) fn new(version: ProxyProtocol, from: Downstream, to: OriginalDst) -> Option<Header> {
        let mut header = Header { bytes: [0; BYTES_MAX], len: 0 };
        match version {
            ProxyProtocol::Off => return None,
            ProxyProtocol::V1 => header.write_text(from.addr(), to.addr()),
            ProxyProtocol::V2 => header.write_binary(from.addr(), to.addr()),
        }
        Some(header)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn write_text(&mut self, from: SocketAddr, to: SocketAddr) {
        let mut room = self.bytes.as_mut_slice();
        // Writing cannot fail: the longest line is 107 bytes.
        let _ = match (from.ip(), to.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                write!(room, "PROXY TCP4 {source} {destination} {} {}\r\n", from.port(), to.port())
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                write!(room, "PROXY TCP6 {source} {destination} {} {}\r\n", from.port(), to.port())
            }
            _ => write!(room, "PROXY UNKNOWN\r\n"),
        };
        self.len = BYTES_MAX - room.len();
    }

    fn write_binary(&mut self, from: SocketAddr, to: SocketAddr) {
        self.push(&SIGNATURE);
        match (from.ip(), to.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.push(&[PROXY, TCP_OVER_V4, 0, 12]);
                self.push(&source.octets());
                self.push(&destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.push(&[PROXY, TCP_OVER_V6, 0, 36]);
                self.push(&source.octets());
                self.push(&destination.octets());
            }
            // No family could say both: the receiver takes the connection's own addresses.
            _ => return self.push(&[LOCAL, 0, 0, 0]),
        }
        self.push(&from.port().to_be_bytes());
        self.push(&to.port().to_be_bytes());
    }

    fn push(&mut self, bytes: &[u8]) {
        if let Some(room) = self.bytes.get_mut(self.len..self.len + bytes.len()) {
            room.copy_from_slice(bytes);
            self.len += bytes.len();
        }
    }
}

/// "The worst case" of version 1, without its terminating zero.
const BYTES_MAX: usize = 107;
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
/// Version 2, command LOCAL.
const LOCAL: u8 = 0x20;
const TCP_OVER_V4: u8 = 0x11;
const TCP_OVER_V6: u8 = 0x21;

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;

    fn header(version: ProxyProtocol, from: &str, to: &str) -> Vec<u8> {
        let from = Downstream::new(from.parse().unwrap());
        let to = OriginalDst::new(to.parse().unwrap());
        Header::new(version, from, to).map_or_else(Vec::new, |header| header.bytes().to_vec())
    }

    #[test]
    fn text_names_family_addresses_and_ports() {
        let text = |from, to| String::from_utf8(header(ProxyProtocol::V1, from, to)).unwrap();
        assert_eq!(text("10.0.0.1:1", "10.0.0.2:80"), "PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\n");
        assert_eq!(
            text("[::ffff:10.0.0.1]:1", "10.0.0.2:80"),
            "PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\n"
        );
        assert_eq!(text("[fd00::1]:1", "[fd00::2]:80"), "PROXY TCP6 fd00::1 fd00::2 1 80\r\n");
        assert_eq!(text("[fd00::1]:1", "10.0.0.2:80"), "PROXY UNKNOWN\r\n");
        let long = "[1111:2222:3333:4444:5555:6666:7777:8888]:65535";
        assert_eq!(text(long, long).len(), 11 + 39 + 1 + 39 + 1 + 5 + 1 + 5 + 2);
    }

    #[test]
    fn binary_has_the_family_and_length_of_its_addresses() {
        let v4 = header(ProxyProtocol::V2, "10.0.0.1:258", "[::ffff:10.0.0.2]:80");
        assert_eq!(v4[..12], SIGNATURE);
        assert_eq!(v4[12..], [0x21, 0x11, 0, 12, 10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 0, 80]);
        let v6 = header(ProxyProtocol::V2, "[fd00::1]:258", "[fd00::2]:80");
        assert_eq!((v6.len(), &v6[12..16]), (52, &[0x21, 0x21, 0, 36][..]));
        assert_eq!(v6[48..], [1, 2, 0, 80]);
        assert_eq!(header(ProxyProtocol::V2, "[fd00::1]:1", "10.0.0.2:80")[12..], [0x20, 0, 0, 0]);
        assert!(header(ProxyProtocol::Off, "10.0.0.1:1", "10.0.0.2:80").is_empty());
    }
}
