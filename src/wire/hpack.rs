// SPDX-License-Identifier: Apache-2.0
//! HPACK (RFC 7541), as far as it takes to find `:authority` and `:path` in a connection's first
//! header block.
//!
//! Values stay where they are: an entry of the dynamic table is a place in the block, read again if
//! somebody refers to it. So nothing is copied but the two names, and nothing is allocated.

use super::http2::Block;
use super::{Name, Stop};

pub(super) use memory::{Memory, Tag};

mod memory;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Names {
    pub(super) authority: Name,
    /// Cut at the longest name.
    pub(super) path: Name,
}

/// Reads a whole header block.
pub(super) fn decode(block: &mut Block<'_>) -> Result<Names, Stop> {
    let mut table = Table::new();
    let mut found = Found { authority: None, path: None };
    while let Some(first) = block.next()? {
        match first {
            0x80.. => {
                let entry = table.get(block.number(first, 0x7f)?)?;
                found.take(entry.field, entry.value)?;
            }
            0x40..=0x7f => {
                let entry = literal(block, |index| table.name(index), first, 0x3f)?;
                found.take(entry.field, entry.value)?;
                table.insert(entry);
            }
            0x20..=0x3f => table.resize(block.number(first, 0x1f)?)?,
            _ => {
                let entry = literal(block, |index| table.name(index), first, 0x0f)?;
                found.take(entry.field, entry.value)?;
            }
        }
    }
    let empty = |name: Option<Name>| name.unwrap_or(Name::EMPTY);
    Ok(Names { authority: empty(found.authority), path: empty(found.path) })
}

/// The fields somebody wants to know.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Field {
    Authority,
    Other,
    Path,
}

/// A field with its value.
#[derive(Clone, Copy, Debug)]
struct Entry<'a> {
    /// Of name and value, decoded.
    bytes: usize,
    field: Field,
    name_bytes: usize,
    value: Value<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    /// In the block.
    Coded(Text<'a>),
    /// Of the static table.
    Fixed(&'static [u8]),
}

/// A string in a block.
#[derive(Clone, Copy, Debug)]
struct Text<'a> {
    /// The block, from here on.
    from: Block<'a>,
    is_huffman: bool,
    len: usize,
}

struct Found {
    authority: Option<Name>,
    path: Option<Name>,
}

impl Found {
    fn take(&mut self, field: Field, value: Value<'_>) -> Result<(), Stop> {
        let place = match field {
            Field::Authority => &mut self.authority,
            Field::Other => return Ok(()),
            Field::Path => &mut self.path,
        };
        if place.is_some() {
            return Err(Stop::Bad("a pseudo header is there twice"));
        }
        *place = Some(value.read(field == Field::Path)?);
        Ok(())
    }
}

impl Value<'_> {
    fn read(self, is_path: bool) -> Result<Name, Stop> {
        let mut name = Name::EMPTY;
        let push = |byte| match name.push(byte) {
            Err(_) if is_path => Ok(()), // Only its beginning names a service.
            result => result,
        };
        match self {
            Value::Coded(text) => decode_text(text, push)?,
            Value::Fixed(bytes) => bytes.iter().copied().try_for_each(push)?,
        }
        Ok(name)
    }
}

/// A field with a value of its own; the name may be one of the tables.
fn literal<'a>(
    block: &mut Block<'a>,
    name_of: impl Fn(usize) -> Result<(Field, usize), Stop>,
    first: u8,
    mask: u8,
) -> Result<Entry<'a>, Stop> {
    let index = block.number(first, mask)?;
    let (field, name_bytes) = if index == 0 {
        let name = text(block)?;
        let (mut is_authority, mut is_path, mut bytes) = (true, true, 0);
        decode_text(name, |byte| {
            is_authority &= AUTHORITY.get(bytes) == Some(&byte);
            is_path &= PATH.get(bytes) == Some(&byte);
            bytes += 1;
            Ok(())
        })?;
        match bytes {
            10 if is_authority => (Field::Authority, bytes),
            5 if is_path => (Field::Path, bytes),
            _ => (Field::Other, bytes),
        }
    } else {
        name_of(index)?
    };
    let value = text(block)?;
    let mut value_bytes = 0;
    decode_text(value, |_| {
        value_bytes += 1;
        Ok(())
    })?;
    Ok(Entry { bytes: name_bytes + value_bytes, field, name_bytes, value: Value::Coded(value) })
}

/// Steps over a string and says where it is.
fn text<'a>(block: &mut Block<'a>) -> Result<Text<'a>, Stop> {
    let first = block.must()?;
    let len = block.number(first, 0x7f)?;
    if len > TEXT_BYTES_MAX {
        return Err(Stop::Bad("a header too long"));
    }
    let text = Text { from: *block, is_huffman: first & 0x80 != 0, len };
    for _ in 0..len {
        block.must()?;
    }
    Ok(text)
}

/// Hands over the bytes of a string, decoded.
fn decode_text(text: Text<'_>, mut sink: impl FnMut(u8) -> Result<(), Stop>) -> Result<(), Stop> {
    let mut block = text.from;
    if !text.is_huffman {
        return (0..text.len).try_for_each(|_| sink(block.must()?));
    }
    let (mut code, mut bits) = (0u32, 0usize);
    for _ in 0..text.len {
        let byte = block.must()?;
        for shift in (0..8).rev() {
            code = code << 1 | u32::from(byte >> shift & 1);
            bits += 1;
            let of_len = HUFFMAN.lens.get(bits).ok_or(Stop::Bad("no Huffman code"))?;
            let offset = code.wrapping_sub(of_len.first_code);
            if offset >= of_len.count {
                continue;
            }
            let symbol = HUFFMAN.symbols.get((of_len.first_symbol + offset) as usize).copied();
            match symbol.map(u8::try_from) {
                Some(Ok(byte)) => sink(byte)?,
                _ => return Err(Stop::Bad("the end is coded")),
            }
            (code, bits) = (0, 0);
        }
    }
    // Padded with the first bits of the end's code, which are ones, and with fewer than eight.
    let is_padding = bits < 8 && code == (1 << bits) - 1;
    if is_padding { Ok(()) } else { Err(Stop::Bad("wrong Huffman padding")) }
}

/// The dynamic table, newest first, behind the static one.
struct Table<'a> {
    bytes: usize,
    bytes_max: usize,
    entries: [Option<Entry<'a>>; ENTRIES_MAX],
    len: usize,
    newest: usize,
}

impl<'a> Table<'a> {
    const fn new() -> Table<'a> {
        Table { bytes: 0, bytes_max: BYTES_MAX, entries: [None; ENTRIES_MAX], len: 0, newest: 0 }
    }

    /// The name of an entry: which field it is, and how long.
    fn name(&self, index: usize) -> Result<(Field, usize), Stop> {
        self.get(index).map(|entry| (entry.field, entry.name_bytes))
    }

    fn get(&self, index: usize) -> Result<Entry<'a>, Stop> {
        let none = Stop::Bad("no such header in the table");
        let age = match of_static(index)? {
            Place::Static(entry) => return Ok(entry),
            Place::Dynamic(age) => age,
        };
        if age >= self.len {
            return Err(none);
        }
        let place = (self.newest + ENTRIES_MAX - age) % ENTRIES_MAX;
        self.entries.get(place).copied().flatten().ok_or(none)
    }

    fn insert(&mut self, entry: Entry<'a>) {
        let bytes = entry.bytes + ENTRY_OVERHEAD;
        self.shrink(self.bytes_max.saturating_sub(bytes));
        if bytes > self.bytes_max {
            return;
        }
        self.newest = (self.newest + 1) % ENTRIES_MAX;
        if let Some(place) = self.entries.get_mut(self.newest) {
            *place = Some(entry);
            self.len += 1;
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
        while self.bytes > bytes && self.len > 0 {
            let oldest = (self.newest + ENTRIES_MAX + 1 - self.len) % ENTRIES_MAX;
            let entry = self.entries.get_mut(oldest).and_then(Option::take);
            self.bytes -= entry.map_or(0, |entry| entry.bytes + ENTRY_OVERHEAD);
            self.len -= 1;
        }
    }
}

/// Where an index leads.
enum Place<'a> {
    /// Into the dynamic table, so many entries after the newest.
    Dynamic(usize),
    Static(Entry<'a>),
}

fn of_static<'a>(index: usize) -> Result<Place<'a>, Stop> {
    let index = index.checked_sub(1).ok_or(Stop::Bad("no such header in the table"))?;
    let Some(name_bytes) = STATIC_NAMES.get(index).copied().map(usize::from) else {
        return Ok(Place::Dynamic(index - STATIC_NAMES.len()));
    };
    let (field, value): (Field, &'static [u8]) = match index + 1 {
        1 => (Field::Authority, b""),
        4 => (Field::Path, b"/"),
        5 => (Field::Path, b"/index.html"),
        _ => (Field::Other, b""),
    };
    let bytes = name_bytes + value.len();
    Ok(Place::Static(Entry { bytes, field, name_bytes, value: Value::Fixed(value) }))
}

/// The code is canonical: within a length, codes follow each other as their symbols do.
struct Huffman {
    lens: [OfLen; 31],
    symbols: [u16; 257],
}

#[derive(Clone, Copy)]
struct OfLen {
    count: u32,
    first_code: u32,
    first_symbol: u32,
}

#[expect(clippy::indexing_slicing, reason = "the compiler checks it")]
#[expect(clippy::cast_possible_truncation, reason = "below 257")]
const HUFFMAN: Huffman = {
    let mut lens = [OfLen { count: 0, first_code: 0, first_symbol: 0 }; 31];
    let mut symbols = [0; 257];
    let (mut len, mut code, mut next) = (1, 0, 0);
    while len <= 30 {
        code <<= 1;
        lens[len] = OfLen { count: 0, first_code: code, first_symbol: next as u32 };
        let mut symbol = 0;
        while symbol < 257 {
            if HUFFMAN_LENS[symbol] as usize == len {
                symbols[next] = symbol as u16;
                next += 1;
                code += 1;
                lens[len].count += 1;
            }
            symbol += 1;
        }
        len += 1;
    }
    Huffman { lens, symbols }
};

const AUTHORITY: &[u8] = b":authority";
const PATH: &[u8] = b":path";
/// SETTINGS_HEADER_TABLE_SIZE as it is until somebody says otherwise.
const BYTES_MAX: usize = 4096;
/// What an entry counts beside its bytes.
const ENTRY_OVERHEAD: usize = 32;
const ENTRIES_MAX: usize = BYTES_MAX / ENTRY_OVERHEAD;
/// Of one name or value.
const TEXT_BYTES_MAX: usize = 32 * 1024;

/// Bytes of the names of the static table (RFC 7541, appendix A).
#[rustfmt::skip]
const STATIC_NAMES: [u8; 61] = [
    10, 7, 7, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 14, 15, 15, 13, 6, 27, 3,
    5, 13, 13, 19, 16, 16, 14, 16, 13, 12, 6, 4, 4, 6, 7, 4, 4, 8, 17, 13, 8,
    19, 13, 4, 8, 12, 18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3, 16,
];

/// Bits of each symbol's code (RFC 7541, appendix B); the last is the end.
#[rustfmt::skip]
const HUFFMAN_LENS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7,
    7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21,
    23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24,
    21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];
