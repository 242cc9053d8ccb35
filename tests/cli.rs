// SPDX-License-Identifier: Apache-2.0
//! The commands as a user meets them: what they print, where, and how they end.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

fn weir() -> Command {
    Command::new(env!("CARGO_BIN_EXE_weir"))
}

fn output(arguments: &[&str]) -> Output {
    weir().args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A running `weir forward` with an admin socket; ended when dropped, by its own pid.
struct Running {
    child: Child,
    listen: SocketAddr,
    place: TempDir,
}

impl Running {
    fn start(to: SocketAddr) -> Running {
        let place = TempDir::new().unwrap();
        // Found free a moment ago; nobody else on this host is likely to take it in between.
        let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = weir()
            .args(["forward", "--workers", "1", "--listen", &listen.to_string()])
            .args(["--to", &to.to_string(), "--socket"])
            .arg(place.path().join("admin.sock"))
            .spawn()
            .unwrap();
        let running = Running { child, listen, place };
        assert!(running.ask(&["status", "--wait", "20"]).status.success());
        running
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let socket = self.place.path().join("admin.sock");
        weir().args(arguments).arg("--socket").arg(socket).output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn unknown_words_are_usage_errors_with_a_hint() {
    let relay = ["forward", "--listen", "127.0.0.1:1", "--to", "127.0.0.1:2", "--relay", "spice"];
    assert_eq!(output(&relay).status.code(), Some(2));
    let profile =
        ["forward", "--listen", "127.0.0.1:1", "--to", "127.0.0.1:2", "--profile", "fast"];
    let output = output(&profile);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("known: balanced, latency, many-flows, throughput"));
}

#[test]
fn config_check_shows_every_mistake_and_takes_a_right_file() {
    let place = TempDir::new().unwrap();
    let file = place.path().join("weir.yaml");
    fs::write(&file, "forwrd: []\nworkers: none\n").unwrap();
    let wrong = weir().args(["config", "check"]).arg(&file).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("weir.yaml:1:1: forwrd: unknown key; did you mean `forward`?"));
    assert!(stderr(&wrong).contains("weir.yaml:2:10: workers: `none`: must be auto"));
    fs::write(&file, "forward: [{ listen: \"127.0.0.1:1\", endpoints: [\"127.0.0.1:2\"] }]\n")
        .unwrap();
    let right = weir().args(["config", "check"]).arg(&file).output().unwrap();
    assert_eq!((right.status.code(), stderr(&right).as_str()), (Some(0), ""));
    let missing = output(&["run", "-c", "nowhere.yaml"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(stderr(&missing).starts_with("weir: nowhere.yaml:1:1: No such file"));
    assert!(stderr(&missing).contains("`weir config show`"), "the cure");
}

/// The same for programs: data on stdout, and the exit code.
#[test]
fn config_check_lists_mistakes_as_json() {
    let place = TempDir::new().unwrap();
    let file = place.path().join("weir.yaml");
    let check = || weir().args(["config", "check", "-o", "json"]).arg(&file).output().unwrap();
    fs::write(&file, "inbound: {}\nworkers: none\nprofil: x\n").unwrap();
    let output = check();
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(2));
    let seen: Vec<_> =
        rows.as_array().unwrap().iter().map(|row| (&row["line"], &row["path"])).collect();
    assert_eq!(seen, [(&2.into(), &"workers".into()), (&3.into(), &"profil".into())]);
    fs::write(&file, "inbound: {}\n").unwrap();
    let output = check();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"[]\n"[..]));
}

#[test]
fn garbage_is_one_clear_line() {
    let place = TempDir::new().unwrap();
    let (garbage, empty) = (place.path().join("garbage.yaml"), place.path().join("empty.yaml"));
    fs::write(&garbage, [0xff, 0xfe, 0x00, 0x9b].repeat(500)).unwrap();
    fs::write(&empty, "").unwrap();
    for (file, words) in [
        (garbage.as_path(), "not a text file"),
        (&empty, "asks for nothing"),
        (place.path(), "a file is wanted"),
    ] {
        let output = weir().args(["run", "-c"]).arg(file).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.lines().count() == 1 && text.contains(words), "{text}");
    }
}

#[test]
fn manual_pages_and_completions_know_every_verb() {
    let place = TempDir::new().unwrap();
    assert!(weir().arg("man").arg(place.path()).status().unwrap().success());
    for shell in ["bash", "fish", "zsh"] {
        let text = output(&["completions", shell]).stdout;
        let text = String::from_utf8_lossy(&text).into_owned();
        for verb in ["run", "forward", "check", "config", "status", "flows", "drain", "demo"] {
            assert!(text.contains(verb), "{shell}: {verb}");
            let page = fs::read_to_string(place.path().join(format!("weir-{verb}.1"))).unwrap();
            assert!(page.contains(".TH") && page.contains("SYNOPSIS"), "{verb}");
            let first = fs::read_to_string(place.path().join("weir.1")).unwrap();
            let told = ["Exit codes", "Signals", "Environment", "Files"];
            assert!(told.iter().all(|what| first.contains(what)), "{first}");
        }
    }
}

#[test]
fn supervisor_is_told_when_weir_is_ready_reloads_and_stops() {
    let place = TempDir::new().unwrap();
    let path = place.path().join("notify");
    let supervisor = UnixDatagram::bind(&path).unwrap();
    supervisor.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let heard = || {
        let mut text = [0; 256];
        let len = supervisor.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..len]).into_owned()
    };
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut child = weir()
        .args(["forward", "--workers", "1", "--listen", &listen, "--to", "127.0.0.1:2"])
        .env("NOTIFY_SOCKET", &path)
        .spawn()
        .unwrap();
    assert!(heard().contains("READY=1"));
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    let reloading = heard();
    assert!(reloading.contains("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert!(heard().contains("READY=1"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(heard().contains("STOPPING=1"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn port_in_use_is_named_and_exits_with_4() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let output = output(&["forward", "--workers", "1", "--listen", &addr, "--to", "127.0.0.1:2"]);
    assert_eq!(output.status.code(), Some(4));
    let text =
        format!("weir: listen on {addr}: the address is in use (`ss -ltnp` shows by whom)\n");
    assert_eq!(stderr(&output), text);
}

#[test]
fn nobody_to_ask_is_said_plainly() {
    let output = output(&["status", "--socket", "/nowhere/admin.sock"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("weir: no weir answers at /nowhere/admin.sock: "));
}

#[test]
fn reader_that_goes_away_is_no_failure() {
    let mut child = weir()
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[test]
fn flows_are_listed_and_drain_waits_for_them() {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut running = Running::start(upstream.local_addr().unwrap());
    let mut client = TcpStream::connect(running.listen).unwrap();
    client.write_all(b"hello").unwrap();
    let (mut served, _) = upstream.accept().unwrap();
    served.read_exact(&mut [0; 5]).unwrap();
    let flows = running.ask(&["flows", "-o", "json"]);
    let flows: serde_json::Value = serde_json::from_slice(&flows.stdout).unwrap();
    assert_eq!(flows.as_array().map(Vec::len), Some(1));
    assert_eq!(flows[0]["direction"], "forward");
    assert_eq!(flows[0]["upstream"], upstream.local_addr().unwrap().to_string());
    // Connections made while the drain begins end with it.
    let others = upstream.try_clone().unwrap();
    std::thread::spawn(move || others.incoming().for_each(drop));
    let drain = running.ask(&["drain", "-o", "json"]);
    assert_eq!(drain.stdout, b"{\"draining\":true}\n");
    // Refused from now on, while the open flow goes on.
    let began = Instant::now();
    while TcpStream::connect(running.listen).is_ok() {
        assert!(began.elapsed() < Duration::from_secs(20), "drain stops accepting");
    }
    served.write_all(b"world").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    assert!(running.child.try_wait().unwrap().is_none());
    drop((client, served));
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    assert!(!running.place.path().join("admin.sock").exists());
}

#[test]
fn tune_lists_shows_and_explains() {
    let list = output(&["tune", "list"]);
    assert!(String::from_utf8_lossy(&list.stdout).contains("latency      the shortest answer"));
    let json = output(&["tune", "list", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 4);
    let shown = String::from_utf8(output(&["tune", "show", "latency"]).stdout).unwrap();
    assert!(shown.contains("  spin_us: 50\n") && shown.contains("  backlog: 4096\n"), "{shown}");
    let unknown = output(&["tune", "show", "latancy"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains("did you mean `latency`?"), "{}", stderr(&unknown));
}

/// Who ended with an error says why, and the code tells a supervisor to start it again.
#[test]
fn worker_that_fails_ends_weir_with_its_reason() {
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let output = weir()
        .args(["forward", "--workers", "2", "--listen", &listen, "--to", "127.0.0.1:2"])
        .env("WEIR_WITHOUT", "worker1")
        .output()
        .unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("weir: a worker stopped: enter the io_uring: "), "{said}");
}

#[test]
fn stderr_that_nobody_reads_is_no_panic() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = weir().args(["config", "check", "nowhere.yaml"]).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn longest_wait_is_a_wait() {
    let running = Running::start("127.0.0.1:2".parse().unwrap());
    let status = running.ask(&["status", "--wait", "18446744073709551615"]);
    assert_eq!(status.status.code(), Some(0), "{}", stderr(&status));
}

/// A weir that refuses, as one does whose worker is stuck: that is no data.
#[test]
fn refusal_is_a_failure_in_every_format() {
    let place = TempDir::new().unwrap();
    let socket = place.path().join("admin.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                asked.extend(byte);
            }
            let _ =
                stream.write_all(b"HTTP/1.0 503 Service Unavailable\r\n\r\na worker is stuck\n");
        }
    });
    for verb in ["flows", "services", "endpoints"] {
        for format in ["json", "table"] {
            let output =
                weir().args([verb, "-o", format, "--socket"]).arg(&socket).output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{verb} {format}");
            assert!(output.stdout.is_empty(), "{verb} {format}");
            assert_eq!(stderr(&output), "weir: weir refused: a worker is stuck\n");
        }
    }
}

#[test]
fn file_in_place_of_the_admin_socket_stays() {
    let place = TempDir::new().unwrap();
    let (file, link) = (place.path().join("precious"), place.path().join("link"));
    fs::write(&file, "data").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for socket in [&file, &link] {
        let output = weir()
            .args(["forward", "--listen", "127.0.0.1:1", "--to", "127.0.0.1:2", "--socket"])
            .arg(socket)
            .output()
            .unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains("what is there is no socket and stays"), "{said}");
        assert_eq!(fs::read_to_string(socket).unwrap(), "data");
    }
    // What a killed weir has left is taken over.
    let socket = place.path().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut child = weir()
        .args(["forward", "--workers", "1", "--listen", &taken, "--to", "127.0.0.1:2", "--socket"])
        .arg(&socket)
        .spawn()
        .unwrap();
    let ready = weir().args(["status", "--wait", "20", "--socket"]).arg(&socket).status().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ready.success());
}

/// Paths in a config lead to the same files at the start and at every reload.
#[test]
fn reload_of_a_relative_path_finds_nothing_changed() {
    let place = TempDir::new().unwrap();
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    fs::write(place.path().join("mine.yaml"), "summary: mine\ninclude: balanced\n").unwrap();
    let config = format!(
        "profile: mine.yaml\nworkers: 1\nadmin: {{ socket: admin.sock }}\n\
         forward: [{{ listen: \"{listen}\", endpoints: [\"127.0.0.1:2\"] }}]\n"
    );
    fs::write(place.path().join("weir.yaml"), config).unwrap();
    let log = place.path().join("log");
    let mut child = weir()
        .current_dir(place.path())
        .args(["run", "-c", "weir.yaml"])
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let socket = place.path().join("admin.sock");
    let ready = weir().args(["status", "--wait", "20", "--socket"]).arg(&socket).status().unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    let began = Instant::now();
    let said = loop {
        let said = fs::read_to_string(&log).unwrap();
        if said.contains("reloaded") || began.elapsed() > Duration::from_secs(20) {
            break said;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ready.success() && said.contains("the config is reloaded"), "{said}");
    assert!(!said.contains("cannot change"), "{said}");
}

/// README and the pages of docs/ and tuning/, by their names.
fn pages() -> Vec<(String, String)> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = docs.chain(["README.md", "tuning/README.md"].map(|name| root.join(name)));
    pages.map(|page| (page.display().to_string(), fs::read_to_string(&page).unwrap())).collect()
}

/// What a page quotes, and the lines of its blocks.
fn quoted(page: &str) -> Vec<&str> {
    let mut quoted = Vec::new();
    for (index, part) in page.split("```").enumerate() {
        match index % 2 {
            0 => quoted.extend(part.split('`').skip(1).step_by(2)),
            _ => quoted.extend(part.lines()),
        }
    }
    quoted
}

/// Every command that a page names is there, with its options.
#[test]
fn commands_of_the_docs_exist() {
    let mut found = 0;
    for (page, text) in pages() {
        for line in quoted(&text) {
            let line = line.trim_start_matches("sudo ").trim_start_matches("target/release/");
            let Some(words) = line.split('#').next().unwrap().strip_prefix("weir ") else {
                continue;
            };
            let words: Vec<&str> =
                words.split([' ', '[', ']']).filter(|word| !word.is_empty()).collect();
            let is_verb = |word: &&&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '|');
            let verbs: Vec<&str> = words.iter().take_while(is_verb).copied().take(2).collect();
            // `rules show|apply|clear` are three.
            let all: Vec<Vec<&str>> = match verbs[..] {
                [] => continue,
                [verb] => vec![vec![verb]],
                [verb, inner, ..] => inner.split('|').map(|inner| vec![verb, inner]).collect(),
            };
            for verbs in all {
                let help = output(&[&verbs[..], &["--help"]].concat());
                assert!(help.status.success(), "{page}: `{line}`: {}", stderr(&help));
                let help = String::from_utf8(help.stdout).unwrap();
                for option in words.iter().filter(|word| word.starts_with('-')) {
                    assert!(help.contains(option), "{page}: `{line}`: no {option}");
                }
                found += 1;
            }
        }
    }
    assert!(found > 50, "{found} commands");
}

/// Every config that a page shows is right.
#[test]
fn configs_of_the_docs_are_right() {
    let place = TempDir::new().unwrap();
    let file = place.path().join("weir.yaml");
    let mut found = 0;
    for (page, text) in pages() {
        for block in text.split("```yaml\n").skip(1) {
            fs::write(&file, block.split("```").next().unwrap()).unwrap();
            let check = weir().args(["config", "check"]).arg(&file).output().unwrap();
            assert!(check.status.success(), "{page}: {}", stderr(&check));
            found += 1;
        }
    }
    assert!(found >= 4, "{found} configs");
}

/// The keys below `schema`, with those above them.
fn keys(schema: &serde_json::Value, whole: &serde_json::Value, above: &str, all: &mut Vec<String>) {
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.trim_start_matches('#');
        return keys(whole.pointer(name).unwrap(), whole, above, all);
    }
    for choice in ["anyOf", "oneOf", "allOf"].iter().flat_map(|word| schema[*word].as_array()) {
        choice.iter().for_each(|one| keys(one, whole, above, all));
    }
    if schema["items"].is_object() {
        keys(&schema["items"], whole, above, all);
    }
    for (key, inner) in schema["properties"].as_object().into_iter().flatten() {
        let path = if above.is_empty() { key.clone() } else { format!("{above}.{key}") };
        keys(inner, whole, &path, all);
        all.push(path);
    }
}

/// The keys of `value`, with those above them.
fn values(value: &serde_json::Value, above: &str, all: &mut Vec<String>) {
    for (key, inner) in value.as_object().into_iter().flatten() {
        let path = if above.is_empty() { key.clone() } else { format!("{above}.{key}") };
        values(inner, &path, all);
        all.push(path);
    }
}

/// Every key that a page names with those above it is one of a config or of a profile.
#[test]
fn keys_of_the_docs_exist() {
    let json = |arguments: &[&str]| serde_json::from_slice(&output(arguments).stdout).unwrap();
    let mut all = Vec::new();
    let schema: serde_json::Value = json(&["config", "schema"]);
    keys(&schema, &schema, "", &mut all);
    let profile: serde_json::Value = json(&["tune", "show", "balanced", "-o", "json"]);
    values(&profile, "", &mut all);
    let mut found = 0;
    for (page, text) in pages() {
        for quoted in quoted(&text) {
            let path = quoted.split(':').next().unwrap().replace("[]", "");
            let is_path = path.contains('.')
                && !path.contains(|c: char| !c.is_ascii_lowercase() && !"._".contains(c));
            let first = path.split('.').next().unwrap();
            if !is_path || !all.iter().any(|key| key == first) {
                continue;
            }
            assert!(all.contains(&path), "{page}: there is no key `{path}`");
            found += 1;
        }
    }
    assert!(found > 50, "{found} keys");
}

/// The pages name every metric of a running weir with its reasons, and no other.
#[test]
fn metrics_of_the_docs_are_those_of_the_program() {
    let place = TempDir::new().unwrap();
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let [api, inbound, outbound, http, facade, nobody] = [(); 6].map(|()| free());
    let config = format!(
        "workers: 1\nadmin: {{ socket: admin.sock, http: \"{http}\" }}\n\
         takeover: {{ api: \"{api}\", inbound: \"{inbound}\", outbound: \"{outbound}\", \
         facade: {{ listen: \"{facade}\" }}, \
         registries: [{{ kind: zookeeper, servers: [\"{nobody}\"], layout: sofa }}] }}\n"
    );
    fs::write(place.path().join("weir.yaml"), config).unwrap();
    let child = weir().current_dir(place.path()).args(["run", "-c", "weir.yaml"]).spawn().unwrap();
    let running = Running { child, listen: http, place };
    assert!(running.ask(&["status", "--wait", "20"]).status.success());
    let mut stream = TcpStream::connect(running.listen).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut metrics = String::new();
    stream.read_to_string(&mut metrics).unwrap();

    let pages: String = pages().into_iter().map(|(_, text)| text).collect();
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    // A series is one more of its family.
    let families = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let known: Vec<String> = families
        .map(|line| match line.split_once(' ').unwrap() {
            (name, "counter") => format!("{name}_total"),
            (name, _) => name.to_owned(),
        })
        .collect();
    for part in pages.split("weir_").skip(1) {
        let name = format!("weir_{}", part.split(|c| !is_name(c)).next().unwrap());
        assert!(known.contains(&name) || name == "weir_guard", "there is no {name}");
    }
    for name in &known {
        assert!(pages.contains(&format!("`{name}")), "no page explains {name}");
    }
    for series in metrics.lines().filter(|line| !line.starts_with('#')) {
        for label in ["reason", "outcome", "part"] {
            let value = series.split_once(&format!("{label}=\"")).map(|(_, rest)| rest);
            let Some(value) = value.and_then(|rest| rest.split('"').next()) else { continue };
            let is_told = [format!("`{value}`"), format!("{label}=\"{value}\"")];
            assert!(is_told.iter().any(|told| pages.contains(told)), "no page explains {series}");
        }
    }
}
