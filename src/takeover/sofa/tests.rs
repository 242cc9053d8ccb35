// SPDX-License-Identifier: Apache-2.0
//! The dialogue against frames of the registry's own classes, and against a server made of words.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use prost::Message;

use super::dialogue::{Dialogue, Said, Trouble, Whoami};
use super::frame;
use super::message::{
    DataBox, DataBoxes, PublisherRegister, ReceivedData, RegisterResponse, SubscriberRegister,
};
use super::pushed::Pushed;
use crate::config::{Scope, Sofa};
use crate::takeover::Provider;
use crate::takeover::link;
use crate::wire::bolt::Kind;

const SERVICE: &str = "com.a.Demo:1.0";
/// What a provider's weir publishes.
const TEXT: &str = "10.0.0.7:12201?v=4.0&app_name=demo";

/// By name, from tests/vectors/SofaRegistry.java.
fn vector(name: &str) -> Vec<u8> {
    let lines = include_str!("../../../tests/vectors/sofaregistry.txt").lines();
    let mut pairs = lines.filter_map(|line| line.split_once(' '));
    let (_, hex) = pairs.find(|(found, _)| *found == name).unwrap();
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(byte).collect()
}

fn settings() -> Sofa {
    Sofa {
        group: "SOFA".to_owned(),
        heartbeat: Duration::from_secs(15),
        scope: Scope::Global,
        servers: vec!["10.0.0.1:9603".to_owned()],
        zone: String::new(),
    }
}

/// What outlives a session.
struct Life {
    begin: Instant,
    pushed: Pushed,
    settings: Sofa,
    whoami: Whoami,
}

impl Life {
    fn new() -> Life {
        let whoami = Whoami { client: "weir-1".to_owned(), version: 1000 };
        Life { begin: Instant::now(), pushed: Pushed::default(), settings: settings(), whoami }
    }

    fn session(&mut self) -> Session<'_> {
        let Life { begin, pushed, settings, whoami } = self;
        let dialogue = Dialogue::new(settings, whoami, pushed, *begin);
        Session { begin: *begin, dialogue, now: *begin }
    }
}

struct Session<'a> {
    begin: Instant,
    dialogue: Dialogue<'a>,
    now: Instant,
}

/// What a client has said.
#[derive(Debug, PartialEq)]
enum Heard {
    Acknowledged(u32),
    Heartbeat,
    HeartbeatAnswer(u32),
    /// Request, registration, version, what is published; nothing of `UNREGISTER`.
    Publisher(u32, String, i64, Option<String>),
    /// Request, registration, version, whether it is wanted.
    Subscriber(u32, String, i64, bool),
}

impl Session<'_> {
    fn want(&mut self, published: &[&str], subscribed: &[&str]) {
        let provider = |text: &&str| (SERVICE.to_owned(), Provider::parse(text).unwrap());
        let life = |service: &&str| ((*service).to_owned(), link::Life(1));
        let subscribed = subscribed.iter().map(life).collect();
        self.dialogue.want(published.iter().map(provider).collect(), subscribed);
    }

    fn ask(&mut self) -> Vec<Heard> {
        let mut out = Vec::new();
        self.dialogue.ask(self.now, &mut out);
        heard(&out)
    }

    fn hear(&mut self, bytes: &[u8]) -> (Option<Said>, Vec<Heard>) {
        let mut out = Vec::new();
        let (frame, len) = frame::read(bytes).unwrap().unwrap();
        assert_eq!(len, bytes.len());
        let said = self.dialogue.hear(&frame, self.now, &mut out).unwrap();
        (said, heard(&out))
    }

    fn answer(&mut self, id: u32, success: bool) -> Option<Said> {
        let message = if success { "" } else { "no" }.to_owned();
        let answer = RegisterResponse { success, message, ..RegisterResponse::default() };
        let mut bytes = Vec::new();
        frame::answer(&mut bytes, id, "RegisterResponsePb", &answer);
        self.hear(&bytes).0
    }

    fn push(&mut self, version: i64, ports: &[u16]) -> Option<Vec<u16>> {
        let one = |port: &u16| DataBox { data: format!("10.0.0.7:{port}") };
        let boxes = DataBoxes { data: ports.iter().map(one).collect() };
        let push = ReceivedData {
            data_id: format!("{SERVICE}@DEFAULT"),
            group: "SOFA".to_owned(),
            data: BTreeMap::from([(String::new(), boxes)]),
            version,
            ..ReceivedData::default()
        };
        let mut bytes = Vec::new();
        frame::request(&mut bytes, 9, "ReceivedDataPb", &push);
        let (said, answers) = self.hear(&bytes);
        assert_eq!(answers, [Heard::Acknowledged(9)], "whatever it says");
        match said {
            Some(Said::Snapshot(said)) => {
                Some(said.providers.iter().map(|one| one.endpoint.addr.port()).collect())
            }
            _ => None,
        }
    }

    fn at(&mut self, seconds: u64) -> Result<Vec<Heard>, Trouble> {
        self.now = self.begin + Duration::from_secs(seconds);
        let mut out = Vec::new();
        self.dialogue.tick(self.now, &mut out)?;
        self.dialogue.ask(self.now, &mut out);
        Ok(heard(&out))
    }
}

fn heard(mut bytes: &[u8]) -> Vec<Heard> {
    let mut all = Vec::new();
    while let Some((frame, len)) = frame::read(bytes).unwrap() {
        bytes = &bytes[len..];
        all.push(match (frame.kind, frame.class) {
            (Kind::Heartbeat, _) => Heard::Heartbeat,
            (Kind::HeartbeatAnswer, _) => Heard::HeartbeatAnswer(frame.id),
            (Kind::Response, b"ResultPb") => Heard::Acknowledged(frame.id),
            (Kind::Request, b"PublisherRegisterPb") => {
                let said = PublisherRegister::decode(frame.content).unwrap();
                let base = said.base.unwrap();
                let data = said.data.into_iter().next().map(|one| one.data);
                assert_eq!(base.event_type == "REGISTER", data.is_some());
                Heard::Publisher(frame.id, base.regist_id, base.version, data)
            }
            (Kind::Request, b"SubscriberRegisterPb") => {
                let base = SubscriberRegister::decode(frame.content).unwrap().base.unwrap();
                let is_wanted = base.event_type == "REGISTER";
                Heard::Subscriber(frame.id, base.regist_id, base.version, is_wanted)
            }
            other => panic!("{other:?}"),
        });
    }
    assert!(bytes.is_empty());
    all
}

fn publisher(id: u32, version: i64, data: Option<&str>) -> Heard {
    let registration = format!("10.0.0.7:12201#{SERVICE}@DEFAULT");
    Heard::Publisher(id, registration, version, data.map(str::to_owned))
}

fn subscriber(id: u32, version: i64, is_wanted: bool) -> Heard {
    Heard::Subscriber(id, format!("weir-1#{SERVICE}@DEFAULT"), version, is_wanted)
}

fn held(text: Option<&str>) -> Option<Said> {
    Some(Said::Held(SERVICE.to_owned(), text.map(|text| Provider::parse(text).unwrap())))
}

#[test]
fn what_weir_says_are_the_bytes_of_the_registrys_own_classes() {
    let mut life = Life::new();
    let mut session = life.session();
    session.want(&[TEXT], &[SERVICE]);
    let mut out = Vec::new();
    session.dialogue.ask(session.now, &mut out);
    assert_eq!(out, [vector("publisher"), vector("subscriber")].concat());
    out.clear();
    let push = vector("push");
    let (frame, _) = frame::read(&push).unwrap().unwrap();
    let said = session.dialogue.hear(&frame, session.now, &mut out).unwrap();
    assert_eq!(out, vector("acknowledgement"));
    let Some(Said::Snapshot(said)) = said else { panic!("{said:?}") };
    let texts: Vec<String> = said.providers.iter().map(Provider::text).collect();
    assert_eq!(texts, ["10.0.0.7:12201?v=4.0&weight=30", "10.0.0.8:12201?v=4.0"]);
    assert_eq!((said.providers[0].endpoint.weight, said.revision), (30, 8_169_687_452_450_816));
    assert_eq!(session.hear(&vector("answer")).0, held(Some(TEXT)));
    out.clear();
    frame::heartbeat(&mut out, 3);
    assert_eq!(out, vector("heartbeat"));
}

#[test]
fn frames_are_read_when_they_are_whole_and_nothing_else_is_read_as_one() {
    let push = vector("push");
    for end in 0..push.len() {
        assert_eq!(frame::read(&push[..end]), Ok(None), "cut at {end}");
    }
    assert!(frame::read(b"HTTP/1.1 400 Bad Request").is_err());
    let mut large = push;
    large[18] = 0x7f;
    assert!(frame::read(&large).is_err(), "2 GiB");
}

#[test]
fn publication_is_held_when_the_server_says_so_and_changed_without_a_gap() {
    let mut life = Life::new();
    let mut session = life.session();
    session.want(&[TEXT], &[]);
    assert_eq!(session.ask(), [publisher(1, 1001, Some(TEXT))]);
    assert_eq!(session.ask(), [], "one at a time");
    let other = "10.0.0.7:12201?weight=1";
    session.want(&[other], &[]);
    assert_eq!(session.ask(), [], "not before the first is answered");
    assert_eq!(session.answer(1, true), held(Some(TEXT)));
    assert_eq!(session.ask(), [publisher(2, 1002, Some(other))], "the same registration");
    assert_eq!(session.answer(2, true), held(Some(other)));
    session.want(&[], &[]);
    assert_eq!(session.ask(), [publisher(3, 1003, None)]);
    assert_eq!(session.answer(3, true), held(None));
    session.want(&[], &[]);
    assert_eq!(session.ask(), []);
}

#[test]
fn everything_is_registered_again_in_the_next_session_with_higher_versions() {
    let mut life = Life::new();
    let mut session = life.session();
    session.want(&[TEXT], &[SERVICE]);
    assert_eq!(session.ask(), [publisher(1, 1001, Some(TEXT)), subscriber(2, 1002, true)]);
    assert_eq!(session.push(7, &[1]), Some(vec![1]));
    assert_eq!(session.push(7, &[2]), None);
    let mut session = life.session();
    session.want(&[TEXT], &[SERVICE]);
    assert_eq!(session.ask(), [publisher(1, 1003, Some(TEXT)), subscriber(2, 1004, true)]);
    assert_eq!(session.push(3, &[4]), Some(vec![4]), "another server has its own versions");
}

#[test]
fn refused_is_asked_again_and_unsure_is_taken_back() {
    let mut life = Life::new();
    let mut session = life.session();
    session.want(&[TEXT], &[]);
    session.ask();
    let why = Some(Said::Refused(SERVICE.to_owned(), "no".to_owned()));
    assert_eq!(session.answer(1, false), why);
    assert_eq!(session.ask(), [], "not at once");
    assert_eq!(session.at(1), Ok(vec![publisher(2, 1002, Some(TEXT))]));
    assert_eq!(session.answer(2, false), None, "said already");
    session.want(&[], &[]);
    assert_eq!(session.ask(), [publisher(3, 1003, None)], "it may be there for all we know");
    assert_eq!(session.answer(3, true), held(None));
    assert_eq!(session.answer(3, true), None, "twice");
}

#[test]
fn subscription_that_is_over_says_so_and_hears_nothing_more() {
    let mut life = Life::new();
    let mut session = life.session();
    session.want(&[], &[SERVICE]);
    assert_eq!(session.ask(), [subscriber(1, 1001, true)]);
    assert_eq!(session.push(1, &[1]), Some(vec![1]), "before the answer");
    session.answer(1, true);
    session.want(&[], &[]);
    assert_eq!(session.ask(), [subscriber(2, 1002, false)]);
    assert_eq!(session.push(2, &[1, 2]), None);
}

#[test]
fn who_subscribes_again_hears_again() {
    let mut life = Life::new();
    let mut session = life.session();
    session.want(&[], &[SERVICE]);
    assert_eq!(session.ask(), [subscriber(1, 1001, true)]);
    session.answer(1, true);
    assert_eq!(session.push(1, &[1]), Some(vec![1]));
    let again = BTreeMap::from([(SERVICE.to_owned(), link::Life(2))]);
    session.dialogue.want(BTreeMap::new(), again);
    assert_eq!(session.ask(), [subscriber(2, 1002, true)]);
    assert_eq!(session.push(1, &[1]), Some(vec![1]));
}

#[test]
fn silent_and_deaf_servers_are_left() {
    let mut life = Life::new();
    let mut session = life.session();
    assert_eq!(session.at(14), Ok(vec![]));
    assert_eq!(session.at(15), Ok(vec![Heard::Heartbeat]));
    assert_eq!(session.at(16), Ok(vec![]));
    let mut answer = Vec::new();
    frame::heartbeat_answer(&mut answer, 1);
    session.hear(&answer);
    assert_eq!(session.at(60), Ok(vec![Heard::Heartbeat]));
    assert_eq!(session.at(61), Err(Trouble::Silent(Duration::from_secs(45))));
    let mut session = life.session();
    session.want(&[TEXT], &[]);
    session.ask();
    assert_eq!(session.at(3), Ok(vec![]));
    assert_eq!(session.at(4), Ok(vec![publisher(2, 1002, Some(TEXT))]));
    assert_eq!(session.at(8), Ok(vec![]));
    assert_eq!(session.at(9), Ok(vec![publisher(3, 1003, Some(TEXT))]));
    assert_eq!(session.at(12), Err(Trouble::Deaf(3)));
}

#[test]
fn heartbeat_of_the_server_is_answered() {
    let mut life = Life::new();
    let mut bytes = Vec::new();
    frame::heartbeat(&mut bytes, 5);
    assert_eq!(life.session().hear(&bytes), (None, vec![Heard::HeartbeatAnswer(5)]));
}

#[test]
fn thousands_of_registrations_go_out_in_small_lots() {
    let mut life = Life::new();
    let mut session = life.session();
    let names = (0..1000).map(|number| (format!("a{number}"), link::Life(number)));
    session.dialogue.want(BTreeMap::new(), names.collect());
    let mut asked = session.ask();
    let mut done = 0;
    while !asked.is_empty() {
        assert!(asked.len() <= 128);
        done += asked.len();
        for one in asked {
            let Heard::Subscriber(id, ..) = one else { panic!("{one:?}") };
            session.answer(id, true);
        }
        asked = session.ask();
    }
    assert_eq!(done, 1000);
}
