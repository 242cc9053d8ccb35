// SPDX-License-Identifier: Apache-2.0
//! What workers read: every service with its endpoints, as of one moment. Never changes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use super::{Balance, Duration, Endpoint, EndpointId, Instant, Manner, ServiceId, order};

/// All services as of one moment.
#[derive(Debug, Default)]
pub struct Table {
    pub(super) names: Arc<HashMap<Box<str>, ServiceId>>,
    /// Goes up with every table.
    pub revision: u64,
    pub(super) services: Vec<Option<Arc<Service>>>,
    /// Endpoint slots ever handed out.
    pub(super) slots: u32,
    /// Addresses at which nobody is: who dials one means the service.
    pub(super) virtuals: Arc<HashMap<SocketAddr, ServiceId>>,
}

impl Table {
    /// The service that a request names. A slash is in no name of a service, only in keys of what is
    /// reached otherwise.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<ServiceId> {
        self.names.get(name).copied().filter(|_| !name.contains('/'))
    }

    /// The service that is meant by who dials `addr`.
    #[must_use]
    pub fn at(&self, addr: SocketAddr) -> Option<ServiceId> {
        self.virtuals.get(&addr).copied()
    }

    /// A service by its id.
    #[must_use]
    pub fn service(&self, id: ServiceId) -> Option<&Service> {
        self.services.get(id.index as usize)?.as_deref().filter(|service| service.id == id)
    }

    /// Every service, in the order of the ids.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.iter().filter_map(Option::as_deref)
    }
}

/// A named set of endpoints.
#[derive(Debug)]
pub struct Service {
    /// Its own.
    pub id: ServiceId,
    /// Those of the preferred zone first.
    members: Box<[Member]>,
    /// What it goes by.
    pub manner: Manner,
    /// Unique.
    pub name: Arc<str>,
    /// How many of the members are in the preferred zone.
    near: usize,
    /// For the near ones and for all: whose turn it is, or whose hash; empty where not needed.
    orders: [Box<[u16]>; 2],
}

/// An endpoint in a table.
#[derive(Clone, Debug)]
pub struct Member {
    /// As it was named.
    pub endpoint: Endpoint,
    /// Its place in every worker's tally.
    pub id: EndpointId,
    /// What active checks say; true where there are none.
    pub is_healthy: bool,
    /// When it came, if it has to start slowly.
    pub joined: Option<Instant>,
}

/// The members that come into question, and the order made for them.
#[derive(Clone, Copy)]
pub(super) struct Tier<'a> {
    pub(super) members: &'a [Member],
    pub(super) order: &'a [u16],
}

impl Service {
    pub(super) fn new(
        id: ServiceId,
        name: Arc<str>,
        manner: Manner,
        mut members: Vec<Member>,
    ) -> Service {
        members.truncate(MEMBERS_MAX);
        let is_near =
            |member: &Member| !manner.zone.is_empty() && member.endpoint.zone == manner.zone;
        members.sort_by_key(|member| !is_near(member));
        let near = members.iter().take_while(|member| is_near(member)).count();
        let orders =
            [&members[..near], &members[..]].map(|members| order_of(manner.balance, members));
        Service { id, members: members.into_boxed_slice(), manner, name, near, orders }
    }

    /// Its endpoints, those of the preferred zone first.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The members of the preferred zone; empty where there is no preference.
    pub(super) fn near(&self) -> Tier<'_> {
        Tier { members: self.members.get(..self.near).unwrap_or_default(), order: &self.orders[0] }
    }

    pub(super) fn all(&self) -> Tier<'_> {
        Tier { members: &self.members, order: &self.orders[1] }
    }
}

impl Member {
    /// Its share just now, of 256: grows from when it joined.
    pub(super) fn warmth(&self, slow_start: Duration, now: Instant) -> u64 {
        let Some(since) = self.endpoint.started.or(self.joined) else { return WARM };
        let (age, span) =
            (now.saturating_duration_since(since).as_millis(), slow_start.as_millis());
        if age >= span {
            return WARM;
        }
        // Never nothing: an endpoint that gets no flow would never prove itself.
        u64::try_from(age * u128::from(WARM) / span).map_or(WARM, |warmth| warmth.max(WARM / 16))
    }
}

fn order_of(balance: Balance, members: &[Member]) -> Box<[u16]> {
    let weights = members.iter().map(|member| member.endpoint.weight);
    match balance {
        Balance::ConsistentHash => {
            let addrs = members.iter().map(|member| member.endpoint.addr);
            order::places(&addrs.zip(weights).collect::<Vec<_>>())
        }
        Balance::Weighted => order::turns(&weights.collect::<Vec<_>>()),
        Balance::LeastFlows | Balance::RandomTwo | Balance::RoundRobin => Box::default(),
    }
}

/// A full share.
pub(super) const WARM: u64 = 256;
/// Of one service: an order names them by 16 bits, and keeps the last number for an empty place.
pub(super) const MEMBERS_MAX: usize = 65_534;
