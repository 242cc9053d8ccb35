// SPDX-License-Identifier: Apache-2.0
//! How traffic gets here without the application's knowledge: install, watch, undo.
//!
//! `Plan` says what to take; `install` does it as the last step of a start, and dropping the
//! `Capture` undoes it in reverse. Whatever changes traffic hangs on a descriptor of this process
//! (an owned nft table, links of BPF programs), so the kernel undoes it too when we are killed.
//! Changes nothing outside the network namespace it is called in, and no sysctl.

use std::io;
use std::sync::Arc;

use crate::bpf::{self, ConnectHook, HookError};
use crate::sys::cgroup::CgroupError;
use crate::sys::netlink::Changes;
use crate::sys::process;

use guard::Guard;

pub use crate::bpf::{Filters, HookPlan, Losses, Neighbour, Records, neighbours};
pub use own_ports::OwnPorts;
pub use plan::{Inbound, Netfilter, Outbound, Plan, Way, Workload};
pub use route::Step;
pub use rules::{Kind, Left, Rule, State, clear, conntrack_use, leftovers};
pub use source_ports::{PortCounts, SourcePorts};

mod change;
mod connect;
mod guard;
mod nft;
mod own_ports;
mod plan;
mod redirect;
mod route;
mod rules;
mod source_ports;
mod tproxy;

/// Traffic can be taken, and everything that can be refused was granted; none is taken yet.
#[derive(Debug)]
pub struct Prepared {
    draft: nft::Draft,
    hooks: Vec<ConnectHook>,
    plan: Plan,
}

/// What is taken can become this, and everything that can be refused was granted; nothing is changed
/// yet.
#[derive(Debug)]
pub struct PreparedChange {
    /// Those that are not there yet.
    hooks: Vec<ConnectHook>,
    plan: Plan,
    /// See `Prepared::records`.
    records: Vec<(u16, Arc<Records>)>,
}

/// Traffic is being taken. Dropping it lets traffic go its own way again.
#[derive(Debug)]
pub struct Capture {
    /// As nft knows them.
    cgroups: Vec<Option<u64>>,
    /// Of rules, routes and tables in this network namespace; `None` where nobody tells.
    changes: Option<Changes>,
    /// By the table that stands, when it was last asked.
    counted: RuleCounts,
    /// By tables that stood before it.
    counted_before: RuleCounts,
    guard: Option<Guard>,
    hooks: Vec<ConnectHook>,
    plan: Plan,
    routes: route::Routes,
    /// What this start made that would outlive us.
    stays: Stays,
    table: Option<nft::Table>,
}

/// What a start made for `on_exit: closed`; what an earlier weir had left is not in it.
#[derive(Debug, Default)]
struct Stays {
    guard: bool,
    pins: bpf::NewPins,
}

/// A part of a capture that can go missing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// A workload's cgroup, and our programs with it.
    Cgroup,
    /// The nft table that refuses.
    Guard,
    /// The way of marked packets.
    Routes,
    /// The nft table that takes.
    Table,
}

impl Part {
    /// All parts.
    pub const ALL: [Part; 4] = [Part::Cgroup, Part::Guard, Part::Routes, Part::Table];

    /// For labels of metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Part::Cgroup => "cgroup",
            Part::Guard => "guard",
            Part::Routes => "routes",
            Part::Table => "table",
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Cgroup => "workload's cgroup",
            Part::Guard => "nft table that refuses",
            Part::Routes => "fwmark rule",
            Part::Table => "nft table",
        })
    }
}

/// What the rules counted since capture began.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RuleCounts {
    /// Our own dials that somebody's rule led back to us: refused (redirect).
    pub looped: u64,
    /// Outbound connections that went directly, because no more flows could be remembered (tproxy).
    pub no_room: u64,
    /// Clients whose port the kernel changed to tell two of them apart (redirect).
    pub port_rewritten: u64,
}

/// Why traffic cannot be taken here. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// What is of this host cannot be told from what is not.
    #[error(
        "inbound.destinations any with source keep needs net.ipv4.ip_nonlocal_bind=0 and \
         net.ipv6.ip_nonlocal_bind=0 in this network namespace: with them every address looks like one \
         of this host (`sysctl -w`, or `source: own`)"
    )]
    BindsAnywhere,
    /// The workload's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Rules here belong to somebody who lives.
    #[error(
        "a running weir holds the rules in this network namespace: nothing was changed (end it \
         first: `weir drain`)"
    )]
    Held,
    /// The connect hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A program that we need is not there.
    #[error("run {program}: {source} (Debian: `apt-get install {package}`)")]
    Missing {
        /// Where it comes from.
        package: &'static str,
        /// As called.
        program: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The reply path of kept client addresses.
    #[error(
        "inbound.source keep needs net.ipv4.tcp_fwmark_accept=1 in this network namespace: the \
         workload's replies are led back by the mark that its sockets inherit (`sysctl -w \
         net.ipv4.tcp_fwmark_accept=1`, or `source: own`)"
    )]
    NoMarkAccept,
    /// A step was refused.
    #[error("{step}: {said}{cure}")]
    Refused {
        /// What to do about it.
        cure: &'static str,
        /// In the words of who refused.
        said: String,
        /// What was tried.
        step: String,
    },
    /// Somebody else's routes are where ours would go.
    #[error(
        "route table {table} holds routes that are not weir's: `{route}` (move them to another \
         table; `source: own` needs none)"
    )]
    TableTaken {
        /// The first of them.
        route: String,
        /// Its number.
        table: u32,
    },
}

impl Plan {
    /// Tries what can be tried without a change to anybody's traffic.
    ///
    /// # Errors
    ///
    /// The first reason why it cannot work here, with its cure.
    pub fn prepare(self) -> Result<Prepared, CaptureError> {
        self.suits_host()?;
        if !self.marks().is_empty() {
            route::preflight()?;
        }
        let draft = nft::draft(&self, accepts_marks())?;
        nft::check(&nft::making(&draft)?)?;
        let hooks = self.hooks().map(ConnectHook::load).collect::<Result<_, _>>()?;
        Ok(Prepared { draft, hooks, plan: self })
    }

    /// The settings of this network namespace allow it.
    fn suits_host(&self) -> Result<(), CaptureError> {
        if self.keeps_source() && !accepts_marks() {
            return Err(CaptureError::NoMarkAccept);
        }
        if self.takes_any_destination() && self.keeps_source() && binds_anywhere() {
            return Err(CaptureError::BindsAnywhere);
        }
        Ok(())
    }

    /// The nft table as it would be installed.
    ///
    /// # Errors
    ///
    /// A workload's cgroup is not there.
    pub fn nft_text(&self) -> Result<String, CaptureError> {
        Ok(nft::draft(self, accepts_marks())?.table())
    }

    /// What `ip` would be told.
    #[must_use]
    pub fn ip_steps(&self) -> Vec<Step> {
        route::steps(&self.marks())
    }

    /// Packets of workloads find us by their marks alone.
    #[must_use]
    pub fn leads_packets(&self) -> bool {
        !self.marks().is_empty()
    }

    /// The marks by which packets are led to us.
    fn marks(&self) -> Vec<u32> {
        let outbound = self.netfilter().any(|one| one.way == Way::Tproxy);
        let marks = [
            (self.keeps_source(), STEER_MARK),
            (outbound, OUTBOUND_MARK),
            (self.takes_any_destination(), FOREIGN_MARK),
        ];
        marks.into_iter().filter(|(wanted, _)| *wanted).map(|(_, mark)| mark).collect()
    }
}

impl Prepared {
    /// Where connects meant to go, for the workers that accept them: for each hook of the plan, by the
    /// port of its listener.
    #[must_use]
    pub fn records(&self) -> Vec<(u16, Arc<Records>)> {
        self.hooks.iter().map(|hook| (hook.port(), hook.records())).collect()
    }

    /// Takes the traffic. Call it when everything that shall receive it listens.
    ///
    /// # Errors
    ///
    /// A step was refused; what was done before it is undone.
    pub fn install(self) -> Result<Capture, CaptureError> {
        let Prepared { draft, hooks, plan } = self;
        let routes = route::Routes::install(&plan.marks())?;
        let table = Some(nft::Table::install(&draft)?);
        process::made("table");
        // Before anything that it shall tell about is looked at for the first time.
        let changes = Changes::listen().ok();
        let mut capture = Capture {
            cgroups: plan.cgroups(),
            changes,
            counted: RuleCounts::default(),
            counted_before: RuleCounts::default(),
            guard: None,
            hooks,
            plan,
            routes,
            stays: Stays::default(),
            table,
        };
        capture.hooks.iter_mut().try_for_each(ConnectHook::attach)?;
        // Last of all what stays when we are gone: a start that fails leaves nothing behind.
        let stood = guard::listed().is_some();
        match guard::text(&capture.plan)? {
            Some(text) => capture.guard = Some(Guard::install(text)?),
            None => guard::remove()?,
        }
        capture.stays.guard = capture.guard.is_some() && !stood;
        process::made("guard");
        match bpf::settle(&capture.hooks) {
            Ok(new) => capture.stays.pins = new,
            Err(error) => {
                capture.abandon();
                return Err(error.into());
            }
        }
        process::made("pins");
        Ok(capture)
    }
}

impl Capture {
    /// Takes no more connections; those taken stay free of conntrack until the end.
    pub fn stop(&mut self) {
        self.hooks.iter_mut().for_each(ConnectHook::stop);
        if let Some(table) = &mut self.table {
            table.stop_taking();
        }
    }

    /// The start failed elsewhere: what it made here that would outlive us goes.
    pub fn abandon(&mut self) {
        let Stays { guard, pins } = std::mem::take(&mut self.stays);
        pins.undo();
        if guard {
            // Best effort: `weir rules show` says what is left.
            let _ = guard::remove();
        }
    }

    /// Its network namespace is gone: pins for it refuse nobody, and take up places on the cgroup.
    pub fn unpin(&self) {
        self.hooks.iter().for_each(ConnectHook::unpin);
    }

    /// Connects that a program of somebody else has led elsewhere after ours took them.
    #[must_use]
    pub fn overruled(&self) -> u64 {
        self.hooks.iter().map(|hook| hook.records().losses().overruled).sum()
    }

    /// The programs that can have done it, by name and number; those that we may not see are left
    /// out.
    #[must_use]
    pub fn overruling(&self) -> Vec<String> {
        let cgroups = self.plan.hooks().flat_map(|hook| &hook.cgroups);
        let all = cgroups.flat_map(|cgroup| neighbours(cgroup).unwrap_or_default());
        let mut names: Vec<String> = all
            .filter(|neighbour| neighbour.after)
            .map(|neighbour| format!("{} (program {})", neighbour.name, neighbour.id))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// What is taken.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What the rules counted. Costs a short-lived process, if there is something to count.
    #[must_use]
    pub fn counts(&mut self) -> RuleCounts {
        let counts = self.plan.netfilter().next().is_some() || self.plan.redirects();
        if counts && let Some(now) = nft::counts() {
            self.counted = now;
        }
        self.total()
    }

    fn total(&self) -> RuleCounts {
        let (before, now) = (self.counted_before, self.counted);
        RuleCounts {
            looped: before.looped + now.looped,
            no_room: before.no_room + now.no_room,
            port_rewritten: before.port_rewritten + now.port_rewritten,
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // What leads traffic to us goes first.
        self.hooks.clear();
        // The rules that steer packets go before the routes that they steer to.
        self.table = None;
    }
}

/// Sockets that a workload accepts inherit the mark of the packets that reached them.
fn accepts_marks() -> bool {
    std::fs::read_to_string(format!("/proc/sys/{}", ACCEPT_MARK.replace('.', "/")))
        .is_ok_and(|text| text.trim() == "1")
}

/// What `accepts_marks` asks.
const ACCEPT_MARK: &str = "net.ipv4.tcp_fwmark_accept";

/// Every address can be bound, as if it were of this host.
fn binds_anywhere() -> bool {
    ["ipv4", "ipv6"].iter().any(|family| {
        std::fs::read_to_string(format!("/proc/sys/net/{family}/ip_nonlocal_bind"))
            .is_ok_and(|text| text.trim() == "1")
    })
}

/// `SO_MARK` of our own sockets, under `MARK_MASK`: never taken, never tracked.
pub const OWN_MARK: u32 = 0x539;
/// `SO_MARK` of sockets that dial under a client's address, under `MARK_MASK`. The workload's
/// socket inherits it, and what it sends is led back to us. Not `OWN_MARK`: a listener whose mark
/// leads to loopback could not shake hands with anybody outside.
pub const STEER_MARK: u32 = 0x53a;
/// Marks an application's packets that are led to us over loopback, under `MARK_MASK`.
pub const OUTBOUND_MARK: u32 = 0x53b;
/// What the marks of all our sockets have in common, under `SOCKET_MARK_MASK`.
pub const SOCKET_MARK: u32 = OWN_MARK & SOCKET_MARK_MASK;
/// See `SOCKET_MARK`.
pub const SOCKET_MARK_MASK: u32 = MARK_MASK & !0x3;
const _: () = assert!(STEER_MARK & SOCKET_MARK_MASK == SOCKET_MARK);
/// Marks packets for destinations that are not of this host, which are led to us, under `MARK_MASK`.
pub const FOREIGN_MARK: u32 = 0x53c;
/// The bits that are ours; others may use the rest.
pub const MARK_MASK: u32 = 0xfff;
/// The route table in which everything is local.
pub const ROUTE_TABLE: u32 = 133;
