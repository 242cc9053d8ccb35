// SPDX-License-Identifier: Apache-2.0
//! Which bytes wait for which half: first-in-first-out queues of buffers, threaded through one
//! table per worker.
//!
//! Holds places and lengths, never a payload byte. Invariant: a buffer is in at most one queue, or
//! in the list of freed ones, or with the ring. Nothing is allocated after `new`.

use crate::op::{BufferId, Segment};

/// The links of every queue of one worker, one entry per buffer.
#[derive(Debug)]
pub struct Segments {
    entries: Box<[Entry]>,
    freed: Vec<BufferId>,
}

/// The bytes of one half that were received and not yet sent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Queue {
    bytes: u32,
    count: u16,
    head: u16,
    tail: u16,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    len: u32,
    next: u16,
    offset: u32,
}

impl Segments {
    /// For buffers with ids below `buffers`.
    #[must_use]
    pub fn new(buffers: u16) -> Segments {
        Segments {
            entries: vec![Entry::default(); usize::from(buffers)].into_boxed_slice(),
            freed: Vec::with_capacity(usize::from(buffers)),
        }
    }

    /// Puts a received segment at the end of `queue`.
    pub fn push(&mut self, queue: &mut Queue, segment: Segment) {
        let id = segment.buffer.0;
        if let Some(entry) = self.entries.get_mut(usize::from(id)) {
            *entry = Entry { len: segment.len, next: id, offset: segment.offset };
        }
        if queue.count == 0 {
            queue.head = id;
        } else if let Some(last) = self.entries.get_mut(usize::from(queue.tail)) {
            last.next = id;
        }
        queue.tail = id;
        queue.count += 1;
        queue.bytes += segment.len;
    }

    /// Takes `bytes` from the front of `queue`; buffers that become empty are freed.
    pub fn advance(&mut self, queue: &mut Queue, bytes: u32) {
        let mut left = bytes.min(queue.bytes);
        while left > 0 {
            let head = queue.head;
            let Some(entry) = self.entries.get_mut(usize::from(head)) else { return };
            let step = left.min(entry.len);
            entry.len -= step;
            entry.offset += step;
            left -= step;
            queue.bytes -= step;
            if entry.len == 0 {
                queue.head = entry.next;
                queue.count -= 1;
                self.free(BufferId(head));
            }
        }
    }

    /// Frees every buffer of `queue`.
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

    /// The segments of `queue` from its head; may be cut short with `take`.
    pub fn iter(&self, queue: Queue) -> impl Iterator<Item = Segment> + '_ {
        let mut next = queue.head;
        (0..queue.count).map_while(move |_| {
            let entry = self.entries.get(usize::from(next))?;
            let segment = Segment { buffer: BufferId(next), offset: entry.offset, len: entry.len };
            next = entry.next;
            Some(segment)
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

    /// Buffers held.
    #[must_use]
    pub const fn count(self) -> u16 {
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

    fn segment(id: u16, len: u32) -> Segment {
        Segment { buffer: BufferId(id), offset: 0, len }
    }

    #[test]
    fn two_queues_share_the_table_and_keep_their_order() {
        let mut segments = Segments::new(8);
        let (mut a, mut b) = (Queue::default(), Queue::default());
        for id in [3, 1, 7] {
            segments.push(&mut a, segment(id, 10));
            segments.push(&mut b, segment(id - 1, 5));
        }
        segments.advance(&mut a, 15);
        let left: Vec<Segment> = segments.iter(a).collect();
        assert_eq!(left, [Segment { buffer: BufferId(1), offset: 5, len: 5 }, segment(7, 10)]);
        assert_eq!((a.bytes(), b.bytes(), b.count()), (15, 15, 3));
        assert_eq!(segments.take_freed(), Some(BufferId(3)));
        segments.clear(&mut b);
        assert!(b.is_empty());
        assert_eq!(std::iter::from_fn(|| segments.take_freed()).count(), 3);
    }
}
