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
        let mut command: Command = net.command(place, words[0]);
        let child = command.args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null());
        let program = Program(child.spawn().expect(words[0]));
        let listening = || net.run(place, &["ss", "-Hltn"]).contains(listens);
        until(&format!("{} listens on {listens}", words[0]), listening);
        program
    }

    /// nginx on port 80, with its files in `home` and these lines in its `http` block.
    pub(crate) fn nginx(net: &Net, place: Place, home: &Path, lines: &str) -> Program {
        let at = home.display();
        let text = format!(
            "daemon off; master_process off; pid {at}/pid; error_log stderr; events {{ }} \
             http {{ access_log off; client_body_temp_path {at}; proxy_temp_path {at}; \
             fastcgi_temp_path {at}; uwsgi_temp_path {at}; scgi_temp_path {at}; {lines} }}"
        );
        let file = home.join("nginx.conf");
        fs::write(&file, text).unwrap();
        let words = ["nginx", "-p", home.to_str().unwrap(), "-c", file.to_str().unwrap()];
        Program::start(net, place, &words, ":80 ")
    }

    /// haproxy with these sections, which listen as `listens` says.
    pub(crate) fn haproxy(
        net: &Net,
        place: Place,
        home: &Path,
        (sections, listens): (&str, &str),
    ) -> Program {
        let file = home.join("haproxy.cfg");
        let defaults = "defaults\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n";
        fs::write(&file, format!("{defaults}{sections}")).unwrap();
        Program::start(net, place, &["haproxy", "-db", "-f", file.to_str().unwrap()], listens)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
