// SPDX-License-Identifier: Apache-2.0
//! Other people's programs, run beside a test.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::{Net, Place, until};

/// A program that runs beside the test and is ended with it.
pub(crate) struct Program(Child);

impl Program {
    /// Runs once a socket listens as `ss` says (`:80 `).
    pub(crate) fn start(net: &Net, place: Place, words: &[&str], listens: &str) -> Program {
        let mut command = net.command(place, words[0]);
        command.args(&words[1..]);
        Program::run(net, place, command, listens)
    }

    /// As `start`, by a command that runs it in `place`.
    pub(crate) fn run(net: &Net, place: Place, mut command: Command, listens: &str) -> Program {
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let program = Program(child.unwrap());
        let listening = || net.run(place, &["ss", "-Hltn"]).contains(listens);
        until(&format!("{command:?} listens on {listens}"), listening);
        program
    }

    /// nginx on port 80, with its files in `home` and these lines in its `http` block.
    pub(crate) fn nginx(net: &Net, place: Place, home: &Path, lines: &str) -> Program {
        let file = Program::nginx_conf(home, lines);
        let words = ["nginx", "-p", home.to_str().unwrap(), "-c", &file];
        Program::start(net, place, &words, ":80 ")
    }

    /// nginx's file, with these lines in its `http` block.
    pub(crate) fn nginx_conf(home: &Path, lines: &str) -> String {
        let at = home.display();
        let text = format!(
            "daemon off; master_process off; pid {at}/pid; error_log stderr; events {{ }} \
             http {{ access_log off; client_body_temp_path {at}; proxy_temp_path {at}; \
             fastcgi_temp_path {at}; uwsgi_temp_path {at}; scgi_temp_path {at}; {lines} }}"
        );
        let file = home.join("nginx.conf");
        fs::write(&file, text).unwrap();
        file.display().to_string()
    }

    /// haproxy with these sections, which listen as `listens` says.
    pub(crate) fn haproxy(
        net: &Net,
        place: Place,
        home: &Path,
        (sections, listens): (&str, &str),
    ) -> Program {
        let file = Program::haproxy_cfg(home, sections);
        Program::start(net, place, &["haproxy", "-db", "-f", &file], listens)
    }

    /// haproxy's file, with these sections.
    pub(crate) fn haproxy_cfg(home: &Path, sections: &str) -> String {
        let file = home.join("haproxy.cfg");
        let defaults = "defaults\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n";
        fs::write(&file, format!("{defaults}{sections}")).unwrap();
        file.display().to_string()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
