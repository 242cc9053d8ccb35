// SPDX-License-Identifier: Apache-2.0
//! What a look-up among the connect hook's networks costs: in the hook's own map, with few and with
//! as many networks as a large policy has. Needs CAP_BPF.
//!
//! From user space each look-up is a syscall, which the hook has not: an array's look-up stands
//! beside them, and what is above it is the search.

use std::hint::black_box;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, MapData};
use criterion::{Criterion, criterion_group, criterion_main};

/// As shared.h has it after the prefix length: set, family, address.
type Network = [u8; 24];

fn network(address: u32) -> Network {
    let mut key = [0; 24];
    key[4..8].copy_from_slice(&4u32.to_ne_bytes());
    key[8..12].copy_from_slice(&address.to_be_bytes());
    key
}

fn networks(criterion: &mut Criterion) {
    let object = include_bytes!("../src/bpf/prebuilt/connect.bpf.o");
    let Ok(mut bpf) = Ebpf::load(object) else {
        eprintln!("networks: skipped: no BPF map can be made (needs CAP_BPF)");
        return;
    };
    let mut map = |name| bpf.take_map(name).expect("a map of the hook");
    let ports: Array<MapData, u64> = Array::try_from(map("ports")).expect("an array");
    let mut trie: LpmTrie<MapData, Network, u32> =
        LpmTrie::try_from(map("include_nets")).expect("a trie");
    criterion.bench_function("networks/the syscall alone", |bencher| {
        bencher.iter(|| ports.get(black_box(&7), 0));
    });
    let mut there = 0;
    for count in COUNTS {
        for number in there..count {
            trie.insert(&Key::new(PREFIX, network(FIRST + (number << 8))), 1, 0).expect("room");
        }
        there = count;
        let mut number = 0;
        criterion.bench_function(&format!("networks/one of {count}"), |bencher| {
            bencher.iter(|| {
                // Not the same one again and again: a cache would have it.
                number = (number + STEP) % count;
                let found = trie.get(&Key::new(WHOLE, network(FIRST + (number << 8) + 9)), 0);
                assert!(found.is_ok(), "every address is in a network");
            });
        });
    }
}

/// Networks of a small, a usual and a very large policy.
const COUNTS: [u32; 3] = [1, 100, 10_000];
/// 10.0.0.0, then a /24 after the other.
const FIRST: u32 = 10 << 24;
/// Set and family, then 24 bits of the address.
const PREFIX: u32 = 64 + 24;
/// Prime to every count.
const STEP: u32 = 7919;
const WHOLE: u32 = 64 + 32;

criterion_group!(benches, networks);
criterion_main!(benches);
