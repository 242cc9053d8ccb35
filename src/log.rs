// SPDX-License-Identifier: Apache-2.0
//! What weir says while it runs: to the journal if that is where stderr goes, else to stderr.
//!
//! Only the control thread says anything; a log that nobody reads can hold up nobody else.
//! `WEIR_LOG` chooses what is said, as in `warn` or `weir=debug`; `info` if it is not set.

use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Begins to log. Only the first call has an effect.
pub fn start() {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .parse_lossy(std::env::var("WEIR_LOG").as_deref().unwrap_or(USUAL));
    let registry = tracing_subscriber::registry().with(filter);
    let journal = is_journal().then(tracing_journald::layer).and_then(Result::ok);
    // Refused only if somebody has begun already.
    let _ = match journal {
        Some(journal) => registry.with(journal).try_init(),
        None => registry.with(to_stderr()).try_init(),
    };
}

fn to_stderr<S>() -> impl tracing_subscriber::Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(!is_plain && std::io::stderr().is_terminal())
}

/// systemd.exec(5): `JOURNAL_STREAM` holds device and inode of the stream that the journal reads.
/// It is inherited, so a program started from a service must compare.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// What registries' clients have to say, weir says in its own words.
const USUAL: &str = "info,zookeeper_client=off";
