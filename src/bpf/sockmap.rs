// SPDX-License-Identifier: Apache-2.0
//! The sockmap relay: joins the two sockets of a flow in the kernel, and says what went through.
//!
//! Each worker has one of its own, with maps of its own. The rules that lose no byte, of which
//! sockmap.bpf.c keeps some and the flow the others:
//!
//! - A pair is joined while nothing of the flow is queued or in flight in user space; from then on
//!   user space writes to a socket only after `pass` and once `backlog` is nothing.
//! - A socket leaves the maps only by being closed.
//! - What `pass` has stopped is passed for good. User space may believe an EOF only when it has
//!   read as many bytes as were passed.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::{HashMap, Map, MapData, MapError, RingBuf, SockMap};
use aya::programs::{ProgramError, SchedClassifier, SkSkb};
use aya::{Ebpf, EbpfError, EbpfLoader, TestRun, TestRunOptions};

use super::{Aligned, root_cause};
use crate::op::Side;
use crate::sys::socket;
use directions::Directions;

pub use directions::{Pass, Progress};
pub use kernels::{Denial, denied};
pub use self_test::SelfTestError;

mod directions;
mod kernels;
mod self_test;
#[cfg(test)]
mod tests;

/// One worker's programs and maps. Dropping it lets go of every socket: end the flows first.
pub struct Sockmap {
    bpf: Ebpf,
    directions: Directions,
    events: RingBuf<MapData>,
    /// Numbers of pairs, the longest unused first: a verdict that still runs for a socket that was
    /// just closed must not find its number in new hands. There are always some that rest.
    free: VecDeque<u32>,
    places: HashMap<MapData, u64, u32>,
    sources: SockMap<MapData>,
    targets: SockMap<MapData>,
}

/// Two joined sockets. Give it back with `forget` once they are closed.
#[derive(Debug, Eq, PartialEq)]
pub struct Pair {
    cookies: [u64; 2],
    index: u32,
    /// Whether the kernel reads the socket of this side.
    reads: [bool; 2],
}

/// Why there is no sockmap relay here.
#[derive(Debug, thiserror::Error)]
pub enum SockmapError {
    /// The object file does not fit this program: a bug.
    #[error("sockmap: the built-in object has no {0}")]
    Built(&'static str),
    /// The kernel is known to lose bytes or worse.
    #[error("sockmap: Linux {release} is on the deny list: {reason}")]
    Denied {
        /// As the kernel says.
        release: String,
        /// What goes wrong.
        reason: &'static str,
    },
    /// The kernel took no program or map.
    #[error(
        "sockmap: load: {said} (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and a kernel with CONFIG_DEBUG_INFO_BTF)"
    )]
    Load {
        /// In the kernel's words.
        said: String,
    },
    /// A map could not be used.
    #[error("sockmap: {map}: {source}")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        source: MapError,
    },
    /// The table of directions could not be read as memory.
    #[error("sockmap: map `directions` into memory: {0}")]
    Memory(io::Error),
    /// A program was refused.
    #[error(
        "sockmap: {step} {program}: {said} (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, and a kernel with CONFIG_DEBUG_INFO_BTF)"
    )]
    Program {
        /// Which.
        program: &'static str,
        /// In the kernel's words.
        said: String,
        /// Load or attach.
        step: &'static str,
    },
    /// It was tried, and did not do what it must.
    #[error("sockmap: {0}")]
    SelfTest(#[from] SelfTestError),
}

/// Why two sockets were not joined. They are as they were.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refused {
    /// One of them has had a FIN, or is of a kind that the kernel does not forward.
    Kernel,
    /// No room for another pair.
    Full,
}

impl Sockmap {
    /// Loads the programs, for `pairs_max` pairs. A peer may be `credit_bytes` behind.
    ///
    /// # Errors
    ///
    /// The kernel is on the deny list or refuses a program or a map.
    pub fn load(pairs_max: u32, credit_bytes: u32) -> Result<Sockmap, SockmapError> {
        if let Some(Denial { release, reason }) = denied() {
            return Err(SockmapError::Denied { release, reason });
        }
        let places_max = (pairs_max.clamp(1, PAIRS_MAX) + RESTING) * 2;
        let mut loader = EbpfLoader::new();
        loader.override_global("weir_credit_bytes", &credit_bytes, true);
        for map in ["directions", "places", "sources", "targets"] {
            loader.map_max_entries(map, places_max);
        }
        let mut bpf = loader.load(&OBJECT.0).map_err(load_error)?;
        // The programs take hold of their maps while they are loaded: no map may go before.
        let verdict: &mut SkSkb = program(&mut bpf, VERDICT)?;
        verdict.load().map_err(refused(VERDICT, "load"))?;
        let backlog: &mut SchedClassifier = program(&mut bpf, BACKLOG)?;
        backlog.load().map_err(refused(BACKLOG, "load"))?;
        let sources: SockMap<MapData> = map(&mut bpf, "sources")?;
        let verdict: &mut SkSkb = program(&mut bpf, VERDICT)?;
        verdict.attach(sources.fd()).map_err(refused(VERDICT, "attach"))?;
        let directions = match bpf.take_map("directions") {
            Some(Map::Array(map)) => Directions::new(&map, places_max)?,
            _ => return Err(SockmapError::Built("map directions")),
        };
        Ok(Sockmap {
            directions,
            events: map(&mut bpf, "events")?,
            free: (0..places_max / 2).collect(),
            places: map(&mut bpf, "places")?,
            sources,
            targets: map(&mut bpf, "targets")?,
            bpf,
        })
    }

    /// Joins two connected sockets: from now on the kernel moves what they receive, beginning with
    /// what waits in them unread. Either direction may be refused alone: see `Pair::reads`.
    ///
    /// # Errors
    ///
    /// Neither is joined.
    pub fn join(
        &mut self,
        downstream: BorrowedFd<'_>,
        upstream: BorrowedFd<'_>,
    ) -> Result<Pair, Refused> {
        let sockets = [downstream, upstream];
        if self.room() == 0 {
            return Err(Refused::Full);
        }
        let index = self.free.pop_front().ok_or(Refused::Full)?;
        let mut pair = Pair { cookies: [0; 2], index, reads: [false; 2] };
        if self.insert(&mut pair, sockets).is_err() {
            self.withdraw(pair);
            return Err(Refused::Kernel);
        }
        for socket in sockets {
            // What came before waits for the next segment otherwise. On a broken socket it fails,
            // which the flow learns by other ways.
            let _ = socket::report_received(socket);
        }
        Ok(pair)
    }

    /// Targets first: no segment may find its target missing.
    fn insert(&mut self, pair: &mut Pair, sockets: [BorrowedFd<'_>; 2]) -> Result<(), Unjoined> {
        for (side, socket) in Side::BOTH.into_iter().zip(sockets) {
            let place = pair.place(side);
            self.directions.reset(place);
            let cookie = socket::cookie(socket)?;
            pair.cookies[side as usize] = cookie;
            self.places.insert(cookie, place, 0)?;
            self.targets.set(place, &socket, 0)?;
        }
        for (side, socket) in Side::BOTH.into_iter().zip(sockets) {
            let put = self.sources.set(pair.place(side), &socket, 0);
            pair.reads[side as usize] = put.is_ok();
        }
        if pair.reads == [false; 2] { Err(Unjoined) } else { Ok(()) }
    }

    /// What went through in the direction that reads from `from`.
    #[must_use]
    pub fn progress(&self, pair: &Pair, from: Side) -> Progress {
        self.directions.progress(pair.place(from))
    }

    /// Leaves everything that comes from now on in this direction to user space. A segment that is
    /// just being looked at may still be redirected: whoever wants to know what was, asks `backlog`
    /// after a `recv` on the socket, which waits for the same lock.
    pub fn pass(&self, pair: &Pair, from: Side) {
        self.directions.pass(pair.place(from));
    }

    /// Bytes of this direction that were redirected and are not yet in the other socket's send
    /// buffer; `None` if that socket is gone. Says nothing once user space has written there. Costs
    /// a syscall.
    #[must_use]
    pub fn backlog(&self, pair: &Pair, from: Side) -> Option<u32> {
        let mut packet = [0; PACKET_BYTES];
        packet[..4].copy_from_slice(&pair.place(from).to_ne_bytes());
        let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() };
        let program: &SchedClassifier = self.bpf.program(BACKLOG)?.try_into().ok()?;
        let backlog = program.test_run(options).ok()?.return_value;
        (backlog != BACKLOG_UNKNOWN).then_some(backlog)
    }

    /// A direction, by its pair's number, that the kernel has left to user space or given up since
    /// it was last asked; call until `None`.
    pub fn next_stopped(&mut self) -> Option<(u32, Side)> {
        let event = self.events.next()?;
        let place = u32::from_ne_bytes(event.first_chunk().copied()?);
        Some((place / 2, if place % 2 == 0 { Side::Downstream } else { Side::Upstream }))
    }

    /// Readable when `next_stopped` has something to say.
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The pair's place is free again; its sockets are closed, or will be before anything else is
    /// done with them: with that they leave the maps.
    pub fn forget(&mut self, pair: Pair) {
        for cookie in pair.cookies {
            // A socket that was refused is not there.
            let _ = self.places.remove(&cookie);
        }
        self.free.push_back(pair.index);
    }

    /// Undoes what there is of a pair of which nothing was forwarded yet.
    fn withdraw(&mut self, pair: Pair) {
        for side in Side::BOTH {
            let place = pair.place(side);
            // It may have got only half the way.
            let _ = self.sources.clear_index(&place);
            let _ = self.targets.clear_index(&place);
        }
        self.forget(pair);
    }

    /// Numbers that a pair may have: below this.
    #[must_use]
    pub fn numbers(&self) -> u32 {
        self.directions.places() / 2
    }

    /// No pair is joined.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.numbers() as usize
    }

    /// Pairs for which there is room.
    #[must_use]
    pub fn room(&self) -> u32 {
        u32::try_from(self.free.len()).unwrap_or(u32::MAX).saturating_sub(RESTING)
    }
}

impl Pair {
    /// Below `Sockmap::numbers`.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// Whether the kernel moves what comes from this side.
    #[must_use]
    pub const fn reads(&self, from: Side) -> bool {
        self.reads[from as usize]
    }

    /// Where the socket of this side is in the maps; its partner differs in the last bit.
    const fn place(&self, side: Side) -> u32 {
        self.index * 2 + side as u32
    }
}

impl std::fmt::Debug for Sockmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sockmap").field("room", &self.free.len()).finish_non_exhaustive()
    }
}

/// A step of joining failed; which one is of no use to anybody.
struct Unjoined;

impl From<io::Error> for Unjoined {
    fn from(_: io::Error) -> Unjoined {
        Unjoined
    }
}

impl From<MapError> for Unjoined {
    fn from(_: MapError) -> Unjoined {
        Unjoined
    }
}

fn program<'a, T>(bpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut T, SockmapError>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program>,
{
    let program = bpf.program_mut(name).and_then(|program| program.try_into().ok());
    program.ok_or(SockmapError::Built(name))
}

fn map<T: TryFrom<Map>>(bpf: &mut Ebpf, name: &'static str) -> Result<T, SockmapError> {
    let map = bpf.take_map(name).and_then(|map| map.try_into().ok());
    map.ok_or(SockmapError::Built(name))
}

fn load_error(error: EbpfError) -> SockmapError {
    SockmapError::Load { said: root_cause(&error) }
}

fn refused(program: &'static str, step: &'static str) -> impl Fn(ProgramError) -> SockmapError {
    move |error| SockmapError::Program { program, said: root_cause(&error), step }
}

static OBJECT: &Aligned<{ BYTES.len() }> = &Aligned(*BYTES);
const BYTES: &[u8; include_bytes!("prebuilt/sockmap.bpf.o").len()] =
    include_bytes!("prebuilt/sockmap.bpf.o");
const VERDICT: &str = "weir_forward";
const BACKLOG: &str = "weir_backlog";
/// See sockmap.h.
const BACKLOG_UNKNOWN: u32 = u32::MAX;
/// The least that the kernel takes for a packet is an Ethernet header.
const PACKET_BYTES: usize = 64;
/// Numbers that nobody has, so that each rests for so many pairs before the next one has it: more
/// than a worker ends in one turn.
const RESTING: u32 = 512;
/// Keeps places within 32 bits.
const PAIRS_MAX: u32 = 1 << 24;
