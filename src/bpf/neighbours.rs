// SPDX-License-Identifier: Apache-2.0
//! Other people's programs on the way of a workload's connects.

use std::os::fd::AsFd;
use std::path::Path;

use aya::programs::loaded_programs;

use super::HookError;
use super::links::{self, Place};
use crate::sys::cgroup;

/// A program of somebody else that sees the same connects.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Neighbour {
    /// It runs after ours, so it may lead elsewhere what we have taken.
    pub after: bool,
    /// The kernel's number, as bpftool lists it.
    pub id: u32,
    /// As it was loaded, 15 characters of it.
    pub name: String,
    /// `connect4` or `connect6`.
    pub place: &'static str,
}

/// Programs of others that the connects of `cgroup` pass, those on the cgroups above it included.
///
/// # Errors
///
/// There is no such cgroup, or we may not ask.
pub fn neighbours(cgroup: &Path) -> Result<Vec<Neighbour>, HookError> {
    let cgroup = cgroup::open(cgroup)?;
    let mut found = Vec::new();
    for (place, word) in [(Place::Connect4, "connect4"), (Place::Connect6, "connect6")] {
        let ids = links::attached(cgroup.as_fd(), place).map_err(|source| HookError::Program {
            program: word,
            said: source.to_string(),
            step: "list",
        })?;
        let named = |id| (id, name_of(id).unwrap_or_default());
        let named: Vec<(u32, String)> = ids.into_iter().map(named).collect();
        let is_ours = |name: &str| name.starts_with(OURS);
        let first = named.iter().position(|(_, name)| is_ours(name));
        for (index, (id, name)) in named.into_iter().enumerate() {
            if !is_ours(&name) {
                let after = first.is_some_and(|first| index > first);
                found.push(Neighbour { after, id, name, place: word });
            }
        }
    }
    Ok(found)
}

fn name_of(id: u32) -> Option<String> {
    let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id)?;
    program.name_as_str().map(str::to_owned)
}

/// Ours are named so.
const OURS: &str = "weir_";
