// SPDX-License-Identifier: Apache-2.0
//! `weir run` and `weir config check`.

use std::path::Path;

use super::{Failure, print};
use crate::config::Config;
use crate::{control, log};

pub(super) fn run(file: &Path) -> Result<(), Failure> {
    let config = load(file)?;
    log::start();
    Ok(control::run(config)?)
}

pub(super) fn check(file: &Path) -> Result<(), Failure> {
    load(file)?;
    print(&format!("{}: the config is right\n", file.display()))
}

fn load(file: &Path) -> Result<Config, Failure> {
    Config::load(file).map_err(|mistakes| Failure::Usage(mistakes.to_string()))
}
