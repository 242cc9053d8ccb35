// SPDX-License-Identifier: Apache-2.0
//! The `weir` command: reads its arguments, does what they say, picks the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    match weir::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(text) = failure.text() {
                eprintln!("weir: {text}");
            }
            ExitCode::from(failure.code())
        }
    }
}
