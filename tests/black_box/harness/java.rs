// SPDX-License-Identifier: Apache-2.0
//! Java, for peers that `make interop` fetches from Maven.

use std::path::Path;
use std::process::Command;

use super::{Net, Place};

/// A JVM in `place` with the class path that the environment's `variable` has; what to run is still to be
/// said. What it writes, it writes into `home`.
pub(crate) fn java(net: &Net, place: Place, home: &Path, variable: &str) -> Command {
    let classes = std::env::var(variable);
    let classes = classes.unwrap_or_else(|_| panic!("{variable}: `make interop` says it"));
    let mut command = net.command(place, "java");
    command.args(["-Xmx512m", "-XX:TieredStopAtLevel=1", "-cp", &classes]);
    for package in OPENED {
        command.arg("--add-opens").arg(format!("java.base/{package}=ALL-UNNAMED"));
    }
    command.arg(format!("-Duser.home={}", home.display())).current_dir(home);
    command
}

/// What old serializers look into, and Java 17 does not show unasked.
const OPENED: [&str; 6] =
    ["java.io", "java.lang", "java.lang.reflect", "java.math", "java.net", "java.util"];
