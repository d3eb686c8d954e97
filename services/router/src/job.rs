//! What a worker is asked for, and what it answers, in domain types. `grpc.rs` turns them into messages and back.
//!
//! Nothing here implements `Debug` that could print a prompt or an answer.

use std::sync::Arc;

use kvasir_block::BlockHash;
use kvasir_runtime::request_id::RequestId;
use serde::Serialize;

/// One prompt to generate from.
#[derive(Clone)]
pub(crate) struct Job {
    /// One id end to end.
    pub(crate) request_id: RequestId,
    /// Token ids, at least one.
    pub(crate) prompt: Arc<[u32]>,
    /// Names of the prompt's whole blocks.
    pub(crate) chain: Arc<[BlockHash]>,
    /// Most tokens to generate, at least one; prompt and these fit in the context window. `None` leaves it to the worker.
    pub(crate) max_tokens: Option<u32>,
    /// Everything that does not depend on the prompt.
    pub(crate) options: Arc<Options>,
}

/// How to generate.
#[derive(Clone, PartialEq)]
pub(crate) struct Options {
    /// 0 is greedy.
    pub(crate) temperature: f32,
    /// (0, 1]; 1 keeps all.
    pub(crate) top_p: f32,
    pub(crate) seed: Option<u64>,
    /// Texts at which to stop.
    pub(crate) stop: Vec<String>,
    pub(crate) attention: Attention,
    /// Isolates the cache; empty for none.
    pub(crate) cache_salt: String,
    /// Neither read nor write any cache.
    pub(crate) no_cache: bool,
    /// Go on after an end-of-sequence token.
    pub(crate) ignore_eos: bool,
}

/// `None` everywhere takes the worker's defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Attention {
    pub(crate) mode: Option<AttentionMode>,
    /// Keys per query head, for rows.
    pub(crate) k: Option<u32>,
    /// Share of the searched mass to cover, for attend.
    pub(crate) target_mass: Option<f32>,
    /// First tokens that stay local.
    pub(crate) sink: Option<u32>,
    /// Last tokens that stay local.
    pub(crate) window: Option<u32>,
    /// Name of the index that is wanted.
    pub(crate) index: Option<&'static str>,
    /// Whether attend estimates what it does not attend to.
    pub(crate) tail: Option<bool>,
    /// Name of how attend bounds the missed mass.
    pub(crate) certificate: Option<&'static str>,
    /// Largest bound that is accepted without looking further; 0 for any.
    pub(crate) missed_mass_max: Option<f32>,
    /// Share of the keys that may be scored exactly.
    pub(crate) effort: Option<f32>,
}

/// Which keys a decoding query sees, and where the work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AttentionMode {
    Full,
    Rows,
    Attend,
    Auto,
}

/// What a worker says while it generates.
#[derive(Clone, PartialEq)]
pub(crate) enum Event {
    /// Admitted; comes again when another worker took over before the first token.
    Started(Started),
    /// Text that became certain; empty while a stop string or a code point is undecided.
    Text(String),
    /// The last event.
    Finished(Finished),
}

/// What was found instead of computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Started {
    pub(crate) prompt_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) cached_tokens_device: u32,
    pub(crate) cached_tokens_store: u32,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Finished {
    pub(crate) reason: FinishReason,
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) report: Report,
}

/// OpenAI's `finish_reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens` or the end of the window.
    Length,
}

/// What the request's KV did: the worker's report, in the order and with the names of the `kvasir` response field.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Report {
    /// The mode that was asked for or configured; `null` when the worker did not say.
    pub(crate) attention: Option<AttentionMode>,
    /// Retrieval was given up and full attention finished the request.
    pub(crate) fell_back: bool,
    /// Why, in words.
    pub(crate) reason: Option<String>,
    pub(crate) bytes_pushed: u64,
    pub(crate) bytes_loaded: u64,
    pub(crate) keys_scanned: u64,
    pub(crate) keys_total: u64,
    pub(crate) keys_attended: u64,
    pub(crate) mass_covered_p50: f32,
    pub(crate) mass_covered_min: f32,
    /// Index that served; `null` where nothing was retrieved.
    pub(crate) index: Option<String>,
    /// Why not a better one.
    pub(crate) index_reason: Option<String>,
    pub(crate) missed_mass_bound_p50: f32,
    pub(crate) missed_mass_bound_max: f32,
    pub(crate) escalations: u64,
    pub(crate) hinted: u64,
    pub(crate) search_ms: f32,
    pub(crate) store_queued_ms: f32,
    pub(crate) waited_ms: f32,
    pub(crate) search_hidden: f32,
    pub(crate) wire_us_p50: f32,
    pub(crate) rows: u64,
    pub(crate) rows_kept: u64,
    pub(crate) retrieved_bytes: u64,
    pub(crate) round_trips: u64,
    pub(crate) queue_ms: f32,
    pub(crate) prefill_ms: f32,
    pub(crate) decode_ms: f32,
}
