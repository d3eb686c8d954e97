//! The border to `kvasir.v1.Worker`: messages become domain types here, and statuses become [`CallError`]s.

use std::time::Duration;

use kvasir_block::{KvSchema, NamespaceId};
use kvasir_proto::{
    BlockEvents, InvalidMessage, convert,
    v1::{self, worker_client::WorkerClient},
};
use kvasir_runtime::grpc::{CONNECTION_WINDOW_BYTES, MESSAGE_BYTES_MAX};
use tonic::{
    Code, Request, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::{
    job::{Attention, AttentionMode, Event, FinishReason, Finished, Job, Report, Started},
    policy::Load,
};

/// Flow-control window of a stream. Answers are small; what matters is that a client who does not read holds little, and
/// that hundreds of such clients do not fill the connection's window, on which the others depend.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// A silent connection is probed after this long, so that a machine that vanished is noticed without traffic ..
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// .. and given up when the probe is not answered within this.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A worker at one address. Connects when it is first called and again by itself; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct WorkerCalls {
    client: WorkerClient<Channel>,
}

/// Who a worker says it is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct WorkerInfo {
    pub(crate) schema: KvSchema,
    pub(crate) namespace: NamespaceId,
    pub(crate) context_tokens_max: u32,
}

/// Why a call did not go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// The worker has no room now: another one may have, or this one later.
    #[error("no room: {0}")]
    Busy(String),
    /// The request itself is wrong; every worker would say the same.
    #[error("refused: {0}")]
    Refused(String),
    /// The worker cannot be reached, or left in mid-call.
    #[error("lost: {0}")]
    Lost(String),
    /// The worker answered, and failed or broke the protocol.
    #[error("failed: {0}")]
    Failed(String),
}

impl From<InvalidMessage> for CallError {
    fn from(error: InvalidMessage) -> Self {
        Self::Failed(format!("the worker's answer breaks the protocol: {error}"))
    }
}

/// The one table from gRPC codes to what the router does about them.
impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let message = if status.message().is_empty() {
            status.code().description().to_owned()
        } else {
            status.message().to_owned()
        };
        match status.code() {
            Code::ResourceExhausted => Self::Busy(message),
            Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => Self::Refused(message),
            // A broken connection comes as either, depending on where it broke.
            Code::Unavailable | Code::Unknown => Self::Lost(message),
            _ => Self::Failed(message),
        }
    }
}

impl WorkerCalls {
    /// For the worker at `url`; nothing is connected yet.
    pub(crate) fn new(url: &str, connect_timeout: Duration) -> Result<Self, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(url.to_owned())?
            .connect_timeout(connect_timeout)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let client = WorkerClient::new(endpoint.connect_lazy()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Self { client })
    }

    /// Asks who the worker is.
    pub(crate) async fn info(&self) -> Result<WorkerInfo, CallError> {
        let reply = self.client.clone().info(v1::WorkerInfoRequest {}).await?.into_inner();
        let schema = reply
            .schema
            .ok_or_else(|| InvalidMessage::new("schema", "missing"))?
            .try_into()
            .map_err(|error: InvalidMessage| error.inside("schema"))?;
        Ok(WorkerInfo {
            schema,
            namespace: convert::namespace(&reply.namespace)?,
            context_tokens_max: reply.context_tokens_max,
        })
    }

    /// Starts generating. Dropping the stream cancels it at the worker.
    pub(crate) async fn generate(&self, job: &Job) -> Result<EventStream, CallError> {
        let mut request = Request::new(message_of(job));
        job.request_id.attach(&mut request);
        Ok(EventStream(self.client.clone().generate(request).await?.into_inner()))
    }

    /// The worker's load, now and on every change.
    pub(crate) async fn watch_load(&self) -> Result<LoadStream, CallError> {
        let stream = self.client.clone().watch_load(v1::WatchLoadRequest {}).await?;
        Ok(LoadStream(stream.into_inner()))
    }

    /// Blocks of the worker's device tier: a snapshot, then changes.
    pub(crate) async fn watch_blocks(&self, namespace: NamespaceId) -> Result<BlockStream, CallError> {
        let request = v1::WatchEventsRequest {
            namespace: convert::namespace_bytes(namespace),
        };
        let stream = self.client.clone().watch_events(request).await?;
        Ok(BlockStream(stream.into_inner()))
    }
}

/// What a worker says while it generates.
pub(crate) struct EventStream(Streaming<v1::GenerateReply>);

impl EventStream {
    /// The next event; `None` when the worker closed the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, CallError> {
        match self.0.message().await? {
            Some(reply) => event_of(reply).map(Some),
            None => Ok(None),
        }
    }
}

/// Load reports.
pub(crate) struct LoadStream(Streaming<v1::WorkerLoad>);

/// A load report, and whether the worker asks for no more work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LoadReport {
    pub(crate) load: Load,
    pub(crate) draining: bool,
}

impl LoadStream {
    /// The next report; `None` when the worker closed the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<LoadReport>, CallError> {
        Ok(self.0.message().await?.map(|wire| LoadReport {
            load: Load {
                running: wire.running,
                waiting: wire.waiting,
                prefill_tokens_waiting: wire.prefill_tokens_waiting,
                kv_usage: wire.kv_usage,
            },
            draining: wire.draining,
        }))
    }
}

/// Block events.
pub(crate) struct BlockStream(Streaming<v1::BlockEvent>);

impl BlockStream {
    /// The next event; `None` when the worker closed the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<BlockEvents>, CallError> {
        match self.0.message().await? {
            Some(event) => Ok(Some(event.try_into()?)),
            None => Ok(None),
        }
    }
}

fn message_of(job: &Job) -> v1::GenerateRequest {
    let options = &job.options;
    v1::GenerateRequest {
        request_id: job.request_id.to_string(),
        prompt: job.prompt.to_vec(),
        max_tokens: job.max_tokens.unwrap_or(0),
        sampling: Some(v1::SamplingParams {
            temperature: options.temperature,
            top_p: options.top_p,
            seed: options.seed.unwrap_or(0),
            has_seed: options.seed.is_some(),
        }),
        stop: options.stop.clone(),
        attention: Some(attention_of(&options.attention)),
        cache_salt: options.cache_salt.clone(),
        no_cache: options.no_cache,
        forced: Vec::new(),
        ignore_eos: options.ignore_eos,
    }
}

fn attention_of(attention: &Attention) -> v1::AttentionOptions {
    let mode = match attention.mode {
        None => v1::AttentionMode::Unspecified,
        Some(AttentionMode::Full) => v1::AttentionMode::Full,
        Some(AttentionMode::Rows) => v1::AttentionMode::Rows,
        Some(AttentionMode::Attend) => v1::AttentionMode::Attend,
        Some(AttentionMode::Auto) => v1::AttentionMode::Auto,
    };
    v1::AttentionOptions {
        mode: mode.into(),
        k: attention.k.unwrap_or(0),
        target_mass: attention.target_mass.unwrap_or(0.0),
        sink: attention.sink.unwrap_or(0),
        window: attention.window.unwrap_or(0),
        has_sink: attention.sink.is_some(),
        has_window: attention.window.is_some(),
        tail: attention.tail.unwrap_or(false),
        has_tail: attention.tail.is_some(),
        certificate: attention.certificate.unwrap_or_default().to_owned(),
        missed_mass_max: attention.missed_mass_max.unwrap_or(0.0),
        has_missed_mass_max: attention.missed_mass_max.is_some(),
        effort: attention.effort.unwrap_or(0.0),
        index: attention.index.unwrap_or_default().to_owned(),
    }
}

fn event_of(reply: v1::GenerateReply) -> Result<Event, CallError> {
    use v1::generate_reply::Event as Wire;
    match reply.event {
        Some(Wire::Started(started)) => Ok(Event::Started(Started {
            prompt_tokens: started.prompt_tokens,
            cached_tokens: started.cached_tokens,
            cached_tokens_device: started.cached_tokens_device,
            cached_tokens_store: started.cached_tokens_store,
        })),
        Some(Wire::Tokens(tokens)) => Ok(Event::Text(tokens.text)),
        Some(Wire::Finished(finished)) => Ok(Event::Finished(finished_of(finished)?)),
        None => Err(InvalidMessage::new("event", "missing").into()),
    }
}

fn finished_of(wire: v1::Finished) -> Result<Finished, CallError> {
    let reason = match wire.reason() {
        v1::FinishReason::Stop => FinishReason::Stop,
        v1::FinishReason::Length => FinishReason::Length,
        v1::FinishReason::Unspecified => {
            let problem = format!("{} is no reason to finish", wire.reason);
            return Err(InvalidMessage::new("finished.reason", problem).into());
        }
    };
    Ok(Finished {
        reason,
        prompt_tokens: wire.prompt_tokens,
        completion_tokens: wire.completion_tokens,
        cached_tokens: wire.cached_tokens,
        report: wire.report.map_or_else(Report::default, report_of),
    })
}

fn report_of(wire: v1::GenerateReport) -> Report {
    let attention = match wire.mode() {
        v1::AttentionMode::Unspecified => None,
        v1::AttentionMode::Full => Some(AttentionMode::Full),
        v1::AttentionMode::Rows => Some(AttentionMode::Rows),
        v1::AttentionMode::Attend => Some(AttentionMode::Attend),
        v1::AttentionMode::Auto => Some(AttentionMode::Auto),
    };
    let given = |words: String| (!words.is_empty()).then_some(words);
    Report {
        attention,
        fell_back: wire.fell_back,
        reason: given(wire.fallback_reason),
        bytes_pushed: wire.bytes_pushed,
        bytes_loaded: wire.bytes_loaded,
        keys_scanned: wire.keys_scanned,
        keys_total: wire.keys_total,
        keys_attended: wire.keys_attended,
        mass_covered_p50: wire.mass_covered_p50,
        mass_covered_min: wire.mass_covered_min,
        index: given(wire.index),
        index_reason: given(wire.index_reason),
        missed_mass_bound_p50: wire.missed_mass_bound_p50,
        missed_mass_bound_max: wire.missed_mass_bound_max,
        escalations: wire.escalations,
        hinted: wire.hinted,
        search_ms: wire.search_ms,
        store_queued_ms: wire.store_queued_ms,
        waited_ms: wire.waited_ms,
        search_hidden: wire.search_hidden,
        wire_us_p50: wire.wire_us_p50,
        rows: wire.rows,
        rows_kept: wire.rows_kept,
        retrieved_bytes: wire.retrieved_bytes,
        round_trips: wire.round_trips,
        queue_ms: wire.queue_ms,
        prefill_ms: wire.prefill_ms,
        decode_ms: wire.decode_ms,
    }
}

#[cfg(test)]
pub(crate) mod scripted;
