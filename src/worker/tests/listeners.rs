// SPDX-License-Identifier: Apache-2.0
//! Listeners that change and go while the worker runs.

use std::os::fd::IntoRawFd;

use socket2::{Domain, Socket, Type};

use super::*;
use crate::metrics::Denied;
use crate::op::{FlowId, Kind, Token};
use crate::ring::Event;

/// What an endpoint answers to a client with this address.
fn answer_to(client: [u8; 4], addr: SocketAddr) -> u8 {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((client, 0)).into()).unwrap();
    socket.connect(&addr.into()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut name = [0];
    TcpStream::from(socket).read_exact(&mut name).unwrap();
    name[0]
}

#[test]
fn listener_that_comes_to_hash_its_clients_hashes_them() {
    let named = |name: u8| server(move |mut stream| stream.write_all(&[name]).unwrap());
    let mut forwarder = Forwarder::start(vec![named(1), named(2)], |_, _| {});
    let (last, manner) = (forwarder.services.table(), Manner::of(Balance::ConsistentHash));
    let endpoints = vec![Endpoint::new(named(3)), Endpoint::new(named(4))];
    let id = forwarder.services.set("test", manner, endpoints, Instant::now());
    let balance = Balance::ConsistentHash;
    forwarder.handle.change(Change {
        add: Vec::new(),
        alter: vec![Alteration {
            addr: forwarder.addr,
            from: 0,
            place: Arc::default(),
            proxy_protocol: ProxyProtocol::Off,
            route: Some(Route::Service { balance, id, origin: Origin::Forward }),
            workload: Arc::default(),
        }],
        retire: Vec::new(),
        timeouts: small_profile().timeouts,
    });
    // Behind the change: who goes to the new endpoints finds it done.
    assert!(forwarder.handle.update(Update::new(forwarder.services.table(), Some(&last))));
    until(|| answer_to([127, 0, 1, 1], forwarder.addr) > 2, "the new endpoints are dialled");
    let answers: Vec<u8> =
        (1..33).map(|last| answer_to([127, 0, 1, last], forwarder.addr)).collect();
    assert!(answers.contains(&3) && answers.contains(&4), "{answers:?}");
    let again: Vec<u8> = (1..33).map(|last| answer_to([127, 0, 1, last], forwarder.addr)).collect();
    assert_eq!(answers, again);
    forwarder.end();
}

#[test]
fn connection_of_a_listener_that_goes_is_reset_and_not_served_elsewhere() {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(door.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let accepted = door.accept().unwrap().0;
    let mut services = Directory::default();
    let manner = Manner::of(Balance::RoundRobin);
    let endpoints = vec![Endpoint::new(server(echo))];
    let id = services.set("test", manner, endpoints, Instant::now());
    let listener = Listener {
        fd: Arc::new(door.into()),
        place: Arc::default(),
        proxy_protocol: ProxyProtocol::Off,
        route: Route::Service { balance: Balance::RoundRobin, id, origin: Origin::Forward },
        workload: Arc::default(),
    };
    // With a limit for each source connections come by descriptor.
    let share = Share { flows_per_source_max: 8, ..SHARE };
    let setup = setup(vec![listener], small_profile(), share, &services);
    let denied = thread::spawn(move || {
        let mailbox = Arc::new(Mailbox::new(socket::bell().unwrap()));
        let mut worker = Worker::start(setup, mailbox, Arc::default()).unwrap();
        worker.close_listener(0);
        let token = Token::new(Kind::Accept, FlowId::new(0), 0);
        let result = accepted.into_raw_fd();
        worker.accepted(0, Event { buffer: None, more: true, result, token });
        worker.counters.denied[Denied::Namespace as usize].value()
    });
    assert_eq!(denied.join().unwrap(), 1);
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}
