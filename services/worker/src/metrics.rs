//! What the worker counts. Names are vLLM's where vLLM has one, so that existing dashboards work; the rest is
//! `kvasir_worker_*`. Look first at waiting requests, time to first token, dropped blocks and fall-backs.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::{load::Load, report::Reason};

/// Handles of the compute thread's metrics.
#[derive(Clone, Debug)]
pub(crate) struct ComputeMetrics {
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    pub(crate) prompt_tokens: Counter,
    pub(crate) generation_tokens: Counter,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    pub(crate) prefix_queries: Counter,
    pub(crate) prefix_hits: Counter,
    pub(crate) store_queries: Counter,
    pub(crate) store_hits: Counter,
    stopped: Counter,
    at_length: Counter,
    pub(crate) aborted: Counter,
    pub(crate) fallbacks: Counter,
    pub(crate) step: Histogram,
    pub(crate) steps_aborted: Counter,
}

impl ComputeMetrics {
    /// All of them, labelled with the model's name as vLLM does.
    pub(crate) fn new(model: &str) -> Self {
        let model = || model.to_owned();
        let success = |reason: &'static str| counter!("vllm:request_success_total", "model_name" => model(), "finished_reason" => reason);
        Self {
            running: gauge!("vllm:num_requests_running", "model_name" => model()),
            waiting: gauge!("vllm:num_requests_waiting", "model_name" => model()),
            kv_usage: gauge!("vllm:kv_cache_usage_perc", "model_name" => model()),
            prompt_tokens: counter!("vllm:prompt_tokens_total", "model_name" => model()),
            generation_tokens: counter!("vllm:generation_tokens_total", "model_name" => model()),
            time_to_first_token: histogram!("vllm:time_to_first_token_seconds", "model_name" => model()),
            inter_token: histogram!("vllm:inter_token_latency_seconds", "model_name" => model()),
            end_to_end: histogram!("vllm:e2e_request_latency_seconds", "model_name" => model()),
            queue: histogram!("vllm:request_queue_time_seconds", "model_name" => model()),
            prefill: histogram!("vllm:request_prefill_time_seconds", "model_name" => model()),
            decode: histogram!("vllm:request_decode_time_seconds", "model_name" => model()),
            prefix_queries: counter!("vllm:prefix_cache_queries_total", "model_name" => model()),
            prefix_hits: counter!("vllm:prefix_cache_hits_total", "model_name" => model()),
            store_queries: counter!("vllm:external_prefix_cache_queries_total", "model_name" => model()),
            store_hits: counter!("vllm:external_prefix_cache_hits_total", "model_name" => model()),
            stopped: success(Reason::Stop.name()),
            at_length: success(Reason::Length.name()),
            aborted: success("abort"),
            fallbacks: counter!("kvasir_worker_retrieval_fallbacks_total"),
            step: histogram!("kvasir_worker_step_seconds"),
            steps_aborted: counter!("kvasir_worker_steps_aborted_total"),
        }
    }

    pub(crate) fn load(&self, load: &Load) {
        self.running.set(load.running as f64);
        self.waiting.set(load.waiting as f64);
        self.kv_usage.set(f64::from(load.kv_usage));
    }

    /// A request came to its end; seconds of its phases and of all of it.
    pub(crate) fn finished(&self, reason: Reason, (queued, prefill, decode): (f64, f64, f64), whole: f64) {
        match reason {
            Reason::Stop => self.stopped.increment(1),
            Reason::Length => self.at_length.increment(1),
        }
        self.queue.record(queued);
        self.prefill.record(prefill);
        self.decode.record(decode);
        self.end_to_end.record(whole);
    }
}

/// Handles of the offload queue's metrics.
#[derive(Clone, Debug)]
pub(crate) struct OffloadMetrics {
    pub(crate) queue_bytes: Gauge,
    /// Blocks that found the queue full, or no page-locked memory on their way to it.
    pub(crate) dropped: Counter,
    /// Steps' waits for page-locked memory, while the GPU had work.
    pub(crate) waited: Histogram,
    /// Blocks given up on the way: shed by the store, lost with a stream, or never completed.
    pub(crate) abandoned: Counter,
    /// Bytes that the store took.
    pub(crate) pushed_bytes: Counter,
}

impl OffloadMetrics {
    pub(crate) fn new() -> Self {
        Self {
            queue_bytes: gauge!("kvasir_worker_offload_queue_bytes"),
            dropped: counter!("kvasir_worker_offload_dropped_blocks_total"),
            waited: histogram!("kvasir_worker_offload_wait_seconds"),
            abandoned: counter!("kvasir_worker_offload_abandoned_blocks_total"),
            pushed_bytes: counter!("kvasir_worker_offload_pushed_bytes_total"),
        }
    }
}

/// Handles of what concerns the store.
#[derive(Clone, Debug)]
pub(crate) struct StoreMetrics {
    /// 1 while the store is there, 0 while the worker works without it.
    pub(crate) connected: Gauge,
    pub(crate) loaded_bytes: Counter,
    /// Loads that brought less than was matched.
    pub(crate) loads_cut: Counter,
    /// From the query of one layer to its partial.
    pub(crate) retrieval_seconds: Histogram,
    /// Of that: the compute thread waiting with nothing else left to do.
    pub(crate) retrieval_wait_seconds: Histogram,
    /// Searching at the store, as it says.
    pub(crate) retrieval_search_seconds: Histogram,
    /// Replies whose search had begun with a hint.
    pub(crate) retrieval_hinted: Counter,
    /// Replies whose bound of the missed mass was too large at first.
    pub(crate) retrieval_escalations: Counter,
    /// Rows that replies were made of, over KV heads.
    pub(crate) rows: Counter,
    /// Of those: rows that were kept from earlier replies.
    pub(crate) rows_kept: Counter,
}

impl StoreMetrics {
    pub(crate) fn new() -> Self {
        Self {
            connected: gauge!("kvasir_worker_store_connected"),
            loaded_bytes: counter!("kvasir_worker_onboard_loaded_bytes_total"),
            loads_cut: counter!("kvasir_worker_onboard_cut_total"),
            retrieval_seconds: histogram!("kvasir_worker_retrieval_seconds"),
            retrieval_wait_seconds: histogram!("kvasir_worker_retrieval_wait_seconds"),
            retrieval_search_seconds: histogram!("kvasir_worker_retrieval_search_seconds"),
            retrieval_hinted: counter!("kvasir_worker_retrieval_hinted_total"),
            retrieval_escalations: counter!("kvasir_worker_retrieval_escalations_total"),
            rows: counter!("kvasir_worker_retrieval_rows_total"),
            rows_kept: counter!("kvasir_worker_retrieval_rows_kept_total"),
        }
    }
}
