// SPDX-License-Identifier: Apache-2.0
//! Takeover with a real ZooKeeper: what it holds, when, and what its troubles do to calls.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;
use zookeeper_client::{Acl, Acls, AuthId, CreateMode, Permission};

use crate::harness::{Authority, Net, Place, Weir, Zookeeper, until, weir};
use crate::takeover::{SERVICE, accept, ask, await_endpoints, exchange, service};

const ENSEMBLE: &str = "10.98.2.2:2181";
/// The roles' ports in every description of this scheme.
const APP: &str = "127.0.0.1:20880";
const OUTBOUND: &str = "127.0.0.1:20882";

/// A server that was not ready for a connection may never close its end, and the kernel keeps ours for
/// `tcp_fin_timeout`.
fn lab() -> Net {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fin_timeout=5");
    net
}

/// The provider's weir, in the server.
fn provider(net: &Net) -> Weir {
    provider_with(net, "")
}

/// With one more line below `takeover`.
fn provider_with(net: &Net, line: &str) -> Weir {
    let config = format!(
        "workers: 1\ntakeover:\n  advertise: 10.98.2.2\n  inbound: \"0.0.0.0:20881\"\n  \
         app_port: 20880\n  propagation_ms: 500\n  registries: [{REGISTRY}]\n  {line}"
    );
    Weir::run_as(net.command(Place::Server, weir()), &config)
}

/// The consumer's, in the node.
fn consumer(net: &Net) -> Weir {
    consumer_with(net, "")
}

fn consumer_with(net: &Net, line: &str) -> Weir {
    let config = format!(
        "workers: 1\ntakeover:\n  outbound: \"{OUTBOUND}\"\n  registries: [{REGISTRY}]\n  \
         services: [{{ name: \"{SERVICE}\" }}]\n  {line}"
    );
    Weir::run(net, &config)
}

const REGISTRY: &str = "{ name: main, kind: zookeeper, servers: [\"10.98.2.2:2181\"], layout: sofa, session_timeout_ms: 2000 }";

/// Publishes with the provider's weir: the port is the application's own.
fn publish(net: &Net) {
    let answer = ask(net, Place::Server, "/services/publish", Some(&service(Some("20880"))));
    assert_eq!(answer, json!({ "success": true, "errorMessage": "" }));
}

/// RS8, T1 to T5: with no registry at first, applications publish and subscribe; once it is there it
/// holds the address of the provider's weir, never the application's own; a call crosses both weirs; a
/// drain withdraws first and serves who still arrives.
#[test]
fn registry_holds_the_sidecar_and_never_the_application() {
    let net = lab();
    let mut zookeeper = Zookeeper::new(&net, Place::Server, ENSEMBLE);
    let (mut provider, consumer) = (provider(&net), consumer(&net));
    publish(&net);
    let answer = ask(&net, Place::Node, "/services/subscribe", Some(&service(None)));
    assert_eq!(answer["success"], true, "nobody waits for a registry for long");
    zookeeper.start();
    until("both have a session", || {
        provider.log().contains("connected") && consumer.log().contains("connected")
    });
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new(), "the application is not there yet");
    let listener = net.listen(Place::Server, APP);
    await_endpoints(&consumer, 1);
    let [leaf] = &zookeeper.ephemerals()[..] else { panic!("one provider") };
    let expected = "/sofa-rpc/com.a.DemoService/providers/bolt%3A%2F%2F10.98.2.2%3A20881%3F";
    assert!(leaf.starts_with(expected), "{leaf}");
    let told = ask(&net, Place::Node, "/services/subscribe", Some(&service(None)));
    let told = told["datas"][0].as_str().unwrap().to_owned();
    assert!(told.starts_with("127.0.0.1:20882?") && told.contains("v=4.0"), "{told}");

    exchange(net.connect(Place::Node, OUTBOUND), &listener);
    provider.signal(Signal::SIGTERM);
    until("it is withdrawn", || zookeeper.ephemerals().is_empty());
    let mut late = net.connect(Place::Node, "10.98.2.2:20881");
    late.write_all(b"late").unwrap();
    let mut server = accept(&listener);
    server.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut bytes = [0; 4];
    while server.read_exact(&mut bytes).is_err() {
        server = accept(&listener);
    }
    assert_eq!(&bytes, b"late", "who had not heard of it yet is served");
    drop((server, late));
    assert_eq!(provider.wait().code(), Some(0));
    let history = zookeeper.history();
    assert!(history.contains("20881") && !history.contains("20880"), "ever");
    consumer.end(&net);
}

/// Takes connections at the application's port until the end of the process.
fn application(net: &Net) {
    let listener = net.listen(Place::Server, APP);
    std::thread::spawn(move || listener.incoming().for_each(drop));
}

/// Fails if it takes longer than `bound`.
fn within(bound: Duration, what: &str, is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    until(what, is_so);
    assert!(begin.elapsed() < bound, "{what}: {:?}", begin.elapsed());
}

/// RS8: whatever becomes of a session, the registry holds this host again within bounds, and a consumer
/// of a registry that is gone goes on with what it knows.
#[test]
fn publication_outlives_lost_sessions_and_servers() {
    let net = lab();
    let mut zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let (provider, consumer) = (provider(&net), consumer(&net));
    application(&net);
    publish(&net);
    await_endpoints(&consumer, 1);
    let leaf = zookeeper.ephemerals();

    // The session ends: a weir that is stopped says nothing for its two seconds.
    provider.signal(Signal::SIGSTOP);
    within(Duration::from_secs(6), "a silent weir is forgotten", || {
        zookeeper.ephemerals().is_empty()
    });
    provider.signal(Signal::SIGCONT);
    within(Duration::from_secs(6), "it registers again", || zookeeper.ephemerals() == leaf);
    await_endpoints(&consumer, 1);

    // Somebody takes the leaf away: weir looks every few seconds.
    zookeeper.visit(async |client| client.delete(&leaf[0], None).await.unwrap());
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new());
    within(Duration::from_secs(9), "it is there again", || zookeeper.ephemerals() == leaf);
    await_endpoints(&consumer, 1);

    // The registry is killed and comes back with what it knew; nobody loses an endpoint.
    zookeeper.kill();
    until("the consumer has noticed", || consumer.log().contains("the connection"));
    await_endpoints(&consumer, 1);
    zookeeper.start();
    within(Duration::from_secs(12), "it is there", || zookeeper.ephemerals() == leaf);
    await_endpoints(&consumer, 1);

    // It comes back and knows nothing.
    zookeeper.kill();
    zookeeper.wipe();
    zookeeper.start();
    within(Duration::from_secs(15), "it registers with the new one", || {
        zookeeper.ephemerals() == leaf
    });
    await_endpoints(&consumer, 1);

    // It hangs: connections are taken and nothing is answered.
    zookeeper.signal(Signal::SIGSTOP);
    let answer = ask(&net, Place::Server, "/services/publish", Some(&service(Some("20880"))));
    assert_eq!(answer["success"], true, "nobody waits for a registry");
    zookeeper.signal(Signal::SIGCONT);
    within(Duration::from_secs(15), "it goes on", || zookeeper.ephemerals() == leaf);
    let history = zookeeper.history();
    assert!(history.contains("20881") && !history.contains("20880"), "ever");
    consumer.end(&net);
    provider.end(&net);
}

/// Killed and started again before its session has ended, it knows what was published and takes its own
/// leaf over; the leaf is never gone, also when the old session ends, and after a drain it comes back.
#[test]
fn restarted_weir_takes_its_own_leaf_over() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let state = TempDir::new().unwrap();
    let line = format!("state: \"{}\"", state.path().display());
    let first = provider_with(&net, &line);
    application(&net);
    publish(&net);
    until("it is registered", || !zookeeper.ephemerals().is_empty());
    until("it is on disk", || state.path().join("journal.json").exists());
    let (leaf, owner) = (zookeeper.ephemerals(), zookeeper.owners());
    first.kill();
    let second = provider_with(&net, &line);
    // Asked as any client asks: what is replaced in one transaction is never seen as missing.
    let (directory, name) = leaf[0].rsplit_once('/').unwrap();
    let is_there = || {
        let names = zookeeper.visit(async |client| client.list_children(directory).await.unwrap());
        assert_eq!(names, [name], "never gone");
    };
    until("another session owns it", || {
        is_there();
        zookeeper.owners() != owner
    });
    let past_the_old_session = Instant::now() + Duration::from_secs(4);
    until("the old session has ended", || {
        is_there();
        Instant::now() > past_the_old_session
    });
    second.end(&net);
    until("it is withdrawn", || zookeeper.ephemerals().is_empty());
    let third = provider_with(&net, &line);
    until("withdrawn is not forgotten", || zookeeper.ephemerals() == leaf);
    third.end(&net);
}

/// RS8: a registry that has forgotten everything is not believed while the provider answers; a consumer
/// that starts while there is no registry goes by what it knew; a provider that is really gone is out of
/// use soon.
#[test]
fn registry_that_forgets_is_not_believed_while_the_provider_answers() {
    let net = lab();
    let mut zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let state = TempDir::new().unwrap();
    let line = format!("protect: {{ empty_ms: 1000 }}\n  state: \"{}\"", state.path().display());
    let (provider, consumer) = (provider(&net), consumer_with(&net, &line));
    application(&net);
    publish(&net);
    await_endpoints(&consumer, 1);
    until("it is on disk", || state.path().join("registry-main.json").exists());
    // It accepts, and cannot register again.
    provider.signal(Signal::SIGSTOP);
    zookeeper.kill();
    zookeeper.wipe();
    zookeeper.start();
    let doubted = ["registry=\"main\"", "reason=\"empty\""];
    until("the registry is doubted", || {
        consumer.metric("weir_registry_doubted_total", &doubted) == 1
    });
    let source = |weir: &Weir| {
        let answer = weir.ask("/services").unwrap();
        let services: serde_json::Value =
            serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        let services = services.as_array().unwrap().clone();
        services.into_iter().find(|one| one["name"] == SERVICE).unwrap()["sources"][0].clone()
    };
    assert_eq!(source(&consumer)["state"], "doubted_empty");
    let later = Instant::now() + Duration::from_secs(4);
    until("it is looked at, several times", || {
        await_endpoints(&consumer, 1);
        Instant::now() > later
    });

    zookeeper.kill();
    consumer.kill();
    let consumer = consumer_with(&net, &line);
    await_endpoints(&consumer, 1);
    assert_eq!(source(&consumer)["state"], "kept", "{}", source(&consumer));
    assert_eq!(consumer.metric("weir_registry_connected", &[]), 0);
    zookeeper.start();
    until("it is doubted again", || source(&consumer)["state"] == "doubted_empty");
    await_endpoints(&consumer, 1);

    provider.kill();
    within(Duration::from_secs(5), "nobody answers there", || {
        consumer.endpoints().iter().all(|(address, ..)| address.starts_with("127."))
    });
    assert_eq!(source(&consumer)["state"], "heard");
    consumer.end(&net);
}

/// RS8: what the registry refuses is said once and counted, and stops no other publication, nor the end
/// of one; it is registered as soon as the registry lets it.
#[test]
fn refused_publication_stops_no_other() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let locked = "/sofa-rpc/com.a.AClosedService/providers";
    let read_only = [Acl::new(Permission::READ | Permission::ADMIN, AuthId::anyone())];
    zookeeper.visit(async |client| {
        let parent = CreateMode::Persistent.with_acls(Acls::anyone_all());
        client.mkdir("/sofa-rpc/com.a.AClosedService", &parent).await.unwrap();
        let options = CreateMode::Persistent.with_acls(Acls::new(&read_only));
        client.create(locked, b"", &options).await.unwrap();
    });
    let provider = provider(&net);
    application(&net);
    let ask_for = |what: &str, name: &str| {
        let mut body = service(Some("20880"));
        body["serviceName"] = name.into();
        ask(&net, Place::Server, &format!("/services/{what}"), Some(&body))
    };
    let dots = ask_for("publish", "..:1.0");
    assert_eq!(dots["success"], false, "no path can have such a part");
    for name in ["com.a.AClosedService:1.0", SERVICE, "com.a.Other:1.0"] {
        assert_eq!(ask_for("publish", name)["success"], true);
    }
    until("the others are registered", || zookeeper.ephemerals().len() == 2);
    assert_eq!(ask_for("unpublish", "com.a.Other:1.0")["success"], true);
    until("the end of one passes too", || zookeeper.ephemerals().len() == 1);
    let past_an_audit = Instant::now() + Duration::from_secs(7);
    until("it is tried again", || Instant::now() > past_an_audit);
    assert_eq!(provider.metric("weir_registry_refusals_total", &["registry=\"main\""]), 1);
    assert_eq!(provider.log().matches("not authorized").count(), 1, "{}", provider.log());
    zookeeper.visit(async |client| {
        client.set_acl(locked, &[Acl::new(Permission::ALL, AuthId::anyone())], None).await.unwrap();
    });
    within(Duration::from_secs(9), "it is registered", || zookeeper.ephemerals().len() == 2);
    provider.end(&net);
}

/// Two weirs that say they have one address do not fight for its leaf: the later one has it, the other one
/// says so, once, and does not take it away when it ends; when the later one ends, the other is back.
#[test]
fn leaf_of_another_weir_is_left_to_it() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let mut first = provider(&net);
    application(&net);
    publish(&net);
    until("it is registered", || !zookeeper.ephemerals().is_empty());
    let (leaf, owner) = (zookeeper.ephemerals(), zookeeper.owners());
    let config = format!(
        "workers: 1\ntakeover:\n  advertise: 10.98.2.2\n  inbound: \"0.0.0.0:20881\"\n  \
         app_port: 20880\n  propagation_ms: 500\n  registries: [{REGISTRY}]"
    );
    let second = || {
        let weir = Weir::run(&net, &config);
        let answer = ask(&net, Place::Node, "/services/publish", Some(&service(Some("20880"))));
        assert_eq!(answer["success"], true);
        weir
    };
    let listener = net.listen(Place::Node, APP);
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let taking = second();
    until("the second one has it", || {
        zookeeper.owners() != owner && zookeeper.ephemerals() == leaf
    });
    let taker = zookeeper.owners();
    let past_two_audits = Instant::now() + Duration::from_secs(12);
    until("they do not fight", || {
        assert_eq!((zookeeper.owners(), zookeeper.ephemerals()), (taker.clone(), leaf.clone()));
        Instant::now() > past_two_audits
    });
    assert_eq!(first.log().matches("is there a second weir").count(), 1, "{}", first.log());
    taking.end(&net);
    within(Duration::from_secs(3), "the first one is back", || zookeeper.owners() == owner);

    let taking = second();
    until("it is taken again", || zookeeper.owners() != owner && zookeeper.ephemerals() == leaf);
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait().code(), Some(0));
    assert_eq!(zookeeper.ephemerals(), leaf, "the other one's");
    taking.end(&net);
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new());
}

/// RS8: with `user` weir is somebody: it writes where only this user may, and what it writes nobody else can
/// change, though everybody may read it.
#[test]
fn what_a_user_writes_belongs_to_the_user() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    zookeeper.visit(async |client| {
        client.auth("digest", b"weir:secret").await.unwrap();
        let own = [Acl::new(Permission::ALL, AuthId::authed())];
        let own = CreateMode::Persistent.with_acls(Acls::new(&own));
        client.create("/sofa-rpc", b"", &own).await.unwrap();
    });
    let place = TempDir::new().unwrap();
    let file = place.path().join("password");
    std::fs::write(&file, "secret\n").unwrap();
    let credentials = format!(", user: weir, password_file: \"{}\" }}", file.display());
    let registry = REGISTRY.replace(" }", &credentials);
    let config = format!(
        "workers: 1\ntakeover:\n  advertise: 10.98.2.2\n  inbound: \"0.0.0.0:20881\"\n  \
         propagation_ms: 0\n  registries: [{registry}]"
    );
    let provider = Weir::run_as(net.command(Place::Server, weir()), &config);
    application(&net);
    publish(&net);
    until("it is registered", || zookeeper.ephemerals().len() == 1);
    let leaf = zookeeper.ephemerals().remove(0);
    let (parent, _) = leaf.rsplit_once('/').unwrap();
    let (read, deleted, created) = zookeeper.visit(async |client| {
        let more = format!("{parent}/bolt%3A%2F%2F10.98.2.9%3A1");
        let anybody = CreateMode::Ephemeral.with_acls(Acls::anyone_all());
        let created = client.create(&more, b"", &anybody).await.map(drop);
        let read = client.list_children(parent).await.map(|leaves| leaves.len());
        (read, client.delete(&leaf, None).await, created)
    });
    let refused = Err(zookeeper_client::Error::NoAuth);
    assert_eq!((read, &deleted, &created), (Ok(1), &refused, &refused));
    assert_eq!(provider.metric("weir_registry_refusals_total", &[]), 0);
    provider.end(&net);
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new());
}

/// With `tls` an ensemble must show who it is, and so does weir; a wrong authority is said, and the right one is
/// taken up without a restart.
#[test]
fn ensemble_and_weir_show_each_other_who_they_are() {
    let net = lab();
    let (authority, stranger) = (Authority::new("authority"), Authority::new("stranger"));
    let secure = "10.98.2.2:2281";
    let zookeeper = Zookeeper::secure(&net, Place::Server, ENSEMBLE, secure, &authority);
    let place = TempDir::new().unwrap();
    let ca = place.path().join("ca.pem");
    let [certificate, key] = authority.issue("weir", "DNS:weir.example");
    let tls = format!(
        ", tls: {{ ca: \"{}\", certificate: \"{}\", key: \"{}\" }} }}",
        ca.display(),
        certificate.display(),
        key.display()
    );
    let registry = REGISTRY.replace(ENSEMBLE, secure).replace(" }", &tls);
    let config = format!(
        "workers: 1\ntakeover:\n  advertise: 10.98.2.2\n  inbound: \"0.0.0.0:20881\"\n  \
         propagation_ms: 0\n  registries: [{registry}]"
    );
    std::fs::copy(stranger.ca(), &ca).unwrap();
    let provider = Weir::run_as(net.command(Place::Server, weir()), &config);
    application(&net);
    publish(&net);
    until("a stranger is refused", || provider.log().contains("UnknownIssuer (tls.ca"));
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new());
    std::fs::copy(authority.ca(), &ca).unwrap();
    until("it is registered", || zookeeper.ephemerals().len() == 1);
    provider.end(&net);
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new());
}

/// The client of ZooKeeper opens its connections itself, without weir's mark: where everything is captured they
/// are flows like any other. They work, and hold up neither the withdrawal nor the end.
#[test]
fn ensemble_is_reached_through_a_capture_of_everything() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let listener = net.listen(Place::Node, APP);
    std::thread::spawn(move || listener.incoming().for_each(drop));
    for mode in ["tproxy", "redirect"] {
        let config = format!(
            "workers: 1\noutbound: {{ capture: {mode} }}\ntakeover:\n  advertise: 10.98.1.1\n  \
             app_port: 20880\n  propagation_ms: 0\n  registries: [{REGISTRY}]"
        );
        let mut weir = Weir::run(&net, &config);
        let answer = ask(&net, Place::Node, "/services/publish", Some(&service(Some("20880"))));
        assert_eq!(answer["success"], true);
        until("it is registered", || zookeeper.ephemerals().len() == 1);
        let begin = Instant::now();
        weir.signal(Signal::SIGTERM);
        assert_eq!(weir.wait().code(), Some(0), "{mode}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{mode}: {:?}", begin.elapsed());
        assert_eq!(zookeeper.ephemerals(), Vec::<String>::new(), "{mode}");
    }
}
