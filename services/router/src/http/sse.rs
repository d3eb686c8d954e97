//! A streamed answer: server-sent events, from a task of its own that ends when the client has gone.
//!
//! The task and the client's connection meet in a short queue. A client that reads slowly fills it and so slows the
//! task, which stops reading from the worker; one that stops reading is cut off after a while. When the connection
//! closes, the queue's other end vanishes, the task drops the generation, and the worker is told at once.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::stream::{StreamExt, select_all};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

use super::{
    App, Meter,
    error::ApiError,
    reply::{Reply, json},
};
use crate::{
    admission::Place,
    answer::{Answer, End, Piece},
};

/// Pieces between the task and the connection.
const QUEUE_PIECES: usize = 16;
/// A comment is sent into silence this often, so that proxies keep the connection while a long prompt is computed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

const DONE: &str = "[DONE]";

/// Streams `answers`; `place` and `meter` are kept until the end.
pub(crate) fn stream(app: &App, reply: Reply, answers: Vec<Answer>, place: Place, meter: Meter) -> Response {
    let (queue, pieces) = mpsc::channel(QUEUE_PIECES);
    let client = Client {
        queue,
        stall: app.stall_timeout,
    };
    let task = async move {
        match feed(&client, &reply, answers).await {
            Ok(()) => {
                place.served();
                meter.finish(200);
            }
            Err(Gone::Left) => tracing::info!("client left before its answer was complete, cancelled"),
            Err(Gone::Stalled) => tracing::warn!(stall = ?client.stall, "client stopped reading its answer, cut off"),
            Err(Gone::Failed(error)) => {
                tracing::warn!(why = %error.message, "answer ended in the middle");
                // Nothing to do if the client is gone too.
                let _unread = client.send(&json(&error.body())).await;
                meter.finish(error.status.as_u16());
            }
        }
        // In this order: a client that has read the end finds its place free.
        drop(place);
        drop(client);
    };
    app.tasks.spawn(task.in_current_span());
    let body = Body::from_stream(ReceiverStream::new(pieces).map(Ok::<Bytes, Infallible>));
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // nginx would otherwise collect the stream before it passes it on.
        (
            header::HeaderName::from_static("x-accel-buffering"),
            HeaderValue::from_static("no"),
        ),
    ];
    (headers, body).into_response()
}

/// Why a stream did not come to its end.
enum Gone {
    Left,
    Stalled,
    Failed(ApiError),
}

struct Client {
    queue: mpsc::Sender<Bytes>,
    stall: Duration,
}

impl Client {
    /// Sends one event.
    async fn send(&self, data: &str) -> Result<(), Gone> {
        self.put(Bytes::from(format!("data: {data}\n\n"))).await
    }

    async fn put(&self, bytes: Bytes) -> Result<(), Gone> {
        match timeout(self.stall, self.queue.send(bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Gone::Left),
            Err(_) => Err(Gone::Stalled),
        }
    }
}

async fn feed(client: &Client, reply: &Reply, answers: Vec<Answer>) -> Result<(), Gone> {
    let mut ends: Vec<Option<End>> = answers.iter().map(|_| None).collect();
    for index in 0..answers.len() {
        if let Some(opening) = reply.opening(index) {
            client.send(&opening).await?;
        }
    }
    let mut pieces = select_all(
        answers
            .into_iter()
            .enumerate()
            .map(|(index, answer)| answer.pieces(index)),
    );
    let mut silence = interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    silence.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let next = tokio::select! {
            biased;
            () = client.queue.closed() => return Err(Gone::Left),
            next = pieces.next() => next,
            _ = silence.tick() => {
                client.put(Bytes::from_static(b": still here\n\n")).await?;
                continue;
            }
        };
        silence.reset();
        match next {
            None => break,
            Some((index, Ok(Piece::Text(text)))) => client.send(&reply.text(index, &text)).await?,
            Some((index, Ok(Piece::End(end)))) => {
                client.send(&reply.end(index, &end)).await?;
                if let Some(place) = ends.get_mut(index) {
                    *place = Some(*end);
                }
            }
            Some((_, Err(error))) => return Err(Gone::Failed(error.into())),
        }
    }
    let ends: Vec<End> = ends.into_iter().flatten().collect();
    if let Some(usage) = reply.usage(&ends) {
        client.send(&usage).await?;
    }
    client.send(DONE).await
}
