// SPDX-License-Identifier: Apache-2.0
//! What it costs to read files: a config as it ships, a large one, and a profile.

use std::fmt::Write as _;
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use weir::config::{Config, DEFAULT};
use weir::profile::Profile;

/// A thousand plain listeners.
fn large() -> String {
    let mut text = "forward:\n".to_owned();
    for index in 0..1000 {
        let (high, low) = (index / 250, index % 250);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "  - {{ listen: \"127.1.{high}.{low}:9000\", endpoints: [\"127.2.0.1:9000\"] }}"
        );
    }
    text
}

fn config(criterion: &mut Criterion) {
    criterion.bench_function("config/as shipped", |bencher| {
        bencher.iter(|| Config::parse("weir.yaml", None, black_box(DEFAULT)));
    });
    let text = large();
    criterion.bench_function("config/1000 listeners", |bencher| {
        bencher.iter(|| Config::parse("weir.yaml", None, black_box(&text)));
    });
    criterion.bench_function("profile/balanced", |bencher| {
        bencher.iter(|| Profile::named(black_box("balanced")));
    });
}

criterion_group!(benches, config);
criterion_main!(benches);
