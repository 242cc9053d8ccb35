// SPDX-License-Identifier: Apache-2.0
//! Comparisons, tiny ones, and what becomes of them: what is measured, what is left, what is said.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

fn loadtest(place: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir-loadtest"));
    command.current_dir(place.path()).stdin(Stdio::null());
    command
}

fn output(place: &TempDir, arguments: &[&str]) -> Output {
    loadtest(place).args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Two targets that need nothing installed, few rounds of a blink.
const TINY: [&str; 11] = [
    "compare",
    "--force",
    "--modes",
    "direct",
    "--peers",
    "tokio,tokio-uring",
    "--rounds",
    "2",
    "--seconds",
    "0.15",
    "--workloads",
];

/// What labs have left on the host, of the process `pid`.
fn left_by(pid: u32) -> Vec<PathBuf> {
    let name = format!("weir-compare-{pid}");
    let places = ["/run/netns", "/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/tmp"];
    let entries = places.iter().filter_map(|place| fs::read_dir(place).ok()).flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&name));
    named.map(|entry| entry.path()).collect()
}

fn until(what: &str, mut is_done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_done() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// One comparison, and everything that is made of it.
#[test]
fn a_comparison_measures_tells_and_leaves_nothing() {
    let place = TempDir::new().unwrap();
    let child = loadtest(&place)
        .args(TINY)
        .arg("pingpong-1,pingpong-8,pingpong-32,connections-8,bulk-1,idle-20")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(left_by(pid), Vec::<PathBuf>::new(), "the lab is gone");
    let text = String::from_utf8(output.stdout).unwrap();
    for word in ["pingpong-8", "connections-8", "Gbit/s", "slab B", "against direct", "tokio-uring"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
    let result = read(&place.path().join("compare.json"));
    check(&result);
    documents(&place);
    page(&place);
}

/// The captures of the weir that was built beside; `cargo test --workspace` builds it first.
#[test]
fn every_mode_of_weir_is_measured() {
    let weir = Path::new(env!("CARGO_BIN_EXE_weir-loadtest")).with_file_name("weir");
    if !is_root() || !weir.exists() {
        assert!(std::env::var_os("CI").is_none(), "needs root, and {}", weir.display());
        return eprintln!("skipped: needs root, and {}", weir.display());
    }
    let measured = |arguments: &[&str]| -> Vec<Value> {
        let place = TempDir::new().unwrap();
        let output = loadtest(&place)
            .args(["compare", "--force", "--modes", "all", "--peers", "none"])
            .args(["--rounds", "1", "--seconds", "0.15"])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let mut result = read(&place.path().join("compare.json"));
        assert_eq!(result["cells"].as_array().unwrap().len(), CELLS, "{}", said(&output));
        serde_json::from_value(result["cells"].take()).unwrap()
    };
    // As on most nodes of a mesh, somebody else has tracking on: two entries a flow for whoever
    // does nothing about it.
    for cell in measured(&["--relays", "copy", "--tracking", "--workloads", "pingpong-4,idle-20"]) {
        let figures = &cell["rounds"][0]["figures"];
        assert_eq!(figures["errors"], 0.0, "{cell}");
        let target = cell["target"].as_str().unwrap();
        let entries = ENTRIES.iter().find(|(name, _)| target.starts_with(name)).unwrap().1;
        assert_eq!(figures["conntrack_per_flow"], entries, "{cell}");
        let name = if cell["unit"] == "flow" { "user_bytes_per_flow" } else { "enters_per_unit" };
        assert!(target == "direct" || figures[name].as_f64() > Some(0.0), "{name} of {cell}");
    }
    for cell in measured(&["--relays", "sockmap", "--workloads", "pingpong-4,bulk-1"]) {
        let figures = &cell["rounds"][0]["figures"];
        assert_eq!(figures["errors"], 0.0, "{cell}");
        let name = if cell["unit"] == "GB" { "bytes_per_second" } else { "per_second" };
        assert!(figures[name].as_f64() > Some(0.0), "{name} of {cell}");
    }
}

#[test]
fn a_target_that_cannot_have_as_many_flows_is_left_out_aloud() {
    let place = TempDir::new().unwrap();
    let output = output(&place, &[&TINY[..], &["idle-10000", "--rounds", "1"]].concat());
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("left out tokio under idle-10000"), "{}", said(&output));
    let result = read(&place.path().join("compare.json"));
    assert_eq!(result["cells"].as_array().unwrap().len(), 1, "direct alone");
}

fn check(result: &Value) {
    assert_eq!(result["is_partial"], false);
    let cells = result["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 18, "3 targets, 6 workloads");
    for cell in cells {
        let rounds = cell["rounds"].as_array().unwrap();
        assert_eq!(rounds.len(), 2, "{}", cell["target"]);
        for round in rounds {
            let figures = &round["figures"];
            assert_eq!(figures["errors"].as_f64().unwrap_or(0.0), 0.0, "{cell}");
            let wanted: &[&str] = match (cell["unit"].as_str().unwrap(), cell["target"] == "direct")
            {
                ("flow", true) => &["slab_bytes_per_flow"],
                ("flow", false) => &["slab_bytes_per_flow", "user_bytes_per_flow"],
                ("GB", _) => &["bytes_per_second", "system_cpu_us_per_unit", "retransmits"],
                // High quantiles need more exchanges than a busy machine has in this time.
                (_, true) => &["per_second", "p50_us", "max_us", "system_cpu_us_per_unit"],
                (_, false) => &["per_second", "forwarder_cpu_us_per_unit", "conntrack_per_flow"],
            };
            for name in wanted {
                assert!(figures[*name].is_number(), "{name} of {cell}");
            }
        }
    }
    if is_root() {
        assert_eq!(result["machine"]["congestion"][1], "reno");
    }
}

fn documents(place: &TempDir) {
    let report = |format: &str| {
        let output = output(place, &["report", "compare.json", "--format", format]);
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let csv = report("csv");
    assert!(csv.lines().all(|line| line.split(',').count() == 7), "{csv}");
    assert!(csv.contains("pingpong-8,direct,8,request,1,per_second,"), "{csv}");
    let markdown = report("markdown");
    assert!(markdown.contains("| target |") && markdown.contains("- kernel: "), "{markdown}");
    let fortio: Value = serde_json::from_str(&report("fortio")).unwrap();
    let histogram = &fortio[0]["DurationHistogram"];
    let data = histogram["Data"].as_array().unwrap();
    assert_eq!(data.last().unwrap()["Percent"].as_f64(), Some(100.0));
    let sum: u64 = data.iter().map(|bucket| bucket["Count"].as_u64().unwrap()).sum();
    assert_eq!(histogram["Count"].as_u64(), Some(sum));
    assert!(
        read(&place.path().join("compare.json"))
            == serde_json::from_str::<Value>(&report("json")).unwrap()
    );
    let same = output(place, &["compare", "compare.json", "compare.json"]);
    let text = String::from_utf8(same.stdout).unwrap();
    assert!(text.contains("verdict: no difference"), "{text}");
    let missed =
        output(place, &["report", "compare.json", "--format", "csv", "--threshold", "rate>1e9"]);
    assert_eq!(missed.status.code(), Some(2), "1e9 is no number here");
    let missed = output(
        place,
        &["report", "compare.json", "--format", "csv", "--threshold", "rate>999999999"],
    );
    assert_eq!(missed.status.code(), Some(99));
    assert!(said(&missed).contains("direct under pingpong-8: threshold"), "{}", said(&missed));
}

/// The page stands alone, and a browser draws it.
fn page(place: &TempDir) {
    let output = output(place, &["report", "compare.json"]);
    assert!(output.status.success(), "{}", said(&output));
    let file = place.path().join("compare.html");
    let text = fs::read_to_string(&file).unwrap();
    for link in ["src=", "href=\"http", "@import", "url(", "fetch("] {
        assert!(!text.contains(link), "the page asks the network: {link}");
    }
    assert!(text.contains("The MIT License"), "uPlot's licence goes with it");
    let browser = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|name| {
        let version = Command::new(name).arg("--version").stderr(Stdio::null()).output();
        version.is_ok_and(|output| output.status.success())
    });
    let Some(browser) = browser else {
        assert!(std::env::var_os("CI").is_none(), "no browser: run scripts/setup");
        return eprintln!("skipped: no browser (run scripts/setup)");
    };
    let see = |arguments: &[&str]| {
        let mut command = Command::new(browser);
        command.args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ]);
        command.args(["--window-size=1280,2400", "--virtual-time-budget=3000"]);
        command.arg(format!("--user-data-dir={}", place.path().join("browser").display()));
        command.args(arguments).arg(format!("file://{}", file.display()));
        command.output().unwrap()
    };
    let picture = place.path().join("page.png");
    let shot = see(&[&format!("--screenshot={}", picture.display())]);
    let bytes = fs::metadata(&picture).map_or(0, |file| file.len());
    assert!(bytes > 50_000, "a picture of {bytes} bytes: {}", said(&shot));
    let drawn = String::from_utf8(see(&["--dump-dom"]).stdout).unwrap();
    // Rate and p99 by connections; percentiles and time of each workload of exchanges; time of bulk.
    assert_eq!(drawn.matches("<canvas width=").count(), 2 + 4 * 2 + 1, "every chart is drawn");
    assert!(drawn.matches("class=\"bar\"").count() >= 3 * 6, "every bar is drawn");
}

/// Starts a comparison that takes long, and waits until it measures.
fn long(place: &TempDir) -> Child {
    let child = loadtest(place)
        .args(TINY)
        .args(["pingpong-4", "--rounds", "15"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("a round is kept", || place.path().join("compare.json").exists());
    child
}

fn signal(child: &Child, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

#[test]
fn an_interrupted_comparison_keeps_what_it_has_and_removes_its_lab() {
    let place = TempDir::new().unwrap();
    let mut child = long(&place);
    signal(&child, nix::sys::signal::Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(left_by(child.id()), Vec::<PathBuf>::new(), "the lab is gone");
    let result = read(&place.path().join("compare.json"));
    assert_eq!(result["is_partial"], true);
    assert!(!result["cells"].as_array().unwrap().is_empty());
}

#[test]
fn a_comparison_that_is_interrupted_at_once_says_so() {
    let place = TempDir::new().unwrap();
    let child =
        loadtest(&place).args(TINY).arg("pingpong-4").stderr(Stdio::piped()).spawn().unwrap();
    let is_under_way = || !left_by(child.id()).is_empty();
    until("the lab is begun", is_under_way);
    signal(&child, nix::sys::signal::Signal::SIGINT);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    assert!(said(&output).contains("interrupted"), "{}", said(&output));
}

#[test]
fn what_a_killed_comparison_left_the_next_removes() {
    if !is_root() {
        return;
    }
    let place = TempDir::new().unwrap();
    let mut child = long(&place);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_ne!(left_by(child.id()), Vec::<PathBuf>::new(), "this test sees what is left");
    let output = output(&place, &[&TINY[..], &["pingpong-4", "--rounds", "1"]].concat());
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(left_by(child.id()), Vec::<PathBuf>::new());
}

#[test]
fn without_root_plain_forwarders_are_compared_over_loopback() {
    let place = TempDir::new().unwrap();
    // Readable for whoever we become.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(place.path(), mode).unwrap();
    let program = place.path().join("weir-loadtest");
    fs::copy(env!("CARGO_BIN_EXE_weir-loadtest"), &program).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.current_dir(place.path()).args(arguments).stdin(Stdio::null());
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command.output().unwrap()
    };
    let arguments = [&TINY[..], &["pingpong-4", "--rounds", "1"]].concat();
    let output = run(&arguments);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("without root there is no lab"), "{}", said(&output));
    for (arguments, words) in [
        (&["--modes", "inbound-tproxy"][..], "capture needs root"),
        (&["--tracking"], "needs root"),
    ] {
        let output = run(&[&["compare", "--force"], arguments].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains(words), "{}", said(&output));
    }
}

#[test]
fn what_cannot_be_compared_is_said_with_its_cure() {
    let place = TempDir::new().unwrap();
    for (arguments, code, words) in [
        (&["compare", "--peers", "haprxy"][..], 2, "did you mean `haproxy`?"),
        (&["compare", "--modes", "inbound"], 2, "known: direct"),
        (&["compare", "--workloads", "bulk"], 2, "as bulk-64"),
        (&["compare", "--workloads", "idle-32000"], 2, "descriptors a process"),
        (&["compare", "--force", "--modes", "none", "--peers", "none"], 2, "nothing to compare"),
        (&["compare", "--baseline", "haprxy"], 2, "did you mean `haproxy`?"),
        (&["compare", "--generator-cpu", "9999"], 2, "--generator-cpu: only CPUs"),
        (&["compare", "--forwarder-cpu", "9999"], 2, "--forwarder-cpu: only CPUs"),
        (&["compare", "one.json"], 2, "name two results"),
        (&["compare", "--out", "nowhere/x.json"], 1, "--out nowhere/x.json: cannot write there"),
        (&["compare", "one.json", "two.json"], 1, "read one.json"),
        (&["report", "Cargo.toml"], 1, "read Cargo.toml"),
        (&["report", env!("CARGO_BIN_EXE_weir-loadtest")], 1, "is no result of"),
        (&["compare", "--force", "--modes", "forward", "--weir", "/no/weir"], 1, "no such file"),
    ] {
        let output = output(&place, arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert!(said(&output).contains(words), "{arguments:?}: {}", said(&output));
    }
    for wrong in [["--seconds", "nan"], ["--budget", "0"], ["--vary", "spin"], ["--workers", "0"]] {
        let output = output(&place, &[&["compare"][..], &wrong].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", said(&output));
    }
    // PATH has nothing.
    for (arguments, words) in [
        (&["compare", "--force", "--modes", "direct", "--peers", "none"][..], "apt-get install"),
        (&["compare", "--syscalls"], "--syscalls: perf is not installed"),
    ] {
        let output = loadtest(&place).args(arguments).env("PATH", place.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(said(&output).contains(words), "{arguments:?}: {}", said(&output));
    }
}

#[test]
fn a_busy_port_of_the_server_is_said() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let place = TempDir::new().unwrap();
    let output = output(&place, &["run", "--to", &addr, "--serve", &addr]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("ss -ltnp"), "{}", said(&output));
}

const NOBODY: u32 = 65_534;
/// Every mode under two workloads.
const CELLS: usize = 16;
/// Entries of connection tracking a flow, where it is on: the modes without it keep it off, even
/// then.
const ENTRIES: [(&str, f64); 8] = [
    ("direct", 1.0),
    ("forward", 2.0),
    ("inbound-redirect", 1.0),
    ("inbound-tproxy", 0.0),
    ("outbound-connect", 0.0),
    ("outbound-redirect", 2.0),
    ("outbound-tproxy", 0.0),
    ("takeover", 2.0),
];
