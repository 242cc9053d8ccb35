// SPDX-License-Identifier: Apache-2.0
//! The `weir` command: reads its arguments, does what they say, picks the exit code.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match weir::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(text) = failure.text() {
                // Who does not listen cannot be told; the code says it too.
                let _ = writeln!(std::io::stderr(), "weir: {text}");
            }
            ExitCode::from(failure.code())
        }
    }
}
