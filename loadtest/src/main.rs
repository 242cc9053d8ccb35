// SPDX-License-Identifier: Apache-2.0
//! Load test for TCP forwarders: a server, a client, and honest numbers.
//!
//! A black box: it knows nothing of weir's code and measures any forwarder the same way.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, Verb};

mod arguments;
mod bolt;
mod bound;
mod compare;
mod engine;
mod forward;
mod http;
mod near;
mod place;
mod report;
mod run;
mod serve;
mod signals;
mod threshold;
mod watch;
mod words;

/// What was asked for cannot be: said before anything is done.
#[derive(Debug)]
struct Usage(String);

/// How a command ended, when it did not fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Exit {
    Fine,
    Interrupted,
    ThresholdMissed,
}

fn main() -> ExitCode {
    let exit = match Arguments::parse().verb {
        Verb::Bound(arguments) => bound::bound(&arguments),
        Verb::Compare(arguments) => compare::compare(&arguments),
        Verb::Forward(arguments) => forward::forward(&arguments).map(|()| Exit::Fine),
        Verb::Near(arguments) => near::near(&arguments),
        Verb::Report(arguments) => report::report(&arguments),
        Verb::Run(arguments) => run::run(&arguments),
        Verb::Serve(arguments) => serve::serve(&arguments).map(|()| Exit::Fine),
    };
    match exit {
        Ok(Exit::Fine) => ExitCode::SUCCESS,
        Ok(Exit::ThresholdMissed) => ExitCode::from(99),
        Ok(Exit::Interrupted) => ExitCode::from(130),
        Err(error) if signals::is_interrupted() => {
            eprintln!("interrupted before there was a result ({error:#})");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

impl Usage {
    /// For an error that only what was asked for can have.
    fn of(error: anyhow::Error) -> anyhow::Error {
        Usage(format!("{error:#}")).into()
    }
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// To stdout; who does not want to read it any more need not.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
