// SPDX-License-Identifier: Apache-2.0
//! One worker's choosing: which endpoint is next, and what this worker knows about each.
//!
//! Invariants: an endpoint out of use is chosen only if no other is left; choosing and noting
//! allocate nothing. Reads no clock: whoever asks brings the time.
#![deny(clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "hot path")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::table::{Member, Service, Table, Tier, WARM};
use super::{Balance, EndpointId, ServiceId};

/// What one worker chooses with.
#[derive(Debug)]
pub struct Picker {
    /// Of the worker: its turns begin here.
    index: u16,
    /// Where each service's turn stands.
    positions: Vec<u32>,
    random: u64,
    standings: Vec<Standing>,
    table: Arc<Table>,
}

/// What a worker knows about an endpoint.
#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    /// Times it was put out of use in a row.
    ejections: u8,
    flows: u32,
    /// Of the endpoint that all this is about.
    generation: u32,
    /// Out of use until then.
    until: Option<Instant>,
}

/// An endpoint that was chosen; its flow is counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Pick {
    /// What to dial.
    pub addr: SocketAddr,
    /// To say later what became of it.
    pub endpoint: EndpointId,
    /// No endpoint was in use: this one is a last try.
    pub is_last_resort: bool,
}

/// What one worker says about an endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tally {
    /// Which.
    pub endpoint: EndpointId,
    /// Open flows of this worker.
    pub flows: u32,
    /// This worker does not use it just now, because it could not be reached.
    pub is_ejected: bool,
}

/// A new table on its way to a worker, with room for what is new in it; on the way back, what the
/// worker had before.
#[derive(Debug, Default)]
pub struct Update {
    positions: Vec<u32>,
    standings: Vec<Standing>,
    table: Arc<Table>,
}

impl Update {
    /// For a worker whose last update was `last`: lists are made anew only if they must grow.
    #[must_use]
    pub fn new(table: Arc<Table>, last: Option<&Table>) -> Update {
        let (services, slots) = last.map_or((0, 0), Table::room);
        let (services_now, slots_now) = table.room();
        let room = |before, now| if now > before { now } else { 0 };
        Update {
            positions: Vec::with_capacity(room(services, services_now)),
            standings: Vec::with_capacity(room(slots, slots_now)),
            table,
        }
    }
}

impl Table {
    /// Places for services and endpoints that a worker needs; grows by doubling.
    fn room(&self) -> (usize, usize) {
        (self.services.len().next_power_of_two(), (self.slots as usize).next_power_of_two())
    }
}

/// Which members may be chosen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Choosy {
    /// Whoever is in use; who starts slowly is passed over now and then.
    InUseAndWarm,
    /// Whoever is in use.
    InUse,
    /// Whoever is not drained.
    NotDrained,
}

impl Picker {
    /// For the worker `index`, so that workers do not all begin with the same endpoint.
    #[must_use]
    pub fn new(update: Update, index: u16) -> Picker {
        let Update { positions, standings, table } = update;
        let random = super::order::mix(u64::from(index)) | 1;
        let mut picker = Picker { index, positions, random, standings, table };
        picker.fill();
        picker
    }

    /// Goes on with a new table; gives back the old one, and lists that were outgrown, to be freed
    /// by somebody who has the time.
    pub fn swap(&mut self, mut update: Update) -> Update {
        if update.positions.capacity() > self.positions.capacity() {
            update.positions.extend_from_slice(&self.positions);
            std::mem::swap(&mut update.positions, &mut self.positions);
        }
        if update.standings.capacity() > self.standings.capacity() {
            update.standings.extend_from_slice(&self.standings);
            std::mem::swap(&mut update.standings, &mut self.standings);
        }
        std::mem::swap(&mut update.table, &mut self.table);
        self.fill();
        update
    }

    /// Uses the room that an update has brought.
    fn fill(&mut self) {
        let start = u32::from(self.index);
        let services = self.table.services.len().min(self.positions.capacity());
        let slots = (self.table.slots as usize).min(self.standings.capacity());
        self.positions.resize(services.max(self.positions.len()), start);
        self.standings.resize(slots.max(self.standings.len()), Standing::default());
    }

    /// The table in force.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The next endpoint of `service` for a client with this hash; counts the flow. `None` if the
    /// service is not known, has no endpoint, or all are drained.
    pub fn pick(&mut self, service: ServiceId, key: u64, now: Instant) -> Option<Pick> {
        let Picker { positions, random, standings, table, .. } = self;
        let service_of = table.service(service)?;
        let position = positions.get_mut(service.index as usize)?;
        let mut choice = Choice { key, now, position, random, service: service_of, standings };
        let tier = choice.tier();
        let in_use = choice
            .choose(tier, Choosy::InUseAndWarm)
            .or_else(|| choice.choose(tier, Choosy::InUse))
            .or_else(|| choice.choose(service_of.all(), Choosy::InUse));
        let is_last_resort = in_use.is_none();
        let member = in_use.or_else(|| choice.choose(service_of.all(), Choosy::NotDrained))?;
        let standing = standing(standings, member.id)?;
        standing.flows += 1;
        Some(Pick { addr: member.endpoint.addr, endpoint: member.id, is_last_resort })
    }

    /// Whether an endpoint that was chosen before could be chosen now.
    #[must_use]
    pub fn is_in_use(&self, service: ServiceId, endpoint: EndpointId, now: Instant) -> bool {
        let members = self.table.service(service).map_or(&[][..], Service::members);
        let standing = self.standings.get(endpoint.slot as usize);
        let is_ejected = standing.is_some_and(|standing| {
            standing.generation == endpoint.generation && standing.is_ejected(now)
        });
        let member = members.iter().find(|member| member.id == endpoint);
        !is_ejected && member.is_some_and(|member| member.is_healthy && member.endpoint.weight > 0)
    }

    /// It could not be reached: out of use for a while, each time in a row for longer. True if
    /// it was in use until now.
    pub fn failed(&mut self, endpoint: EndpointId, now: Instant) -> bool {
        let Some(standing) = self.known(endpoint) else { return false };
        if standing.is_ejected(now) {
            return false;
        }
        let span = EJECTED_FIRST.saturating_mul(1 << standing.ejections.min(EJECTIONS_DOUBLING));
        standing.ejections = standing.ejections.saturating_add(1);
        standing.until = now.checked_add(span.min(EJECTED_MAX));
        true
    }

    /// It answered.
    pub fn connected(&mut self, endpoint: EndpointId) {
        if let Some(standing) = self.known(endpoint) {
            standing.ejections = 0;
            standing.until = None;
        }
    }

    /// A flow that was counted has ended, or goes elsewhere.
    pub fn ended(&mut self, endpoint: EndpointId) {
        if let Some(standing) = self.known(endpoint) {
            standing.flows = standing.flows.saturating_sub(1);
        }
    }

    /// Every endpoint of the table in force that this worker has something to say about.
    #[must_use]
    pub fn tallies(&self, now: Instant) -> Vec<Tally> {
        let members = self.table.services().flat_map(Service::members);
        let tally = |member: &Member| {
            let standing = self.standings.get(member.id.slot as usize)?;
            (standing.generation == member.id.generation).then(|| Tally {
                endpoint: member.id,
                flows: standing.flows,
                is_ejected: standing.is_ejected(now),
            })
        };
        members.filter_map(tally).collect()
    }

    fn known(&mut self, endpoint: EndpointId) -> Option<&mut Standing> {
        let standing = self.standings.get_mut(endpoint.slot as usize)?;
        (standing.generation == endpoint.generation).then_some(standing)
    }
}

/// One choice, and all it needs.
struct Choice<'a, 'w> {
    key: u64,
    now: Instant,
    position: &'w mut u32,
    random: &'w mut u64,
    service: &'a Service,
    standings: &'w [Standing],
}

impl<'a> Choice<'a, '_> {
    /// Those nearby, while enough of them are in use.
    fn tier(&mut self) -> Tier<'a> {
        let near = self.service.near();
        let looked_at = near.members.len().min(NEAR_LOOKED_AT_MAX);
        let members = near.members.iter().take(looked_at);
        let in_use = members.filter(|member| self.admits(member, Choosy::InUse)).count();
        if in_use > 0 && in_use * 100 >= looked_at * NEAR_IN_USE_PERCENT {
            near
        } else {
            self.service.all()
        }
    }

    fn choose(&mut self, tier: Tier<'a>, choosy: Choosy) -> Option<&'a Member> {
        match self.service.manner.balance {
            Balance::ConsistentHash => self.by_hash(tier, choosy),
            Balance::LeastFlows => self.by_flows(tier, choosy),
            Balance::RandomTwo => self.of_two(tier, choosy),
            Balance::RoundRobin => {
                self.by_turn(tier.members.len(), choosy, |turn| tier.members.get(turn))
            }
            Balance::Weighted => self.by_turn(tier.order.len(), choosy, |turn| {
                tier.members.get(usize::from(*tier.order.get(turn)?))
            }),
        }
    }

    fn by_turn(
        &mut self,
        turns: usize,
        choosy: Choosy,
        whose: impl Fn(usize) -> Option<&'a Member>,
    ) -> Option<&'a Member> {
        let start = *self.position as usize;
        for step in 0..turns {
            let turn = (start + step) % turns;
            let member = whose(turn)?;
            if self.admits(member, choosy) {
                *self.position = u32::try_from(turn).unwrap_or(0).wrapping_add(1);
                return Some(member);
            }
        }
        None
    }

    /// Walks from the client's place with a step of its own until a member is in use: the clients
    /// of one that fails spread over all others.
    fn by_hash(&self, tier: Tier<'a>, choosy: Choosy) -> Option<&'a Member> {
        // Slow start would move clients twice.
        let choosy = if choosy == Choosy::InUseAndWarm { Choosy::InUse } else { choosy };
        let places = tier.order.len() as u64;
        let step = (self.key >> 32) % places.max(2).wrapping_sub(1) + 1;
        let mut place = self.key.checked_rem(places)?;
        for _ in 0..places {
            let index = *tier.order.get(usize::try_from(place).ok()?)?;
            let member = tier.members.get(usize::from(index))?;
            if self.is_in_question(member, choosy) {
                return Some(member);
            }
            place = (place + step) % places;
        }
        None
    }

    /// Among equals the first whose turn it is.
    fn by_flows(&mut self, tier: Tier<'a>, choosy: Choosy) -> Option<&'a Member> {
        let (count, start) = (tier.members.len(), *self.position as usize);
        let mut best: Option<(usize, &Member)> = None;
        for step in 0..count {
            let turn = (start + step) % count;
            let member = tier.members.get(turn)?;
            let is_better = best.is_none_or(|(_, best)| self.is_freer(member, best));
            if is_better && self.admits(member, choosy) {
                best = Some((turn, member));
            }
        }
        let (turn, member) = best?;
        *self.position = u32::try_from(turn).unwrap_or(0).wrapping_add(1);
        Some(member)
    }

    fn of_two(&mut self, tier: Tier<'a>, choosy: Choosy) -> Option<&'a Member> {
        let one = self.at_random(tier, choosy, None)?;
        match self.at_random(tier, choosy, Some(one)) {
            Some(other) if self.is_freer(other, one) => Some(other),
            _ => Some(one),
        }
    }

    /// The first from a random place on that may be chosen and is not `other`.
    fn at_random(
        &mut self,
        tier: Tier<'a>,
        choosy: Choosy,
        other: Option<&Member>,
    ) -> Option<&'a Member> {
        let count = tier.members.len();
        let start = usize::try_from(self.number(count as u64)).ok()?;
        for step in 0..count {
            let member = tier.members.get((start + step) % count)?;
            if other.is_none_or(|other| other.id != member.id) && self.admits(member, choosy) {
                return Some(member);
            }
        }
        None
    }

    /// Fewer flows for its weight.
    fn is_freer(&self, one: &Member, other: &Member) -> bool {
        let load = |member: &Member, weight: &Member| {
            (u64::from(self.flows(member)) + 1) * u64::from(weight.endpoint.weight)
        };
        load(one, other) < load(other, one)
    }

    fn flows(&self, member: &Member) -> u32 {
        let standing = self.standings.get(member.id.slot as usize);
        standing.filter(|one| one.generation == member.id.generation).map_or(0, |one| one.flows)
    }

    fn admits(&mut self, member: &Member, choosy: Choosy) -> bool {
        self.is_in_question(member, choosy)
            && (choosy != Choosy::InUseAndWarm
                || self.service.manner.slow_start.is_zero()
                || self.number(WARM) < member.warmth(self.service.manner.slow_start, self.now))
    }

    fn is_in_question(&self, member: &Member, choosy: Choosy) -> bool {
        let standing = self.standings.get(member.id.slot as usize);
        let is_ejected = standing.is_some_and(|standing| {
            standing.generation == member.id.generation && standing.is_ejected(self.now)
        });
        member.endpoint.weight > 0
            && (choosy == Choosy::NotDrained || (member.is_healthy && !is_ejected))
    }

    /// From 0 to `bound`, not included (xorshift64).
    fn number(&mut self, bound: u64) -> u64 {
        let mut random = *self.random;
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        *self.random = random;
        (random >> 16).checked_rem(bound).unwrap_or(0)
    }
}

/// The standing of an endpoint, made anew if it was another one's.
fn standing(standings: &mut [Standing], id: EndpointId) -> Option<&mut Standing> {
    let standing = standings.get_mut(id.slot as usize)?;
    if standing.generation != id.generation {
        *standing = Standing { generation: id.generation, ..Standing::default() };
    }
    Some(standing)
}

impl Standing {
    fn is_ejected(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// Long enough to spare the others a failed connect each, short enough for a restart.
const EJECTED_FIRST: Duration = Duration::from_secs(1);
const EJECTED_MAX: Duration = Duration::from_secs(30);
/// One second doubled so often is more than the longest.
const EJECTIONS_DOUBLING: u8 = 5;
/// Fewer than this in use nearby, and the others help.
const NEAR_IN_USE_PERCENT: usize = 70;
/// Bounds what a choice costs; as good as all of them.
const NEAR_LOOKED_AT_MAX: usize = 64;
