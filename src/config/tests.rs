// SPDX-License-Identifier: Apache-2.0
//! What a config may say, and what is said about one that is wrong.

use super::*;

fn mistakes(text: &str) -> Vec<String> {
    let shown = Config::parse("weir.yaml", None, text).unwrap_err().to_string();
    shown.lines().filter(|line| line.starts_with("weir.yaml")).map(str::to_owned).collect()
}

#[test]
fn what_is_not_said_has_a_default() {
    let text = "forward:\n  - { listen: \"127.0.0.1:1\", endpoints: [\"[::1]:2\"] }\n";
    let config = Config::parse("weir.yaml", None, text).unwrap();
    let expected = Config {
        admin: Admin { http: None, socket: Some("/run/weir/admin.sock".into()) },
        forward: vec![Forward {
            balance: Balance::RoundRobin,
            endpoints: vec!["[::1]:2".parse().unwrap()],
            listen: "127.0.0.1:1".parse().unwrap(),
            name: "forward-0".to_owned(),
        }],
        inbound: None,
        on_exit: OnExit::Open,
        outbound: None,
        profile: Profile::default(),
        workers: Workers::Auto,
    };
    assert_eq!(config, expected);
}

#[test]
fn every_mistake_is_shown_at_once_with_its_place() {
    let text = "profile: balance\nworkers: 0\non_exit: off\nforward:\n  - { listen: here, endpoint: [], endpoints: [\"1.2.3.4\"] }\nadmn: {}\n";
    assert_eq!(
        mistakes(text),
        [
            "weir.yaml:1:10: profile: `balance`: must be balanced, latency, many-flows, throughput or a path ending in .yaml; did you mean `balanced`?",
            "weir.yaml:2:10: workers: `0`: must be auto, a number above 0, or a list of CPUs",
            "weir.yaml:3:10: on_exit: `off`: must be closed or open",
            "weir.yaml:5:5: forward[0].endpoints: must name at least one address",
            "weir.yaml:5:15: forward[0].listen: `here`: must be an address with port (`127.0.0.1:80` or `[::1]:80`)",
            "weir.yaml:5:21: forward[0].endpoint: unknown key; did you mean `endpoints`?",
            "weir.yaml:5:47: forward[0].endpoints: `1.2.3.4`: must be an address with port (`127.0.0.1:80` or `[::1]:80`)",
            "weir.yaml:6:1: admn: unknown key; did you mean `admin`?",
        ]
    );
}

#[test]
fn nothing_asked_is_refused_and_so_is_what_is_no_yaml() {
    let nothing =
        "weir.yaml:1:1: asks for nothing: give it `inbound:`, `outbound:` or a `forward:` list";
    assert_eq!(mistakes("# only a comment\n"), [nothing]);
    assert_eq!(mistakes(""), [nothing]);
    assert_eq!(mistakes("a: [1\n").len(), 1);
    assert_eq!(mistakes("forward: *all\n").len(), 1);
    assert_eq!(mistakes("\u{0}\u{1}").len(), 1);
}

#[test]
fn listeners_that_overlap_are_an_error() {
    let text = "forward:\n  - { name: a, listen: \"[::]:80\", endpoints: [\"1.1.1.1:1\"] }\n  - { name: b, listen: \"127.0.0.1:80\", endpoints: [\"1.1.1.1:1\"] }\n";
    assert_eq!(
        mistakes(text),
        ["weir.yaml:3:5: forward[1]: listens where forward[0] does ([::]:80)"]
    );
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "[ -~\\n\\t\u{e9}\u{1F600}]{0,200}") {
        let _ = Config::parse("weir.yaml", None, &text).map_err(|mistakes| mistakes.to_string());
    }
}
