// SPDX-License-Identifier: Apache-2.0
//! HPACK over all header blocks of a connection: what later blocks may refer to.
//!
//! Of the two fields that name a service only a tag is kept, of all others only their length.

use std::collections::VecDeque;

use super::{ENTRY_OVERHEAD, Field, Place, Stop, literal, of_static};
use crate::wire::Name;
use crate::wire::http2::Block;

/// The dynamic table of a connection, newest first.
#[derive(Debug)]
pub(in crate::wire) struct Memory {
    bytes: usize,
    bytes_max: usize,
    entries: VecDeque<Remembered>,
}

/// What stands for a name.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(in crate::wire) struct Tag {
    /// Of the name.
    pub(in crate::wire) hash: u64,
    /// A service is known by it.
    pub(in crate::wire) is_known: bool,
}

#[derive(Clone, Copy, Debug)]
struct Remembered {
    bytes: usize,
    field: Field,
    name_bytes: usize,
    tag: Tag,
}

impl Memory {
    /// Of a connection that has sent nothing.
    pub(in crate::wire) const fn new() -> Memory {
        Memory { bytes: 0, bytes_max: BYTES_FIRST, entries: VecDeque::new() }
    }

    /// Reads a whole header block: the tags of its authority and of its path, made by `tag`, which
    /// is told whether it is a path. A block that is not whole spoils the table.
    pub(in crate::wire) fn decode(
        &mut self,
        block: &mut Block<'_>,
        tag: impl Fn(&Name, bool) -> Tag,
    ) -> Result<[Option<Tag>; 2], Stop> {
        let mut found = [None; 2];
        while let Some(first) = block.next()? {
            let (is_kept, mask) = match first {
                0x20..=0x3f => {
                    self.resize(block.number(first, 0x1f)?)?;
                    continue;
                }
                0x80.. => (false, 0x7f),
                0x40..=0x7f => (true, 0x3f),
                _ => (false, 0x0f),
            };
            let entry = if first >= 0x80 {
                self.get(block.number(first, mask)?, &tag)?
            } else {
                let name = |index| self.get(index, &tag).map(|one| (one.field, one.name_bytes));
                remember(literal(block, name, first, mask)?, &tag)?
            };
            let place = match entry.field {
                Field::Authority => found.first_mut(),
                Field::Path => found.last_mut(),
                Field::Other => None,
            };
            if let Some(place) = place
                && place.replace(entry.tag).is_some()
            {
                return Err(Stop::Bad("a pseudo header is there twice"));
            }
            if is_kept {
                self.insert(entry);
            }
        }
        Ok(found)
    }

    fn get(&self, index: usize, tag: impl Fn(&Name, bool) -> Tag) -> Result<Remembered, Stop> {
        match of_static(index)? {
            Place::Static(entry) => remember(entry, tag),
            Place::Dynamic(age) => {
                self.entries.get(age).copied().ok_or(Stop::Bad("no such header in the table"))
            }
        }
    }

    fn insert(&mut self, entry: Remembered) {
        let bytes = entry.bytes + ENTRY_OVERHEAD;
        self.shrink(self.bytes_max.saturating_sub(bytes));
        if bytes <= self.bytes_max {
            self.entries.push_front(entry);
            self.bytes += bytes;
        }
    }

    fn resize(&mut self, bytes_max: usize) -> Result<(), Stop> {
        if bytes_max > BYTES_MAX {
            return Err(Stop::Bad("a header table larger than allowed"));
        }
        self.bytes_max = bytes_max;
        self.shrink(bytes_max);
        Ok(())
    }

    /// Forgets the oldest until so many bytes are left.
    fn shrink(&mut self, bytes: usize) {
        while self.bytes > bytes {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.bytes -= oldest.bytes + ENTRY_OVERHEAD;
        }
    }
}

fn remember(entry: super::Entry<'_>, tag: impl Fn(&Name, bool) -> Tag) -> Result<Remembered, Stop> {
    let super::Entry { bytes, field, name_bytes, value } = entry;
    let tag = match field {
        Field::Authority => tag(&value.read(false)?, false),
        Field::Path => tag(&value.read(true)?, true),
        Field::Other => Tag::default(),
    };
    Ok(Remembered { bytes, field, name_bytes, tag })
}

/// Until the server allows more.
const BYTES_FIRST: usize = 4096;
/// Servers that allow more than this are rare; their clients are reset when they use it.
const BYTES_MAX: usize = 64 * 1024;
