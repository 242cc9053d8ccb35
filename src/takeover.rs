// SPDX-License-Identifier: Apache-2.0
//! Takeover: traffic comes to weir because the service registry says so.
//!
//! A provider tells us about itself and the registry gets our address; a consumer subscribes with us
//! and is told our address. The desk keeps what applications want and what registries say; what
//! comes of it goes to the table of services. Nothing here waits for a registry.

use std::net::SocketAddr;
use std::time::Instant;

use crate::service::Endpoint;

pub use api::router;
pub use belief::Reason;
pub use book::{Source, Suspect};
pub use desk::{Change, Desk, FacadeRow, Page, Passed, Refusal, RegistryRow};
pub use dial::{connect, dial};
pub use facade::{
    Broken, Claim, Dialogue, Heard, Hello, Names, Removed, Turn, claims, expired, farewell, hello,
    is_farewell, is_removed, removal, untold, welcome,
};
pub use file::FileRegistry;
pub use fixed::FixedRegistry;

mod api;
mod belief;
mod book;
mod desk;
mod dial;
#[cfg(feature = "etcd")]
mod etcd;
mod facade;
mod file;
mod fixed;
mod kept;
#[cfg_attr(
    not(any(feature = "etcd", feature = "zookeeper")),
    expect(dead_code, reason = "whoever writes leaves is not built")
)]
mod layout;
#[cfg(any(feature = "etcd", feature = "sofa", feature = "zookeeper"))]
mod link;
mod shelf;
#[cfg(feature = "sofa")]
mod sofa;
#[cfg(test)]
mod tests;
#[cfg(any(feature = "etcd", feature = "zookeeper"))]
mod tls;
#[cfg(any(feature = "etcd", feature = "zookeeper"))]
mod writer;
#[cfg(feature = "zookeeper")]
mod zookeeper;

/// One address of a service, with what its registry says about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Provider {
    /// Where it is.
    pub endpoint: Endpoint,
    /// What its consumers are told, as `v=4.0&p=1`; as it was written.
    pub parameters: String,
}

/// All providers of a service, as a registry had them at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// All of them, none twice.
    pub providers: Vec<Provider>,
    /// The registry's own count of changes, as it says it.
    pub revision: u64,
    /// Whose.
    pub service: String,
}

/// How it goes with a registry.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// Weights it has said that are larger than an endpoint's can be.
    pub clamped: u64,
    /// When its connection went, or was wanted first; `None` while it is there.
    pub down_since: Option<Instant>,
    /// Attempts to connect that failed, and sessions that ended.
    pub failures: u64,
    /// It answers.
    pub is_connected: bool,
    /// Publications, or ends of some, that it does not take; each is counted once.
    pub refusals: u64,
    /// Times a session began.
    pub sessions: u64,
    /// Times it said where a service lives.
    pub snapshots: u64,
    /// Why there was no session, the last time; empty if there never was a reason.
    pub trouble: String,
}

/// Where services are kept. Every call notes what is wanted and returns at once; what a registry
/// has to say, it says when it is asked for news.
pub trait Registry: Send {
    /// In logs and tables.
    fn name(&self) -> &str;

    /// Whether it has said that it holds what was published of `service`.
    fn holds(&self, service: &str) -> bool;

    /// It is spoken with no more: what it has said stays.
    fn leave(&mut self) {}

    /// What it says is the word of an operator, and is taken as it is.
    fn is_beyond_doubt(&self) -> bool {
        false
    }

    /// What has changed since the last time, of services that are subscribed to.
    fn news(&mut self) -> Vec<Snapshot>;

    /// This host provides `service` at `provider`, until it is unpublished. Whether it can be said
    /// here at all.
    fn publish(&mut self, service: &str, provider: &Provider) -> bool;

    /// How it goes with it.
    fn standing(&self) -> Standing;

    /// It does so no more.
    fn unpublish(&mut self, service: &str);

    /// Snapshots of `service` are wanted; the first one comes with the next news.
    fn subscribe(&mut self, service: &str);

    /// They are wanted no more.
    fn unsubscribe(&mut self, service: &str);
}

impl Provider {
    /// From the form that SOFA's registries hold: `[scheme://]host:port[/path][?k=v&…]`, in which
    /// brackets, `#` and `@` may stand unescaped. Weight and zone are taken from it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Provider> {
        let (place, parameters) = text.split_once('?').unwrap_or((text, ""));
        let place = place.split_once("://").map_or(place, |(_, rest)| rest);
        let addr: SocketAddr = place.split('/').next()?.parse().ok()?;
        let mut endpoint = Endpoint::new(addr);
        for pair in parameters.split('&') {
            match pair.split_once('=') {
                Some(("weight" | "_WEIGHT", weight)) => {
                    endpoint.weight = weight_of(weight)?;
                }
                Some(("zone", zone)) => endpoint.zone = zone.into(),
                _ => {}
            }
        }
        Some(Provider { endpoint, parameters: parameters.to_owned() })
    }

    /// It weighs more than an endpoint can.
    #[must_use]
    pub fn is_clamped(&self) -> bool {
        self.endpoint.weight == Endpoint::WEIGHT_MAX
            && self.parameters.split('&').filter_map(|pair| pair.split_once('=')).any(
                |(key, weight)| {
                    matches!(key, "weight" | "_WEIGHT")
                        && weight.parse() != Ok(Endpoint::WEIGHT_MAX)
                },
            )
    }

    /// In the same form.
    #[must_use]
    pub fn text(&self) -> String {
        self.text_at(self.endpoint.addr)
    }

    /// In the same form, at another address.
    #[must_use]
    pub fn text_at(&self, addr: SocketAddr) -> String {
        let mark = if self.parameters.is_empty() { "" } else { "?" };
        format!("{addr}{mark}{}", self.parameters)
    }
}

/// Other programs have larger numbers than there is use for: as much as there can be.
fn weight_of(text: &str) -> Option<u16> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let weight = is_number.then(|| text.parse().unwrap_or(u16::MAX))?;
    Some(weight.min(Endpoint::WEIGHT_MAX))
}
