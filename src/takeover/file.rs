// SPDX-License-Identifier: Apache-2.0
//! The registry in a YAML file: read again whenever it changes, kept as it was when it is wrong.
//!
//! Read only: what applications of this host provide is not written into it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::fixed::FixedRegistry;
use super::{Provider, Registry, Snapshot, Standing};
use crate::config::registry_file;

/// A file with services.
#[derive(Debug)]
pub struct FileRegistry {
    /// What stood there when it was last right.
    held: FixedRegistry,
    look_at: Instant,
    path: PathBuf,
    /// When it was written last, and how long it was.
    seen: Option<(SystemTime, u64)>,
}

impl FileRegistry {
    /// At `path`. Whether there is such a file yet is not asked: it may come later.
    #[must_use]
    pub fn new(name: &str, path: &Path) -> FileRegistry {
        let held = FixedRegistry::new(name, &[]);
        let mut registry =
            FileRegistry { held, look_at: Instant::now(), path: path.to_owned(), seen: None };
        registry.look();
        registry
    }

    fn look(&mut self) {
        self.look_at = Instant::now() + LOOK_EVERY;
        match self.read() {
            Ok(None) => {}
            Ok(Some(text)) => match registry_file(&self.path.display().to_string(), &text) {
                Ok(services) => self.held.replace(&services),
                Err(mistakes) => {
                    tracing::warn!("registry {} stays as it was:\n{mistakes}", self.name())
                }
            },
            Err(error) => {
                // Said once, and again when it has come and gone.
                let is_news = self.seen.take().is_some();
                let (name, path) = (self.name(), self.path.display());
                if is_news {
                    tracing::warn!("registry {name} stays as it was: read {path}: {error}");
                }
            }
        }
    }

    /// The text if it is new.
    fn read(&mut self) -> io::Result<Option<String>> {
        let found = std::fs::metadata(&self.path)?;
        let seen = Some((found.modified()?, found.len()));
        if found.len() > FILE_BYTES_MAX {
            return Err(io::Error::other("it is too large"));
        }
        if self.seen == seen {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&self.path)?;
        self.seen = seen;
        Ok(Some(text))
    }
}

impl Registry for FileRegistry {
    fn name(&self) -> &str {
        self.held.name()
    }

    fn holds(&self, _service: &str) -> bool {
        false
    }

    fn news(&mut self) -> Vec<Snapshot> {
        if self.look_at <= Instant::now() {
            self.look();
        }
        self.held.news()
    }

    fn publish(&mut self, _service: &str, _provider: &Provider) -> bool {
        false
    }

    fn standing(&self) -> Standing {
        Standing { is_connected: self.seen.is_some(), ..self.held.standing() }
    }

    fn unpublish(&mut self, _service: &str) {}

    fn subscribe(&mut self, service: &str) {
        self.held.subscribe(service);
    }

    fn unsubscribe(&mut self, service: &str) {
        self.held.unsubscribe(service);
    }
}

/// A look is one `stat`.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const FILE_BYTES_MAX: u64 = 16 << 20;
