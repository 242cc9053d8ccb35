// SPDX-License-Identifier: Apache-2.0
//! The nft table: its text, and a table that lives as long as we do.
//!
//! One text serves check, dry run and install. `flags owner` binds the table to the netlink socket
//! that made it (nft(8)): a child `nft -i`, which ends when its standard input closes, so also when
//! we are killed. Nobody else can change or flush an owned table.

use std::fmt::Write as _;
use std::io::{self, Read, Write as _};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{CaptureError, Inbound, MARK_MASK, OWN_MARK, Plan, STEER_MARK};
use crate::addr::join_ports;
use crate::sys::memory::text_file;

/// Our table in the kernel, and the child that owns it.
#[derive(Debug)]
pub(super) struct Table {
    child: Child,
    /// `None` once closed.
    input: Option<ChildStdin>,
    /// What the child was told to read, and may not have read yet.
    texts: Vec<OwnedFd>,
}

/// The whole table. `accepts_marks`: the workload's sockets inherit the mark of what reaches them.
///
/// Everything happens before connection tracking (priority raw), so that nothing taken is tracked:
/// - what belongs to a socket of ours is told by that socket's mark;
/// - what arrives for a taken port is given to our listener. `tproxy` finds an established socket
///   first, and leaves alone what belongs to one that is not transparent: the replies to the
///   workload's own connections;
/// - the workload's side of a flow over loopback carries the mark that it inherited, or is told
///   by its ports.
pub(super) fn text(plan: &Plan, accepts_marks: bool) -> String {
    let mut to_output = String::new();
    let mut inbound_rules = String::new();
    if let Some(inbound) = &plan.inbound {
        inbound_rules = taking(inbound, &plan.own_ports);
        if !accepts_marks {
            let ports = elements(&inbound.include);
            push(&mut to_output, &format!("oifname lo tcp sport {ports} counter notrack accept"));
        }
    }
    if let Some(port) = plan.outbound.as_ref().map(|hook| hook.port) {
        push(&mut to_output, &format!("oifname lo tcp dport {port} counter notrack accept"));
        push(&mut to_output, &format!("oifname lo tcp sport {port} counter notrack accept"));
    }
    format!(
        "table inet weir {{
	flags owner

	chain inbound {{
{inbound_rules}	}}

	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		meta l4proto tcp socket mark & {MARK_MASK:#x} == {OWN_MARK:#x} counter notrack accept
		iifname != \"lo\" meta l4proto tcp fib daddr type local jump inbound
	}}

	chain output {{
		type filter hook output priority raw; policy accept;
		meta l4proto tcp meta mark & {MARK_MASK:#x} == {{ {OWN_MARK:#x}, {STEER_MARK:#x} }} counter notrack accept
{to_output}	}}
}}
"
    )
}

fn taking(inbound: &Inbound, own_ports: &[u16]) -> String {
    let mut rules = String::new();
    let mut left_alone = inbound.exclude.clone();
    left_alone.extend(own_ports.iter().map(|port| *port..=*port));
    if !left_alone.is_empty() {
        push(&mut rules, &format!("tcp dport {} return", elements(&left_alone)));
    }
    let port = inbound.listen.port();
    let to = match inbound.listen.ip() {
        ip if ip.is_unspecified() && ip.is_ipv6() => format!("tproxy to :{port}"),
        IpAddr::V4(ip) if ip.is_unspecified() => format!("tproxy ip to :{port}"),
        IpAddr::V4(ip) => format!("tproxy ip to {ip}:{port}"),
        IpAddr::V6(ip) => format!("tproxy ip6 to [{ip}]:{port}"),
    };
    let ports = elements(&inbound.include);
    push(&mut rules, &format!("tcp dport {ports} {to} counter notrack accept"));
    rules
}

fn push(rules: &mut String, rule: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(rules, "\t\t{rule}");
}

/// An anonymous set of ports. Ranges that overlap are joined, because nft refuses them.
fn elements(ranges: &[RangeInclusive<u16>]) -> String {
    let element = |range: RangeInclusive<u16>| match range.start() == range.end() {
        true => range.start().to_string(),
        false => format!("{}-{}", range.start(), range.end()),
    };
    let list: Vec<String> = join_ports(ranges.to_vec()).into_iter().map(element).collect();
    format!("{{ {} }}", list.join(", "))
}

/// Whether the kernel would take `text`, without a change.
pub(super) fn check(text: &str) -> Result<(), CaptureError> {
    let output = nft(&["-c", "-f", "-"], text)?;
    if output.status.success() {
        return Ok(());
    }
    Err(refused("check the nft table", &String::from_utf8_lossy(&output.stderr)))
}

impl Table {
    /// Makes the table, in one transaction.
    pub(super) fn install(text: &str) -> Result<Table, CaptureError> {
        let mut child = Command::new("nft")
            .arg("-i")
            // It would keep a history of its commands there.
            .env("HOME", "/nonexistent")
            // Ctrl-C is for us: it drains, and the table stays until the end.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(missing)?;
        let input = child.stdin.take();
        let mut table = Table { child, input, texts: Vec::new() };
        let made = table
            .run(text)
            .and_then(|()| table.wait_until(&["list", "table", "inet", "weir"], |_| true));
        match made {
            Ok(true) => Ok(table),
            Ok(false) => Err(refused("install the nft table", &table.last_words())),
            Err(source) => Err(refused("install the nft table", &source.to_string())),
        }
    }

    /// Takes no more connections. Best effort: if the child is gone, so is the table.
    pub(super) fn stop_taking(&mut self) {
        if self.run("flush chain inet weir inbound\n").is_ok() {
            let is_empty = |listed: &str| !listed.contains("dport");
            let _ = self.wait_until(&["list", "chain", "inet", "weir", "inbound"], is_empty);
        }
    }

    /// The child runs, and so the table stands: nobody else can remove it.
    pub(super) fn stands(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The child reads `text` as one transaction.
    fn run(&mut self, text: &str) -> io::Result<()> {
        let file = text_file(text)?;
        let place = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let Some(input) = &mut self.input else { return Err(io::ErrorKind::BrokenPipe.into()) };
        writeln!(input, "include \"{place}\"")?;
        input.flush()?;
        self.texts.push(file);
        Ok(())
    }

    /// Asks nft until it answers what is wanted; false if the child ends first, or takes too long.
    fn wait_until(&mut self, ask: &[&str], wanted: impl Fn(&str) -> bool) -> io::Result<bool> {
        let deadline = Instant::now() + INSTALL_WITHIN;
        while Instant::now() < deadline && self.stands() {
            let answer = Command::new("nft").args(ask).stdin(Stdio::null()).output()?;
            if answer.status.success() && wanted(&String::from_utf8_lossy(&answer.stdout)) {
                return Ok(true);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(false)
    }

    /// What the child said, after it was made to end.
    fn last_words(&mut self) -> String {
        self.end();
        let mut said = String::new();
        if let Some(errors) = &mut self.child.stderr {
            // What cannot be read is not there to be told.
            let _ = errors.read_to_string(&mut said);
        }
        said
    }

    fn end(&mut self) {
        self.input = None;
        let deadline = Instant::now() + INSTALL_WITHIN;
        while Instant::now() < deadline && self.stands() {
            std::thread::sleep(LOOK_EVERY);
        }
        // It is over already, or it hangs; in both cases there is nothing more to do for it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.end();
    }
}

fn nft(arguments: &[&str], text: &str) -> Result<Output, CaptureError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut input) = child.stdin.take() {
        // If it stops reading, it says why.
        let _ = input.write_all(text.as_bytes());
    }
    child.wait_with_output().map_err(missing)
}

fn missing(source: io::Error) -> CaptureError {
    CaptureError::Missing { package: "nftables", program: "nft", source }
}

fn refused(step: &str, said: &str) -> CaptureError {
    let cure = match said {
        said if said.contains("Operation not permitted") => {
            " (needs CAP_NET_ADMIN; and a table `inet weir` of another running weir in this \
             network namespace is in the way: `nft list tables`)"
        }
        said if said.contains("No such file or directory") => {
            " (the kernel lacks nft tproxy, socket or fib: CONFIG_NFT_TPROXY, CONFIG_NFT_SOCKET, \
             CONFIG_NFT_FIB_INET)"
        }
        _ => "",
    };
    let said = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason was given");
    CaptureError::Refused { cure, said: said.to_owned(), step: step.to_owned() }
}

/// How long nft may take; it needs milliseconds.
const INSTALL_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_ports_are_left_alone_even_if_everything_is_taken() {
        let inbound = Inbound {
            exclude: vec![22..=22],
            include: vec![1..=65_535],
            keep_source: true,
            listen: "[::]:15006".parse().unwrap(),
        };
        let rules = taking(&inbound, &[15_020, 15_006]);
        let expected = "\t\ttcp dport { 22, 15006, 15020 } return\n\
                        \t\ttcp dport { 1-65535 } tproxy to :15006 counter notrack accept\n";
        assert_eq!(rules, expected);
    }

    #[test]
    fn listener_of_one_family_takes_that_family_only() {
        let to = |listen: &str| {
            let listen = listen.parse().unwrap();
            let include = vec![80..=80];
            taking(&Inbound { exclude: vec![], include, keep_source: false, listen }, &[])
        };
        assert!(to("0.0.0.0:15006").contains("tproxy ip to :15006"));
        assert!(to("10.0.0.1:15006").contains("tproxy ip to 10.0.0.1:15006"));
        assert!(to("[fd00::1]:15006").contains("tproxy ip6 to [fd00::1]:15006"));
    }
}
