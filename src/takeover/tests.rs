// SPDX-License-Identifier: Apache-2.0
//! What the desk makes of what applications ask and registries say.

use std::net::{IpAddr, SocketAddr};

use super::*;
use crate::config::{Config, Takeover};

const SERVICE: &str = "com.a.DemoService:1.0";

fn config(text: &str) -> Takeover {
    let text = format!("takeover:\n  advertise: 10.0.0.7\n{text}");
    Config::parse("weir.yaml", None, &text)
        .unwrap_or_else(|wrong| panic!("{wrong}"))
        .takeover
        .unwrap()
}

fn desk(text: &str) -> Desk {
    Desk::new(config(text), vec![12_201, 12_220, 13_330], None)
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn endpoints(desk: &mut Desk, service: &str) -> Option<Vec<SocketAddr>> {
    let changes = desk.changes();
    let last = changes.into_iter().rev().find_map(|change| match change {
        Change::Service { endpoints, name } if name == service => Some(endpoints),
        _ => None,
    });
    last.map(|endpoints| endpoints.iter().map(|endpoint| endpoint.addr).collect())
}

#[test]
fn provider_text_is_read_and_written() {
    let text = "bolt://10.0.0.5:12200/x?v=4.0&weight=30&[plus]=[clientTimeout#1]&zone=a&_x@y=1";
    let provider = Provider::parse(text).unwrap();
    let expected =
        Endpoint { weight: 30, zone: "a".into(), ..Endpoint::new(addr("10.0.0.5:12200")) };
    assert_eq!(provider.endpoint, expected);
    let written = "10.0.0.5:12200?v=4.0&weight=30&[plus]=[clientTimeout#1]&zone=a&_x@y=1";
    assert_eq!(provider.text(), written);
    assert_eq!(Provider::parse("[::1]:5").unwrap().text(), "[::1]:5");
    for wrong in ["", "host:1", "10.0.0.1", "10.0.0.1:1?weight=-1", "10.0.0.1:1?weight="] {
        assert_eq!(Provider::parse(wrong), None, "{wrong}");
    }
}

#[test]
fn weight_of_any_size_is_as_much_as_there_can_be() {
    for (weight, expected, is_clamped) in [
        ("10000", 10_000, false),
        ("10001", 10_000, true),
        ("65536", 10_000, true),
        ("18446744073709551616", 10_000, true),
    ] {
        let provider = Provider::parse(&format!("10.0.0.1:1?_WEIGHT={weight}")).unwrap();
        let found = (provider.endpoint.weight, provider.is_clamped());
        assert_eq!(found, (expected, is_clamped), "{weight}");
    }
}

/// A registry may say anything: whoever followed it to a listener of ours would come back to it.
#[test]
fn listener_of_ours_is_nobodys_endpoint_but_inbound() {
    let own = ["127.0.0.1:12220", "127.0.0.9:13330", "10.0.0.7:12220", "0.0.0.0:13330"];
    let others = ["10.0.0.8:12220", "10.0.0.7:12201", "127.0.0.1:80"];
    let all: Vec<String> = own.iter().chain(&others).map(|addr| format!("\"{addr}\"")).collect();
    let text = format!(
        "  registries:\n  - {{ name: one, services: [{{ name: \"a:1\", endpoints: [{}] }}] }}\n",
        all.join(", ")
    );
    let mut desk = desk(&text);
    desk.subscribe("a:1").unwrap();
    assert_eq!(endpoints(&mut desk, "a:1"), Some(others.map(addr).to_vec()));
}

#[test]
fn registry_holds_our_address_once_the_application_answers_and_never_its_own() {
    let mut desk = desk("");
    desk.configure("app");
    desk.publish(SERVICE, Some(20_880), "v=1.0").unwrap();
    assert_eq!(desk.changes(), [Change::Application(addr("127.0.0.1:20880"))]);
    assert_eq!(desk.subscribe(SERVICE), Ok(vec![]), "nobody answers there yet");
    desk.note_health(false);
    assert_eq!(endpoints(&mut desk, SERVICE), Some(vec![]));
    desk.note_health(true);
    assert_eq!(desk.subscribe(SERVICE), Ok(vec!["127.0.0.1:12220?v=1.0".to_owned()]));
    assert_eq!(endpoints(&mut desk, SERVICE), Some(vec![addr("10.0.0.7:12201")]));
    assert_eq!(desk.known()[SERVICE], ["10.0.0.7:12201?v=1.0"]);
    for failures in 1..=3 {
        assert_eq!(desk.published().next(), Some((SERVICE, true)), "after {failures}");
        desk.note_health(false);
    }
    assert_eq!(endpoints(&mut desk, SERVICE), Some(vec![]), "three failures withdraw it");
    desk.note_health(true);
    assert_eq!(endpoints(&mut desk, SERVICE), Some(vec![addr("10.0.0.7:12201")]), "and it is back");
    desk.withdraw();
    assert_eq!(endpoints(&mut desk, SERVICE), Some(vec![]));
}

/// An application that exports its services one by one is not gone in between.
#[test]
fn one_more_service_leaves_the_others_registered() {
    let mut desk = desk("");
    desk.publish(SERVICE, Some(20_880), "").unwrap();
    desk.note_health(true);
    desk.changes();
    desk.publish("com.a.Other:1.0", Some(20_880), "").unwrap();
    assert!(!desk.changes().iter().any(|change| matches!(change, Change::Application(_))));
    let published: Vec<_> = desk.published().collect();
    assert_eq!(published, [(SERVICE, true), ("com.a.Other:1.0", true)]);
}

#[test]
fn asking_twice_is_asking_once() {
    let mut desk = desk("");
    for _ in 0..2 {
        desk.configure("app");
        desk.publish(SERVICE, None, "v=1.0").unwrap();
        desk.note_health(true);
        desk.subscribe(SERVICE).unwrap();
    }
    desk.configure("other");
    assert_eq!(desk.applications().collect::<Vec<_>>(), ["app", "other"]);
    desk.changes();
    desk.publish(SERVICE, None, "v=1.0").unwrap();
    desk.subscribe(SERVICE).unwrap();
    assert_eq!(desk.changes(), [], "nothing is new");
    desk.publish(SERVICE, None, "v=1.0&weight=5").unwrap();
    assert_eq!(desk.known()[SERVICE], ["10.0.0.7:12201?v=1.0&weight=5"], "without a gap");
    desk.unsubscribe(SERVICE);
    desk.unsubscribe(SERVICE);
    assert_eq!(desk.changes().last(), Some(&Change::Gone(SERVICE.to_owned())));
}

#[test]
fn what_cannot_be_published_is_refused_with_the_reason() {
    let mut desk = desk("");
    for (service, port, reason) in [
        ("a b", None, "is no name"),
        ("a/../b", None, "is no name"),
        (".", None, "is no name"),
        ("..:1.0", None, "is no name"),
        (":1.0", None, "is no name"),
        (SERVICE, Some(12_201), "weir's own"),
        (SERVICE, Some(0), "weir's own"),
    ] {
        let refusal = desk.publish(service, port, "").unwrap_err().to_string();
        assert!(refusal.contains(reason), "{refusal}");
    }
    desk.publish(SERVICE, Some(20_880), "").unwrap();
    let refusal = desk.publish("b:1.0", Some(20_881), "").unwrap_err();
    assert_eq!(refusal, Refusal::AnotherPort { port: 20_880 });
    let text = "takeover: { inbound: \"0.0.0.0:12201\" }";
    let nowhere = Config::parse("weir.yaml", None, text).unwrap().takeover.unwrap();
    assert_eq!(
        Desk::new(nowhere, vec![], None).publish(SERVICE, None, ""),
        Err(Refusal::NoAddress)
    );
}

/// Who subscribes is told what calls go by already.
#[test]
fn what_is_told_has_been_heard_and_carried_on() {
    let mut desk =
        desk("  registries: [{ services: [{ name: \"a:1\", endpoints: [\"10.0.0.1:1\"] }] }]\n");
    assert!(!desk.has_heard("a:1"), "nobody has asked for it");
    desk.subscribe("a:1").unwrap();
    assert!(desk.has_heard("a:1"));
    let ever = desk.changes_ever();
    assert!(ever > 0 && desk.changes_reached() == 0);
    assert_eq!(desk.changes().len() as u64, ever);
    desk.note_reached(ever);
    desk.subscribe("a:1").unwrap();
    assert_eq!((desk.changes_ever(), desk.changes_reached()), (ever, ever), "nothing is new");
}

#[test]
fn several_registries_are_one_list_without_our_own_consumers_address() {
    let mut desk = desk(
        r#"
  registries:
    - { name: one, services: [{ name: "a:1", endpoints: ["10.0.0.1:1", "127.0.0.1:12220"] }] }
    - { name: two, services: [{ name: "a:1", parameters: "v=2", endpoints: [{ addr: "10.0.0.1:1", weight: 5 }, "10.0.0.2:1"] }] }
  services: [{ name: "a:1" }]
"#,
    );
    assert_eq!(endpoints(&mut desk, "a:1"), Some(vec![addr("10.0.0.1:1"), addr("10.0.0.2:1")]));
    let told = desk.subscribe("a:1").unwrap();
    assert_eq!(told, ["127.0.0.1:12220", "127.0.0.1:12220?v=2"]);
    desk.unsubscribe("a:1");
    assert_eq!(desk.changes(), [], "what the config wants stays");
}

#[test]
fn file_is_read_again_when_it_changes_and_kept_when_it_is_wrong() {
    let place = tempfile::TempDir::new().unwrap();
    let path = place.path().join("services.yaml");
    let mut registry = FileRegistry::new("lab", &path);
    registry.subscribe("a:1");
    let ports = |news: Vec<Snapshot>| -> Vec<Vec<u16>> {
        let ports = |snapshot: &Snapshot| {
            snapshot.providers.iter().map(|one| one.endpoint.addr.port()).collect()
        };
        news.iter().map(ports).collect()
    };
    assert_eq!(ports(registry.news()), [Vec::<u16>::new()], "no file is no service");
    let mut write = |text: &str| {
        // A new file in place of the old one, as editors and tools do it.
        let new = place.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &path).unwrap();
        std::iter::repeat_with(|| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            registry.news()
        })
        .take(50)
        .find(|news| !news.is_empty())
        .map(ports)
    };
    let text = "services: [{ name: \"a:1\", endpoints: [\"10.0.0.1:1\", \"10.0.0.1:2\"] }]";
    assert_eq!(write(text), Some(vec![vec![1, 2]]));
    assert_eq!(
        write("services: [{ name: \"a:1\", endpoint: [] }]"),
        None,
        "a wrong file is no news"
    );
    assert_eq!(
        write("services: [{ name: \"a:1\", endpoints: [\"10.0.0.1:3\"] }]"),
        Some(vec![vec![3]])
    );
    assert!(!registry.publish("a:1", &Provider::parse("10.0.0.1:9").unwrap()));
}

#[test]
fn advertised_address_must_be_one_that_others_reach() {
    for ip in ["127.0.0.1", "0.0.0.0", "::1", "169.254.1.1", "fe80::1", "::ffff:127.0.0.1"] {
        let text = format!("takeover: {{ advertise: \"{ip}\" }}");
        let mistakes = Config::parse("weir.yaml", None, &text).unwrap_err().to_string();
        assert!(mistakes.contains("no other host reaches it"), "{ip}: {mistakes}");
    }
    let text = "takeover: { inbound: \"10.0.0.9:12201\" }";
    let takeover = Config::parse("weir.yaml", None, text).unwrap().takeover.unwrap();
    assert_eq!(takeover.advertise, Some(IpAddr::from([10, 0, 0, 9])));
}

fn write(desk: &mut Desk) {
    desk.pages().iter().for_each(|page| page.write().unwrap());
}

/// A full disk or a directory that is not there yet costs nothing but time.
#[test]
fn what_the_disk_refused_is_written_later() {
    let place = tempfile::TempDir::new().unwrap();
    let (state, file) = (place.path().join("state"), place.path().join("services.yaml"));
    std::fs::write(&file, "services: [{ name: \"b:1\", endpoints: [\"10.0.0.1:1\"] }]").unwrap();
    let text = format!(
        "  state: \"{}\"\n  registries: [{{ kind: file, path: \"{}\" }}]",
        state.display(),
        file.display(),
    );
    std::fs::write(&state, "no directory").unwrap();
    let mut first = desk(&text);
    first.subscribe("b:1").unwrap();
    let pages = first.pages();
    assert_eq!(pages.len(), 2, "journal and registry");
    for page in &pages {
        assert!(page.write().unwrap_err().to_string().contains("takeover.state"));
        first.keep_again(page);
    }
    std::fs::remove_file(&state).unwrap();
    std::fs::remove_file(&file).unwrap();
    write(&mut first);
    assert_eq!(endpoints(&mut desk(&text), "b:1"), Some(vec![addr("10.0.0.1:1")]));
}

/// What applications asked for is asked for again by the next weir; what registries said is believed
/// until they say something.
#[test]
fn next_life_goes_on_with_what_was_asked_for_and_said() {
    let place = tempfile::TempDir::new().unwrap();
    let file = place.path().join("services.yaml");
    let entry = "services: [{ name: \"b:1\", endpoints: [\"10.0.0.1:1\"] }]";
    std::fs::write(&file, entry).unwrap();
    let text = format!(
        "  state: \"{}\"\n  registries: [{{ kind: static }}, {{ kind: file, path: \"{}\" }}]",
        place.path().join("state").display(),
        file.display(),
    );
    let mut first = desk(&text);
    first.configure("app");
    first.publish(SERVICE, Some(20_880), "v=1.0").unwrap();
    first.subscribe("b:1").unwrap();
    write(&mut first);
    assert_eq!(first.pages().len(), 0, "nothing is new");
    first.withdraw();
    assert_eq!(first.publish("c:1", None, ""), Err(Refusal::Leaving));
    write(&mut first);

    std::fs::remove_file(&file).unwrap();
    let mut second = desk(&text);
    assert_eq!(second.applications().collect::<Vec<_>>(), ["app"]);
    assert_eq!(second.application(), Some(addr("127.0.0.1:20880")));
    assert_eq!(second.published().collect::<Vec<_>>(), [(SERVICE, false)], "not before it answers");
    assert_eq!(endpoints(&mut second, "b:1"), Some(vec![addr("10.0.0.1:1")]));
    second.note_health(true);
    assert_eq!(second.published().collect::<Vec<_>>(), [(SERVICE, true)]);
    second.unpublish(SERVICE);
    second.unsubscribe("b:1");
    write(&mut second);
    let third = desk(&text);
    assert_eq!((third.published().count(), third.known().len()), (0, 0));
}
