// SPDX-License-Identifier: Apache-2.0
//! What holds for every parser: half of the bytes get the answer of all, or ask for more of them.

use std::fmt::Debug;

use weir::wire::Stop;

pub fn agree<'a, T: Debug>(bytes: &'a [u8], parse: impl Fn(&'a [u8]) -> Result<T, Stop>) {
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
}
