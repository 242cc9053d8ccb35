// SPDX-License-Identifier: Apache-2.0
//! What a change of endpoints costs: the control thread that makes a table, a worker that goes on
//! with it between two flows, and each choice of an endpoint.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use weir::service::{Balance, Directory, Endpoint, Manner, Picker, Update};

fn endpoints(count: u32) -> Vec<Endpoint> {
    let addr = |number: u32| SocketAddr::from((Ipv4Addr::from((10 << 24) + number), 80));
    (0..count).map(|number| Endpoint::new(addr(number))).collect()
}

/// Many services, each with `ENDPOINTS`.
fn directory(now: Instant) -> Directory {
    let mut directory = Directory::default();
    for number in 0..SERVICES {
        let name = format!("service-{number}");
        directory.set(&name, Manner::of(Balance::LeastFlows), endpoints(ENDPOINTS), now);
    }
    directory
}

fn table(criterion: &mut Criterion) {
    let now = Instant::now();
    let mut directory = directory(now);
    let changed = || endpoints(ENDPOINTS);
    criterion.bench_function("table/made after one service of 1000 changed", |bencher| {
        bencher.iter_batched(
            changed,
            |list| {
                directory.set("service-7", Manner::of(Balance::LeastFlows), list, now);
                directory.table()
            },
            BatchSize::SmallInput,
        );
    });
    let table = directory.table();
    let mut picker = Picker::new(Update::new(table.clone(), None), 0);
    let update = || Update::new(table.clone(), Some(&table));
    criterion.bench_function("table/swapped by a worker", |bencher| {
        bencher.iter_batched(update, |update| picker.swap(update), BatchSize::SmallInput);
    });
    let service = table.find("service-7").expect("it is there");
    criterion.bench_function("table/an endpoint chosen of 10, least flows", |bencher| {
        bencher.iter(|| {
            let pick = picker.pick(black_box(service), 0, now).expect("an endpoint");
            picker.ended(pick.endpoint);
        });
    });
}

const ENDPOINTS: u32 = 10;
const SERVICES: u32 = 1000;

criterion_group!(benches, table);
criterion_main!(benches);
