// SPDX-License-Identifier: Apache-2.0
//! ZooKeeper's protocol (jute): where in a frame the paths and names stand.
//!
//! Works on whole frames, without their length in front. Lengths inside are believed only as far as
//! the frame reaches. What a frame holds beyond what is known here is passed over.

use std::ops::Range;

use super::{Reader, Stop, inside};

/// Its number in a request; what is not named here has no paths that matter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Op {
    /// Ends the session.
    Close,
    /// The four ways to make a node.
    Create,
    /// Asks for the names of children; with the directory's stat if true.
    Children(bool),
    /// Takes a node away.
    Delete,
    /// One path and whatever follows it; what the answer holds.
    Node(Answer),
    /// Many requests in one.
    Multi,
    /// Anything else: passed as it is.
    Other,
    /// Watches of an earlier connection, in so many lists of paths.
    Watches(u8),
}

/// What stands behind the header of an answer without an error.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Names of children, with the directory's stat if true.
    Children(bool),
    /// Data, then a stat.
    Data,
    /// Results of several requests.
    Multi,
    /// Nothing that matters.
    Nothing,
    /// A path first of all.
    Path,
    /// A stat.
    Stat,
}

/// A string of a frame: where it stands, with its length in front, and what it says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Text<'a> {
    /// With the four bytes of its length.
    pub at: Range<usize>,
    /// Without them; empty for a null.
    pub bytes: &'a [u8],
}

/// Something in a frame that matters, in the order of the bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece<'a> {
    /// The names of a directory's children: the whole list with its count.
    Children {
        /// Where the list stands.
        at: Range<usize>,
        /// Its strings, each with its length: see `names`.
        list: &'a [u8],
        /// How many.
        count: u32,
    },
    /// How many children a stat says there are: four bytes.
    ChildCount(Range<usize>),
    /// A node to be made.
    Create(Text<'a>),
    /// Of several requests in one, one that has failed or was not tried: nothing stands there.
    Failed,
    /// A directory whose children are asked for.
    List(Text<'a>),
    /// Any other node.
    Path(Text<'a>),
}

/// The first eight bytes of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Head {
    /// Which operation.
    pub op: Op,
    /// The client's number for it.
    pub xid: i32,
}

/// The first sixteen bytes of an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reply {
    /// 0 if it went well.
    pub error: i32,
    /// The client's number of the request, or one of the special ones.
    pub xid: i32,
}

/// What a client says first, or a server answers to that.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hello {
    /// 0: none yet, or expired.
    pub session: i64,
    /// As wanted or negotiated.
    pub timeout_ms: i32,
}

impl Op {
    /// By its number on the wire.
    #[must_use]
    pub const fn of(number: i32) -> Op {
        match number {
            1 | 15 | 19 | 21 => Op::Create,
            2 | 20 => Op::Delete,
            6 | 7 | 13 | 17 | 18 | 106 => Op::Node(Answer::Nothing),
            3 | 5 => Op::Node(Answer::Stat),
            4 => Op::Node(Answer::Data),
            9 => Op::Node(Answer::Path),
            8 => Op::Children(false),
            12 => Op::Children(true),
            14 | 22 => Op::Multi,
            101 => Op::Watches(3),
            105 => Op::Watches(5),
            -11 => Op::Close,
            _ => Op::Other,
        }
    }

    /// What its answer holds.
    #[must_use]
    pub const fn answer(self) -> Answer {
        match self {
            Op::Create => Answer::Path,
            Op::Children(with_stat) => Answer::Children(with_stat),
            Op::Node(answer) => answer,
            Op::Multi => Answer::Multi,
            Op::Close | Op::Delete | Op::Other | Op::Watches(_) => Answer::Nothing,
        }
    }
}

/// The head of a request.
///
/// # Errors
///
/// It is shorter than that.
pub fn head(frame: &[u8]) -> Result<Head, Stop> {
    let mut reader = Reader::new(frame);
    let (xid, number) = (int(&mut reader)?, int(&mut reader)?);
    Ok(Head { op: Op::of(number), xid })
}

/// The head of an answer.
///
/// # Errors
///
/// It is shorter than that.
pub fn reply(frame: &[u8]) -> Result<Reply, Stop> {
    let mut reader = Reader::new(frame);
    let xid = int(&mut reader)?;
    taken(&mut reader, 8)?;
    Ok(Reply { error: int(&mut reader)?, xid })
}

/// What a client says first: version, last transaction, timeout, session, password.
///
/// # Errors
///
/// It is no such frame.
pub fn hello(frame: &[u8]) -> Result<Hello, Stop> {
    let mut reader = Reader::new(frame);
    taken(&mut reader, 12)?;
    hello_rest(&mut reader)
}

/// What a server answers: version, timeout, session, password.
///
/// # Errors
///
/// It is no such frame.
pub fn welcome(frame: &[u8]) -> Result<Hello, Stop> {
    let mut reader = Reader::new(frame);
    taken(&mut reader, 4)?;
    hello_rest(&mut reader)
}

fn hello_rest(reader: &mut Reader<'_>) -> Result<Hello, Stop> {
    let (timeout_ms, session) = (int(reader)?, long(reader)?);
    text(reader)?;
    Ok(Hello { session, timeout_ms })
}

/// Every piece of a request.
///
/// # Errors
///
/// A length leads out of the frame.
pub fn request<'a>(frame: &'a [u8], visit: &mut dyn FnMut(Piece<'a>)) -> Result<(), Stop> {
    let op = head(frame)?.op;
    let mut reader = Reader { at: REQUEST_HEAD, bytes: frame };
    match op {
        Op::Close | Op::Other => {}
        Op::Children(_) => visit(Piece::List(text(&mut reader)?)),
        Op::Create => create(&mut reader, number_of(frame), visit)?,
        Op::Multi => multi(&mut reader, visit)?,
        Op::Delete | Op::Node(_) => visit(Piece::Path(text(&mut reader)?)),
        Op::Watches(lists) => {
            taken(&mut reader, 8)?;
            for _ in 0..lists {
                for _ in 0..count(&mut reader)? {
                    visit(Piece::Path(text(&mut reader)?));
                }
            }
        }
    }
    Ok(())
}

fn number_of(frame: &[u8]) -> i32 {
    let mut reader = Reader { at: 4, bytes: frame };
    int(&mut reader).unwrap_or_default()
}

fn create<'a>(
    reader: &mut Reader<'a>,
    number: i32,
    visit: &mut dyn FnMut(Piece<'a>),
) -> Result<(), Stop> {
    let path = text(reader)?;
    text(reader)?;
    for _ in 0..count(reader)? {
        taken(reader, 4)?;
        text(reader)?;
        text(reader)?;
    }
    taken(reader, if number == CREATE_TTL { 12 } else { 4 })?;
    visit(Piece::Create(path));
    Ok(())
}

/// A request that is not known ends the walk: the server refuses the whole of it.
fn multi<'a>(reader: &mut Reader<'a>, visit: &mut dyn FnMut(Piece<'a>)) -> Result<(), Stop> {
    loop {
        let (number, is_done) = multi_head(reader)?;
        if is_done {
            return Ok(());
        }
        match Op::of(number) {
            Op::Create => create(reader, number, visit)?,
            Op::Children(_) => {
                visit(Piece::List(text(reader)?));
                taken(reader, 1)?;
            }
            op @ (Op::Delete | Op::Node(_))
                if matches!(number, DELETE | GET_DATA | SET_DATA | CHECK) =>
            {
                visit(Piece::Path(text(reader)?));
                if number == SET_DATA {
                    text(reader)?;
                }
                taken(reader, if op == Op::Node(Answer::Data) { 1 } else { 4 })?;
            }
            _ => return Ok(()),
        }
    }
}

fn multi_head(reader: &mut Reader<'_>) -> Result<(i32, bool), Stop> {
    let number = int(reader)?;
    let is_done = taken(reader, 1)?.first().is_some_and(|byte| *byte != 0);
    taken(reader, 4)?;
    Ok((number, is_done))
}

/// Every piece of an answer to a request that had such an answer, or of an event.
///
/// # Errors
///
/// A length leads out of the frame.
pub fn answer<'a>(
    frame: &'a [u8],
    holds: Answer,
    visit: &mut dyn FnMut(Piece<'a>),
) -> Result<(), Stop> {
    let head = reply(frame)?;
    let mut reader = Reader { at: REPLY_HEAD, bytes: frame };
    if head.xid == EVENT {
        taken(&mut reader, 8)?;
        visit(Piece::Path(text(&mut reader)?));
        return Ok(());
    }
    if head.error != 0 {
        return Ok(());
    }
    result(&mut reader, holds, visit)
}

fn result<'a>(
    reader: &mut Reader<'a>,
    holds: Answer,
    visit: &mut dyn FnMut(Piece<'a>),
) -> Result<(), Stop> {
    match holds {
        Answer::Nothing => {}
        Answer::Path => visit(Piece::Path(text(reader)?)),
        Answer::Stat => stat(reader, visit)?,
        Answer::Data => {
            text(reader)?;
            stat(reader, visit)?;
        }
        Answer::Children(with_stat) => {
            children(reader, visit)?;
            if with_stat {
                stat(reader, visit)?;
            }
        }
        Answer::Multi => multi_results(reader, visit)?,
    }
    Ok(())
}

fn multi_results<'a>(
    reader: &mut Reader<'a>,
    visit: &mut dyn FnMut(Piece<'a>),
) -> Result<(), Stop> {
    loop {
        let (number, is_done) = multi_head(reader)?;
        if is_done {
            return Ok(());
        }
        let holds = match number {
            -1 => {
                taken(reader, 4)?;
                visit(Piece::Failed);
                continue;
            }
            2 | 13 => Answer::Nothing,
            15 | 19 | 21 => {
                visit(Piece::Path(text(reader)?));
                Answer::Stat
            }
            number => match Op::of(number).answer() {
                Answer::Multi | Answer::Nothing => return Ok(()),
                holds => holds,
            },
        };
        result(reader, holds, visit)?;
    }
}

fn children<'a>(reader: &mut Reader<'a>, visit: &mut dyn FnMut(Piece<'a>)) -> Result<(), Stop> {
    let begin = reader.at;
    let count = count(reader)?;
    let first = reader.at;
    for _ in 0..count {
        text(reader)?;
    }
    let list = reader.bytes.get(first..reader.at).unwrap_or_default();
    visit(Piece::Children { at: begin..reader.at, count, list });
    Ok(())
}

fn stat<'a>(reader: &mut Reader<'a>, visit: &mut dyn FnMut(Piece<'a>)) -> Result<(), Stop> {
    let begin = reader.at;
    taken(reader, STAT_BYTES)?;
    visit(Piece::ChildCount(begin + STAT_CHILDREN..begin + STAT_CHILDREN + 4));
    Ok(())
}

/// The names of a `Children` piece.
pub fn names(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut reader = Reader::new(list);
    std::iter::from_fn(move || {
        if reader.at >= reader.bytes.len() {
            return None;
        }
        text(&mut reader).ok().map(|text| text.bytes)
    })
}

fn text<'a>(reader: &mut Reader<'a>) -> Result<Text<'a>, Stop> {
    let begin = reader.at;
    let bytes = match int(reader)? {
        // Null.
        -1 => &[][..],
        len => taken(reader, usize::try_from(len).map_err(|_| OUT)?)?,
    };
    Ok(Text { at: begin..reader.at, bytes })
}

/// Of a list, which has one byte for each entry at least.
fn count(reader: &mut Reader<'_>) -> Result<u32, Stop> {
    let count = int(reader)?;
    let left = reader.bytes.len() - reader.at.min(reader.bytes.len());
    match u32::try_from(count.max(0)) {
        Ok(count) if count as usize <= left => Ok(count),
        _ => Err(OUT),
    }
}

fn int(reader: &mut Reader<'_>) -> Result<i32, Stop> {
    inside(reader.u32(), OUT_TEXT).map(u32::cast_signed)
}

fn long(reader: &mut Reader<'_>) -> Result<i64, Stop> {
    inside(reader.u64(), OUT_TEXT).map(u64::cast_signed)
}

fn taken<'a>(reader: &mut Reader<'a>, len: usize) -> Result<&'a [u8], Stop> {
    inside(reader.take(len), OUT_TEXT)
}

/// In place of a client's number: an event of a watch.
pub const EVENT: i32 = -1;
const REQUEST_HEAD: usize = 8;
/// Before anything else in an answer: number, transaction, error.
pub const REPLY_HEAD: usize = 16;
const STAT_BYTES: usize = 68;
const STAT_CHILDREN: usize = 56;
const CHECK: i32 = 13;
const DELETE: i32 = 2;
const GET_DATA: i32 = 4;
const SET_DATA: i32 = 5;
const CREATE_TTL: i32 = 21;
const OUT_TEXT: &str = "a length leads out of its frame";
const OUT: Stop = Stop::Bad(OUT_TEXT);

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame, put together field by field.
    #[derive(Default)]
    struct Frame(Vec<u8>);

    impl Frame {
        fn ints(mut self, ints: &[i32]) -> Frame {
            ints.iter().for_each(|int| self.0.extend(int.to_be_bytes()));
            self
        }

        fn text(mut self, text: &str) -> Frame {
            self.0.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            self.0.extend(text.bytes());
            self
        }

        fn bytes(mut self, bytes: &[u8]) -> Frame {
            self.0.extend(bytes);
            self
        }

        /// The rest of a create: data, one access rule, flags.
        fn made(self, flags: i32) -> Frame {
            self.text("data").ints(&[1, 31]).text("world").text("anyone").ints(&[flags])
        }
    }

    fn said(pieces: &[Piece<'_>]) -> Vec<String> {
        let word = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = |piece: &Piece<'_>| match piece {
            Piece::ChildCount(at) => format!("count at {}", at.start),
            Piece::Children { count, list, .. } => {
                let names: Vec<String> = names(list).map(word).collect();
                format!("{count} children {}", names.join(" "))
            }
            Piece::Create(path) => format!("create {}", word(path.bytes)),
            Piece::Failed => "failed".to_owned(),
            Piece::List(path) => format!("list {}", word(path.bytes)),
            Piece::Path(path) => format!("path {}", word(path.bytes)),
        };
        pieces.iter().map(said).collect()
    }

    fn asked(frame: &Frame) -> Vec<String> {
        let mut pieces = Vec::new();
        request(&frame.0, &mut |piece| pieces.push(piece)).unwrap();
        let is_cut = |len| frame.0.get(..len).is_some_and(|cut| request(cut, &mut drop).is_err());
        assert!(pieces.is_empty() || is_cut(11), "half a path is no path");
        said(&pieces)
    }

    fn told(frame: &Frame, holds: Answer) -> Vec<String> {
        let mut pieces = Vec::new();
        answer(&frame.0, holds, &mut |piece| pieces.push(piece)).unwrap();
        said(&pieces)
    }

    #[test]
    fn paths_of_requests_are_found() {
        let new = |op| Frame::default().ints(&[7, op]);
        let (plain, ttl) = (new(1).text("/a").made(1), new(21).text("/a").made(5));
        assert_eq!(asked(&plain), ["create /a"]);
        assert_eq!(asked(&ttl.bytes(&[0; 8])), ["create /a"]);
        assert_eq!(asked(&new(15).text("/a").made(3)), ["create /a"]);
        assert_eq!(asked(&new(20).text("/a").ints(&[-1])), ["path /a"]);
        assert_eq!(asked(&new(3).text("/a").bytes(&[1])), ["path /a"]);
        assert_eq!(asked(&new(12).text("/a").bytes(&[1])), ["list /a"]);
        let watches = new(101).bytes(&[0; 8]).ints(&[1]).text("/a").ints(&[0, 2]).text("/b");
        assert_eq!(asked(&watches.text("/c")), ["path /a", "path /b", "path /c"]);
        for (number, xid) in [(100, -4), (11, -2), (77, 7)] {
            assert_eq!(asked(&Frame::default().ints(&[xid, number])), [""; 0]);
        }
    }

    #[test]
    fn every_request_within_one_is_found() {
        let head = |frame: Frame, op| frame.ints(&[op]).bytes(&[0]).ints(&[-1]);
        let frame = head(Frame::default().ints(&[0, 14]), 1).text("/a").made(1);
        let frame = head(head(frame, 2).text("/b").ints(&[-1]), 5).text("/c").text("x").ints(&[0]);
        let frame = head(head(frame, 4).text("/d").bytes(&[0]), 8).text("/e").bytes(&[0]);
        let end = |frame: Frame| frame.ints(&[-1]).bytes(&[1]).ints(&[-1]);
        let all = ["create /a", "path /b", "path /c", "path /d", "list /e"];
        assert_eq!(asked(&end(frame)), all);

        let frame = head(Frame::default().ints(&[0, 0, 9, 0]), 1).text("/a");
        let frame = head(head(frame, 2), -1).ints(&[-110]);
        let frame = head(head(frame, 8).ints(&[1]).text("x"), 15).text("/b").bytes(&[0; 68]);
        let all = ["path /a", "failed", "1 children x", "path /b", "count at 142"];
        assert_eq!(told(&end(frame), Answer::Multi), all);
    }

    #[test]
    fn names_and_paths_of_answers_are_found() {
        let ok = || Frame::default().ints(&[7, 0, 9, 0]);
        let list = ok().ints(&[2]).text("x").text("yz").bytes(&[0; 68]);
        assert_eq!(told(&list, Answer::Children(true)), ["2 children x yz", "count at 87"]);
        assert_eq!(told(&ok().ints(&[-1]), Answer::Children(false)), ["0 children "]);
        assert_eq!(told(&ok().text("/a"), Answer::Path), ["path /a"]);
        assert_eq!(told(&ok().ints(&[-1]).bytes(&[0; 68]), Answer::Data), ["count at 76"]);
        assert_eq!(told(&Frame::default().ints(&[7, 0, 9, -101]), Answer::Path), [""; 0]);
        let event = Frame::default().ints(&[-1, 0, 0, 0, 4, 3]).text("/a");
        assert_eq!(told(&event, Answer::Nothing), ["path /a"]);
    }

    #[test]
    fn first_words_name_session_and_timeout() {
        let frame = Frame::default().ints(&[0, 0, 0, 4000, 0, 5]).text("password").bytes(&[0]);
        assert_eq!(hello(&frame.0), Ok(Hello { session: 5, timeout_ms: 4000 }));
        let frame = Frame::default().ints(&[0, 4000, 0, 5]).text("password");
        assert_eq!(welcome(&frame.0), Ok(Hello { session: 5, timeout_ms: 4000 }));
    }

    #[test]
    fn lengths_that_lead_out_of_the_frame_are_refused() {
        let frames = [
            Frame::default().ints(&[7]),
            Frame::default().ints(&[7, 3, 9]),
            Frame::default().ints(&[7, 3, -2]),
            Frame::default().ints(&[7, 3, i32::MAX]),
            Frame::default().ints(&[7, 101, 0, 0, i32::MAX]),
            Frame::default().ints(&[7, 1]).text("/a").text("").ints(&[i32::MAX]),
        ];
        for frame in frames {
            assert_eq!(request(&frame.0, &mut drop), Err(OUT), "{:?}", frame.0);
        }
        let many = Frame::default().ints(&[7, 0, 0, 0, i32::MAX]);
        assert_eq!(answer(&many.0, Answer::Children(false), &mut drop), Err(OUT));
    }
}
