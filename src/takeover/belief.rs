// SPDX-License-Identifier: Apache-2.0
//! What is believed of one service in one registry, which is not always what the registry says.
//!
//! A registry that was wiped, restarted or cut in two says that nobody is there, and means it. A list
//! that becomes empty, or loses most of itself at once, is doubted: calls go by the old one until time
//! or a look at the endpoints has settled it. Pure: time comes from outside.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Instant;

use super::{Provider, Snapshot};
use crate::config::Protection;

/// What calls go by, and what stands against it.
#[derive(Debug, Default)]
pub(super) struct Belief {
    doubt: Option<Doubt>,
    /// When the registry said what is believed; `None` if that was in an earlier life.
    heard: Option<Instant>,
    /// `None` before anything was said.
    trusted: Option<Snapshot>,
}

#[derive(Debug)]
struct Doubt {
    reason: Reason,
    said: Snapshot,
    since: Instant,
}

/// Why the registry is not believed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// Most of the list went at once.
    Drop,
    /// All of it went.
    Empty,
}

impl Reason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Reason; 2] = [Reason::Drop, Reason::Empty];

    /// As a label.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Reason::Drop => "drop",
            Reason::Empty => "empty",
        }
    }
}

/// What hearing a registry has led to.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Heard {
    /// Calls go by something else from now on.
    Changed,
    /// A doubt has begun.
    Doubted(Reason),
    /// Nothing new.
    Same,
}

impl Belief {
    /// What was believed in an earlier life, until the registry says something.
    pub(super) fn kept(snapshot: Snapshot) -> Belief {
        Belief { doubt: None, heard: None, trusted: Some(snapshot) }
    }

    /// The registry says so; without `rules` it is believed.
    pub(super) fn hear(
        &mut self,
        said: Snapshot,
        rules: Option<&Protection>,
        now: Instant,
    ) -> Heard {
        let before = self.providers();
        let reason = rules.and_then(|rules| self.doubtful(&said, rules));
        let Some(reason) = reason else {
            self.trust(said, now);
            return if self.providers() == before { Heard::Same } else { Heard::Changed };
        };
        let old = self.doubt.take().filter(|doubt| doubt.reason == reason);
        let is_new = old.is_none();
        self.doubt = Some(Doubt { reason, said, since: old.map_or(now, |doubt| doubt.since) });
        match (is_new, self.providers() == before) {
            (true, _) => Heard::Doubted(reason),
            (false, true) => Heard::Same,
            (false, false) => Heard::Changed,
        }
    }

    /// A large drop is believed once it has lasted. True if calls go by something else now.
    pub(super) fn ripen(&mut self, rules: &Protection, now: Instant) -> bool {
        let is_ripe =
            |doubt: &Doubt| doubt.reason == Reason::Drop && now >= doubt.since + rules.drop_for;
        let since = self.doubt.as_ref().filter(|doubt| is_ripe(doubt)).map(|doubt| doubt.since);
        since.is_some_and(|since| self.settle(since, now))
    }

    /// Who must be looked at, for an empty list that has lasted, and since when it is doubted.
    pub(super) fn suspects(
        &self,
        rules: &Protection,
        now: Instant,
    ) -> Option<(Instant, Vec<SocketAddr>)> {
        let is_ripe =
            |doubt: &&Doubt| doubt.reason == Reason::Empty && now >= doubt.since + rules.empty_for;
        let doubt = self.doubt.as_ref().filter(is_ripe)?;
        let trusted = self.trusted.iter().flat_map(|snapshot| &snapshot.providers);
        Some((doubt.since, trusted.map(|provider| provider.endpoint.addr).collect()))
    }

    /// The registry was right in what has been doubted since `since`; of a later doubt that says
    /// nothing. True if calls go by something else now.
    pub(super) fn settle(&mut self, since: Instant, now: Instant) -> bool {
        let Some(doubt) = self.doubt.take_if(|doubt| doubt.since == since) else { return false };
        self.trust(doubt.said, now);
        true
    }

    /// What calls go by: while a drop is doubted, the old ones and the new ones.
    pub(super) fn providers(&self) -> Vec<Provider> {
        let said = self.doubt.as_ref().map(|doubt| &doubt.said);
        let mut seen = BTreeSet::new();
        let all = said.into_iter().chain(&self.trusted).flat_map(|snapshot| &snapshot.providers);
        all.filter(|provider| seen.insert(provider.endpoint.addr)).cloned().collect()
    }

    /// What is not believed, if there is such a thing.
    pub(super) fn reason(&self) -> Option<Reason> {
        self.doubt.as_ref().map(|doubt| doubt.reason)
    }

    /// What is believed, as it was said, and when; `None` before anything was said.
    pub(super) fn trusted(&self) -> Option<(&Snapshot, Option<Instant>)> {
        self.trusted.as_ref().map(|snapshot| (snapshot, self.heard))
    }

    fn trust(&mut self, said: Snapshot, now: Instant) {
        *self = Belief { doubt: None, heard: Some(now), trusted: Some(said) };
    }

    fn doubtful(&self, said: &Snapshot, rules: &Protection) -> Option<Reason> {
        let old = self.trusted.as_ref().map_or(&[][..], |snapshot| &snapshot.providers);
        let stays = |provider: &&Provider| {
            said.providers.iter().any(|one| one.endpoint.addr == provider.endpoint.addr)
        };
        let gone = old.len() - old.iter().filter(stays).count();
        let is_drop = old.len() >= DROP_OF_MIN && gone * 100 > old.len() * rules.drop_percent;
        match (old.len(), said.providers.len()) {
            (0, _) => None,
            (_, 0) => Some(Reason::Empty),
            _ => is_drop.then_some(Reason::Drop),
        }
    }
}

/// Of a shorter list every change is large.
const DROP_OF_MIN: usize = 4;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const RULES: Protection = Protection {
        drop_for: Duration::from_secs(10),
        drop_percent: 70,
        empty_for: Duration::from_secs(30),
    };

    fn said(ports: std::ops::Range<u16>) -> Snapshot {
        let provider = |port| Provider::parse(&format!("10.0.0.1:{port}")).unwrap();
        Snapshot { providers: ports.map(provider).collect(), revision: 0, service: "a".to_owned() }
    }

    fn believing(ports: std::ops::Range<u16>, now: Instant) -> Belief {
        let mut belief = Belief::default();
        belief.hear(said(ports), Some(&RULES), now);
        belief
    }

    fn ports(belief: &Belief) -> Vec<u16> {
        belief.providers().iter().map(|provider| provider.endpoint.addr.port()).collect()
    }

    fn after(now: Instant, seconds: u64) -> Instant {
        now + Duration::from_secs(seconds)
    }

    #[test]
    fn empty_list_is_doubted_until_somebody_has_looked() {
        let now = Instant::now();
        let mut belief = believing(1..3, now);
        assert_eq!(belief.hear(said(1..1), Some(&RULES), now), Heard::Doubted(Reason::Empty));
        assert_eq!(belief.hear(said(1..1), Some(&RULES), after(now, 5)), Heard::Same);
        assert_eq!((ports(&belief), belief.reason()), (vec![1, 2], Some(Reason::Empty)));
        assert!(!belief.ripen(&RULES, after(now, 100)), "time alone is no proof");
        assert_eq!(belief.suspects(&RULES, after(now, 29)), None);
        let (since, suspects) = belief.suspects(&RULES, after(now, 30)).unwrap();
        assert_eq!((since, suspects.len()), (now, 2));
        assert!(belief.settle(since, after(now, 31)));
        assert_eq!((ports(&belief), belief.reason()), (vec![], None));
        assert_eq!(belief.hear(said(5..6), Some(&RULES), after(now, 32)), Heard::Changed);
    }

    #[test]
    fn list_that_comes_back_ends_the_doubt() {
        let now = Instant::now();
        let mut belief = believing(1..3, now);
        belief.hear(said(1..1), Some(&RULES), now);
        assert_eq!(belief.hear(said(1..3), Some(&RULES), now), Heard::Same);
        assert_eq!(belief.reason(), None);
    }

    /// Whoever looks takes a while: what he found is no word on a list that came back and went again
    /// meanwhile.
    #[test]
    fn look_settles_the_doubt_that_it_was_for_and_no_later_one() {
        let now = Instant::now();
        let mut belief = believing(1..3, now);
        belief.hear(said(1..1), Some(&RULES), now);
        let (since, _) = belief.suspects(&RULES, after(now, 30)).unwrap();
        belief.hear(said(1..3), Some(&RULES), after(now, 31));
        belief.hear(said(1..1), Some(&RULES), after(now, 32));
        assert!(!belief.settle(since, after(now, 33)));
        assert_eq!((ports(&belief), belief.reason()), (vec![1, 2], Some(Reason::Empty)));
    }

    #[test]
    fn large_drop_is_believed_once_it_has_lasted_and_newcomers_at_once() {
        let now = Instant::now();
        let mut belief = believing(0..10, now);
        assert_eq!(belief.hear(said(7..12), Some(&RULES), now), Heard::Changed, "70 % is not more");
        let mut belief = believing(0..10, now);
        assert_eq!(belief.hear(said(8..12), Some(&RULES), now), Heard::Doubted(Reason::Drop));
        assert_eq!(ports(&belief).len(), 12, "old and new");
        assert_eq!(belief.hear(said(8..9), Some(&RULES), after(now, 6)), Heard::Changed);
        assert!(!belief.ripen(&RULES, after(now, 9)));
        assert!(belief.ripen(&RULES, after(now, 10)), "counted from the first");
        assert_eq!(ports(&belief), [8]);
    }

    #[test]
    fn short_lists_and_unprotected_services_are_believed() {
        let now = Instant::now();
        let mut belief = believing(1..4, now);
        assert_eq!(belief.hear(said(9..10), Some(&RULES), now), Heard::Changed, "it has moved");
        assert_eq!(belief.hear(said(1..1), None, now), Heard::Changed);
        assert_eq!(ports(&belief), [0_u16; 0]);
    }

    #[test]
    fn what_was_kept_is_doubted_like_anything_else() {
        let now = Instant::now();
        let mut belief = Belief::kept(said(1..3));
        assert_eq!(belief.trusted().unwrap().1, None, "not heard in this life");
        assert_eq!(belief.hear(said(1..1), Some(&RULES), now), Heard::Doubted(Reason::Empty));
        assert_eq!(ports(&belief), [1, 2]);
        assert_eq!(belief.hear(said(1..3), Some(&RULES), now), Heard::Same);
        assert_eq!(belief.trusted().unwrap().1, Some(now));
    }
}
