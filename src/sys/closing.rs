// SPDX-License-Identifier: Apache-2.0
//! Sockets of this network namespace that were closed and wait for the last acknowledgement of their
//! peer.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::socket::is_local_address;

/// How many of them have an address that is not of this host, as only transparent sockets do. Reads
/// the kernel's list of all TCP sockets: not for busy moments.
#[must_use]
pub fn under_foreign_addresses() -> usize {
    let mut count = 0;
    let mut is_local = HashMap::new();
    for file in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        let foreign = text.lines().filter_map(closing_at).filter(|ip| {
            let ip = ip.to_canonical();
            !*is_local.entry(ip).or_insert_with(|| is_local_address(ip))
        });
        count += foreign.count();
    }
    count
}

/// The local address of a socket that waits to be acknowledged; a line is
/// `slot: address:port address:port state …` in base 16.
fn closing_at(line: &str) -> Option<IpAddr> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, state) = (words.next()?, words.nth(1)?);
    if !CLOSING.contains(&u8::from_str_radix(state, 16).ok()?) {
        return None;
    }
    address(local.split_once(':')?.0)
}

/// Words of 32 bits, each as this machine writes a number.
fn address(text: &str) -> Option<IpAddr> {
    let word = |index: usize| {
        let digits = text.get(8 * index..8 * index + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    if text.len() == 8 {
        return Some(Ipv4Addr::from(word(0)?).into());
    }
    let mut bytes = [0; 16];
    for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
        chunk.copy_from_slice(&word(index)?);
    }
    Some(Ipv6Addr::from(bytes).into())
}

/// `TCP_FIN_WAIT1`, `TCP_LAST_ACK` and `TCP_CLOSING` (include/net/tcp_states.h).
const CLOSING: [u8; 3] = [4, 9, 11];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn only_who_waits_for_an_acknowledgement_is_seen() {
        let line =
            |local, state| format!("   1: {local}:0050 0102620A:A410 {state} 00000000:00000000");
        let (v4, v6) = ("0202620A", "000098FD020000000000000002000000");
        for (local, state, expected) in [
            (v4, "09", Some("10.98.2.2")),
            (v4, "04", Some("10.98.2.2")),
            (v4, "0B", Some("10.98.2.2")),
            (v4, "01", None),
            (v4, "06", None),
            (v6, "09", Some("fd98:0:0:2::2")),
        ] {
            let expected = expected.map(|ip| ip.parse().unwrap());
            assert_eq!(closing_at(&line(local, state)), expected, "{local} {state}");
        }
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt";
        assert_eq!(closing_at(head), None);
    }
}
