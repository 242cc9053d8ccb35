// SPDX-License-Identifier: Apache-2.0
//! Asks a running weir over its admin socket: one HTTP request, one answer.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

/// What came back.
#[derive(Debug)]
pub struct Answer {
    body: String,
    status: u16,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens there.
    #[error("no weir answers at {}: {source} (is it running? --socket names another one)", path.display())]
    Absent {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// What came back is not what a weir says.
    #[error("weir's answer makes no sense: {0}")]
    Garbled(String),
    /// It answered with a refusal.
    #[error("weir refused: {0}")]
    Refused(String),
}

impl From<serde_json::Error> for AskError {
    fn from(error: serde_json::Error) -> AskError {
        AskError::Garbled(error.to_string())
    }
}

/// Asks; waits at most a few seconds.
///
/// # Errors
///
/// Nobody is there, or it does not speak our language.
pub fn ask(path: &Path, method: &str, target: &str) -> Result<Answer, AskError> {
    let text = exchange(path, method, target)
        .map_err(|source| AskError::Absent { path: path.to_owned(), source })?;
    let garbled = || AskError::Garbled(text.chars().take(80).collect());
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(garbled)?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(garbled)?;
    Ok(Answer { body: body.to_owned(), status })
}

/// `Connection: close` and HTTP/1.0 keep the answer in one piece, ended by EOF.
fn exchange(path: &Path, method: &str, target: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    stream.set_write_timeout(Some(ANSWER_WITHIN))?;
    write!(stream, "{method} {target} HTTP/1.0\r\nHost: weir\r\nContent-Length: 0\r\n\r\n")?;
    let mut text = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    ///
    /// A refusal, or another shape.
    pub fn json<T: DeserializeOwned>(self) -> Result<T, AskError> {
        Ok(serde_json::from_str(&self.body()?)?)
    }

    /// Only whether it was done.
    ///
    /// # Errors
    ///
    /// A refusal.
    pub fn done(self) -> Result<(), AskError> {
        self.body().map(drop)
    }

    /// The body as it came.
    ///
    /// # Errors
    ///
    /// A refusal.
    pub fn body(self) -> Result<String, AskError> {
        if self.status == 200 {
            Ok(self.body)
        } else {
            Err(AskError::Refused(self.body.trim().to_owned()))
        }
    }
}

/// A busy weir answers in milliseconds; this only bounds a stuck one.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A list of a million flows.
const ANSWER_BYTES_MAX: u64 = 512 << 20;
