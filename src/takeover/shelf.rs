// SPDX-License-Identifier: Apache-2.0
//! Where takeover keeps what it must know after a restart: what applications asked for, and what
//! registries have said.
//!
//! Invariant: a file is there whole or not at all, whenever weir or its host dies; what is not whole,
//! or belongs to something else, is not read.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

/// A directory with a few files.
#[derive(Clone, Debug)]
pub(super) struct Shelf {
    directory: PathBuf,
}

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it is damaged or of another version")]
    Damaged,
    #[error("it is of `{0}`")]
    Foreign(String),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is larger than {BYTES_MAX} bytes")]
    Large,
}

impl Shelf {
    /// At `directory`, which is made if it is not there.
    pub(super) fn new(directory: &Path) -> Shelf {
        Shelf { directory: directory.to_owned() }
    }

    /// What was put there as `name` by somebody with this `identity`; `None` if there is no file.
    pub(super) fn read(&self, name: &str, identity: &str) -> Result<Option<Value>, Unusable> {
        let path = self.path(name);
        let bytes = match fs::metadata(&path) {
            Ok(found) if found.len() > BYTES_MAX => return Err(Unusable::Large),
            Ok(_) => fs::read(&path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let (head, body) = split(&bytes).ok_or(Unusable::Damaged)?;
        if head != head_of(body).as_bytes() {
            return Err(Unusable::Damaged);
        }
        let value: Value = serde_json::from_slice(body).map_err(|_| Unusable::Damaged)?;
        match value["identity"].as_str() {
            Some(found) if found == identity => Ok(Some(value)),
            found => Err(Unusable::Foreign(found.unwrap_or_default().to_owned())),
        }
    }

    /// Puts `value` there as `name`. Waits for the disk.
    pub(super) fn write(&self, name: &str, value: &Value) -> io::Result<()> {
        let body = value.to_string().into_bytes();
        if body.len() as u64 + HEAD_BYTES_MAX > BYTES_MAX {
            return Err(io::Error::other("there is too much of it"));
        }
        fs::create_dir_all(&self.directory)?;
        let (path, new) = (self.path(name), self.directory.join(format!(".{name}.new")));
        let mut file = File::create(&new)?;
        file.write_all(head_of(&body).as_bytes())?;
        file.write_all(b"\n")?;
        file.write_all(&body)?;
        file.sync_all()?;
        fs::rename(new, path)?;
        // The name is on the disk when the directory is.
        File::open(&self.directory)?.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl fmt::Display for Shelf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.directory.display().fmt(f)
    }
}

fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    Some((bytes.get(..end)?, bytes.get(end + 1..)?))
}

fn head_of(body: &[u8]) -> String {
    format!("weir takeover {VERSION} {} {:016x}", body.len(), checksum(body))
}

/// FNV-1a of 64 bits: finds what a disk or a crash does to a file, not what a forger does.
fn checksum(bytes: &[u8]) -> u64 {
    let mix = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix)
}

const VERSION: u32 = 1;
/// 10,000 services with 20 endpoints and their parameters fit.
const BYTES_MAX: u64 = 64 << 20;
const HEAD_BYTES_MAX: u64 = 100;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let place = tempfile::TempDir::new().unwrap();
        let shelf = Shelf::new(&place.path().join("deep/state"));
        assert!(shelf.read("a", "me").unwrap().is_none(), "nothing is there yet");
        let value = json!({ "identity": "me", "x": [1, 2] });
        shelf.write("a", &value).unwrap();
        assert_eq!(shelf.read("a", "me").unwrap(), Some(value.clone()));
        let foreign = shelf.read("a", "you").unwrap_err().to_string();
        assert_eq!(foreign, "it is of `me`");
        let path = place.path().join("deep/state/a");
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(shelf.read("a", "me").is_err(), "byte {at} is wrong");
            fs::write(&path, &good[..at]).unwrap();
            assert!(shelf.read("a", "me").is_err(), "cut at {at}");
        }
        shelf.write("a", &value).unwrap();
        assert!(shelf.read("a", "me").unwrap().is_some(), "written anew");
    }
}
