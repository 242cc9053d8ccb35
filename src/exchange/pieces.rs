// SPDX-License-Identifier: Apache-2.0
//! Parts of received buffers on their way to different sockets: first-in-first-out queues through one
//! table per worker.
//!
//! A buffer may hold frames for several upstreams, so it goes home with the last of its pieces.
//! Holds places and lengths, never a payload byte. Nothing is allocated after `new`.

use crate::op::{BufferId, Segment};

/// The links of every queue of one worker.
#[derive(Debug)]
pub struct Pieces {
    entries: Box<[Entry]>,
    /// Head of the list of those that nobody uses.
    free: u32,
    freed: Vec<BufferId>,
    /// Buffers with a piece.
    held: u32,
    /// Entries that nobody uses.
    left: u32,
    /// Pieces of each buffer.
    shares: Box<[u16]>,
}

/// Pieces that wait for one socket, or to be looked at.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Queue {
    bytes: u32,
    count: u32,
    head: u32,
    tail: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    next: u32,
    segment: Segment,
}

impl Pieces {
    /// For buffers with ids below `buffers`; `count` pieces at a time.
    #[must_use]
    pub fn new(buffers: u16, count: u32) -> Pieces {
        let segment = Segment { buffer: BufferId(0), offset: 0, len: 0 };
        let entries = (1..=count).map(|next| Entry { next, segment });
        Pieces {
            entries: entries.collect(),
            free: 0,
            freed: Vec::with_capacity(usize::from(buffers)),
            held: 0,
            left: count,
            shares: vec![0; usize::from(buffers)].into_boxed_slice(),
        }
    }

    /// Puts a segment at the end of `queue`: behind its last piece if it goes on there. False if
    /// there are too many pieces; the segment is still the caller's then.
    #[must_use]
    pub fn push(&mut self, queue: &mut Queue, segment: Segment) -> bool {
        if self.extend(queue, segment) {
            return true;
        }
        let place = self.free;
        let Some(entry) = self.entries.get_mut(place as usize) else { return false };
        let share = self.shares.get_mut(usize::from(segment.buffer.0));
        let Some(share) = share.filter(|share| **share < u16::MAX) else { return false };
        self.held += u32::from(*share == 0);
        *share += 1;
        self.left -= 1;
        self.free = std::mem::replace(entry, Entry { next: place, segment }).next;
        if queue.count == 0 {
            queue.head = place;
        } else if let Some(last) = self.entries.get_mut(queue.tail as usize) {
            last.next = place;
        }
        queue.tail = place;
        queue.count += 1;
        queue.bytes += segment.len;
        true
    }

    /// A piece may be divided: enough is left to take in every buffer that can still come.
    #[must_use]
    pub fn can_divide(&self) -> bool {
        self.left as usize + self.held as usize > self.shares.len()
    }

    /// The last piece of `queue` now reaches over `len` bytes more, which were copied there.
    pub fn grow(&mut self, queue: &mut Queue, len: u32) {
        if let Some(last) = self.entries.get_mut(queue.tail as usize).filter(|_| queue.count > 0) {
            last.segment.len += len;
            queue.bytes += len;
        }
    }

    fn extend(&mut self, queue: &mut Queue, segment: Segment) -> bool {
        let last = self.entries.get_mut(queue.tail as usize).filter(|_| queue.count > 0);
        let Some(last) = last.map(|last| &mut last.segment) else { return false };
        let goes_on = last.buffer == segment.buffer && last.offset + last.len == segment.offset;
        if goes_on {
            last.len += segment.len;
            queue.bytes += segment.len;
        }
        goes_on
    }

    /// Moves `bytes` from the front of `from` to the end of `to`. False if there are too many
    /// pieces: some may have moved.
    #[must_use]
    pub fn shift(&mut self, from: &mut Queue, to: &mut Queue, bytes: u32) -> bool {
        let mut left = bytes.min(from.bytes);
        while left > 0 {
            let Some(front) = self.front(*from) else { return false };
            let part = Segment { len: front.len.min(left), ..front };
            if part.len == front.len && !self.goes_on(to, part) {
                self.relink(from, to);
            } else {
                if !self.push(to, part) {
                    return false;
                }
                self.advance(from, part.len);
            }
            left -= part.len;
        }
        true
    }

    fn goes_on(&self, queue: &Queue, segment: Segment) -> bool {
        self.entries.get(queue.tail as usize).filter(|_| queue.count > 0).is_some_and(|last| {
            let last = last.segment;
            last.buffer == segment.buffer && last.offset + last.len == segment.offset
        })
    }

    /// The whole first piece changes queues.
    fn relink(&mut self, from: &mut Queue, to: &mut Queue) {
        let place = from.head;
        let Some(entry) = self.entries.get_mut(place as usize) else { return };
        let len = entry.segment.len;
        from.head = std::mem::replace(&mut entry.next, place);
        from.count -= 1;
        from.bytes -= len;
        if to.count == 0 {
            to.head = place;
        } else if let Some(last) = self.entries.get_mut(to.tail as usize) {
            last.next = place;
        }
        to.tail = place;
        to.count += 1;
        to.bytes += len;
    }

    /// Takes `bytes` from the front of `queue`; buffers that nobody shares any more are freed.
    pub fn advance(&mut self, queue: &mut Queue, bytes: u32) {
        let mut left = bytes.min(queue.bytes);
        while left > 0 {
            let place = queue.head;
            let Some(entry) = self.entries.get_mut(place as usize) else { return };
            let step = left.min(entry.segment.len);
            entry.segment.len -= step;
            entry.segment.offset += step;
            left -= step;
            queue.bytes -= step;
            if entry.segment.len > 0 {
                continue;
            }
            let buffer = entry.segment.buffer;
            queue.head = std::mem::replace(&mut entry.next, self.free);
            queue.count -= 1;
            self.free = place;
            self.left += 1;
            self.leave(buffer);
        }
    }

    fn leave(&mut self, buffer: BufferId) {
        let Some(share) = self.shares.get_mut(usize::from(buffer.0)) else { return };
        *share -= 1;
        if *share == 0 {
            self.held -= 1;
            self.free(buffer);
        }
    }

    /// Lets go of all of `queue`.
    pub fn clear(&mut self, queue: &mut Queue) {
        self.advance(queue, queue.bytes);
    }

    /// A buffer whose bytes nobody wants.
    pub fn free(&mut self, buffer: BufferId) {
        if self.freed.len() < self.freed.capacity() {
            self.freed.push(buffer);
        }
    }

    /// A freed buffer, to be given back to the ring.
    pub fn take_freed(&mut self) -> Option<BufferId> {
        self.freed.pop()
    }

    /// The first piece.
    #[must_use]
    pub fn front(&self, queue: Queue) -> Option<Segment> {
        self.iter(queue).next()
    }

    /// The last piece.
    #[must_use]
    pub fn back(&self, queue: Queue) -> Option<Segment> {
        let last = self.entries.get(queue.tail as usize).filter(|_| queue.count > 0);
        last.map(|last| last.segment)
    }

    /// The pieces of `queue` from its head.
    pub fn iter(&self, queue: Queue) -> impl Iterator<Item = Segment> + '_ {
        let mut next = queue.head;
        (0..queue.count).map_while(move |_| {
            let entry = self.entries.get(next as usize)?;
            next = entry.next;
            Some(entry.segment)
        })
    }
}

impl Queue {
    /// Holds nothing.
    #[must_use]
    pub const fn new() -> Queue {
        Queue { bytes: 0, count: 0, head: 0, tail: 0 }
    }

    /// Bytes waiting.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.bytes
    }

    /// Pieces held.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.count
    }

    /// Nothing waits.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(id: u16, offset: u32, len: u32) -> Segment {
        Segment { buffer: BufferId(id), offset, len }
    }

    #[test]
    fn buffer_goes_home_with_its_last_piece() {
        let mut pieces = Pieces::new(4, 6);
        let [mut inbox, mut one, mut other] = [Queue::default(); 3];
        assert!(pieces.push(&mut inbox, segment(1, 0, 100)));
        assert!(pieces.push(&mut inbox, segment(2, 0, 50)));
        assert!(pieces.shift(&mut inbox, &mut one, 30));
        assert!(pieces.shift(&mut inbox, &mut one, 10), "goes on where the last piece ended");
        assert!(pieces.shift(&mut inbox, &mut other, 80));
        let lists = [inbox, one, other].map(|queue| pieces.iter(queue).collect::<Vec<_>>());
        assert_eq!(lists[0], [segment(2, 20, 30)]);
        assert_eq!(lists[1], [segment(1, 0, 40)]);
        assert_eq!(lists[2], [segment(1, 40, 60), segment(2, 0, 20)]);
        pieces.clear(&mut one);
        assert_eq!(pieces.take_freed(), None, "half of it waits elsewhere");
        pieces.advance(&mut other, 61);
        assert_eq!(pieces.take_freed(), Some(BufferId(1)));
        pieces.clear(&mut inbox);
        pieces.clear(&mut other);
        assert_eq!((pieces.take_freed(), pieces.take_freed()), (Some(BufferId(2)), None));
    }

    #[test]
    fn too_many_pieces_are_refused_and_come_back() {
        let mut pieces = Pieces::new(4, 2);
        let mut queue = Queue::default();
        assert!(
            pieces.push(&mut queue, segment(0, 0, 1)) && pieces.push(&mut queue, segment(1, 0, 1))
        );
        assert!(!pieces.push(&mut queue, segment(2, 0, 1)));
        pieces.clear(&mut queue);
        assert!(pieces.push(&mut queue, segment(2, 0, 1)));
        assert_eq!((queue.bytes(), queue.count()), (1, 1));
    }
}
