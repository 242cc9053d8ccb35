// SPDX-License-Identifier: Apache-2.0
//! The flows of one worker, by the slot of their downstream socket.
//!
//! Room for `flows_max` is reserved at start and touched only when first used. A slot's generation
//! goes up when its flow ends, so that late completions of the old flow find nobody.

use std::net::SocketAddr;

use crate::flow::Flow;
use crate::op::{FlowId, Side, Timer};
use crate::service::{EndpointId, ServiceId};

/// Flows by slot.
#[derive(Debug)]
pub(super) struct Slab {
    entries: Vec<Entry>,
    flows_max: u32,
    /// Slots to hand out, newest first; used only where the kernel does not choose the slot.
    free: Vec<u32>,
    occupied: u32,
}

/// One slot.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) flow: Option<Flow>,
    pub(super) generation: u32,
    /// What it is to an exchange; `None` for flows.
    pub(super) part: Option<Part>,
    pub(super) peers: Peers,
    /// Dials made again from another port.
    pub(super) redials: u8,
    /// Sides that stand in the queue for buffers, one bit each.
    pub(super) queued_for_buffers: u8,
    pub(super) times: Times,
}

/// What a slot is to an exchange.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Part {
    /// It is the exchange's own.
    Head,
    /// One more upstream of the exchange with this head.
    Leg(FlowId),
}

/// Who a flow joins, and how it came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peers {
    /// `None` where nobody asked yet: a plain listener does not need it.
    pub(super) downstream: Option<SocketAddr>,
    /// For `Route::Service`; nobody's otherwise.
    pub(super) endpoint: EndpointId,
    /// Index of the listener.
    pub(super) listener: u16,
    pub(super) original_dst: Option<SocketAddr>,
    /// Whose endpoints may be tried.
    pub(super) service: Option<ServiceId>,
    /// The address to dial from, if it is not ours.
    pub(super) source: Option<SocketAddr>,
    pub(super) upstream: SocketAddr,
}

/// In ticks of the worker's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) active: u32,
    /// `active` as it was when the kernel was asked for more.
    pub(super) asked: Option<u32>,
    /// Since when it has had a deaf side (`Flow::is_deaf`).
    pub(super) deaf_since: Option<u32>,
    /// It has lasted, and the kernel asks its peers whether they live.
    pub(super) is_kept_alive: bool,
    /// The timer of its slot also stands for a look at that.
    pub(super) look_due: bool,
    pub(super) opened: u32,
    /// The timer that is set; `None` once the flow is on its way out.
    pub(super) timer: Option<Timer>,
}

impl Slab {
    pub(super) fn new(flows_max: u32, hands_out: bool) -> Slab {
        let free = if hands_out { (0..flows_max).rev().collect() } else { Vec::new() };
        Slab { entries: Vec::with_capacity(flows_max as usize), flows_max, free, occupied: 0 }
    }

    pub(super) const fn occupied(&self) -> u32 {
        self.occupied
    }

    /// A free slot of our choice; it must be claimed or given back.
    pub(super) fn reserve(&mut self) -> Option<FlowId> {
        self.free.pop().map(FlowId::new)
    }

    /// Takes back what was reserved and not claimed.
    pub(super) fn give_back(&mut self, slot: FlowId) {
        self.free.push(slot.slot());
    }

    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Puts a flow into `slot`; `None` if the slot is taken or out of range, which would be a bug.
    pub(super) fn claim(
        &mut self,
        slot: FlowId,
        flow: Flow,
        peers: Peers,
        now: u32,
    ) -> Option<u32> {
        let entry = self.occupy(slot, peers, now)?;
        entry.flow = Some(flow);
        Some(entry.generation)
    }

    /// Makes `slot` a part of an exchange; `None` as with a flow.
    pub(super) fn claim_part(
        &mut self,
        slot: FlowId,
        part: Part,
        peers: Peers,
        now: u32,
    ) -> Option<()> {
        self.occupy(slot, peers, now)?.part = Some(part);
        Some(())
    }

    fn occupy(&mut self, slot: FlowId, peers: Peers, now: u32) -> Option<&mut Entry> {
        if slot.slot() >= self.flows_max {
            return None;
        }
        while self.entries.len() <= slot.index() {
            self.entries.push(Entry::vacant(peers));
        }
        let entry = self.entries.get_mut(slot.index())?;
        if entry.flow.is_some() || entry.part.is_some() {
            return None;
        }
        entry.peers = peers;
        entry.redials = 0;
        entry.times = Times { active: now, opened: now, ..Times::UNSET };
        self.occupied += 1;
        Some(entry)
    }

    /// The exchange that the slot is a part of, by its head, if this life of it still goes on.
    pub(super) fn head_of(&self, slot: FlowId, generation: u32) -> Option<FlowId> {
        let entry =
            self.entries.get(slot.index()).filter(|entry| entry.generation == generation)?;
        match entry.part? {
            Part::Head => Some(slot),
            Part::Leg(head) => Some(head),
        }
    }

    /// It is an exchange's own.
    pub(super) fn is_head(&self, slot: FlowId) -> bool {
        self.entries.get(slot.index()).is_some_and(|entry| entry.part == Some(Part::Head))
    }

    /// The slot's entry, if this life of it still goes on.
    pub(super) fn living(&mut self, slot: FlowId, generation: u32) -> Option<&mut Entry> {
        self.entries
            .get_mut(slot.index())
            .filter(|entry| entry.generation == generation && entry.flow.is_some())
    }

    pub(super) fn look(&self, slot: FlowId) -> Option<&Entry> {
        self.entries.get(slot.index())
    }

    pub(super) fn entry(&mut self, slot: FlowId) -> Option<&mut Entry> {
        self.entries.get_mut(slot.index())
    }

    /// Ends this life of the slot.
    pub(super) fn release(&mut self, slot: FlowId) {
        let Some(entry) = self.entries.get_mut(slot.index()) else { return };
        if entry.flow.take().is_some() || entry.part.take().is_some() {
            entry.generation = entry.generation.wrapping_add(1);
            self.occupied -= 1;
            if self.free.capacity() > 0 {
                self.free.push(slot.slot());
            }
        }
    }

    /// Every slot that was ever used, with its living flow if it has one.
    pub(super) fn iter(&self) -> impl Iterator<Item = (FlowId, &Entry, &Flow)> {
        (0..self.flows_max)
            .zip(&self.entries)
            .filter_map(|(slot, entry)| Some((FlowId::new(slot), entry, entry.flow.as_ref()?)))
    }

    /// Slots in use or used before; iterate below this to reach all.
    pub(super) fn slots(&self) -> u32 {
        u32::try_from(self.entries.len()).unwrap_or(self.flows_max)
    }
}

impl Times {
    const UNSET: Times = Times {
        active: 0,
        asked: None,
        deaf_since: None,
        is_kept_alive: false,
        look_due: false,
        opened: 0,
        timer: None,
    };
}

impl Entry {
    const fn vacant(peers: Peers) -> Entry {
        Entry {
            flow: None,
            generation: 0,
            part: None,
            peers,
            queued_for_buffers: 0,
            redials: 0,
            times: Times::UNSET,
        }
    }

    /// Marks `side` as waiting for buffers; false if it stands in the queue already.
    pub(super) fn queue_for_buffers(&mut self, side: Side) -> bool {
        let bit = 1 << side as u8;
        let is_new = self.queued_for_buffers & bit == 0;
        self.queued_for_buffers |= bit;
        is_new
    }

    pub(super) fn leave_buffer_queue(&mut self, side: Side) {
        self.queued_for_buffers &= !(1 << side as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Can, Flow, Ops, Rules, Segments};
    use crate::profile::Profile;

    fn flow() -> Flow {
        let rules = Rules::new(&Profile::default(), Can::default());
        Flow::open(None, &rules, &mut Segments::new(0), &mut Ops::new())
    }

    fn peers() -> Peers {
        Peers {
            downstream: None,
            endpoint: EndpointId::NONE,
            listener: 0,
            original_dst: None,
            service: None,
            source: None,
            upstream: SocketAddr::from(([127, 0, 0, 1], 1)),
        }
    }

    #[test]
    fn late_completion_of_an_ended_flow_finds_nobody() {
        let mut slab = Slab::new(2, true);
        let slot = slab.reserve().unwrap();
        let generation = slab.claim(slot, flow(), peers(), 0).unwrap();
        slab.release(slot);
        assert!(slab.living(slot, generation).is_none());
        let again = slab.reserve().unwrap();
        assert_eq!(again, slot);
        assert_eq!(slab.claim(again, flow(), peers(), 0), Some(generation + 1));
        assert!(slab.living(slot, generation).is_none());
        assert!(slab.living(slot, generation + 1).is_some());
    }

    #[test]
    fn never_grows_beyond_what_was_reserved() {
        let mut slab = Slab::new(3, false);
        let capacity = slab.entries.capacity();
        for slot in 0..3 {
            assert!(slab.claim(FlowId::new(slot), flow(), peers(), 0).is_some());
        }
        assert!(slab.claim(FlowId::new(3), flow(), peers(), 0).is_none());
        assert!(slab.claim(FlowId::new(1), flow(), peers(), 0).is_none());
        assert_eq!(slab.entries.capacity(), capacity);
        assert_eq!(slab.occupied(), 3);
    }
}
