// SPDX-License-Identifier: Apache-2.0
//! What a change of endpoints costs: the control thread that makes a table of it and frees an old one, a
//! worker that goes on with it between two flows, and each choice of an endpoint.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use weir::service::{Balance, Directory, Endpoint, Manner, Picker, Table, Update};

fn endpoints(count: u32) -> Vec<Endpoint> {
    let addr = |number: u32| SocketAddr::from((Ipv4Addr::from((10 << 24) + number), 80));
    (0..count).map(|number| Endpoint::new(addr(number))).collect()
}

fn set(directory: &mut Directory, name: &str, endpoints: Vec<Endpoint>, now: Instant) {
    directory.set(name, Manner::of(Balance::LeastFlows), endpoints, now);
}

fn names() -> Vec<String> {
    (0..SERVICES).map(|number| format!("com.example.Service{number}:1.0")).collect()
}

/// Many services, each with `ENDPOINTS`.
fn directory(names: &[String], now: Instant) -> Directory {
    let mut directory = Directory::default();
    names.iter().for_each(|name| set(&mut directory, name, endpoints(ENDPOINTS), now));
    directory
}

/// The table that the control thread mails, in place of the one before, of which nobody else has
/// anything left.
fn swap(directory: &Directory, told: &mut Arc<Table>) -> Update {
    let table = directory.table();
    let update = Update::new(Arc::clone(&table), Some(told));
    *told = table;
    update
}

/// The control thread's side.
fn made(criterion: &mut Criterion) {
    let (now, names) = (Instant::now(), names());
    let mut group = criterion.benchmark_group("table of 10,000 services of 20");
    let mut book = directory(&names, now);
    let mut told = book.table();
    group.bench_function("made after one service changed", |bencher| {
        bencher.iter_batched(
            || endpoints(ENDPOINTS),
            |list| {
                set(&mut book, &names[7], list, now);
                swap(&book, &mut told)
            },
            BatchSize::PerIteration,
        );
    });
    group.bench_function("made after one service came and another went", |bencher| {
        let mut number = 0;
        bencher.iter_batched(
            || endpoints(ENDPOINTS),
            |list| {
                book.remove(&format!("another{number}"));
                number += 1;
                set(&mut book, &format!("another{number}"), list, now);
                swap(&book, &mut told)
            },
            BatchSize::PerIteration,
        );
    });
    group.sample_size(20);
    group.bench_function("made after all of them changed", |bencher| {
        bencher.iter_batched(
            || names.iter().map(|_| endpoints(ENDPOINTS)).collect::<Vec<_>>(),
            |lists| {
                names.iter().zip(lists).for_each(|(name, list)| set(&mut book, name, list, now));
                swap(&book, &mut told)
            },
            BatchSize::PerIteration,
        );
    });
}

/// A worker's.
fn used(criterion: &mut Criterion) {
    let (now, names) = (Instant::now(), names());
    let table = directory(&names, now).table();
    let mut picker = Picker::new(Update::new(Arc::clone(&table), None), 0);
    let update = || Update::new(Arc::clone(&table), Some(&table));
    let mut group = criterion.benchmark_group("table of 10,000 services of 20");
    group.bench_function("swapped by a worker", |bencher| {
        bencher.iter_batched(update, |update| picker.swap(update), BatchSize::SmallInput);
    });
    group.bench_function("a service found by name", |bencher| {
        bencher.iter(|| table.find(black_box(&names[7])));
    });
    let service = table.find(&names[7]).expect("it is there");
    group.bench_function("an endpoint chosen, least flows", |bencher| {
        bencher.iter(|| {
            let pick = picker.pick(black_box(service), 0, now).expect("an endpoint");
            picker.ended(pick.endpoint);
        });
    });
}

const ENDPOINTS: u32 = 20;
const SERVICES: u32 = 10_000;

criterion_group!(benches, made, used);
criterion_main!(benches);
