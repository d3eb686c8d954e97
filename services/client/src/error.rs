//! One error with a kind: what the caller can do, and the words for a person.

use std::error::Error as _;

use kvasir_proto::{InvalidMessage, frame::StreamError};
use tonic::{Code, Status};

/// What went wrong, as far as a caller would act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Not reachable, or gone in mid-call: go on without.
    Unavailable,
    /// The deadline passed.
    TimedOut,
    /// The store does not know the namespace or context: open it again, or compute.
    NotFound,
    /// The store is full or overloaded.
    Exhausted,
    /// The call was wrong: repeating it changes nothing.
    Invalid,
    /// The store broke the protocol or failed.
    Internal,
}

impl ErrorKind {
    /// Name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::TimedOut => "timed_out",
            Self::NotFound => "not_found",
            Self::Exhausted => "exhausted",
            Self::Invalid => "invalid",
            Self::Internal => "internal",
        }
    }
}

/// A call or stream that did not do what it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ClientError {
    /// What a caller would act on.
    pub kind: ErrorKind,
    /// Which call, of which store, what happened, and what to do.
    pub message: String,
}

/// Names a call in errors and metrics: which one, and of which store.
#[derive(Clone, Debug)]
pub(crate) struct CallName {
    pub(crate) call: &'static str,
    pub(crate) url: std::sync::Arc<str>,
}

impl CallName {
    pub(crate) fn error(&self, kind: ErrorKind, what: impl std::fmt::Display) -> ClientError {
        ClientError {
            kind,
            message: format!("{} at {}: {what}", self.call, self.url),
        }
    }

    /// The call was made wrongly.
    pub(crate) fn invalid(&self, what: impl std::fmt::Display) -> ClientError {
        self.error(ErrorKind::Invalid, what)
    }

    /// The store's reply breaks the contract.
    pub(crate) fn broken(&self, what: impl std::fmt::Display) -> ClientError {
        let advice = "the store breaks the protocol, check that it has this client's version";
        self.error(ErrorKind::Internal, format_args!("{what}; {advice}"))
    }

    /// A field of the store's reply breaks the contract.
    pub(crate) fn broken_field(&self, error: &InvalidMessage) -> ClientError {
        self.broken(format_args!("reply field {error}"))
    }

    /// Nothing but the bulk path is wanted, and it is not to be had.
    pub(crate) fn no_bulk(&self) -> ClientError {
        let what = "no bulk connection can be had: open the namespace anew, raise bulk_connections_max, or allow gRPC";
        self.error(ErrorKind::Unavailable, what)
    }

    pub(crate) fn timed_out(&self, waited: std::time::Duration) -> ClientError {
        let what = format!("no answer within {waited:?}; the store is overloaded or cut off, go on without it");
        self.error(ErrorKind::TimedOut, what)
    }

    pub(crate) fn status(&self, status: &Status) -> ClientError {
        if timed_out(status) {
            return self.error(ErrorKind::TimedOut, "the deadline passed before the store was done");
        }
        if let Some(cause) = transport_cause(status) {
            let what = format!("the store cannot be reached ({cause}); check that it runs there, or go on without it");
            return self.error(ErrorKind::Unavailable, what);
        }
        let kind = match status.code() {
            Code::Unavailable | Code::Aborted | Code::Cancelled => ErrorKind::Unavailable,
            Code::DeadlineExceeded => ErrorKind::TimedOut,
            Code::NotFound => ErrorKind::NotFound,
            Code::ResourceExhausted => ErrorKind::Exhausted,
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented => ErrorKind::Invalid,
            Code::Ok | Code::Internal | Code::Unknown | Code::DataLoss | Code::OutOfRange => ErrorKind::Internal,
        };
        self.error(kind, status.message())
    }

    pub(crate) fn stream(&self, error: &StreamError) -> ClientError {
        match error {
            StreamError::Transport(status) if timed_out(status) => self.status(status),
            StreamError::Transport(status) => {
                let cause = transport_cause(status).unwrap_or_else(|| status.message().to_owned());
                let what =
                    format!("the connection broke in mid-stream ({cause}); open the stream again, or go on without");
                self.error(ErrorKind::Unavailable, what)
            }
            StreamError::Status(status) => self.status(status),
            StreamError::Frame(error) => self.broken(error),
            StreamError::NoStatus => self.error(
                ErrorKind::Unavailable,
                "the stream ended without a status, the store was cut off; open the stream again, or go on without",
            ),
        }
    }
}

fn timed_out(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::TimeoutExpired>() {
            return true;
        }
        source = error.source();
    }
    status.code() == Code::DeadlineExceeded
        || (status.code() == Code::Cancelled && status.message() == "Timeout expired")
}

/// What broke the transport; `None` for a status that the peer sent.
fn transport_cause(status: &Status) -> Option<String> {
    let mut cause = status.source()?;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Some(cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> CallName {
        CallName {
            call: "stat",
            url: "http://store".into(),
        }
    }

    #[test]
    fn codes_have_kinds() {
        let table = [
            (
                Status::unavailable("stopping"),
                ErrorKind::Unavailable,
                "stat at http://store: stopping",
            ),
            (
                Status::not_found("no such block"),
                ErrorKind::NotFound,
                "stat at http://store: no such block",
            ),
            (
                Status::resource_exhausted("full"),
                ErrorKind::Exhausted,
                "stat at http://store: full",
            ),
            (
                Status::invalid_argument("q: short"),
                ErrorKind::Invalid,
                "stat at http://store: q: short",
            ),
            (
                Status::internal("bug"),
                ErrorKind::Internal,
                "stat at http://store: bug",
            ),
            (
                Status::deadline_exceeded("late"),
                ErrorKind::TimedOut,
                "stat at http://store: the deadline passed before the store was done",
            ),
            (
                Status::cancelled("Timeout expired"),
                ErrorKind::TimedOut,
                "stat at http://store: the deadline passed before the store was done",
            ),
        ];
        for (status, kind, message) in table {
            let error = name().status(&status);
            assert_eq!((error.kind, error.message.as_str()), (kind, message));
        }
    }

    #[test]
    fn a_broken_transport_names_its_root() {
        let refused = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "connection refused");
        let error = name().status(&Status::from_error(Box::new(refused)));
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert!(error.message.contains("(connection refused)"), "{error}");
    }
}
