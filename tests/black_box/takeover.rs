// SPDX-License-Identifier: Apache-2.0
//! Takeover: two weirs, a provider and a consumer that know only their own one.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{
    Net, PATIENCE, Place, Weir, check, echo, expect_eof, expect_reset, send, until, weir,
};
use crate::services::{BOLT_BEAT, heart};

pub(crate) const SERVICE: &str = "com.a.DemoService:1.0";
/// The consumer's weir is in the node, the provider's in the server.
pub(crate) const OUTBOUND: &str = "127.0.0.1:12220";
const APP: &str = "127.0.0.1:20880";
const PROVIDER: &str = "10.98.2.2:20881";

/// Asks the application API as curl does it, in `place`.
pub(crate) fn ask(net: &Net, place: Place, path: &str, body: Option<&Value>) -> Value {
    let url = format!("http://127.0.0.1:13330{path}");
    let mut words = vec!["curl", "-sS", "-H", "Content-Type: text/plain", &url];
    let text = body.map(Value::to_string);
    if let Some(text) = &text {
        words.extend(["-d", text]);
    }
    serde_json::from_str(&net.run(place, &words)).unwrap()
}

pub(crate) fn service(port: Option<&str>) -> Value {
    let mut body = json!({
        "serviceName": SERVICE,
        "providerMetaInfo": { "protocol": "1", "version": "4.0", "serializeType": "hessian2", "appName": "app" },
    });
    if let Some(port) = port {
        body["port"] = port.into();
    }
    body
}

/// A Bolt request for `name`.
pub(crate) fn bolt(name: &str) -> Vec<u8> {
    let mut bytes = vec![1, 1, 0, 1, 1, 0, 0, 0, 7, 1, 0, 0, 0x0b, 0xb8, 0, 0];
    bytes.extend(u16::try_from(name.len() + 15).unwrap().to_be_bytes());
    bytes.extend([0, 0, 0, 5, 0, 0, 0, 7]);
    bytes.extend(b"service");
    bytes.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
    bytes.extend(name.bytes());
    bytes.extend(b"hello");
    bytes
}

/// Waits until the service has so many endpoints in this weir.
pub(crate) fn await_endpoints(weir: &Weir, count: usize) {
    until("the registry's word arrives", || {
        weir.endpoints().iter().filter(|(address, ..)| !address.starts_with("127.")).count()
            == count
    });
}

/// T1 to T4: the registry holds the inbound address, the consumer is told the outbound address, and a
/// call reaches the application through both weirs; T5: a provider that dies leaves the registry.
#[test]
fn call_goes_through_both_sidecars() {
    let net = Net::new();
    let provider = Weir::run_as(
        net.command(Place::Server, weir()),
        "workers: 1\ntakeover: { advertise: 10.98.2.2, inbound: \"0.0.0.0:20881\" }",
    );
    let lab = tempfile::TempDir::new().unwrap();
    let registry = lab.path().join("services.yaml");
    let config = format!(
        "workers: 1\ntakeover: {{ protect: {{ empty_ms: 300 }}, registries: [{{ kind: file, path: \"{}\" }}] }}",
        registry.display()
    );
    let consumer = Weir::run(&net, &config);

    let app = json!({ "appName": "app", "antShareCloud": false });
    assert_eq!(ask(&net, Place::Server, "/configs/application", Some(&app))["success"], true);
    let published = ask(&net, Place::Server, "/services/publish", Some(&service(Some("20880"))));
    assert_eq!(published, json!({ "success": true, "errorMessage": "" }));
    let known = || ask(&net, Place::Server, "/services", None);
    ask(&net, Place::Server, "/services/subscribe", Some(&service(None)));
    assert_eq!(known()[SERVICE], json!([]), "the application is not there yet");
    let listener = net.listen(Place::Server, APP);
    let expected = "10.98.2.2:20881?_TIMEOUT=3000&p=1&_SERIALIZETYPE=hessian2&app_name=app&v=4.0";
    until("the provider is registered", || {
        let all = known()[SERVICE].to_string();
        assert!(!all.contains("20880"), "never the application's own port: {all}");
        all.contains(expected)
    });

    // Nobody carries the word from registry to registry here but this file.
    let entry = format!(
        "services: [{{ name: \"{SERVICE}\", parameters: \"v=4.0\", endpoints: [\"{PROVIDER}\"] }}]"
    );
    std::fs::write(&registry, entry).unwrap();
    let subscribed = ask(&net, Place::Node, "/services/subscribe", Some(&service(None)));
    assert_eq!(subscribed["success"], true);
    await_endpoints(&consumer, 1);
    let subscribed = ask(&net, Place::Node, "/services/subscribe", Some(&service(None)));
    assert_eq!(subscribed["datas"], json!(["127.0.0.1:12220?v=4.0"]));

    exchange(net.connect(Place::Node, OUTBOUND), &listener);
    until("both have counted it", || provider.opened() == 1 && consumer.opened() == 1);
    assert_eq!(
        consumer
            .metric("weir_flows_opened_total", &["capture=\"takeover\"", "direction=\"outbound\""]),
        1
    );
    assert_eq!(
        provider
            .metric("weir_flows_opened_total", &["capture=\"takeover\"", "direction=\"inbound\""]),
        1
    );

    drop(listener);
    until("a dead provider leaves the registry", || known()[SERVICE] == json!([]));
    std::fs::write(&registry, "services: []").unwrap();
    await_endpoints(&consumer, 0);
    let mut orphan = net.connect(Place::Node, OUTBOUND);
    orphan.write_all(&bolt(SERVICE)).unwrap();
    let mut refusal = [0; 20];
    orphan.read_exact(&mut refusal).unwrap();
    assert_eq!(
        (refusal[1], &refusal[10..12]),
        (0, &[0, 6][..]),
        "nobody processes it: {refusal:?}"
    );
    assert_eq!(consumer.metric("weir_requests_total", &["outcome=\"no_endpoint\""]), 1);
    drop(orphan);
    consumer.end(&net);
    provider.end(&net);
}

/// With `check: bolt` an application that accepts and does not answer is not published, and is withdrawn if it
/// was.
#[test]
fn application_that_hangs_is_withdrawn() {
    let net = Net::new();
    let weir = Weir::run(
        &net,
        "workers: 1\ntakeover: { advertise: 10.98.2.1, check: bolt, check_interval_ms: 1000 }",
    );
    let (beat, answer) = BOLT_BEAT;
    let heart = heart(net.listen(Place::Node, APP), beat, answer);
    heart.hangs.store(true, Ordering::Relaxed);
    ask(&net, Place::Node, "/services/publish", Some(&service(Some("20880"))));
    ask(&net, Place::Node, "/services/subscribe", Some(&service(None)));
    let published = || ask(&net, Place::Node, "/services", None)[SERVICE] != json!([]);
    let several_looks = Instant::now() + Duration::from_secs(3);
    until("it is looked at", || {
        assert!(!published());
        Instant::now() > several_looks
    });
    heart.hangs.store(false, Ordering::Relaxed);
    until("it is published", published);
    heart.hangs.store(true, Ordering::Relaxed);
    until("it is withdrawn", || !published());
    weir.end(&net);
}

/// A request that comes byte by byte arrives whole, and so does the answer.
pub(crate) fn exchange(mut client: TcpStream, listener: &TcpListener) {
    let request = bolt(SERVICE);
    client.set_nodelay(true).unwrap();
    for byte in &request {
        client.write_all(std::slice::from_ref(byte)).unwrap();
    }
    // The looking at the application's port is a connection too.
    let mut received = vec![0; request.len()];
    let mut server = loop {
        let mut server = accept(listener);
        if server.read_exact(&mut received).is_ok() {
            break server;
        }
    };
    assert!(received == request);
    let answer =
        [&[1, 0, 0, 2, 1, 0, 0, 0, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6][..], b"answer"].concat();
    server.write_all(&answer).unwrap();
    let mut back = vec![0; answer.len()];
    client.read_exact(&mut back).unwrap();
    assert!(back == answer);
    client.shutdown(std::net::Shutdown::Write).unwrap();
    expect_eof(&client);
}

/// The next connection, if one comes.
pub(crate) fn accept(listener: &TcpListener) -> TcpStream {
    let mut found = None;
    listener.set_nonblocking(true).unwrap();
    until("a connection comes", || {
        found = listener.accept().ok();
        found.is_some()
    });
    listener.set_nonblocking(false).unwrap();
    let (stream, _) = found.unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A service with an address of its own: no byte is read, so the server may speak first. What the config
/// says is known to the first client already.
#[test]
fn service_with_an_address_of_its_own_is_opaque() {
    let net = Net::new();
    let listener = net.listen(Place::Server, "10.98.2.2:7001");
    let weir = Weir::run(
        &net,
        "workers: 1\ntakeover:\n  registries: [{ services: [{ name: redis, endpoints: [\"10.98.2.2:7001\"] }] }]\n  services: [{ name: redis, listen: \"127.0.0.2:6379\" }]",
    );
    let mut client = net.connect(Place::Node, "127.0.0.2:6379");
    let mut server = accept(&listener);
    server.write_all(b"+hello\r\n").unwrap();
    let mut greeting = [0; 8];
    client.read_exact(&mut greeting).unwrap();
    drop(server);
    drop(client);
    echo(listener);
    let mut client = net.connect(Place::Node, "127.0.0.2:6379");
    send(&mut client, 1, 100_000).unwrap_or_else(|error| panic!("{error}"));
    check(&mut client, 1, 100_000);
    drop(client);
    weir.end(&net);
}

/// TLS goes where its name says; what is not known, broken or silent goes nowhere and is counted.
#[test]
fn tls_goes_by_its_name_and_a_stranger_goes_nowhere() {
    let net = Net::new();
    let listener = net.listen(Place::Server, "10.98.2.2:7001");
    let weir = Weir::run(
        &net,
        "workers: 1\ntakeover:\n  registries: [{ services: [{ name: web.example, endpoints: [\"10.98.2.2:7001\"] }] }]\n  services: [{ name: web.example }]",
    );
    echo(listener);
    let request = hello("web.example");
    let mut client = net.connect(Place::Node, OUTBOUND);
    client.write_all(&request).unwrap();
    let mut back = vec![0; request.len()];
    client.read_exact(&mut back).unwrap();
    assert!(back == request);
    drop(client);
    let strangers = [hello("x"), b"\0\0\0\x05abcd".to_vec()];
    for (index, request) in strangers.iter().enumerate() {
        let mut client = net.connect(Place::Node, OUTBOUND);
        client.write_all(request).unwrap();
        expect_reset(&mut client);
        assert_eq!(weir.denied("unknown_service"), index as u64 + 1);
    }
    let mut half = net.connect(Place::Node, OUTBOUND);
    half.write_all(&hello("web.example")[..20]).unwrap();
    half.shutdown(std::net::Shutdown::Write).unwrap();
    expect_reset(&mut half);
    assert_eq!(weir.denied("no_request"), 1, "half a request and then the end");
    let gone = net.connect(Place::Node, OUTBOUND);
    drop(gone);
    let waits = net.connect(Place::Node, OUTBOUND);
    until("the others are gone", || weir.active() == 0);
    assert_eq!(weir.opened(), 1);
    drop(waits);
    weir.end(&net);
}

/// A ClientHello with nothing in it but the host's name.
fn hello(host: &str) -> Vec<u8> {
    let len = |bytes: usize| u16::try_from(bytes).unwrap().to_be_bytes();
    let name = [&[0][..], &len(host.len()), host.as_bytes()].concat();
    let list = [&len(name.len())[..], &name].concat();
    let extension = [&[0, 0][..], &len(list.len()), &list].concat();
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    body.extend(len(extension.len()));
    body.extend(extension);
    let message = [&[1, 0][..], &len(body.len()), &body].concat();
    [&[0x16, 3, 1][..], &len(message.len()), &message].concat()
}

/// The API in Dubbo's shape, and what it refuses.
#[test]
fn application_api_speaks_both_shapes_and_says_why_not() {
    let net = Net::new();
    let weir = Weir::run(&net, "workers: 1\ntakeover: { advertise: 10.98.2.1 }");
    let registry = json!({ "type": "zookeeper", "addr": "127.0.0.1:2181" });
    let dubbo = json!({
        "registry": registry,
        "service": { "interface": "com.a.Demo", "methods": ["plus"], "version": "1.0", "port": 20880 },
    });
    let listener = net.listen(Place::Node, APP);
    let done = json!({ "err_no": 0, "err_msg": "" });
    assert_eq!(ask(&net, Place::Node, "/pub", Some(&dubbo)), done);
    assert_eq!(ask(&net, Place::Node, "/sub", Some(&dubbo)), done);
    let known = || ask(&net, Place::Node, "/services/com.a.Demo:1.0", None);
    until("it is registered", || {
        known()[0].as_str().is_some_and(|text| text.starts_with("10.98.2.1:12201?"))
    });
    assert_eq!(ask(&net, Place::Node, "/unpub", Some(&dubbo)), done);
    assert_eq!(known(), json!([]));
    assert_eq!(ask(&net, Place::Node, "/unsub", Some(&dubbo)), done);
    let refused = ask(&net, Place::Node, "/services/publish", Some(&service(Some("12201"))));
    assert_eq!(refused["success"], false);
    assert!(refused["errorMessage"].as_str().unwrap().contains("weir's own"), "{refused}");
    let broken = ask(&net, Place::Node, "/services/subscribe", Some(&json!({ "name": 1 })));
    assert_eq!(broken["success"], false);
    let large = json!({ "serviceName": "a".repeat(100_000) });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, large.to_string()).unwrap();
    let data = format!("@{}", file.path().display());
    let words = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "-d",
        &data,
        "http://127.0.0.1:13330/services/subscribe",
    ];
    assert_eq!(net.run(Place::Node, &words), "413");
    drop(listener);
    weir.end(&net);
}
