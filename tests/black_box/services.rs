// SPDX-License-Identifier: Apache-2.0
//! Services: which endpoint gets a flow, and what happens when one dies.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{Cgroup, Net, PATIENCE, Place, Weir, run, until};
use crate::outbound::{says, servers};

const LISTEN: &str = "10.98.1.1:7000";
const SERVERS: [&str; 3] = ["10.98.2.2:7001", "10.98.2.2:7002", "10.98.2.2:7003"];

/// A server that says its number and holds the connection until the client goes; dies with the
/// returned process.
fn provider(net: &Net, number: usize) -> std::process::Child {
    let port = SERVERS[number].rsplit_once(':').unwrap().1;
    let listen = format!("TCP4-LISTEN:{port},bind=10.98.2.2,reuseaddr,fork,backlog=1024");
    let mut command = net.command(Place::Server, "socat");
    let system = format!("SYSTEM:printf {number}; exec cat >/dev/null");
    let child = command.args([&listen, &system]).spawn().unwrap();
    until("the provider listens", || net.try_connect(Place::Server, SERVERS[number]).is_ok());
    child
}

/// Which provider answers.
fn ask(net: &Net) -> (TcpStream, char) {
    let mut stream = net.connect(Place::Client, LISTEN);
    let mut number = [0];
    stream.read_exact(&mut number).unwrap();
    (stream, char::from(number[0]))
}

fn state(weir: &Weir, server: &str) -> String {
    weir.endpoints().into_iter().find(|(address, ..)| address == server).unwrap().1
}

/// TP7: what weir itself says to endpoints is never captured, even from the cgroup whose connects it
/// takes: a check is no flow, and one flow is one flow.
#[test]
fn own_checks_and_dials_are_never_captured() {
    let net = Net::new();
    let _providers = (provider(&net, 0), provider(&net, 1));
    for mode in ["connect", "tproxy", "redirect"] {
        let cgroup = Cgroup::new();
        let endpoints = format!("endpoints: [\"{}\", \"{}\"]", SERVERS[0], SERVERS[2]);
        let config = format!(
            "workers: 1\noutbound: {{ capture: {mode}, workload: {{ cgroup: {} }} }}\n\
             forward: [{{ listen: \"{LISTEN}\", check_interval_ms: 50, {endpoints} }}]",
            cgroup.path
        );
        let weir =
            Weir::run_as(cgroup.command(&net, Place::Node, &[crate::harness::weir()]), &config);
        until("a check has found out", || state(&weir, SERVERS[2]) == "unhealthy");
        assert_eq!(weir.opened(), 0, "{mode}: a check is no flow");
        assert_eq!(ask(&net).1, '0');
        until("the flow has ended", || weir.active() == 0);
        assert_eq!((weir.opened(), weir.metric("weir_denied_total", &[])), (1, 0), "{mode}");
        until("direct connections are gone", || net.sockets().is_empty());
        weir.end(&net);
    }
}

/// A provider that is killed is out of use within a second, nobody sees its death but its own
/// flows, and it is back in use soon after it is back.
#[test]
fn killed_provider_is_out_of_use_within_a_second() {
    let net = Net::new();
    let (mut dying, mut other) = (provider(&net, 0), provider(&net, 1));
    let endpoints = format!("endpoints: [\"{}\", \"{}\"]", SERVERS[0], SERVERS[1]);
    let config = format!("workers: 1\nforward: [{{ listen: \"{LISTEN}\", {endpoints} }}]");
    let weir = Weir::run(&net, &config);
    let answers: Vec<char> = (0..4).map(|_| ask(&net).1).collect();
    assert_eq!(answers.iter().filter(|number| **number == '0').count(), 2, "{answers:?}");
    dying.kill().unwrap();
    dying.wait().unwrap();
    let killed = Instant::now();
    while state(&weir, SERVERS[0]) == "in_use" {
        assert_eq!(ask(&net).1, '1', "nobody notices");
        assert!(killed.elapsed() < Duration::from_secs(1), "it is out of use by now");
    }
    assert_eq!(state(&weir, SERVERS[0]), "ejected");
    assert_eq!(weir.closed("connect_refused"), 0);
    assert!(weir.metric("weir_connects_retried_total", &[]) >= 1);
    let mut back = provider(&net, 0);
    until("it is in use again", || ask(&net).1 == '0');
    assert_eq!(state(&weir, SERVERS[0]), "in_use");
    for child in [&mut back, &mut other] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    weir.end(&net);
}

/// Active checks find a dead endpoint although no flow was sent there, and find it again.
#[test]
fn checks_find_the_dead_before_a_flow_does() {
    let net = Net::new();
    let one = net.listen(Place::Server, SERVERS[0]);
    let endpoints = format!("endpoints: [\"{}\", \"{}\"]", SERVERS[0], SERVERS[1]);
    let config = format!(
        "workers: 1\nforward: [{{ listen: \"{LISTEN}\", {endpoints}, check_interval_ms: 50 }}]"
    );
    let weir = Weir::run(&net, &config);
    until("the dead one is found", || state(&weir, SERVERS[1]) == "unhealthy");
    assert_eq!(state(&weir, SERVERS[0]), "in_use");
    let other = net.listen(Place::Server, SERVERS[1]);
    until("it is found again", || state(&weir, SERVERS[1]) == "in_use");
    assert_eq!(weir.opened(), 0, "checks are no flows");
    drop((one, other));
    weir.end(&net);
}

/// A provider that answers every heartbeat on every connection, until it hangs: then it takes connections and
/// says nothing. A heartbeat has as many bytes as `beat`.
pub(crate) fn heart(listener: TcpListener, beat: usize, answer: &'static [u8]) -> Arc<Heart> {
    let heart = Arc::new(Heart::default());
    let own = Arc::clone(&heart);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, heart) = (stream.unwrap(), Arc::clone(&own));
            std::thread::spawn(move || {
                let mut heard = vec![0; beat];
                while stream.read_exact(&mut heard).is_ok() && !heart.hangs.load(Ordering::Relaxed)
                {
                    heart.beats.fetch_add(1, Ordering::Relaxed);
                    // Who asks may have gone.
                    let _ = stream.write_all(answer);
                }
                // Nothing more is said, and the connection stays.
                let _ = stream.read_to_end(&mut heard);
            });
        }
    });
    heart
}

#[derive(Default)]
pub(crate) struct Heart {
    pub(crate) beats: AtomicU64,
    pub(crate) hangs: AtomicBool,
}

/// What a provider says to the heartbeat of a check, and how long that is.
pub(crate) const BOLT_BEAT: (usize, &[u8]) =
    (22, &[1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
const DUBBO_BEAT: (usize, &[u8]) =
    (17, &[0xda, 0xbb, 0x22, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, b'N']);

/// A provider that accepts and does not answer heartbeats is out of use within two looks and the time that
/// each may take, here 800 ms; it is back when it answers, and checks are no flows.
#[test]
fn provider_that_hangs_is_found_by_its_heartbeat() {
    for (kind, (beat, answer)) in [("bolt", BOLT_BEAT), ("dubbo", DUBBO_BEAT)] {
        let net = Net::new();
        let hearts =
            [0, 1].map(|number| heart(net.listen(Place::Server, SERVERS[number]), beat, answer));
        let config = format!(
            "workers: 1\nforward: [{{ listen: \"{LISTEN}\", check: {kind}, check_interval_ms: 200, \
             endpoints: [\"{}\", \"{}\"] }}]",
            SERVERS[0], SERVERS[1]
        );
        let weir = Weir::run(&net, &config);
        until("both are looked at", || {
            hearts.iter().all(|heart| heart.beats.load(Ordering::Relaxed) > 2)
        });
        assert_eq!([0, 1].map(|number| state(&weir, SERVERS[number])), ["in_use", "in_use"]);
        hearts[0].hangs.store(true, Ordering::Relaxed);
        let hung = Instant::now();
        until("it is out of use", || state(&weir, SERVERS[0]) == "unhealthy");
        assert!(hung.elapsed() < Duration::from_secs(2), "{kind}: {:?}", hung.elapsed());
        assert_eq!(state(&weir, SERVERS[1]), "in_use", "{kind}");
        hearts[0].hangs.store(false, Ordering::Relaxed);
        until("it is in use again", || state(&weir, SERVERS[0]) == "in_use");
        assert_eq!(weir.opened(), 0, "checks are no flows");
        weir.end(&net);
    }
}

/// An endpoint that was found dead, was taken out and comes back is in use as soon as it lives.
#[test]
fn endpoint_that_died_and_left_comes_back_as_a_new_one() {
    let net = Net::new();
    let one = net.listen(Place::Server, SERVERS[0]);
    let config = |endpoints: &str| {
        format!(
            "workers: 1\nforward: [{{ listen: \"{LISTEN}\", endpoints: [{endpoints}], \
             check_interval_ms: 50 }}]"
        )
    };
    let (both, alone) =
        (format!("\"{}\", \"{}\"", SERVERS[0], SERVERS[1]), format!("\"{}\"", SERVERS[0]));
    let weir = Weir::run(&net, &config(&both));
    until("the dead one is found", || state(&weir, SERVERS[1]) == "unhealthy");
    assert!(weir.reload(&config(&alone)), "{}", weir.log());
    let other = net.listen(Place::Server, SERVERS[1]);
    assert!(weir.reload(&config(&both)), "{}", weir.log());
    until("it is in use", || state(&weir, SERVERS[1]) == "in_use");
    drop(other);
    until("it is found dead once more", || state(&weir, SERVERS[1]) == "unhealthy");
    drop(one);
    weir.end(&net);
}

/// Weights and drain by weight 0, with real connections; open flows are counted by endpoint.
#[test]
fn weights_share_connections_out() {
    let net = Net::new();
    let listeners: Vec<TcpListener> =
        SERVERS.iter().map(|server| net.listen(Place::Server, server)).collect();
    let endpoint = |number: usize, weight: u16| {
        format!("{{ addr: \"{}\", weight: {weight} }}", SERVERS[number])
    };
    let endpoints = [endpoint(0, 300), endpoint(1, 100), endpoint(2, 0)].join(", ");
    let forward =
        format!("{{ listen: \"{LISTEN}\", balance: weighted, endpoints: [{endpoints}] }}");
    let weir = Weir::run(&net, &format!("workers: 1\nforward: [{forward}]"));
    let mut flows: Vec<TcpStream> = (0..400).map(|_| net.connect(Place::Client, LISTEN)).collect();
    until("all are flows", || weir.active() == 400);
    let counts = || weir.endpoints().into_iter().map(|(.., flows)| flows).collect::<Vec<_>>();
    assert_eq!(counts(), [300, 100, 0]);
    assert_eq!(state(&weir, SERVERS[2]), "drained");
    let services = weir.ask("/services").unwrap();
    assert!(services.contains("\"endpoints\":3,\"flows\":400,\"in_use\":2"), "{services}");
    let socket = weir.socket();
    let shown = |verb| run(&[crate::harness::weir(), verb, "--socket", socket.to_str().unwrap()]);
    assert!(shown("endpoints").contains("300 in_use         300  -\n"), "{}", shown("endpoints"));
    assert!(shown("services").contains("weighted                3      2      400  -\n"));
    flows[0].write_all(b"x").unwrap();
    flows.clear();
    drop(listeners);
    until("flows leave the count", || counts() == [0, 0, 0]);
    weir.end(&net);
}

/// The same client reaches the same endpoint over any number of workers.
#[test]
fn consistent_hash_is_the_same_for_every_worker() {
    let net = Net::new();
    let listeners: Vec<TcpListener> =
        SERVERS.iter().map(|server| net.listen(Place::Server, server)).collect();
    let endpoints = SERVERS.map(|server| format!("\"{server}\"")).join(", ");
    let forward =
        format!("{{ listen: \"{LISTEN}\", balance: consistent_hash, endpoints: [{endpoints}] }}");
    let weir = Weir::run(&net, &format!("workers: 2\nforward: [{forward}]"));
    let flows: Vec<TcpStream> = (0..60).map(|_| net.connect(Place::Client, LISTEN)).collect();
    until("all are flows", || weir.active() == 60);
    let mut counts: Vec<u64> = weir.endpoints().into_iter().map(|(.., flows)| flows).collect();
    counts.sort_unstable();
    assert_eq!(counts, [0, 0, 60]);
    drop((flows, listeners));
    weir.end(&net);
}

/// TK8: an application under capture dials a service's virtual address, at which nobody is, and gets an
/// endpoint from the registry, another one when the first is dead; with none it is reset, and what is not
/// virtual goes where it was dialled.
#[test]
fn captured_dial_of_a_virtual_address_gets_an_endpoint() {
    let net = Net::new();
    servers(&net);
    let place = tempfile::TempDir::new().unwrap();
    let file = place.path().join("services.yaml");
    let registry = |endpoints: &str| {
        let new = place.path().join("new");
        std::fs::write(&new, format!("services: [{{ name: \"a:1\", endpoints: [{endpoints}] }}]"))
            .unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    for mode in ["connect", "redirect", "tproxy"] {
        registry("\"10.98.2.2:9\", \"10.98.2.2:80\"");
        let cgroup = Cgroup::new();
        let config = format!(
            "workers: 1\noutbound: {{ capture: {mode}, workload: {{ cgroup: {} }} }}\n\
             takeover: {{ protect: off, registries: [{{ kind: file, path: \"{}\" }}], \
             services: [{{ name: \"a:1\", virtual: \"10.98.2.77:6379\" }}] }}",
            cgroup.path,
            file.display()
        );
        let weir = Weir::run(&net, &config);
        let count =
            |weir: &Weir| weir.endpoints().iter().filter(|one| one.0.starts_with("10.")).count();
        until("the registry is read", || count(&weir) == 2);
        let dial = "dial(V4, ('10.98.2.77', 6379))";
        for _ in 0..3 {
            assert_eq!(says(&cgroup, &net, dial), "10.98.2.77 6379 10.98.2.2:80", "{mode}");
        }
        let direct = says(&cgroup, &net, "dial(V4, ('10.98.2.2', 80))");
        assert_eq!(direct, "10.98.2.2 80 10.98.2.2:80", "{mode}");
        registry("");
        until("nobody is there", || count(&weir) == 0);
        let refused = "try:\n s = socket.socket(V4); s.connect(('10.98.2.77', 6379)); print(s.recv(1))\n\
                       except OSError as error: print(type(error).__name__)";
        assert_eq!(says(&cgroup, &net, refused), "ConnectionResetError", "{mode}");
        assert_eq!(weir.denied("no_endpoint"), 1, "{mode}");
        weir.end(&net);
    }
}

/// Drain by weight 0 under load: a registry says it while connections come without a pause; those that are
/// open go on, new ones go to the other endpoint, and nobody is refused or reset.
#[test]
fn weight_0_drains_an_endpoint_under_load() {
    let net = Net::new();
    let _providers = (provider(&net, 0), provider(&net, 1));
    let place = tempfile::TempDir::new().unwrap();
    let file = place.path().join("services.yaml");
    let say = |weight: u16| {
        let new = place.path().join("new");
        let drained = format!("{{ addr: \"{}\", weight: {weight} }}", SERVERS[0]);
        let text = format!("services: [{{ name: a, endpoints: [{drained}, \"{}\"] }}]", SERVERS[1]);
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    say(100);
    let config = format!(
        "workers: 2\ntakeover: {{ registries: [{{ kind: file, path: \"{}\" }}], \
         services: [{{ name: a, listen: \"{LISTEN}\" }}] }}",
        file.display()
    );
    let weir = Weir::run(&net, &config);
    until("both are in use", || {
        weir.endpoints().iter().filter(|one| one.1 == "in_use").count() == 2
    });
    let (mut open, _) =
        std::iter::repeat_with(|| ask(&net)).find(|(_, number)| *number == '0').unwrap();
    let is_over = AtomicBool::new(false);
    // Also if a check fails meanwhile, the load ends.
    let deadline = Instant::now() + PATIENCE;
    std::thread::scope(|scope| {
        let load = || {
            let mut answers = 0_u32;
            while !is_over.load(Ordering::Relaxed) && Instant::now() < deadline {
                assert!(matches!(ask(&net).1, '0' | '1'), "who comes is served");
                answers += 1;
            }
            answers
        };
        let loads = [scope.spawn(load), scope.spawn(load)];
        say(0);
        until("it is drained", || state(&weir, SERVERS[0]) == "drained");
        // Both workers have the new table once the old one's connections have all been answered.
        until("only the open one is left", || {
            let flows = |one: &(String, String, u64)| one.0 == SERVERS[0] && one.2 == 1;
            weir.endpoints().iter().any(flows)
        });
        for _ in 0..50 {
            assert_eq!(ask(&net).1, '1', "new connections go elsewhere");
        }
        is_over.store(true, Ordering::Relaxed);
        for load in loads {
            assert!(load.join().unwrap() > 0, "there was load");
        }
    });
    open.write_all(b"still there").unwrap();
    assert_eq!(weir.closed("connect_refused") + weir.denied("no_endpoint"), 0);
    drop(open);
    weir.end(&net);
}
