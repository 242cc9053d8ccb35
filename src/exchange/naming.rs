// SPDX-License-Identifier: Apache-2.0
//! Which service a request is for, by the name that it says.
//!
//! What is not known by name goes nowhere: never to some service that happens to be there.

use crate::service::{ServiceId, Table};
use crate::wire::detect::{Protocol, detect};
use crate::wire::{Stop, dubbo, http1, http2, tls};

/// How a connection of the shared port is served.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Guest {
    /// All of it goes to one service, unseen; `None` if nobody knows its name here.
    Connection(Option<ServiceId>),
    /// Each request goes to its own service; in HTTP/2 all must be for the same one.
    Requests(Protocol),
}

/// Looks at what a client has said first.
///
/// # Errors
///
/// Too little of it, or nothing that is known.
pub fn guest(bytes: &[u8], table: &Table) -> Result<Guest, Stop> {
    Ok(match detect(bytes)? {
        Protocol::Http2 => match of_http2(&http2::parse(bytes)?, table) {
            Some(_) => Guest::Requests(Protocol::Http2),
            None => Guest::Connection(None),
        },
        Protocol::Tls => {
            let name = tls::parse(bytes)?;
            Guest::Connection(name.and_then(|host| by_host(host.as_bytes(), table)))
        }
        protocol => Guest::Requests(protocol),
    })
}

/// As it is written.
pub(super) fn by_name(name: &[u8], table: &Table) -> Option<ServiceId> {
    std::str::from_utf8(name).ok().and_then(|name| table.find(name))
}

/// Whether this is how the service is called: much cheaper than to look its name up.
pub(super) fn is_named(id: ServiceId, name: &[u8], table: &Table) -> bool {
    table.service(id).is_some_and(|service| service.name.as_bytes() == name)
}

/// With its version first, then without.
pub(super) fn of_dubbo(service: dubbo::Service<'_>, table: &Table) -> Option<ServiceId> {
    let mut name = [0; NAME_BYTES_MAX];
    let named = joined(&mut name, service.path, service.version);
    named.and_then(|name| table.find(name)).or_else(|| by_name(service.path, table))
}

/// By the service in the path, else by the host.
pub(super) fn of_http2(opening: &http2::Opening, table: &Table) -> Option<ServiceId> {
    let service = opening.grpc_service().and_then(|name| by_name(name, table));
    service.or_else(|| by_host(opening.host(), table))
}

/// By the header that says so, else by the host.
pub(super) fn of_http1(head: &http1::Head<'_>, table: &Table) -> Option<ServiceId> {
    match head.target_service {
        b"" => by_host(head.host, table),
        target => by_name(target, table),
    }
}

/// Hosts are named in lower case.
fn by_host(host: &[u8], table: &Table) -> Option<ServiceId> {
    let mut name = [0; NAME_BYTES_MAX];
    let lower = name.get_mut(..host.len())?;
    lower.copy_from_slice(host);
    lower.make_ascii_lowercase();
    std::str::from_utf8(lower)
        .ok()
        .filter(|name| !name.is_empty())
        .and_then(|name| table.find(name))
}

/// `path:version`, if there is a version and they fit.
fn joined<'a>(into: &'a mut [u8], path: &[u8], version: &[u8]) -> Option<&'a str> {
    let len = path.len() + 1 + version.len();
    let name = into.get_mut(..len).filter(|_| !version.is_empty())?;
    let (head, tail) = name.split_at_mut_checked(path.len())?;
    head.copy_from_slice(path);
    let (colon, tail) = tail.split_first_mut()?;
    *colon = b':';
    tail.copy_from_slice(version);
    std::str::from_utf8(name).ok()
}

/// Of a service, as the config and the application API take it.
const NAME_BYTES_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::service::{Balance, Directory, Manner};

    fn unhex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte =
            |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    #[test]
    fn first_words_tell_how_a_connection_is_served() {
        let mut directory = Directory::default();
        directory.set("com.a.Grpc", Manner::of(Balance::RoundRobin), Vec::new(), Instant::now());
        let table = directory.table();
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        let grpc = |path: &str| {
            let headers = b"\0\0\x10\x01\x04\0\0\0\x01\x04\x0e";
            [&preface[..], headers, path.as_bytes()].concat()
        };
        for (bytes, expected) in [
            (unhex("01 01 00"), Ok(Guest::Requests(Protocol::Bolt))),
            (unhex("dabb"), Ok(Guest::Requests(Protocol::Dubbo))),
            (b"GET / HTTP/1.1\r\n".to_vec(), Ok(Guest::Requests(Protocol::Http1))),
            (grpc("/com.a.Grpc/Do"), Ok(Guest::Requests(Protocol::Http2))),
            (grpc("/com.a.Http/Do"), Ok(Guest::Connection(None))),
            (b"\r\n\r\nGET / HTTP/1.1\r\n".to_vec(), Ok(Guest::Requests(Protocol::Http1))),
            (b"\r\nGET / H".to_vec(), Err(Stop::NeedMore(16))),
            (b"\r".to_vec(), Err(Stop::NeedMore(16))),
            (b"\rGET / HTTP/1.1\r\n".to_vec(), Err(Stop::NotMine)),
            (b"SSH-2.0-OpenSSH\r\n".to_vec(), Err(Stop::NotMine)),
        ] {
            assert_eq!(guest(&bytes, &table), expected, "{bytes:02x?}");
        }
    }

    #[test]
    fn names_are_found_as_each_protocol_writes_them() {
        let mut directory = Directory::default();
        let ids = ["com.a.Demo:1.0", "com.a.Demo", "web.example"].map(|name| {
            directory.set(name, Manner::of(Balance::RoundRobin), Vec::new(), Instant::now())
        });
        let table = directory.table();
        let dubbo = |path: &'static str, version: &'static str| {
            let service = dubbo::Service { path: path.as_bytes(), version: version.as_bytes() };
            of_dubbo(service, &table)
        };
        assert_eq!(dubbo("com.a.Demo", "1.0"), Some(ids[0]));
        assert_eq!(dubbo("com.a.Demo", "2.0"), Some(ids[1]), "without its version");
        assert_eq!(dubbo("com.a.Demo", ""), Some(ids[1]));
        assert_eq!(dubbo("com.a.Other", "1.0"), None);
        let http1 = |headers: &str| {
            let text = format!("GET / HTTP/1.1\r\n{headers}\r\n");
            of_http1(&http1::parse(text.as_bytes()).unwrap(), &table)
        };
        assert_eq!(http1("Host: WEB.example:80\r\n"), Some(ids[2]));
        assert_eq!(http1("Host: x\r\nTarget-Service: com.a.Demo\r\n"), Some(ids[1]));
        assert_eq!(http1("Host: web.example\r\nTarget-Service: com.a\r\n"), None);
        assert_eq!(http1("Host: \r\n"), None);
    }
}
