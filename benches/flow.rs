// SPDX-License-Identifier: Apache-2.0
//! What a flow costs beside the kernel: the time of its steps.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};

use lives::Lives;

mod lives;

fn flow(criterion: &mut Criterion) {
    let mut lives = Lives::new();
    let mut open = lives.open();
    criterion.bench_function("flow/message each way", |bencher| {
        bencher.iter(|| lives.exchange(black_box(&mut open)));
    });
    criterion.bench_function("flow/accept to close with one exchange", |bencher| {
        bencher.iter(|| {
            let mut flow = lives.open();
            lives.exchange(&mut flow) + lives.end(black_box(&mut flow))
        });
    });
}

criterion_group!(benches, flow);
criterion_main!(benches);
