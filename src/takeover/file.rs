// SPDX-License-Identifier: Apache-2.0
//! The registry in a YAML file: read again whenever it changes, kept as it was when it is wrong.
//!
//! Read only: what applications of this host provide is not written into it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::fixed::FixedRegistry;
use super::{Provider, Registry, Snapshot, Standing};
use crate::config::registry_file;

/// A file with services.
#[derive(Debug)]
pub struct FileRegistry {
    /// What stood there when it was last right.
    held: FixedRegistry,
    /// It could be read, as far as was said.
    is_readable: bool,
    look_at: Instant,
    path: PathBuf,
    seen: Option<Stamp>,
}

/// By which a file is told from what it was. The kernel alone sets when it was changed last: a text of
/// the same length with the old time of writing (`cp -p`, `touch -r`) is news.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Stamp {
    changed: (i64, i64),
    inode: u64,
    len: u64,
}

impl FileRegistry {
    /// At `path`. Whether there is such a file yet is not asked: it may come later.
    #[must_use]
    pub fn new(name: &str, path: &Path) -> FileRegistry {
        let held = FixedRegistry::new(name, &[]);
        let (look_at, path) = (Instant::now(), path.to_owned());
        let mut registry = FileRegistry { held, is_readable: true, look_at, path, seen: None };
        registry.look();
        registry
    }

    fn look(&mut self) {
        self.look_at = Instant::now() + LOOK_EVERY;
        let read = self.read();
        // Said once, at the start too, and again when it has come and gone.
        let is_news = std::mem::replace(&mut self.is_readable, read.is_ok());
        match read {
            Ok(None) => {}
            Ok(Some(text)) => match registry_file(&self.path.display().to_string(), &text) {
                Ok(services) => self.held.replace(&services),
                Err(mistakes) => {
                    tracing::warn!("registry {} stays as it was:\n{mistakes}", self.name())
                }
            },
            Err(error) => {
                self.seen = None;
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
        let changed = (found.ctime(), found.ctime_nsec());
        let seen = Some(Stamp { changed, inode: found.ino(), len: found.len() });
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn providers(registry: &mut FileRegistry) -> Vec<String> {
        registry.look();
        let news = registry.held.news();
        news.iter().flat_map(|one| one.providers.iter().map(Provider::text)).collect()
    }

    #[test]
    fn other_text_of_the_same_length_and_time_is_news() {
        let place = tempfile::TempDir::new().unwrap();
        let file = place.path().join("services.yaml");
        let text = |port| format!("services: [{{ name: a, endpoints: [\"10.0.0.1:{port}\"] }}]\n");
        fs::write(&file, text(1)).unwrap();
        let written = fs::metadata(&file).unwrap().modified().unwrap();
        let mut registry = FileRegistry::new("main", &file);
        registry.subscribe("a");
        assert_eq!(providers(&mut registry), ["10.0.0.1:1"]);
        let other = place.path().join("other");
        fs::write(&other, text(2)).unwrap();
        fs::File::options().write(true).open(&other).unwrap().set_modified(written).unwrap();
        fs::rename(&other, &file).unwrap();
        assert_eq!(providers(&mut registry), ["10.0.0.1:2"]);
    }

    #[test]
    fn file_that_is_not_there_is_said_once() {
        let place = tempfile::TempDir::new().unwrap();
        let mut registry = FileRegistry::new("main", &place.path().join("services.yaml"));
        assert!(!registry.is_readable, "said at the start");
        fs::write(&registry.path, "services: []\n").unwrap();
        registry.look();
        assert!(registry.is_readable && registry.seen.is_some());
        fs::remove_file(&registry.path).unwrap();
        registry.look();
        assert!(!registry.is_readable && registry.seen.is_none());
    }
}
