// SPDX-License-Identifier: Apache-2.0
//! The checked-in eBPF objects are what their sources say.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Always held against the source's hash; byte for byte where the same compiler is at hand.
#[test]
fn prebuilt_objects_are_built_from_their_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = tempfile::TempDir::new().unwrap();
    let output = Command::new(root.join("scripts/bpf")).arg(place.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && std::env::var_os("CI").is_none() && said.contains("not found") {
        return eprintln!("skipped: no clang here ({})", said.trim());
    }
    assert!(output.status.success(), "{said}");
    for name in ["connect.bpf.o", "sockmap.bpf.o"] {
        let (prebuilt, built) = (root.join("src/bpf/prebuilt").join(name), place.path().join(name));
        let source = |object: &Path| {
            let text = fs::read_to_string(format!("{}.source", object.display())).unwrap();
            let (hash, compiler) = text.trim().split_once('\n').unwrap();
            (hash.to_owned(), compiler.to_owned())
        };
        let ((hash, compiler), (new_hash, new_compiler)) = (source(&prebuilt), source(&built));
        assert_eq!(hash, new_hash, "the source of {name} has changed: run scripts/bpf");
        if compiler == new_compiler {
            let same = fs::read(&prebuilt).unwrap() == fs::read(&built).unwrap();
            assert!(same, "{name}: run scripts/bpf");
        }
    }
}
