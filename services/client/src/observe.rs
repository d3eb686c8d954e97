//! Counts through the `metrics` facade.

use metrics::{counter, histogram};

use crate::ClientError;

/// A call was made.
pub(crate) fn call(call: &'static str) {
    counter!("kvasir_client_calls_total", "call" => call).increment(1);
}

/// A call ended after `seconds`.
pub(crate) fn took(call: &'static str, seconds: f64) {
    histogram!("kvasir_client_call_seconds", "call" => call).record(seconds);
}

/// A unary call is tried again.
pub(crate) fn retry(call: &'static str) {
    counter!("kvasir_client_retries_total", "call" => call).increment(1);
}

/// Payload bytes that went out or came in.
pub(crate) fn bytes(call: &'static str, count: usize) {
    counter!("kvasir_client_bytes_total", "call" => call).increment(count as u64);
}

/// A received payload whose checksum was wrong.
pub(crate) fn corrupt() {
    counter!("kvasir_client_corrupt_total").increment(1);
}

/// An error on its way to the caller.
pub(crate) fn failed(call: &'static str, error: ClientError) -> ClientError {
    counter!("kvasir_client_errors_total", "call" => call, "kind" => error.kind.name()).increment(1);
    error
}
