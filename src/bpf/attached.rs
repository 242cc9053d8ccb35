// SPDX-License-Identifier: Apache-2.0
//! The hook's programs on their cgroups: attached, attached to more, let go of, found missing.
//!
//! Whose connects are taken has all programs on it; a cgroup that is named no more keeps those that show
//! its connections what they dialled.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::Program;

use super::control::Pulse;
use super::pins::{self, Pins};
use super::{ConnectHook, HookError, HookPlan, PARTS, Part, links, number_of, program_error};
use crate::sys::{cgroup, process};

/// The programs on one cgroup.
pub(super) struct Attached {
    pub(super) cgroup: File,
    pub(super) links: Vec<(&'static Part, OwnedFd)>,
    path: PathBuf,
}

impl ConnectHook {
    /// Begins to take connects of every cgroup that is there and not taken yet: at first, again when
    /// one was made anew, and when there are more. What an earlier weir left pinned is taken over without a gap.
    ///
    /// # Errors
    ///
    /// A cgroup is not there, or the kernel refuses a program.
    pub fn attach(&mut self) -> Result<(), HookError> {
        if self.pulse.is_none() {
            let failed = |source| HookError::Pulse { source, step: "start the pulse" };
            self.pulse = Some(Pulse::start(&self.control).map_err(failed)?);
        }
        self.attached.retain(Attached::stands);
        let mut result = Ok(());
        for path in self.paths.clone() {
            let index = self.attached.iter().position(|attached| attached.path == path);
            let attached = match index.map(|index| self.attached.remove(index)) {
                Some(attached) => self.complete(attached),
                None => self.attach_to(&path),
            };
            result = result.and(attached.map(|attached| self.attached.push(attached)));
        }
        result
    }

    /// From now on connects of these cgroups are taken, and meet these filters: there is no moment
    /// without any. Connections that were taken already stay, and those of cgroups that are not named
    /// any more still get the peer name that they dialled.
    ///
    /// # Errors
    ///
    /// A cgroup is not there, or the filters do not fit; then the old ones stay in force, and more
    /// cgroups may be taken than were.
    pub fn update(&mut self, plan: &HookPlan) -> Result<(), HookError> {
        let old = std::mem::replace(&mut self.paths, plan.cgroups.clone());
        // One that has gone by itself is taken up again when it is there.
        let attached =
            self.attach().or_else(|error| match self.paths.iter().all(|path| old.contains(path)) {
                true => Ok(()),
                false => Err(error),
            });
        let updated = attached.and_then(|()| self.filters.update(&plan.filters));
        if updated.is_err() {
            self.paths = old;
        }
        for attached in &mut self.attached {
            if !self.paths.contains(&attached.path) {
                attached.links.retain(|(part, _)| !part.redirects);
            }
        }
        updated
    }

    /// Every cgroup of `plan` that it does not take yet is there.
    ///
    /// # Errors
    ///
    /// One is not.
    pub fn can_take(&self, plan: &HookPlan) -> Result<(), HookError> {
        let mut new = plan.cgroups.iter().filter(|path| !self.paths.contains(path));
        Ok(new.try_for_each(|path| cgroup::open(path).map(drop))?)
    }

    /// Every cgroup at its path is the one to which the programs are attached.
    #[must_use]
    pub fn stands(&self) -> bool {
        let is_taken = |path: &PathBuf| {
            let attached = self.attached.iter().find(|attached| attached.path == *path);
            attached.is_some_and(|attached| attached.is_whole() && attached.stands())
        };
        self.paths.iter().all(is_taken)
    }

    fn attach_to(&self, path: &Path) -> Result<Attached, HookError> {
        let cgroup = cgroup::open(path)?;
        self.complete(Attached { cgroup, links: Vec::new(), path: path.to_owned() })
    }

    /// With every program that is not there yet. What makes records and names goes before what
    /// redirects.
    fn complete(&self, mut attached: Attached) -> Result<Attached, HookError> {
        if attached.is_whole() {
            return Ok(attached);
        }
        let pins = Pins::find();
        let number = number_of(&attached.cgroup);
        for part in PARTS {
            if attached.links.iter().any(|(there, _)| there.name == part.name) {
                continue;
            }
            let refused = |source: io::Error| HookError::Program {
                program: part.name,
                said: source.to_string(),
                step: "attach",
            };
            let program = self.program(part)?;
            let place = pins.as_ref().zip(number).filter(|_| part.redirects);
            let place = place.map(|(pins, number)| pins.place(self.namespace, number, part.name));
            let left = place.zip(number).and_then(|(place, number)| pins::adopt(&place, number));
            let link = match left {
                Some(link) => links::update(link.as_fd(), program).map(|()| link),
                None => links::create(program, attached.cgroup.as_fd(), part.place),
            };
            attached.links.push((part, link.map_err(refused)?));
            process::made(part.name);
        }
        Ok(attached)
    }

    fn program(&self, part: &Part) -> Result<BorrowedFd<'_>, HookError> {
        let program = self.bpf.program(part.name).ok_or(HookError::Built(part.name))?;
        let fd = match program {
            Program::CgroupSockAddr(program) => program.fd(),
            Program::SockOps(program) => program.fd(),
            _ => return Err(HookError::Built(part.name)),
        };
        fd.map(AsFd::as_fd).map_err(|error| program_error(part.name, "attach", &error))
    }
}

impl Attached {
    /// Its connects are taken.
    fn is_whole(&self) -> bool {
        self.links.len() == PARTS.len()
    }

    fn stands(&self) -> bool {
        cgroup::open(&self.path).is_ok_and(|now| number_of(&now) == number_of(&self.cgroup))
    }
}
