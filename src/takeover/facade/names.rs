// SPDX-License-Identifier: Apache-2.0
//! Names of providers in ZooKeeper's tree: what the registry holds, and what an application sees in
//! its place.
//!
//! Pure, and without a memory: the name that an application sees carries the address it stands for,
//! so that it can be turned back by any weir at any time. Everything but the address stays as it was
//! written, byte for byte.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;

use super::super::layout::{decoded, encoded};
use crate::config::{Layout, Takeover, Tree};

/// What names are made by.
#[derive(Clone, Debug)]
pub struct Names {
    layout: Layout,
    /// By service: an address of its own.
    listens: BTreeMap<String, SocketAddr>,
    outbound: SocketAddr,
    root: String,
}

/// A directory of providers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Directory<'a> {
    /// As it stands in the path.
    interface: &'a str,
    /// What stands before it.
    root: &'a str,
}

/// A name as an application sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Told {
    /// Callers want this one of several; calls do not say so where weir reads them.
    pub(super) group: String,
    pub(super) leaf: String,
    /// Calls to it must find this service.
    pub(super) service: String,
}

/// Where a leaf says that its provider is.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Authority {
    /// Of the leaf's bytes.
    at: Range<usize>,
    /// As `host:port`.
    place: String,
    port: u16,
}

impl Names {
    /// Of this registry, as this weir's applications see it.
    #[must_use]
    pub fn new(takeover: &Takeover, tree: &Tree) -> Names {
        let listens = takeover.services.iter().filter_map(|one| {
            let mut listen = one.listen?;
            if listen.ip().is_unspecified() {
                listen.set_ip(takeover.outbound.ip());
            }
            Some((one.name.clone(), listen))
        });
        Names {
            layout: tree.layout,
            listens: listens.collect(),
            outbound: takeover.outbound,
            root: tree.root.clone(),
        }
    }

    /// How `leaf` in `directory` is told to an application; `None` if it stays as it is, because weir
    /// could not carry calls there.
    pub(super) fn told(&self, directory: Directory<'_>, leaf: &str) -> Option<Told> {
        let interface = self.interface(directory)?;
        let service = self.layout.service_of(&interface, leaf)?;
        let text = decoded(leaf)?;
        let scheme = text.split_once("://")?.0;
        let listen = self.listens.get(&service).copied();
        let can_share =
            scheme == self.layout.scheme() && self.layout.is_routable(&interface, &text);
        let shared = Some(self.outbound).filter(|_| can_share);
        let Authority { at, .. } = authority(leaf)?;
        let real = leaf.get(at.clone())?;
        let mark = if text.contains('?') { "%26" } else { "%3F" };
        let (before, after) = (leaf.get(..at.start)?, leaf.get(at.end..)?);
        let addr = encoded(&listen.or(shared)?.to_string());
        let group = self.layout.group_of(&text).to_owned();
        let leaf = format!("{before}{addr}{after}{mark}{STANDS_FOR}%3D{real}");
        Some(Told { group, leaf, service })
    }

    /// Of a directory that the registry's settings lead to.
    fn interface(&self, directory: Directory<'_>) -> Option<String> {
        let interface = decoded(directory.interface).filter(|_| directory.root == self.root)?;
        crate::config::is_service_name(&interface).then_some(interface)
    }
}

/// The directory of providers that `path` is.
pub(super) fn directory(path: &str) -> Option<Directory<'_>> {
    let (root, interface) = path.strip_suffix(PROVIDERS)?.rsplit_once('/')?;
    (!interface.is_empty()).then_some(Directory { interface, root })
}

/// The provider's leaf that `path` is, in its directory.
pub(super) fn leaf(path: &str) -> Option<(Directory<'_>, &str)> {
    let (parent, leaf) = path.rsplit_once('/')?;
    Some((directory(parent)?, leaf))
}

/// The place that the provider's leaf `path` says, as `host:port`, and its port.
pub(in super::super) fn place(path: &str) -> Option<(String, u16)> {
    let Authority { place, port, .. } = authority(leaf(path)?.1)?;
    Some((place, port))
}

/// Whether `path` is a leaf among providers of which nobody can say what it names.
pub(super) fn is_unreadable(path: &str) -> bool {
    leaf(path).is_some_and(|(_, leaf)| letters(leaf).is_none())
}

/// The provider's leaf `path`, at another address.
pub(in super::super) fn moved(path: &str, addr: SocketAddr) -> Option<String> {
    let (_, leaf) = leaf(path)?;
    let at = authority(leaf)?.at;
    let begin = path.len() - leaf.len();
    let (before, after) = (path.get(..begin + at.start)?, path.get(begin + at.end..)?);
    Some(format!("{before}{}{after}", encoded(&addr.to_string())))
}

/// What the registry holds in place of the told leaf `path`; `None` if it is none.
pub fn untold(path: &str) -> Option<String> {
    let (_, leaf) = leaf(path)?;
    let letters: Vec<(Range<usize>, u8)> = letters(leaf)?;
    let text: Vec<u8> = letters.iter().map(|(_, byte)| *byte).collect();
    let word = [STANDS_FOR.as_bytes(), b"="].concat();
    let last = text.windows(word.len()).rposition(|window| window == word)?;
    let mark = last.checked_sub(1).filter(|at| matches!(text.get(*at), Some(b'?' | b'&')))?;
    let real = leaf.get(letters.get(last + word.len())?.0.start..)?;
    let begin = letters.get(mark)?.0.start;
    let at = authority(leaf)?.at;
    // Nothing but an address ever stands there.
    let is_last = !text.get(last..)?.contains(&b'&');
    let (before, after) = (leaf.get(..at.start)?, leaf.get(at.end..begin)?);
    let parent = path.get(..path.len() - leaf.len())?;
    is_last.then(|| format!("{parent}{before}{real}{after}"))
}

/// Behind `scheme://`, and behind a name and a password.
fn authority(leaf: &str) -> Option<Authority> {
    let letters = letters(leaf)?;
    let text: Vec<u8> = letters.iter().map(|(_, byte)| *byte).collect();
    let begin = text.windows(3).position(|window| window == b"://")? + 3;
    let rest = text.get(begin..)?;
    let len = rest.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
    let rest = rest.get(..len)?;
    let user = rest.iter().rposition(|byte| *byte == b'@').map_or(0, |at| at + 1);
    let place = String::from_utf8(rest.get(user..)?.to_vec()).ok()?;
    let port = place.rsplit_once(':')?.1.parse().ok().filter(|port| *port > 0)?;
    let first = letters.get(begin + user)?.0.start;
    let last = letters.get(begin + len - 1)?.0.end;
    Some(Authority { at: first..last, place, port })
}

/// Every byte that `leaf` says, and where it stands.
fn letters(leaf: &str) -> Option<Vec<(Range<usize>, u8)>> {
    let mut letters = Vec::with_capacity(leaf.len());
    let mut at = 0;
    while let Some(byte) = leaf.as_bytes().get(at) {
        let end = if *byte == b'%' { at + 3 } else { at + 1 };
        let digit = |at: usize| char::from(*leaf.as_bytes().get(at)?).to_digit(16);
        let byte = match byte {
            b'%' => u8::try_from(digit(at + 1)? * 16 + digit(at + 2)?).ok()?,
            byte => *byte,
        };
        letters.push((at..end, byte));
        at = end;
    }
    Some(letters)
}

const PROVIDERS: &str = "/providers";
/// The parameter by which a told name says what it stands for.
const STANDS_FOR: &str = "weir.at";

#[cfg(test)]
mod tests {
    use super::*;

    fn names(layout: &str, more: &str) -> Names {
        let text = format!(
            "takeover:\n  outbound: \"127.0.0.1:20882\"\n  registries: [{{ kind: zookeeper, \
             servers: [\"a:1\"], layout: {layout} }}]\n  {more}"
        );
        let config = crate::config::Config::parse("weir.yaml", None, &text);
        let takeover = config.unwrap_or_else(|wrong| panic!("{wrong}")).takeover.unwrap();
        let crate::config::RegistryKind::Zookeeper(tree) = &takeover.registries[0].kind else {
            panic!("another kind")
        };
        Names::new(&takeover, tree)
    }

    fn told(names: &Names, path: &str) -> Option<(String, String)> {
        let (directory, leaf) = leaf(path).unwrap();
        names.told(directory, leaf).map(|told| (decoded(&told.leaf).unwrap(), told.service))
    }

    const NODE: &str = "/sofa-rpc/com.a.Demo/providers/bolt%3A%2F%2F10.0.0.5%3A12200%3FuniqueId%3D%26version%3D1.0%26%5Ba%5D%3D%5Bb%23c%5D";

    #[test]
    fn told_name_leads_to_outbound_and_back() {
        let sofa = names("sofa", "");
        let (text, service) = told(&sofa, NODE).unwrap();
        let expected =
            "bolt://127.0.0.1:20882?uniqueId=&version=1.0&[a]=[b#c]&weir.at=10.0.0.5:12200";
        assert_eq!((text.as_str(), service.as_str()), (expected, "com.a.Demo:1.0"));
        let dubbo =
            names("dubbo", "services: [{ name: \"com.a.Demo:2.0\", listen: \"0.0.0.0:9\" }]");
        let root = "/dubbo/com.a.Demo/providers";
        let leaf = "dubbo%3A%2F%2F10.0.0.5%3A20880%2Fcom.a.Demo%3Fversion%3D0.0.0";
        let own = "tri%3A%2F%2F%5Bfd98%3A%3A1%5D%3A20880%2Fcom.a.Demo%3Fversion%3D2.0";
        for (leaf, expected, service) in [
            (leaf, "dubbo://127.0.0.1:20882/com.a.Demo?version=0.0.0&weir.at=10.0.0.5:20880", ""),
            (own, "tri://127.0.0.1:9/com.a.Demo?version=2.0&weir.at=[fd98::1]:20880", ":2.0"),
            (
                "dubbo:%2f%2f10.0.0.5:1%2fcom.a.Demo",
                "dubbo://127.0.0.1:20882/com.a.Demo?weir.at=10.0.0.5:1",
                "",
            ),
        ] {
            let path = format!("{root}/{leaf}");
            let expected = (expected.to_owned(), format!("com.a.Demo{service}"));
            assert_eq!(told(&dubbo, &path), Some(expected));
            let (directory, leaf) = super::leaf(&path).unwrap();
            let told = format!("{root}/{}", dubbo.told(directory, leaf).unwrap().leaf);
            assert_eq!(untold(&told).as_deref(), Some(path.as_str()), "{told}");
        }
        assert_eq!(untold(NODE), None);
    }

    /// Names of hosts, protocols that name no service on a shared port, what is switched off, other trees.
    #[test]
    fn what_weir_cannot_carry_stays_as_it_is() {
        let sofa = names("sofa", "");
        for leaf in [
            "rest%3A%2F%2F10.0.0.5%3A8341%3Fversion%3D1.0",
            "bolt%3A%2F%2Fhost%3A12200%3Fversion%3D1.0",
            "bolt%3A%2F%2F10.0.0.5%3Fversion%3D1.0",
            "bolt%3A%2F%2F10.0.0.5%3A0",
            "bolt%3",
            "lock",
            "",
        ] {
            assert_eq!(told(&sofa, &format!("/sofa-rpc/com.a.Demo/providers/{leaf}")), None);
        }
        let leaf = NODE.rsplit_once('/').unwrap().1;
        assert_eq!(told(&sofa, &format!("/other/com.a.Demo/providers/{leaf}")), None);
        assert_eq!(told(&sofa, &format!("/sofa-rpc/a%20b/providers/{leaf}")), None);
        let off = names("dubbo", "");
        let leaf = "dubbo%3A%2F%2F10.0.0.5%3A1%2Fa%3Fenabled%3Dfalse";
        assert_eq!(told(&off, &format!("/dubbo/a/providers/{leaf}")), None);
    }

    /// Calls name the path of the URL, in a serialization that must be readable.
    #[test]
    fn dubbo_calls_that_name_no_service_go_where_they_went() {
        let shared = names("dubbo", "");
        let own = names("dubbo", "services: [{ name: com.a.Demo, listen: \"127.0.0.1:9\" }]");
        for (rest, can_share) in [
            ("/com.a.Demo", true),
            ("/com.a.Demo?serialization=hessian2", true),
            ("/com.a.Demo?prefer.serialization=hessian2,fastjson2&serialization=fastjson2", true),
            ("/com.a.Demo?prefer.serialization=fastjson2,hessian2", false),
            ("/com.a.Demo?prefer.serialization=fastjson2,hessian2&serialization=hessian2", false),
            ("/com.a.Demo?serialization=kryo", false),
            ("/rest/com.a.Demo", false),
            ("/other", false),
            ("", false),
        ] {
            let leaf = encoded(&format!("dubbo://10.0.0.5:1{rest}"));
            let path = format!("/dubbo/com.a.Demo/providers/{leaf}");
            assert_eq!(told(&shared, &path).is_some(), can_share, "{rest}");
            assert!(told(&own, &path).is_some(), "an address of its own may speak anything");
        }
    }

    #[test]
    fn provider_moves_and_says_the_same() {
        let addr = "10.0.0.7:20881".parse().unwrap();
        let moved = moved(NODE, addr).unwrap();
        assert_eq!(moved, NODE.replace("10.0.0.5%3A12200", "10.0.0.7%3A20881"));
        assert_eq!(place(NODE), Some(("10.0.0.5:12200".to_owned(), 12_200)));
        let name = "/any/x/providers/dubbo%3A%2F%2Fme%40host%3A1%2Fx";
        assert_eq!(place(name), Some(("host:1".to_owned(), 1)));
        let addr = "[fd98::1]:2".parse().unwrap();
        let expected = "/any/x/providers/dubbo%3A%2F%2Fme%40%5Bfd98%3A%3A1%5D%3A2%2Fx";
        assert_eq!(super::moved(name, addr).as_deref(), Some(expected));
        for path in ["/any/x/consumers/bolt%3A%2F%2Fa%3A1", "/providers/x", "/a/providers", "x"] {
            assert_eq!(place(path), None, "{path}");
        }
    }

    #[test]
    fn directories_are_known_by_their_place() {
        let expected = Directory { interface: "com.a.Demo", root: "/app/dubbo" };
        assert_eq!(directory("/app/dubbo/com.a.Demo/providers"), Some(expected));
        assert_eq!(directory("/x/providers"), Some(Directory { interface: "x", root: "" }));
        for path in ["/providers", "//providers", "/x/providers/", "/x/consumers", ""] {
            assert_eq!(directory(path), None, "{path}");
        }
    }
}
