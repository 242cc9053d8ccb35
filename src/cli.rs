// SPDX-License-Identifier: Apache-2.0
//! The verbs. Data goes to stdout, talk to stderr; a reader that goes away is no failure.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

use crate::control::RunError;
use crate::profile::{Profile, RelayMode};
use crate::yaml::nearest;

mod ask;
mod check;
mod demo;
mod forward;
mod pages;
mod rules;
mod run;
mod tune;

/// The forwarding dataplane of a service mesh node.
#[derive(Debug, Parser)]
#[command(name = "weir", version, arg_required_else_help = true, after_long_help = MORE)]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Try what weir needs on this host, and say what does not work and what to do
    Check {
        /// Try what this config asks for, too
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
        /// Exit with 3 if anything could work better
        #[arg(long)]
        strict: bool,
    },
    /// Print the completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Check, show or describe a config file
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// Show the main job on real traffic, in network namespaces of its own (needs root)
    Demo {
        /// How long to watch the load
        #[arg(long, value_name = "SECONDS", default_value = "6")]
        seconds: u64,
    },
    /// Dial from inside a cgroup; for `weir check`
    #[command(hide = true)]
    Dial {
        /// Its directory
        #[arg(long, value_name = "PATH")]
        cgroup: PathBuf,
        /// Where to
        to: SocketAddr,
    },
    /// Let a running weir finish its flows and end
    Drain(AskFor),
    /// List the endpoints of a running weir, and what is known about each
    Endpoints(AskFor),
    /// List the flows of a running weir
    Flows(AskFor),
    /// Forward TCP connections, without a config file and without privilege
    Forward(Forward),
    /// Write the manual pages into a directory
    Man {
        /// Where; made if it is not there
        directory: PathBuf,
    },
    /// Show, prepare or remove what capture changes in the kernel, in this network namespace
    Rules {
        #[command(subcommand)]
        verb: RulesVerb,
    },
    /// Run with a config file
    Run {
        /// The config file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// List the services of a running weir
    Services(AskFor),
    /// Ask a running weir how it is
    Status {
        #[command(flatten)]
        ask: AskFor,
        /// Wait up to so many seconds until every worker accepts and capture is in place
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
    },
    /// Show the profiles, and set the sysctls that they want
    Tune {
        #[command(subcommand)]
        verb: tune::TuneVerb,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigVerb {
    /// Say whether the file is right, and every mistake if it is not
    Check {
        /// The config file
        file: PathBuf,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Print the JSON Schema of config files, for editors
    Schema,
    /// Print the config as weir understands it, every default filled in
    Show {
        /// The config file; the one that `weir demo` runs if not said
        file: Option<PathBuf>,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "yaml")]
        output: ShowAs,
    },
}

#[derive(Debug, Subcommand)]
enum RulesVerb {
    /// Make what can stand without a running weir: the way of marked packets and, with `on_exit:
    /// closed`, what refuses traffic until weir runs. `weir run` does the rest
    Apply {
        /// The config file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// Change nothing: print every step of `weir run` and its undo, to run by hand
        #[arg(long)]
        dry_run: bool,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Remove what weir has left, dead or ended; a running one keeps what it holds
    Clear {
        /// A config file: in the network namespaces of its workloads, too
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Change nothing: print the steps
        #[arg(long)]
        dry_run: bool,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Show what a config asks for and what is there
    Show {
        /// The config file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// How to show it
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum ShowAs {
    /// For programs
    Json,
    /// For people, and for `weir run -c`
    Yaml,
}

/// Which weir to ask.
#[derive(Debug, clap::Args)]
struct Ask {
    /// The admin socket of the weir to ask
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

/// Which weir to ask, and how to show the answer.
#[derive(Debug, clap::Args)]
struct AskFor {
    #[command(flatten)]
    ask: Ask,
    /// How to show it
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Output {
    /// For programs
    Json,
    /// For people
    Table,
}

#[derive(Debug, clap::Args)]
struct Forward {
    /// Where to listen
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
    /// Where to forward to; several are taken in turn
    #[arg(long, value_name = "ADDR", required = true)]
    to: Vec<SocketAddr>,
    /// How many workers; one on each CPU if not said
    #[arg(long)]
    workers: Option<NonZeroU16>,
    /// A shipped profile, or a path ending in .yaml
    #[arg(long, default_value = "balanced")]
    profile: String,
    /// How bytes move; the profile's word if not said
    #[arg(long, value_parser = relay_mode)]
    relay: Option<RelayMode>,
    /// The admin socket; none if not said
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Serve metrics, health and flows over HTTP
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub enum Failure {
    /// It ran and failed.
    Failed(String),
    /// A signal ended it.
    Interrupted,
    /// It cannot work here; nothing was changed.
    Preflight(String),
    /// What was asked makes no sense.
    Usage(String),
    /// It works, but not as well as it could, and the user wants to know.
    Warned(String),
}

impl Failure {
    /// The exit code.
    #[must_use]
    pub const fn code(&self) -> u8 {
        match self {
            Failure::Failed(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Warned(_) => 3,
            Failure::Preflight(_) => 4,
            Failure::Interrupted => 130,
        }
    }

    /// What to say about it.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match self {
            Failure::Failed(text)
            | Failure::Preflight(text)
            | Failure::Usage(text)
            | Failure::Warned(text) => Some(text),
            Failure::Interrupted => None,
        }
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Failure {
        match error {
            RunError::Interrupted => Failure::Interrupted,
            error if error.is_preflight() => Failure::Preflight(error.to_string()),
            error => Failure::Failed(error.to_string()),
        }
    }
}

/// Reads the arguments of this process and does what they say.
///
/// # Errors
///
/// Why it could not; clap ends the process itself on unknown arguments (exit code 2).
pub fn run() -> Result<(), Failure> {
    match Arguments::parse().verb {
        Verb::Check { config, output, strict } => check::check(config.as_deref(), output, strict),
        Verb::Completions { shell } => pages::completions(shell),
        Verb::Config { verb: ConfigVerb::Check { file, output } } => run::check(&file, output),
        Verb::Config { verb: ConfigVerb::Schema } => print(crate::config::SCHEMA),
        Verb::Config { verb: ConfigVerb::Show { file, output } } => {
            run::show(file.as_deref(), output)
        }
        Verb::Demo { seconds } => demo::run(seconds),
        Verb::Dial { cgroup, to } => check::dial(&cgroup, to),
        Verb::Drain(ask) => ask::drain(&ask.ask.socket, ask.output),
        Verb::Endpoints(ask) => ask::endpoints(&ask.ask.socket, ask.output),
        Verb::Flows(ask) => ask::flows(&ask.ask.socket, ask.output),
        Verb::Forward(arguments) => forward::run(arguments),
        Verb::Man { directory } => pages::man(&directory),
        Verb::Rules { verb } => rules::run(verb),
        Verb::Run { config } => run::run(&config),
        Verb::Services(ask) => ask::services(&ask.ask.socket, ask.output),
        Verb::Status { ask, wait } => ask::status(&ask.ask.socket, ask.output, wait),
        Verb::Tune { verb } => tune::run(verb),
    }
}

/// Writes to stdout. A reader that has gone away (`weir man | head`) wants no more: that is fine.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Failed(format!("write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// A shipped profile by its name, or a file by its path.
fn profile_of(word: &str) -> Result<Profile, Failure> {
    let is_path = Path::new(word).extension().is_some_and(|end| end == "yaml");
    if is_path {
        return Profile::load(Path::new(word)).map_err(|error| Failure::Usage(error.to_string()));
    }
    Profile::named(word).ok_or_else(|| {
        let names = Profile::names();
        let hint = nearest(word, &names).unwrap_or_default();
        let known = names.join(", ");
        Failure::Usage(format!(
            "profile {word}: no shipped profile has this name{hint} (known: {known}; a path must \
             end in .yaml)"
        ))
    })
}

fn relay_mode(word: &str) -> Result<RelayMode, String> {
    let known = RelayMode::WORDS;
    let found = known.iter().find(|(name, _)| *name == word);
    let names = known.map(|(name, _)| name);
    found.map(|(_, mode)| *mode).ok_or_else(|| format!("known: {}", names.join(", ")))
}

fn command() -> clap::Command {
    Arguments::command()
}

/// What all verbs have in common; the last part of the first manual page.
const MORE: &str = "\
Exit codes: 0 well; 1 failed while running; 2 usage, or mistakes in a file; 3 warnings (`check --strict`); \
4 it cannot work here, and nothing was changed; 130 interrupted (`run`, `forward`: by a second SIGINT).

Signals of `run` and `forward`: SIGTERM and SIGINT let flows end, and a second one resets what is left; \
SIGHUP reads the config again.

Environment: WEIR_LOG says what is logged (`warn`, `weir=debug`; `info` if not said); NO_COLOR switches \
colours off. Logs go to the journal if stderr does.

Files: /run/weir/admin.sock is the admin socket if not said otherwise; weir leaves nothing else.";

/// Where commands look for a running weir.
pub(crate) const DEFAULT_SOCKET: &str = "/run/weir/admin.sock";
