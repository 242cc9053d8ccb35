// SPDX-License-Identifier: Apache-2.0
//! Load test for TCP forwarders: a server, a client, and honest numbers.
//!
//! A black box: it knows nothing of weir's code and measures any forwarder the same way.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod engine;
mod run;
mod serve;

/// Load test for TCP forwarders.
#[derive(Debug, Parser)]
#[command(name = "weir-loadtest", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Put load on an address and print what came of it, as JSON
    Run(Run),
    /// Be the server behind the forwarder, until ended
    Serve(Serve),
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// Where to listen
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
    /// What to do with a connection
    #[arg(long, value_enum, default_value = "echo")]
    kind: serve::Kind,
    /// Bytes of the messages to expect: buffers are made for them
    #[arg(long, default_value_t = 64 << 10)]
    size: usize,
    /// Congestion control of its sockets; the system's if not said
    #[arg(long)]
    congestion: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Run {
    /// The address to put load on
    #[arg(long, value_name = "ADDR")]
    to: SocketAddr,
    /// What to do
    #[arg(long, value_enum, default_value = "pingpong")]
    kind: run::Kind,
    /// Connections at a time
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Bytes of a message, or of a read in bulk
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Seconds to measure
    #[arg(long, default_value = "2", value_parser = seconds)]
    duration: Duration,
    /// Seconds before that which do not count
    #[arg(long, default_value = "0.5", value_parser = seconds)]
    warmup: Duration,
    /// Congestion control of its sockets; the system's if not said
    #[arg(long)]
    congestion: Option<String>,
    /// End connections with RST instead of FIN (`connections`)
    #[arg(long)]
    reset: bool,
    /// Be the server too, in the same thread, which then never sleeps: nobody pays for waking it
    #[arg(long, value_name = "ADDR")]
    serve: Option<SocketAddr>,
    /// Tell how the memory of this process changes (`idle`)
    #[arg(long, value_name = "PID")]
    watch_pid: Option<u32>,
}

fn main() -> Result<()> {
    match Arguments::parse().verb {
        Verb::Run(arguments) => run::run(&arguments),
        Verb::Serve(arguments) => serve::serve(&arguments),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be seconds, as 0.5".to_owned())?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|span| *span <= Duration::from_secs(3600))
        .ok_or_else(|| "must be from 0 to 3600 seconds".to_owned())
}
