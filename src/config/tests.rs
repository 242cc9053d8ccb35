// SPDX-License-Identifier: Apache-2.0
//! What a config may say, and what is said about one that is wrong.

use super::*;
use crate::service::{Balance, Check, CheckKind};

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
            endpoints: vec![Endpoint::new("[::1]:2".parse().unwrap())],
            listen: "127.0.0.1:1".parse().unwrap(),
            manner: Manner::of(Balance::RoundRobin),
            name: "forward-0".to_owned(),
        }],
        on_change: OnChange::Repair,
        on_exit: OnExit::Open,
        profile: Profile::default(),
        takeover: None,
        workers: Workers::Auto,
        workloads: Vec::new(),
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
fn endpoint_may_carry_weight_and_zone() {
    let text = "forward:\n  - listen: \"127.0.0.1:1\"\n    balance: weighted\n    zone: a\n    check_interval_ms: 500\n    slow_start_ms: 2000\n    endpoints: [\"1.1.1.1:1\", { addr: \"[::1]:2\", weight: 0, zone: a }]\n";
    let config = Config::parse("weir.yaml", None, text).unwrap();
    let endpoints = vec![
        Endpoint::new("1.1.1.1:1".parse().unwrap()),
        Endpoint { weight: 0, zone: "a".into(), ..Endpoint::new("[::1]:2".parse().unwrap()) },
    ];
    let manner = Manner {
        balance: Balance::Weighted,
        check: Some(Check {
            interval: std::time::Duration::from_millis(500),
            kind: CheckKind::Tcp,
        }),
        slow_start: std::time::Duration::from_secs(2),
        zone: "a".into(),
    };
    assert_eq!((&config.forward[0].endpoints, &config.forward[0].manner), (&endpoints, &manner));
    let text = "forward:\n  - listen: \"127.0.0.1:1\"\n    balance: fastest\n    endpoints: [{ weight: 1 }, { addr: \"1.1.1.1:1\", weight: -1 }]\n";
    assert_eq!(
        mistakes(text),
        [
            "weir.yaml:3:14: forward[0].balance: `fastest`: must be consistent_hash, least_flows, random_two, round_robin or weighted",
            "weir.yaml:4:17: forward[0].endpoints.addr: is missing: must be an address with port (`127.0.0.1:80` or `[::1]:80`)",
            "weir.yaml:4:61: forward[0].endpoints.weight: `-1`: must be a number from 0 to 10000",
        ]
    );
}

#[test]
fn nothing_asked_is_refused_and_so_is_what_is_no_yaml() {
    let nothing = "weir.yaml:1:1: asks for nothing: give it `inbound:`, `outbound:`, `takeover:`, or a list \
                   `forward:` or `workloads:`";
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

#[test]
fn workloads_are_read_into_one_list() {
    let text = "inbound: {}\nworkloads:\n- { name: a, netns: /run/netns/a, inbound: {}, outbound: {} }\n\
                - { pid: 7, outbound: { workload: { cgroup: /x } } }\n\
                - { name: c, cgroup: /c, outbound: { listen: \"127.0.0.1:15002\" } }\n";
    let config = Config::parse("weir.yaml", None, text).unwrap();
    let seen = |index: usize| {
        let Captured { name, namespace, outbound, .. } = &config.workloads[index];
        let whose = outbound.as_ref().and_then(|outbound| outbound.workload.clone());
        (name.as_str(), namespace.clone(), whose)
    };
    assert_eq!(seen(0), ("", Namespace::Own, None));
    let everywhere = Some(Workload::Cgroups(vec!["/".into()]));
    assert_eq!(seen(1), ("a", Namespace::Path("/run/netns/a".into()), everywhere));
    assert_eq!(
        seen(2),
        ("workload-1", Namespace::Process(7), Some(Workload::Cgroups(vec!["/x".into()])))
    );
    assert_eq!(seen(3), ("c", Namespace::Own, Some(Workload::Cgroups(vec!["/c".into()]))));
}

#[test]
fn workloads_that_cannot_stand_together_are_mistakes() {
    let text = "inbound: {}\nworkloads:\n- { name: a, netns: /a, pid: 1, inbound: {} }\n\
                - { name: b, inbound: {} }\n- { name: b, cgroup: /c, inbound: {} }\n\
                - { name: c, netns: /c, inbound: {} }\n- { name: c, netns: /c, inbound: {} }\n\
                - { name: e, netns: /e }\n- { name: f, cgroup: /f, outbound: {} }\n\
                - { name: g, cgroup: /g, outbound: {} }\n";
    let one_of = "must have one of `netns: /run/netns/NAME`, `pid: NUMBER` and `cgroup: /PATH`";
    let inbound = "traffic to a cgroup cannot be told from other traffic: give it a netns or a \
                   pid, or put `inbound` at the top of the file";
    let twin = "has the network namespace of c: what is captured in one stands in one entry";
    let twice = "listens where workloads[3].inbound does ([::]:15006)";
    let overlap = "listens where workloads[6].outbound does";
    assert_eq!(
        mistakes(text),
        [
            format!("weir.yaml:3:3: workloads[0]: {one_of}"),
            format!("weir.yaml:4:3: workloads[1]: {one_of}"),
            format!("weir.yaml:5:3: workloads[2].inbound: {inbound}"),
            "weir.yaml:7:3: workloads[4]: the name c is taken".to_owned(),
            format!("weir.yaml:7:3: workloads[4]: {twin}"),
            format!("weir.yaml:7:34: workloads[4].inbound: {twice}"),
            "weir.yaml:8:3: workloads[5]: captures nothing: give it `inbound:` or `outbound:`"
                .to_owned(),
            format!("weir.yaml:10:36: workloads[7].outbound: {overlap} (127.0.0.1:15001)"),
            format!("weir.yaml:10:36: workloads[7].outbound: {overlap} ([::1]:15001)"),
        ]
    );
}

#[test]
fn each_capture_says_what_it_needs() {
    let said = |text: &str| mistakes(&format!("{text}\n"));
    assert_eq!(
        said("outbound: { capture: connect }"),
        [
            "weir.yaml:1:11: outbound.workload: capture connect needs one: `workload: { cgroup: /path }`, relative to the cgroup v2 mount"
        ]
    );
    assert_eq!(said("inbound: { capture: redirect, listen: \"10.0.0.1:15006\" }").len(), 1);
    for fine in [
        "outbound: { capture: tproxy }",
        "outbound: { capture: redirect, workload: { uid: 7 } }",
        "inbound: { capture: redirect, listen: \"0.0.0.0:15006\" }",
    ] {
        assert!(Config::parse("weir.yaml", None, fine).is_ok(), "{fine}");
    }
}

#[test]
fn what_cannot_work_is_a_mistake() {
    let said = |text: &str| mistakes(&format!("{text}\n"));
    let port = "must have a port above 0";
    assert_eq!(
        said("workers: []\ninbound: {}"),
        ["weir.yaml:1:10: workers: must be a list of at least one CPU, each once"]
    );
    for (text, place) in [
        ("inbound: { listen: \"[::]:0\" }", "1:20: inbound.listen: `[::]:0`: "),
        (
            "outbound: { workload: { cgroup: /a }, listen: \"127.0.0.1:0\" }",
            "1:47: outbound.listen: `127.0.0.1:0`: ",
        ),
        ("takeover: { api: \"127.0.0.1:0\" }", "1:18: takeover.api: `127.0.0.1:0`: "),
        (
            "forward: [{ listen: \"127.0.0.1:1\", endpoints: [\"1.1.1.1:0\"] }]",
            "1:48: forward[0].endpoints: `1.1.1.1:0`: ",
        ),
    ] {
        assert_eq!(said(text), [format!("weir.yaml:{place}{port}")]);
    }
    for capture in ["tproxy", "redirect"] {
        for root in ["/", "//.", "\"\""] {
            let text =
                format!("outbound: {{ capture: {capture}, workload: {{ cgroup: [{root}] }} }}");
            assert!(
                said(&text)[0].contains("outbound.workload: the cgroup / is everybody"),
                "{root}"
            );
        }
    }
    let text = "workloads: [{ cgroup: /, outbound: { capture: tproxy } }]";
    assert_eq!(said(text).len(), 1);
}

#[test]
fn missing_listen_is_named_beside_other_mistakes() {
    let text = "on_exit: off\nforward: [{ endpoints: [\"1.1.1.1:1\"] }]\n";
    let missing = "forward[0].listen: is missing: must be an address with port (`127.0.0.1:80` or `[::1]:80`)";
    assert_eq!(
        mistakes(text),
        [
            "weir.yaml:1:10: on_exit: `off`: must be closed or open",
            &format!("weir.yaml:2:11: {missing}")
        ]
    );
}

#[test]
fn endpoint_that_is_a_listener_of_ours_would_loop() {
    let text = "takeover: {}\nforward:\n\
                - { name: a, listen: \"0.0.0.0:80\", endpoints: [\"1.1.1.1:80\", \"127.0.0.9:80\"] }\n\
                - { name: b, listen: \"10.0.0.1:81\", endpoints: [{ addr: \"10.0.0.1:81\" }] }\n\
                - { name: c, listen: \"10.0.0.1:82\", endpoints: [\"10.0.0.2:81\", \"[::1]:12201\"] }\n";
    let said = "is a port of this weir";
    assert_eq!(
        mistakes(text),
        [
            format!(
                "weir.yaml:3:62: forward[0].endpoints: `127.0.0.9:80`: {said} (forward[0]): it would loop"
            ),
            format!(
                "weir.yaml:4:49: forward[1].endpoints: `10.0.0.1:81`: {said} (forward[1]): it would loop"
            ),
            format!(
                "weir.yaml:5:64: forward[2].endpoints: `[::1]:12201`: {said} (takeover.inbound): it would loop"
            ),
        ]
    );
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "[ -~\\n\\t\u{e9}\u{1F600}]{0,200}") {
        let _ = Config::parse("weir.yaml", None, &text).map_err(|mistakes| mistakes.to_string());
    }
}

#[test]
fn tls_to_a_registry_needs_an_authority_and_whole_pairs() {
    let wrong = |kind: &str, tls: &str, more: &str| {
        let registry = format!("{{ name: r, kind: {kind}, servers: [\"a:1\"], tls: {tls} }}");
        let text = format!("takeover:\n  registries: [{registry}]\n  {more}");
        mistakes(&text).join("\n")
    };
    for (kind, tls, more, expected) in [
        ("etcd", "{ certificate: c, key: k }", "", "tls.ca: is missing"),
        ("etcd", "{ ca: a, key: k }", "", "`certificate` and `key` belong together"),
        ("zookeeper", "{ ca: a, server_name: n }", "", "under which `servers` has it"),
        ("zookeeper", "{ ca: a }", "facade: {}", "r has `tls`, which is not spoken here"),
        ("sofa", "{ ca: a }", "", "only a registry of kind etcd or zookeeper has a `tls`"),
    ] {
        let said = wrong(kind, tls, more);
        assert!(said.contains(expected), "{said}");
    }
}
