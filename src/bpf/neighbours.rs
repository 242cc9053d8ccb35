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
    let mut found = Vec::new();
    let mut ours_came = [false; 2];
    for (place, id, name) in on_the_way(cgroup)? {
        let came = &mut ours_came[usize::from(place == PLACES[1].1)];
        if is_ours(&name) {
            *came = true;
        } else {
            found.push(Neighbour { after: *came, id, name, place });
        }
    }
    Ok(found)
}

/// All programs that connects of `cgroup` pass, in their order: place, number and name.
pub(super) fn on_the_way(cgroup: &Path) -> Result<Vec<(&'static str, u32, String)>, HookError> {
    let cgroup = cgroup::open(cgroup)?;
    let mut all = Vec::new();
    for (place, word) in PLACES {
        let ids = links::attached(cgroup.as_fd(), place).map_err(|source| HookError::Program {
            program: word,
            said: source.to_string(),
            step: "list",
        })?;
        all.extend(ids.into_iter().map(|id| (word, id, name_of(id).unwrap_or_default())));
    }
    Ok(all)
}

pub(super) fn is_ours(name: &str) -> bool {
    name.starts_with(OURS)
}

/// Those of the programs that are ours.
pub(super) fn ours_of(ids: &[u32]) -> Vec<u32> {
    let all =
        loaded_programs().filter_map(Result::ok).filter(|program| ids.contains(&program.id()));
    let ours = all.filter(|program| program.name_as_str().is_some_and(is_ours));
    ours.map(|program| program.id()).collect()
}

fn name_of(id: u32) -> Option<String> {
    let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id)?;
    program.name_as_str().map(str::to_owned)
}

/// Ours are named so.
const OURS: &str = "weir_";
const PLACES: [(Place, &str); 2] = [(Place::Connect4, "connect4"), (Place::Connect6, "connect6")];
