// SPDX-License-Identifier: Apache-2.0
//! The one type of Hessian2 that routing needs: a short string.

use super::{Reader, Stop};

/// Null, and all of a value that is nothing.
pub(super) const NULL: u8 = b'N';

/// A string of at most `STRING_BYTES_MAX` bytes, or null.
///
/// Its length counts UTF-16 units, so its bytes are walked: a Java peer writes what is beyond the
/// basic plane as two units of three bytes, others as four bytes that count two.
pub(super) fn string<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a [u8]>, Stop> {
    let mut units = match reader.u8()? {
        NULL => return Ok(None),
        short @ 0x00..=0x1f => u16::from(short),
        middle @ 0x30..=0x33 => u16::from(middle - 0x30) << 8 | u16::from(reader.u8()?),
        b'S' => reader.u16()?,
        // Several chunks: longer than any name.
        b'R' => return Err(Stop::Bad("a name in chunks")),
        _ => return Err(Stop::Bad("not a string where a name must be")),
    };
    if usize::from(units) > STRING_BYTES_MAX {
        return Err(Stop::Bad("a name too long"));
    }
    let mut walked = *reader;
    let mut len = 0;
    while units > 0 {
        // The bytes that are still needed at least, so that nobody asks for one at a time.
        let needed = walked.at + usize::from(units);
        let first = walked.u8().map_err(|_| Stop::NeedMore(needed))?;
        let (bytes, of_units) = match first {
            0x00..=0x7f => (1, 1),
            0xc0..=0xdf => (2, 1),
            0xe0..=0xef => (3, 1),
            0xf0..=0xf7 if units > 1 => (4, 2),
            _ => return Err(Stop::Bad("a name that is no UTF-8")),
        };
        // What is asked for never gets less: a name that is too long for its body stays so.
        let needed = walked.at - 1 + bytes + usize::from(units - of_units);
        for _ in 1..bytes {
            if walked.u8().map_err(|_| Stop::NeedMore(needed))? & 0xc0 != 0x80 {
                return Err(Stop::Bad("a name that is no UTF-8"));
            }
        }
        units -= of_units;
        len += bytes;
    }
    if len > STRING_BYTES_MAX {
        return Err(Stop::Bad("a name too long"));
    }
    reader.take(len).map(Some)
}

/// Far longer than an interface's name.
const STRING_BYTES_MAX: usize = 1024;
