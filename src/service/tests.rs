// SPDX-License-Identifier: Apache-2.0
//! What is chosen how often, what happens to who fails, and what stays when tables change.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::*;

const NAME: &str = "test";

fn addr(index: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], index))
}

/// Endpoints at `addr(1)` and on, with these weights.
fn endpoints(weights: &[u16]) -> Vec<Endpoint> {
    let endpoint =
        |(index, weight): (u16, &u16)| Endpoint { weight: *weight, ..Endpoint::new(addr(index)) };
    (1..).zip(weights).map(endpoint).collect()
}

struct Bench {
    directory: Directory,
    id: ServiceId,
    last: Arc<Table>,
    now: Instant,
    picker: Picker,
}

impl Bench {
    fn new(manner: Manner, endpoints: Vec<Endpoint>) -> Bench {
        let now = Instant::now();
        let mut directory = Directory::default();
        let id = directory.set(NAME, manner, endpoints, now);
        let last = directory.table();
        let picker = Picker::new(Update::new(Arc::clone(&last), None), 0);
        Bench { directory, id, last, now, picker }
    }

    fn of(balance: Balance, weights: &[u16]) -> Bench {
        Bench::new(Manner::of(balance), endpoints(weights))
    }

    /// As the control thread does it.
    fn swap(&mut self) {
        let table = self.directory.table();
        self.picker.swap(Update::new(Arc::clone(&table), Some(&self.last)));
        self.last = table;
    }

    fn set(&mut self, manner: Manner, endpoints: Vec<Endpoint>) {
        self.directory.set(NAME, manner, endpoints, self.now);
        self.swap();
    }

    fn pick(&mut self) -> Pick {
        self.pick_for(0).expect("an endpoint")
    }

    fn pick_for(&mut self, key: u64) -> Option<Pick> {
        self.picker.pick(self.id, key, self.now)
    }

    /// How often each port is chosen by so many flows that end at once.
    fn shares(&mut self, flows: u32) -> HashMap<u16, u32> {
        let mut shares = HashMap::new();
        for key in 0..u64::from(flows) {
            let pick = self.pick_for(order::mix(key)).expect("an endpoint");
            *shares.entry(pick.addr.port()).or_default() += 1;
            self.picker.ended(pick.endpoint);
        }
        shares
    }
}

#[test]
fn round_robin_takes_turns_and_leaves_out_the_drained() {
    let mut bench = Bench::of(Balance::RoundRobin, &[100, 0, 7]);
    assert_eq!(bench.shares(10), HashMap::from([(1, 5), (3, 5)]));
    let mut bench = Bench::of(Balance::RoundRobin, &[0, 0]);
    assert_eq!(bench.pick_for(0), None);
    assert_eq!(Bench::of(Balance::RoundRobin, &[]).pick_for(0), None);
}

#[test]
fn weighted_turns_are_exact_and_spread() {
    let mut bench = Bench::of(Balance::Weighted, &[300, 100, 0, 200]);
    let order: Vec<u16> = (0..6).map(|_| bench.pick().addr.port()).collect();
    assert_eq!(order, [1, 4, 1, 2, 4, 1], "never the heaviest three times in a row");
    assert_eq!(bench.shares(600), HashMap::from([(1, 300), (2, 100), (4, 200)]));
    // Weights that have no small common measure are rounded, and nobody is forgotten.
    let shares = Bench::of(Balance::Weighted, &[9973, 9967, 1]).shares(10_000);
    assert!(shares[&1].abs_diff(5000) < 50 && shares[&3] > 0, "{shares:?}");
}

#[test]
fn least_flows_evens_out_by_weight() {
    let mut bench = Bench::of(Balance::LeastFlows, &[100, 100, 200]);
    let picks: Vec<Pick> = (0..400).map(|_| bench.pick()).collect();
    let flows = |port| picks.iter().filter(|pick| pick.addr.port() == port).count();
    assert_eq!([flows(1), flows(2), flows(3)], [100, 100, 200]);
    for pick in picks.iter().filter(|pick| pick.addr.port() == 2) {
        bench.picker.ended(pick.endpoint);
    }
    assert!((0..50).all(|_| bench.pick().addr.port() == 2), "whoever has room is next");
}

#[test]
fn random_two_keeps_flows_even() {
    let mut bench = Bench::of(Balance::RandomTwo, &[100; 10]);
    let picks: Vec<Pick> = (0..1000).map(|_| bench.pick()).collect();
    for port in 1..=10 {
        let flows = picks.iter().filter(|pick| pick.addr.port() == port).count();
        assert!(flows.abs_diff(100) < 8, "{port} has {flows}");
    }
}

#[test]
fn consistent_hash_keeps_clients_when_endpoints_come_and_go() {
    let manner = || Manner::of(Balance::ConsistentHash);
    let mut bench = Bench::new(manner(), endpoints(&[100; 10]));
    let clients: Vec<u64> =
        (0..5000u32).map(|ip| key_of(IpAddr::V4((0x0a00_0000 + ip).into()))).collect();
    let homes = |bench: &mut Bench| -> Vec<u16> {
        clients.iter().map(|key| bench.pick_for(*key).unwrap().addr.port()).collect()
    };
    let before = homes(&mut bench);
    assert_eq!(homes(&mut bench), before);
    for port in 1..=10 {
        let share = before.iter().filter(|home| **home == port).count();
        assert!(share.abs_diff(500) < 120, "{port} has {share}");
    }
    bench.set(manner(), endpoints(&[100; 9]));
    let after = homes(&mut bench);
    let moved = before.iter().zip(&after).filter(|(old, new)| old != new && **old != 10).count();
    assert!(moved < 5000 / 20, "{moved} moved although their endpoint stayed");
    // One that fails gives its clients to all the others, and nobody else moves.
    let failing = bench.pick_for(clients[0]).unwrap();
    bench.picker.failed(failing.endpoint, bench.now);
    let without = homes(&mut bench);
    let heirs: HashSet<u16> = without
        .iter()
        .zip(&after)
        .filter(|(new, old)| new != old)
        .map(|(new, old)| {
            assert_eq!(*old, failing.addr.port());
            *new
        })
        .collect();
    assert_eq!(heirs.len(), 8, "{heirs:?}");
}

#[test]
fn who_fails_is_out_of_use_for_longer_each_time() {
    let mut bench = Bench::of(Balance::RoundRobin, &[100, 100]);
    let first = bench.pick();
    for seconds in [1, 2, 4, 8, 16, 30, 30] {
        assert!(bench.picker.failed(first.endpoint, bench.now));
        assert!(!bench.picker.failed(first.endpoint, bench.now), "it is out of use already");
        bench.now += Duration::from_millis(seconds * 1000 - 1);
        assert_eq!(bench.shares(10), HashMap::from([(2, 10)]), "for {seconds} s");
        bench.now += Duration::from_millis(1);
        assert_eq!(bench.shares(10).len(), 2, "and then it is tried again");
    }
    bench.picker.connected(first.endpoint);
    bench.picker.failed(first.endpoint, bench.now);
    bench.now += Duration::from_secs(1);
    assert_eq!(bench.shares(10).len(), 2, "an answer makes up for everything");
}

#[test]
fn last_resort_is_said_to_be_one() {
    let mut bench = Bench::of(Balance::LeastFlows, &[100, 0]);
    let only = bench.pick();
    assert!(!only.is_last_resort);
    bench.picker.failed(only.endpoint, bench.now);
    let again = bench.pick();
    assert_eq!((again.addr, again.is_last_resort), (only.addr, true));
}

#[test]
fn near_zone_comes_first_while_most_of_it_is_in_use() {
    let mut endpoints = endpoints(&[100; 6]);
    endpoints[2].zone = "a".into();
    endpoints[4].zone = "a".into();
    let manner = Manner { zone: "a".into(), ..Manner::of(Balance::RoundRobin) };
    let mut bench = Bench::new(manner.clone(), endpoints);
    assert_eq!(bench.shares(10), HashMap::from([(3, 5), (5, 5)]));
    let pick = bench.pick();
    bench.picker.failed(pick.endpoint, bench.now);
    assert_eq!(bench.shares(10).len(), 5, "one of two is too few: all help");
    let mut bench = Bench::new(manner, vec![Endpoint::new(addr(1))]);
    assert_eq!(bench.shares(10), HashMap::from([(1, 10)]), "nobody is near");
}

#[test]
fn checks_take_out_and_bring_back_slowly() {
    let manner = Manner {
        check: Some(Check { interval: Duration::from_secs(1), kind: CheckKind::Tcp }),
        slow_start: Duration::from_secs(10),
        ..Manner::of(Balance::RoundRobin)
    };
    let mut bench = Bench::new(manner, endpoints(&[100; 2]));
    assert_eq!(bench.shares(100), HashMap::from([(1, 50), (2, 50)]), "no slow start at first");
    assert!(bench.directory.set_health(addr(1), false, bench.now));
    assert!(!bench.directory.set_health(addr(1), false, bench.now), "that is no news");
    bench.swap();
    assert_eq!(bench.shares(100), HashMap::from([(2, 100)]));
    bench.directory.set_health(addr(1), true, bench.now);
    bench.swap();
    let mut last = 0;
    for seconds in [0, 5, 10] {
        let now = bench.now;
        bench.now += Duration::from_secs(seconds);
        let share = bench.shares(2000)[&1];
        assert!(share > last + 50, "after {seconds} s: {share}, before: {last}");
        (bench.now, last) = (now, share);
    }
    assert_eq!(last, 1000);
}

#[test]
fn endpoint_that_comes_back_is_new_unless_another_service_has_it() {
    let check = Some(Check { interval: Duration::from_secs(1), kind: CheckKind::Tcp });
    let manner = Manner { check, ..Manner::of(Balance::RoundRobin) };
    let mut bench = Bench::new(manner.clone(), endpoints(&[100]));
    let healthy = |bench: &Bench| {
        let service = bench.last.services().find(|service| &*service.name == NAME).unwrap();
        service.members().first().unwrap().is_healthy
    };
    bench.directory.set_health(addr(1), false, bench.now);
    bench.set(manner.clone(), Vec::new());
    bench.set(manner.clone(), endpoints(&[100]));
    assert!(healthy(&bench), "nobody had it in between");
    bench.directory.set("other", manner.clone(), endpoints(&[100]), bench.now);
    assert!(bench.directory.set_health(addr(1), false, bench.now), "that is news");
    bench.directory.remove(NAME);
    bench.set(manner, endpoints(&[100]));
    assert!(!healthy(&bench), "checks still know it as dead");
}

#[test]
fn tally_of_an_endpoint_outlives_tables_and_ends_with_it() {
    let manner = || Manner::of(Balance::LeastFlows);
    let mut bench = Bench::of(Balance::LeastFlows, &[100, 100]);
    let (one, other) = (bench.pick(), bench.pick());
    // Many more services and endpoints: the worker's lists grow.
    for number in 0..100 {
        let name = format!("service {number}");
        bench.directory.set(&name, manner(), endpoints(&[100; 7]), bench.now);
    }
    bench.set(manner(), endpoints(&[100, 100, 100]));
    let flows = |bench: &Bench| {
        let tallies = bench.picker.tallies(bench.now);
        tallies.iter().map(|tally| tally.flows).collect::<Vec<_>>()
    };
    assert_eq!(flows(&bench), [1, 1]);
    let third = bench.pick();
    assert_eq!(third.addr, addr(3), "the new one has no flow yet");
    // The first goes and a stranger gets its place: its flow's end is not the stranger's.
    bench.set(manner(), vec![Endpoint::new(addr(2)), Endpoint::new(addr(9))]);
    assert_eq!(bench.pick().addr, addr(9));
    bench.picker.ended(one.endpoint);
    bench.picker.failed(third.endpoint, bench.now);
    assert_eq!(flows(&bench), [1, 1]);
    bench.picker.ended(other.endpoint);
    assert_eq!(flows(&bench), [0, 1]);
    assert!(bench.picker.tallies(bench.now).iter().all(|tally| !tally.is_ejected));
}

#[test]
fn service_that_was_removed_is_gone_and_one_address_counts_once() {
    let mut bench = Bench::of(Balance::RoundRobin, &[100]);
    let twice = vec![Endpoint::new(addr(1)), Endpoint { weight: 5, ..Endpoint::new(addr(1)) }];
    bench.set(Manner::of(Balance::RoundRobin), twice);
    let service = bench.last.service(bench.id).unwrap();
    assert_eq!(service.members().len(), 1);
    assert_eq!(service.members()[0].endpoint.weight, 5);
    assert_eq!(bench.last.find(NAME), Some(bench.id));
    bench.directory.remove(NAME);
    bench.swap();
    assert_eq!(bench.last.find(NAME), None);
    // Its place is another one's now, which who holds the old id does not reach.
    let other =
        bench.directory.set("other", Manner::of(Balance::RoundRobin), endpoints(&[1]), bench.now);
    bench.swap();
    assert_eq!((other.index, bench.last.service(bench.id).is_none()), (bench.id.index, true));
    assert_eq!(bench.pick_for(0), None);
}
