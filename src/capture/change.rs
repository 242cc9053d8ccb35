// SPDX-License-Identifier: Apache-2.0
//! A capture that goes on otherwise, and one that others have changed.
//!
//! Invariant: a change that is refused leaves everything as it was, or missing, which the next look
//! notices and mends.

use std::sync::Arc;

use super::guard::{self, Guard};
use super::{
    Capture, CaptureError, Part, Plan, PreparedChange, RuleCounts, accepts_marks, nft, route,
};
use crate::bpf::{self, ConnectHook, HookError, HookPlan, Records};
use crate::sys::netlink::Changes;

impl Capture {
    /// What is missing or changed, if anything is. Costs a few system calls while nobody changes
    /// rules, routes or tables here.
    pub fn missing(&mut self) -> Option<Part> {
        if !self.table.as_mut().is_some_and(nft::Table::stands) {
            return Some(Part::Table);
        }
        if self.changes.as_mut().is_none_or(Changes::any) {
            if !self.routes.stand() {
                return Some(Part::Routes);
            }
            if self.guard.as_ref().is_some_and(|guard| !guard.stands()) {
                return Some(Part::Guard);
            }
            if let Some(changes) = &mut self.changes {
                changes.seen();
            }
        }
        let is_another = self.plan.cgroups() != self.cgroups;
        (is_another || self.hooks.iter().any(|hook| !hook.stands())).then_some(Part::Cgroup)
    }

    /// Puts back what is missing.
    ///
    /// # Errors
    ///
    /// It cannot be put back.
    pub fn mend(&mut self, part: Part) -> Result<(), CaptureError> {
        match part {
            Part::Cgroup => {
                self.retake()?;
                let gone = self.hooks.iter_mut().filter(|hook| !hook.stands());
                let attached = gone.map(ConnectHook::attach).fold(Ok(()), Result::and);
                bpf::settle(&self.hooks)?;
                attached.map_err(CaptureError::from)
            }
            Part::Guard => self.guard.as_mut().map_or(Ok(()), Guard::mend),
            // What is half there is put right, not removed first: flows need it.
            Part::Routes => self.routes.put(&self.plan.marks()),
            Part::Table => {
                self.table = None;
                self.cgroups = self.plan.cgroups();
                (self.counted_before, self.counted) = (self.total(), RuleCounts::default());
                let draft = nft::draft(&self.plan, accepts_marks())?;
                self.table = Some(nft::Table::install(&draft)?);
                Ok(())
            }
        }
    }

    /// Tries what can be tried of `plan` without a change to what is taken.
    ///
    /// # Errors
    ///
    /// The first reason why it cannot be had, with its cure.
    pub fn prepare(&self, plan: Plan) -> Result<PreparedChange, CaptureError> {
        plan.suits_host()?;
        if !plan.marks().is_empty() {
            route::preflight()?;
        }
        nft::check_beside(&nft::draft(&plan, accepts_marks())?)?;
        let mut hooks = Vec::new();
        for wanted in plan.hooks() {
            match self.hooks.iter().find(|hook| hook.port() == wanted.port) {
                Some(hook) => hook.can_take(wanted)?,
                None => hooks.push(ConnectHook::load(wanted)?),
            }
        }
        let all = self.hooks.iter().chain(&hooks);
        let records = all.map(|hook| (hook.port(), hook.records())).collect();
        Ok(PreparedChange { hooks, plan, records })
    }

    /// Takes from now on what was prepared, without a moment in which nothing is taken. Hooks that are
    /// wanted by both go on.
    ///
    /// # Errors
    ///
    /// A step was refused; what was taken before is still taken.
    pub fn change(&mut self, change: PreparedChange) -> Result<(), CaptureError> {
        let PreparedChange { hooks, plan, .. } = change;
        // Rules that nothing needs any more are inert, and stay until the end.
        self.routes.put(&plan.marks())?;
        self.hooks.extend(hooks);
        let old = std::mem::replace(&mut self.plan, plan);
        let changed = self.bring_about();
        if changed.is_err() {
            self.plan = old;
            // What is refused twice is missing, and mended or said by whoever looks next.
            let _ = self.bring_about();
        }
        changed
    }

    /// Rules and hooks as the plan says. One that is refused keeps nobody from the others.
    fn bring_about(&mut self) -> Result<(), CaptureError> {
        let draft = nft::draft(&self.plan, accepts_marks())?;
        let text = guard::text(&self.plan)?;
        // It must not refuse what is left alone from now on.
        if self.guard.is_some() {
            guard::remove()?;
        }
        // What takes more comes before what takes less: nothing slips through in between.
        let hooked = self.update_hooks(|wanted| !wanted.leaves());
        let taken = self.table.as_mut().map_or(Ok(()), |table| table.change(&draft));
        let hooked = hooked.and(self.update_hooks(HookPlan::leaves));
        let is_wanted = |hook: &ConnectHook| self.plan.hooks().any(|one| one.port == hook.port());
        self.hooks.retain(is_wanted);
        let hooked = hooked.and_then(|()| bpf::settle(&self.hooks).map(drop));
        self.guard = text.map(Guard::absent);
        let guarded = self.guard.as_mut().map_or(Ok(()), Guard::mend);
        self.cgroups = self.plan.cgroups();
        taken.and(hooked.map_err(CaptureError::from)).and(guarded)
    }

    fn update_hooks(&mut self, which: impl Fn(&HookPlan) -> bool) -> Result<(), HookError> {
        let update = |wanted: &HookPlan| {
            let hook = self.hooks.iter_mut().find(|hook| hook.port() == wanted.port);
            hook.map_or(Ok(()), |hook| hook.update(wanted))
        };
        let wanted = self.plan.hooks().filter(|wanted| which(wanted));
        wanted.map(update).fold(Ok(()), Result::and)
    }

    /// Tells nft of cgroups that were made anew; flows that are open stay taken.
    fn retake(&mut self) -> Result<(), CaptureError> {
        let cgroups = self.plan.cgroups();
        if cgroups == self.cgroups {
            return Ok(());
        }
        let draft = nft::draft(&self.plan, accepts_marks())?;
        if let Some(table) = &mut self.table {
            table.change(&draft)?;
        }
        if let (Some(guard), Some(text)) = (&mut self.guard, guard::text(&self.plan)?) {
            *guard = Guard::install(text)?;
        }
        self.cgroups = cgroups;
        Ok(())
    }
}

impl PreparedChange {
    /// As of `Prepared`: for each hook, those that there are and those that come.
    #[must_use]
    pub fn records(&self) -> &[(u16, Arc<Records>)] {
        &self.records
    }
}
