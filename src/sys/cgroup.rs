// SPDX-License-Identifier: Apache-2.0
//! cgroup v2: where it is mounted, and directories below it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// Why there is no such cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It cannot be opened.
    #[error(
        "open cgroup {}: {source} (it must exist before weir starts: `mkdir -p`, and put the \
         workload's processes into its cgroup.procs; outbound.workload.cgroup is relative to the \
         cgroup v2 mount)",
        path.display()
    )]
    Open {
        /// With the mount.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No cgroup v2 file system is mounted.
    #[error(
        "no cgroup v2 is mounted here (`mount -t cgroup2 none /sys/fs/cgroup/unified`; in a \
         container, mount the host's; `ip netns exec` hides it: use `nsenter --net=/run/netns/NAME`)"
    )]
    NotMounted,
}

/// Where cgroup v2 is mounted: read, never assumed, because hybrid hosts have it elsewhere.
///
/// # Errors
///
/// It is mounted nowhere.
pub fn mount() -> Result<PathBuf, CgroupError> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount_in(&table).map(|(_, at)| at).ok_or(CgroupError::NotMounted)
}

/// Level and path of the cgroup at `path` below the mount, as nft's `socket cgroupv2` wants them.
///
/// nft looks paths up below /sys/fs/cgroup, whatever is mounted there (`SYSFS_CGROUPSV2_PATH` in its
/// src/datatype.c), and turns them into a number. The kernel counts levels from the hierarchy's root.
///
/// # Errors
///
/// There is no mount.
pub fn as_nft_wants_it(path: &Path) -> Result<(usize, String), CgroupError> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let (root, at) = mount_in(&table).ok_or(CgroupError::NotMounted)?;
    Ok(below(&root, &at, path))
}

/// The cgroup at `path` below the mount.
///
/// # Errors
///
/// There is no mount, or no such cgroup.
pub fn open(path: &Path) -> Result<File, CgroupError> {
    let path = mount()?.join(path.strip_prefix("/").unwrap_or(path));
    File::open(path.join("cgroup.procs"))
        .and_then(|_| File::open(&path))
        .map_err(|source| CgroupError::Open { path, source })
}

/// The number of the cgroup at `path` below the mount: one that is made anew has another. `None`: there
/// is none.
#[must_use]
pub fn number(path: &Path) -> Option<u64> {
    open(path).ok()?.metadata().ok().map(|data| data.ino())
}

fn below(root: &Path, at: &Path, path: &Path) -> (usize, String) {
    let path = path.strip_prefix("/").unwrap_or(path);
    let names =
        |path: &Path| path.components().filter(|part| matches!(part, Component::Normal(_))).count();
    let place = at.join(path);
    let seen = place.strip_prefix(NFT_LOOKS_BELOW).map_or_else(
        |_| format!("../../..{}", place.display()),
        |inner| inner.display().to_string(),
    );
    (names(root) + names(path), seen)
}

/// The part of the hierarchy that is mounted, and where, in a table as proc_pid_mountinfo(5)
/// describes it: the fourth and the fifth field, in lines whose type, after the dash, is cgroup2.
fn mount_in(table: &str) -> Option<(PathBuf, PathBuf)> {
    let line = table.lines().find(|line| {
        line.split_once(" - ").is_some_and(|(_, rest)| rest.starts_with("cgroup2 "))
    })?;
    let mut fields = line.split(' ').map(|path| PathBuf::from(path.replace("\\040", " "))).skip(3);
    fields.next().zip(fields.next())
}

const NFT_LOOKS_BELOW: &str = "/sys/fs/cgroup";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_mount_is_found_where_it_is() {
        let table = "25 30 0:23 / /sys rw - sysfs sysfs rw\n\
                     30 25 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro\n\
                     31 30 0:27 / /sys/fs/cgroup/my\\040unified rw shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_in(table), Some(("/".into(), "/sys/fs/cgroup/my unified".into())));
        assert_eq!(mount_in("30 25 0:26 / /c rw - cgroup cgroup rw,cpu\n"), None);
    }

    #[test]
    fn nft_gets_the_path_below_its_own_idea_of_the_mount() {
        let seen =
            |root: &str, at: &str, path: &str| below(root.as_ref(), at.as_ref(), path.as_ref());
        let whole = |level, path: &str| (level, path.to_owned());
        assert_eq!(seen("/", "/sys/fs/cgroup", "/weir/app"), whole(2, "weir/app"));
        assert_eq!(seen("/", "/sys/fs/cgroup/unified", "weir/app"), whole(2, "unified/weir/app"));
        assert_eq!(seen("/", "/mnt/c", "/weir"), whole(1, "../../../mnt/c/weir"));
        assert_eq!(seen("/pod", "/sys/fs/cgroup", "/weir"), whole(2, "weir"));
    }

    #[test]
    fn cgroup_that_is_missing_is_named_with_its_mount() {
        let error = open(Path::new("/no/such")).unwrap_err().to_string();
        assert!(error.contains("/no/such: No such file") || error.contains("no cgroup v2"));
    }
}
