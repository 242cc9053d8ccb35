// SPDX-License-Identifier: Apache-2.0
//! The way back: packets with `STEER_MARK` are local, whatever their address.
//!
//! One rule and one route for each family, through iproute2. After kill -9 they stay, and no packet
//! meets them: only sockets of ours make that mark. The next start takes them over.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{CaptureError, MARK_MASK, ROUTE_TABLE, STEER_MARK};

/// Rule and route of both families. Dropping it removes them.
#[derive(Debug)]
pub(super) struct Routes;

/// Nobody else's routes are in our table.
pub(super) fn preflight() -> Result<(), CaptureError> {
    for family in families() {
        let listed = ip(family, &["route", "show", "table", &ROUTE_TABLE.to_string()])?;
        // A table that was never used is an error to `ip`, and as good as an empty one.
        let foreign = listed.lines().find(|line| !line.starts_with("local default dev lo"));
        if let Some(route) = foreign {
            return Err(CaptureError::TableTaken { route: route.to_owned(), table: ROUTE_TABLE });
        }
    }
    Ok(())
}

impl Routes {
    /// Adds what is not there yet; undoes it all if a step fails.
    pub(super) fn install() -> Result<Routes, CaptureError> {
        let routes = Routes;
        for family in families() {
            let (mark, table) = (mark(), ROUTE_TABLE.to_string());
            change(
                family,
                &["route", "replace", "local", "default", "dev", "lo", "table", &table],
            )?;
            let rules = ip(family, &["rule", "show", "fwmark", &mark, "table", &table])?;
            if rules.trim().is_empty() {
                change(family, &["rule", "add", "fwmark", &mark, "lookup", &table])?;
            }
        }
        Ok(routes)
    }
}

impl Routes {
    /// Nobody has removed them.
    pub(super) fn stand(&self) -> bool {
        let (mark, table) = (mark(), ROUTE_TABLE.to_string());
        families().all(|family| {
            let rule = ip(family, &["rule", "show", "fwmark", &mark, "table", &table]);
            let route = ip(family, &["route", "show", "table", &table]);
            [rule, route].into_iter().all(|shown| shown.is_ok_and(|text| !text.trim().is_empty()))
        })
    }
}

impl Drop for Routes {
    fn drop(&mut self) {
        for family in families() {
            let (mark, table) = (mark(), ROUTE_TABLE.to_string());
            // What is gone already needs no removing.
            let _ = ip(family, &["rule", "del", "fwmark", &mark, "lookup", &table]);
            let _ = ip(family, &["route", "del", "local", "default", "dev", "lo", "table", &table]);
        }
    }
}

fn families() -> impl Iterator<Item = &'static str> {
    let v6 = Path::new("/proc/net/if_inet6").exists();
    ["-4", "-6"].into_iter().take(1 + usize::from(v6))
}

fn mark() -> String {
    format!("{STEER_MARK:#x}/{MARK_MASK:#x}")
}

/// What `ip` answers; nothing if it was refused.
fn ip(family: &str, arguments: &[&str]) -> Result<String, CaptureError> {
    let output = command(family, arguments).stderr(Stdio::null()).output().map_err(missing)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn change(family: &str, arguments: &[&str]) -> Result<(), CaptureError> {
    let output = command(family, arguments).output().map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let step = format!("ip {family} {}", arguments.join(" "));
    let is_down = said.contains("is not up") || said.contains("is down");
    let cure = if is_down { " (`ip link set lo up`)" } else { " (needs CAP_NET_ADMIN)" };
    Err(CaptureError::Refused { cure, said, step })
}

fn command(family: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.arg(family).args(arguments).stdin(Stdio::null());
    command
}

fn missing(source: io::Error) -> CaptureError {
    CaptureError::Missing { package: "iproute2", program: "ip", source }
}
