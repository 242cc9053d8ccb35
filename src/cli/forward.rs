// SPDX-License-Identifier: Apache-2.0
//! `weir forward`: a config with one plain listener, made from arguments.

use super::{Failure, Forward, profile_of};
use crate::config::{self, Admin, Config, OnChange, OnExit, Workers};
use crate::service::{Balance, Endpoint, Manner};
use crate::{control, log};

pub(super) fn run(arguments: Forward) -> Result<(), Failure> {
    let mut profile = profile_of(&arguments.profile)?;
    if let Some(mode) = arguments.relay {
        profile.relay.mode = mode;
    }
    let config = Config {
        admin: Admin { http: arguments.http, socket: arguments.socket },
        forward: vec![config::Forward {
            endpoints: arguments.to.into_iter().map(Endpoint::new).collect(),
            listen: arguments.listen,
            manner: Manner::of(Balance::RoundRobin),
            name: "forward".to_owned(),
        }],
        on_change: OnChange::Repair,
        on_exit: OnExit::Open,
        workloads: Vec::new(),
        profile,
        takeover: None,
        workers: arguments.workers.map_or(Workers::Auto, Workers::Count),
    };
    log::start();
    Ok(control::run(config, None)?)
}
