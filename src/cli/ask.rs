// SPDX-License-Identifier: Apache-2.0
//! The commands that talk to a running weir: `status`, `flows`, `services`, `endpoints`, `drain`.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Failure, Output, print};
use crate::control::client::{Answer, ask};
use crate::control::view::{EndpointView, FlowView, ServiceView, SourceView, Status};

pub(super) fn status(socket: &Path, output: Output, wait: Option<u64>) -> Result<(), Failure> {
    let began = Instant::now();
    loop {
        let answer = ask(socket, "GET", "/status");
        let status = answer.and_then(|answer| answer.json::<Status>());
        let late = wait.is_none_or(|seconds| began.elapsed() >= Duration::from_secs(seconds));
        match status {
            Ok(status) if status.ready => return show_status(&status, output),
            Ok(status) if late => {
                show_status(&status, output)?;
                return Err(Failure::Failed("weir runs but is not ready".to_owned()));
            }
            Err(error) if late => return Err(Failure::Failed(error.to_string())),
            _ => std::thread::sleep(ASK_AGAIN),
        }
    }
}

pub(super) fn flows(socket: &Path, output: Output) -> Result<(), Failure> {
    let answer = ask(socket, "GET", "/flows").map_err(failed)?;
    if output == Output::Json {
        return print(&format!("{}\n", answer.body().map_err(failed)?));
    }
    let flows: Vec<FlowView> = answer.json().map_err(failed)?;
    print(&table(&flows))
}

pub(super) fn services(socket: &Path, output: Output) -> Result<(), Failure> {
    let answer = ask(socket, "GET", "/services").map_err(failed)?;
    if output == Output::Json {
        return print(&format!("{}\n", answer.body().map_err(failed)?));
    }
    let services: Vec<ServiceView> = answer.json().map_err(failed)?;
    let mut table = format!(
        "{:<40} {:<15} {:>9} {:>6} {:>8}  {}\n",
        "SERVICE", "BALANCE", "ENDPOINTS", "IN USE", "FLOWS", "SAID BY"
    );
    for ServiceView { balance, endpoints, flows, in_use, name, sources } in &services {
        let sources: Vec<String> = sources.iter().map(source).collect();
        let sources = if sources.is_empty() { "-".to_owned() } else { sources.join(", ") };
        let _ = writeln!(
            table,
            "{name:<40} {balance:<15} {endpoints:>9} {in_use:>6} {flows:>8}  {sources}"
        );
    }
    print(&table)
}

pub(super) fn endpoints(socket: &Path, output: Output) -> Result<(), Failure> {
    let answer = ask(socket, "GET", "/endpoints").map_err(failed)?;
    if output == Output::Json {
        return print(&format!("{}\n", answer.body().map_err(failed)?));
    }
    let endpoints: Vec<EndpointView> = answer.json().map_err(failed)?;
    let mut table = format!(
        "{:<40} {:<22} {:<10} {:>6} {:<9} {:>8}  {}\n",
        "SERVICE", "ENDPOINT", "ZONE", "WEIGHT", "STATE", "FLOWS", "SAID BY"
    );
    for EndpointView { address, flows, registry, service, state, weight, zone, .. } in &endpoints {
        let said = |text: &'_ str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let (zone, registry) = (said(zone), said(registry));
        let _ = writeln!(
            table,
            "{service:<40} {address:<22} {zone:<10} {weight:>6} {state:<9} {flows:>8}  {registry}"
        );
    }
    print(&table)
}

/// `main@17 3s`, and what is wrong with it.
fn source(source: &SourceView) -> String {
    let SourceView { age_ms, registry, revision, state, .. } = source;
    let age = age_ms.map(|age| format!(" {}s", age / 1000)).unwrap_or_default();
    let state = if state == "heard" { String::new() } else { format!(" {state}") };
    format!("{registry}@{revision}{age}{state}")
}

/// Flows in rows, with a head.
pub(super) fn table(flows: &[FlowView]) -> String {
    let mut table = format!(
        "{:<9} {:<8} {:<22} {:<22} {:<22} {:>12} {:>12} {:>8}  {}\n",
        "DIRECTION",
        "CAPTURE",
        "DOWNSTREAM",
        "ORIGINAL DST",
        "UPSTREAM",
        "TO UPSTREAM",
        "TO DOWN",
        "AGE",
        "WORKLOAD"
    );
    for flow in flows {
        let address = |address: &Option<String>| address.clone().unwrap_or_else(|| "-".to_owned());
        let _ = writeln!(
            table,
            "{:<9} {:<8} {:<22} {:<22} {:<22} {:>12} {:>12} {:>7}s  {}",
            flow.direction,
            flow.capture,
            address(&flow.downstream),
            address(&flow.original_dst),
            flow.upstream,
            flow.bytes.to_upstream,
            flow.bytes.to_downstream,
            flow.age_ms / 1000,
            address(&flow.workload),
        );
    }
    table
}

pub(super) fn drain(socket: &Path, output: Output) -> Result<(), Failure> {
    ask(socket, "POST", "/drain").and_then(Answer::done).map_err(failed)?;
    print(match output {
        Output::Json => "{\"draining\":true}\n",
        Output::Table => "draining\n",
    })
}

fn show_status(status: &Status, output: Output) -> Result<(), Failure> {
    if output == Output::Json {
        let json = serde_json::to_string(status).map_err(|error| failed(error.into()))?;
        return print(&format!("{json}\n"));
    }
    let Status { accepting, flows, pid, profile, ready, version, workers, .. } = status;
    let state = if *ready { "ready" } else { "not ready" };
    print(&format!(
        "{state}: weir {version}, pid {pid}, profile {profile}\n\
         workers  {accepting} of {workers} accept\n\
         flows    {flows} open\n"
    ))
}

fn failed(error: crate::control::client::AskError) -> Failure {
    Failure::Failed(error.to_string())
}

/// How often `status --wait` looks.
const ASK_AGAIN: Duration = Duration::from_millis(20);
