// SPDX-License-Identifier: Apache-2.0
//! Anonymous sets, as nft wants them: without overlaps.

use std::ops::RangeInclusive;

use ipnet::IpNet;

use crate::addr::join_ports;

/// Ports; ranges that overlap are joined.
pub(in crate::capture) fn ports(ranges: &[RangeInclusive<u16>]) -> String {
    let element = |range: RangeInclusive<u16>| match range.start() == range.end() {
        true => range.start().to_string(),
        false => format!("{}-{}", range.start(), range.end()),
    };
    braced(join_ports(ranges.to_vec()).into_iter().map(element).collect())
}

/// What matches destinations in `list`, one rule's beginning for each family that it has; a network
/// of one family says nothing about the other.
pub(in crate::capture) fn destinations(list: &[IpNet]) -> Vec<String> {
    let joined = IpNet::aggregate(&list.to_vec());
    let (v4, v6): (Vec<IpNet>, Vec<IpNet>) =
        joined.into_iter().partition(|network| network.addr().is_ipv4());
    let families = [("ipv4", "ip", v4), ("ipv6", "ip6", v6)];
    let matching = |(family, word, list): (&str, &str, Vec<IpNet>)| match list.as_slice() {
        [] => None,
        [all] if all.prefix_len() == 0 => Some(format!("meta nfproto {family}")),
        some => {
            Some(format!("{word} daddr {}", braced(some.iter().map(IpNet::to_string).collect())))
        }
    };
    families.into_iter().filter_map(matching).collect()
}

fn braced(list: Vec<String>) -> String {
    format!("{{ {} }}", list.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_joined_and_families_stay_apart() {
        assert_eq!(ports(&[80..=90, 22..=22, 85..=100]), "{ 22, 80-100 }");
        let list = ["10.0.0.0/8", "10.1.0.0/16", "::/0", "fd00::/8"];
        let list: Vec<IpNet> = list.iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(destinations(&list), ["ip daddr { 10.0.0.0/8 }", "meta nfproto ipv6"]);
        assert_eq!(destinations(&[]), Vec::<String>::new());
    }
}
