// SPDX-License-Identifier: Apache-2.0
//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};

use crate::compare::select::{self, Asked, Selection, Vary};
use crate::run::sizes::Sizes;
use crate::{run, serve};

/// Load test for TCP forwarders.
#[derive(Debug, Parser)]
#[command(name = "weir-loadtest", version, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// The least that a forwarder can cost on this host: its calls on sockets, and nothing else
    Bound(Bound),
    /// Compare modes, relays and other forwarders on this host, or two such results
    Compare(Box<Compare>),
    /// A plain forwarder to compare with
    #[command(hide = true)]
    Forward(Forward),
    /// Wait until two CPUs share a cache, and tell how far apart they are: a hypervisor moves them
    Near(Near),
    /// Make a page, tables or data of a result of `compare`
    Report(Report),
    /// Put load on an address and print what came of it
    Run(Box<Run>),
    /// Be the server behind the forwarder, until ended
    Serve(Serve),
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Serve {
    /// Where to listen
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: SocketAddr,
    /// What to do with a connection
    #[arg(long, value_enum, default_value = "echo")]
    pub(crate) kind: serve::Kind,
    /// Bytes of the messages to expect (buffers are made for them), or of the body of an answer
    /// (`http`); 4096 for `echo`, 65536 for the others if not said
    #[arg(long, value_name = "BYTES")]
    pub(crate) size: Option<usize>,
    /// Congestion control of its sockets; the system's if not said
    #[arg(long, value_name = "NAME")]
    pub(crate) congestion: Option<String>,
    /// Every word must carry its flow's seed and its position: a connection where one does not is
    /// reset (`sink`), or is sent such words (`source`)
    #[arg(long)]
    pub(crate) check: bool,
    /// Milliseconds before an answer (`echo`, `http`), as if it were work
    #[arg(long, value_name = "MS", default_value = "0", value_parser = milliseconds)]
    pub(crate) delay: Duration,
    /// What comes are SOFABolt requests of so many bytes: answer them (`echo`)
    #[arg(long, value_name = "BYTES")]
    pub(crate) bolt: Option<usize>,
    /// Bytes a second that a connection is read at (`slow`)
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 10)]
    pub(crate) read_rate: u64,
    #[command(flatten)]
    pub(crate) place: Place,
}

/// Where and by what a load is made.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Place {
    /// What moves the bytes
    #[arg(long, value_enum, default_value = "ring")]
    pub(crate) engine: Engine,
    /// The only CPU to run on
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpu: Option<usize>,
    /// The network namespace of its sockets
    #[arg(long, value_name = "PATH")]
    pub(crate) netns: Option<PathBuf>,
}

/// What moves the bytes of the generator.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Engine {
    /// io_uring as it can be used: multishot, shared buffers, no descriptors
    Ring,
    /// The crate tokio-uring: a baseline
    TokioUring,
}

#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub(crate) struct Run {
    /// The address to put load on
    #[arg(long, value_name = "ADDR")]
    pub(crate) to: SocketAddr,
    /// What to do
    #[arg(long, value_enum, default_value = "pingpong")]
    pub(crate) kind: run::Kind,
    /// Connections at a time
    #[arg(long, default_value_t = 64)]
    pub(crate) connections: usize,
    /// Bytes of a message; several by weight as `64*90,5000*9,256k*1`
    #[arg(long, default_value = "64")]
    pub(crate) size: Sizes,
    /// Messages are SOFABolt requests of so many bytes each for the service `bench`, all in flight
    /// at once; `--serve` answers them
    #[arg(long, value_name = "BYTES")]
    pub(crate) bolt: Option<usize>,
    /// Open loop: so many exchanges a second in total, and a latency counts from when its exchange
    /// was due. Closed loop if not said: who has its answer asks again
    #[arg(long, value_name = "PER_SECOND", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Milliseconds between an answer and the next question of a connection (closed loop)
    #[arg(long, value_name = "MS", default_value = "0", value_parser = milliseconds)]
    pub(crate) think: Duration,
    /// Exchanges after which a connection is closed and another takes its place; 0 for never
    #[arg(long, value_name = "EXCHANGES", default_value_t = 0)]
    pub(crate) churn: u32,
    /// Seconds to measure
    #[arg(long, default_value = "2", value_parser = seconds)]
    pub(crate) duration: Duration,
    /// Seconds before that which do not count, from when every connection stands
    #[arg(long, default_value = "0.5", value_parser = seconds)]
    pub(crate) warmup: Duration,
    /// Seconds without an answer after which a connection is given up
    #[arg(long, default_value = "10", value_parser = seconds)]
    pub(crate) timeout: Duration,
    /// Congestion control of its sockets; the system's if not said
    #[arg(long, value_name = "NAME")]
    pub(crate) congestion: Option<String>,
    /// Every word carries its flow's seed and its position, and is checked when it comes back
    #[arg(long)]
    pub(crate) check: bool,
    /// The first seed of `--check`; connections count up from it
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// End connections with RST instead of FIN
    #[arg(long)]
    pub(crate) reset: bool,
    /// Be the server too, in the same thread, which then never sleeps: nobody pays for waking it
    #[arg(long, value_name = "ADDR")]
    pub(crate) serve: Option<SocketAddr>,
    /// The network namespace of that server
    #[arg(long, value_name = "PATH", requires = "serve")]
    pub(crate) serve_netns: Option<PathBuf>,
    /// The cgroup (a directory) to join before any socket is made
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Option<PathBuf>,
    /// Tell what the load costs this process and its children
    #[arg(long, value_name = "PID")]
    pub(crate) watch_pid: Vec<u32>,
    /// Tell what this weir counts, too: its admin socket
    #[arg(long, value_name = "PATH")]
    pub(crate) watch_socket: Option<PathBuf>,
    /// Tell the stretches in which a hypervisor gave one of these CPUs to others
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) watch_cpu: Vec<usize>,
    /// How to print the outcome
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Output,
    /// Exit with 99 unless this holds, as `p99<2ms`, `rate>10000`, `errors=0`; may be repeated
    #[arg(long, value_name = "CONDITION")]
    pub(crate) threshold: Vec<crate::threshold::Threshold>,
    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Bound {
    /// Flows, of four sockets each
    #[arg(long, default_value_t = 64)]
    pub(crate) connections: usize,
    /// The CPU of client and server, and that of the forwarder
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,1")]
    pub(crate) cpus: Vec<usize>,
    /// Seconds to measure
    #[arg(long, default_value = "1", value_parser = seconds)]
    pub(crate) duration: Duration,
    /// How to print
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Output,
}

/// Prints the nanoseconds in which a cache line goes from one to the other and back. With
/// `--nearest` it ends with 99 if they are still more than three times as far apart after the time.
#[derive(Debug, clap::Args)]
pub(crate) struct Near {
    /// The two CPUs
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,1")]
    pub(crate) cpus: Vec<usize>,
    /// Nanoseconds at their nearest, as another call told; without it this one looks for all of the
    /// time and tells the least
    #[arg(long, value_name = "NS", value_parser = nanoseconds)]
    pub(crate) nearest: Option<f64>,
    /// Seconds to wait at most
    #[arg(long, default_value = "10", value_parser = seconds)]
    pub(crate) wait: Duration,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Report {
    /// The result
    #[arg(value_name = "RESULT.json")]
    pub(crate) result: PathBuf,
    /// What to make of it
    #[arg(long, value_enum, default_value = "html")]
    pub(crate) format: crate::report::Format,
    /// Where to write it, `-` for stdout; a page goes beside the result if not said, all else to stdout
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// What ratios are to; direct if not said
    #[arg(long, value_name = "TARGET")]
    pub(crate) baseline: Option<String>,
    /// Exit with 99 unless this holds in every cell that has such a figure, as `p99<2ms`
    #[arg(long, value_name = "CONDITION")]
    pub(crate) threshold: Vec<crate::threshold::Threshold>,
}

/// How to print.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Output {
    /// For programs
    Json,
    /// For people
    Table,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Forward {
    /// Where to listen
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: SocketAddr,
    /// Where to forward to
    #[arg(long, value_name = "ADDR")]
    pub(crate) to: SocketAddr,
    /// By what
    #[arg(long, value_enum)]
    pub(crate) engine: crate::forward::Engine,
}

/// Measures here, in namespaces of its own: the host's are never touched. With two results as
/// arguments it says what differs.
#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub(crate) struct Compare {
    /// Two results, the older first: nothing is measured then
    #[arg(value_name = "OLD.json NEW.json", num_args = 0..=2)]
    pub(crate) results: Vec<PathBuf>,
    /// direct, forward, inbound-tproxy, inbound-redirect, outbound-connect, outbound-tproxy,
    /// outbound-redirect, takeover; or all, none
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) modes: Vec<String>,
    /// How weir moves bytes: auto, copy, splice, sockmap; or all
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) relays: Vec<String>,
    /// Profiles of weir: balanced, latency, many-flows, throughput; or all
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) profiles: Vec<String>,
    /// A key of the profile with several values to compare, as ring.spin_us=0,20,50
    #[arg(long, value_name = "KEY=VALUES")]
    pub(crate) vary: Option<Vary>,
    /// Workers of weir, each on a CPU of its own as far as there are: 1, or several as 1,2
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: Vec<u32>,
    /// Other forwarders: haproxy, haproxy-splice, nginx, envoy, tokio, tokio-uring; or all, none
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) peers: Vec<String>,
    /// pingpong-N, mixed-N, connections-N, connections-reset-N, bulk-N, upload-N, idle-N, where N
    /// is connections; pingpong-N@RATE is an open loop
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) workloads: Vec<String>,
    /// Rounds; five say something with 94 % confidence
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=15))]
    pub(crate) rounds: u32,
    /// Seconds of each measurement; what the budget allows if not said
    #[arg(long, value_parser = measured)]
    pub(crate) seconds: Option<f64>,
    /// Seconds that all may take
    #[arg(long, default_value = "170", value_parser = budget)]
    pub(crate) budget: f64,
    /// Where the result is kept, also when interrupted
    #[arg(long, value_name = "FILE", default_value = "compare.json")]
    pub(crate) out: PathBuf,
    /// What ratios are to; direct if not said
    #[arg(long, value_name = "TARGET")]
    pub(crate) baseline: Option<String>,
    /// The weir to measure
    #[arg(long, value_name = "PATH")]
    pub(crate) weir: Option<PathBuf>,
    /// CPU of client and server
    #[arg(long, value_name = "NUMBER")]
    pub(crate) generator_cpu: Option<usize>,
    /// CPU of the forwarder
    #[arg(long, value_name = "NUMBER")]
    pub(crate) forwarder_cpu: Option<usize>,
    /// Connection tracking is on where the forwarders are, as other people's rules leave it on most
    /// nodes of a mesh
    #[arg(long)]
    pub(crate) tracking: bool,
    /// Congestion control in the namespaces
    #[arg(long, value_name = "NAME", default_value = "reno")]
    pub(crate) congestion: String,
    /// Count the forwarder's system calls with perf: costs it some speed
    #[arg(long)]
    pub(crate) syscalls: bool,
    /// Measure although others keep the machine busy
    #[arg(long)]
    pub(crate) force: bool,
    /// Exit with 99 unless this holds in every cell that has such a figure, as `p99<2ms`
    #[arg(long, value_name = "CONDITION")]
    pub(crate) threshold: Vec<crate::threshold::Threshold>,
    /// How to print
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Output,
}

impl Compare {
    /// What is to be compared.
    pub(crate) fn selection(&self) -> anyhow::Result<Selection> {
        select::select(&Asked {
            modes: &self.modes,
            peers: &self.peers,
            profiles: &self.profiles,
            relays: &self.relays,
            vary: self.vary.as_ref(),
            workers: &self.workers,
            workloads: &self.workloads,
        })
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be seconds, as 0.5".to_owned())?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|span| *span <= Duration::from_secs(3600))
        .ok_or_else(|| "must be from 0 to 3600 seconds".to_owned())
}

fn measured(text: &str) -> Result<f64, String> {
    within(text, 0.05, 600.0)
}

fn budget(text: &str) -> Result<f64, String> {
    within(text, 1.0, 86_400.0)
}

fn within(text: &str, least: f64, most: f64) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (least..=most).contains(seconds));
    seconds.ok_or_else(|| format!("must be from {least} to {most} seconds"))
}

fn nanoseconds(text: &str) -> Result<f64, String> {
    within(text, 1.0, 1e6).map_err(|_| "must be from 1 to 1000000 nanoseconds".to_owned())
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    let millis: f64 = text.parse().map_err(|_| "must be milliseconds, as 0.5".to_owned())?;
    Duration::try_from_secs_f64(millis / 1000.0)
        .ok()
        .filter(|span| *span <= Duration::from_secs(60))
        .ok_or_else(|| "must be from 0 to 60000 milliseconds".to_owned())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| "must be a number, as 20000".to_owned())?;
    let fits = (0.001..=10_000_000.0).contains(&rate);
    if fits { Ok(rate) } else { Err("must be from 0.001 to 10000000".to_owned()) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::{Arguments, Verb};

    /// Commands of a page: in code of its text, and lines of its blocks.
    fn commands(page: &str) -> Vec<String> {
        let joined = page.replace("\\\n", " ").replace("target/release/", "");
        let parts = joined.lines().flat_map(|line| line.split('`'));
        let parts = parts.map(|part| part.split(" # ").next().unwrap_or(part).trim());
        // Words in capitals stand for something else, dots for anything.
        let is_whole = |part: &&str| {
            let is_word = |word: &str| word.len() < 2 || word != word.to_uppercase();
            part.split(' ')
                .all(|word| word.starts_with(|one: char| !one.is_alphabetic()) || is_word(word))
        };
        let parts = parts.filter(|part| part.starts_with("weir-loadtest ")).filter(is_whole);
        parts.map(|part| part.replace(['\'', '\n'], "").replace("...", "")).collect()
    }

    #[test]
    fn every_command_of_the_documentation_is_understood() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut count = 0;
        for page in ["README.md", "docs/BENCHMARKING.md", "docs/TUNING.md", "tuning/README.md"] {
            let text = std::fs::read_to_string(top.join(page)).unwrap_or_default();
            for command in commands(&text) {
                let arguments = Arguments::try_parse_from(command.split_whitespace());
                let said = match arguments.map(|arguments| arguments.verb) {
                    Ok(Verb::Compare(compare)) if compare.results.is_empty() => {
                        compare.selection().err().map(|error| error.to_string())
                    }
                    Ok(_) => None,
                    Err(error) => Some(error.to_string()),
                };
                assert_eq!(said, None, "{page}: {command}");
                count += 1;
            }
        }
        assert!(count > 15, "only {count} commands were found");
    }
}
