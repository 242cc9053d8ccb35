// SPDX-License-Identifier: Apache-2.0
//! Time of our CPUs that a hypervisor gave to others: nobody here can do anything about it, and no
//! figure of such a moment says anything of a forwarder.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// Looks at /proc/stat, again and again.
pub(crate) struct Steal {
    cpus: Vec<usize>,
    file: Option<File>,
    seen: u64,
}

impl Steal {
    /// Of these CPUs; of none it is nothing.
    pub(crate) fn of(cpus: &[usize]) -> Steal {
        let file = if cpus.is_empty() { None } else { File::open("/proc/stat").ok() };
        let mut steal = Steal { cpus: cpus.to_vec(), file, seen: 0 };
        steal.more();
        steal
    }

    /// Whether there was any since the last look. A tick is 10 ms: little is seen late, not never.
    pub(crate) fn more(&mut self) -> bool {
        let Some(file) = &mut self.file else { return false };
        let mut text = String::new();
        if file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text)).is_err() {
            return false;
        }
        let known = self.cpus.iter().filter_map(|cpu| ticks(&text, *cpu));
        let now = known.sum();
        std::mem::replace(&mut self.seen, now) < now
    }
}

/// The eighth number of the CPU's line (proc_stat(5)).
fn ticks(stat: &str, cpu: usize) -> Option<u64> {
    let name = format!("cpu{cpu} ");
    let line = stat.lines().find_map(|line| line.strip_prefix(&name))?;
    line.split(' ').nth(7)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{Steal, ticks};

    #[test]
    fn ticks_are_those_of_the_cpu() {
        let stat =
            "cpu  1 2 3 4 5 6 7 99 0 0\ncpu1 1 2 3 4 5 6 7 42 0 0\ncpu11 1 2 3 4 5 6 7 8 0 0\n";
        assert_eq!(ticks(stat, 1), Some(42));
        assert_eq!(ticks(stat, 11), Some(8));
        assert_eq!(ticks(stat, 2), None);
        assert!(!Steal::of(&[]).more());
    }
}
