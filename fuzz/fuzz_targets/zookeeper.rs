// SPDX-License-Identifier: Apache-2.0
//! Frames of `wire::zookeeper`: no panic, and every piece lies in the frame, behind the one before.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::wire::Stop;
use weir::wire::zookeeper::{Answer, Piece, answer, hello, names, request, welcome};

fuzz_target!(|bytes: &[u8]| {
    in_order(bytes, |visit| request(bytes, visit));
    for holds in [Answer::Children(true), Answer::Data, Answer::Multi, Answer::Path] {
        in_order(bytes, |visit| answer(bytes, holds, visit));
    }
    let _ = (hello(bytes), welcome(bytes));
});

fn in_order<'a>(
    bytes: &'a [u8],
    walk: impl FnOnce(&mut dyn FnMut(Piece<'a>)) -> Result<(), Stop>,
) {
    let mut end = 0;
    let _ = walk(&mut |piece| {
        let at = match piece {
            Piece::ChildCount(at) => at,
            Piece::Children { at, count, list } => {
                assert_eq!(names(list).count(), count as usize);
                at
            }
            Piece::Create(path) | Piece::List(path) | Piece::Path(path) => path.at,
            Piece::Failed => return,
        };
        assert!(at.start >= end && at.start < at.end && at.end <= bytes.len());
        end = at.end;
    });
}
