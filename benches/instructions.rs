// SPDX-License-Identifier: Apache-2.0
//! Instructions, counted: the same on every run, so that a regression fails.
//!
//! A limit that is exceeded is either a mistake to mend or a cost to accept: then the new limit
//! says so in the commit.
#![expect(missing_docs, unused_qualifications, reason = "written by the macros")]

use std::hint::black_box;

use gungraun::prelude::*;
use gungraun::{Callgrind, EventKind, LibraryBenchmarkConfig};
use weir::config::{Config, DEFAULT};
use weir::flow::Flow;

use lives::Lives;

mod lives;

fn relaying() -> (Lives, Flow) {
    let mut lives = Lives::new();
    let flow = lives.open();
    (lives, flow)
}

#[library_benchmark(config = limit(195_000))]
#[bench::a_hundred(setup = relaying)]
fn messages_each_way((mut lives, mut flow): (Lives, Flow)) -> usize {
    (0..100).map(|_| lives.exchange(black_box(&mut flow))).sum()
}

#[library_benchmark(config = limit(443_000))]
#[bench::a_hundred(setup = Lives::new)]
fn whole_lives(mut lives: Lives) -> usize {
    let mut live = || {
        let mut flow = lives.open();
        lives.exchange(&mut flow) + lives.end(black_box(&mut flow))
    };
    (0..100).map(|_| live()).sum()
}

#[library_benchmark(config = limit(720_000))]
fn config_as_shipped() -> bool {
    Config::parse("weir.yaml", None, black_box(DEFAULT)).is_ok()
}

/// At most so many instructions.
fn limit(instructions: u64) -> LibraryBenchmarkConfig {
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(Callgrind::default().hard_limits([(EventKind::Ir, instructions)]));
    config
}

library_benchmark_group!(
    name = pure,
    benchmarks = [messages_each_way, whole_lives, config_as_shipped]
);
main!(library_benchmark_groups = pure);
