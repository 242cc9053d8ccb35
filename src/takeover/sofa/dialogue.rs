// SPDX-License-Identifier: Apache-2.0
//! One session with a session server: what is asked, what is answered, and what is still owed.
//!
//! Pure: takes what is wanted, frames and the time, and writes frames into a buffer. Invariants: for
//! one registration at most one request is on its way; a publication counts as held only once the
//! server has said so in this session; every push is acknowledged.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use prost::Message;

use super::frame::{self, Frame};
use super::message::{
    Acknowledgement, BaseRegister, DataBox, PublisherRegister, ReceivedData, RegisterResponse,
    SubscriberRegister,
};
use super::pushed::Pushed;
use crate::config::Sofa;
use crate::takeover::link::Life;
use crate::takeover::{Provider, Snapshot};
use crate::wire::bolt::Kind;

/// Of one connection.
pub(super) struct Dialogue<'a> {
    /// By request: which registration it is about, and since when.
    asked: BTreeMap<u32, (Role, String, Instant)>,
    began: Instant,
    heard: Instant,
    heartbeat: Instant,
    is_settled: bool,
    next_id: u32,
    publishers: BTreeMap<String, Entry<Provider>>,
    pushed: &'a mut Pushed,
    /// Refusals are told one at a time.
    quiet_until: Instant,
    settings: &'a Sofa,
    subscribers: BTreeMap<String, Entry<Life>>,
    /// Requests in a row that were not answered.
    unanswered: u32,
    whoami: &'a mut Whoami,
}

/// By what the registry knows this weir again, in every session.
#[derive(Debug)]
pub(super) struct Whoami {
    /// Of its subscriptions; no other process has it.
    pub(super) client: String,
    /// Of the newest registration: a later one always has a higher version.
    pub(super) version: i64,
}

/// Something that the desk must learn.
#[derive(Debug, PartialEq)]
pub(super) enum Said {
    /// The registry holds this of a service, or nothing any more.
    Held(String, Option<Provider>),
    /// It does not want to, for this reason; it is asked again.
    Refused(String, String),
    /// Where a service lives.
    Snapshot(Snapshot),
}

/// Why the session is over.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(in crate::takeover) enum Trouble {
    #[error("{0} registrations in a row were not answered within {REQUEST_WITHIN:?}")]
    Deaf(u32),
    #[error("it says something that cannot be read: {0}")]
    Garbled(&'static str),
    #[error("it has not said anything for {0:?}")]
    Silent(Duration),
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Role {
    Publisher,
    Subscriber,
}

/// One registration.
#[derive(Debug)]
struct Entry<T> {
    /// The request on its way, and what the server knows once it is done.
    asked: Option<(u32, Option<T>)>,
    known: Known<T>,
    /// After a refusal, when to ask again.
    not_before: Option<Instant>,
    /// Who registers; the same until the end, whatever is registered.
    owner: String,
    wanted: Option<T>,
}

/// What the server is known to know.
#[derive(Debug, PartialEq)]
enum Known<T> {
    Nothing,
    This(T),
    /// It was asked, and has not said whether it did so.
    Unsure,
}

impl<'a> Dialogue<'a> {
    /// With a server that knows nothing of us.
    pub(super) fn new(
        settings: &'a Sofa,
        whoami: &'a mut Whoami,
        pushed: &'a mut Pushed,
        now: Instant,
    ) -> Dialogue<'a> {
        pushed.begin_session();
        Dialogue {
            asked: BTreeMap::new(),
            began: now,
            heard: now,
            heartbeat: now,
            is_settled: false,
            next_id: 1,
            publishers: BTreeMap::new(),
            pushed,
            quiet_until: now,
            settings,
            subscribers: BTreeMap::new(),
            unanswered: 0,
            whoami,
        }
    }

    /// What shall be so from now on.
    pub(super) fn want(
        &mut self,
        published: BTreeMap<String, Provider>,
        subscribed: BTreeMap<String, Life>,
    ) {
        // Who takes the place of this process at the same address takes its registrations over.
        let place = |provider: &Provider| provider.endpoint.addr.to_string();
        want(&mut self.publishers, published, place);
        for (service, entry) in &self.subscribers {
            // Who subscribes again is told everything again.
            if entry.wanted.as_ref() != subscribed.get(service) {
                self.pushed.forget(service);
            }
        }
        want(&mut self.subscribers, subscribed, |_| self.whoami.client.clone());
    }

    /// Asks for what is wanted and not so, as far as not too much is on its way already. Publications
    /// first: until they are back, nobody finds this host.
    pub(super) fn ask(&mut self, now: Instant, out: &mut Vec<u8>) {
        if self.asked.len() > IN_FLIGHT_MAX / 2 {
            return;
        }
        let room = IN_FLIGHT_MAX - self.asked.len();
        for service in due(&self.publishers, now, room) {
            self.ask_publisher(service, now, out);
        }
        let room = IN_FLIGHT_MAX.saturating_sub(self.asked.len());
        for service in due(&self.subscribers, now, room) {
            self.ask_subscriber(service, now, out);
        }
    }

    /// A frame has come.
    pub(super) fn hear(
        &mut self,
        frame: &Frame<'_>,
        now: Instant,
        out: &mut Vec<u8>,
    ) -> Result<Option<Said>, Trouble> {
        self.heard = now;
        match frame.kind {
            Kind::Heartbeat => frame::heartbeat_answer(out, frame.id),
            Kind::Response => return self.answered(frame, now),
            Kind::Request | Kind::OneWay if frame.class == b"ReceivedDataPb" => {
                let push = ReceivedData::decode(frame.content);
                let push = push.map_err(|_| Trouble::Garbled("a push"))?;
                return Ok(self.pushed(frame.id, &push, out));
            }
            // What this weir does not know is none of its business, and the server goes on.
            Kind::Goaway | Kind::HeartbeatAnswer | Kind::OneWay | Kind::Request => {}
        }
        Ok(None)
    }

    /// Time goes by.
    pub(super) fn tick(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<Vec<Said>, Trouble> {
        let bound = self.settings.heartbeat * SILENT_HEARTBEATS;
        if now >= self.heard + bound {
            return Err(Trouble::Silent(bound));
        }
        if now >= self.heartbeat + self.settings.heartbeat {
            self.heartbeat = now;
            let id = self.id();
            frame::heartbeat(out, id);
        }
        let late = |(_, _, since): &(Role, String, Instant)| now >= *since + REQUEST_WITHIN;
        let late: Vec<u32> =
            self.asked.iter().filter(|(_, one)| late(one)).map(|(id, _)| *id).collect();
        if !late.is_empty() {
            self.unanswered += 1;
        }
        if self.unanswered >= UNANSWERED_MAX {
            return Err(Trouble::Deaf(self.unanswered));
        }
        for id in late {
            self.done(id, false, now);
        }
        if self.is_settled || now < self.began + SETTLED_AFTER {
            return Ok(Vec::new());
        }
        self.is_settled = true;
        Ok(self.pushed.settle().into_iter().map(Said::Snapshot).collect())
    }

    fn ask_publisher(&mut self, service: String, now: Instant, out: &mut Vec<u8>) {
        let id = self.id();
        let Some(entry) = self.publishers.get_mut(&service) else { return };
        entry.asked = Some((id, entry.wanted.clone()));
        let data = entry.wanted.iter().map(|provider| DataBox { data: provider.text() }).collect();
        let mut base = self.whoami.base(&service, entry, self.settings);
        if let Some(name) = entry.wanted.as_ref().and_then(app_name) {
            name.clone_into(&mut base.app_name);
        }
        frame::request(out, id, PUBLISHER, &PublisherRegister { data, base: Some(base) });
        self.asked.insert(id, (Role::Publisher, service, now));
    }

    fn ask_subscriber(&mut self, service: String, now: Instant, out: &mut Vec<u8>) {
        let id = self.id();
        let Some(entry) = self.subscribers.get_mut(&service) else { return };
        entry.asked = Some((id, entry.wanted));
        let base = Some(self.whoami.base(&service, entry, self.settings));
        let scope = self.settings.scope.wire().to_owned();
        frame::request(out, id, SUBSCRIBER, &SubscriberRegister { base, scope });
        self.asked.insert(id, (Role::Subscriber, service, now));
    }

    fn answered(&mut self, frame: &Frame<'_>, now: Instant) -> Result<Option<Said>, Trouble> {
        self.unanswered = 0;
        let refusal = if frame.status != 0 {
            Some(format!("status {}", frame.status))
        } else {
            let answer = RegisterResponse::decode(frame.content);
            let answer = answer.map_err(|_| Trouble::Garbled("an answer"))?;
            let is_well = answer.success && !answer.refused;
            (!is_well).then_some(answer.message)
        };
        let Some((role, service)) = self.done(frame.id, refusal.is_none(), now) else {
            // It came too late, and has been asked again.
            return Ok(None);
        };
        Ok(match (role, refusal) {
            (_, Some(_)) if now < self.quiet_until => None,
            (_, Some(why)) => {
                self.quiet_until = now + QUIET_FOR;
                Some(Said::Refused(service, why))
            }
            (Role::Publisher, None) => {
                let entry = self.publishers.get(&service);
                let held = entry.and_then(|entry| entry.known.this()).cloned();
                Some(Said::Held(service, held))
            }
            (Role::Subscriber, None) => None,
        })
    }

    /// A request is over.
    fn done(&mut self, id: u32, is_well: bool, now: Instant) -> Option<(Role, String)> {
        let (role, service, _) = self.asked.remove(&id)?;
        match role {
            Role::Publisher => done(&mut self.publishers, &service, id, is_well, now),
            Role::Subscriber => done(&mut self.subscribers, &service, id, is_well, now),
        }
        Some((role, service))
    }

    fn pushed(&mut self, id: u32, push: &ReceivedData, out: &mut Vec<u8>) -> Option<Said> {
        let is_plain = push.encoding.is_empty();
        let message = if is_plain { "" } else { "an encoding that was not asked for" };
        let message = message.to_owned();
        frame::answer(out, id, ACKNOWLEDGEMENT, &Acknowledgement { success: is_plain, message });
        let service = service_of(&push.data_id);
        let is_wanted = self.subscribers.get(service).is_some_and(|entry| entry.wanted.is_some());
        if !is_plain || !is_wanted || push.group != self.settings.group {
            return None;
        }
        self.pushed.hear(service, push).map(Said::Snapshot)
    }

    fn id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1).max(1);
        id
    }
}

impl Whoami {
    fn base<T>(&mut self, service: &str, entry: &Entry<T>, settings: &Sofa) -> BaseRegister {
        self.version += 1;
        let data_id = data_id(service);
        let regist_id = format!("{}#{data_id}", entry.owner);
        let event_type = if entry.wanted.is_some() { "REGISTER" } else { "UNREGISTER" };
        BaseRegister {
            app_name: "weir".to_owned(),
            client_id: regist_id.clone(),
            data_id,
            event_type: event_type.to_owned(),
            group: settings.group.clone(),
            instance_id: INSTANCE.to_owned(),
            regist_id,
            timestamp: self.version,
            version: self.version,
            zone: settings.zone.clone(),
        }
    }
}

impl<T> Known<T> {
    fn this(&self) -> Option<&T> {
        match self {
            Known::This(what) => Some(what),
            Known::Nothing | Known::Unsure => None,
        }
    }
}

impl<T: PartialEq> Entry<T> {
    fn is_due(&self, now: Instant) -> bool {
        let is_so = match &self.wanted {
            Some(wanted) => self.known.this() == Some(wanted),
            None => self.known == Known::Nothing,
        };
        !is_so && self.asked.is_none() && self.not_before.is_none_or(|at| now >= at)
    }
}

fn want<T: PartialEq>(
    entries: &mut BTreeMap<String, Entry<T>>,
    mut wanted: BTreeMap<String, T>,
    owner: impl Fn(&T) -> String,
) {
    for (service, entry) in entries.iter_mut() {
        let now = wanted.remove(service);
        if entry.wanted != now {
            entry.wanted = now;
            entry.not_before = None;
        }
    }
    let is_over = |entry: &Entry<T>| {
        entry.wanted.is_none() && entry.asked.is_none() && entry.known == Known::Nothing
    };
    entries.retain(|_, entry| !is_over(entry));
    for (service, what) in wanted {
        let owner = owner(&what);
        let (asked, known, not_before) = (None, Known::Nothing, None);
        entries.insert(service, Entry { asked, known, not_before, owner, wanted: Some(what) });
    }
}

fn due<T: PartialEq>(
    entries: &BTreeMap<String, Entry<T>>,
    now: Instant,
    room: usize,
) -> Vec<String> {
    let due = entries.iter().filter(|(_, entry)| entry.is_due(now));
    due.map(|(service, _)| service.clone()).take(room).collect()
}

fn done<T>(
    entries: &mut BTreeMap<String, Entry<T>>,
    service: &str,
    id: u32,
    is_well: bool,
    now: Instant,
) {
    let Some(entry) = entries.get_mut(service) else { return };
    let Some((_, target)) = entry.asked.take_if(|(asked, _)| *asked == id) else { return };
    entry.known = match (is_well, target) {
        (true, Some(what)) => Known::This(what),
        (true, None) => Known::Nothing,
        (false, _) => Known::Unsure,
    };
    entry.not_before = (!is_well).then(|| now + ASK_AGAIN);
}

/// SOFARPC's name for what Bolt and TR serve.
fn data_id(service: &str) -> String {
    if service.contains('@') { service.to_owned() } else { format!("{service}{PROTOCOL}") }
}

fn service_of(data_id: &str) -> &str {
    data_id.strip_suffix(PROTOCOL).unwrap_or(data_id)
}

fn app_name(provider: &Provider) -> Option<&str> {
    let mut pairs = provider.parameters.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(key, _)| matches!(*key, "app_name" | "appName")).map(|(_, value)| value)
}

const ACKNOWLEDGEMENT: &str = "ResultPb";
const PUBLISHER: &str = "PublisherRegisterPb";
const SUBSCRIBER: &str = "SubscriberRegisterPb";
const INSTANCE: &str = "DEFAULT_INSTANCE_ID";
const PROTOCOL: &str = "@DEFAULT";
/// What is refused, or was not answered, is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Registrations on their way at a time: a server's queue is not flooded by one client.
const IN_FLIGHT_MAX: usize = 128;
/// Thousands of registrations may be refused for one reason.
const QUIET_FOR: Duration = Duration::from_secs(10);
/// As SOFARegistry's own client waits.
const REQUEST_WITHIN: Duration = Duration::from_secs(3);
/// Data centers that have not spoken by then have nothing to say.
const SETTLED_AFTER: Duration = Duration::from_secs(10);
/// A server that answers none of so many heartbeats is gone.
const SILENT_HEARTBEATS: u32 = 3;
/// Seconds with requests that were not answered, with no answer between.
const UNANSWERED_MAX: u32 = 3;
