// SPDX-License-Identifier: Apache-2.0
//! Applications that speak to their registry through the façade: what each session has entered there
//! and is about to call.
//!
//! Invariants: what a session enters stands at weir's inbound address or nowhere; a session is known
//! until its registry has forgotten it, whether it is connected or not; all that is entered is at one
//! port, where calls from outside lead.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::super::facade::{Claim, Heard, moved, untold};
use super::super::kept;
use super::{Change, Desk, Health, Refusal, SERVICES_MAX};

/// Every session there is.
#[derive(Debug, Default)]
pub(super) struct Faced {
    /// Connections that there ever were.
    connections: u64,
    counts: Passed,
    sessions: BTreeMap<i64, Session>,
}

/// An application's session at the registry.
#[derive(Debug)]
struct Session {
    /// Which one it has; `None` if it has lost it and may come back.
    connection: Option<u64>,
    /// Weir ends and takes away what it has entered: its application must begin anew.
    is_spent: bool,
    /// By path, as the application calls it.
    leaves: BTreeMap<String, Leaf>,
    /// By path, as the registry calls it: as the application does.
    originals: BTreeMap<String, String>,
    /// Last known to be connected, or trying to be.
    seen: Instant,
    /// It may call them.
    services: BTreeSet<String>,
    /// So long the registry knows it without a connection.
    timeout: Duration,
}

/// A provider that an application has entered.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Leaf {
    /// By which of all claims, counted from 1.
    claim: u64,
    /// Where the application says that it is.
    place: String,
    port: u16,
    /// As the registry calls it.
    real: String,
}

/// The façade, for metrics.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FacadeRow {
    /// What has been counted.
    pub counts: Passed,
    /// Sessions that are connected.
    pub sessions: usize,
}

/// Since the start.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Passed {
    /// Providers that applications were told as they are.
    pub direct: u64,
    /// Sessions that nobody knew, and that were ended.
    pub expired: u64,
    /// Providers that applications have entered.
    pub inbound: u64,
    /// Providers that applications were told at weir's own address.
    pub outbound: u64,
    /// Providers that could not be entered.
    pub refused: u64,
}

impl Desk {
    /// Whether this session has ever been here.
    #[must_use]
    pub fn knows_session(&self, id: i64) -> bool {
        self.faced.sessions.contains_key(&id)
    }

    /// Somebody tries to connect with this session: it is not forgotten meanwhile.
    pub fn touch_session(&mut self, id: i64) {
        if let Some(session) = self.faced.sessions.get_mut(&id) {
            session.seen = Instant::now();
        }
    }

    /// It is connected, from now on by the connection of this number and no other.
    pub fn open_session(&mut self, id: i64, timeout: Duration) -> u64 {
        self.faced.connections += 1;
        let connection = self.faced.connections;
        let is_new = !self.faced.sessions.contains_key(&id);
        let session = self.faced.sessions.entry(id).or_insert_with(|| Session::new(timeout));
        session.connection = Some(connection);
        self.to_keep |= is_new || session.timeout != timeout;
        session.timeout = timeout;
        connection
    }

    /// This connection is the session's.
    #[must_use]
    pub fn is_session_at(&self, id: i64, connection: u64) -> bool {
        let session = self.faced.sessions.get(&id);
        session.is_some_and(|session| session.connection == Some(connection))
    }

    /// The session has lost that connection; it may come back within its timeout.
    pub fn leave_session(&mut self, id: i64, connection: u64) {
        let session = self.faced.sessions.get_mut(&id);
        if let Some(session) = session.filter(|session| session.connection == Some(connection)) {
            session.connection = None;
            session.seen = Instant::now();
        }
    }

    /// The registry has forgotten it.
    pub fn end_session(&mut self, id: i64) {
        if let Some(session) = self.faced.sessions.remove(&id) {
            self.to_keep = true;
            session.services.iter().for_each(|service| self.release(service));
        }
    }

    /// A session that nobody knew was ended, for its application to begin anew.
    pub fn count_expired(&mut self) {
        self.faced.counts.expired += 1;
    }

    /// The application of a session enters a provider. The registry gets to know it at the inbound
    /// address, by the name that this answers.
    ///
    /// # Errors
    ///
    /// It cannot be entered from here.
    pub fn claim(&mut self, id: i64, claim: &Claim) -> Result<String, Refusal> {
        let result = self.admit(id, claim);
        match &result {
            Ok(_) => self.faced.counts.inbound += 1,
            Err(_) => self.faced.counts.refused += 1,
        }
        result
    }

    /// How many claims were ever granted.
    #[must_use]
    pub fn claims_ever(&self) -> u64 {
        self.faced.counts.inbound
    }

    fn admit(&mut self, id: i64, claim: &Claim) -> Result<String, Refusal> {
        let addr = self.inbound_address().ok_or(Refusal::NoAddress)?;
        if self.is_leaving {
            return Err(Refusal::Leaving);
        }
        if self.own_ports.contains(&claim.port) {
            return Err(Refusal::OwnPort(claim.port));
        }
        // Who has lost his connection counts until the registry has forgotten him: it sends callers here.
        let known = self.application().map(|app| app.port());
        if let Some(port) = known.filter(|known| *known != claim.port) {
            return Err(Refusal::AnotherPort { port });
        }
        if self.faced.sessions.values().map(|one| one.leaves.len()).sum::<usize>() >= SERVICES_MAX {
            return Err(Refusal::TooMany);
        }
        let Claim { path, place, port } = claim.clone();
        let real = moved(&path, addr).ok_or_else(|| Refusal::Name(path.clone()))?;
        if known.is_none() {
            self.lead_to(port);
        }
        let claim = self.claims_ever() + 1;
        let Some(session) = self.faced.sessions.get_mut(&id) else { return Err(Refusal::TooMany) };
        session.originals.insert(real.clone(), path.clone());
        session.leaves.insert(path, Leaf { claim, place, port, real: real.clone() });
        self.to_keep = true;
        Ok(real)
    }

    /// Where the registry sends callers of this host's providers.
    fn inbound_address(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.config.advertise?, self.config.inbound.port()))
    }

    /// Calls from outside go to this port from now on, of which nothing is known yet.
    pub(super) fn lead_to(&mut self, port: u16) {
        let app = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        self.health = Health::default();
        self.change(Change::Application(app));
    }

    /// What the registry calls the node that the application of a session calls so; `None` if it is
    /// the same.
    #[must_use]
    pub fn real(&self, id: i64, path: &str) -> Option<String> {
        let own = self.faced.sessions.get(&id).and_then(|session| session.leaves.get(path));
        if let Some(leaf) = own {
            return Some(leaf.real.clone());
        }
        untold(path).or_else(|| {
            // Left behind by an earlier session of the application.
            let (place, _) = super::super::facade::place(path)?;
            let sessions = self.faced.sessions.values();
            let mut leaves = sessions.flat_map(|session| session.leaves.values());
            let is_ours = leaves.any(|leaf| leaf.place == place);
            moved(path, self.inbound_address().filter(|_| is_ours)?)
        })
    }

    /// The other way round, for what the session itself has entered.
    #[must_use]
    pub fn original(&self, id: i64, path: &str) -> Option<String> {
        self.faced.sessions.get(&id)?.originals.get(path).cloned()
    }

    /// The registry has said something to the application: it has removed what it had entered, or is
    /// about to call others. Says which of them it has not been told before.
    pub fn note_heard(&mut self, id: i64, heard: &Heard) {
        self.faced.counts.outbound += heard.told;
        self.faced.counts.direct += heard.left;
        let Some(session) = self.faced.sessions.get_mut(&id) else { return };
        for path in &heard.removed.paths {
            let is_gone = |leaf: &mut Leaf| leaf.claim <= heard.removed.claims;
            if session.leaves.get_mut(path).is_some_and(is_gone)
                && let Some(leaf) = session.leaves.remove(path)
            {
                session.originals.remove(&leaf.real);
                self.to_keep = true;
            }
        }
        let mut new = heard.services.clone();
        new.retain(|service| {
            session.services.len() < SERVICES_MAX && session.services.insert(service.clone())
        });
        for service in new {
            self.to_keep = true;
            if self.check(&service, self.book.len(), self.book.has(&service)).is_ok() {
                self.enter(&service);
            }
        }
    }

    /// There is somebody to call for each of these.
    #[must_use]
    pub fn has_providers(&self, services: &BTreeSet<String>) -> bool {
        services.iter().all(|service| !self.providers(service).is_empty())
    }

    /// What the connected application of a session has entered, as the registry calls it.
    #[must_use]
    pub fn entered_by(&self, id: i64) -> Vec<String> {
        let session = self.faced.sessions.get(&id);
        session.into_iter().flat_map(|session| session.originals.keys().cloned()).collect()
    }

    /// Weir has taken it away, before its own end.
    pub fn forget_entered(&mut self, id: i64, real: &str) {
        let Some(session) = self.faced.sessions.get_mut(&id) else { return };
        if let Some(path) = session.originals.remove(real) {
            session.leaves.remove(&path);
        }
    }

    /// Some connected application has something in the registry.
    #[must_use]
    pub fn is_anything_entered(&self) -> bool {
        let mut sessions = self.faced.sessions.values();
        sessions.any(|session| session.connection.is_some() && !session.leaves.is_empty())
    }

    /// For metrics; `None` if the config has no façade.
    #[must_use]
    pub fn facade_row(&self) -> Option<FacadeRow> {
        self.config.facade.as_ref().map(|_| self.faced.row())
    }

    /// Some application has been told that it may call `service`.
    pub(super) fn is_faced(&self, service: &str) -> bool {
        self.faced.sessions.values().any(|session| session.services.contains(service))
    }

    /// Forgets who has not come back in time, as the registry does.
    pub(super) fn sweep_sessions(&mut self, now: Instant) {
        let is_over = |session: &Session| {
            session.connection.is_none()
                && now.saturating_duration_since(session.seen) > session.timeout + LATE
        };
        let sessions = self.faced.sessions.iter();
        let over: Vec<i64> =
            sessions.filter(|(_, session)| is_over(session)).map(|(id, _)| *id).collect();
        over.into_iter().for_each(|id| self.end_session(id));
    }

    /// This weir ends, and takes away what was entered: applications must hear that, so their sessions
    /// are not kept.
    pub(super) fn spend_sessions(&mut self) {
        let sessions = self.faced.sessions.values_mut();
        sessions.for_each(|session| session.is_spent = !session.leaves.is_empty());
    }

    /// What has to outlive this weir.
    pub(super) fn kept_sessions(&self) -> Vec<kept::Session> {
        let sessions = self.faced.sessions.iter().filter(|(_, session)| !session.is_spent);
        sessions.map(|(id, session)| session.kept(*id)).collect()
    }

    /// From an earlier life. What would stand at another address now, or at a port where calls do not
    /// lead, is not taken up: such a session is ended when it comes back.
    pub(super) fn replay_sessions(&mut self, sessions: Vec<kept::Session>) {
        for kept in sessions {
            if !kept.leaves.iter().all(|leaf| self.is_as_before(leaf)) {
                tracing::warn!(
                    "what an application has entered before is not where it would be now"
                );
                continue;
            }
            let mut session = Session::new(Duration::from_millis(kept.timeout_ms));
            for kept::Leaf { path, place, port, real } in kept.leaves {
                session.originals.insert(real.clone(), path.clone());
                session.leaves.insert(path, Leaf { claim: 0, place, port, real });
            }
            session.services = kept.services.into_iter().take(SERVICES_MAX).collect();
            for service in &session.services {
                if self.check(service, self.book.len(), self.book.has(service)).is_ok() {
                    self.enter(service);
                }
            }
            self.faced.sessions.insert(kept.id, session);
        }
        if let Some(port) = self.faced_port().filter(|_| self.publications.is_empty()) {
            self.lead_to(port);
        }
    }

    fn is_as_before(&self, leaf: &kept::Leaf) -> bool {
        let real = self.inbound_address().and_then(|addr| moved(&leaf.path, addr));
        let is_led_to = self.application().is_none_or(|app| app.port() == leaf.port);
        real.as_ref() == Some(&leaf.real) && is_led_to && !self.own_ports.contains(&leaf.port)
    }

    /// Where the application listens that has entered itself by the façade.
    pub(super) fn faced_port(&self) -> Option<u16> {
        let mut leaves = self.faced.sessions.values().flat_map(|session| session.leaves.values());
        leaves.next().map(|leaf| leaf.port)
    }
}

impl Faced {
    fn row(&self) -> FacadeRow {
        let sessions = self.sessions.values();
        let sessions = sessions.filter(|session| session.connection.is_some()).count();
        FacadeRow { counts: self.counts, sessions }
    }
}

impl Session {
    fn new(timeout: Duration) -> Session {
        Session {
            connection: None,
            is_spent: false,
            leaves: BTreeMap::new(),
            originals: BTreeMap::new(),
            seen: Instant::now(),
            services: BTreeSet::new(),
            timeout,
        }
    }

    fn kept(&self, id: i64) -> kept::Session {
        let leaf = |(path, leaf): (&String, &Leaf)| {
            let Leaf { claim: _, place, port, real } = leaf.clone();
            kept::Leaf { path: path.clone(), place, port, real }
        };
        kept::Session {
            id,
            leaves: self.leaves.iter().map(leaf).collect(),
            services: self.services.iter().cloned().collect(),
            timeout_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// Servers look for expired sessions once in a tick, of 2 s usually.
const LATE: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::takeover::facade::Removed;

    const DIRECTORY: &str = "/sofa-rpc/com.a.Demo/providers";
    const TIMEOUT: Duration = Duration::from_secs(4);

    fn desk(more: &str) -> Desk {
        let text = format!(
            "takeover:\n  advertise: 10.0.0.7\n  inbound: \"0.0.0.0:20881\"\n  registries:\n  - {{ \
             kind: static, services: [{{ name: \"com.a.Demo:1.0\", endpoints: [\"10.0.0.8:20881\"] \
             }}] }}\n{more}"
        );
        let config = Config::parse("weir.yaml", None, &text);
        let takeover = config.unwrap_or_else(|wrong| panic!("{wrong}")).takeover.unwrap();
        Desk::new(takeover, vec![20_881, 12_220], None)
    }

    fn path(port: u16) -> String {
        format!("{DIRECTORY}/bolt%3A%2F%2F10.0.0.7%3A{port}%3Fversion%3D1.0")
    }

    fn claim(port: u16) -> Claim {
        Claim { path: path(port), place: format!("10.0.0.7:{port}"), port }
    }

    /// The answer to a delete that was asked for after so many claims.
    fn removed(claims: u64) -> Heard {
        let removed = Removed { claims, paths: vec![path(20_880)] };
        Heard { removed, ..Heard::default() }
    }

    fn applications(desk: &mut Desk) -> Vec<u16> {
        let changes = desk.changes().into_iter();
        let port = |change| match change {
            Change::Application(addr) => Some(addr.port()),
            _ => None,
        };
        changes.filter_map(port).collect()
    }

    #[test]
    fn entered_provider_stands_at_inbound_and_calls_lead_to_the_application() {
        let mut desk = desk("");
        let connection = desk.open_session(1, TIMEOUT);
        assert_eq!(desk.claim(1, &claim(20_880)), Ok(path(20_881)));
        assert_eq!(applications(&mut desk), [20_880]);
        assert_eq!(desk.real(1, &path(20_880)), Some(path(20_881)));
        assert_eq!(desk.original(1, &path(20_881)), Some(path(20_880)));
        assert_eq!(desk.entered_by(1), [path(20_881)]);
        // Another session of the application: it sees the leaf as any consumer does, and finds it by
        // its own name.
        desk.open_session(2, TIMEOUT);
        assert_eq!(desk.original(2, &path(20_881)), None);
        assert_eq!(desk.real(2, &path(20_880)), Some(path(20_881)));
        assert_eq!(desk.real(2, &path(20_999)), None);
        desk.note_heard(1, &removed(0));
        assert!(desk.original(1, &path(20_881)).is_some(), "it was claimed again meanwhile");
        desk.note_heard(1, &removed(1));
        assert_eq!((desk.original(1, &path(20_881)), desk.application()), (None, None));
        desk.leave_session(1, connection);
        assert_eq!(desk.faced.row().sessions, 1);
    }

    #[test]
    fn second_port_is_refused_as_long_as_the_registry_may_hold_the_first() {
        let mut desk = desk("");
        let connection = desk.open_session(1, TIMEOUT);
        desk.open_session(2, TIMEOUT);
        desk.claim(1, &claim(20_880)).unwrap();
        let refused = Refusal::AnotherPort { port: 20_880 };
        assert_eq!(desk.claim(2, &claim(20_999)), Err(refused.clone()));
        assert_eq!(desk.publish("b:1", Some(20_999), ""), Err(refused));
        assert_eq!(desk.claim(2, &claim(12_220)), Err(Refusal::OwnPort(12_220)));
        assert_eq!(desk.real(2, &path(20_999)), None, "it must not be made");
        assert_eq!(desk.publish("b:1", Some(20_880), ""), Ok(()), "by either way");
        desk.unpublish("b:1");
        desk.leave_session(1, connection);
        let refused = Refusal::AnotherPort { port: 20_880 };
        assert_eq!(desk.claim(2, &claim(20_999)), Err(refused), "callers are still sent here");
        desk.sweep_sessions(Instant::now() + TIMEOUT + LATE + LATE);
        assert_eq!(desk.claim(2, &claim(20_999)), Ok(path(20_881)));
        assert_eq!(applications(&mut desk), [20_880, 20_999]);
        let counts = Passed { inbound: 2, refused: 3, ..Passed::default() };
        assert_eq!(desk.faced.row(), FacadeRow { counts, sessions: 1 });
        desk.withdraw();
        assert_eq!(desk.claim(2, &claim(20_999)), Err(Refusal::Leaving));
    }

    #[test]
    fn services_are_subscribed_to_as_long_as_a_session_may_call_them() {
        let mut desk = desk("");
        let service = "com.a.Demo:1.0";
        let heard = Heard { services: [service.to_owned()].into(), told: 1, ..Heard::default() };
        let (first, _) = (desk.open_session(1, TIMEOUT), desk.open_session(2, TIMEOUT));
        desk.note_heard(1, &heard);
        desk.note_heard(2, &heard);
        let is_known = |desk: &Desk| desk.known().contains_key(service);
        desk.end_session(2);
        assert!(is_known(&desk), "the other session may call it");
        desk.leave_session(1, first + 1);
        assert!(desk.is_session_at(1, first), "that was not its connection");
        desk.leave_session(1, first);
        desk.sweep_sessions(Instant::now() + TIMEOUT);
        assert!(is_known(&desk), "it may come back");
        desk.subscribe(service).unwrap();
        desk.sweep_sessions(Instant::now() + TIMEOUT + LATE + LATE);
        assert!(!desk.knows_session(1) && is_known(&desk), "asked for by the application API");
        desk.unsubscribe(service);
        assert!(!is_known(&desk));
        assert_eq!(desk.faced.row().counts.outbound, 2);
    }

    #[test]
    fn sessions_outlive_a_weir_that_was_killed_and_not_one_that_has_withdrawn() {
        let place = tempfile::TempDir::new().unwrap();
        let state = format!("  state: \"{}\"\n", place.path().display());
        let mut first = desk(&state);
        let write = |desk: &mut Desk| desk.pages().iter().for_each(|page| page.write().unwrap());
        first.open_session(7, TIMEOUT);
        first.claim(7, &claim(20_880)).unwrap();
        first.note_heard(7, &Heard { services: ["a:1".to_owned()].into(), ..Heard::default() });
        write(&mut first);
        let mut second = desk(&state);
        assert!(second.knows_session(7) && second.known().contains_key("a:1"));
        assert_eq!(applications(&mut second), [20_880], "calls find it before it is back");
        assert_eq!(second.original(7, &path(20_881)), Some(path(20_880)));
        assert!(!second.known().is_empty() && second.faced_port() == Some(20_880));
        second.open_session(8, TIMEOUT);
        second.withdraw();
        second.forget_entered(7, &path(20_881));
        write(&mut second);
        let third = desk(&state);
        assert!(!third.knows_session(7), "its leaf is gone, so it must begin anew");
        assert!(third.knows_session(8), "it has lost nothing");
    }

    /// Of two ports, as of two addresses, one was there before: who is elsewhere has to begin anew.
    #[test]
    fn session_that_would_be_elsewhere_is_not_taken_up() {
        let leaf = |path: String, port, real| {
            let place = format!("10.0.0.7:{port}");
            kept::Leaf { path, place, port, real }
        };
        let session = |id, port, real| {
            let leaves = vec![leaf(path(port), port, real)];
            kept::Session { id, leaves, services: Vec::new(), timeout_ms: 4000 }
        };
        let mut desk = desk("");
        desk.replay_sessions(vec![
            session(1, 20_880, path(20_882)),
            session(2, 12_220, path(20_881)),
            session(3, 20_880, path(20_881)),
            session(4, 20_999, path(20_881)),
        ]);
        let known: Vec<bool> = (1..=4).map(|id| desk.knows_session(id)).collect();
        assert_eq!(known, [false, false, true, false]);
        assert_eq!(applications(&mut desk), [20_880]);
    }
}
