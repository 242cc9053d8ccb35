// SPDX-License-Identifier: Apache-2.0
//! Takeover of applications that know nothing of it: they have weir's façade for their ZooKeeper, and a
//! client library that nobody here has written.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use zookeeper_client::{
    Acls, AddWatchMode, Client, CreateMode, CreateOptions, Error, EventType, SessionInfo,
};

use crate::harness::{Net, Place, Weir, Zookeeper, expect_eof, until, weir};
use crate::takeover::{accept, await_endpoints, exchange};

const ENSEMBLE: &str = "10.98.2.2:2181";
const FACADE: &str = "127.0.0.1:12181";
const APP: &str = "127.0.0.1:20880";
const OUTBOUND: &str = "127.0.0.1:20882";
const DIRECTORY: &str = "/sofa-rpc/com.a.DemoService/providers";
/// The provider as it writes itself, as the registry holds it, and as its consumers are told.
const OWN: &str = "bolt%3A%2F%2F10.98.2.2%3A20880%3Fversion%3D1.0%26appName%3Dapp";
const HELD: &str = "bolt%3A%2F%2F10.98.2.2%3A20881%3Fversion%3D1.0%26appName%3Dapp";
const TOLD: &str =
    "bolt%3A%2F%2F127.0.0.1%3A20882%3Fversion%3D1.0%26appName%3Dapp%26weir.at%3D10.98.2.2%3A20881";

fn lab() -> Net {
    let net = Net::new();
    net.set(Place::Node, "net.ipv4.tcp_fin_timeout=5");
    net
}

/// The provider's weir in the server and the consumer's in the node differ in nothing that matters here.
fn weir_in(net: &Net, place: Place, line: &str) -> Weir {
    weir_below(net, place, "/sofa-rpc", line)
}

fn weir_below(net: &Net, place: Place, root: &str, line: &str) -> Weir {
    let advertise = if matches!(place, Place::Server) { "advertise: 10.98.2.2" } else { "" };
    let config = format!(
        "workers: 2\ntakeover:\n  inbound: \"0.0.0.0:20881\"\n  outbound: \"{OUTBOUND}\"\n  \
         propagation_ms: 300\n  facade: {{ listen: \"{FACADE}\" }}\n  registries: [{{ name: main, kind: \
         zookeeper, servers: [\"{ENSEMBLE}\"], session_timeout_ms: 2000, root: {root} }}]\n  {advertise}\n  {line}"
    );
    Weir::run_as(net.command(place, weir()), &config)
}

/// An application: its client lives while something is done with it.
struct App<'a> {
    client: Client,
    net: &'a Net,
    place: Place,
    runtime: Runtime,
}

impl<'a> App<'a> {
    /// With a session that is not ended when this is dropped.
    fn start(net: &'a Net, place: Place) -> App<'a> {
        App::connect(net, place, FACADE, None).unwrap()
    }

    fn resume(net: &'a Net, place: Place, session: SessionInfo) -> Result<App<'a>, Error> {
        App::connect(net, place, FACADE, Some(session))
    }

    fn connect(
        net: &'a Net,
        place: Place,
        address: &str,
        session: Option<SessionInfo>,
    ) -> Result<App<'a>, Error> {
        let (runtime, client) = net.within(place, || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut connector =
                Client::connector().with_session_timeout(Duration::from_secs(10)).with_detached();
            if let Some(session) = session {
                connector = connector.with_session(session);
            }
            let client = runtime.block_on(connector.connect(address));
            (runtime, client)
        });
        Ok(App { client: client?, net, place, runtime })
    }

    fn does<T: Send>(&self, work: impl AsyncFnOnce(&Client) -> T + Send) -> T {
        self.net.within(self.place, || self.runtime.block_on(work(&self.client)))
    }

    fn enter(&self, leaf: &str) -> Result<(), Error> {
        self.does(async |client| {
            client.mkdir(DIRECTORY, &parents()).await?;
            client.create(&at(leaf), b"data", &ephemeral()).await.map(drop)
        })
    }

    fn list(&self) -> Vec<String> {
        let mut list = self.does(async |client| client.list_children(DIRECTORY).await.unwrap());
        list.sort();
        list
    }

    /// The library comes back by itself when the server does; what it asks meanwhile is lost.
    fn list_again(&self) -> Vec<String> {
        let list = self.does(async |client| {
            loop {
                match client.list_children(DIRECTORY).await {
                    Err(Error::ConnectionLoss) => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    list => return list,
                }
            }
        });
        list.unwrap()
    }

    /// The connection breaks; the session may live on.
    fn leave(self) -> SessionInfo {
        let App { client, net, place, runtime } = self;
        let session = client.session().clone();
        net.within(place, || drop((client, runtime)));
        session
    }
}

fn at(leaf: &str) -> String {
    format!("{DIRECTORY}/{leaf}")
}

fn parents() -> CreateOptions<'static> {
    CreateMode::Persistent.with_acls(Acls::anyone_all())
}

fn ephemeral() -> CreateOptions<'static> {
    CreateMode::Ephemeral.with_acls(Acls::anyone_all())
}

/// A call from outside gets to the application.
fn arrives(net: &Net, listener: &TcpListener) {
    let mut client = net.connect(Place::Server, "10.98.2.2:20881");
    client.write_all(b"call").unwrap();
    let mut bytes = [0; 4];
    // The looking at the application's port is a connection too.
    while accept(listener).read_exact(&mut bytes).is_err() {}
    assert_eq!(&bytes, b"call");
}

/// T1 to T5: two applications with nothing but another registry address. The registry holds the provider's
/// weir and never its own port; it sees itself as it is, its consumer sees the consumer's weir, and its first
/// call, as soon as it is told, crosses both.
#[test]
fn application_is_taken_over_by_its_registrys_address_alone() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let (server, node) = (weir_in(&net, Place::Server, ""), weir_in(&net, Place::Node, ""));
    let listener = net.listen(Place::Server, APP);
    let provider = App::start(&net, Place::Server);
    provider.enter(OWN).unwrap();
    assert_eq!(zookeeper.ephemerals(), [at(HELD)]);
    assert_eq!(provider.list(), [OWN], "it sees itself as it is");

    let consumer = App::start(&net, Place::Node);
    let list = consumer.list();
    exchange(net.connect(Place::Node, OUTBOUND), &listener);
    assert_eq!(list, [TOLD]);
    consumer.does(async |client| {
        let (data, stat) = client.get_data(&at(TOLD)).await.unwrap();
        assert_eq!((data.as_slice(), stat.num_children), (b"data".as_slice(), 0));
        assert_eq!(client.get_children(DIRECTORY).await.unwrap().1.num_children, 1);
        assert!(client.check_stat(&at(HELD)).await.unwrap().is_some(), "by its own name");
        assert!(client.check_stat(&at(OWN)).await.unwrap().is_none());
        let mut reader = client.new_multi_reader();
        reader.add_get_data(&at(TOLD)).unwrap();
        assert_eq!(reader.commit().await.unwrap().len(), 1);
        let acls = client.get_acl(&at(TOLD)).await.unwrap().0;
        assert_eq!(acls.len(), 1);
    });
    for (weir, labels, count) in [
        (&server, "address=\"inbound\"", 1),
        (&node, "address=\"direct\"", 0),
        (&node, "address=\"refused\"", 0),
    ] {
        assert_eq!(weir.metric("weir_facade_providers_total", &[labels]), count, "{labels}");
    }
    assert!(node.metric("weir_facade_providers_total", &["address=\"outbound\""]) >= 2);
    assert_eq!(node.metric("weir_facade_sessions", &[]), 1);
    assert_eq!((server.opened(), node.opened()), (1, 1));

    // It goes: whoever watches hears so, by the name that was told.
    let (gone, below) = consumer.does(async |client| {
        let gone = client.get_and_watch_data(&at(TOLD)).await.unwrap().2;
        (gone, client.watch(DIRECTORY, AddWatchMode::PersistentRecursive).await.unwrap())
    });
    provider.does(async |client| client.delete(&at(OWN), None).await.unwrap());
    let mut below = below;
    consumer.does(async |_| {
        let event = gone.changed().await;
        assert_eq!((event.event_type, event.path.as_str()), (EventType::NodeDeleted, &*at(TOLD)));
        assert_eq!(below.changed().await.path, at(TOLD));
    });
    assert_eq!(consumer.list(), Vec::<String>::new());
    // In one transaction, and through the other way to make a node.
    provider.does(async |client| {
        let mut writer = client.new_multi_writer();
        writer.add_create(&at(OWN), b"", &ephemeral()).unwrap();
        writer.commit().await.unwrap();
    });
    assert_eq!((consumer.list(), provider.list()), (vec![TOLD.into()], vec![OWN.into()]));
    // Who dies without a word is forgotten with its session.
    provider.leave();
    consumer.does(async |client| {
        while !client.list_children(DIRECTORY).await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new());
    let history = zookeeper.history();
    assert!(history.contains("20881") && !history.contains("20880"), "ever");
    drop((consumer, listener));
    node.end(&net);
    server.end(&net);
}

/// A session is the application's own: it outlives a lost connection and a registry that was killed, and the
/// application still sees itself as it is.
#[test]
fn session_outlives_its_connection_and_its_server() {
    let net = lab();
    let mut zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let weir = weir_in(&net, Place::Server, "");
    let _listener = net.listen(Place::Server, APP);
    let app = App::start(&net, Place::Server);
    app.enter(OWN).unwrap();
    let session = app.leave();
    let app = App::resume(&net, Place::Server, session).unwrap();
    assert_eq!(app.list(), [OWN]);
    let node = weir_in(&net, Place::Node, "");
    let consumer = App::start(&net, Place::Node);
    let gone = consumer.does(async |client| client.get_and_watch_data(&at(TOLD)).await.unwrap().2);
    zookeeper.kill();
    until("the connection ends with the server", || weir.metric("weir_facade_sessions", &[]) == 0);
    zookeeper.start();
    assert_eq!(app.list_again(), [OWN]);
    assert_eq!(consumer.list_again(), [TOLD]);
    app.does(async |client| client.delete(&at(OWN), None).await.unwrap());
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new());
    // The watch has come back with the connection.
    let event = consumer.does(async |_| gone.changed().await);
    assert_eq!((event.event_type, event.path.as_str()), (EventType::NodeDeleted, &*at(TOLD)));
    app.enter(OWN).unwrap();
    assert_eq!(zookeeper.ephemerals(), [at(HELD)]);
    assert_eq!(weir.metric("weir_facade_expired_total", &[]), 0);
    drop((app, consumer));
    node.end(&net);
    weir.end(&net);
}

/// A weir that was killed and kept nothing: sessions that it does not know are ended, with what they had
/// entered, so the application begins anew. With `state` they go on, and calls arrive before the application
/// has said a word.
#[test]
fn restarted_weir_goes_on_with_sessions_or_ends_them() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let listener = net.listen(Place::Server, APP);
    let weir = weir_in(&net, Place::Server, "");
    let app = App::start(&net, Place::Server);
    app.enter(OWN).unwrap();
    let session = app.leave();
    weir.kill();
    let state = TempDir::new().unwrap();
    let line = format!("state: \"{}\"", state.path().display());
    let weir = weir_in(&net, Place::Server, &line);
    let resumed = App::resume(&net, Place::Server, session).map(drop);
    assert_eq!(resumed.unwrap_err(), Error::SessionExpired);
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new(), "nothing stands in its way");
    assert_eq!(weir.metric("weir_facade_expired_total", &[]), 1);

    let app = App::start(&net, Place::Server);
    app.enter(OWN).unwrap();
    assert_eq!(app.list(), [OWN]);
    until("it is on disk", || {
        let journal = std::fs::read_to_string(state.path().join("journal.json"));
        journal.is_ok_and(|journal| journal.contains("20880"))
    });
    let session = app.leave();
    weir.kill();
    let weir = weir_in(&net, Place::Server, &line);
    until("it leads to the application", || {
        weir.endpoints().iter().any(|(address, ..)| address == APP)
    });
    arrives(&net, &listener);
    let app = App::resume(&net, Place::Server, session).unwrap();
    assert_eq!(app.list(), [OWN]);

    // A weir that drains takes away what was entered, serves who still arrives, and its successor lets
    // the application know.
    let mut weir = weir;
    weir.signal(Signal::SIGTERM);
    let session = app.does(async |client| {
        while client.list_children(DIRECTORY).await.is_ok_and(|list| !list.is_empty()) {}
        client.session().clone()
    });
    assert_eq!(zookeeper.ephemerals(), Vec::<String>::new());
    let journal = std::fs::read_to_string(state.path().join("journal.json")).unwrap();
    assert!(!journal.contains("20880"), "a successor would take it for entered: {journal}");
    // Who had not heard of it yet is served.
    arrives(&net, &listener);
    assert_eq!(weir.wait().code(), Some(0));
    drop(app);
    let weir = weir_in(&net, Place::Server, &line);
    let resumed = App::resume(&net, Place::Server, session).map(drop);
    assert_eq!(resumed.unwrap_err(), Error::SessionExpired);
    assert!(!zookeeper.history().contains("20880"), "ever");
    weir.end(&net);
}

/// Another root by the application's chroot, and access rules that bind to who it says it is: both are the
/// registry's own business.
#[test]
fn chroot_and_access_rules_pass() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    zookeeper.visit(async |client| client.mkdir("/mesh", &parents()).await.unwrap());
    let root = "/mesh/sofa-rpc";
    let server = weir_below(&net, Place::Server, root, "");
    let node = weir_below(&net, Place::Node, root, "");
    let listener = net.listen(Place::Server, APP);
    let address = format!("{FACADE}/mesh");
    let provider = App::connect(&net, Place::Server, &address, None).unwrap();
    provider.does(async |client| {
        client.auth("digest", b"me:secret").await.unwrap();
        client.mkdir(DIRECTORY, &parents()).await.unwrap();
        let own = CreateMode::Ephemeral.with_acls(Acls::creator_all());
        client.create(&at(OWN), b"", &own).await.unwrap();
    });
    assert_eq!(zookeeper.ephemerals(), [format!("/mesh{}", at(HELD))]);
    let consumer = App::connect(&net, Place::Node, &address, None).unwrap();
    assert_eq!((consumer.list(), provider.list()), (vec![TOLD.into()], vec![OWN.into()]));
    exchange(net.connect(Place::Node, OUTBOUND), &listener);
    consumer.does(async |client| {
        assert_eq!(client.get_data(&at(TOLD)).await.unwrap_err(), Error::NoAuth);
        client.auth("digest", b"me:secret").await.unwrap();
        client.get_data(&at(TOLD)).await.unwrap();
    });
    drop((consumer, provider, listener));
    node.end(&net);
    server.end(&net);
}

/// What cannot be taken over is not entered at all, and everything else goes on: a second application port, a
/// host that has no address to say, the port of weir itself.
#[test]
fn provider_that_cannot_be_taken_over_is_refused() {
    let net = lab();
    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let (server, node) = (weir_in(&net, Place::Server, ""), weir_in(&net, Place::Node, ""));
    let listener = net.listen(Place::Server, APP);
    let (app, other) = (App::start(&net, Place::Server), App::start(&net, Place::Server));
    app.enter(OWN).unwrap();
    for port in ["20999", "20881", "12181"] {
        let refused = other.enter(&OWN.replace("20880", port)).unwrap_err();
        assert_eq!(refused, Error::BadArguments(&"server error"), "{port}");
    }
    // A name that stands for the application's own port is no way around.
    let told = TOLD.replace("10.98.2.2%3A20881", "10.98.2.2%3A20880");
    assert_eq!(other.enter(&told).unwrap_err(), Error::BadArguments(&"server error"));
    other.enter(&OWN.replace("appName%3Dapp", "appName%3Dother")).unwrap();
    let nowhere = App::start(&net, Place::Node);
    assert_eq!(nowhere.enter(OWN).unwrap_err(), Error::BadArguments(&"server error"));
    assert_eq!(nowhere.list().len(), 2);
    assert_eq!(server.metric("weir_facade_providers_total", &["address=\"refused\""]), 4);
    assert!(server.log().contains("calls from outside already lead to port 20880"));
    assert!(node.log().contains("set takeover.advertise"), "{}", node.log());
    assert_eq!(zookeeper.ephemerals().len(), 2);
    // A first port that has lost its connections still has callers: a second one would get their calls. What
    // another session has entered under that name, too, is no reason to make it.
    drop((app.leave(), other.leave()));
    let later = App::start(&net, Place::Server);
    for _ in 0..2 {
        let refused = later.enter(&OWN.replace("20880", "20999")).unwrap_err();
        assert_eq!(refused, Error::BadArguments(&"server error"));
    }
    later.enter(&OWN.replace("appName%3Dapp", "appName%3Dlater")).unwrap();
    let history = zookeeper.history();
    assert!(!history.contains("20880") && !history.contains("20999"), "ever");
    drop((later, nowhere, listener));
    node.end(&net);
    server.end(&net);
}

/// Nobody can make weir keep what has no end, and a registry that is not there is not there for the
/// application either.
#[test]
fn connection_that_leads_nowhere_ends() {
    let net = lab();
    let weir = weir_in(&net, Place::Node, "");
    let mut client = net.connect(Place::Node, FACADE);
    client.write_all(&(1u32 << 30).to_be_bytes()).unwrap();
    expect_eof(&client);
    drop(client);
    let mut client = net.connect(Place::Node, FACADE);
    let hello = [&45u32.to_be_bytes()[..], &[0; 24], &16u32.to_be_bytes(), &[0; 17]].concat();
    client.write_all(&hello).unwrap();
    expect_eof(&client);
    drop(client);
    assert_eq!(weir.metric("weir_facade_sessions", &[]), 0);
    assert!(weir.log().contains("no server of the registry answers"), "{}", weir.log());

    let zookeeper = Zookeeper::started(&net, Place::Server, ENSEMBLE);
    let app = App::start(&net, Place::Node);
    app.does(async |client| client.mkdir(DIRECTORY, &parents()).await.unwrap());
    // Of another protocol, and of a host that is a name: told as they are.
    zookeeper.visit(async |client| {
        for leaf in ["rest%3A%2F%2F10.98.2.2%3A1", "bolt%3A%2F%2Fhost%3A1", "lock"] {
            client.create(&at(leaf), b"", &ephemeral()).await.unwrap();
        }
        assert_eq!(app.list().len(), 3);
    });
    assert_eq!(weir.metric("weir_facade_providers_total", &["address=\"direct\""]), 2);
    await_endpoints(&weir, 0);
    drop(app);
    weir.end(&net);
}
