// SPDX-License-Identifier: Apache-2.0
//! One weir for several workloads: sockets and rules live where the workload does, and one that goes
//! away harms no other.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::harness::{
    Cgroup, Net, PATIENCE, Place, Weir, check, config_file, echo, expect_reset, said, send, until,
    weir,
};

/// A process that only holds a namespace, ended on drop.
struct Holder(Child);

impl Holder {
    fn start(net: &Net, pod: Place) -> Holder {
        let mut command = net.command(pod, "sleep");
        Holder(command.arg("600").stdout(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn path(net: &Net, pod: Place) -> String {
    format!("/run/netns/{}", net.namespace(pod))
}

/// Bytes go both ways, and the flow's row tells whose it is.
fn exchange(weir: &Weir, client: &mut TcpStream, served: &mut TcpStream, workload: &str) {
    served.set_read_timeout(Some(PATIENCE)).unwrap();
    send(client, 1, 100_000).unwrap();
    check(served, 1, 100_000);
    send(served, 2, 100_000).unwrap();
    check(client, 2, 100_000);
    let local = client.local_addr().unwrap().to_string();
    let row = weir.flows().into_iter().find(|flow| flow["downstream"] == local.as_str());
    assert_eq!(row.unwrap()["workload"], workload);
}

/// Three workloads, by path and by process, each with its own modes and filters. The node, where weir
/// runs, has no way to any of them, no socket and no rule.
#[test]
fn each_workload_is_served_where_it_lives() {
    let net = Net::with_pods();
    let [a, b, c] = Net::PODS;
    let holder = Holder::start(&net, b);
    let config = format!(
        "workers: 2\nworkloads:\n\
         - {{ name: a, netns: {}, inbound: {{}}, outbound: {{}} }}\n\
         - {{ name: b, pid: {}, inbound: {{ source: own, proxy_protocol: v1, ports: {{ include: [80] }} }} }}\n\
         - {{ name: c, netns: {}, outbound: {{ exclude: {{ ports: [81] }} }} }}\n",
        path(&net, a),
        holder.pid(),
        path(&net, c),
    );
    let weir = Weir::run(&net, &config);
    let apps: Vec<TcpListener> = Net::PODS.map(|pod| net.listen(pod, "[::]:80")).into();
    let client_80 = net.listen(Place::Client, "[::]:80");
    let client_81 = net.listen(Place::Client, "[::]:81");
    for v6 in [false, true] {
        let door = |pod, host: u8, port: u16| match v6 {
            false => format!("{}:{port}", net.pod_v4(pod, host)),
            true => format!("[{}]:{port}", net.pod_v6(pod, host)),
        };
        // Inbound: a's workload sees the client, b's is told.
        let mut client = net.connect(Place::Client, &door(a, 2, 80));
        let (mut served, seen) = apps[0].accept().unwrap();
        assert_eq!(seen.ip().to_canonical(), client.local_addr().unwrap().ip());
        exchange(&weir, &mut client, &mut served, "a");
        let mut client = net.connect(Place::Client, &door(b, 2, 80));
        let (mut served, seen) = apps[1].accept().unwrap();
        assert_ne!(seen.ip().to_canonical(), client.local_addr().unwrap().ip());
        let mut header = [0; 6];
        served.read_exact(&mut header).unwrap();
        assert_eq!(&header, b"PROXY ");
        while header[5] != b'\n' {
            served.read_exact(&mut header[5..]).unwrap();
        }
        exchange(&weir, &mut client, &mut served, "b");
        // Outbound: a and c dial from where they live, c leaves port 81 alone.
        for (pod, name) in [(a, "a"), (c, "c")] {
            let mut client = net.connect(pod, &door(pod, 1, 80));
            let (mut served, seen) = client_80.accept().unwrap();
            let own = if v6 { net.pod_v6(pod, 2) } else { net.pod_v4(pod, 2) };
            assert_eq!(seen.ip().to_canonical().to_string(), own);
            exchange(&weir, &mut client, &mut served, name);
        }
        let before = weir.opened();
        let mut direct = net.connect(c, &door(c, 1, 81));
        direct.write_all(b"x").unwrap();
        client_81.accept().unwrap().0.read_exact(&mut [0]).unwrap();
        assert_eq!(weir.opened(), before, "an excluded port goes directly");
    }
    assert_eq!(net.sockets(), "", "no socket of a workload is in the node");
    let tables = |place| net.run(place, &["nft", "list", "tables"]).contains("inet weir");
    assert!(tables(a) && tables(b) && tables(c) && !tables(Place::Node));
    drop((apps, client_80, client_81));
    weir.end(&net);
    for pod in Net::PODS {
        until("the pod is clean", || net.is_clean_in(pod));
    }
}

/// Workers go from one namespace to the other for every connection, and mix nothing up.
#[test]
fn interleaved_workloads_are_never_mixed_up() {
    let net = Net::with_pods();
    let entries = Net::PODS.map(|pod| {
        format!(
            "- {{ name: \"{pod:?}\", netns: {}, inbound: {{}}, outbound: {{}} }}\n",
            path(&net, pod)
        )
    });
    let weir = Weir::run(&net, &format!("workers: 1\nworkloads:\n{}", entries.concat()));
    // What every workload answers, and where it dials, tells it from the others.
    for pod in Net::PODS {
        for place in [pod, Place::Client] {
            let host = if place == pod { 2 } else { 1 };
            let listener = net.listen(place, &format!("{}:80", net.pod_v4(pod, host)));
            let name = format!("{pod:?}{host}");
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { return };
                    let _ = stream.write_all(name.as_bytes());
                }
            });
        }
    }
    std::thread::scope(|scope| {
        for pod in Net::PODS {
            for (from, host) in [(Place::Client, 2), (pod, 1)] {
                let net = &net;
                scope.spawn(move || {
                    for _ in 0..100 {
                        let door = format!("{}:80", net.pod_v4(pod, host));
                        let mut stream = net.connect(from, &door);
                        let mut answer = String::new();
                        stream.read_to_string(&mut answer).unwrap();
                        assert_eq!(answer, format!("{pod:?}{host}"));
                    }
                });
            }
        }
    });
    assert_eq!(weir.opened(), 600);
    weir.end(&net);
}

/// A namespace that goes away is let go of, so that the kernel can remove it; it is said once, and
/// others do not notice.
#[test]
fn workload_that_goes_away_harms_no_other() {
    let net = Net::with_pods();
    let [gone, stays, _] = Net::PODS;
    let entries = [gone, stays].map(|pod| {
        format!("- {{ name: {}, netns: {}, inbound: {{}} }}\n", net.link(pod), path(&net, pod))
    });
    let weir = Weir::run(&net, &format!("workers: 2\nworkloads:\n{}", entries.concat()));
    let app = net.listen(gone, "[::]:80");
    echo(net.listen(stays, "[::]:80"));
    let door = |pod| format!("{}:80", net.pod_v4(pod, 2));
    let mut lost = net.connect(Place::Client, &door(gone));
    let served = app.accept().unwrap();
    let mut kept = net.connect(Place::Client, &door(stays));
    send(&mut kept, 1, 1000).unwrap();
    check(&mut kept, 1, 1000);
    net.run(Place::Node, &["ip", "netns", "del", &net.namespace(gone)]);
    until("weir lets go of it", || weir.closed("workload_gone") == 1);
    expect_reset(&mut lost);
    drop((app, served, lost));
    // The cable goes with the namespace, and the namespace with its last holder.
    let link = net.link(gone);
    until("the namespace is no more", || {
        !net.run(Place::Client, &["ip", "-o", "link"]).contains(&format!(" {link}@"))
    });
    assert_eq!(weir.log().matches("namespace is gone").count(), 1, "{}", weir.log());
    until("weir is ready all the same", || {
        weir.ask("/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.0 200"))
    });
    send(&mut kept, 2, 1_000_000).unwrap();
    check(&mut kept, 2, 1_000_000);
    let mut new = net.connect(Place::Client, &door(stays));
    send(&mut new, 3, 1000).unwrap();
    check(&mut new, 3, 1000);
    drop((kept, new));
    weir.end(&net);
}

/// LC4: kill -9 leaves nothing in any namespace that changes traffic.
#[test]
fn killed_weir_leaves_no_workload_behind_rules() {
    let net = Net::with_pods();
    let entries = Net::PODS
        .map(|pod| format!("- {{ netns: {}, inbound: {{}}, outbound: {{}} }}\n", path(&net, pod)));
    let weir = Weir::run(&net, &format!("workers: 1\nworkloads:\n{}", entries.concat()));
    let app = net.listen(Net::PODS[1], "[::]:80");
    weir.signal(Signal::SIGKILL);
    for pod in Net::PODS {
        let tables = || net.run(pod, &["nft", "list", "tables"]);
        until("the table is gone", || !tables().contains("inet weir"));
    }
    let client = net.connect(Place::Client, &format!("{}:80", net.pod_v4(Net::PODS[1], 2)));
    let (_served, seen) = app.accept().unwrap();
    assert_eq!(seen.port(), client.local_addr().unwrap().port(), "it came directly");
    weir.kill();
}

/// LC9: `rules clear` goes to every workload of the config, with weir dead, twice; it names where it may
/// not, and does the others all the same.
#[test]
fn clear_goes_to_every_workload() {
    let net = Net::with_pods();
    let entries =
        Net::PODS.map(|pod| format!("- {{ netns: {}, inbound: {{}} }}\n", path(&net, pod)));
    let config = format!("workers: 1\nworkloads:\n{}", entries.concat());
    let place = TempDir::new().unwrap();
    let file = config_file(&place, &config);
    let clear = |more: &[&str]| {
        let words = [&[weir(), "rules", "clear", "-c", file.to_str().unwrap()], more].concat();
        net.output(Place::Node, &words)
    };
    Weir::run(&net, &config).kill();
    let left = || Net::PODS.iter().filter(|pod| !net.is_clean_in(**pod)).count();
    until("only rules are left", || !net.left_in(Net::PODS[0]).contains("table"));
    assert_eq!(left(), 3, "rules that no packet meets");
    let shown = clear(&["--dry-run"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for pod in Net::PODS {
        assert!(
            shown.contains(&format!("nsenter --net={} ip -4 rule del", path(&net, pod))),
            "{shown}"
        );
    }
    assert!(clear(&[]).status.success());
    assert_eq!(left(), 0);
    let again = clear(&[]);
    assert_eq!(String::from_utf8_lossy(&again.stdout), "nothing of weir is left here\n");
    Weir::run(&net, &config).kill();
    // One that lives, in the last of them, keeps what it holds.
    let alone = format!("workers: 1\nworkloads:\n{}", entries[2]);
    let alive = Weir::run(&net, &alone);
    let output = clear(&[]);
    assert_eq!(output.status.code(), Some(4));
    assert!(said(&output).contains("a running weir holds the rules"), "{}", said(&output));
    assert_eq!(left(), 1, "the others are cleared");
    alive.end(&net);
    until("the last is clean", || left() == 0);
    net.run(Place::Node, &["ip", "netns", "del", &net.namespace(Net::PODS[0])]);
    assert!(clear(&[]).status.success(), "where nobody is, nothing is left");
}

/// Two cgroups of the node, each with a listener and filters of its own.
#[test]
fn two_cgroups_have_filters_and_names_of_their_own() {
    for mode in ["connect", "tproxy", "redirect"] {
        two_cgroups(mode);
    }
}

fn two_cgroups(mode: &str) {
    let net = Net::new();
    let (one, two) = (Cgroup::new(), Cgroup::new());
    let config = format!(
        "workers: 1\nworkloads:\n\
         - {{ name: one, cgroup: {}, outbound: {{ capture: {mode} }} }}\n\
         - {{ name: two, cgroup: {}, outbound: {{ capture: {mode}, listen: \"127.0.0.1:15002\", \
         exclude: {{ ports: [7001] }} }} }}\n",
        one.path, two.path
    );
    for door in ["10.98.2.2:7001", "10.98.2.2:7002"] {
        echo(net.listen(Place::Server, door));
    }
    let weir = Weir::run(&net, &config);
    let talk = "exec 3<>/dev/tcp/10.98.2.2/7001; echo hello >&3; head -n 1 <&3";
    let talk = ["bash", "-c", talk];
    for (cgroup, flows) in [(&two, 0), (&one, 1)] {
        let output = cgroup.output(&net, &talk);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\n", "{}", said(&output));
        assert_eq!(weir.opened(), flows, "{mode}");
    }
    until("the flow has ended", || weir.active() == 0);
    let hold = "exec 3<>/dev/tcp/10.98.2.2/7002; echo hello >&3; head -n 1 <&3; read line";
    for (cgroup, name) in [(&one, "one"), (&two, "two"), (&one, "one")] {
        let mut command = cgroup.command(&net, Place::Node, &["bash", "-c", hold]);
        let mut holder = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        until("it is open", || weir.flows().len() == 1);
        assert_eq!(weir.flows()[0]["workload"], name, "{mode}");
        drop(holder.stdin.take());
        holder.wait().unwrap();
        until("the flow has ended", || weir.active() == 0);
    }
    weir.end(&net);
}

/// A workload that has gone and whose namespace is made anew is taken up again, and so it is in a config
/// that was reloaded meanwhile.
#[test]
fn workload_that_comes_again_is_taken_up() {
    let net = Net::with_pods();
    let [again, stays, _] = Net::PODS;
    let entry = |pod| format!("- {{ netns: {}, inbound: {{}} }}\n", path(&net, pod));
    let config = format!("workers: 2\nworkloads:\n{}{}", entry(again), entry(stays));
    let weir = Weir::run(&net, &config);
    echo(net.listen(stays, "[::]:80"));
    let mut kept = net.connect(Place::Client, &format!("{}:80", net.pod_v4(stays, 2)));
    let link = format!(" {}@", net.link(again));
    for round in 0..2u64 {
        net.run(Place::Node, &["ip", "netns", "del", &net.namespace(again)]);
        let gone = "namespace is gone";
        until("it is said", || weir.log().matches(gone).count() as u64 == round + 1);
        assert!(weir.reload(&config), "{}", weir.log());
        let links = || net.run(Place::Client, &["ip", "-o", "link"]);
        until("the namespace is no more", || !links().contains(&link));
        net.add_pod(again);
        let app = net.listen(again, "[::]:80");
        let began = Instant::now();
        let up = || weir.log().matches("capture is in place workload").count() as u64 == round + 1;
        until("it is taken up", up);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        let mut client = net.connect(Place::Client, &format!("{}:80", net.pod_v4(again, 2)));
        let (mut served, _) = app.accept().unwrap();
        send(&mut client, round, 1000).unwrap();
        check(&mut served, round, 1000);
        assert_eq!(weir.opened(), 2 + round, "it came by weir");
        send(&mut kept, round, 1000).unwrap();
        check(&mut kept, round, 1000);
    }
    drop(kept);
    weir.end(&net);
}

/// SIGHUP: a workload that is added is captured, one that is taken out is not, and a flow of neither, nor
/// of another, is dropped; a namespace that is not there keeps the old config.
#[test]
fn workloads_come_and_go_by_reload() {
    let net = Net::with_pods();
    let [one, two, three] = Net::PODS;
    let config = |pods: &[Place]| {
        let entry = |pod: &Place| {
            format!(
                "- {{ netns: {}, inbound: {{}}, outbound: {{ capture: tproxy }} }}\n",
                path(&net, *pod)
            )
        };
        format!("workers: 2\nworkloads:\n{}", pods.iter().map(entry).collect::<String>())
    };
    let weir = Weir::run(&net, &config(&[one, two]));
    for pod in Net::PODS {
        echo(net.listen(pod, "[::]:80"));
    }
    echo(net.listen(Place::Client, "[::]:80"));
    // One from outside and one to outside.
    let open = |pod| {
        let inbound = net.connect(Place::Client, &format!("{}:80", net.pod_v4(pod, 2)));
        [inbound, net.connect(pod, &format!("[{}]:80", net.pod_v6(pod, 1)))]
    };
    let talk = |flows: &mut [TcpStream], seed| {
        for flow in flows {
            send(flow, seed, 10_000).unwrap();
            check(flow, seed, 10_000);
        }
    };
    let mut kept: Vec<TcpStream> = [open(one), open(two)].into_iter().flatten().collect();
    talk(&mut kept, 1);
    let tables = |pod| net.run(pod, &["nft", "list", "tables"]);
    assert!(weir.reload(&config(&[two, three])), "{}", weir.log());
    talk(&mut kept, 2);
    assert_eq!(weir.opened(), 4);
    let mut new = open(three);
    talk(&mut new, 3);
    assert_eq!(weir.opened(), 6, "a workload that was added is captured");
    let mut direct = open(one);
    talk(&mut direct, 4);
    assert_eq!(weir.opened(), 6, "one that was taken out is not");
    assert!(
        !weir.reload(&format!(
            "{}- {{ netns: /run/netns/no-such, inbound: {{}} }}\n",
            config(&[two])
        ))
    );
    talk(&mut kept, 5);
    let gone = kept.drain(..2).collect::<Vec<_>>();
    drop((gone, direct));
    until("its rules go with its last flow", || !tables(one).contains("inet weir"));
    until("nothing of it is left", || net.is_clean_in(one));
    assert!(weir.reload(&config(&[one, two, three])), "{}", weir.log());
    let mut again = open(one);
    talk(&mut again, 6);
    talk(&mut kept, 7);
    assert_eq!(weir.opened(), 8);
    drop((again, kept, new));
    weir.end(&net);
}

/// A workload that is not there is named, and nothing is changed.
#[test]
fn workload_that_is_not_there_is_named() {
    let net = Net::new();
    let place = TempDir::new().unwrap();
    let config = "workloads: [{ name: web, netns: /run/netns/no-such, inbound: {} }]";
    let file = config_file(&place, config);
    let output = net.output(Place::Node, &[weir(), "run", "-c", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(4));
    let wanted = "workload web: enter the network namespace /run/netns/no-such";
    assert!(said(&output).contains(wanted), "{}", said(&output));
    assert!(net.is_clean());
}
