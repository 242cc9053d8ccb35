// SPDX-License-Identifier: Apache-2.0
//! Every way of capture, tried by connections through a weir of its own in a scratch node.

use std::net::IpAddr;

use super::lab::{FAR, Lab, NODE, PORT};
use super::{Finding, Outcome, finding};
use crate::config::Config;
use crate::sys::signals::is_interrupted;

/// One way of capture.
struct Mode {
    capture: &'static str,
    /// With CGROUP in place of the workload's.
    config: &'static str,
    direction: &'static str,
    /// What to choose where it does not work.
    instead: &'static str,
    what: &'static str,
    /// The workload must see the client's address.
    keeps: bool,
}

/// Tries them all; nothing is left.
pub(super) fn findings() -> Vec<Finding> {
    let lab = match Lab::build() {
        Ok(lab) => lab,
        Err(error) => {
            let what = "network namespaces and a cgroup to try captures in";
            return vec![finding("capture", what, Err(error))];
        }
    };
    let modes = MODES.iter().take_while(|_| !is_interrupted());
    modes.filter_map(|mode| mode.finding(&lab)).collect()
}

impl Mode {
    /// `None` for a way that this version does not have.
    fn finding(&self, lab: &Lab) -> Option<Finding> {
        let config = self.config.replace("CGROUP", &lab.cgroup());
        Config::parse("check", None, &config).ok()?;
        let result = self.attempt(lab, &format!("workers: 1\n{config}"));
        let cure = |error| match self.instead {
            "" => error,
            instead => format!("{error}; until then use {instead}"),
        };
        let mut finding = finding("capture", self.what, result.map_err(cure));
        // There is another way to do the same.
        if finding.outcome == Outcome::Fails && !self.instead.is_empty() {
            finding.outcome = Outcome::Warns;
        }
        Some(finding)
    }

    fn attempt(&self, lab: &Lab, config: &str) -> Result<(), String> {
        let weir = lab.start(config)?;
        let mut dialled = 0;
        if self.direction == "outbound" {
            let mapped = format!("::ffff:{}", FAR[0]);
            for to in [FAR[0], FAR[1], mapped.as_str()] {
                lab.workload_dials(address(to)?)?;
                dialled += 1;
            }
        } else {
            let port = if self.direction == "forward" { FORWARD_PORT } else { PORT };
            for (to, from) in NODE.into_iter().zip(FAR) {
                let seen = lab.far_dials((address(to)?, port).into())?;
                if self.keeps && seen != address(from)? {
                    return Err(format!("the workload saw {seen} in place of the client {from}"));
                }
                dialled += 1;
            }
        }
        let taken = weir.opened(self.direction, self.capture);
        if taken == dialled {
            return Ok(());
        }
        Err(format!("{taken} of {dialled} connections were taken, the others passed weir by"))
    }
}

fn address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|error| format!("{text}: {error}"))
}

/// Of one direction in the order of preference.
const MODES: [Mode; 7] = [
    Mode {
        capture: "tproxy",
        config: "inbound: { capture: tproxy, source: keep }",
        direction: "inbound",
        instead: "`source: own`",
        what: "inbound tproxy, the workload sees its clients: IPv4, IPv6",
        keeps: true,
    },
    Mode {
        capture: "tproxy",
        config: "inbound: { capture: tproxy, source: own }",
        direction: "inbound",
        instead: "`inbound.capture: redirect`",
        what: "inbound tproxy: IPv4, IPv6",
        keeps: false,
    },
    Mode {
        capture: "redirect",
        config: "inbound: { capture: redirect, source: own }",
        direction: "inbound",
        instead: "`inbound.capture: tproxy`",
        what: "inbound redirect: IPv4, IPv6",
        keeps: false,
    },
    Mode {
        capture: "connect",
        config: "outbound: { capture: connect, workload: { cgroup: CGROUP } }",
        direction: "outbound",
        instead: "`outbound.capture: tproxy`",
        what: "outbound connect: IPv4, IPv6, IPv4-mapped",
        keeps: false,
    },
    Mode {
        capture: "tproxy",
        config: "outbound: { capture: tproxy, workload: { cgroup: CGROUP } }",
        direction: "outbound",
        instead: "`outbound.capture: connect`",
        what: "outbound tproxy: IPv4, IPv6, IPv4-mapped",
        keeps: false,
    },
    Mode {
        capture: "redirect",
        config: "outbound: { capture: redirect, workload: { cgroup: CGROUP } }",
        direction: "outbound",
        instead: "`outbound.capture: connect`",
        what: "outbound redirect: IPv4, IPv6, IPv4-mapped",
        keeps: false,
    },
    Mode {
        capture: "none",
        config: "forward: [{ listen: \"[::]:9001\", endpoints: [\"10.97.1.2:9000\", \"[fd97:1::2]:9000\"] }]",
        direction: "forward",
        instead: "",
        what: "forward: IPv4, IPv6",
        keeps: false,
    },
];
/// In the config of `forward`.
const FORWARD_PORT: u16 = 9001;
