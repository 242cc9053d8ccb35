// SPDX-License-Identifier: Apache-2.0
//! `weir run`, `weir config check` and `weir config show`.

use std::path::Path;

use super::{Failure, ShowAs, print};
use crate::config::{self, Config};
use crate::control::shown;
use crate::{control, log};

pub(super) fn run(file: &Path) -> Result<(), Failure> {
    let config = load(file)?;
    log::start();
    Ok(control::run(config, Some(file))?)
}

pub(super) fn check(file: &Path) -> Result<(), Failure> {
    load(file)?;
    print(&format!("{}: the config is right\n", file.display()))
}

pub(super) fn show(file: Option<&Path>, output: ShowAs) -> Result<(), Failure> {
    let config = match file {
        Some(file) => load(file)?,
        None => Config::parse("weir.yaml", None, config::DEFAULT)
            .map_err(|mistakes| Failure::Usage(mistakes.to_string()))?,
    };
    let shown = shown::config(&config);
    print(&match output {
        ShowAs::Json => format!("{shown:#}\n"),
        ShowAs::Yaml => shown::yaml(&shown),
    })
}

pub(super) fn load(file: &Path) -> Result<Config, Failure> {
    Config::load(file).map_err(|mistakes| Failure::Usage(mistakes.to_string()))
}
