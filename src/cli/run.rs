// SPDX-License-Identifier: Apache-2.0
//! `weir run`, `weir config check` and `weir config show`.

use std::path::Path;

use serde_json::{Value, json};

use super::{Failure, Output, ShowAs, print};
use crate::config::{self, Config};
use crate::control::shown;
use crate::yaml::{Mistake, Mistakes};
use crate::{control, log};

pub(super) fn run(file: &Path) -> Result<(), Failure> {
    let config = load(file)?;
    log::start();
    Ok(control::run(config, Some(file))?)
}

pub(super) fn check(file: &Path, output: Output) -> Result<(), Failure> {
    let loaded = Config::load(file);
    match output {
        Output::Json => print(&format!("{}\n", rows(file, loaded.as_ref().err())))?,
        Output::Table if loaded.is_ok() => {
            print(&format!("{}: the config is right\n", file.display()))?;
        }
        Output::Table => {}
    }
    loaded.map(drop).map_err(|mistakes| Failure::Usage(mistakes.to_string()))
}

/// Every mistake, for programs; an empty list if there is none.
fn rows(file: &Path, mistakes: Option<&Mistakes>) -> Value {
    let row = |Mistake { path, place, text }: &Mistake| {
        json!({
            "file": file.display().to_string(),
            "line": place.line,
            "column": place.column,
            "path": path,
            "text": text,
        })
    };
    mistakes.map(Mistakes::sorted).unwrap_or_default().into_iter().map(row).collect()
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
