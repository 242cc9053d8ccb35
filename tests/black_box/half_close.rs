// SPDX-License-Identifier: Apache-2.0
//! The half-close matrix: four orders, every relay, 1 B to 64 MB, readers at any speed.
//!
//! 2,000 runs, or 100,000 with `WEIR_TEST_FULL=1`. A run is what its number makes of it, and every
//! word it sends carries that number.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::scope;

use crate::harness::rig::Paced;
use crate::harness::{Net, Place, Random, Weir, check, expect_eof, rounds, send, until};
use crate::relays::RELAYS;
use crate::sockmap::exchange;

/// One run of the matrix.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Sent by who ends first, and by the other.
    bytes: [u64; 2],
    bytes_per_second: u64,
    client_ends_first: bool,
    /// A few messages in turn come first: so that the kernel may have taken the flow over by then.
    greets: bool,
    /// The other sends while the first still does, instead of after its EOF.
    both_at_once: bool,
    number: u64,
}

impl Run {
    fn new(number: u64, seconds_max: u64) -> Run {
        let mut random = Random::new(number + 77);
        for _ in 0..3 {
            random.below(2);
        }
        let bytes_per_second = match random.below(4) {
            0 => 0,
            1 => 1 << 20,
            2 => 10 << 20,
            _ => 100 << 20,
        };
        let size_max =
            if bytes_per_second == 0 { u64::MAX } else { bytes_per_second * seconds_max };
        let size = |random: &mut Random| size(random.below(1000)).min(size_max);
        Run {
            bytes: [size(&mut random), size(&mut random)],
            bytes_per_second,
            client_ends_first: number.is_multiple_of(2),
            greets: (number / 4).is_multiple_of(2),
            both_at_once: (number / 2).is_multiple_of(2),
            number,
        }
    }

    /// Every byte of both directions arrives, each with its FIN after it.
    fn live(self, client: &TcpStream, server: &TcpStream) {
        let (first, second) =
            if self.client_ends_first { (client, server) } else { (server, client) };
        if self.greets {
            exchange(client, server, 4);
        }
        scope(|scope| {
            scope.spawn(|| self.send(0, first));
            let answer = || self.send(1, second);
            let early = self.both_at_once.then(|| scope.spawn(answer));
            scope.spawn(|| self.receive(1, first));
            self.receive(0, second);
            if early.is_none() {
                answer();
            }
        });
    }

    fn send(self, from: usize, mut to: &TcpStream) {
        send(&mut to, self.seed(from), self.bytes[from])
            .unwrap_or_else(|e| panic!("{self:?}: {e}"));
        to.shutdown(Shutdown::Write).unwrap();
    }

    fn receive(self, from: usize, stream: &TcpStream) {
        let mut paced = Paced::new(stream, self.bytes_per_second);
        check(&mut paced, self.seed(from), self.bytes[from]);
        expect_eof(stream);
    }

    fn seed(self, from: usize) -> u64 {
        self.number * 2 + from as u64
    }
}

/// Of a thousand, most are small and two are as large as they come.
fn size(of_thousand: u64) -> u64 {
    match of_thousand {
        0..200 => 1,
        200..500 => 100 + of_thousand,
        500..800 => 10 * of_thousand,
        800..900 => 100 * of_thousand,
        900..990 => 1000 * of_thousand,
        990..998 => 8 << 20,
        _ => 64 << 20,
    }
}

fn matrix(relay: &str, profile: &str, runs: u64, seconds_max: u64) {
    let net = Net::new();
    let profile = format!("{{ include: balanced, {profile} }}");
    let file = tempfile::TempDir::new().unwrap();
    let path = file.path().join("matrix.yaml");
    std::fs::write(&path, profile).unwrap();
    let (listen, server) = (
        |lane: u16| format!("10.98.1.1:{}", 7100 + lane),
        |lane: u16| format!("10.98.2.2:{}", 7200 + lane),
    );
    let forward = (0..LANES).map(|lane| {
        let (listen, server) = (listen(lane), server(lane));
        format!("  - {{ name: lane{lane}, listen: \"{listen}\", endpoints: [\"{server}\"] }}\n")
    });
    let config = format!(
        "profile: {}\nworkers: 2\nforward:\n{}",
        path.display(),
        forward.collect::<String>()
    );
    let listeners: Vec<TcpListener> =
        (0..LANES).map(|lane| net.listen(Place::Server, &server(lane))).collect();
    let weir = Weir::run(&net, &config);
    let next = AtomicU64::new(0);
    scope(|scope| {
        for (lane, listener) in (0..LANES).zip(&listeners) {
            let (net, next, listen) = (&net, &next, &listen);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= runs {
                        return;
                    }
                    let client = net.connect(Place::Client, &listen(lane));
                    let (server, _) = listener.accept().unwrap();
                    Run::new(number, seconds_max).live(&client, &server);
                }
            });
        }
    });
    until("every flow has ended", || weir.active() == 0);
    assert_eq!(weir.closed("finished"), runs, "{relay}: no spurious reset");
    let way = if relay == "auto" { "splice" } else { relay };
    let moved = weir.metric("weir_bytes_total", &[&format!("relay=\"{way}\"")]);
    assert!(moved > 0, "{relay}: nothing went by {way}");
    if relay == "sockmap" {
        let joined = weir.metric("weir_relay_changes_total", &["to=\"sockmap\""]) / 2;
        assert!(joined > runs / 2, "{joined} of {runs} were given to the kernel");
    }
    weir.end(&net);
}

/// RL1: in every relay and every order both directions arrive whole, and end with FIN.
#[test]
fn half_closes_in_any_order_lose_nothing() {
    let (runs, seconds_max) = (rounds(2_000, 100_000), rounds(1, 64));
    for (relay, profile) in RELAYS {
        matrix(relay, profile, runs / RELAYS.len() as u64 + 1, seconds_max);
    }
}

/// Flows at a time.
const LANES: u16 = 24;
