// SPDX-License-Identifier: Apache-2.0
//! Which session servers there are: any of them says it over HTTP.

use std::io;
use std::time::Duration;

use axum::body::Body;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use crate::takeover::link::Link;

/// Why one of them does not say it.
#[derive(Debug, thiserror::Error)]
pub(in crate::takeover) enum Unknown {
    #[error("ask {server} for session servers: {source}")]
    Ask { server: String, source: axum::Error },
    #[error("connect to {server} for the session servers: {source}")]
    Connect { server: String, source: io::Error },
    #[error("{server} names no session server (it must be the HTTP port of one, usually 9603)")]
    None { server: String },
    #[error("{server} does not say within {WITHIN:?} which session servers there are")]
    Slow { server: String },
    #[error("{server} answers {status} when asked for session servers")]
    Status { server: String, status: StatusCode },
}

/// As the HTTP port `server` says it.
pub(super) async fn session_servers(link: &Link, server: &str) -> Result<Vec<String>, Unknown> {
    let slow = |_| Unknown::Slow { server: server.to_owned() };
    let said = timeout(WITHIN, ask(link, server)).await.map_err(slow)??;
    let servers = parse(&said);
    if servers.is_empty() {
        return Err(Unknown::None { server: server.to_owned() });
    }
    Ok(servers)
}

async fn ask(link: &Link, server: &str) -> Result<String, Unknown> {
    let connect = |source| Unknown::Connect { server: server.to_owned(), source };
    let failed = |source| Unknown::Ask { server: server.to_owned(), source };
    let stream = link.dial(server).await.map_err(connect)?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| failed(axum::Error::new(error)))?;
    let request = Request::get(PATH).header(HOST, server).body(Body::empty());
    let request = request.map_err(|error| failed(axum::Error::new(error)))?;
    let talk = async {
        let answer = sender.send_request(request).await;
        let answer = answer.map_err(|error| failed(axum::Error::new(error)))?;
        if answer.status() != StatusCode::OK {
            let status = answer.status();
            return Err(Unknown::Status { server: server.to_owned(), status });
        }
        let body = axum::body::to_bytes(Body::new(answer.into_body()), ANSWER_BYTES_MAX);
        Ok(String::from_utf8_lossy(&body.await.map_err(failed)?).into_owned())
    };
    // The connection moves only while somebody waits for it, and is closed with this function.
    tokio::pin!(talk);
    tokio::select! {
        said = &mut talk => said,
        _ = connection => talk.await,
    }
}

/// `ip:port` joined by `;`, each with more after a `?` in newer servers.
fn parse(text: &str) -> Vec<String> {
    let place = |one: &str| one.split('?').next().unwrap_or_default().trim().to_owned();
    let is_place = |one: &String| {
        one.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
        })
    };
    text.split(';').map(place).filter(is_place).take(SERVERS_MAX).collect()
}

/// Every version has it.
const PATH: &str = "/api/servers/query";
const WITHIN: Duration = Duration::from_secs(3);
const ANSWER_BYTES_MAX: usize = 1 << 20;
const SERVERS_MAX: usize = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_list_are_read() {
        assert_eq!(parse("10.0.0.1:9600;10.0.0.2:9600"), ["10.0.0.1:9600", "10.0.0.2:9600"]);
        assert_eq!(parse("10.0.0.1:9600?weight=3; ;x;h:0;"), ["10.0.0.1:9600"]);
        assert_eq!(parse("{\"error\":\"no\"}"), Vec::<String>::new());
    }
}
