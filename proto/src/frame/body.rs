//! HTTP bodies: messages out, messages in.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures::Stream;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame};
use tonic::Status;

use super::{Decoder, FrameError, Rope};

/// Content type of gRPC.
pub const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");

/// A body that sends messages as they come: each buffer of a [`Rope`] is a frame of its own.
#[derive(Debug)]
pub struct FramedBody<S> {
    stream: S,
    /// The message that is being sent.
    frames: Rope,
    ended: bool,
    with_status: bool,
}

impl<S> FramedBody<S> {
    /// Body of a request: the end of the stream is the end of the body; an error resets the stream.
    pub fn request(stream: S) -> Self {
        Self::new(stream, false)
    }

    /// Body of a reply: the end of the stream is the status OK in the trailers, an error is its status.
    pub fn reply(stream: S) -> Self {
        Self::new(stream, true)
    }

    fn new(stream: S, with_status: bool) -> Self {
        Self {
            stream,
            frames: Rope::new(),
            ended: false,
            with_status,
        }
    }
}

impl<S: Stream<Item = Result<Rope, Status>> + Unpin> Body for FramedBody<S> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        loop {
            if let Some(part) = self.frames.pop() {
                return Poll::Ready(Some(Ok(Frame::data(part))));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let status = match ready!(Pin::new(&mut self.stream).poll_next(context)) {
                Some(Ok(frames)) => {
                    self.frames = frames;
                    continue;
                }
                Some(Err(status)) => status,
                None => Status::new(tonic::Code::Ok, ""),
            };
            self.ended = true;
            if self.with_status {
                let mut trailers = HeaderMap::new();
                return Poll::Ready(Some(
                    status.add_header(&mut trailers).map(|()| Frame::trailers(trailers)),
                ));
            }
            if status.code() != tonic::Code::Ok {
                return Poll::Ready(Some(Err(status)));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.frames.is_empty()
    }
}

/// The reply to a call whose messages come from `stream`.
pub fn response<S>(stream: S) -> http::Response<tonic::body::Body>
where
    S: Stream<Item = Result<Rope, Status>> + Send + Unpin + 'static,
{
    let mut response = http::Response::new(tonic::body::Body::new(FramedBody::reply(stream)));
    response.headers_mut().insert(http::header::CONTENT_TYPE, CONTENT_TYPE);
    response
}

/// Why a stream of messages ended early.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer sent what is not a message.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The connection or the stream broke; the status is this side's reading of it.
    #[error("{}", .0.message())]
    Transport(Status),
    /// The peer ended the call with this status.
    #[error("{}", .0.message())]
    Status(Status),
    /// The reply ended without a status.
    #[error("the reply ended without a gRPC status: the peer died or is not a gRPC server")]
    NoStatus,
}

/// How a server says it; a client looks at the kinds instead.
impl From<StreamError> for Status {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Frame(error) => error.into(),
            StreamError::Transport(status) | StreamError::Status(status) => status,
            StreamError::NoStatus => Self::unknown(error.to_string()),
        }
    }
}

/// Messages out of a body. Cancel-safe: a dropped wait loses nothing.
#[derive(Debug)]
pub struct Incoming<B> {
    body: B,
    decoder: Decoder,
    /// A reply, which must end with a status.
    is_reply: bool,
    ended: bool,
}

impl<B> Incoming<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Messages of a request, each of at most `message_bytes_max`.
    pub fn request(body: B, message_bytes_max: usize) -> Self {
        Self::new(body, message_bytes_max, false)
    }

    /// Messages of a reply; its status is the end of the stream.
    pub fn reply(body: B, message_bytes_max: usize) -> Self {
        Self::new(body, message_bytes_max, true)
    }

    fn new(body: B, message_bytes_max: usize, is_reply: bool) -> Self {
        Self {
            body,
            decoder: Decoder::new(message_bytes_max),
            is_reply,
            ended: false,
        }
    }

    /// Length of the next message as soon as its prefix is there, before the rest is kept; `None` at the end.
    ///
    /// # Errors
    /// [`StreamError`]; the stream cannot go on.
    pub async fn announced(&mut self) -> Result<Option<usize>, StreamError> {
        std::future::poll_fn(|context| self.poll(context, Decoder::announced)).await
    }

    /// The next message without its prefix; `None` at the end.
    ///
    /// # Errors
    /// [`StreamError`]; the stream cannot go on.
    pub async fn message(&mut self) -> Result<Option<Rope>, StreamError> {
        std::future::poll_fn(|context| self.poll_message(context)).await
    }

    /// [`Self::message`] for one who polls.
    ///
    /// # Errors
    /// [`StreamError`]; the stream cannot go on.
    pub fn poll_message(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Rope>, StreamError>> {
        self.poll(context, Decoder::next_message)
    }

    fn poll<T>(
        &mut self,
        context: &mut Context<'_>,
        step: impl Fn(&mut Decoder) -> Result<Option<T>, FrameError>,
    ) -> Poll<Result<Option<T>, StreamError>> {
        loop {
            if let Some(found) = step(&mut self.decoder)? {
                return Poll::Ready(Ok(Some(found)));
            }
            if self.ended {
                return Poll::Ready(Ok(None));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.decoder.push(data),
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        return Poll::Ready(self.end(Status::from_header_map(&trailers)));
                    }
                },
                Some(Err(error)) => {
                    self.ended = true;
                    return Poll::Ready(Err(StreamError::Transport(Status::from_error(error.into()))));
                }
                None => return Poll::Ready(self.end(None)),
            }
        }
    }

    fn end<T>(&mut self, status: Option<Status>) -> Result<Option<T>, StreamError> {
        self.ended = true;
        match status {
            Some(status) if self.is_reply && status.code() != tonic::Code::Ok => Err(StreamError::Status(status)),
            None if self.is_reply => Err(StreamError::NoStatus),
            _ => self.decoder.end().map(|()| None).map_err(StreamError::from),
        }
    }
}
