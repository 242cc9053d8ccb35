// SPDX-License-Identifier: Apache-2.0
//! Takeover with a real etcd: what it holds, when, and what its troubles do.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::harness::{Authority, Etcd, Net, Place, Weir, until, weir};
use crate::takeover::{OUTBOUND, SERVICE, accept, ask, await_endpoints, exchange, service};

const CLUSTER: &str = "10.98.2.2:2379";
const REGISTRY: &str = "{ name: main, kind: etcd, servers: [\"10.98.2.2:2379\"], layout: dubbo, session_timeout_ms: 2000 }";

fn provider(net: &Net) -> Weir {
    let config = format!(
        "workers: 1\ntakeover:\n  advertise: 10.98.2.2\n  inbound: \"0.0.0.0:20881\"\n  \
         app_port: 20880\n  propagation_ms: 0\n  registries: [{REGISTRY}]"
    );
    Weir::run_as(net.command(Place::Server, weir()), &config)
}

fn consumer(net: &Net) -> Weir {
    let config = format!(
        "workers: 1\ntakeover: {{ registries: [{REGISTRY}], services: [{{ name: \"{SERVICE}\" }}] }}"
    );
    Weir::run(net, &config)
}

/// Publishes with the provider's weir, for an application that is there.
fn publish(net: &Net) {
    let listener = net.listen(Place::Server, "127.0.0.1:20880");
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let answer = ask(net, Place::Server, "/services/publish", Some(&service(Some("20880"))));
    assert_eq!(answer, json!({ "success": true, "errorMessage": "" }));
}

/// Fails if it takes longer than `bound`.
fn within(bound: Duration, what: &str, is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    until(what, is_so);
    assert!(begin.elapsed() < bound, "{what}: {:?}", begin.elapsed());
}

/// RS8, T1, T3: the registry comes after both weirs; it holds the address of the provider's weir, as others
/// write it, never the application's own; a drain takes it out.
#[test]
fn registry_holds_the_sidecar_and_never_the_application() {
    let net = Net::new();
    let mut etcd = Etcd::new(&net, Place::Server, CLUSTER);
    let (mut provider, consumer) = (provider(&net), consumer(&net));
    publish(&net);
    let answer = ask(&net, Place::Node, "/services/subscribe", Some(&service(None)));
    assert_eq!(answer["success"], true, "nobody waits for a registry for long");
    etcd.start();
    etcd.watch();
    await_endpoints(&consumer, 1);
    let [key] = &etcd.providers()[..] else { panic!("one provider") };
    let expected =
        "/dubbo/com.a.DemoService/providers/dubbo%3A%2F%2F10.98.2.2%3A20881%2Fcom.a.DemoService%3F";
    assert!(key.starts_with(expected), "{key}");
    provider.signal(Signal::SIGTERM);
    assert_eq!(provider.wait().code(), Some(0));
    assert_eq!(etcd.providers(), Vec::<String>::new(), "withdrawn before the end");
    until("the watcher has seen it", || etcd.history().contains("DELETE"));
    let history = etcd.history();
    assert!(history.contains("20881") && !history.contains("20880"), "ever: {history}");
    consumer.end(&net);
}

/// RS8: whatever becomes of a lease, a watch or the cluster, it holds this host again within bounds.
#[test]
fn publication_outlives_lost_leases_compaction_and_servers() {
    let net = Net::new();
    let mut etcd = Etcd::started(&net, Place::Server, CLUSTER);
    let (provider, consumer) = (provider(&net), consumer(&net));
    publish(&net);
    await_endpoints(&consumer, 1);
    let keys = etcd.providers();

    // The lease ends: a weir that is stopped says nothing.
    provider.signal(Signal::SIGSTOP);
    within(Duration::from_secs(8), "a silent weir is forgotten", || etcd.providers().is_empty());
    provider.signal(Signal::SIGCONT);
    within(Duration::from_secs(8), "it registers again", || etcd.providers() == keys);

    // Somebody takes the key away: weir looks every few seconds.
    etcd.ask(&["del", &keys[0]]).unwrap();
    within(Duration::from_secs(9), "it is there again", || etcd.providers() == keys);

    // History goes, and what comes after it is still heard.
    let status = etcd.ask(&["endpoint", "status", "-w", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    etcd.ask(&["compact", &revision]).unwrap();
    let other = keys[0].replace("10.98.2.2", "10.98.2.9");
    etcd.ask(&["put", &other, ""]).unwrap();
    await_endpoints(&consumer, 2);
    etcd.ask(&["del", &other]).unwrap();
    await_endpoints(&consumer, 1);

    // The cluster is killed and comes back, first with what it knew, then with nothing.
    etcd.kill();
    etcd.start();
    within(Duration::from_secs(12), "it is there", || etcd.providers() == keys);
    etcd.kill();
    etcd.wipe();
    etcd.start();
    within(Duration::from_secs(15), "it registers with the new one", || etcd.providers() == keys);
    await_endpoints(&consumer, 1);

    // It hangs: connections are taken and nothing is answered.
    etcd.signal(Signal::SIGSTOP);
    let answer = ask(&net, Place::Server, "/services/publish", Some(&service(Some("20880"))));
    assert_eq!(answer["success"], true, "nobody waits for a registry");
    until("weir has noticed", || provider.metric("weir_registry_connected", &[]) == 0);
    etcd.signal(Signal::SIGCONT);
    within(Duration::from_secs(15), "it goes on", || {
        etcd.providers() == keys && provider.metric("weir_registry_connected", &[]) == 1
    });
    await_endpoints(&consumer, 1);
    consumer.end(&net);
    provider.end(&net);
}

/// RS8, T2: who subscribes is answered when the registry has said where the service lives and workers know,
/// so the call that follows finds a provider; a registry that is down is waited for once, and not for long.
#[test]
fn subscriber_waits_for_a_late_registry_and_not_long_for_none() {
    let net = Net::new();
    let mut etcd = Etcd::started(&net, Place::Server, CLUSTER);
    let leaf = "bolt%3A%2F%2F10.98.2.2%3A7001%3Fversion%3D1.0%26v%3D4.0";
    let key = format!("/sofa-rpc/com.a.DemoService/providers/{leaf}");
    etcd.ask(&["put", &key, ""]).unwrap();
    let registry = REGISTRY.replace("dubbo", "sofa");
    let config = format!(
        "workers: 2\ntakeover: {{ protect: off, outbound: \"{OUTBOUND}\", registries: [{registry}] }}"
    );
    let weir = Weir::run(&net, &config);
    until("weir has a session", || weir.metric("weir_registry_connected", &[]) == 1);
    let listener = net.listen(Place::Server, "10.98.2.2:7001");
    let subscribe = || {
        let begin = Instant::now();
        let answer = ask(&net, Place::Node, "/services/subscribe", Some(&service(None)));
        assert_eq!(answer["success"], true);
        (answer["datas"].as_array().unwrap().len(), begin.elapsed())
    };

    etcd.signal(Signal::SIGSTOP);
    let (told, elapsed) = std::thread::scope(|scope| {
        let asked = scope.spawn(subscribe);
        let late = Instant::now() + Duration::from_secs(1);
        until("it answers late", || Instant::now() > late);
        etcd.signal(Signal::SIGCONT);
        asked.join().unwrap()
    });
    assert_eq!(told, 1, "after {elapsed:?}");
    assert!(elapsed >= Duration::from_millis(900), "{elapsed:?}");
    exchange(net.connect(Place::Node, OUTBOUND), &listener);
    assert_eq!(weir.metric("weir_requests_total", &["outcome=\"no_endpoint\""]), 0);
    weir.end(&net);

    etcd.kill();
    let weir = Weir::run(&net, &config);
    let (told, elapsed) = subscribe();
    assert!(told == 0 && elapsed < Duration::from_secs(4), "{told} after {elapsed:?}");
    let begin = Instant::now();
    for _ in 0..10 {
        assert_eq!(subscribe().0, 0);
    }
    assert!(begin.elapsed() < Duration::from_secs(3), "it is known to be down: {begin:?}");
    drop(listener);
    weir.end(&net);
}

/// With `tls` a cluster must show who it is, and so does weir; a wrong authority and a wrong name are said, and
/// right files are taken up without a restart.
#[test]
fn cluster_and_weir_show_each_other_who_they_are() {
    let net = Net::new();
    let (authority, stranger) = (Authority::new("authority"), Authority::new("stranger"));
    let etcd = Etcd::secure(&net, Place::Server, CLUSTER, &authority);
    let place = TempDir::new().unwrap();
    let (ca, name) = (place.path().join("ca.pem"), |name: &str| format!("server_name: {name}"));
    let [certificate, key] = authority.issue("weir", "DNS:weir.example");
    let config = |server_name: &str| {
        let tls = format!(
            "{{ ca: \"{}\", certificate: \"{}\", key: \"{}\", {server_name} }}",
            ca.display(),
            certificate.display(),
            key.display()
        );
        let registry = REGISTRY.replace(" }", &format!(", tls: {tls} }}"));
        format!(
            "workers: 1\ntakeover: {{ advertise: 10.98.2.2, app_port: 20880, propagation_ms: 0, \
             registries: [{registry}], services: [{{ name: \"{SERVICE}\" }}] }}"
        )
    };
    let run = |config: &str| Weir::run_as(net.command(Place::Server, weir()), config);
    std::fs::copy(stranger.ca(), &ca).unwrap();
    let misled = run(&config(&name("etcd.example")));
    until("a stranger is refused", || misled.log().contains("UnknownIssuer (tls.ca"));
    publish(&net);
    std::fs::copy(authority.ca(), &ca).unwrap();
    await_endpoints(&misled, 1);
    assert_eq!(etcd.providers().len(), 1);
    misled.end(&net);
    assert_eq!(etcd.providers(), Vec::<String>::new());

    let other = run(&config(&name("other.example")));
    until("another name is refused", || other.log().contains("certificate not valid for name"));
    other.end(&net);
    let by_address = run(&config(""));
    until("it is known by its address", || by_address.log().contains("connected"));
    by_address.end(&net);
}

/// TP7: what weir says to a registry is no traffic of the workload, also where everything else is: it is not
/// captured, and no flow.
#[test]
fn own_words_to_a_registry_are_never_captured() {
    let net = Net::new();
    let etcd = Etcd::started(&net, Place::Server, CLUSTER);
    let listener = net.listen(Place::Server, "10.98.2.2:7001");
    for mode in ["tproxy", "redirect"] {
        let config = format!(
            "workers: 1\noutbound: {{ capture: {mode} }}\ntakeover: {{ advertise: 10.98.1.1, app_port: 20880, \
             propagation_ms: 0, registries: [{REGISTRY}], services: [{{ name: \"{SERVICE}\" }}] }}"
        );
        let weir = Weir::run(&net, &config);
        until("weir has a session", || weir.metric("weir_registry_connected", &[]) == 1);
        until("the registry has said something", || {
            weir.metric("weir_registry_snapshots_total", &[]) >= 1
        });
        assert_eq!(weir.opened(), 0, "{mode}: {:?}", weir.flows());
        let client = net.connect(Place::Node, "10.98.2.2:7001");
        let served = accept(&listener);
        assert_eq!(weir.opened(), 1, "{mode}: others are captured");
        drop((client, served));
        weir.end(&net);
    }
    drop(etcd);
}

/// RS8: weir is who the config says; what this user may not do is said once and counted, and stops nothing
/// else; a wrong password is said.
#[test]
fn user_may_what_the_cluster_lets_him() {
    let net = Net::new();
    let mut etcd = Etcd::started(&net, Place::Server, CLUSTER);
    etcd.close("/sofa-rpc/com.a.DemoService/");
    let place = TempDir::new().unwrap();
    let file = place.path().join("password");
    std::fs::write(&file, "wrong\n").unwrap();
    let registry = format!(
        "{{ name: main, kind: etcd, servers: [\"10.98.2.2:2378\", \"{CLUSTER}\"], session_timeout_ms: 2000, \
         user: weir, password_file: \"{}\" }}",
        file.display()
    );
    let config = format!(
        "workers: 1\ntakeover: {{ advertise: 10.98.2.2, app_port: 20880, propagation_ms: 0, \
         registries: [{registry}], services: [{{ name: \"{SERVICE}\" }}] }}"
    );
    let weir = Weir::run_as(net.command(Place::Server, weir()), &config);
    publish(&net);
    until("the password is refused", || {
        weir.log().contains("lease/grant") || weir.log().contains("auth/authenticate")
    });
    std::fs::write(&file, "secret\n").unwrap();
    let mut closed = service(Some("20880"));
    closed["serviceName"] = "com.a.AClosedService:1.0".into();
    assert_eq!(ask(&net, Place::Server, "/services/publish", Some(&closed))["success"], true);
    await_endpoints(&weir, 1);
    assert_eq!(etcd.providers().len(), 1);
    let past_an_audit = Instant::now() + Duration::from_secs(7);
    until("it is tried again", || Instant::now() > past_an_audit);
    assert_eq!(weir.metric("weir_registry_refusals_total", &["registry=\"main\""]), 1);
    assert_eq!(weir.log().matches("permission denied").count(), 1, "{}", weir.log());
    weir.end(&net);
    assert_eq!(etcd.providers(), Vec::<String>::new());
}
