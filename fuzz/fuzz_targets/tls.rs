// SPDX-License-Identifier: Apache-2.0
//! The parser of `wire::tls`: no panic, and the same answer however the bytes come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::wire::{Stop, tls::parse};

fuzz_target!(|bytes: &[u8]| {
    let whole = parse(bytes).map(|found| format!("{found:?}"));
    let cut = bytes.len() / 2;
    match (parse(&bytes[..cut]), whole) {
        (Err(Stop::NeedMore(needed)), whole) => {
            assert!(needed > cut);
            assert!(needed <= bytes.len() || whole.is_err());
        }
        (Err(Stop::Bad(_)), whole) => assert!(matches!(whole, Err(Stop::Bad(_)))),
        (early, whole) => assert_eq!(early.map(|found| format!("{found:?}")), whole),
    }
});
