// SPDX-License-Identifier: Apache-2.0
//! `weir demo`: the main job on real input, in namespaces of its own, and nothing left behind.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use super::{Failure, ask, print};
use crate::config;
use crate::sys::signals;

use lab::{CLIENT, Lab, NODE_TO_CLIENT, Place, Refusal, SERVER, bare};
use servers::{SERVER_LOG, WORKLOAD_LOG};

mod lab;
mod servers;
mod takeover;
mod watch;

pub(super) fn run(seconds: u64) -> Result<(), Failure> {
    if !nix::unistd::geteuid().is_root() {
        let text = "demo makes network namespaces and needs root (`sudo weir demo`)";
        return Err(Failure::Preflight(text.to_owned()));
    }
    signals::catch().map_err(|error| Failure::Failed(format!("demo: {error}")))?;
    Demo { seconds }.tell().map_err(|refusal| {
        if signals::is_interrupted() {
            step("interrupted: namespaces, cgroup and files are removed");
            return Failure::Interrupted;
        }
        Failure::Failed(format!("demo: {refusal}"))
    })
}

struct Demo {
    seconds: u64,
}

impl Demo {
    fn tell(&self) -> Result<(), Refusal> {
        say("weir demo: a client, a node with a workload, and a server that the workload dials\n");
        let mut lab = Lab::build()?;
        servers::start(&mut lab, Place::Workload)?;
        servers::start(&mut lab, Place::Server)?;
        step("three network namespaces, nginx and iperf3 in the workload and in the server");
        self.show_conntrack(&lab)?;
        let socket = start_weir(&mut lab)?;
        step(
            "weir runs in the node: inbound tproxy, outbound connect; the applications know nothing",
        );
        show_inbound(&lab)?;
        show_outbound(&lab)?;
        say(&format!(
            "\nload for {} s: HTTP on 64 connections and 2 bulk streams, each way\n",
            self.seconds
        ));
        servers::load(&mut lab, Place::Client, &bare(NODE_TO_CLIENT[0]), self.seconds)?;
        servers::load(&mut lab, Place::Workload, &bare(SERVER[0]), self.seconds)?;
        let seen = watch::live(&lab, &socket, self.seconds, &mut say);
        say(&format!("\n{}", ask::table(&seen.sample)));
        summary(&mut lab, &socket, &seen);
        show_end(&mut lab)?;
        takeover::show(&mut lab)?;
        drop(lab);
        step("namespaces, cgroup and files are removed: nothing is left");
        Ok(())
    }

    /// Somebody else's rule switches connection tracking on, so that 0 entries mean something.
    fn show_conntrack(&self, lab: &Lab) -> Result<(), Refusal> {
        let namespace = lab.namespace(Place::Node);
        for rule in CONNTRACK_ON {
            let words = ["netns", "exec", &namespace, "nft", rule];
            lab::run("ip", &words)?;
        }
        get(lab, Place::Client, NODE_TO_CLIENT[0])?;
        get(lab, Place::Workload, SERVER[0])?;
        let entries = watch::conntrack(lab);
        step(&format!(
            "connection tracking is on: two requests without weir made {entries} entries"
        ));
        lab::run("ip", &["netns", "exec", &namespace, "conntrack", "-F"])
    }
}

fn start_weir(lab: &mut Lab) -> Result<PathBuf, Refusal> {
    let namespace = lab.namespace(Place::Node);
    // What `source: keep` needs; in the demo's own namespace.
    lab::run(
        "ip",
        &["netns", "exec", &namespace, "sysctl", "-qw", "net.ipv4.tcp_fwmark_accept=1"],
    )?;
    let socket = lab.directory().join("admin.sock");
    let file = lab.directory().join("weir.yaml");
    let text = config::DEFAULT
        .replace("/weir/app", &lab.cgroup())
        .replace("/run/weir/admin.sock", &socket.display().to_string());
    fs::write(&file, text).map_err(|error| format!("write {}: {error}", file.display()))?;
    let own = std::env::current_exe().map_err(|error| format!("find this program: {error}"))?;
    let own = own.to_string_lossy().into_owned();
    lab.start(Place::Node, "weir", &[&own, "run", "-c", &file.to_string_lossy()])?;
    let status = [&own, "status", "--wait", "10", "--socket", &socket.to_string_lossy()];
    lab.output(Place::Node, &status).map_err(|_| format!("weir: {}", lab.said("weir")))?;
    Ok(socket)
}

/// What a request to the workload looks like from both ends.
fn show_inbound(lab: &Lab) -> Result<(), Refusal> {
    for (node, client) in NODE_TO_CLIENT.into_iter().zip(CLIENT) {
        let before = servers::requests(lab, WORKLOAD_LOG);
        get(lab, Place::Client, node)?;
        let saw = servers::last_client(lab, WORKLOAD_LOG, before + 1);
        expect("the workload saw", saw.as_deref(), &plain(client))?;
        step(&format!(
            "inbound:  the client dials {}, the workload sees its address: {}",
            plain(node),
            plain(client)
        ));
    }
    Ok(())
}

/// What a request of the workload looks like from both ends.
fn show_outbound(lab: &Lab) -> Result<(), Refusal> {
    for server in SERVER {
        let before = servers::requests(lab, SERVER_LOG);
        let dialled = get(lab, Place::Workload, server)?;
        servers::last_client(lab, SERVER_LOG, before + 1);
        expect("the workload's getpeername says", Some(&dialled), &plain(server))?;
        step(&format!(
            "outbound: the workload dials {}, and its socket says so: {dialled}",
            plain(server)
        ));
    }
    Ok(())
}

fn summary(lab: &mut Lab, socket: &std::path::Path, seen: &watch::Seen) {
    for from in [Place::Client, Place::Workload] {
        let (web, bulk) = servers::names(from);
        lab::wait(|| lab.is_over(web) && lab.is_over(bulk));
    }
    let totals = watch::totals(socket);
    say(&format!(
        "\n  {:<10} {:>8} {:>9} {:>12} {:>10} {:>10} {:>12}",
        "", "flows", "GB", "requests/s", "p50", "p99", "bulk Gbit/s"
    ));
    for (index, from) in [Place::Client, Place::Workload].into_iter().enumerate() {
        let (http, bulk) = servers::report(lab, from);
        let word = if index == 0 { "inbound" } else { "outbound" };
        let bulk = bulk.map_or_else(|| "-".to_owned(), |bulk| format!("{bulk:.1}"));
        say(&format!(
            "  {:<10} {:>8} {:>9.2} {:>12} {:>10} {:>10} {:>12}",
            word,
            totals.opened[index],
            totals.bytes[index] / 1e9,
            http.per_second,
            http.p50,
            http.p99,
            bulk
        ));
    }
    say(&format!(
        "\n  at most {} flows at a time, {} conntrack entries\n",
        seen.flows, seen.conntrack
    ));
}

/// Kills weir in the middle of its work, and looks what is left.
fn show_end(lab: &mut Lab) -> Result<(), Refusal> {
    lab.kill("weir");
    let began = Instant::now();
    let is_direct = lab::wait(|| get(lab, Place::Client, NODE_TO_CLIENT[0]).is_ok());
    let took = began.elapsed();
    let tables = lab.output(Place::Node, &["nft", "list", "tables"])?;
    if !is_direct || tables.contains("inet weir") {
        return Err(format!("after kill -9 something is left: {tables}"));
    }
    get(lab, Place::Workload, SERVER[0])?;
    step(&format!(
        "kill -9: traffic flows directly {} ms later, no rule and no hook is left",
        took.as_millis()
    ));
    Ok(())
}

/// A request for which the server logs its client; the address that the socket says it reached.
fn get(lab: &Lab, from: Place, to: &str) -> Result<String, Refusal> {
    let url = format!("http://{}/who", bare(to));
    let format = "%{remote_ip}";
    let words = ["curl", "-gsS", "-m", "5", "-o", "/dev/null", "-w", format, &url];
    lab.output(from, &words)
}

fn expect(what: &str, found: Option<&str>, wanted: &str) -> Result<(), Refusal> {
    if found == Some(wanted) {
        return Ok(());
    }
    Err(format!("{what} {}, and not {wanted}", found.unwrap_or("nothing")))
}

fn plain(address: &str) -> String {
    address.split('/').next().unwrap_or_default().to_owned()
}

fn step(text: &str) {
    say(&format!("  \u{2713} {text}"));
}

fn say(text: &str) {
    // A reader that went away misses the rest of the story.
    let _ = print(&format!("{text}\n"));
}

/// A rule that asks for the state of connections makes the kernel track them.
const CONNTRACK_ON: [&str; 1] = [
    "table inet others { chain input { type filter hook input priority 0; ct state new counter; }; }",
];
