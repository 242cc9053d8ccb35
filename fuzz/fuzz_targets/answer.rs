// SPDX-License-Identifier: Apache-2.0
//! Answers of `wire::http1`: the head, and chunks that end at the same place however they are cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::wire::http1::{Chunks, parse_answer};

mod halves;

fuzz_target!(|bytes: &[u8]| {
    halves::agree(bytes, |bytes| parse_answer(bytes, false));
    let (mut whole, mut cut) = (Chunks::new(), Chunks::new());
    let eaten = whole.eat(bytes);
    let (one, other) = bytes.split_at(bytes.len() / 2);
    let parts = cut.eat(one).and_then(|first| Ok(first + cut.eat(other)?));
    assert_eq!(eaten.is_ok(), parts.is_ok());
    if eaten.is_ok() {
        assert_eq!((eaten, whole), (parts, cut));
    }
});
