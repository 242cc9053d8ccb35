// SPDX-License-Identifier: Apache-2.0
//! The parser of `wire::http1`: no panic, and the same answer however the bytes come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::wire::http1::parse;

mod halves;

fuzz_target!(|bytes: &[u8]| halves::agree(bytes, parse));
