// SPDX-License-Identifier: Apache-2.0
//! The parser of `wire::tls`: no panic, and the same answer however the bytes come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::wire::tls::parse;

mod halves;

fuzz_target!(|bytes: &[u8]| halves::agree(bytes, parse));
