//! The OpenAI API over HTTP: routes, bodies, and the way of one request through the router.

mod chat;
mod completions;
mod error;
mod models;
mod params;
mod reply;
mod sse;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Method, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, future::try_join_all};
use kvasir_runtime::request_id::RequestId;
use serde_json::Value;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use self::{
    error::ApiError,
    reply::{Reply, Shape},
};
use crate::{
    admission::Admission,
    answer::{Answer, End, Piece},
    dispatch::Dispatcher,
    job::{Job, Options},
    metrics,
    prompt::{Budget, Served, Source, prepare},
};

/// What the handlers share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) served: Arc<Served>,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) admission: Arc<Admission>,
    /// Owns the tasks of streams.
    pub(crate) tasks: TaskTracker,
    pub(crate) body_bytes_max: usize,
    pub(crate) body_timeout: Duration,
    pub(crate) stall_timeout: Duration,
    pub(crate) prompts_max: usize,
}

/// A request that was understood.
pub(crate) struct Parsed {
    model: Option<String>,
    /// At least one.
    sources: Vec<Source>,
    /// Name of the field that they came from.
    prompt_field: &'static str,
    budget: Budget,
    options: Options,
    stream: bool,
    include_usage: bool,
}

/// The API's routes.
pub(crate) fn routes(app: App) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn(with_request_id))
        .with_state(app)
}

async fn chat_completions(State(app): State<App>, request: Request) -> Response {
    let (arrived, route) = (Instant::now(), "/v1/chat/completions");
    answer(app, request, route, Shape::Chat, arrived).await
}

async fn text_completions(State(app): State<App>, request: Request) -> Response {
    let (arrived, route) = (Instant::now(), "/v1/completions");
    answer(app, request, route, Shape::Text, arrived).await
}

async fn no_such_path(method: Method, uri: Uri) -> ApiError {
    ApiError::no_such_path(method.as_str(), uri.path())
}

async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    ApiError::no_such_method(method.as_str(), uri.path())
}

/// Gives every request an id and a span, and every answer the id.
async fn with_request_id(mut request: Request, next: Next) -> Response {
    let id = RequestId::from_headers(request.headers());
    let span = tracing::info_span!(
        "request",
        request_id = %id,
        method = %request.method(),
        path = %request.uri().path().chars().take(100).collect::<String>(),
    );
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).instrument(span).await;
    id.attach_http(response.headers_mut());
    response
}

/// Counts one request, whatever becomes of it: a client that leaves drops the handler, and this with it.
pub(crate) struct Meter {
    route: &'static str,
    since: Instant,
    done: bool,
}

/// What nginx logs for a client that closed its connection; there is no such answer.
const CLIENT_LEFT: u16 = 499;

impl Meter {
    fn start(route: &'static str, since: Instant) -> Self {
        Self {
            route,
            since,
            done: false,
        }
    }

    /// The request was answered with `status`.
    pub(crate) fn finish(mut self, status: u16) {
        self.done = true;
        metrics::request(self.route, status, self.since.elapsed());
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if !self.done {
            metrics::request(self.route, CLIENT_LEFT, self.since.elapsed());
        }
    }
}

/// A handler's way out: a stream takes the meter along, everything else is finished here.
enum Answered {
    Whole(String),
    Stream(Response),
}

async fn answer(app: App, request: Request, route: &'static str, shape: Shape, arrived: Instant) -> Response {
    let mut meter = Some(Meter::start(route, arrived));
    match generate(&app, request, shape, arrived, &mut meter).await {
        Ok(Answered::Stream(response)) => response,
        Ok(Answered::Whole(body)) => {
            if let Some(meter) = meter {
                meter.finish(200);
            }
            ([(header::CONTENT_TYPE, "application/json")], body).into_response()
        }
        Err(error) => {
            // The message may repeat what the client wrote: it goes to the client, and not into the log.
            tracing::info!(
                status = error.status.as_u16(),
                code = error.code(),
                "request was not served"
            );
            if let Some(meter) = meter {
                meter.finish(error.status.as_u16());
            }
            error.into_response()
        }
    }
}

/// From a request to an answer that has begun (a stream) or ended (one object).
async fn generate(
    app: &App,
    request: Request,
    shape: Shape,
    arrived: Instant,
    meter: &mut Option<Meter>,
) -> Result<Answered, ApiError> {
    let full = |full| ApiError::full(full, app.dispatcher.retry_after());
    let mut place = app.admission.enter().map_err(full)?;
    let id = request
        .extensions()
        .get::<RequestId>()
        .cloned()
        .unwrap_or_else(RequestId::random);
    check_content_type(request.headers())?;
    let body = read_body(app, request.into_body()).await?;
    let parsed = parse(app, shape, &body)?;
    drop(body);
    place.extend(parsed.sources.len() - 1).map_err(full)?;
    let (reply, stream, answers) = begin(app, shape, id, parsed, arrived).await?;
    if stream && let Some(meter) = meter.take() {
        return Ok(Answered::Stream(sse::stream(app, reply, answers, place, meter)));
    }
    let whole = try_join_all(answers.into_iter().map(collect)).await?;
    place.served();
    Ok(Answered::Whole(reply.whole(&whole)))
}

/// Starts every prompt of a request. One that cannot be started refuses the whole request.
async fn begin(
    app: &App,
    shape: Shape,
    id: RequestId,
    parsed: Parsed,
    arrived: Instant,
) -> Result<(Reply, bool, Vec<Answer>), ApiError> {
    let (options, field, budget) = (Arc::new(parsed.options), parsed.prompt_field, parsed.budget);
    let (served, prompts) = (&app.served, parsed.sources.len());
    let reply = Reply::new(shape, &served.name, &served.fingerprint, parsed.include_usage, prompts);
    let prepared = parsed.sources.into_iter().map(|source| {
        let options = &options;
        async move {
            let prepared = prepare(&app.served, source, &options.cache_salt, budget).await;
            prepared.map_err(|error| error.of(field))
        }
    });
    // All prompts are checked before a worker is bothered with the first.
    let prepared = try_join_all(prepared).await?;
    let started = prepared.into_iter().map(|prompt| {
        let job = Job {
            request_id: id.clone(),
            prompt: prompt.tokens,
            chain: prompt.chain,
            max_tokens: prompt.max_tokens,
            options: Arc::clone(&options),
        };
        Answer::start(&app.dispatcher, job, arrived)
    });
    let answers = try_join_all(started).await?;
    Ok((reply, parsed.stream, answers))
}

fn parse(app: &App, shape: Shape, body: &[u8]) -> Result<Parsed, ApiError> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| ApiError::malformed(format!("the request body is not valid JSON: {error}")))?;
    let parsed = match shape {
        Shape::Chat => chat::parse(value)?,
        Shape::Text => completions::parse(value, app.prompts_max)?,
    };
    match &parsed.model {
        Some(model) if *model == app.served.name => Ok(parsed),
        Some(model) => Err(ApiError::no_such_model(model, &app.served.name)),
        None => Err(ApiError::invalid(
            "model",
            format!("model is missing: this server serves {:?}", app.served.name),
        )),
    }
}

async fn collect(mut answer: Answer) -> Result<(String, End), ApiError> {
    let mut text = String::new();
    loop {
        match answer.next().await? {
            Piece::Text(piece) => text.push_str(&piece),
            Piece::End(end) => return Ok((text, *end)),
        }
    }
}

/// Refuses a declared other type. A page in a browser can send text or forms to a local address without asking it, but
/// not JSON.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let value = value.to_str().unwrap_or("something unreadable");
    let essence = value.split(';').next().unwrap_or("").trim();
    if essence.eq_ignore_ascii_case("application/json") {
        Ok(())
    } else {
        Err(ApiError::not_json(value))
    }
}

/// The body, if it is small enough and comes soon enough.
async fn read_body(app: &App, body: Body) -> Result<Bytes, ApiError> {
    let max = app.body_bytes_max;
    let read = async {
        let mut read = BytesMut::new();
        let mut pieces = body.into_data_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| ApiError::malformed(format!("the request body broke off: {error}")))?;
            if read.len() + piece.len() > max {
                return Err(ApiError::too_large(max));
            }
            read.extend_from_slice(&piece);
        }
        Ok(read.freeze())
    };
    tokio::time::timeout(app.body_timeout, read)
        .await
        .unwrap_or_else(|_| Err(ApiError::slow_body(app.body_timeout)))
}

#[cfg(test)]
mod tests;
