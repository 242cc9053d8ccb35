// SPDX-License-Identifier: Apache-2.0
//! How traffic gets here without the application's knowledge: install, watch, undo.
//!
//! `Plan` says what to take; `install` does it as the last step of a start, and dropping the
//! `Capture` undoes it in reverse. Whatever changes traffic hangs on a descriptor of this process
//! (an owned nft table, links of BPF programs), so the kernel undoes it too when we are killed.
//! Changes nothing outside the network namespace it is called in, and no sysctl.

use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::bpf::{ConnectHook, HookError};

pub use crate::bpf::{HookPlan, Losses, Records};
pub use own_ports::OwnPorts;
pub use source_ports::{PortCounts, SourcePorts};

mod nft;
mod own_ports;
mod route;
mod source_ports;

/// What to take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Plan {
    /// Traffic to the workload.
    pub inbound: Option<Inbound>,
    /// Connects of the workload, by the hook.
    pub outbound: Option<HookPlan>,
    /// Ports of ours: never taken.
    pub own_ports: Vec<u16>,
}

/// Traffic to the workload, taken by nft TPROXY.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Inbound {
    /// Left alone; wins over `include`.
    pub exclude: Vec<RangeInclusive<u16>>,
    /// Taken.
    pub include: Vec<RangeInclusive<u16>>,
    /// The workload sees the client's address, so its replies must be led back to us.
    pub keep_source: bool,
    /// Where a transparent listener waits.
    pub listen: SocketAddr,
}

/// Traffic can be taken, and everything that can be refused was granted; none is taken yet.
#[derive(Debug)]
pub struct Prepared {
    hook: Option<ConnectHook>,
    plan: Plan,
}

/// Traffic is being taken. Dropping it lets traffic go its own way again.
#[derive(Debug)]
pub struct Capture {
    hook: Option<ConnectHook>,
    plan: Plan,
    routes: Option<route::Routes>,
    table: Option<nft::Table>,
}

/// Why traffic cannot be taken here. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
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
        if self.keeps_source() {
            if !accepts_marks() {
                return Err(CaptureError::NoMarkAccept);
            }
            route::preflight()?;
        }
        nft::check(&self.nft_text())?;
        let hook = self.outbound.as_ref().map(ConnectHook::load).transpose()?;
        Ok(Prepared { hook, plan: self })
    }

    fn keeps_source(&self) -> bool {
        self.inbound.as_ref().is_some_and(|inbound| inbound.keep_source)
    }

    /// The nft table as it would be installed.
    #[must_use]
    pub fn nft_text(&self) -> String {
        nft::text(self, accepts_marks())
    }
}

impl Prepared {
    /// Where connects meant to go, for the workers that accept them.
    #[must_use]
    pub fn records(&self) -> Option<Arc<Records>> {
        self.hook.as_ref().map(ConnectHook::records)
    }

    /// Takes the traffic. Call it when everything that shall receive it listens.
    ///
    /// # Errors
    ///
    /// A step was refused; what was done before it is undone.
    pub fn install(self) -> Result<Capture, CaptureError> {
        let routes = self.plan.keeps_source().then(route::Routes::install).transpose()?;
        let table = Some(nft::Table::install(&self.plan.nft_text())?);
        let mut hook = self.hook;
        hook.as_mut().map_or(Ok(()), ConnectHook::attach)?;
        Ok(Capture { hook, plan: self.plan, routes, table })
    }
}

impl Capture {
    /// Takes no more connections; those taken stay free of conntrack until the end.
    pub fn stop(&mut self) {
        if let Some(hook) = &mut self.hook {
            hook.stop();
        }
        if let Some(table) = &mut self.table {
            table.stop_taking();
        }
    }

    /// Puts back what somebody has taken away, and says what it was. `None`: nothing is missing.
    ///
    /// # Errors
    ///
    /// It cannot be put back.
    pub fn mend(&mut self) -> Option<(&'static str, Result<(), CaptureError>)> {
        if !self.table.as_mut().is_some_and(nft::Table::stands) {
            self.table = None;
            let table = nft::Table::install(&self.plan.nft_text());
            return Some(("nft table", table.map(|table| self.table = Some(table))));
        }
        if self.plan.keeps_source() && !self.routes.as_ref().is_some_and(route::Routes::stand) {
            // What is half there is put right, not removed first: flows need it.
            if let Some(routes) = self.routes.take() {
                std::mem::forget(routes);
            }
            let routes = route::Routes::install();
            return Some(("fwmark rule", routes.map(|routes| self.routes = Some(routes))));
        }
        let hook = self.hook.as_mut().filter(|hook| !hook.stands())?;
        Some(("workload's cgroup", hook.attach().map_err(CaptureError::from)))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // What leads traffic to us goes first.
        self.hook = None;
        // The rules that steer packets go before the routes that they steer to.
        self.table = None;
        self.routes = None;
    }
}

/// Sockets that a workload accepts inherit the mark of the packets that reached them.
fn accepts_marks() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv4/tcp_fwmark_accept")
        .is_ok_and(|text| text.trim() == "1")
}

/// `SO_MARK` of our own sockets, under `MARK_MASK`: never taken, never tracked.
pub const OWN_MARK: u32 = 0x539;
/// `SO_MARK` of sockets that dial under a client's address, under `MARK_MASK`. The workload's
/// socket inherits it, and what it sends is led back to us. Not `OWN_MARK`: a listener whose mark
/// leads to loopback could not shake hands with anybody outside.
pub const STEER_MARK: u32 = 0x53a;
/// The bits that are ours; others may use the rest.
pub const MARK_MASK: u32 = 0xfff;
/// The route table in which everything is local.
pub const ROUTE_TABLE: u32 = 133;
