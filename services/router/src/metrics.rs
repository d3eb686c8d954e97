//! What `/metrics` says about the router. The handful to look at first: `kvasir_router_requests_total` by status,
//! `kvasir_router_in_flight`, `kvasir_router_time_to_first_token_seconds`, `kvasir_router_cached_tokens_total` against
//! `kvasir_router_prompt_tokens_total`, and `vllm:healthy_pods_total`.
//!
//! Names of vLLM's own servers (`vllm:time_to_first_token_seconds` ..) belong to the workers: in one process with them the
//! router would count every request twice under the same name.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

const REQUESTS: &str = "kvasir_router_requests_total";
const IN_FLIGHT: &str = "kvasir_router_in_flight";
const IN_FLIGHT_MAX: &str = "kvasir_router_in_flight_max";
const TTFT: &str = "kvasir_router_time_to_first_token_seconds";
const E2E: &str = "kvasir_router_request_seconds";
const TOKENIZE: &str = "kvasir_router_tokenize_seconds";
const PROMPT_TOKENS: &str = "kvasir_router_prompt_tokens_total";
const GENERATION_TOKENS: &str = "kvasir_router_generation_tokens_total";
const CACHED_TOKENS: &str = "kvasir_router_cached_tokens_total";
const EXPECTED_CACHED_TOKENS: &str = "kvasir_router_expected_cached_tokens_total";
const CHOSEN: &str = "kvasir_router_worker_chosen_total";
const RETRIES: &str = "kvasir_router_retries_total";
const USABLE: &str = "kvasir_router_worker_usable";
const HEALTHY: &str = "vllm:healthy_pods_total";
const MAP_BLOCKS: &str = "kvasir_router_prefix_map_blocks";
const MAP_BLOCKS_MAX: &str = "kvasir_router_prefix_map_blocks_max";
const MAP_FORGOTTEN: &str = "kvasir_router_prefix_map_forgotten_total";
const WATCHES: &str = "kvasir_router_watch_restarts_total";

/// Help texts, once per process.
pub(crate) fn describe() {
    describe_counter!(
        REQUESTS,
        "Requests answered, by route and HTTP status; 499 is a client that left"
    );
    describe_gauge!(IN_FLIGHT, "Prompts in flight");
    describe_gauge!(IN_FLIGHT_MAX, "Prompts in flight at most; beyond it the answer is 429");
    describe_histogram!(TTFT, Unit::Seconds, "From the request's arrival to its first token");
    describe_histogram!(
        E2E,
        Unit::Seconds,
        "From the request's arrival to the end of its answer, by route"
    );
    describe_histogram!(TOKENIZE, Unit::Seconds, "Rendering, tokenising and hashing one prompt");
    describe_counter!(PROMPT_TOKENS, "Prompt tokens of finished prompts");
    describe_counter!(GENERATION_TOKENS, "Tokens generated for finished prompts");
    describe_counter!(CACHED_TOKENS, "Prompt tokens that workers found instead of computing");
    describe_counter!(
        EXPECTED_CACHED_TOKENS,
        "Prompt tokens that the router expected to be found, of prompts that started"
    );
    describe_counter!(
        CHOSEN,
        "Requests given to a worker, by worker and what it was expected to hold"
    );
    describe_counter!(
        RETRIES,
        "Requests given to another worker before their first token, by reason"
    );
    describe_gauge!(
        USABLE,
        "1 while a worker is reachable, agrees on the model and is not draining"
    );
    describe_gauge!(HEALTHY, "Workers that can take requests");
    describe_gauge!(MAP_BLOCKS, "Blocks in the prefix map");
    describe_gauge!(MAP_BLOCKS_MAX, "Blocks in the prefix map at most");
    describe_counter!(MAP_FORGOTTEN, "Blocks forgotten because the prefix map was full");
    describe_counter!(
        WATCHES,
        "Event and load watches that ended and were opened again, by peer and kind"
    );
}

pub(crate) fn request(route: &'static str, status: u16, took: Duration) {
    counter!(REQUESTS, "route" => route, "status" => status.to_string()).increment(1);
    histogram!(E2E, "route" => route).record(took);
}

pub(crate) fn in_flight(prompts: usize, max: usize) {
    gauge!(IN_FLIGHT).set(prompts as f64);
    gauge!(IN_FLIGHT_MAX).set(max as f64);
}

pub(crate) fn first_token(after: Duration) {
    histogram!(TTFT).record(after);
}

pub(crate) fn tokenized(took: Duration) {
    histogram!(TOKENIZE).record(took);
}

pub(crate) fn started(expected_cached: usize, cached: u32) {
    counter!(EXPECTED_CACHED_TOKENS).increment(expected_cached as u64);
    counter!(CACHED_TOKENS).increment(u64::from(cached));
}

pub(crate) fn finished(prompt_tokens: u32, completion_tokens: u32) {
    counter!(PROMPT_TOKENS).increment(u64::from(prompt_tokens));
    counter!(GENERATION_TOKENS).increment(u64::from(completion_tokens));
}

/// `expected` is `device`, `store` or `nothing`: the larger part of what the worker was expected to find.
pub(crate) fn chosen(worker: &str, expected: &'static str) {
    counter!(CHOSEN, "worker" => worker.to_owned(), "expected" => expected).increment(1);
}

pub(crate) fn retry(reason: &'static str) {
    counter!(RETRIES, "reason" => reason).increment(1);
}

pub(crate) fn worker_usable(worker: &str, usable: bool) {
    gauge!(USABLE, "worker" => worker.to_owned()).set(if usable { 1.0 } else { 0.0 });
}

pub(crate) fn usable_workers(count: usize) {
    gauge!(HEALTHY).set(count as f64);
}

pub(crate) fn prefix_map(blocks: usize, max: usize, newly_forgotten: u64) {
    gauge!(MAP_BLOCKS).set(blocks as f64);
    gauge!(MAP_BLOCKS_MAX).set(max as f64);
    counter!(MAP_FORGOTTEN).increment(newly_forgotten);
}

pub(crate) fn watch_restarted(peer: &str, kind: &'static str) {
    counter!(WATCHES, "peer" => peer.to_owned(), "kind" => kind).increment(1);
}
