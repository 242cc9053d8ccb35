// SPDX-License-Identifier: Apache-2.0
//! TLS: the host that a ClientHello names.
//!
//! The hello is one handshake message, cut into records anywhere: it is read byte by byte over
//! their heads. With encrypted ClientHello only the outer name is seen.

use super::{Name, Stop};

/// Reads the ClientHello at the front of `bytes`: the host in lower case, without a final dot;
/// `None` if it names none.
///
/// # Errors
///
/// Too few bytes, another protocol, or a hello that no client would write.
pub fn parse(bytes: &[u8]) -> Result<Option<Name>, Stop> {
    let mut hello = Hello { at: 0, bytes, end: 0 };
    if hello.byte()? != CLIENT_HELLO {
        return Err(Stop::Bad("a handshake that begins with no ClientHello"));
    }
    let len = hello.number(3)?;
    if len > HELLO_BYTES_MAX {
        return Err(Stop::Bad("the ClientHello is too long"));
    }
    let mut left = len;
    hello.skip(2 + 32, &mut left)?;
    let session = hello.within(1, &mut left)?;
    hello.skip(session, &mut left)?;
    let ciphers = hello.within(2, &mut left)?;
    hello.skip(ciphers, &mut left)?;
    let compressions = hello.within(1, &mut left)?;
    hello.skip(compressions, &mut left)?;
    if left == 0 {
        return Ok(None);
    }
    let mut extensions = hello.within(2, &mut left)?;
    if extensions > left {
        return Err(Stop::Bad(CUT));
    }
    while extensions > 0 {
        let kind = hello.within(2, &mut extensions)?;
        let mut len = hello.within(2, &mut extensions)?;
        if kind == SERVER_NAME {
            return hello.server_name(&mut len).map(Some);
        }
        hello.skip(len, &mut extensions)?;
    }
    Ok(None)
}

/// The handshake's bytes, over the records that they are in.
struct Hello<'a> {
    at: usize,
    bytes: &'a [u8],
    /// Of the record.
    end: usize,
}

impl Hello<'_> {
    fn byte(&mut self) -> Result<u8, Stop> {
        while self.at == self.end {
            self.record()?;
        }
        let byte = self.bytes.get(self.at).copied().ok_or(Stop::NeedMore(self.at + 1))?;
        self.at += 1;
        Ok(byte)
    }

    /// Asked for as a whole, its head and then the rest: a client that sends it byte by byte is not looked
    /// at byte by byte.
    fn record(&mut self) -> Result<(), Stop> {
        let not_mine =
            if self.at == 0 { Stop::NotMine } else { Stop::Bad("not a handshake record") };
        if self.head(0)? != HANDSHAKE || self.head(1)? != 3 {
            return Err(not_mine);
        }
        let minor = self.head(2)?;
        let len = usize::from(self.head(3)?) << 8 | usize::from(self.head(4)?);
        if minor > 4 || len == 0 || len > RECORD_BYTES_MAX {
            return Err(not_mine);
        }
        if self.at > BYTES_MAX {
            return Err(Stop::Bad("too many records"));
        }
        self.at += RECORD_HEAD_BYTES;
        self.end = self.at + len;
        if self.end > self.bytes.len() {
            return Err(Stop::NeedMore(self.end));
        }
        Ok(())
    }

    /// Of a record's head, which begins here.
    fn head(&self, index: usize) -> Result<u8, Stop> {
        let byte = self.bytes.get(self.at + index).copied();
        byte.ok_or(Stop::NeedMore(self.at + RECORD_HEAD_BYTES))
    }

    fn number(&mut self, bytes: usize) -> Result<usize, Stop> {
        (0..bytes).try_fold(0, |number, _| Ok(number << 8 | usize::from(self.byte()?)))
    }

    /// A number that takes its bytes from `left`.
    fn within(&mut self, bytes: usize, left: &mut usize) -> Result<usize, Stop> {
        *left = left.checked_sub(bytes).ok_or(Stop::Bad(CUT))?;
        self.number(bytes)
    }

    fn skip(&mut self, bytes: usize, left: &mut usize) -> Result<(), Stop> {
        *left = left.checked_sub(bytes).ok_or(Stop::Bad(CUT))?;
        (0..bytes).try_for_each(|_| self.byte().map(drop))
    }

    /// A list with one host in it (RFC 6066, 3).
    fn server_name(&mut self, left: &mut usize) -> Result<Name, Stop> {
        let _list = self.within(2, left)?;
        let kind = self.within(1, left)?;
        let len = self.within(2, left)?;
        if kind != 0 || len == 0 || len > *left || len > HOST_BYTES_MAX {
            return Err(Stop::Bad("not a host name"));
        }
        let mut name = Name::EMPTY;
        for _ in 0..len {
            let byte = self.byte()?.to_ascii_lowercase();
            if !byte.is_ascii_graphic() {
                return Err(Stop::Bad("not a host name"));
            }
            name.push(byte)?;
        }
        if name.as_bytes().ends_with(b".") {
            name.len -= 1;
        }
        Ok(name)
    }
}

const CUT: &str = "the ClientHello is cut";
const HANDSHAKE: u8 = 0x16;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: usize = 0;
const RECORD_HEAD_BYTES: usize = 5;
const RECORD_BYTES_MAX: usize = 1 << 14;
/// With post-quantum key shares it has about 2 KiB.
const HELLO_BYTES_MAX: usize = 16 * 1024;
/// A hello cut into records of 16 bytes; whoever cuts finer wants something else.
const BYTES_MAX: usize = HELLO_BYTES_MAX * 2;
/// RFC 1035, 2.3.4, with a final dot.
const HOST_BYTES_MAX: usize = 254;
