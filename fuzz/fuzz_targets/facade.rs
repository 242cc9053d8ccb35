// SPDX-License-Identifier: Apache-2.0
//! Frames through the façade: no panic, and every name that an application is told leads back to what the
//! registry holds, byte for byte.
#![no_main]

use std::collections::BTreeMap;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use weir::config::{Config, Layout, Tree};
use weir::takeover::{Dialogue, Names, Turn, claims, untold};
use weir::wire::zookeeper::{Answer, Piece, answer, names};

fuzz_target!(|bytes: &[u8]| {
    let Some((way, bytes)) = bytes.split_first() else { return };
    let layout = if way & 1 == 0 { Layout::Dubbo } else { Layout::Sofa };
    match way {
        0..128 => frames(layout, bytes),
        _ => list(layout, bytes),
    }
});

/// An application and a registry that say anything.
fn frames(layout: Layout, bytes: &[u8]) {
    let mut dialogue = Dialogue::default();
    let turn = Turn { claims: 0, granted: &BTreeMap::new(), real: &untold };
    let (request, answer) = bytes.split_at(bytes.len() / 2);
    for frame in [bytes, request] {
        let _ = (claims(frame), dialogue.request(&turn, frame));
    }
    for frame in [bytes, answer] {
        let _ = dialogue.answer(of(layout), &|_| None, frame);
    }
}

/// A directory with one leaf.
fn list(layout: Layout, leaf: &[u8]) {
    let Some(leaf) = std::str::from_utf8(leaf).ok().filter(|leaf| !leaf.contains('/')) else {
        return;
    };
    let directory = format!("{}/a/providers", layout.usual_root());
    let text =
        |text: &str| [&u32::try_from(text.len()).unwrap().to_be_bytes(), text.as_bytes()].concat();
    let mut dialogue = Dialogue::default();
    let request = [&[0, 0, 0, 7, 0, 0, 0, 8], &*text(&directory), &[0]].concat();
    let turn = Turn { claims: 0, granted: &BTreeMap::new(), real: &untold };
    assert_eq!(dialogue.request(&turn, &request), Ok(None));
    let head = [0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0];
    let frame = [&head[..], &[0, 0, 0, 1], &*text(leaf)].concat();
    let heard = dialogue.answer(of(layout), &|_| None, &frame).unwrap();
    assert_eq!(heard.told, u64::from(heard.frame.is_some()));
    let Some(frame) = heard.frame else { return };
    answer(&frame, Answer::Children(false), &mut |piece| {
        let Piece::Children { list, .. } = piece else { panic!("{piece:?}") };
        let told = String::from_utf8(names(list).next().unwrap().to_vec()).unwrap();
        assert_eq!(untold(&format!("{directory}/{told}")), Some(format!("{directory}/{leaf}")));
    })
    .unwrap();
}

fn of(layout: Layout) -> &'static Names {
    static BOTH: LazyLock<[Names; 2]> = LazyLock::new(|| [Layout::Dubbo, Layout::Sofa].map(made));
    &BOTH[usize::from(layout == Layout::Sofa)]
}

fn made(layout: Layout) -> Names {
    let takeover = Config::parse("weir.yaml", None, "takeover: {}").unwrap().takeover.unwrap();
    let tree = Tree {
        credentials: None,
        layout,
        root: layout.usual_root().to_owned(),
        servers: Vec::new(),
        session_timeout: std::time::Duration::ZERO,
        tls: None,
    };
    Names::new(&takeover, &tree)
}
