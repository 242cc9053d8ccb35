// SPDX-License-Identifier: Apache-2.0
//! Which protocol a client speaks, from the first bytes it sends.
//!
//! One byte is never enough: `01` may be many things. A protocol whose server speaks first cannot be
//! told; it needs a listener of its own.

use super::{Stop, bolt, dubbo, http1, http2, tls};

/// A protocol that names its service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// SOFABolt, v1 and v2.
    Bolt,
    /// Dubbo 2.x.
    Dubbo,
    /// HTTP/1.0 and 1.1.
    Http1,
    /// HTTP/2, gRPC and Triple among it, in plain text.
    Http2,
    /// TLS, with whatever is in it.
    Tls,
}

/// Looks at the first bytes.
///
/// # Errors
///
/// Too few of them, or they begin no protocol that we know.
pub fn detect(bytes: &[u8]) -> Result<Protocol, Stop> {
    let mut needed: Option<usize> = None;
    for (protocol, enough) in ORDER {
        // What comes later cannot make it another protocol, only a broken one.
        let start = bytes.get(..enough).unwrap_or(bytes);
        match look(protocol, start) {
            Err(Stop::NotMine | Stop::Bad(_)) => {}
            Err(Stop::NeedMore(_)) if start.len() < enough => {
                needed = Some(needed.map_or(enough, |least| least.min(enough)));
            }
            _ => return Ok(protocol),
        }
    }
    Err(needed.map_or(Stop::NotMine, Stop::NeedMore))
}

fn look(protocol: Protocol, bytes: &[u8]) -> Result<(), Stop> {
    match protocol {
        Protocol::Bolt => bolt::parse(bytes).map(drop),
        Protocol::Dubbo => dubbo::parse(bytes).map(drop),
        Protocol::Http1 => match without_empty_lines(bytes) {
            b"\r" => Err(Stop::NeedMore(bytes.len() + 1)),
            request => http1::parse(request).map(drop),
        },
        Protocol::Http2 => http2::parse(bytes).map(drop),
        Protocol::Tls => tls::parse(bytes).map(drop),
    }
}

/// They mean nothing before a request (RFC 9112, 2.2): some clients send one behind a body, some first of all.
fn without_empty_lines(mut bytes: &[u8]) -> &[u8] {
    while let Some(rest) = bytes.strip_prefix(b"\r\n") {
        bytes = rest;
    }
    bytes
}

/// Each protocol, and how many bytes it takes to tell it from the others. HTTP/2 before HTTP/1,
/// whose method its preface looks like.
const ORDER: [(Protocol, usize); 5] = [
    (Protocol::Bolt, 3),
    (Protocol::Dubbo, 2),
    (Protocol::Tls, 3),
    (Protocol::Http2, 8),
    (Protocol::Http1, 16),
];
