// SPDX-License-Identifier: Apache-2.0
//! The programs of the demo: web servers, load, and what their reports say.

use std::fs;

use super::lab::{Lab, Place, Refusal, wait};

/// What a load generator measured.
pub(super) struct Http {
    pub(super) p50: String,
    pub(super) p99: String,
    pub(super) per_second: String,
}

/// Starts a web server and a bulk server in `place`; their clients' addresses go into a log.
pub(super) fn start(lab: &mut Lab, place: Place) -> Result<(), Refusal> {
    let (web, bulk, log) = match place {
        Place::Server => ("server-nginx", "server-iperf3", SERVER_LOG),
        _ => ("workload-nginx", "workload-iperf3", WORKLOAD_LOG),
    };
    let home = lab.directory().join(format!("{web}.d"));
    fs::create_dir_all(&home).map_err(|error| format!("make {}: {error}", home.display()))?;
    let file = home.join("nginx.conf");
    let text = NGINX
        .replace("HOME", &home.display().to_string())
        .replace("LOG", &lab.directory().join(log).display().to_string());
    fs::write(&file, text).map_err(|error| format!("write {}: {error}", file.display()))?;
    lab.start(
        place,
        web,
        &["nginx", "-p", &home.to_string_lossy(), "-c", &file.to_string_lossy()],
    )?;
    lab.start(place, bulk, &["iperf3", "-s"])?;
    let listens = |lab: &Lab| lab.output(place, &["ss", "-Hltn"]).unwrap_or_default();
    if !wait(|| [":80 ", ":5201 "].iter().all(|port| listens(lab).contains(port))) {
        return Err(format!(
            "{web} or {bulk} does not listen: {}{}",
            lab.said(web),
            lab.said(bulk)
        ));
    }
    Ok(())
}

/// The address from which the last request came to `place`, as its web server saw it.
pub(super) fn last_client(lab: &Lab, log: &str, count: usize) -> Option<String> {
    // The server writes after it has answered.
    wait(|| lab.said(log).lines().count() >= count);
    lab.said(log).lines().last().map(str::to_owned)
}

/// How many requests have come.
pub(super) fn requests(lab: &Lab, log: &str) -> usize {
    lab.said(log).lines().count()
}

/// Web load and bulk load from `from` to `to`, for as long as the demo watches.
pub(super) fn load(lab: &mut Lab, from: Place, to: &str, seconds: u64) -> Result<(), Refusal> {
    let (web, bulk) = names(from);
    let seconds = seconds.to_string();
    let url = format!("http://{to}/");
    let address = to.trim_matches(['[', ']']);
    lab.start(from, web, &["wrk", "-t1", "-c64", "-d", &seconds, "--latency", &url])?;
    lab.start(from, bulk, &["iperf3", "-c", address, "-t", &seconds, "-P2", "-J"])
}

/// What the loads from `from` measured.
pub(super) fn report(lab: &Lab, from: Place) -> (Http, Option<f64>) {
    let (web, bulk) = names(from);
    let said = lab.said(web);
    let field = |name: &str| {
        let line = said.lines().find_map(|line| line.trim().strip_prefix(name));
        line.map_or_else(|| "-".to_owned(), |rest| rest.trim().to_owned())
    };
    let http = Http { p50: field("50%"), p99: field("99%"), per_second: field("Requests/sec:") };
    let json: Option<serde_json::Value> = serde_json::from_str(&lab.said(bulk)).ok();
    let bits = json.and_then(|json| json["end"]["sum_received"]["bits_per_second"].as_f64());
    (http, bits.map(|bits| bits / 1e9))
}

pub(super) const fn names(from: Place) -> (&'static str, &'static str) {
    match from {
        Place::Client => ("client-wrk", "client-iperf3"),
        _ => ("workload-wrk", "workload-iperf3-client"),
    }
}

pub(super) const SERVER_LOG: &str = "server-access.log";
pub(super) const WORKLOAD_LOG: &str = "workload-access.log";

/// One worker: two CPUs are the least that a demo meets, and there are two servers. It logs nothing of the load:
/// that would measure the disk.
const NGINX: &str = r#"
daemon off;
worker_processes 1;
pid HOME/pid;
error_log stderr;
events { worker_connections 4096; }
http {
    log_format who '$remote_addr';
    client_body_temp_path HOME; proxy_temp_path HOME; fastcgi_temp_path HOME;
    uwsgi_temp_path HOME; scgi_temp_path HOME;
    keepalive_requests 1000000;
    server {
        listen 80;
        listen [::]:80 ipv6only=on;
        location / { access_log off; return 200 "hello\n"; }
        location /who { access_log LOG who; return 200 "hello\n"; }
    }
}
"#;
