// SPDX-License-Identifier: Apache-2.0
//! Kernels on which the sockmap relay is not tried, as data: what a test at start cannot find out
//! without a crash, or finds out only now and then.
//!
//! A fix that a distribution has put into an older kernel does not show in its version, so these
//! stay refused: the copy relay serves there.

use nix::sys::utsname::uname;

/// Why this kernel is refused.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Denial {
    /// The first entry that applies.
    pub reason: &'static str,
    /// As the kernel calls itself.
    pub release: String,
}

/// Major and minor version: the entry applies to all below.
type Below = (u32, u32);

/// Whether the kernel that runs is on the list.
#[must_use]
pub fn denied() -> Option<Denial> {
    let name = uname().ok()?;
    let release = name.release().to_string_lossy().into_owned();
    reason(&release).map(|reason| Denial { reason, release })
}

fn reason(release: &str) -> Option<&'static str> {
    let mut numbers = release.split(['.', '-', '+']).map_while(|word| word.parse().ok());
    // A kernel that says no version says nothing about its age either.
    let version: Below = numbers.next().zip(numbers.next())?;
    DENIED.iter().find(|(below, _)| version < *below).map(|(_, reason)| *reason)
}

/// The oldest first.
const DENIED: [(Below, &str); 3] = [
    (
        (6, 4),
        "bytes come out of order under memory pressure, a poll is not woken and a FIN is answered with EAGAIN (Linux 6.4 has the fixes)",
    ),
    (
        (6, 10),
        "closing a joined socket races with its removal from the map, CVE-2024-39500 (Linux 6.10 has the fix)",
    ),
    (
        (6, 16),
        "closing a socket while the kernel writes to it can panic, CVE-2025-38154 (Linux 6.16 has the fix)",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_refused_with_the_oldest_reason_and_new_ones_are_not() {
        assert_eq!(reason("5.15.0-139-generic"), Some(DENIED[0].1));
        assert_eq!(reason("6.4.0"), Some(DENIED[1].1));
        assert_eq!(reason("6.12.43+deb13-amd64"), Some(DENIED[2].1));
        assert_eq!(reason("6.16-rc1"), None);
        assert_eq!(reason("6.18.44"), None);
        assert_eq!(reason("7.1.2"), None);
        assert_eq!(reason("custom"), None);
    }
}
