// SPDX-License-Identifier: Apache-2.0
//! A config as weir understood it, every default filled in: for people as YAML, for programs as
//! JSON. Read again, it is the same config.

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::config::{
    Captured, Config, Credentials, Destinations, Facade, Forward, Identity, Inbound,
    InboundCapture, Named, Namespace, OnChange, OnExit, Outbound, OutboundCapture, Protection,
    ProxyProtocol, Reach, Registry, RegistryKind, Sofa, SourceAddress, Takeover, Tls, Tree, Wanted,
    Workers, Workload,
};
use crate::service::{Endpoint, Manner};

pub use profile::profile;

mod profile;

/// Every key and its value in force.
#[must_use]
pub fn config(config: &Config) -> Value {
    let mut shown = json!({
        "profile": config.profile.name,
        "workers": workers(&config.workers),
        "on_change": match config.on_change {
            OnChange::Alarm => "alarm",
            OnChange::Repair => "repair",
        },
        "on_exit": match config.on_exit { OnExit::Closed => "closed", OnExit::Open => "open" },
    });
    let (top, named): (Vec<_>, Vec<_>) =
        config.workloads.iter().partition(|captured| captured.name.is_empty());
    for captured in top {
        show_captured(captured, &mut shown);
    }
    if !named.is_empty() {
        shown["workloads"] = named.into_iter().map(workload).collect();
    }
    if !config.forward.is_empty() {
        shown["forward"] = config.forward.iter().map(forward).collect();
    }
    if let Some(found) = &config.takeover {
        shown["takeover"] = takeover(found);
    }
    shown["admin"] = json!({});
    if let Some(socket) = &config.admin.socket {
        shown["admin"]["socket"] = socket.display().to_string().into();
    }
    if let Some(http) = config.admin.http {
        shown["admin"]["http"] = http.to_string().into();
    }
    shown
}

/// The same as YAML.
#[must_use]
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    write_map(&mut text, value, 0);
    text
}

fn workers(workers: &Workers) -> Value {
    match workers {
        Workers::Auto => "auto".into(),
        Workers::Count(count) => count.get().into(),
        Workers::Cpus(cpus) => cpus.clone().into(),
    }
}

fn workload(captured: &Captured) -> Value {
    let mut shown = json!({ "name": captured.name });
    let outbound = captured.outbound.as_ref().and_then(|outbound| outbound.workload.as_ref());
    match (&captured.namespace, outbound) {
        (Namespace::Path(path), _) => shown["netns"] = path.display().to_string().into(),
        (Namespace::Process(pid), _) => shown["pid"] = (*pid).into(),
        (Namespace::Own, Some(Workload::Cgroups(paths))) => {
            let one = paths.first().map(|path| path.display().to_string());
            shown["cgroup"] = one.into();
        }
        (Namespace::Own, _) => {}
    }
    show_captured(captured, &mut shown);
    if captured.namespace == Namespace::Own
        && let Some(outbound) = shown["outbound"].as_object_mut()
    {
        outbound.remove("workload"); // The entry itself says it.
    }
    shown
}

fn show_captured(captured: &Captured, shown: &mut Value) {
    if let Some(found) = &captured.inbound {
        shown["inbound"] = inbound(found);
    }
    if let Some(found) = &captured.outbound {
        shown["outbound"] = outbound(found);
    }
}

fn inbound(inbound: &Inbound) -> Value {
    json!({
        "capture": match inbound.capture {
            InboundCapture::Redirect => "redirect",
            InboundCapture::Tproxy => "tproxy",
        },
        "destinations": match inbound.destinations { Reach::Any => "any", Reach::Local => "local" },
        "listen": inbound.listen.to_string(),
        "ports": { "include": ports(&inbound.ports.include), "exclude": ports(&inbound.ports.exclude) },
        "source": match inbound.source { SourceAddress::Keep => "keep", SourceAddress::Own => "own" },
        "source_ports": format!("{}-{}", inbound.source_ports.start(), inbound.source_ports.end()),
        "proxy_protocol": match inbound.proxy_protocol {
            ProxyProtocol::Off => "off",
            ProxyProtocol::V1 => "v1",
            ProxyProtocol::V2 => "v2",
        },
    })
}

fn outbound(outbound: &Outbound) -> Value {
    let mut shown = json!({
        "capture": match outbound.capture {
            OutboundCapture::Connect => "connect",
            OutboundCapture::Redirect => "redirect",
            OutboundCapture::Tproxy => "tproxy",
        },
        "listen": outbound.listen.to_string(),
    });
    match &outbound.workload {
        Some(Workload::Cgroups(paths)) => {
            let mut paths: Vec<Value> =
                paths.iter().map(|path| path.display().to_string().into()).collect();
            let only = if paths.len() == 1 { paths.pop() } else { None };
            shown["workload"] = json!({ "cgroup": only.unwrap_or(paths.into()) });
        }
        Some(Workload::Uid(uid)) => shown["workload"] = json!({ "uid": uid }),
        None => {}
    }
    shown["include"] = destinations(&outbound.include);
    shown["exclude"] = destinations(&outbound.exclude);
    shown
}

fn forward(forward: &Forward) -> Value {
    let endpoints: Vec<Value> = forward.endpoints.iter().map(endpoint).collect();
    let mut shown = json!({
        "name": forward.name,
        "listen": forward.listen.to_string(),
        "endpoints": endpoints,
    });
    manner(&forward.manner, &mut shown);
    shown
}

fn takeover(takeover: &Takeover) -> Value {
    let mut shown = json!({
        "api": takeover.api.to_string(),
        "inbound": takeover.inbound.to_string(),
        "outbound": takeover.outbound.to_string(),
        "app_port": takeover.app_port,
        "propagation_ms": profile::millis(takeover.propagation),
    });
    shown["protect"] = takeover.protect.as_ref().map_or("off".into(), protection);
    if let Some(state) = &takeover.state {
        shown["state"] = state.display().to_string().into();
    }
    if let Some(advertise) = takeover.advertise {
        shown["advertise"] = advertise.to_string().into();
    }
    if let Some(Facade { listen, registry, .. }) = &takeover.facade {
        shown["facade"] = json!({ "listen": listen.to_string(), "registry": registry });
    }
    manner(&takeover.manner, &mut shown);
    let registry = |registry: &Registry| match &registry.kind {
        RegistryKind::File(path) => {
            json!({ "name": registry.name, "kind": "file", "path": path.display().to_string() })
        }
        RegistryKind::Static(services) => {
            let services: Vec<Value> = services.iter().map(named).collect();
            json!({ "name": registry.name, "kind": "static", "services": services })
        }
        RegistryKind::Etcd(settings) => tree(&registry.name, "etcd", settings),
        RegistryKind::Sofa(settings) => sofa(&registry.name, settings),
        RegistryKind::Zookeeper(settings) => tree(&registry.name, "zookeeper", settings),
    };
    shown["registries"] = takeover.registries.iter().map(registry).collect();
    let wanted = |wanted: &Wanted| {
        let listen = wanted.listen.map(|listen| ("listen", listen.to_string()));
        let off = (!wanted.is_protected).then(|| ("protect", "off".to_owned()));
        let dialled_at = wanted.dialled_at.map(|addr| ("virtual", addr.to_string()));
        let pairs = [("name", wanted.name.clone())].into_iter();
        let pairs = pairs.chain(listen).chain(dialled_at).chain(off);
        pairs.map(|(key, value)| (key.to_owned(), Value::from(value))).collect::<Value>()
    };
    shown["services"] = takeover.services.iter().map(wanted).collect();
    shown
}

fn protection(protection: &Protection) -> Value {
    json!({
        "empty_ms": profile::millis(protection.empty_for),
        "drop_percent": protection.drop_percent,
        "drop_ms": profile::millis(protection.drop_for),
    })
}

fn sofa(name: &str, settings: &Sofa) -> Value {
    let Sofa { group, heartbeat, scope, servers, zone } = settings;
    let mut shown = json!({
        "name": name,
        "kind": "sofa",
        "servers": servers,
        "group": group,
        "scope": scope.word(),
        "heartbeat_ms": profile::millis(*heartbeat),
    });
    if !zone.is_empty() {
        shown["zone"] = zone.as_str().into();
    }
    shown
}

fn tree(name: &str, kind: &str, settings: &Tree) -> Value {
    let Tree { credentials, layout, root, servers, session_timeout, tls } = settings;
    let mut shown = json!({
        "name": name,
        "kind": kind,
        "servers": servers,
        "layout": layout.word(),
        "root": root,
        "session_timeout_ms": profile::millis(*session_timeout),
    });
    if let Some(Credentials { password_file, user }) = credentials {
        shown["user"] = user.as_str().into();
        shown["password_file"] = password_file.display().to_string().into();
    }
    if let Some(Tls { ca, identity, server_name }) = tls {
        let mut tls = json!({ "ca": ca.display().to_string() });
        if let Some(Identity { certificate, key }) = identity {
            tls["certificate"] = certificate.display().to_string().into();
            tls["key"] = key.display().to_string().into();
        }
        if let Some(name) = server_name {
            tls["server_name"] = name.as_str().into();
        }
        shown["tls"] = tls;
    }
    shown
}

fn named(named: &Named) -> Value {
    let endpoints: Vec<Value> = named.endpoints.iter().map(endpoint).collect();
    json!({ "name": named.name, "parameters": named.parameters, "endpoints": endpoints })
}

/// Just the address where there is nothing else to say.
fn endpoint(endpoint: &Endpoint) -> Value {
    let Endpoint { addr, weight, zone, .. } = endpoint;
    if *weight == Endpoint::WEIGHT && zone.is_empty() {
        return addr.to_string().into();
    }
    let mut shown = json!({ "addr": addr.to_string(), "weight": weight });
    if !zone.is_empty() {
        shown["zone"] = json!(zone);
    }
    shown
}

fn manner(manner: &Manner, shown: &mut Value) {
    shown["balance"] = manner.balance.word().into();
    if !manner.zone.is_empty() {
        shown["zone"] = json!(manner.zone);
    }
    let ms = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    shown["check_interval_ms"] = manner.check.map_or(0, |check| ms(check.interval)).into();
    if let Some(check) = &manner.check {
        shown["check"] = check.kind.word().into();
    }
    shown["slow_start_ms"] = ms(manner.slow_start).into();
}

fn destinations(destinations: &Destinations) -> Value {
    let cidrs: Vec<String> = destinations.cidrs.iter().map(IpNet::to_string).collect();
    json!({ "cidrs": cidrs, "ports": ports(&destinations.ports) })
}

fn ports(ranges: &[RangeInclusive<u16>]) -> Value {
    let range = |range: &RangeInclusive<u16>| match (*range.start(), *range.end()) {
        (1, u16::MAX) => Value::from("all"),
        (start, end) if start == end => Value::from(start),
        (start, end) => Value::from(format!("{start}-{end}")),
    };
    match ranges {
        [one] if *one == (1..=u16::MAX) => range(one),
        ranges => ranges.iter().map(range).collect(),
    }
}

/// Maps of maps in lines, everything below as YAML's flow style, which is JSON.
fn write_map(text: &mut String, value: &Value, indent: usize) {
    for (key, value) in value.as_object().into_iter().flatten() {
        let is_deep = value.as_object().is_some_and(|map| !map.is_empty());
        // Writing to a string cannot fail.
        let _ = if is_deep {
            writeln!(text, "{:indent$}{key}:", "")
        } else {
            writeln!(text, "{:indent$}{key}: {value}", "")
        };
        if is_deep {
            write_map(text, value, indent + 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every key that there is.
    const FULL: &str = r#"
profile: latency
workers: [0, 1]
on_exit: open
inbound:
  capture: tproxy
  destinations: any
  listen: "0.0.0.0:16006"
  ports: { include: [80, "8000-8100"], exclude: 8022 }
  source: own
  source_ports: 20000-20999
  proxy_protocol: off
outbound:
  capture: connect
  listen: "127.0.0.1:16001"
  workload: { cgroup: /a/b }
  include: { cidrs: ["10.0.0.0/8", "fd00::1"], ports: all }
  exclude: { cidrs: ["10.9.0.0/16"], ports: [22] }
workloads:
  - { name: a, netns: /run/netns/a, inbound: { source: own }, outbound: { capture: connect } }
  - { name: b, pid: 7, inbound: { source: own } }
  - { name: c, cgroup: /c, outbound: { listen: "127.0.0.1:16002" } }
forward:
  - { name: db, listen: "127.0.0.1:1", endpoints: ["127.0.0.1:2"], balance: least_flows }
  - name: web
    listen: "127.0.0.1:4"
    endpoints: ["127.0.0.1:2", { addr: "127.0.0.1:5", weight: 0, zone: a }]
    balance: weighted
    zone: a
    check_interval_ms: 500
    check: dubbo
    slow_start_ms: 2000
takeover:
  api: "127.0.0.1:23330"
  inbound: "0.0.0.0:22201"
  outbound: "127.0.0.1:22220"
  advertise: 10.0.0.7
  app_port: 20880
  balance: least_flows
  zone: a
  check_interval_ms: 500
  check: bolt
  slow_start_ms: 2000
  registries:
    - { name: main, kind: static, services: [{ name: "a:1", parameters: "v=1", endpoints: ["10.0.0.1:2", { addr: "10.0.0.2:2", weight: 1, zone: b }] }] }
    - { name: lab, kind: file, path: /tmp/services.yaml }
    - { name: keeper, kind: zookeeper, servers: ["10.0.0.9:2181", "zk.example:2181"], layout: dubbo, root: /d, user: u, password_file: /p, session_timeout_ms: 5000 }
    - { name: cluster, kind: etcd, servers: ["10.0.0.9:2379"], tls: { ca: /ca.pem, certificate: /me.pem, key: /me.key, server_name: etcd.example } }
    - { name: sofa, kind: sofa, servers: ["10.0.0.9:9603"], group: g, zone: z, scope: data_center, heartbeat_ms: 1000 }
  propagation_ms: 1000
  protect: { empty_ms: 1000, drop_percent: 50, drop_ms: 2000 }
  state: /var/lib/weir
  facade: { listen: "127.0.0.1:22181", registry: keeper }
  services: [{ name: "a:1", listen: "127.0.0.2:80" }, { name: "b:1", virtual: "10.96.0.7:80", protect: off }]
admin: { socket: /tmp/a.sock, http: "127.0.0.1:3" }
"#;

    fn read(text: &str) -> Config {
        Config::parse("weir.yaml", None, text).unwrap_or_else(|mistakes| panic!("{mistakes}"))
    }

    #[test]
    fn shown_config_reads_as_the_same_config() {
        for text in [FULL, crate::config::DEFAULT, "inbound: {}"] {
            let understood = read(text);
            assert_eq!(read(&yaml(&config(&understood))), understood, "{text}");
        }
    }

    /// Paths of all keys; items of lists count as their list.
    fn keys(value: &Value, path: &str, into: &mut BTreeSet<String>) {
        for (key, value) in value.as_object().into_iter().flatten() {
            let path = format!("{path}.{key}");
            keys(value, &path, into);
            for item in value.as_array().into_iter().flatten() {
                keys(item, &path, into);
            }
            into.insert(path);
        }
    }

    fn schema_keys(schema: &Value, path: &str, into: &mut BTreeSet<String>) {
        let reference = schema["$ref"].as_str().and_then(|name| name.rsplit('/').next());
        let root: Value = serde_json::from_str(crate::config::SCHEMA).unwrap();
        let schema = reference.map_or(schema, |name| &root["$defs"][name]);
        assert_ne!(schema["additionalProperties"].as_bool(), Some(true));
        for (key, value) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{key}");
            schema_keys(value, &path, into);
            into.insert(path);
        }
        if !schema["items"].is_null() {
            schema_keys(&schema["items"], path, into);
        }
    }

    #[test]
    fn schema_has_the_keys_that_there_are() {
        let (mut shown, mut described) = (BTreeSet::new(), BTreeSet::new());
        keys(&config(&read(FULL)), "", &mut shown);
        let schema: Value = serde_json::from_str(crate::config::SCHEMA).unwrap();
        schema_keys(&schema, "", &mut described);
        shown.insert(".outbound.workload.uid".to_owned()); // Instead of a cgroup.
        let captures = |key: &&String| key.starts_with(".inbound") || key.starts_with(".outbound");
        let of_workloads: Vec<String> =
            shown.iter().filter(captures).map(|key| format!(".workloads{key}")).collect();
        shown.extend(of_workloads);
        assert_eq!(described, shown);
    }
}
