//! Errors to gRPC codes, in one table, and calls with a span, a latency and a count.

use std::{future::Future, time::Instant};

use kvasir_cache::{CacheError, ErrorKind};
use kvasir_proto::InvalidMessage;
use tonic::{Code, Status};
use tracing::Instrument;

use crate::{door::Lost, metrics};

/// The code of each kind of error: what a client library makes of it decides whether the call is repeated.
const fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::UnknownNamespace | ErrorKind::NotHeld => Code::NotFound,
        ErrorKind::SchemaMismatch | ErrorKind::BasisMismatch | ErrorKind::Config => Code::FailedPrecondition,
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::LimitReached => Code::ResourceExhausted,
        ErrorKind::Locked => Code::Unavailable,
        ErrorKind::Disk => Code::Internal,
    }
}

pub(super) fn of_cache(error: &CacheError) -> Status {
    Status::new(code(error.kind()), error.to_string())
}

pub(super) fn of_message(error: &InvalidMessage) -> Status {
    Status::invalid_argument(error.to_string())
}

impl From<Lost> for Status {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Closed => stopping(),
            Lost::Panicked => Self::internal(lost.to_string()),
        }
    }
}

/// The store is going away.
pub(super) fn stopping() -> Status {
    Status::unavailable(Lost::Closed.to_string())
}

/// All streams are taken.
pub(super) fn too_many_streams(streams_max: usize) -> Status {
    Status::resource_exhausted(format!(
        "{streams_max} streams are open, store.streams_max allows no more: close one, or try later"
    ))
}

/// Serves one call (or one message of a stream) inside `span`, and counts it.
pub(super) async fn observed<T>(
    call: &'static str,
    span: tracing::Span,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let started = Instant::now();
    let result = work.instrument(span.clone()).await;
    match &result {
        Ok(_) => metrics::served(call, started.elapsed()),
        Err(status) => refused(call, &span, status),
    }
    result
}

/// Counts and logs a status that is not OK.
pub(super) fn refused(call: &'static str, span: &tracing::Span, status: &Status) {
    metrics::refused(call, name(status.code()));
    let _in = span.enter();
    let (code, message) = (status.code(), status.message());
    match code {
        Code::Internal | Code::Unknown | Code::DataLoss => tracing::error!(call, ?code, message, "call failed"),
        _ => tracing::debug!(call, ?code, message, "call refused"),
    }
}

const fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
