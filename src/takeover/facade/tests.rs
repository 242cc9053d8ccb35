// SPDX-License-Identifier: Apache-2.0
//! What passes between an application and its registry, frame by frame.

use super::*;
use crate::config::{Config, RegistryKind};

const DIRECTORY: &str = "/sofa-rpc/com.a.Demo/providers";
/// As the application writes itself, and as the registry holds it.
const OWN: &str = "bolt%3A%2F%2F10.0.0.7%3A20880%3Fversion%3D1.0";
const OWN_REAL: &str = "bolt%3A%2F%2F10.0.0.7%3A20881%3Fversion%3D1.0";
/// Of another host, and as the application sees it.
const OTHER: &str = "bolt%3A%2F%2F10.0.0.8%3A20881%3Fversion%3D1.0";
const OTHER_TOLD: &str =
    "bolt%3A%2F%2F127.0.0.1%3A20882%3Fversion%3D1.0%26weir.at%3D10.0.0.8%3A20881";

fn at(leaf: &str) -> String {
    format!("{DIRECTORY}/{leaf}")
}

fn names() -> Names {
    let text = "takeover:\n  outbound: \"127.0.0.1:20882\"\n  registries: [{ kind: zookeeper, \
                servers: [\"a:1\"] }]";
    let takeover = Config::parse("weir.yaml", None, text).unwrap().takeover.unwrap();
    let RegistryKind::Zookeeper(tree) = &takeover.registries[0].kind else { panic!() };
    Names::new(&takeover, tree)
}

/// What the desk knows of an application that has entered itself.
fn real(path: &str) -> Option<String> {
    if path == at(OWN) { Some(at(OWN_REAL)) } else { untold(path) }
}

fn original(path: &str) -> Option<String> {
    (path == at(OWN_REAL)).then(|| at(OWN))
}

fn ints(ints: &[i32]) -> Vec<u8> {
    ints.iter().flat_map(|int| int.to_be_bytes()).collect()
}

fn frame(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn create(xid: i32, path: &str) -> Vec<u8> {
    let acl = [ints(&[1, 31]), written("world"), written("anyone")].concat();
    frame(&[&ints(&[xid, 1]), &written(path), &written("data"), &acl, &ints(&[1])])
}

fn names_of(children: &[&str]) -> Vec<u8> {
    let mut bytes = length(children.len()).to_vec();
    children.iter().for_each(|child| bytes.extend(written(child)));
    bytes
}

/// A directory's stat, with so many children.
fn stat(children: i32) -> Vec<u8> {
    [vec![7; 56], ints(&[children]), vec![8; 8]].concat()
}

fn asked(dialogue: &mut Dialogue, frame: &[u8]) -> Vec<u8> {
    let granted = BTreeMap::from([(at(OWN), at(OWN_REAL))]);
    let turn = Turn { claims: 3, granted: &granted, real: &real };
    dialogue.request(&turn, frame).unwrap().unwrap_or_else(|| frame.to_vec())
}

fn heard(dialogue: &mut Dialogue, frame: &[u8]) -> (Vec<u8>, Heard) {
    let mut heard = dialogue.answer(&names(), &original, frame).unwrap();
    (heard.frame.take().unwrap_or_else(|| frame.to_vec()), heard)
}

#[test]
fn application_is_entered_at_inbound_and_sees_itself_as_it_is() {
    let mut dialogue = Dialogue::default();
    let own = Claim { path: at(OWN), place: "10.0.0.7:20880".to_owned(), port: 20_880 };
    assert_eq!(claims(&create(0, &at(OWN))), Ok(vec![own]));
    assert_eq!(asked(&mut dialogue, &create(0, &at(OWN))), create(0, &at(OWN_REAL)));
    let reply = |path: &str| frame(&[&ints(&[0, 0, 9, 0]), &written(path)]);
    assert_eq!(heard(&mut dialogue, &reply(&at(OWN_REAL))).0, reply(&at(OWN)));

    let list = |xid| frame(&[&ints(&[xid, 12]), &written(DIRECTORY), &[1]]);
    assert_eq!(asked(&mut dialogue, &list(1)), list(1));
    let head = ints(&[1, 0, 9, 0]);
    let came = frame(&[&head, &names_of(&[OWN_REAL, OTHER, "lock"]), &stat(3)]);
    let passed = frame(&[&head, &names_of(&[OWN, OTHER_TOLD, "lock"]), &stat(3)]);
    let (bytes, found) = heard(&mut dialogue, &came);
    assert_eq!(bytes, passed);
    let services = BTreeSet::from(["com.a.Demo:1.0".to_owned()]);
    let removed = Removed { claims: 3, paths: Vec::new() };
    assert_eq!(found, Heard { removed, services, told: 1, ..Heard::default() });

    let delete = |path: &str| frame(&[&ints(&[2, 2]), &written(path), &ints(&[-1])]);
    assert_eq!(asked(&mut dialogue, &delete(&at(OWN))), delete(&at(OWN_REAL)));
    let (bytes, found) = heard(&mut dialogue, &ints(&[2, 0, 9, 0]));
    let removed = Removed { claims: 3, paths: vec![at(OWN)] };
    assert_eq!((bytes, found.removed), (ints(&[2, 0, 9, 0]), removed));
    assert_eq!(asked(&mut dialogue, &delete(&at(OWN))), delete(&at(OWN_REAL)));
    let nothing = heard(&mut dialogue, &ints(&[2, 0, 9, -101])).1.removed;
    assert_eq!(nothing, Removed::default(), "nothing was there");
}

/// The server says that it is no name, in its turn: nothing of ours comes between answers.
#[test]
fn provider_that_may_not_be_entered_is_refused_by_the_server() {
    let mut dialogue = Dialogue::default();
    let other = "bolt%3A%2F%2F10.0.0.7%3A20999%3Fversion%3D1.0";
    let broken = at("bolt%3A%2F%2F10.0.0.7%3A20880%zz");
    for path in [at(other), at(OTHER), at(OTHER_TOLD), broken] {
        // The number of a ping does not make it one.
        for xid in [5, -2, -4] {
            assert_eq!(asked(&mut dialogue, &create(xid, &path)), create(xid, REFUSED), "{path}");
        }
    }
    // What the registry calls a leaf of an earlier session is no reason to make it.
    let turn = Turn { claims: 0, granted: &BTreeMap::new(), real: &real };
    let passed = dialogue.request(&turn, &create(5, &at(OWN))).unwrap();
    assert_eq!(passed, Some(create(5, REFUSED)));
    for path in ["/sofa-rpc/com.a.Demo/consumers/bolt%3A%2F%2F10.0.0.7%3A1", DIRECTORY, "/lock"] {
        assert_eq!(asked(&mut dialogue, &create(5, path)), create(5, path), "no provider");
        assert_eq!(claims(&create(5, path)), Ok(vec![]));
    }
}

#[test]
fn told_names_lead_back_in_whatever_asks_for_them() {
    let mut dialogue = Dialogue::default();
    let data = |path: &str| frame(&[&ints(&[3, 4]), &written(path), &[1]]);
    assert_eq!(asked(&mut dialogue, &data(&at(OTHER_TOLD))), data(&at(OTHER)));
    let answer = frame(&[&ints(&[3, 0, 9, 0]), &written("data"), &stat(0)]);
    assert_eq!(heard(&mut dialogue, &answer).0, answer);
    let watches = |paths: [&str; 2]| {
        let lists = [ints(&[1]), written(paths[0]), ints(&[0, 2]), written(paths[1])];
        frame(&[&ints(&[-8, 101, 0, 7]), &lists.concat(), &written(DIRECTORY)])
    };
    let passed = watches([&at(OTHER), &at(OWN_REAL)]);
    assert_eq!(asked(&mut dialogue, &watches([&at(OTHER_TOLD), &at(OWN)])), passed);
    let event = |path: &str| frame(&[&ints(&[-1, -1, -1, 0, 2, 3]), &written(path)]);
    assert_eq!(heard(&mut dialogue, &event(&at(OTHER))).0, event(&at(OTHER_TOLD)));
    assert_eq!(heard(&mut dialogue, &event(&at(OWN_REAL))).0, event(&at(OWN)));
    assert_eq!(heard(&mut dialogue, &event(DIRECTORY)).0, event(DIRECTORY));
}

#[test]
fn requests_within_one_are_each_turned() {
    let mut dialogue = Dialogue::default();
    let head = |op: i32| [ints(&[op]), vec![0], ints(&[-1])].concat();
    let end = [ints(&[-1]), vec![1], ints(&[-1])].concat();
    let made = |path: &str| create(0, path).split_off(8);
    let multi = |one: &str, other: &str| {
        let delete = [written(one), ints(&[-1])].concat();
        frame(&[&ints(&[6, 14]), &head(2), &delete, &head(1), &made(other), &end])
    };
    assert_eq!(claims(&multi(&at(OWN), &at(OWN))).unwrap().len(), 1);
    let passed = multi(&at(OWN_REAL), &at(OWN_REAL));
    assert_eq!(asked(&mut dialogue, &multi(&at(OWN), &at(OWN))), passed);
    let result =
        |path: &str| frame(&[&ints(&[6, 0, 9, 0]), &head(2), &head(1), &written(path), &end]);
    assert_eq!(heard(&mut dialogue, &result(&at(OWN_REAL))).0, result(&at(OWN)));

    // A read of many: answers that failed keep the others in their places.
    let list = |path: &str| [head(8), written(path), vec![0]].concat();
    let many = [list("/none"), list(DIRECTORY), list("/plain")].concat();
    let many = frame(&[&ints(&[7, 22]), &many, &end]);
    assert_eq!(asked(&mut dialogue, &many), many);
    let failed = [head(-1), ints(&[-101])].concat();
    let result = |leaf: &str| {
        let lists = [head(8), names_of(&[leaf]), head(8), names_of(&[OTHER])].concat();
        frame(&[&ints(&[7, 0, 9, 0]), &failed, &lists, &end])
    };
    assert_eq!(heard(&mut dialogue, &result(OTHER)).0, result(OTHER_TOLD));
}

/// Answers come in the order of the requests, but those to pings and events come between; xid 0 is legal.
#[test]
fn answers_belong_to_their_requests() {
    let mut dialogue = Dialogue::default();
    let list = |xid| frame(&[&ints(&[xid, 8]), &written(DIRECTORY), &[0]]);
    let answer = |xid, leaf| frame(&[&ints(&[xid, 0, 9, 0]), &names_of(&[leaf])]);
    asked(&mut dialogue, &list(0));
    asked(&mut dialogue, &ints(&[-2, 11]));
    asked(&mut dialogue, &list(1));
    assert_eq!(heard(&mut dialogue, &ints(&[-2, 0, 9, 0])).0, ints(&[-2, 0, 9, 0]));
    assert_eq!(heard(&mut dialogue, &ints(&[0, 0, 9, -101])).0, ints(&[0, 0, 9, -101]));
    assert_eq!(heard(&mut dialogue, &answer(1, OTHER)).0, answer(1, OTHER_TOLD));
    assert_eq!(heard(&mut dialogue, &answer(2, OTHER)).0, answer(2, OTHER), "nobody has asked");
    for xid in 0..i32::try_from(PENDING_MAX).unwrap() {
        assert!(!dialogue.is_full());
        asked(&mut dialogue, &list(xid));
    }
    assert!(dialogue.is_full());
    heard(&mut dialogue, &answer(0, OTHER));
    assert!(!dialogue.is_full());
}

#[test]
fn unknown_is_passed_and_broken_is_not() {
    let mut dialogue = Dialogue::default();
    let unknown = frame(&[&ints(&[1, 4711]), &written(&at(OWN))]);
    assert_eq!(asked(&mut dialogue, &unknown), unknown);
    let broken = ints(&[1, 1, 99]);
    let turn = Turn { claims: 0, granted: &BTreeMap::new(), real: &real };
    assert!(dialogue.request(&turn, &broken).is_err() && claims(&broken).is_err());
    assert!(dialogue.answer(&names(), &original, &[0; 3]).is_err());
}

/// One request for a group reaches whoever provides the service, so several groups are not mixed up.
#[test]
fn several_groups_of_a_service_are_told_as_they_are() {
    let text = "takeover:\n  registries: [{ kind: zookeeper, servers: [\"a:1\"], layout: dubbo }]";
    let takeover = Config::parse("weir.yaml", None, text).unwrap().takeover.unwrap();
    let RegistryKind::Zookeeper(tree) = &takeover.registries[0].kind else { panic!() };
    let names = Names::new(&takeover, tree);
    let leaf = |host: u8, rest: &str| {
        format!("dubbo%3A%2F%2F10.0.0.{host}%3A1%2Fcom.a.Demo%3F{}", rest.replace('=', "%3D"))
    };
    let (one, other) = (leaf(1, "group=a"), leaf(2, "group=b"));
    let (alone, plain) = (leaf(3, "version=2"), leaf(4, "group=a"));
    let list = |leaves: &[&str]| {
        let mut heard = Heard::default();
        let bytes = names_of(leaves).split_off(4);
        let list = heard.list(&names, &|_| None, "/dubbo/com.a.Demo/providers", &bytes).unwrap();
        let same = leaves.iter().zip(&list).map(|(leaf, told)| leaf == told);
        (same.collect::<Vec<_>>(), heard.told, heard.left)
    };
    assert_eq!(list(&[&one, &other, &alone]), (vec![true, true, false], 1, 2));
    assert_eq!(list(&[&one, &plain, &alone]), (vec![false; 3], 3, 0));
}

#[test]
fn expired_session_is_told_as_servers_tell_it() {
    let hello = |len: usize| zookeeper::welcome(&expired(&vec![0; len])).unwrap();
    assert_eq!((hello(45).session, hello(45).timeout_ms), (0, 0));
    assert_eq!((expired(&[0; 45]).len(), expired(&[0; 44]).len()), (37, 36));
    assert_eq!(is_farewell(&farewell()), Ok(true));
    assert_eq!(is_farewell(&ints(&[1, 11])), Ok(false));
    let reply = |xid, error| is_removed(&ints(&[xid, 0, 9, error]));
    for (error, is_gone) in [(0, true), (-101, true), (-102, false), (-112, false)] {
        assert_eq!(reply(OWN_XID, error), Ok(Some(is_gone)), "{error}");
    }
    assert_eq!(reply(1, 0), Ok(None));
    assert_eq!(zookeeper::head(&removal("/a")).unwrap().op, Op::Delete);
}
