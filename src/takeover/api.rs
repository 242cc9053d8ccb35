// SPDX-License-Identifier: Apache-2.0
//! The application API: an application says who it is, what it provides and what it calls.
//!
//! Two shapes that SDKs speak: SOFA's mesh API and Dubbo's. Bodies are JSON whatever their content
//! type says; a refusal is status 200 with the reason inside, because SDKs read nothing else.

#![expect(clippy::disallowed_types, reason = "no worker comes here, and nobody waits inside")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Desk;
use super::desk::{ANSWERS_WITHIN, Refusal};

/// Everything applications may ask, of one desk.
pub fn router(desk: Arc<Mutex<Desk>>) -> Router {
    Router::new()
        .route("/configs/application", get(applications).post(configure))
        .route("/configs/registry", get(registry))
        .route("/services", get(services))
        .route("/services/{name}", get(service))
        .route("/services/publish", post(publish))
        .route("/services/subscribe", post(subscribe))
        .route("/services/unpublish", post(unpublish))
        .route("/services/unsubscribe", post(unsubscribe))
        .route("/pub", post(dubbo_publish))
        .route("/sub", post(dubbo_subscribe))
        .route("/unpub", post(dubbo_unpublish))
        .route("/unsub", post(dubbo_unsubscribe))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(desk)
}

/// SOFA: who the application is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Application {
    app_name: String,
}

/// SOFA: a service; what newer SDKs add is let pass.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SofaService {
    /// A number, or a string of one.
    port: Option<Value>,
    #[serde(default)]
    provider_meta_info: MetaInfo,
    service_name: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct MetaInfo {
    app_name: Option<String>,
    properties: BTreeMap<String, Value>,
    protocol: Option<String>,
    serialize_type: Option<String>,
    version: Option<String>,
}

/// Dubbo: a service. Which registry its body names does not matter: weir has its own.
#[derive(Deserialize)]
struct DubboRequest {
    service: DubboService,
}

#[derive(Deserialize)]
struct DubboService {
    #[serde(default)]
    group: String,
    interface: String,
    #[serde(default)]
    methods: Vec<String>,
    port: Option<Value>,
    #[serde(default)]
    version: String,
}

async fn configure(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    sofa(read(&body).map(|Application { app_name }| {
        lock(&desk).configure(&app_name);
        json!({})
    }))
}

async fn applications(State(desk): State<Arc<Mutex<Desk>>>) -> Response {
    let desk = lock(&desk);
    Json(json!({ "applications": desk.applications().collect::<Vec<_>>() })).into_response()
}

async fn registry(State(desk): State<Arc<Mutex<Desk>>>) -> Response {
    let desk = lock(&desk);
    let published: BTreeMap<&str, bool> = desk.published().collect();
    Json(json!({ "published": published })).into_response()
}

async fn services(State(desk): State<Arc<Mutex<Desk>>>) -> Response {
    Json(lock(&desk).known()).into_response()
}

async fn service(State(desk): State<Arc<Mutex<Desk>>>, Path(name): Path<String>) -> Response {
    match lock(&desk).known().get(name.as_str()) {
        Some(providers) => Json(providers).into_response(),
        None => (StatusCode::NOT_FOUND, "nobody has subscribed to it\n").into_response(),
    }
}

async fn publish(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    sofa(read(&body).and_then(|service: SofaService| {
        let port = service.port.as_ref().map(port).transpose()?;
        let parameters = sofa_parameters(&service.provider_meta_info);
        let published = lock(&desk).publish(&service.service_name, port, &parameters);
        published.map(|()| json!({})).map_err(said)
    }))
}

async fn unpublish(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    sofa(read(&body).map(|service: SofaService| {
        lock(&desk).unpublish(&service.service_name);
        json!({})
    }))
}

async fn subscribe(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    let asked = async |body| -> Result<Value, String> {
        let SofaService { service_name, .. } = read(body)?;
        let datas = subscribed(&desk, &service_name).await?;
        Ok(json!({ "serviceName": service_name, "datas": datas }))
    };
    sofa(asked(&body).await)
}

async fn unsubscribe(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    sofa(read(&body).map(|service: SofaService| {
        lock(&desk).unsubscribe(&service.service_name);
        json!({})
    }))
}

async fn dubbo_publish(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    dubbo(read(&body).and_then(|DubboRequest { service }| {
        let port = service.port.as_ref().map(port).transpose()?;
        let published = lock(&desk).publish(&service.name(), port, &service.parameters());
        published.map_err(said)
    }))
}

async fn dubbo_subscribe(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    let asked = async |body| -> Result<(), String> {
        let DubboRequest { service } = read(body)?;
        subscribed(&desk, &service.name()).await.map(drop)
    };
    dubbo(asked(&body).await)
}

/// How the providers of `service` are to be called, once every registry has said where it lives and
/// workers know: a call that follows finds an endpoint. After a while, with what is known by then.
async fn subscribed(desk: &Mutex<Desk>, service: &str) -> Result<Vec<String>, String> {
    lock(desk).subscribe(service).map_err(said)?;
    let end = Instant::now() + ANSWERS_WITHIN;
    let mut heard = None;
    loop {
        {
            let desk = lock(desk);
            if heard.is_none() && desk.has_heard(service) {
                heard = Some(desk.changes_ever());
            }
            let is_known = heard.is_some_and(|changes| desk.changes_reached() >= changes);
            if is_known || Instant::now() >= end {
                return Ok(desk.told(service));
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn dubbo_unpublish(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    dubbo(read(&body).map(|DubboRequest { service }| lock(&desk).unpublish(&service.name())))
}

async fn dubbo_unsubscribe(State(desk): State<Arc<Mutex<Desk>>>, body: Bytes) -> Response {
    dubbo(read(&body).map(|DubboRequest { service }| lock(&desk).unsubscribe(&service.name())))
}

impl DubboService {
    /// As calls name it: the version is part of it.
    fn name(&self) -> String {
        match self.version.as_str() {
            "" | "0.0.0" => self.interface.clone(),
            version => format!("{}:{version}", self.interface),
        }
    }

    /// Consumers shall write what we can read.
    fn parameters(&self) -> String {
        let methods = self.methods.join(",");
        joined(&[
            ("interface", &self.interface),
            ("version", &self.version),
            ("group", &self.group),
            ("methods", &methods),
            ("serialization", "hessian2"),
            ("prefer.serialization", "hessian2"),
            ("side", "provider"),
        ])
    }
}

/// What SOFA's registries hold behind the question mark.
fn sofa_parameters(meta: &MetaInfo) -> String {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let fields = [
        ("p", text(&meta.protocol)),
        ("_SERIALIZETYPE", text(&meta.serialize_type)),
        ("app_name", text(&meta.app_name)),
        ("v", text(&meta.version)),
    ];
    let mut pairs: Vec<(&str, &str)> = vec![("_TIMEOUT", "3000")];
    pairs.extend(fields.iter().map(|(key, value)| (*key, value.as_str())));
    for (key, value) in &meta.properties {
        pairs.extend(value.as_str().map(|value| (key.as_str(), value)));
    }
    joined(&pairs)
}

/// Without what is empty, and without letters that would end a value early.
fn joined(pairs: &[(&str, &str)]) -> String {
    let is_fine = |text: &str| {
        !text.chars().any(|letter| letter.is_control() || matches!(letter, '&' | '?' | ' '))
    };
    let fine =
        pairs.iter().filter(|(key, value)| !value.is_empty() && is_fine(key) && is_fine(value));
    fine.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join("&")
}

/// A number or a string of one.
fn port(value: &Value) -> Result<u16, String> {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.parse().map_err(|_| format!("`{text}` is no port"))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

fn said(refusal: Refusal) -> String {
    refusal.to_string()
}

fn sofa(result: Result<Value, String>) -> Response {
    let mut answer = json!({ "success": result.is_ok(), "errorMessage": "" });
    match result {
        Ok(Value::Object(more)) => more.into_iter().for_each(|(key, value)| answer[key] = value),
        Ok(_) => {}
        Err(reason) => answer["errorMessage"] = reason.into(),
    }
    Json(answer).into_response()
}

fn dubbo(result: Result<(), String>) -> Response {
    let code = u8::from(result.is_err());
    Json(json!({ "err_no": code, "err_msg": result.err().unwrap_or_default() })).into_response()
}

fn lock(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

const LOOK_EVERY: Duration = Duration::from_millis(10);
/// A service has a few hundred bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;
