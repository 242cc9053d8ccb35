// SPDX-License-Identifier: Apache-2.0
//! etcd's JSON gateway: each call of its API is a POST, a watch is an answer that never ends.
//!
//! Numbers of 64 bits are text there, keys and values are base64, and what is zero or empty is left
//! out. Every call has a deadline, because a server that hangs takes calls.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::takeover::link::Link;
use crate::takeover::tls::Wrapper;

/// One server, asked one thing at a time.
#[derive(Debug)]
pub(super) struct Gateway {
    /// None before the first call, and after one that failed.
    connection: Mutex<Option<SendRequest<Full<Bytes>>>>,
    link: Arc<Link>,
    server: Arc<str>,
    /// `None` for plain text.
    tls: Option<Wrapper>,
    /// Of the user who has said a password.
    token: Option<HeaderValue>,
}

/// A call that failed.
#[derive(Debug, thiserror::Error)]
#[error("etcd at {server}: {step}: {why}")]
pub(in crate::takeover) struct Failure {
    server: Arc<str>,
    step: &'static str,
    pub(super) why: Why,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Why {
    #[error("the watch has ended")]
    Ended,
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no answer in time")]
    Late,
    #[error("the lease has ended")]
    Lease,
    /// A code of gRPC, and what the server has to say.
    #[error("{text}")]
    Said { code: u64, text: String },
    #[error("TLS: {0} (tls.ca and tls.server_name decide who it must be)")]
    Tls(io::Error),
    #[error("status {0}, which is not etcd's: is its gateway on (--enable-grpc-gateway)?")]
    Status(u16),
    #[error("the answer cannot be read")]
    Unreadable,
    #[error("its revision went back: it has forgotten everything")]
    Wiped,
}

/// Changes, as they happen.
#[derive(Debug)]
pub(super) struct Watch {
    body: Incoming,
    server: Arc<str>,
    /// What has come and not been read.
    text: Vec<u8>,
}

impl Gateway {
    pub(super) fn new(link: &Arc<Link>, server: &str, tls: Option<Wrapper>) -> Gateway {
        let (link, server) = (Arc::clone(link), server.into());
        Gateway { connection: Mutex::new(None), link, server, tls, token: None }
    }

    /// The same server and user, on a connection of its own.
    pub(super) fn twin(&self) -> Gateway {
        let Gateway { link, server, tls, token, .. } = self;
        let twin = Gateway::new(link, server, tls.clone());
        Gateway { token: token.clone(), ..twin }
    }

    /// Every later call is by this user.
    pub(super) async fn log_in(&mut self, user: &str, password: &str) -> Result<(), Failure> {
        const STEP: &str = "auth/authenticate";
        let answer = self.call(STEP, &json!({ "name": user, "password": password })).await?;
        let token = answer["token"].as_str().and_then(|token| token.parse::<HeaderValue>().ok());
        let mut token = token.ok_or_else(|| self.failure(STEP, Why::Unreadable))?;
        token.set_sensitive(true);
        self.token = Some(token);
        Ok(())
    }

    /// What the server answers to `body`.
    pub(super) async fn call(&self, step: &'static str, body: &Value) -> Result<Value, Failure> {
        let answer = timeout(CALL_WITHIN, self.ask(step, body)).await;
        answer.unwrap_or(Err(Why::Late)).map_err(|why| self.failure(step, why))
    }

    /// Follows several prefixes at once: each of `watches` is one `create_request`.
    pub(super) async fn watch(&self, watches: &[Value]) -> Result<Watch, Failure> {
        let body = watches.iter().map(|one| json!({ "create_request": one }).to_string());
        let begin = async {
            let mut connection = self.connect().await?;
            let answer = connection.send_request(self.request(WATCH, body.collect())).await?;
            if answer.status().is_success() { Ok(answer) } else { Err(refusal(answer).await) }
        };
        let answer = timeout(CALL_WITHIN, begin).await.unwrap_or(Err(Why::Late));
        let body = answer.map_err(|why| self.failure(WATCH, why))?.into_body();
        Ok(Watch { body, server: Arc::clone(&self.server), text: Vec::new() })
    }

    pub(super) fn failure(&self, step: &'static str, why: Why) -> Failure {
        Failure { server: Arc::clone(&self.server), step, why }
    }

    async fn ask(&self, step: &'static str, body: &Value) -> Result<Value, Why> {
        let mut place = self.connection.lock().await;
        // It is back in its place only when the answer is read to its end.
        let mut connection = match place.take() {
            Some(connection) if !connection.is_closed() => connection,
            _ => self.connect().await?,
        };
        let answer = connection.send_request(self.request(step, body.to_string())).await?;
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        let answer = read(answer).await?;
        *place = Some(connection);
        // A call that is a stream wraps its one answer.
        let answer: Value = serde_json::from_slice(&answer).map_err(|_| Why::Unreadable)?;
        unwrapped(answer)
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Why> {
        let stream = self.link.dial(&self.server).await?;
        stream.set_nodelay(true)?;
        // Nobody says anything in a watch when nothing changes: who has gone without a word is found so.
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        match &self.tls {
            None => speak(stream).await,
            Some(tls) => speak(tls.wrap(&self.server, stream).await.map_err(Why::Tls)?).await,
        }
    }

    fn request(&self, step: &'static str, body: String) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = hyper::Method::POST;
        *request.uri_mut() = format!("/v3/{step}").parse().unwrap_or_default();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.extend(self.server.parse().ok().map(|host: HeaderValue| (HOST, host)));
        headers.extend(self.token.clone().map(|token| (AUTHORIZATION, token)));
        request
    }
}

impl Watch {
    /// The next message; may be stopped and called again.
    pub(super) async fn next(&mut self) -> Result<Value, Failure> {
        self.line().await.map_err(|why| Failure {
            server: Arc::clone(&self.server),
            step: WATCH,
            why,
        })
    }

    async fn line(&mut self) -> Result<Value, Why> {
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                let value = serde_json::from_slice(&line).map_err(|_| Why::Unreadable)?;
                return unwrapped(value);
            }
            if self.text.len() > ANSWER_BYTES_MAX {
                return Err(Why::Unreadable);
            }
            let frame = self.body.frame().await.ok_or(Why::Ended)??;
            self.text.extend(frame.into_data().unwrap_or_default());
        }
    }
}

/// As the gateway writes keys.
pub(super) fn encoded(text: &str) -> String {
    BASE64_STANDARD.encode(text)
}

/// As it was before the gateway wrote it.
pub(super) fn decoded(value: &Value) -> Option<String> {
    String::from_utf8(BASE64_STANDARD.decode(value.as_str()?).ok()?).ok()
}

/// A number of 64 bits; what is not there is zero.
pub(super) fn number(value: &Value) -> i64 {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or(0)
}

async fn speak<S>(stream: S) -> Result<SendRequest<Full<Bytes>>, Why>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (connection, work) = handshake(TokioIo::new(stream)).await?;
    // It ends with the connection; what it has to say, calls say too.
    tokio::spawn(async { drop(work.await) });
    Ok(connection)
}

async fn read(answer: Response<Incoming>) -> Result<Bytes, Why> {
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    Ok(body.map_err(|_| Why::Unreadable)?.to_bytes())
}

async fn refusal(answer: Response<Incoming>) -> Why {
    let status = answer.status().as_u16();
    let said = read(answer).await.ok().and_then(|body| serde_json::from_slice(&body).ok());
    said.and_then(|said: Value| said_by(&said)).unwrap_or(Why::Status(status))
}

/// What is in the envelope of a stream; other answers have none.
fn unwrapped(mut answer: Value) -> Result<Value, Why> {
    if !answer["error"].is_null() {
        return Err(said_by(&answer["error"]).unwrap_or(Why::Unreadable));
    }
    let is_wrapped = answer.get("result").is_some_and(Value::is_object);
    Ok(if is_wrapped { answer["result"].take() } else { answer })
}

fn said_by(error: &Value) -> Option<Why> {
    let code = error["code"].as_u64().or_else(|| error["grpc_code"].as_u64())?;
    let text = error["message"].as_str().or_else(|| error["error"].as_str())?;
    Some(Why::Said { code, text: text.to_owned() })
}

const WATCH: &str = "watch";
/// A cluster that elects a leader needs about a second.
const CALL_WITHIN: Duration = Duration::from_secs(3);
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Some 100,000 keys.
const ANSWER_BYTES_MAX: usize = 64 << 20;
