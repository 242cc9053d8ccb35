// SPDX-License-Identifier: Apache-2.0
//! Which service a connection is for, by what its client has said so far.
//!
//! Pure. What is not known by name goes nowhere: never to some service that happens to be there.

use crate::service::{ServiceId, Table};
use crate::wire::detect::{Protocol, detect};
use crate::wire::{Stop, bolt, dubbo, http1, http2, tls};

/// The service that the first request names; `None` if nobody knows its name here.
pub(super) fn service_named(bytes: &[u8], table: &Table) -> Result<Option<ServiceId>, Stop> {
    Ok(match detect(bytes)? {
        Protocol::Bolt => table.find(of_bolt(bytes)?),
        Protocol::Dubbo => of_dubbo(bytes, table)?,
        Protocol::Http1 => {
            let head = http1::parse(bytes)?;
            let target = std::str::from_utf8(head.target_service).ok();
            let target = target.filter(|target| !target.is_empty());
            target.map_or_else(|| by_host(head.host, table), |target| table.find(target))
        }
        Protocol::Http2 => {
            let opening = http2::parse(bytes)?;
            let service = opening.grpc_service().and_then(|name| std::str::from_utf8(name).ok());
            service.and_then(|name| table.find(name)).or_else(|| by_host(opening.host(), table))
        }
        Protocol::Tls => tls::parse(bytes)?.and_then(|host| by_host(host.as_bytes(), table)),
    })
}

/// Heartbeats and answers name nobody: the first frame that does decides.
fn of_bolt(bytes: &[u8]) -> Result<&str, Stop> {
    let mut start = 0;
    loop {
        let rest = bytes.get(start..).unwrap_or_default();
        let frame = bolt::parse(rest).map_err(|stop| further(stop, start))?;
        match (frame.kind, frame.service) {
            (bolt::Kind::Request | bolt::Kind::OneWay, Some(name)) => {
                return std::str::from_utf8(name).map_err(|_| Stop::Bad("not a name"));
            }
            (bolt::Kind::Request | bolt::Kind::OneWay, None) => {
                return Err(Stop::Bad("a request for no service"));
            }
            _ => start = behind(start, frame.frame_len)?,
        }
    }
}

/// With its version first, then without.
fn of_dubbo(bytes: &[u8], table: &Table) -> Result<Option<ServiceId>, Stop> {
    let mut start = 0;
    loop {
        let rest = bytes.get(start..).unwrap_or_default();
        let frame = dubbo::parse(rest).map_err(|stop| further(stop, start))?;
        match (frame.kind, frame.service) {
            (dubbo::Kind::Request | dubbo::Kind::OneWay, Some(service)) => {
                let mut name = [0; NAME_BYTES_MAX];
                let named = joined(&mut name, service.path, service.version);
                let path = std::str::from_utf8(service.path).ok();
                return Ok(named.and_then(|name| table.find(name)).or_else(|| table.find(path?)));
            }
            (dubbo::Kind::Request | dubbo::Kind::OneWay, None) => {
                return Err(Stop::Bad("a serialization that cannot be read"));
            }
            _ => start = behind(start, frame.frame_len)?,
        }
    }
}

/// Where the next frame begins.
fn behind(start: usize, frame_len: u64) -> Result<usize, Stop> {
    let len = usize::try_from(frame_len).map_err(|_| Stop::Bad("a frame too long"))?;
    start.checked_add(len).ok_or(Stop::Bad("a frame too long"))
}

/// What a parser asks for, counted from the first byte.
fn further(stop: Stop, start: usize) -> Stop {
    match stop {
        Stop::NeedMore(bytes) => Stop::NeedMore(bytes.saturating_add(start)),
        stop => stop,
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

    fn request(name: &str) -> Vec<u8> {
        let mut bytes = unhex("01 01 0001 01 00000001 01 00000bb8 0000");
        bytes.extend(u16::try_from(name.len() + 15).unwrap().to_be_bytes());
        bytes.extend(unhex("00000000 00000007"));
        bytes.extend(b"service");
        bytes.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
        bytes.extend(name.bytes());
        bytes
    }

    #[test]
    fn name_in_the_first_request_decides() {
        let mut directory = Directory::default();
        let names = ["com.a.Demo:1.0", "com.a.Demo", "web.example", "com.a.Grpc"];
        let ids = names.map(|name| {
            directory.set(name, Manner::of(Balance::RoundRobin), Vec::new(), Instant::now())
        });
        let table = directory.table();
        let heartbeat = unhex("01 01 0000 01 00000008 01 00000bb8 0000 0000 00000000");
        let dubbo = |version: &str| {
            let body = format!("00 0a636f6d2e612e44656d6f {version} 00");
            unhex(&format!("dabb c2 00 0000000000000001 {:08x} {body}", unhex(&body).len()))
        };
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        let grpc = [&preface[..], b"\0\0\x10\x01\x04\0\0\0\x01\x04\x0e/com.a.Grpc/Do"].concat();
        for (bytes, expected) in [
            (request("com.a.Demo:1.0"), Ok(Some(ids[0]))),
            ([heartbeat.clone(), request("com.a.Demo:1.0")].concat(), Ok(Some(ids[0]))),
            (heartbeat, Err(Stop::NeedMore(23))),
            (request("com.a.Other:1.0"), Ok(None)),
            (dubbo("03312e30"), Ok(Some(ids[0]))),
            (dubbo("03322e30"), Ok(Some(ids[1]))),
            (dubbo("4e"), Ok(Some(ids[1]))),
            (b"GET / HTTP/1.1\r\nHost: WEB.example:80\r\n\r\n".to_vec(), Ok(Some(ids[2]))),
            (
                b"GET / HTTP/1.1\r\nHost: x\r\nTarget-Service: com.a.Demo\r\n\r\n".to_vec(),
                Ok(Some(ids[1])),
            ),
            (b"GET / HTTP/1.1\r\nHost: \r\n\r\n".to_vec(), Ok(None)),
            (grpc, Ok(Some(ids[3]))),
            (b"SSH-2.0-OpenSSH\r\n".to_vec(), Err(Stop::NotMine)),
        ] {
            assert_eq!(service_named(&bytes, &table), expected, "{bytes:02x?}");
        }
    }
}
