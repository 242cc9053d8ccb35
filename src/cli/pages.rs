// SPDX-License-Identifier: Apache-2.0
//! `weir completions` and `weir man`.

use std::path::Path;

use super::{Failure, command, print};

pub(super) fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command(), "weir", &mut text);
    print(&String::from_utf8_lossy(&text))
}

pub(super) fn man(directory: &Path) -> Result<(), Failure> {
    let failed = |error| Failure::Failed(format!("write to {}: {error}", directory.display()));
    std::fs::create_dir_all(directory).map_err(failed)?;
    clap_mangen::generate_to(command(), directory).map_err(failed)
}
