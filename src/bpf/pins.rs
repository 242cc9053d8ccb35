// SPDX-License-Identifier: Apache-2.0
//! Links that shall outlive us, for `on_exit: closed`: pinned in a directory of our own.
//!
//! The directory is `weir` on the host's bpffs, ours alone (mode 0700). A pin is named by the network
//! namespace, the cgroup and the program, so that the next start finds its own and nobody else's.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::links;

/// The directory; made when the first link is pinned.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    directory: PathBuf,
}

/// Why nothing can be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Somebody else can write there, and so could own all the traffic.
    #[error(
        "pin the connect hook: {} belongs to user {owner} with mode {mode:o}, and must be ours \
         alone (`chown root` and `chmod 700`, or remove it)",
        path.display()
    )]
    Foreign {
        /// Its permission bits.
        mode: u32,
        /// Its owner.
        owner: u32,
        /// The directory.
        path: PathBuf,
    },
    /// No bpffs is mounted.
    #[error(
        "pin the connect hook: no bpffs is mounted, and on_exit closed needs one (`mount -t bpf bpf \
         /sys/fs/bpf`)"
    )]
    NotMounted,
    /// A step was refused.
    #[error("pin the connect hook: {step} {}: {source}", path.display())]
    Step {
        /// Of what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
        /// What was tried.
        step: &'static str,
    },
}

/// A pinned link of ours.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pinned {
    /// Where.
    pub path: PathBuf,
    /// Of the network namespace for which it was made.
    pub netns: u64,
    /// Of the cgroup on which its program hangs.
    pub cgroup: u64,
}

impl Pins {
    /// Where they would be; `None` if no bpffs is mounted.
    pub(super) fn find() -> Option<Pins> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Some(Pins { directory: mount_in(&table)?.join(DIRECTORY) })
    }

    /// The directory is there, and ours alone.
    pub(super) fn open() -> Result<Pins, PinError> {
        let pins = Pins::find().ok_or(PinError::NotMounted)?;
        let path = &pins.directory;
        let failed = |step| move |source| PinError::Step { path: path.clone(), source, step };
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("make")(error));
            }
            _ => {}
        }
        let found = fs::symlink_metadata(path).map_err(failed("look at"))?;
        let (mode, owner) = (found.mode() & 0o7777, found.uid());
        let is_ours = owner == 0 || owner == nix::unistd::geteuid().as_raw();
        if !found.is_dir() || !is_ours || mode & 0o077 != 0 {
            return Err(PinError::Foreign { mode, owner, path: path.clone() });
        }
        Ok(pins)
    }

    /// Where the link of a program would be pinned.
    pub(super) fn place(&self, netns: u64, cgroup: u64, program: &str) -> PathBuf {
        self.directory.join(format!("{netns:x}-{cgroup:x}-{program}"))
    }

    /// All there are, of every network namespace.
    pub(super) fn list(&self) -> Vec<Pinned> {
        let Ok(entries) = fs::read_dir(&self.directory) else { return Vec::new() };
        let mut list: Vec<Pinned> =
            entries.flatten().filter_map(|entry| Pinned::parse(entry.path())).collect();
        list.sort_by(|one, other| one.path.cmp(&other.path));
        list
    }

    /// The directory goes when it is empty.
    pub(super) fn tidy(&self) {
        // It is not empty, or not there.
        let _ = fs::remove_dir(&self.directory);
    }
}

impl Pinned {
    /// None for a file that is not named as ours are.
    fn parse(path: PathBuf) -> Option<Pinned> {
        let mut words = path.file_name()?.to_str()?.splitn(3, '-');
        let netns = u64::from_str_radix(words.next()?, 16).ok()?;
        let cgroup = u64::from_str_radix(words.next()?, 16).ok()?;
        words.next().filter(|program| program.starts_with("weir_"))?;
        Some(Pinned { path, netns, cgroup })
    }
}

/// Takes our directory away if nothing is in it: a look whether pins can be made has made it.
pub fn tidy() {
    if let Some(pins) = Pins::find() {
        pins.tidy();
    }
}

/// The link that is pinned at `path`, if it still leads from that cgroup.
pub(super) fn adopt(path: &Path, cgroup: u64) -> Option<OwnedFd> {
    let link = links::pinned(path).ok()?;
    links::linked(link.as_fd()).is_ok_and(|linked| linked.cgroup == cgroup).then_some(link)
}

/// Takes the pin away; what is not there is as good.
pub(super) fn remove(path: &Path) -> Result<(), PinError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(PinError::Step { path: path.to_owned(), source, step: "remove" })
        }
        _ => Ok(()),
    }
}

/// Pins `link`, in place of whatever was there.
pub(super) fn pin(link: &OwnedFd, path: &Path) -> Result<(), PinError> {
    remove(path)?;
    links::pin(link.as_fd(), path).map_err(|source| PinError::Step {
        path: path.to_owned(),
        source,
        step: "make",
    })
}

/// The usual mount point if it is one, else the first there is.
fn mount_in(table: &str) -> Option<PathBuf> {
    let is_bpf =
        |line: &&str| line.split_once(" - ").is_some_and(|(_, rest)| rest.starts_with("bpf "));
    let points = table.lines().filter(is_bpf).filter_map(|line| line.split(' ').nth(4));
    let mut points: Vec<&str> = points.collect();
    points.sort_by_key(|point| *point != USUAL);
    points.first().map(|point| point.replace("\\040", " ").into())
}

const DIRECTORY: &str = "weir";
const USUAL: &str = "/sys/fs/bpf";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_mount_comes_first_and_another_one_does_too() {
        let other = "36 25 0:30 / /run/bpf rw - bpf none rw,mode=700\n";
        let usual = "37 25 0:31 / /sys/fs/bpf rw shared:9 - bpf bpf rw\n";
        assert_eq!(mount_in(&format!("{other}{usual}")), Some("/sys/fs/bpf".into()));
        assert_eq!(mount_in(other), Some("/run/bpf".into()));
        assert_eq!(mount_in("1 2 0:3 / /sys rw - sysfs sysfs rw\n"), None);
    }

    #[test]
    fn only_names_of_ours_are_ours() {
        let parse = |name: &str| Pinned::parse(Path::new("/b").join(name));
        let found = parse("3e8-5f-weir_connect4").unwrap();
        assert_eq!((found.netns, found.cgroup), (1000, 95));
        assert_eq!(parse("3e8-5f-other"), None);
        assert_eq!(parse("connect4"), None);
    }
}
