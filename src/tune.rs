// SPDX-License-Identifier: Apache-2.0
//! The sysctls that a profile wants: compared, set, and put back exactly as they were.
//!
//! Changes nothing unless asked to. What was there before is on disk before the first value
//! changes, so that `off` also works after a crash. A value that somebody else has changed since
//! is theirs and stays.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::profile::{Profile, Wanted, fields};

pub use recommend::{RecommendError, Recommendation, Verdict, recommend};

mod recommend;

/// A host's sysctls, and where it is noted what was changed.
#[derive(Clone, Debug)]
pub struct Tuning {
    root: PathBuf,
    state: PathBuf,
}

/// One sysctl of a profile, compared with the host.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Row {
    /// As wanted.
    pub met: bool,
    /// `net.core.somaxconn`.
    pub name: String,
    /// What it is.
    pub now: String,
    /// What the profile wants: a value, or `>=` a number.
    pub wanted: String,
}

/// One value to write.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Step {
    /// What it is now; writing this undoes the step.
    pub before: String,
    /// `net.core.somaxconn`.
    pub name: String,
    /// What it will be.
    pub value: String,
}

/// What `off` did not put back, because somebody else has changed it since.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Left {
    /// `net.core.somaxconn`.
    pub name: String,
    /// What it is, and stays.
    pub now: String,
}

/// Why sysctls could not be read or set. What was set before the failure was put back.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    /// The kernel has none of this name.
    #[error("read {name}: {source} (does this kernel have it, in this network namespace?)")]
    Read {
        /// `net.core.somaxconn`.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The note of what was before.
    #[error("{path}: {source} (it notes what was before; needs root, or `--state PATH`)")]
    State {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The kernel refused a value.
    #[error("set {name} to {value}: {source} (needs root; containers often have them read-only)")]
    Write {
        /// `net.core.somaxconn`.
        name: String,
        /// What the kernel said.
        source: io::Error,
        /// What was written.
        value: String,
    },
}

/// What was changed, on disk.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
struct State {
    /// By sysctl: what it was before the first change, and what it was set to.
    changes: BTreeMap<String, Change>,
    profile: String,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Change {
    before: String,
    set: String,
}

impl Tuning {
    /// Of the network namespace that this process is in; noted in `state`, or below `/run/weir`.
    #[must_use]
    pub fn of_host(state: Option<PathBuf>) -> Tuning {
        let state = state.unwrap_or_else(|| {
            let namespace = std::fs::metadata("/proc/self/ns/net").map_or(0, |meta| meta.ino());
            PathBuf::from(format!("/run/weir/tune-{namespace}.json"))
        });
        Tuning { root: PathBuf::from("/proc/sys"), state }
    }

    /// Every sysctl of `profile`, compared.
    ///
    /// # Errors
    ///
    /// The first one that cannot be read.
    pub fn verify(&self, profile: &Profile) -> Result<Vec<Row>, TuneError> {
        let row = |(name, wanted): (&String, &Wanted)| {
            let now = self.read(name)?;
            let met = wanted.is_met(&now);
            Ok(Row { met, name: name.clone(), now, wanted: wanted.to_string() })
        };
        profile.sysctls.iter().map(row).collect()
    }

    /// The name of the profile whose sysctls were applied, if any are.
    ///
    /// # Errors
    ///
    /// The note cannot be read.
    pub fn applied(&self) -> Result<Option<String>, TuneError> {
        Ok(self.noted()?.map(|state| state.profile))
    }

    /// What `apply` would write, in its order: first what an earlier profile changed and this one
    /// does not want is put back, then what this one wants is set.
    ///
    /// # Errors
    ///
    /// A sysctl or the note cannot be read.
    pub fn steps(&self, profile: &Profile) -> Result<Vec<Step>, TuneError> {
        let noted = self.noted()?.unwrap_or_default();
        let mut steps = Vec::new();
        for (name, change) in &noted.changes {
            if !profile.sysctls.contains_key(name) && self.read(name)? == change.set {
                let (before, value) = (change.set.clone(), change.before.clone());
                steps.push(Step { before, name: name.clone(), value });
            }
        }
        for (name, wanted) in &profile.sysctls {
            let before = self.read(name)?;
            if !wanted.is_met(&before) {
                steps.push(Step { before, name: name.clone(), value: wanted.value() });
            }
        }
        Ok(steps)
    }

    /// Sets what `profile` wants, and says what was written.
    ///
    /// # Errors
    ///
    /// What could not be done; everything is then as it was.
    pub fn apply(&self, profile: &Profile) -> Result<Vec<Step>, TuneError> {
        let steps = self.steps(profile)?;
        let earlier = self.noted()?;
        let mut state = earlier.clone().unwrap_or_default();
        state.profile.clone_from(&profile.name);
        state.changes.retain(|name, _| profile.sysctls.contains_key(name));
        for step in steps.iter().filter(|step| profile.sysctls.contains_key(&step.name)) {
            let known = state.changes.get(&step.name).map(|change| change.before.clone());
            let before = known.unwrap_or_else(|| step.before.clone());
            state.changes.insert(step.name.clone(), Change { before, set: step.value.clone() });
        }
        // What is put back by the first steps stays noted until it is.
        let mut during = earlier.clone().unwrap_or_default();
        during.changes.extend(state.changes.clone());
        self.note(&during)?;
        for (done, step) in steps.iter().enumerate() {
            if let Err(error) = self.write(&step.name, &step.value) {
                for step in steps[..done].iter().rev() {
                    self.write(&step.name, &step.before)?;
                }
                earlier.map_or_else(|| self.forget(), |earlier| self.note(&earlier))?;
                return Err(error);
            }
        }
        self.note(&state)?;
        Ok(steps)
    }

    /// What `off` would write, and what it would leave to whoever changed it since.
    ///
    /// # Errors
    ///
    /// A sysctl or the note cannot be read.
    pub fn undo_steps(&self) -> Result<(Vec<Step>, Vec<Left>), TuneError> {
        let (mut steps, mut left) = (Vec::new(), Vec::new());
        for (name, Change { before, set }) in self.noted()?.unwrap_or_default().changes {
            let now = self.read(&name)?;
            if now == set && set != before {
                steps.push(Step { before: now, name, value: before });
            } else if now != before {
                left.push(Left { name, now });
            }
        }
        Ok((steps, left))
    }

    /// Puts everything back; harmless where nothing was applied.
    ///
    /// # Errors
    ///
    /// What could not be put back; the note stays, so that it can be tried again.
    pub fn off(&self) -> Result<(Vec<Step>, Vec<Left>), TuneError> {
        let (steps, left) = self.undo_steps()?;
        for step in &steps {
            self.write(&step.name, &step.value)?;
        }
        self.forget()?;
        Ok((steps, left))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name.replace('.', "/"))
    }

    fn read(&self, name: &str) -> Result<String, TuneError> {
        let read = std::fs::read_to_string(self.path(name));
        let failed = |source| TuneError::Read { name: name.to_owned(), source };
        read.map(|text| fields(&text)).map_err(failed)
    }

    fn write(&self, name: &str, value: &str) -> Result<(), TuneError> {
        std::fs::write(self.path(name), value).map_err(|source| TuneError::Write {
            name: name.to_owned(),
            source,
            value: value.to_owned(),
        })
    }

    fn noted(&self) -> Result<Option<State>, TuneError> {
        match std::fs::read_to_string(&self.state) {
            Ok(text) => serde_json::from_str(&text).map(Some).map_err(|e| self.failed(e.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed(source)),
        }
    }

    /// Whole or not at all: a reader never sees half a note.
    fn note(&self, state: &State) -> Result<(), TuneError> {
        let new = self.state.with_extension("new");
        let text = serde_json::to_string_pretty(state).map_err(|e| self.failed(e.into()))?;
        std::fs::create_dir_all(self.state.parent().unwrap_or(Path::new("/")))
            .and_then(|()| std::fs::write(&new, text))
            .and_then(|()| std::fs::rename(&new, &self.state))
            .map_err(|source| self.failed(source))
    }

    fn forget(&self) -> Result<(), TuneError> {
        match std::fs::remove_file(&self.state) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed(error)),
            _ => Ok(()),
        }
    }

    fn failed(&self, source: io::Error) -> TuneError {
        TuneError::State { path: self.state.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// A made-up host whose sysctls are files.
    struct Host {
        place: TempDir,
        tuning: Tuning,
    }

    impl Host {
        fn new(values: &[(&str, &str)]) -> Host {
            let place = TempDir::new().unwrap();
            let root = place.path().join("sys");
            let tuning = Tuning { root, state: place.path().join("run/tune.json") };
            for (name, value) in values {
                let path = tuning.path(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, value).unwrap();
            }
            Host { place, tuning }
        }

        fn all(&self, names: &[&str]) -> Vec<String> {
            names.iter().map(|name| self.tuning.read(name).unwrap()).collect()
        }
    }

    fn profile(name: &str, sysctls: &[(&str, &str)]) -> Profile {
        let wanted = |(name, text): &(&str, &str)| ((*name).to_owned(), text.parse().unwrap());
        let sysctls = sysctls.iter().map(wanted).collect();
        Profile { name: name.to_owned(), sysctls, ..Profile::default() }
    }

    #[test]
    fn off_puts_back_exactly_what_was_there_before_the_first_profile() {
        let host = Host::new(&[("net.a", "128"), ("net.b", "1\t2"), ("net.c", "7")]);
        let one = profile("one", &[("net.a", ">=4096"), ("net.b", "3 4")]);
        let other = profile("other", &[("net.a", ">=9000"), ("net.c", ">=5")]);
        host.tuning.apply(&one).unwrap();
        assert_eq!(host.all(&["net.a", "net.b", "net.c"]), ["4096", "3 4", "7"]);
        assert_eq!(host.tuning.applied().unwrap().as_deref(), Some("one"));
        assert!(host.tuning.apply(&one).unwrap().is_empty(), "a second time changes nothing");
        host.tuning.apply(&other).unwrap();
        assert_eq!(host.all(&["net.a", "net.b", "net.c"]), ["9000", "1 2", "7"]);
        assert_eq!(host.tuning.off().unwrap().1, []);
        assert_eq!(host.all(&["net.a", "net.b", "net.c"]), ["128", "1 2", "7"]);
        assert_eq!(host.tuning.applied().unwrap(), None);
        assert_eq!(host.tuning.off().unwrap(), (vec![], vec![]), "off twice is harmless");
    }

    #[test]
    fn value_that_somebody_changed_since_is_theirs() {
        let host = Host::new(&[("net.a", "1"), ("net.b", "1")]);
        host.tuning.apply(&profile("one", &[("net.a", "2"), ("net.b", "2")])).unwrap();
        host.tuning.write("net.a", "3").unwrap();
        let (steps, left) = host.tuning.off().unwrap();
        assert_eq!(left, [Left { name: "net.a".into(), now: "3".into() }]);
        assert_eq!(steps.len(), 1);
        assert_eq!(host.all(&["net.a", "net.b"]), ["3", "1"]);
    }

    #[test]
    fn refused_value_leaves_everything_as_it_was() {
        let host = Host::new(&[("net.a", "1"), ("net.c", "1")]);
        // A directory can be looked at, and not written to.
        std::fs::create_dir_all(host.place.path().join("sys/net/b")).unwrap();
        let error = host.tuning.apply(&profile("one", &[("net.a", "2"), ("net.b", "2")]));
        assert!(matches!(error, Err(TuneError::Read { name, .. }) if name == "net.b"));
        assert_eq!(host.all(&["net.a", "net.c"]), ["1", "1"]);
        assert_eq!(host.tuning.applied().unwrap(), None);
    }
}
