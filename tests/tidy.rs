// SPDX-License-Identifier: Apache-2.0
//! The rules of the house that a machine can hold.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every `.rs` file of ours, with its text.
fn sources() -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let mut open: Vec<_> =
        ["benches", "loadtest", "src", "tests"].iter().map(|name| root().join(name)).collect();
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                files.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    assert!(files.len() > 20, "the sources were found");
    files
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What is wrong with the shape of a file.
fn shape(text: &str) -> Option<&'static str> {
    let mut lines = text.lines();
    if lines.next() != Some("// SPDX-License-Identifier: Apache-2.0") {
        return Some("the first line must be the SPDX line");
    }
    if !lines.next().is_some_and(|line| line.starts_with("//! ")) {
        return Some("the second line must say what the file is");
    }
    (text.lines().count() > 600).then_some("is longer than 600 lines")
}

/// The modules that `module` uses although it may not.
fn forbidden(module: &str, text: &str) -> Vec<String> {
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
        return vec![format!("{module} is in no layer")];
    };
    let code: Vec<&str> =
        text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let code = code.join("\n");
    code.split("crate::")
        .skip(1)
        .flat_map(|rest| match rest.strip_prefix('{') {
            Some(list) => members(list).into_iter().map(first_word).collect(),
            None => vec![first_word(rest)],
        })
        .filter(|used| !used.is_empty() && used != module && !allowed.contains(&used.as_str()))
        .collect()
}

/// What stands between braces, the first of which is gone, piece by piece at their own level.
fn members(list: &str) -> Vec<&str> {
    let (mut depth, mut begin, mut members) = (0, 0, Vec::new());
    for (index, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                members.push(&list[begin..index]);
                begin = index + 1;
                if letter == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    members
}

fn first_word(text: &str) -> String {
    text.trim().chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect()
}

#[test]
fn every_file_begins_with_what_it_is_and_stays_short() {
    for (path, text) in sources() {
        assert_eq!(shape(&text), None, "{}", path.display());
    }
    assert!(shape("//! No licence.\n").is_some());
    assert!(shape("// SPDX-License-Identifier: Apache-2.0\nuse std::io;\n").is_some());
}

#[test]
fn modules_use_only_the_layers_below() {
    for (path, text) in sources() {
        let Ok(inner) = path.strip_prefix("src") else { continue };
        let first = inner.iter().next().unwrap().to_str().unwrap();
        let module = first.trim_end_matches(".rs");
        if matches!(module, "main" | "lib") {
            continue;
        }
        assert_eq!(forbidden(module, &text), Vec::<String>::new(), "{}", path.display());
    }
    assert_eq!(forbidden("ring", "use crate::flow::Flow;"), ["flow"]);
    assert_eq!(forbidden("flow", "use crate::{op, sys};"), ["sys"]);
    let spread = "use crate::{\n    op::{Op, ring},\n    // crate::sys\n    ring::Ring,\n};\n";
    assert_eq!(forbidden("flow", spread), ["ring"]);
    assert_eq!(forbidden("flow", "let x = (crate::op::a(), crate::sys::b());"), ["sys"]);
}

#[test]
fn unsafe_code_stays_where_it_belongs() {
    let word = concat!("unsafe", " {");
    for (path, text) in sources() {
        let allowed = ["src/ring", "src/sys", "src/bpf", "loadtest/src/engine.rs"];
        let is_allowed = allowed.iter().any(|place| path.to_str().unwrap().starts_with(place));
        assert!(is_allowed || !text.contains(word), "{}", path.display());
    }
}

#[test]
fn every_key_of_every_profile_is_explained() {
    let readme = fs::read_to_string(root().join("tuning/README.md")).unwrap();
    let explained: BTreeSet<&str> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(key, _)| key))
        .collect();
    for entry in fs::read_dir(root().join("tuning")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|end| end != "yaml") {
            continue;
        }
        let mut section = String::new();
        for line in fs::read_to_string(&path).unwrap().lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            if key.trim_start().starts_with('#') {
                continue;
            }
            if !key.starts_with(' ') && value.trim().is_empty() {
                section = format!("{key}.");
                continue;
            }
            let prefix = if key.starts_with(' ') { section.as_str() } else { "" };
            let key = format!("{prefix}{}", key.trim());
            // Which sysctls there are is the kernel's affair.
            let key = if section == "sysctls." { "sysctls".to_owned() } else { key };
            let known =
                explained.iter().any(|name| *name == key || name.starts_with(&format!("{key}.")));
            assert!(known, "{key} of {} is not in tuning/README.md", path.display());
        }
    }
}

#[test]
fn links_of_the_docs_lead_somewhere() {
    let mut files: Vec<PathBuf> = vec![root().join("README.md"), root().join("CONTRIBUTING.md")];
    files.extend(fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let is_local = !link.contains("://") && !link.starts_with('#');
            let target = file.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(!is_local || target.exists(), "{} links to {link}", file.display());
        }
    }
}

/// systemd removes a service's directory below /run when it stops, unless told otherwise; the admin
/// socket and the note of `weir tune apply` are in it.
#[test]
fn note_of_tune_outlives_a_restart_of_the_service() {
    let service = fs::read_to_string(root().join("deploy/systemd/weir.service")).unwrap();
    let has = |line| service.lines().any(|other| other == line);
    assert!(has("RuntimeDirectory=weir") && has("RuntimeDirectoryPreserve=yes"));
}

/// Who may use whom; leaves are allowed to everybody above them.
const LAYERS: [(&str, &[&str]); 20] = [
    ("addr", &[]),
    ("bpf", &["op", "sys", "addr"]),
    ("capture", &["bpf", "sys", "addr"]),
    ("cli", &["capture", "control", "config", "log", "profile", "sys", "tune", "yaml", "service"]),
    ("config", &["profile", "yaml", "addr", "service"]),
    (
        "control",
        &[
            "worker", "capture", "config", "profile", "sys", "metrics", "op", "ring", "service",
            "takeover", "addr", "bpf", "wire",
        ],
    ),
    ("exchange", &["op", "profile", "metrics", "service", "wire"]),
    ("flow", &["op", "profile"]),
    ("log", &[]),
    ("metrics", &["op"]),
    ("op", &[]),
    ("profile", &["yaml"]),
    ("ring", &["op", "sys", "profile"]),
    ("service", &["addr"]),
    ("sys", &["addr"]),
    ("tune", &["profile"]),
    (
        "worker",
        &[
            "exchange", "flow", "ring", "capture", "config", "profile", "metrics", "op", "addr",
            "sys", "service", "wire", "bpf",
        ],
    ),
    ("takeover", &["wire", "service", "addr", "config"]),
    ("wire", &[]),
    ("yaml", &[]),
];
