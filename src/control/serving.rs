// SPDX-License-Identifier: Apache-2.0
//! HTTP over TCP, for anybody who may connect: so many connections at a time, each for a bounded time.
//!
//! Who comes when all places are taken waits in the accept queue until somebody has gone.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// How much others may ask for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// At a time.
    connections_max: usize,
    /// To say what is wanted, the first time and each time after.
    head_within: Duration,
    /// From the first to the last request of a connection.
    lasts: Duration,
}

impl Bounds {
    /// Scrapers and applications keep a connection for less than a minute between two requests, and
    /// come back when it has ended.
    pub(super) const USUAL: Bounds = Bounds {
        connections_max: 64,
        head_within: Duration::from_secs(60),
        lasts: Duration::from_secs(600),
    };
}

/// Answers until it is dropped.
pub(super) async fn serve(listener: TcpListener, router: Router, bounds: Bounds) {
    let places = Arc::new(Semaphore::new(bounds.connections_max));
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            // No descriptor left, most likely: the workers come first.
            sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(bounds.head_within);
        let connection = http.serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async move {
            let _place = place;
            let mut connection = pin!(connection);
            if timeout(bounds.lasts, connection.as_mut()).await.is_err() {
                connection.as_mut().graceful_shutdown();
                // Whoever does not take the last answer does without.
                let _ = timeout(LAST_ANSWER_WITHIN, connection).await;
            }
        });
    }
}

const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
const LAST_ANSWER_WITHIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};

    use axum::routing::get;

    use super::*;

    /// Serves with `bounds` until the process ends.
    fn served(bounds: Bounds) -> SocketAddr {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let addr = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { "here" }));
        std::thread::spawn(move || runtime.block_on(serve(listener, router, bounds)));
        addr
    }

    fn connect(addr: SocketAddr) -> TcpStream {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    #[test]
    fn who_says_nothing_makes_room_for_who_does() {
        let head_within = Duration::from_millis(50);
        let bounds = Bounds { connections_max: 1, head_within, ..Bounds::USUAL };
        let addr = served(bounds);
        let mut silent = connect(addr);
        silent.write_all(b"GET / HT").unwrap();
        let mut other = connect(addr);
        other.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        other.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.0 200 OK") && answer.ends_with("here"), "{answer}");
        silent.read_to_end(&mut Vec::new()).unwrap();
    }

    #[test]
    fn connection_that_lasts_too_long_is_ended_between_two_requests() {
        let addr = served(Bounds { lasts: Duration::from_millis(50), ..Bounds::USUAL });
        let mut stream = connect(addr);
        stream.write_all(b"GET / HTTP/1.1\r\nHost: weir\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("here"), "{answer}");
    }
}
