// SPDX-License-Identifier: Apache-2.0
//! The other half of the demo: traffic that comes because a registry says so. A real ZooKeeper, a
//! provider and a consumer, each with a weir beside it.

use std::fs;

use super::lab::{Lab, NODE_TO_SERVER, Place, Refusal, SERVER, bare, wait};
use super::{plain, say, step};

/// Who calls whom, and by which ports.
pub(super) fn show(lab: &mut Lab) -> Result<(), Refusal> {
    say(
        "\ntakeover: no rule, no hook; the registry holds weir's address, the consumer is told weir's\n",
    );
    start_registry(lab)?;
    let registry = format!("{}:2181", plain(SERVER[0]));
    for (place, name, lines) in [
        (
            Place::Server,
            "provider-weir",
            format!("advertise: {}, inbound: \"0.0.0.0:20881\"", plain(SERVER[0])),
        ),
        (
            Place::Node,
            "consumer-weir",
            format!("advertise: {}, outbound: \"127.0.0.1:20882\"", plain(NODE_TO_SERVER[0])),
        ),
    ] {
        start_weir(
            lab,
            place,
            name,
            &format!(
                "{lines}, registries: [{{ name: zookeeper, kind: zookeeper, servers: [\"{registry}\"] }}]"
            ),
        )?;
    }
    publish(lab)?;
    subscribe(lab)?;
    call(lab)?;
    ask(lab, Place::Server, "unpublish", &format!("{{\"serviceName\":\"{SERVICE}\"}}"))?;
    if !wait(|| !ask_keeper(lab, "dump").contains("%3A20881")) {
        return Err("the registry still holds the provider".to_owned());
    }
    step("the provider takes it back, and the registry holds it no more");
    ["consumer-weir", "provider-weir", "zookeeper", "provider"]
        .iter()
        .for_each(|name| lab.kill(name));
    Ok(())
}

fn publish(lab: &Lab) -> Result<(), Refusal> {
    ask(
        lab,
        Place::Server,
        "publish",
        &format!("{{\"serviceName\":\"{SERVICE}\",\"port\":20880}}"),
    )?;
    let mut held = String::new();
    let is_held = wait(|| {
        held = ask_keeper(lab, "dump");
        held.contains("%3A20881")
    });
    if !is_held || held.contains("20880") {
        return Err(format!(
            "the registry holds something else: {held}{}",
            lab.said("provider-weir")
        ));
    }
    step(&format!(
        "the provider says: {SERVICE} at port 20880; the registry holds {}:20881, and not 20880",
        plain(SERVER[0])
    ));
    Ok(())
}

fn subscribe(lab: &Lab) -> Result<(), Refusal> {
    let mut told = String::new();
    let is_told = wait(|| {
        let body = format!("{{\"serviceName\":\"{SERVICE}\"}}");
        told = ask(lab, Place::Node, "subscribe", &body).unwrap_or_default();
        told.contains("127.0.0.1:20882")
    });
    if !is_told {
        return Err(format!("the consumer is told {told}: {}", lab.said("consumer-weir")));
    }
    step("the consumer asks for it and is told 127.0.0.1:20882");
    Ok(())
}

fn call(lab: &Lab) -> Result<(), Refusal> {
    let header = format!("Target-Service: {SERVICE}");
    let words = ["curl", "-gsS", "-m", "5", "-H", &header, "http://127.0.0.1:20882/who"];
    let answer = lab.output(Place::Node, &words)?;
    if !answer.contains(ANSWER) {
        return Err(format!("the call was answered with {answer}"));
    }
    step(&format!(
        "the call: consumer \u{2192} 127.0.0.1:20882 \u{2192} {}:20881 \u{2192} 127.0.0.1:20880, answered: {ANSWER}",
        plain(SERVER[0])
    ));
    Ok(())
}

/// ZooKeeper, and a provider that answers HTTP.
fn start_registry(lab: &mut Lab) -> Result<(), Refusal> {
    let home = lab.directory().join("zookeeper.d");
    let text = format!(
        "tickTime=500\ndataDir={}\nclientPortAddress={}\nclientPort=2181\nadmin.enableServer=false\n\
         4lw.commands.whitelist=srvr,dump\n",
        home.display(),
        plain(SERVER[0]),
    );
    let nginx = format!(
        "daemon off; master_process off; pid {0}/pid; error_log stderr; events {{ }} http {{ access_log off; \
         client_body_temp_path {0}; proxy_temp_path {0}; fastcgi_temp_path {0}; uwsgi_temp_path {0}; \
         scgi_temp_path {0}; server {{ listen 127.0.0.1:20880; return 200 \"{ANSWER}\"; }} }}",
        home.display()
    );
    fs::create_dir_all(&home).map_err(|error| format!("make {}: {error}", home.display()))?;
    for (name, text) in [("zoo.cfg", text), ("nginx.conf", nginx)] {
        let file = home.join(name);
        fs::write(&file, text).map_err(|error| format!("write {}: {error}", file.display()))?;
    }
    let (zoo, nginx) = (home.join("zoo.cfg"), home.join("nginx.conf"));
    let java = ["java", "-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", CLASSES, MAIN];
    lab.start(Place::Server, "zookeeper", &[&java[..], &[&zoo.to_string_lossy()]].concat())?;
    let words = ["nginx", "-p", &home.to_string_lossy(), "-c", &nginx.to_string_lossy()];
    lab.start(Place::Server, "provider", &words)?;
    if wait(|| ask_keeper(lab, "srvr").contains("Mode:")) {
        return Ok(());
    }
    Err(format!("ZooKeeper does not serve (run scripts/setup): {}", lab.said("zookeeper")))
}

fn start_weir(
    lab: &mut Lab,
    place: Place,
    name: &'static str,
    takeover: &str,
) -> Result<(), Refusal> {
    let socket = lab.directory().join(format!("{name}.sock"));
    let file = lab.directory().join(format!("{name}.yaml"));
    let text = format!(
        "workers: 1\ntakeover: {{ propagation_ms: 0, {takeover} }}\nadmin: {{ socket: \"{}\" }}\n",
        socket.display()
    );
    fs::write(&file, text).map_err(|error| format!("write {}: {error}", file.display()))?;
    let own = std::env::current_exe().map_err(|error| format!("find this program: {error}"))?;
    let own = own.to_string_lossy().into_owned();
    lab.start(place, name, &[&own, "run", "-c", &file.to_string_lossy()])?;
    let status = [&own, "status", "--wait", "10", "--socket", &socket.to_string_lossy()];
    lab.output(place, &status).map(drop).map_err(|_| format!("weir: {}", lab.said(name)))
}

/// Asks the application API, as an SDK does.
fn ask(lab: &Lab, place: Place, what: &str, body: &str) -> Result<String, Refusal> {
    let url = format!("http://127.0.0.1:13330/services/{what}");
    lab.output(place, &["curl", "-sS", "-m", "5", "-d", body, &url])
}

/// One of ZooKeeper's four letter words; empty if it does not answer.
fn ask_keeper(lab: &Lab, word: &str) -> String {
    let url = format!("telnet://{}:2181", bare(SERVER[0]));
    let shell = format!("printf {word} | curl -s -m 1 {url}");
    lab.output(Place::Server, &["sh", "-c", &shell]).unwrap_or_default()
}

const SERVICE: &str = "com.example.Hello:1.0";
const ANSWER: &str = "hello from port 20880";
/// Where Debian has it.
const CLASSES: &str = "/etc/zookeeper/conf_example:/usr/share/java/zookeeper.jar";
const MAIN: &str = "org.apache.zookeeper.server.ZooKeeperServerMain";
