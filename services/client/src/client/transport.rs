//! The channel, and how calls go over it.

use std::{
    future::{Future, poll_fn},
    time::Duration,
};

use futures::Stream;
use http::{HeaderValue, header};
use kvasir_proto::{
    frame::{CONTENT_TYPE, FramedBody, Incoming, Rope},
    v1::{block_store_client::BlockStoreClient, retrieval_client::RetrievalClient},
};
use kvasir_runtime::grpc;
use tokio::time::{Instant, timeout};
use tonic::{
    Code, Response, Status,
    body::Body,
    client::GrpcService,
    transport::{Channel, Endpoint},
};

use super::StoreClient;
use crate::{ClientConfig, ClientError, ErrorKind, error::CallName, observe};

/// The generated client of the store.
pub(crate) type Stub = BlockStoreClient<Channel>;

/// Largest reply: rows of many heads are the largest, and the store bounds them lower.
pub(crate) const REPLY_BYTES_MAX: usize = 64 << 20;

/// A lazily connecting channel, with windows and frames for blocks rather than for small messages.
pub(super) fn channel(config: &ClientConfig) -> Result<Channel, ClientError> {
    let refuse = |what: String| ClientError {
        kind: ErrorKind::Invalid,
        message: format!("client of {:?}: {what}", config.url),
    };
    if config.attempts_max == 0 || config.batch_bytes == 0 || config.call_timeout.is_zero() {
        return Err(refuse(
            "attempts_max, batch_bytes and call_timeout must not be 0".to_owned(),
        ));
    }
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(refuse("a client must be made within a tokio runtime".to_owned()));
    }
    let endpoint = Endpoint::from_shared(config.url.clone())
        .map_err(|error| refuse(format!("not a URL ({error}): write it as http://127.0.0.1:7401")))?;
    if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().authority().is_none() {
        return Err(refuse(
            "not an http URL with a host: write it as http://127.0.0.1:7401".to_owned(),
        ));
    }
    Ok(endpoint
        .connect_timeout(config.connect_timeout)
        .initial_stream_window_size(grpc::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(grpc::CONNECTION_WINDOW_BYTES)
        .max_frame_size(grpc::FRAME_BYTES_MAX)
        .http2_keep_alive_interval(grpc::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(grpc::KEEPALIVE_TIMEOUT)
        .tcp_nodelay(true)
        .connect_lazy())
}

impl StoreClient {
    /// A unary call that may be repeated, with one deadline over all tries.
    pub(crate) async fn unary<M, R, F, A>(&self, name: &CallName, message: M, attempt: F) -> Result<R, ClientError>
    where
        M: Clone,
        F: Fn(Stub, tonic::Request<M>) -> A,
        A: Future<Output = Result<Response<R>, Status>>,
    {
        observe::call(name.call);
        let (config, started) = (self.config(), Instant::now());
        let deadline = started + config.call_timeout;
        let mut tries = 0;
        let error = loop {
            tries += 1;
            let request = self.request(message.clone(), Some(deadline.duration_since(Instant::now())));
            let stub = BlockStoreClient::new(self.shared.channel.clone());
            let error = match tokio::time::timeout_at(deadline, attempt(stub, request)).await {
                Ok(Ok(reply)) => {
                    observe::took(name.call, started.elapsed().as_secs_f64());
                    return Ok(reply.into_inner());
                }
                Ok(Err(status)) => name.status(&status),
                Err(_) => name.timed_out(config.call_timeout),
            };
            let pause = self.shared.backoff.pause(tries);
            let again = error.kind == ErrorKind::Unavailable
                && tries < config.attempts_max
                && Instant::now() + pause < deadline;
            if !again {
                break error;
            }
            tracing::debug!(call = name.call, tries, ?pause, %error, "trying a call again");
            observe::retry(name.call);
            tokio::time::sleep(pause).await;
        };
        Err(observe::failed(name.call, error))
    }

    /// A request with this client's metadata.
    pub(crate) fn request<M>(&self, message: M, deadline: Option<Duration>) -> tonic::Request<M> {
        let mut request = tonic::Request::new(message);
        if let Some(deadline) = deadline {
            request.set_timeout(deadline);
        }
        if let Some(id) = &self.request_id {
            id.attach(&mut request);
        }
        request
    }

    /// The generated client, for streams of small messages.
    pub(crate) fn block_store(&self) -> BlockStoreClient<Channel> {
        BlockStoreClient::new(self.shared.channel.clone()).max_decoding_message_size(REPLY_BYTES_MAX)
    }

    /// The generated client of the retrieval service.
    pub(crate) fn retrieval(&self) -> RetrievalClient<Channel> {
        RetrievalClient::new(self.shared.channel.clone()).max_decoding_message_size(REPLY_BYTES_MAX)
    }

    /// Waits for the head of a stream's reply, at most the call timeout.
    pub(crate) async fn opening<R>(
        &self,
        name: &CallName,
        reply: impl Future<Output = Result<R, Status>>,
    ) -> Result<R, ClientError> {
        observe::call(name.call);
        let wait = self.config().call_timeout;
        let opened = match timeout(wait, reply).await {
            Ok(opened) => opened.map_err(|status| name.status(&status)),
            Err(_) => Err(name.timed_out(wait)),
        };
        opened.map_err(|error| observe::failed(name.call, error))
    }

    /// Opens a stream of hand-framed messages. The store answers the head at once, before the first message.
    pub(crate) async fn bulk<S>(
        &self,
        name: &CallName,
        path: &'static str,
        messages: S,
        deadline: Option<Duration>,
    ) -> Result<Incoming<Body>, ClientError>
    where
        S: Stream<Item = Result<Rope, Status>> + Send + Unpin + 'static,
    {
        let (metadata, _, body) = self.request(FramedBody::request(messages), deadline).into_parts();
        let mut request = http::Request::new(Body::new(body));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = http::Uri::from_static(path);
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = metadata.into_headers();
        request.headers_mut().insert(header::CONTENT_TYPE, CONTENT_TYPE);
        request
            .headers_mut()
            .insert(header::TE, HeaderValue::from_static("trailers"));

        let mut channel = self.shared.channel.clone();
        let response = async move {
            poll_fn(|context| channel.poll_ready(context))
                .await
                .map_err(|error| Status::from_error(error.into()))?;
            let response = channel
                .call(request)
                .await
                .map_err(|error| Status::from_error(error.into()))?;
            if response.status() != http::StatusCode::OK {
                let what = format!("answered HTTP {}: this is not a Kvasir store", response.status());
                return Err(Status::internal(what));
            }
            match Status::from_header_map(response.headers()) {
                Some(status) if status.code() != Code::Ok => Err(status),
                _ => Ok(response),
            }
        };
        let response = self.opening(name, response).await?;
        Ok(Incoming::reply(response.into_body(), REPLY_BYTES_MAX))
    }
}
