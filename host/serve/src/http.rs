//! Connections: bounded in their number, their size and the time they take, so that none is in the way of the others.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener as Bound};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request as HttpRequest, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use dpo_core::error::{Error, Result};
use dpo_core::listen::{self, Listening};
use futures_util::stream;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::door::Door;
use super::refusal::Refusal;
use super::reply::Reply;
use super::request::{Kind, Request};
use super::scheduler::Event;
use super::service::Service;

/// Where it listens unless told otherwise.
const ADDRESS: &str = "127.0.0.1:8000";
/// Connections at once.
const CONNECTIONS: usize = 1024;
/// Bytes of a request: a million tokens.
const BODY: usize = 8 << 20;
/// How long the head of a request may take, and its body.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server that has its port.
pub struct Listener {
    listener: Bound,
    address: SocketAddr,
    name: String,
}

/// A server that runs until it is dropped.
pub(super) struct Running(Option<Runtime>);

impl Drop for Running {
    fn drop(&mut self) {
        // What is written is written; a client that does not read is not waited for.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

/// What requests are answered with.
struct Front {
    service: Arc<Service>,
    door: Door,
}

impl Listener {
    /// Takes the port of `ADDR:PORT`, or of a port alone, which is then one of this machine only.
    ///
    /// # Errors
    /// An address that is none, or cannot be had.
    pub fn bind(address: Option<&str>) -> Result<Listener> {
        let Listening { listener, address, name } = listen::bind(address, ADDRESS, "--listen")?;
        Ok(Listener { listener, address, name })
    }

    /// What clients call the base URL.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Whether other machines reach it.
    pub fn is_open(&self) -> bool {
        !self.address.ip().is_loopback()
    }

    /// Accepts connections from threads of its own.
    pub(super) fn start(self, service: Arc<Service>) -> Result<Running> {
        let failed = |e: std::io::Error| Error::run(format!("the server does not start: {e}"));
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().thread_name("serve").build();
        let runtime = runtime.map_err(failed)?;
        let door = Door::new(service.config.api_key.clone(), self.name);
        let router = Router::new()
            .route("/health", get(|| async { Json(serde_json::json!({"status": "ok"})) }))
            .route("/v1/models", get(models))
            .route("/v1/chat/completions", post(|front, request| answer(front, Kind::Chat, request)))
            .route("/v1/completions", post(|front, request| answer(front, Kind::Completion, request)))
            .fallback(|| async { refuse(&Refusal::new(404, "there is nothing of this name")) })
            .method_not_allowed_fallback(|| async { refuse(&Refusal::new(405, "this is not how it is asked for")) })
            .with_state(Arc::new(Front { service, door }));
        self.listener.set_nonblocking(true).map_err(failed)?;
        let listener = {
            let _inside = runtime.enter();
            TcpListener::from_std(self.listener).map_err(failed)?
        };
        runtime.spawn(accept(listener, router));
        Ok(Running(Some(runtime)))
    }
}

async fn accept(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // No more files may be opened just now.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let router = router.clone();
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
            let _ = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
            drop(place);
        });
    }
}

fn refuse(refusal: &Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, Json(refusal.json())).into_response();
    if refusal.status == 503 {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

async fn models(State(front): State<Arc<Front>>, request: HttpRequest) -> Response {
    match front.door.check(request.headers(), false) {
        Ok(()) => Json(front.service.models()).into_response(),
        Err(refusal) => refuse(&refusal),
    }
}

async fn answer(State(front): State<Arc<Front>>, kind: Kind, request: HttpRequest) -> Response {
    match begin(&front, kind, request).await {
        Err(refusal) => refuse(&refusal),
        Ok(reply) if reply.request.stream => events(front.service.clone(), reply),
        Ok(reply) => match reply.whole(&front.service).await {
            Ok(value) => Json(value).into_response(),
            Err(refusal) => refuse(&refusal),
        },
    }
}

async fn begin(front: &Arc<Front>, kind: Kind, request: HttpRequest) -> std::result::Result<Reply, Refusal> {
    front.door.check(request.headers(), request.method() == Method::POST)?;
    let body = timeout(PATIENCE, to_bytes(request.into_body(), BODY)).await;
    let body: Bytes = match body {
        Err(_) => return Err(Refusal::new(408, "the request did not come to its end")),
        Ok(Err(_)) => return Err(Refusal::new(413, format!("the request has more than {BODY} bytes, or broke off"))),
        Ok(Ok(body)) => body,
    };
    let service = front.service.clone();
    // Rendering and tokenising a long text takes its time.
    let parsed = tokio::task::spawn_blocking(move || Request::parse(&service, kind, &body)).await;
    let request = parsed.map_err(|_| Refusal::new(500, "the request could not be read"))??;
    Reply::begin(&front.service, request)
}

/// A stream of server-sent events.
fn events(service: Arc<Service>, reply: Reply) -> Response {
    let first = reply.first(&service);
    let told = vec![0; reply.request.samplings.len()];
    let left = told.len();
    let state = Streamed { service, reply, told, left, tokens: 0, first, done: false };
    let body = Body::from_stream(stream::unfold(state, |mut state| async move {
        let text = state.next().await?;
        Some((Ok::<Bytes, Infallible>(text.into()), state))
    }));
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    (headers, body).into_response()
}

struct Streamed {
    service: Arc<Service>,
    reply: Reply,
    /// Bytes of each answer's text so far.
    told: Vec<usize>,
    /// Answers that go on.
    left: usize,
    tokens: usize,
    first: Vec<Value>,
    done: bool,
}

impl Streamed {
    /// What is sent next; `None` at the end.
    async fn next(&mut self) -> Option<String> {
        if self.done {
            return None;
        }
        if !self.first.is_empty() {
            return Some(self.first.drain(..).map(|chunk| event(&chunk)).collect());
        }
        if self.left == 0 {
            self.done = true;
            let last = self.reply.last(self.tokens).map(|chunk| event(&chunk)).unwrap_or_default();
            return Some(last + "data: [DONE]\n\n");
        }
        let next = match self.reply.events.recv().await {
            None => Err(Refusal::ends()),
            Some((at, came)) => {
                let chunk = self.reply.next(&self.service, at, &came, self.told[at]);
                match came {
                    Event::Text(text, _) => self.told[at] += text.len(),
                    Event::End(_, tokens) => (self.left, self.tokens) = (self.left - 1, self.tokens + tokens),
                    Event::Failed(_) => {}
                }
                chunk
            }
        };
        Some(match next {
            Ok(chunk) => event(&chunk),
            Err(refusal) => {
                self.done = true;
                event(&refusal.json())
            }
        })
    }
}

fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}
