// SPDX-License-Identifier: Apache-2.0
//! ZooKeeper's protocol with weir in the middle: an application speaks to what it takes for the
//! registry, provides at weir's inbound address and calls weir's outbound address.
//!
//! Pure: frames in, frames out. Invariants: no name of a provider leaves an application's connection
//! with the application's own place in it; what is not known is passed as it is, and what is known and
//! broken is not passed at all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::str::from_utf8;

use crate::wire::Stop;
use crate::wire::zookeeper::{self, Answer, EVENT, Head, Op, Piece, Text};

pub use self::names::{Names, untold};
use self::names::{Told, is_unreadable};
pub(super) use self::names::{moved, place};
pub use crate::wire::zookeeper::Hello;

mod names;

/// Of a frame that cannot be what it says it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(&'static str);

impl From<Stop> for Broken {
    fn from(stop: Stop) -> Broken {
        match stop {
            Stop::Bad(why) => Broken(why),
            Stop::NeedMore(_) | Stop::NotMine => Broken("a frame is cut short"),
        }
    }
}

/// One connection of an application, as far as answers depend on requests.
#[derive(Debug, Default)]
pub struct Dialogue {
    /// Of the requests in `pending`.
    bytes: usize,
    pending: VecDeque<Pending>,
}

/// A request whose answer says something that matters.
#[derive(Debug)]
struct Pending {
    /// Of the request.
    bytes: usize,
    holds: Answer,
    /// For each request within: the directory whose children were asked for.
    lists: Vec<Option<String>>,
    /// What is gone if it goes well.
    removes: Removed,
    xid: i32,
}

/// What a request is turned by.
pub struct Turn<'a> {
    /// How many claims were ever granted.
    pub claims: u64,
    /// The claims of this request that were: what the application calls each, and what the registry shall.
    pub granted: &'a BTreeMap<String, String>,
    /// What the registry calls a node; `None` if it is the same.
    pub real: &'a dyn Fn(&str) -> Option<String>,
}

/// Nodes that an application has taken away.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Removed {
    /// How many claims were granted by then: what was claimed later is not gone.
    pub claims: u64,
    /// As the application knows them.
    pub paths: Vec<String>,
}

/// A provider that an application enters.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Claim {
    /// Its leaf, as the application writes it.
    pub path: String,
    /// Where the application says that it is, as `host:port`.
    pub place: String,
    /// The port of that.
    pub port: u16,
}

/// What to pass on to the application.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Heard {
    /// In place of the frame that came; `None` if that is right as it is.
    pub frame: Option<Vec<u8>>,
    /// Providers that the application is told as they are: weir could not carry calls there.
    pub left: u64,
    /// What is gone now.
    pub removed: Removed,
    /// The application is about to call these.
    pub services: BTreeSet<String>,
    /// Names that it is told at weir's own address.
    pub told: u64,
}

/// Every provider that a request enters.
///
/// # Errors
///
/// It is broken.
pub fn claims(frame: &[u8]) -> Result<Vec<Claim>, Broken> {
    let mut claims = Vec::new();
    zookeeper::request(frame, &mut |piece| {
        let Piece::Create(path) = piece else { return };
        claims.extend(read(&path).and_then(|path| {
            let (place, port) = place(path)?;
            Some(Claim { path: path.to_owned(), place, port })
        }));
    })?;
    Ok(claims)
}

/// The first word of an application.
///
/// # Errors
///
/// It is none.
pub fn hello(frame: &[u8]) -> Result<Hello, Broken> {
    Ok(zookeeper::hello(frame)?)
}

/// What the server says to that; a session that is none has expired.
///
/// # Errors
///
/// It is no such answer.
pub fn welcome(frame: &[u8]) -> Result<Hello, Broken> {
    Ok(zookeeper::welcome(frame)?)
}

/// A request of weir's own that takes away `path`.
#[must_use]
pub fn removal(path: &str) -> Vec<u8> {
    const ANY_VERSION: i32 = -1;
    let mut frame = [OWN_XID.to_be_bytes(), DELETE.to_be_bytes()].concat();
    frame.extend(written(path));
    frame.extend(ANY_VERSION.to_be_bytes());
    frame
}

/// A request of weir's own that ends the session.
#[must_use]
pub fn farewell() -> Vec<u8> {
    [OWN_XID.to_be_bytes(), CLOSE.to_be_bytes()].concat()
}

/// The application ends its session.
///
/// # Errors
///
/// It is broken.
pub fn is_farewell(frame: &[u8]) -> Result<bool, Broken> {
    Ok(zookeeper::head(frame)?.op == Op::Close)
}

/// It answers a `removal` of weir's own: whether nothing is there any more.
///
/// # Errors
///
/// It is broken.
pub fn is_removed(frame: &[u8]) -> Result<Option<bool>, Broken> {
    let reply = zookeeper::reply(frame)?;
    Ok((reply.xid == OWN_XID).then_some(matches!(reply.error, 0 | NO_NODE)))
}

/// What a server says to whose session has expired, in answer to `hello`.
#[must_use]
pub fn expired(hello: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; EXPIRED_BYTES];
    // Version, timeout, session; then a password of so many bytes.
    if let Some(len) = frame.get_mut(16..20) {
        len.copy_from_slice(&PASSWORD_BYTES.to_be_bytes());
    }
    // Whether the server only reads: clients older than that question do not ask it.
    if hello.len() <= OLD_HELLO_BYTES {
        frame.pop();
    }
    frame
}

impl Dialogue {
    /// So many answers are due that no more requests should be taken.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.pending.len() >= PENDING_MAX || self.bytes >= PENDING_BYTES_MAX
    }

    /// What to pass on in place of a request; `None` if it is right as it is. No provider's leaf is made
    /// but by a claim that was granted.
    ///
    /// # Errors
    ///
    /// It is broken.
    pub fn request(&mut self, turn: &Turn<'_>, frame: &[u8]) -> Result<Option<Vec<u8>>, Broken> {
        let Head { op, xid } = zookeeper::head(frame)?;
        let (mut edits, mut lists) = (Edits::default(), Vec::new());
        let mut removes = Removed { claims: turn.claims, paths: Vec::new() };
        zookeeper::request(frame, &mut |piece| {
            let mut list = None;
            match piece {
                Piece::Create(path) => {
                    let name = read(&path).unwrap_or_default();
                    if name.is_empty() || place(name).is_some() || is_unreadable(name) {
                        edits.text(path.at, turn.granted.get(name).map_or(REFUSED, String::as_str));
                    }
                }
                Piece::List(path) => list = read(&path).map(str::to_owned),
                Piece::Path(path) => {
                    if let Some(name) = read(&path) {
                        removes.paths.extend((op == Op::Delete).then(|| name.to_owned()));
                        let real = (turn.real)(name);
                        real.into_iter().for_each(|real| edits.text(path.at.clone(), &real));
                    }
                }
                Piece::ChildCount(_) | Piece::Children { .. } | Piece::Failed => {}
            }
            if matches!(op, Op::Children(_) | Op::Multi) {
                lists.push(list);
            }
        })?;
        let holds = op.answer();
        if !removes.paths.is_empty() || holds != Answer::Nothing {
            let bytes = frame.len();
            self.bytes += bytes;
            self.pending.push_back(Pending { bytes, holds, lists, removes, xid });
        }
        Ok(edits.made(frame))
    }

    /// What to pass on in place of an answer or an event. `original` says how the application itself
    /// has called a node that it made.
    ///
    /// # Errors
    ///
    /// It is broken.
    pub fn answer(
        &mut self,
        names: &Names,
        original: &dyn Fn(&str) -> Option<String>,
        frame: &[u8],
    ) -> Result<Heard, Broken> {
        let reply = zookeeper::reply(frame)?;
        let asked = self.pending.iter().position(|pending| pending.xid == reply.xid);
        let asked = asked.filter(|_| reply.xid != EVENT).and_then(|at| self.pending.remove(at));
        self.bytes -= asked.as_ref().map_or(0, |asked| asked.bytes);
        let mut heard = Heard::default();
        let mut edits = Edits::default();
        let (mut index, mut count) = (0, None);
        let holds = asked.as_ref().map_or(Answer::Nothing, |asked| asked.holds);
        zookeeper::answer(frame, holds, &mut |piece| {
            let list = asked.as_ref().and_then(|asked| asked.lists.get(index)?.as_deref());
            index += 1;
            match piece {
                Piece::Children { at, list: found, .. } => {
                    if let Some(new) =
                        list.and_then(|path| heard.list(names, original, path, found))
                    {
                        count = Some(new.len());
                        edits.list(at, &new);
                    }
                }
                // Of the directory whose children came just before.
                Piece::ChildCount(at) => {
                    if let Some(count) = count.take() {
                        edits.number(at, count);
                    }
                }
                Piece::Path(path) => {
                    let shown = read(&path).and_then(|name| shown(names, original, name));
                    shown.into_iter().for_each(|shown| edits.text(path.at.clone(), &shown));
                }
                Piece::Create(_) | Piece::Failed | Piece::List(_) => {}
            }
        })?;
        let removed = asked.filter(|_| reply.error == 0).map(|asked| asked.removes);
        heard.removed = removed.unwrap_or_default();
        heard.frame = edits.made(frame);
        Ok(heard)
    }
}

impl Heard {
    /// The names of `directory`'s children as the application sees them; `None` if nothing changes.
    fn list(
        &mut self,
        names: &Names,
        original: &dyn Fn(&str) -> Option<String>,
        path: &str,
        found: &[u8],
    ) -> Option<Vec<String>> {
        let directory = names::directory(path)?;
        // What is no text names no provider: the list stays as it is.
        let found: Vec<&str> =
            zookeeper::names(found).map(from_utf8).collect::<Result<_, _>>().ok()?;
        let told: Vec<Option<Told>> =
            found.iter().map(|name| names.told(directory, name)).collect();
        let mixed = mixed(&told);
        let mut list = Vec::new();
        for (name, told) in found.into_iter().zip(told) {
            let own = original(&format!("{path}/{name}"));
            let own = own.as_deref().and_then(|path| path.rsplit_once('/')).map(|(_, own)| own);
            let told = told.filter(|told| !mixed.contains(&told.service));
            list.push(match (own, told) {
                (Some(own), _) => own.to_owned(),
                (None, Some(told)) => {
                    self.told += 1;
                    self.services.insert(told.service);
                    told.leaf
                }
                (None, None) => {
                    self.left += u64::from(place(&format!("{path}/{name}")).is_some());
                    name.to_owned()
                }
            });
        }
        Some(list)
    }
}

/// Services whose providers are of several groups: which one a call wants is not read.
fn mixed(told: &[Option<Told>]) -> BTreeSet<String> {
    let (mut groups, mut mixed) = (BTreeMap::new(), BTreeSet::new());
    for told in told.iter().flatten() {
        if *groups.entry(&told.service).or_insert(&told.group) != &told.group {
            mixed.insert(told.service.clone());
        }
    }
    mixed
}

/// As the application knows the node `path`; `None` if that is what the registry calls it.
fn shown(names: &Names, original: &dyn Fn(&str) -> Option<String>, path: &str) -> Option<String> {
    if let Some(own) = original(path) {
        return Some(own);
    }
    let (directory, leaf) = names::leaf(path)?;
    let told = names.told(directory, leaf)?;
    Some(format!("{}{}", path.strip_suffix(leaf)?, told.leaf))
}

fn read<'a>(text: &Text<'a>) -> Option<&'a str> {
    from_utf8(text.bytes).ok()
}

/// What stands elsewhere in a frame than it did, in the order of the bytes.
#[derive(Debug, Default)]
struct Edits(Vec<(Range<usize>, Vec<u8>)>);

impl Edits {
    fn list(&mut self, at: Range<usize>, names: &[String]) {
        let mut bytes = length(names.len()).to_vec();
        names.iter().for_each(|name| bytes.extend(written(name)));
        self.0.push((at, bytes));
    }

    fn number(&mut self, at: Range<usize>, number: usize) {
        self.0.push((at, length(number).to_vec()));
    }

    fn text(&mut self, at: Range<usize>, text: &str) {
        self.0.push((at, written(text)));
    }

    /// `None` if nothing changes.
    fn made(self, frame: &[u8]) -> Option<Vec<u8>> {
        let is_same = |(at, bytes): &(Range<usize>, Vec<u8>)| frame.get(at.clone()) == Some(bytes);
        if self.0.iter().all(is_same) {
            return None;
        }
        let (mut made, mut end) = (Vec::with_capacity(frame.len() * 2), 0);
        for (at, bytes) in self.0 {
            made.extend(frame.get(end..at.start)?);
            made.extend(bytes);
            end = at.end;
        }
        made.extend(frame.get(end..)?);
        Some(made)
    }
}

/// As it stands in a frame.
fn written(text: &str) -> Vec<u8> {
    [length(text.len()).as_slice(), text.as_bytes()].concat()
}

fn length(len: usize) -> [u8; 4] {
    // Frames are shorter than that.
    u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()
}

/// In place of an application's number: a request of weir's own.
const OWN_XID: i32 = -0x7765_6972;
const DELETE: i32 = 2;
const CLOSE: i32 = -11;
/// Nothing is there.
const NO_NODE: i32 = -101;
/// In place of the name of a node that must not be made: the server says that it is none (-8), in its
/// turn, as for any other request.
const REFUSED: &str = "refused-by-weir";
/// The server itself takes 1000 requests of all its clients at a time.
const PENDING_MAX: usize = 4096;
/// A few of the largest requests there are.
const PENDING_BYTES_MAX: usize = 4 << 20;
const EXPIRED_BYTES: usize = 37;
const PASSWORD_BYTES: u32 = 16;
const OLD_HELLO_BYTES: usize = 44;

#[cfg(test)]
mod tests;
