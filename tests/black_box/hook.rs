// SPDX-License-Identifier: Apache-2.0
//! The connect hook among others, with weir stopped, dead or gone, and with filters that change.

use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aya::programs::{CgroupAttachMode, CgroupSockAddr};
use aya::{Ebpf, EbpfLoader};
use nix::sys::signal::Signal;
use weir::bpf::{ConnectHook, Filters, HookPlan};

use crate::harness::{Bpffs, Cgroup, Net, Place, Weir, rounds, until, weir};
use crate::outbound::{PRELUDE, Rig, config, greet, python, says, servers};

/// A dial that prints what happened to it.
const TRY: &str = "
PATIENCE = 20
def attempt(family, addr):
    s = socket.socket(family)
    s.settimeout(PATIENCE)
    try:
        s.connect(addr)
        print(s.makefile().readline().strip())
    except OSError as error:
        print(type(error).__name__)
attempt(V4, ('10.98.2.2', 80)); attempt(V6, ('fd98:2::2', 80))";
const REFUSED: &str = "ConnectionRefusedError\nConnectionRefusedError";
const SERVED: &str = "10.98.2.2:80\n[fd98:2::2]:80";

fn closed(cgroup: &Cgroup) -> String {
    format!("on_exit: closed\n{}", config("connect", cgroup, ""))
}

/// Somebody else's connect hook on `cgroup`, so many times, while the object lives.
pub(crate) fn foreign(cgroup: &Path, from: &str, to: &str, times: u32) -> Ebpf {
    let place = tempfile::TempDir::new().unwrap();
    let object = place.path().join("foreign.bpf.o");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/black_box/foreign.bpf.c");
    let multiarch = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    let built = Command::new("clang")
        .args(["-O2", "-g", "-target", "bpf", "-idirafter", &multiarch, "-c"])
        .arg(source)
        .arg("-o")
        .arg(&object)
        .status();
    assert!(built.unwrap().success(), "clang builds it (scripts/setup test)");
    let parts = |addr: &str| match addr.parse().unwrap() {
        SocketAddr::V4(addr) => (addr.ip().to_bits(), u32::from(addr.port())),
        SocketAddr::V6(_) => panic!("IPv4 only"),
    };
    let ((from_ip, from_port), (to_ip, to_port)) = (parts(from), parts(to));
    let mut bpf = EbpfLoader::new()
        .override_global("from_ip", &from_ip, true)
        .override_global("from_port", &from_port, true)
        .override_global("to_ip", &to_ip, true)
        .override_global("to_port", &to_port, true)
        .load_file(object)
        .unwrap();
    let program: &mut CgroupSockAddr =
        bpf.program_mut("foreign_connect").unwrap().try_into().unwrap();
    program.load().unwrap();
    for _ in 0..times {
        program.attach(std::fs::File::open(cgroup).unwrap(), CgroupAttachMode::Single).unwrap();
    }
    bpf
}

/// The hook alone, without a weir, on `cgroup`.
fn hook(net: &Net, cgroup: &Cgroup, filters: &Filters) -> ConnectHook {
    let plan = plan(cgroup, filters);
    let mut hook = net.within(Place::Node, || ConnectHook::load(&plan)).unwrap();
    hook.attach().unwrap();
    hook
}

fn plan(cgroup: &Cgroup, filters: &Filters) -> HookPlan {
    HookPlan {
        cgroups: vec![cgroup.path.clone().into()],
        closed: false,
        filters: filters.clone(),
        own_mark: 0x539,
        own_mark_mask: 0xfff,
        port: 15_001,
        records_max: 16_384,
    }
}

/// One weir for the processes of several cgroups.
#[test]
fn connects_of_several_cgroups_are_taken() {
    let net = Net::new();
    servers(&net);
    let (one, other, third) = (Cgroup::new(), Cgroup::new(), Cgroup::new());
    let text = format!("outbound: {{ workload: {{ cgroup: [{}, {}] }} }}", one.path, other.path);
    let weir = Weir::run(&net, &text);
    for (count, cgroup) in [(1, &one), (2, &other), (2, &third)] {
        assert_eq!(says(cgroup, &net, "dial(V4, ('10.98.2.2', 80))"), "10.98.2.2 80 10.98.2.2:80");
        assert_eq!(weir.opened(), count);
    }
    weir.end(&net);
    assert!(!one.programs().contains("weir") && !other.programs().contains("weir"));
}

/// Filters change under a storm of connects, and none of them slips through.
#[test]
fn filters_change_without_a_gap() {
    let net = Net::new();
    let cgroup = Cgroup::new();
    servers(&net);
    let taken = net.listen(Place::Node, "127.0.0.1:15001");
    greet(taken.try_clone().unwrap());
    let everything: [ipnet::IpNet; 2] =
        ["0.0.0.0/0".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
    let filters = [
        Filters {
            include: vec![everything[0]],
            include_ports: vec![1..=65_535],
            ..Filters::default()
        },
        Filters {
            exclude: vec!["10.98.3.0/24".parse().unwrap()],
            exclude_ports: vec![81..=81],
            include: vec![everything[1]],
            include_ports: vec![80..=90],
        },
    ];
    let mut hook = hook(&net, &cgroup, &filters[0]);
    let script = format!(
        "{PRELUDE}
said = set(); count = 0
print('begun', flush=True)
import select
while not select.select([sys.stdin], [], [], 0)[0]:
    s = socket.create_connection(('10.98.2.2', 80), 20)
    said.add(s.makefile().readline().strip()); s.close(); count += 1
print(count, *said)"
    );
    let mut workload = cgroup.command(&net, Place::Node, &["python3", "-c", &script]);
    let mut workload = workload.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = workload.stdout.take().unwrap();
    out.read_exact(&mut [0; 6]).unwrap();
    for round in 0..200 {
        hook.update(&plan(&cgroup, &filters[(round + 1) % 2])).unwrap();
    }
    drop(workload.stdin.take());
    let mut said = String::new();
    out.read_to_string(&mut said).unwrap();
    assert!(workload.wait().unwrap().success());
    let (count, places) = said.trim().split_once(' ').unwrap();
    assert_eq!(places, "127.0.0.1:15001", "every connect was taken");
    assert!(count.parse::<u32>().unwrap() > 50, "{count} connects in 200 updates");
    // What was in force last is in force now.
    hook.update(&plan(&cgroup, &filters[1])).unwrap();
    assert_eq!(
        says(&cgroup, &net, "dial(V4, ('10.98.2.2', 81))"),
        "10.98.2.2 81 10.98.2.2:81",
        "an excluded port is left alone"
    );
}

/// More networks than there is room for are refused, and the old filters stay in force.
#[test]
fn filters_that_do_not_fit_change_nothing() {
    let net = Net::new();
    let cgroup = Cgroup::new();
    greet(net.listen(Place::Node, "127.0.0.1:15001"));
    let include: ipnet::IpNet = "10.0.0.0/8".parse().unwrap();
    let all = Filters { include: vec![include], include_ports: vec![1..=90], ..Filters::default() };
    let mut hook = hook(&net, &cgroup, &all);
    let address = |n: u32| ipnet::Ipv4Net::new((0x0b00_0000 + n).into(), 32).unwrap().into();
    let too_many = Filters { exclude: (0..70_000).map(address).collect(), ..Filters::default() };
    assert!(hook.update(&plan(&cgroup, &too_many)).is_err());
    let taken = "10.98.2.2 81 127.0.0.1:15001";
    assert_eq!(says(&cgroup, &net, "dial(V4, ('10.98.2.2', 81))"), taken);
    // And there is room again for filters that fit.
    hook.update(&plan(&cgroup, &all)).unwrap();
    assert_eq!(says(&cgroup, &net, "dial(V4, ('10.98.2.2', 81))"), taken);
}

/// CH2: a weir that is stopped, not dead: connects pass it by, until it goes on.
#[test]
fn stopped_weir_lets_connects_pass() {
    let rig = Rig::new("connect", "");
    assert_eq!(rig.says(TRY), SERVED);
    assert_eq!(rig.weir.opened(), 2);
    rig.weir.signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    // What is dialled before weir has been silent for long enough waits for it.
    let impatient = TRY.replace("PATIENCE = 20", "PATIENCE = 1");
    until("connects pass", || rig.says(&impatient) == SERVED);
    assert!(stopped.elapsed() < Duration::from_secs(10), "{:?}", stopped.elapsed());
    rig.weir.signal(Signal::SIGCONT);
    until("weir takes connects again", || {
        let before = rig.weir.opened();
        rig.says(TRY) == SERVED && rig.weir.opened() == before + 2
    });
    assert!(rig.weir.metric("weir_connect_unrecorded_total", &["reason=\"passed\""]) >= 2);
    until("direct connections are gone", || rig.net.sockets().is_empty());
    rig.end();
}

/// CH2, `on_exit: closed`: a stopped weir lets nothing pass, and the errno is one that programs know.
#[test]
fn stopped_weir_refuses_connects_if_it_shall() {
    let (net, cgroup, bpffs) = (Net::new(), Cgroup::new(), Bpffs::new());
    servers(&net);
    let weir = Weir::run_as(bpffs.command(&net, Place::Node, weir()), &closed(&cgroup));
    assert_eq!(says(&cgroup, &net, TRY), SERVED);
    weir.signal(Signal::SIGSTOP);
    until("connects are refused", || says(&cgroup, &net, TRY) == REFUSED);
    weir.signal(Signal::SIGCONT);
    until("weir takes connects again", || says(&cgroup, &net, TRY) == SERVED);
    weir.kill();
}

/// CH1, CH3, strict: killed or ended, the workload's connects are refused by exactly two pinned
/// programs of ours; the next weir takes them over, and one that is open leaves none.
#[test]
fn closed_hook_outlives_weir_and_is_taken_over() {
    let (net, cgroup, bpffs) = (Net::new(), Cgroup::new(), Bpffs::new());
    servers(&net);
    let start = || Weir::run_as(bpffs.command(&net, Place::Node, weir()), &closed(&cgroup));
    let count = |name| cgroup.programs().matches(name).count();
    for is_killed in [true, false, true] {
        let weir = start();
        assert_eq!(says(&cgroup, &net, TRY), SERVED);
        let pins = bpffs.pins(&net);
        assert_eq!((pins.len(), pins[0].as_str()), (3, "700"), "{pins:?}");
        assert_eq!((count("weir_connect"), count("weir_peer")), (2, 2), "never two of ours");
        if is_killed {
            weir.kill();
        } else {
            until("every flow has ended", || weir.active() == 0);
            weir.end_closed(&net);
        }
        assert_eq!(says(&cgroup, &net, TRY), REFUSED);
        until("the others are gone", || count("weir_peer") == 0 && count("weir_sockops") == 0);
        assert_eq!(count("weir_connect"), 2, "{}", cgroup.programs());
    }
    // Another network namespace's connects are none of its business.
    let other = Net::new();
    greet(other.listen(Place::Server, "10.98.2.2:80"));
    assert_eq!(says(&cgroup, &other, "dial(V4, ('10.98.2.2', 80))"), "10.98.2.2 80 10.98.2.2:80");
    let open =
        Weir::run_as(bpffs.command(&net, Place::Node, weir()), &config("connect", &cgroup, ""));
    assert_eq!(says(&cgroup, &net, TRY), SERVED);
    assert_eq!(bpffs.pins(&net), Vec::<String>::new());
    open.end(&net);
    assert_eq!(says(&cgroup, &net, TRY), SERVED);
    assert!(!cgroup.programs().contains("weir"));
}

/// CH1, CH3, strict: two workloads with listeners of their own, and each one's connects are refused
/// when weir was killed; pins for a network namespace that is gone go with the next start.
#[test]
fn closed_hooks_of_two_workloads_both_outlive_weir() {
    let (one, other, bpffs) = (Cgroup::new(), Cgroup::new(), Bpffs::new());
    let text = format!(
        "on_exit: closed\nworkers: 1\nworkloads:\n  - {{ name: one, cgroup: {}, outbound: {{}} }}\n  \
         - {{ name: other, cgroup: {}, outbound: {{ listen: \"127.0.0.1:15002\" }} }}",
        one.path, other.path
    );
    let start = |net: &Net| Weir::run_as(bpffs.command(net, Place::Node, weir()), &text);
    let gone = Net::new();
    start(&gone).kill();
    assert_eq!(bpffs.pins(&gone).len(), 5, "two for each, and the directory");
    drop(gone);
    let net = Net::new();
    servers(&net);
    let weir = start(&net);
    until("both are served", || {
        [&one, &other].iter().all(|cgroup| says(cgroup, &net, TRY) == SERVED)
    });
    weir.kill();
    for cgroup in [&one, &other] {
        assert_eq!(says(cgroup, &net, TRY), REFUSED);
        assert_eq!(cgroup.programs().matches("weir_connect").count(), 2, "{}", cgroup.programs());
    }
    assert_eq!(bpffs.pins(&net).len(), 5);
}

/// CH3, security: where others may write, nothing is pinned; without a bpffs the cure is named.
#[test]
fn closed_hook_needs_a_place_of_its_own() {
    let (net, cgroup, bpffs) = (Net::new(), Cgroup::new(), Bpffs::new());
    let place = tempfile::TempDir::new().unwrap();
    let file = crate::harness::config_file(&place, &closed(&cgroup));
    let words = ["20", weir(), "run", "-c", file.to_str().unwrap()];
    let run = |mut command: Command| {
        let output = command.args(words).output().unwrap();
        (output.status.code(), crate::harness::said(&output))
    };
    let without = "while umount /sys/fs/bpf; do :; done 2>/dev/null; exec \"$@\"";
    let mut command = bpffs.command(&net, Place::Node, "unshare");
    command.args(["--mount", "sh", "-c", without, "sh", "timeout"]);
    let (code, text) = run(command);
    assert!(code == Some(4) && text.contains("mount -t bpf"), "{text}");
    let open_to_all = ["-c", "mkdir -m 777 /sys/fs/bpf/weir"];
    assert!(bpffs.command(&net, Place::Node, "sh").args(open_to_all).status().unwrap().success());
    let (code, text) = run(bpffs.command(&net, Place::Node, "timeout"));
    assert!(code == Some(4) && text.contains("chmod 700"), "{text}");
    assert!(net.is_clean() && !cgroup.programs().contains("weir"));
}

/// CH4: a program of somebody else that runs before ours has its way, and we take what it made of
/// the connect; one that runs after ours is noticed. Both are there when we are gone.
#[test]
fn programs_of_others_above_and_below_keep_working() {
    let outer = Cgroup::new();
    let inner = outer.inner();
    let net = Net::new();
    servers(&net);
    let below = foreign(inner.directory(), "10.98.2.2:80", "10.98.2.2:81", 1);
    let weir = Weir::run(&net, &config("connect", &inner, ""));
    let heard = says(&inner, &net, "dial(V4, ('10.98.2.2', 80))");
    assert_eq!((heard.as_str(), weir.opened()), ("10.98.2.2 81 10.98.2.2:81", 1));
    drop(below);
    let above = foreign(outer.directory(), "127.0.0.1:15001", "10.98.2.2:81", 1);
    let heard = says(&inner, &net, "dial(V4, ('10.98.2.2', 80))");
    assert_eq!((heard.as_str(), weir.opened()), ("10.98.2.2 81 10.98.2.2:81", 1));
    let overruled = ["reason=\"overruled\""];
    assert_eq!(weir.metric("weir_connect_unrecorded_total", &overruled), 1);
    until("it is said by whom", || {
        weir.log().contains("led elsewhere by foreign_connect (program")
    });
    until("direct connections are gone", || net.sockets().is_empty());
    weir.end(&net);
    assert!(outer.programs().contains("foreign_connect"));
    drop(above);
    assert!(!outer.programs().contains("foreign_connect"));
}

/// The capabilities that the service file gives are enough, and the one that is easily forgotten is
/// named.
#[test]
fn capabilities_of_the_service_are_enough() {
    let (net, cgroup) = (Net::new(), Cgroup::new());
    servers(&net);
    net.set(Place::Node, "net.ipv4.tcp_fwmark_accept=1");
    let text = format!("inbound: {{}}\n{}", config("connect", &cgroup, ""));
    let under = |capabilities: &str| {
        let mut command = net.command(Place::Node, "setpriv");
        command.arg(format!("--bounding-set=-all,{capabilities}")).arg("--inh-caps=-all");
        command
    };
    let mut command = under("+net_admin,+net_bind_service,+bpf,+perfmon");
    command.arg(weir());
    let weir = Weir::run_as(command, &text);
    assert_eq!(says(&cgroup, &net, TRY), SERVED);
    assert_eq!(weir.opened(), 2);
    weir.end(&net);
    let place = tempfile::TempDir::new().unwrap();
    let file = crate::harness::config_file(&place, &text);
    let words = ["timeout", "20", crate::harness::weir(), "run", "-c", file.to_str().unwrap()];
    let output = under("+net_admin,+net_bind_service,+bpf").args(words).output().unwrap();
    let text = crate::harness::said(&output);
    assert!(output.status.code() == Some(4) && text.contains("CAP_PERFMON"), "{text}");
}

/// CH10: UDP is left alone as a whole: an exchange as DNS has it, connected and not, to several
/// places, with the peer's name and the sender's as without weir.
#[test]
fn datagrams_are_left_alone() {
    let rig = Rig::new("connect", "");
    for ip in Net::SERVER {
        let addr = SocketAddr::new(ip.parse().unwrap(), 53);
        let socket = rig.net.within(Place::Server, || std::net::UdpSocket::bind(addr)).unwrap();
        std::thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((count, from)) = socket.recv_from(&mut query) {
                let answer = [&query[..count], format!(" {from}").as_bytes()].concat();
                let _ = socket.send_to(&answer, from);
            }
        });
    }
    let script = "
for family, ip in (V4, '10.98.2.2'), (V6, 'fd98:2::2'):
    s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(20)
    s.connect((ip, 53)); s.send(b'connected')
    assert s.getpeername()[:2] == (ip, 53)
    print(s.recv(512).decode().split()[0])
s = socket.socket(V4, socket.SOCK_DGRAM); s.settimeout(20)
for query in b'one', b'two':
    s.sendto(query, ('10.98.2.2', 53)); answer, sender = s.recvfrom(512)
    assert sender == ('10.98.2.2', 53), sender
    print(answer.decode().split()[0])";
    assert_eq!(rig.says(script), "connected\nconnected\none\ntwo");
    assert_eq!(rig.weir.opened(), 0);
    rig.end();
}

/// CH11: a socket belongs to the cgroup in which it was made: one that was made outside and handed
/// in passes the hook by.
#[test]
fn socket_from_outside_is_not_taken() {
    let rig = Rig::new("connect", "");
    let place = tempfile::TempDir::new().unwrap();
    let path = place.path().join("handed");
    let giver = format!(
        "
import socket
there = socket.socket(socket.AF_UNIX); there.bind('{0}'); there.listen()
conn, _ = there.accept(); given = socket.socket(socket.AF_INET)
socket.send_fds(conn, [b'x'], [given.fileno()])",
        path.display()
    );
    let mut command = rig.net.command(Place::Node, "python3");
    let mut giver = command.args(["-c", &giver]).spawn().unwrap();
    until("somebody gives a socket", || path.exists());
    let taker = format!(
        "
import time
u = socket.socket(socket.AF_UNIX)
while True:
    try: u.connect('{0}'); break
    except ConnectionRefusedError: time.sleep(0.01)
_, fds, _, _ = socket.recv_fds(u, 1, 1)
s = socket.socket(fileno=fds[0]); s.connect(('10.98.2.2', 80)); hear(s)
dial(V4, ('10.98.2.2', 80))",
        path.display()
    );
    let direct = "10.98.2.2 80 10.98.2.2:80";
    assert_eq!(rig.says(&taker), format!("{direct}\n{direct}"));
    giver.wait().unwrap();
    assert_eq!(rig.weir.opened(), 1, "the second one, made inside");
    until("direct connections are gone", || rig.net.sockets().is_empty());
    rig.end();
}

/// CH5: one of several cgroups is made anew: it is taken up within 5 s, and the other is not touched.
#[test]
fn one_of_several_cgroups_is_taken_up_again() {
    let net = Net::new();
    servers(&net);
    let (one, other) = (Cgroup::new(), Cgroup::new());
    let text = format!("outbound: {{ workload: {{ cgroup: [{}, {}] }} }}", one.path, other.path);
    let weir = Weir::run(&net, &text);
    until("the cgroup is empty", || std::fs::remove_dir(one.directory()).is_ok());
    let began = Instant::now();
    until("it is said", || weir.log().contains("the workload's cgroup is gone"));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let script = "dial(V4, ('10.98.2.2', 80))";
    let heard = String::from_utf8(python(&other, &net, script).stdout).unwrap();
    assert_eq!((heard.trim(), weir.opened()), ("10.98.2.2 80 10.98.2.2:80", 1));
    std::fs::create_dir(one.directory()).unwrap();
    let began = Instant::now();
    until("it is taken up", || one.programs().contains("weir_connect4"));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(other.programs().matches("weir_connect4").count(), 1);
    weir.end(&net);
}

/// CH12: weir ends and starts again, and again, under a storm of connects; each of them is classified by the
/// address that it got: loopback if it was taken. A closed hook passes from one weir to the next without a
/// moment in which a connect goes directly; an open one goes with its weir, and a drain fails nobody.
#[test]
fn restarts_under_load_fail_nobody_who_can_be_served() {
    let counts = ["taken", "direct", "refused", "broken"];
    for (on_exit, signal, never) in [
        ("closed", Signal::SIGTERM, &["direct", "broken"][..]),
        ("closed", Signal::SIGKILL, &["direct"]),
        ("open", Signal::SIGTERM, &["refused", "broken"]),
    ] {
        let (net, cgroup, bpffs) = (Net::new(), Cgroup::new(), Bpffs::new());
        servers(&net);
        let config = format!("on_exit: {on_exit}\n{}", config("connect", &cgroup, ""));
        let start = || Weir::run_as(bpffs.command(&net, Place::Node, weir()), &config);
        let mut weir = start();
        let script = format!("{PRELUDE}\n{STORM}");
        let mut workload = cgroup.command(&net, Place::Node, &["python3", "-c", &script]);
        let mut workload = workload.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        for round in 0..rounds(8, 100) {
            until("connects are taken", || weir.opened() > 10);
            let own = |name| cgroup.programs().matches(name).count();
            let both = (own("weir_connect4"), own("weir_connect6"));
            assert_eq!(both, (1, 1), "{on_exit}, {signal}, {round}: never two of ours");
            weir.signal(signal);
            let _ = weir.wait();
            weir = start();
        }
        drop(workload.stdin.take());
        let output = workload.wait_with_output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let said = said.split_whitespace().map(|count| count.parse::<u64>().unwrap());
        let said: Vec<_> = counts.into_iter().zip(said).collect();
        assert_eq!(said.len(), 4, "{on_exit}, {signal}");
        for (what, count) in said.iter().filter(|(what, _)| never.contains(what)) {
            assert_eq!(*count, 0, "{on_exit}, {signal}: {what} of {said:?}");
        }
        assert!(said[0].1 > 50, "{on_exit}, {signal}: {said:?}");
        weir.kill();
    }
}

/// Dials until its input ends; counts what became of each.
const STORM: &str = "
import select
taken = direct = refused = broken = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    s = socket.socket(V4); s.settimeout(20)
    try:
        s.connect(('10.98.2.2', 80))
        own = s.getsockname()[0]
        assert s.makefile().readline() == '10.98.2.2:80\\n'
        if own == '127.0.0.1': taken += 1
        else: direct += 1
    except ConnectionRefusedError:
        refused += 1
    except (AssertionError, OSError):
        broken += 1
    s.close()
print(taken, direct, refused, broken)";
