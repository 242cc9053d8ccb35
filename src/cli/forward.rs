// SPDX-License-Identifier: Apache-2.0
//! `weir forward`: a config with one plain listener, made from arguments.

use std::path::Path;

use super::{Failure, Forward};
use crate::config::{self, Admin, Balance, Config, OnExit, Workers};
use crate::profile::Profile;
use crate::yaml::nearest;
use crate::{control, log};

pub(super) fn run(arguments: Forward) -> Result<(), Failure> {
    let mut profile = profile(&arguments.profile)?;
    if let Some(mode) = arguments.relay {
        profile.relay.mode = mode;
    }
    let config = Config {
        admin: Admin { http: arguments.http, socket: arguments.socket },
        forward: vec![config::Forward {
            balance: Balance::RoundRobin,
            endpoints: arguments.to,
            listen: arguments.listen,
            name: "forward".to_owned(),
        }],
        inbound: None,
        on_exit: OnExit::Open,
        outbound: None,
        profile,
        workers: arguments.workers.map_or(Workers::Auto, Workers::Count),
    };
    log::start();
    Ok(control::run(config)?)
}

/// A shipped profile by its name, or a file by its path.
fn profile(word: &str) -> Result<Profile, Failure> {
    let is_path = Path::new(word).extension().is_some_and(|end| end == "yaml");
    if is_path {
        return Profile::load(Path::new(word)).map_err(|error| Failure::Usage(error.to_string()));
    }
    Profile::named(word).ok_or_else(|| {
        let names = Profile::names();
        let hint = nearest(word, &names).unwrap_or_default();
        let known = names.join(", ");
        Failure::Usage(format!(
            "--profile {word}: no shipped profile has this name{hint} (known: {known}; a path \
             must end in .yaml)"
        ))
    })
}
