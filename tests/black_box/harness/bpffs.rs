// SPDX-License-Identifier: Apache-2.0
//! A bpffs of one test, in a mount namespace of its own: gone with all its pins on drop, and when
//! the test is killed.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use super::{Net, Place};

/// Where programs that shall see the bpffs must run.
pub(crate) struct Bpffs {
    /// Holds the namespace until its input ends.
    holder: Child,
}

impl Bpffs {
    pub(crate) fn new() -> Bpffs {
        let script = "mount -t bpf bpf /sys/fs/bpf && echo ready && exec cat";
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "slave", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "a bpffs is mounted");
        Bpffs { holder }
    }

    /// A command that will run in `place` and see the bpffs.
    pub(crate) fn command(&self, net: &Net, place: Place, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.id()));
        command.arg(format!("--net=/run/netns/{}", net.namespace(place))).arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// What lies in weir's directory, with the directory's mode; nothing if it is not there.
    pub(crate) fn pins(&self, net: &Net) -> Vec<String> {
        let script = "cd /sys/fs/bpf/weir 2>/dev/null && stat -c %a . && ls";
        let output = self.command(net, Place::Node, "sh").args(["-c", script]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}
