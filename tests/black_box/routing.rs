// SPDX-License-Identifier: Apache-2.0
//! Requests for several services over one connection to the shared outbound port: each reaches its own.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::spawn;
use std::time::{Duration, Instant};

use crate::harness::{Net, Place, Weir, expect_eof, expect_reset, until};

const OUTBOUND: &str = "127.0.0.1:12220";
const SERVERS: [&str; 3] = ["10.98.2.2:7001", "10.98.2.2:7002", "10.98.2.2:7003"];

/// A weir in the node that knows two services: `one` at the first server, `two` at the others.
fn weir(net: &Net) -> Weir {
    let [one, two, three] = SERVERS;
    let services = format!(
        "[{{ name: one, endpoints: [\"{one}\"] }}, {{ name: two, endpoints: [\"{two}\", \"{three}\"] }}]"
    );
    let weir = Weir::run(
        net,
        &format!(
            "workers: 1\ntakeover:\n  registries: [{{ services: {services} }}]\n  services: [{{ name: one }}, {{ name: two }}]"
        ),
    );
    until("the services are known", || weir.endpoints().len() == 3);
    weir
}

fn requests(weir: &Weir, outcome: &str) -> u64 {
    weir.metric("weir_requests_total", &[&format!("outcome=\"{outcome}\"")])
}

/// A Bolt frame of direction 1 for `service`.
fn bolt(id: u32, service: &str, content: &str) -> Vec<u8> {
    let len = |text: &str| u32::try_from(text.len()).unwrap().to_be_bytes();
    let mut bytes = vec![1, 1, 0, 1, 1];
    bytes.extend(id.to_be_bytes());
    bytes.extend([1, 0, 0, 0x0b, 0xb8, 0, 0]);
    bytes.extend(u16::try_from(service.len() + 15).unwrap().to_be_bytes());
    bytes.extend(len(content));
    for text in ["service", service] {
        bytes.extend(len(text));
        bytes.extend(text.bytes());
    }
    bytes.extend(content.bytes());
    bytes
}

/// Reads a Bolt answer: its id, its status and its content.
fn answer(stream: &mut TcpStream) -> (u32, u16, String) {
    let mut head = [0; 20];
    stream.read_exact(&mut head).unwrap();
    let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let mut content = vec![0; number(16) as usize];
    stream.read_exact(&mut content).unwrap();
    let status = u16::from_be_bytes([head[10], head[11]]);
    (number(5), status, String::from_utf8(content).unwrap())
}

/// Reads a Bolt request: its id and its content.
fn asked(stream: &mut TcpStream) -> Option<(u32, String)> {
    let mut head = [0; 22];
    stream.read_exact(&mut head).ok()?;
    let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let header = usize::from(u16::from_be_bytes([head[16], head[17]]));
    let mut rest = vec![0; header + number(18) as usize];
    stream.read_exact(&mut rest).ok()?;
    Some((number(5), String::from_utf8(rest[header..].to_vec()).unwrap()))
}

fn say(stream: &mut TcpStream, id: u32, content: &str) {
    let mut bytes = vec![1, 0, 0, 2, 1];
    bytes.extend(id.to_be_bytes());
    bytes.extend([1, 0, 0, 0, 0, 0, 0]);
    bytes.extend(u32::try_from(content.len()).unwrap().to_be_bytes());
    bytes.extend(content.bytes());
    stream.write_all(&bytes).unwrap();
}

/// Answers each request with its own name before what was said.
fn serve(listener: TcpListener, name: &'static str) {
    spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            spawn(move || {
                while let Some((id, content)) = asked(&mut stream) {
                    say(&mut stream, id, &format!("{name}:{content}"));
                }
            });
        }
    });
}

/// T4, per request: a client that mixes services on one connection reaches each of them, pipelined and
/// byte by byte; what nobody knows is refused by a frame of its own protocol, and the connection lives.
#[test]
fn mixed_requests_of_one_connection_reach_their_own_services() {
    let net = Net::new();
    for (server, name) in SERVERS.into_iter().zip(["one", "two", "two"]) {
        serve(net.listen(Place::Server, server), name);
    }
    let weir = weir(&net);
    let mut client = net.connect(Place::Node, OUTBOUND);
    let names = ["one", "two", "two", "nobody", "one", "two"];
    let mut all = Vec::new();
    for (id, name) in (1..).zip(names) {
        all.extend(bolt(id, name, &format!("call {id}")));
    }
    client.write_all(&all).unwrap();
    let mut answers: Vec<_> = names.iter().map(|_| answer(&mut client)).collect();
    answers.sort_unstable();
    for ((id, name), (of, status, content)) in (1..).zip(names).zip(answers) {
        let expected =
            if name == "nobody" { (6, String::new()) } else { (0, format!("{name}:call {id}")) };
        assert_eq!((of, status, content), (id, expected.0, expected.1));
    }
    client.set_nodelay(true).unwrap();
    for byte in [bolt(7, "two", "slowly"), bolt(8, "one", "too")].concat() {
        client.write_all(&[byte]).unwrap();
    }
    let mut last = [answer(&mut client), answer(&mut client)];
    last.sort_unstable();
    assert_eq!(last, [(7, 0, "two:slowly".into()), (8, 0, "one:too".into())]);
    client
        .write_all(&[1, 1, 0, 0, 1, 0, 0, 0, 9, 1, 0, 0, 11, 184, 0, 0, 0, 0, 0, 0, 0, 0])
        .unwrap();
    assert_eq!(answer(&mut client), (9, 0, String::new()), "a heartbeat is answered here");
    assert_eq!((requests(&weir, "answered"), requests(&weir, "unknown_service")), (7, 1));
    assert_eq!(weir.flows().len(), 3, "one connection to each endpoint");
    assert_eq!((weir.opened(), weir.active()), (1, 1));
    client.shutdown(std::net::Shutdown::Write).unwrap();
    expect_eof(&client);
    until("it has ended well", || weir.closed("finished") == 1);
    weir.end(&net);
}

/// A provider that dies with a request in its hands is answered for, is out of use at once, and nobody
/// else notices; a request of which not one byte has gone out goes elsewhere.
#[test]
fn provider_that_dies_is_answered_for_and_out_of_use_within_a_second() {
    let net = Net::new();
    let dying = net.listen(Place::Server, SERVERS[1]);
    serve(net.listen(Place::Server, SERVERS[0]), "one");
    serve(net.listen(Place::Server, SERVERS[2]), "two");
    let weir = weir(&net);
    let mut client = net.connect(Place::Node, OUTBOUND);
    client.write_all(&[bolt(1, "two", "a"), bolt(2, "two", "b")].concat()).unwrap();
    let (mut server, _) = dying.accept().unwrap();
    let (lost, _) = asked(&mut server).unwrap();
    let (id, status, content) = answer(&mut client);
    assert_eq!((id, status, &content[..4]), (3 - lost, 0, "two:"), "the other one has answered");
    let killed = Instant::now();
    drop((server, dying));
    assert_eq!(answer(&mut client), (lost, 16, String::new()), "the connection was lost");
    for id in 10..40 {
        client.write_all(&bolt(id, "two", "c")).unwrap();
        assert_eq!(answer(&mut client), (id, 0, "two:c".into()), "nobody notices");
    }
    let state =
        |weir: &Weir| weir.endpoints().into_iter().find(|one| one.0 == SERVERS[1]).unwrap().1;
    assert_eq!(state(&weir), "ejected");
    assert!(killed.elapsed() < Duration::from_secs(1), "it is out of use by now");
    // A second connection finds out by its connect: not one byte has gone out, so nobody is told.
    until("it may be tried again", || state(&weir) != "ejected");
    let mut other = net.connect(Place::Node, OUTBOUND);
    for id in 50..54 {
        other.write_all(&bolt(id, "two", "d")).unwrap();
        assert_eq!(answer(&mut other), (id, 0, "two:d".into()));
    }
    assert_eq!(requests(&weir, "broken"), 1);
    assert_eq!(requests(&weir, "no_endpoint"), 0);
    drop((client, other));
    weir.end(&net);
}

/// A frame of which nobody knows where the next one begins ends the connection, and is counted.
#[test]
fn broken_frame_resets_the_connection() {
    let net = Net::new();
    serve(net.listen(Place::Server, SERVERS[0]), "one");
    let weir = weir(&net);
    let mut client = net.connect(Place::Node, OUTBOUND);
    client.write_all(&bolt(1, "one", "a")).unwrap();
    assert_eq!(answer(&mut client), (1, 0, "one:a".into()));
    client.write_all(b"\xff\xff\xff\xff").unwrap();
    expect_reset(&mut client);
    until("it is counted", || weir.closed("protocol_error") == 1);
    assert_eq!(requests(&weir, "bad"), 1);
    weir.end(&net);
}

/// R7's guard: a connection of HTTP/2 belongs to the service of its first request; a later one for another
/// service, by a new name or by one that HPACK remembers, ends it before a byte reaches the wrong provider.
#[test]
fn http2_connection_that_asks_another_service_is_reset() {
    let net = Net::new();
    let listener = net.listen(Place::Server, SERVERS[0]);
    let weir = weir(&net);
    let headers = |stream: u8, block: &[u8]| {
        let len = u8::try_from(block.len()).unwrap();
        [&[0, 0, len, 1, 5, 0, 0, 0, stream], block].concat()
    };
    let opening = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
    // `:authority: one`, remembered, and `:path: /`; then the same by the table, with data between.
    let first = headers(1, b"\x82\x84\x41\x03one");
    let data = [&[0, 0x50, 0, 0, 0, 0, 0, 0, 1][..], &[7; 0x5000]].concat();
    let again = headers(3, &[0x82, 0x84, 0xbe]);
    let other = headers(5, b"\x82\x84\x01\x03two");
    let good = [opening, first, data, again].concat();
    let mut client = net.connect(Place::Node, OUTBOUND);
    client.write_all(&good).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let mut got = vec![0; good.len()];
    server.read_exact(&mut got).unwrap();
    assert!(got == good);
    server.write_all(b"whatever").unwrap();
    let mut back = [0; 8];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"whatever");
    client.write_all(&other).unwrap();
    expect_reset(&mut client);
    expect_reset(&mut server);
    assert_eq!(requests(&weir, "other_service"), 1);
    drop(server);
    weir.end(&net);
}

/// Reads requests without a body, and answers with the server's name and the path.
fn serve_http(listener: TcpListener, name: &'static str) {
    spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            spawn(move || {
                let mut text = String::new();
                let mut chunk = [0; 4096];
                while let Ok(len @ 1..) = stream.read(&mut chunk) {
                    text.push_str(std::str::from_utf8(&chunk[..len]).unwrap());
                    while let Some((head, rest)) = text.split_once("\r\n\r\n") {
                        let path = head.split(' ').nth(1).unwrap().to_owned();
                        text = rest.to_owned();
                        let body = format!("{name} {path}\n");
                        let len = body.len();
                        let answer =
                            format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n{body}");
                        stream.write_all(answer.as_bytes()).unwrap();
                    }
                }
            });
        }
    });
}

/// curl asks several services over the one connection that it keeps: each answers, unknown hosts are
/// refused, in order.
#[test]
fn curl_reaches_several_services_over_one_connection() {
    let net = Net::new();
    for (server, name) in SERVERS.into_iter().zip(["one", "two", "two"]) {
        serve_http(net.listen(Place::Server, server), name);
    }
    let weir = weir(&net);
    let mut words = vec!["curl", "-sS", "--http1.1"];
    let urls: Vec<String> = (0..5).map(|index| format!("http://{OUTBOUND}/{index}")).collect();
    let hosts = ["Host: one", "Host: TWO:80", "Host: nobody", "Host: two", "Target-Service: one"];
    for (index, (url, host)) in urls.iter().zip(hosts).enumerate() {
        if index > 0 {
            words.push("--next");
        }
        words.extend(["-w", "%{http_code} %{num_connects}\n", "-H", host, url]);
    }
    let expected = "one /0\n200 1\ntwo /1\n200 0\n404 0\ntwo /3\n200 0\none /4\n200 0\n";
    assert_eq!(net.run(Place::Node, &words), expected);
    let pipelined = "GET /a HTTP/1.1\r\nHost: two\r\n\r\nGET /b HTTP/1.1\r\nHost: nobody\r\n\r\nGET /c HTTP/1.1\r\nHost: one\r\n\r\n";
    let mut client = net.connect(Place::Node, OUTBOUND);
    client.write_all(pipelined.as_bytes()).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = String::new();
    client.read_to_string(&mut all).unwrap();
    let order: Vec<usize> =
        ["two /a", "404 Not Found", "one /c"].map(|text| all.find(text).unwrap()).into();
    assert!(order.is_sorted(), "{all}");
    assert_eq!((requests(&weir, "answered"), requests(&weir, "unknown_service")), (6, 2));
    weir.end(&net);
}

/// An empty line before a request is none (RFC 9112, 2.2); what cannot be read is answered after all
/// before it, and neither FIN nor bytes that nobody has read take these answers away.
#[test]
fn http1_answers_arrive_before_the_connection_closes() {
    let net = Net::new();
    serve_http(net.listen(Place::Server, SERVERS[1]), "two");
    serve_http(net.listen(Place::Server, SERVERS[2]), "two");
    let weir = weir(&net);
    let garbage = format!("\x01\r\n\r\n{}", "x".repeat(200_000));
    let asked = "GET /a HTTP/1.1\r\nHost: two\r\n\r\n\r\nGET /b HTTP/1.1\r\nHost: nobody\r\n\r\n";
    for has_fin in [true, false] {
        let mut client = net.connect(Place::Node, OUTBOUND);
        client.write_all(format!("{asked}{garbage}").as_bytes()).unwrap();
        if has_fin {
            client.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut all = String::new();
        client.read_to_string(&mut all).unwrap();
        let order: Vec<usize> = ["two /a", "404 Not Found", "400 Bad Request"]
            .map(|text| all.find(text).unwrap())
            .into();
        assert!(order.is_sorted(), "{all}");
    }
    // Whoever says that it asks no more is told so, and is left.
    let mut client = net.connect(Place::Node, OUTBOUND);
    client.write_all(b"\r\nGET / HTTP/1.1\r\nHost: nobody\r\nConnection: close\r\n\r\n").unwrap();
    let mut all = String::new();
    client.read_to_string(&mut all).unwrap();
    assert!(all.starts_with("HTTP/1.1 404") && all.contains("Connection: close"), "{all}");
    drop(client);
    until("they have ended well", || weir.closed("finished") == 3);
    weir.end(&net);
}

/// More refusals at once than weir has words for: each comes when there is room for it.
#[test]
fn thousand_failures_at_once_are_all_answered() {
    let net = Net::new();
    let weir = weir(&net);
    let mut client = net.connect(Place::Node, OUTBOUND);
    let all: Vec<u8> = (0..1000).flat_map(|id| bolt(id, "nobody", "x")).collect();
    client.write_all(&all).unwrap();
    let mut answers: Vec<_> = (0..1000).map(|_| answer(&mut client)).collect();
    answers.sort_unstable();
    assert!((0..1000).map(|id| (id, 6, String::new())).eq(answers));
    drop(client);
    weir.end(&net);
}
