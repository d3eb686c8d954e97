//! What can go wrong between us and a bucket, as kinds to count and to act on.

use std::{error::Error, fmt};

use object_store::client::{HttpError, HttpErrorKind};

/// Why a request to the bucket failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObjectFailure {
    /// No connection: refused, unreachable, no such host, or TLS that does not agree.
    Connect,
    /// Connected, but the first byte or the whole answer took too long.
    Timeout,
    /// The connection broke in the middle.
    Reset,
    /// The bucket asked us to slow down (429, 503).
    Throttled,
    /// The bucket failed (other 5xx).
    Server,
    /// Wrong, missing or expired credentials (401, 403, `ExpiredToken`).
    Denied,
    /// No such object (404). For a listed object: somebody removed it, which is allowed.
    Missing,
    /// The request was refused for another reason (other 4xx): asking again will not help.
    Refused,
    /// An answer that is not one to our question: another range, no range (416), a list that cannot be read or is too long.
    Malformed,
    /// The answer ended before its last byte.
    Short,
}

impl ObjectFailure {
    /// All of them, in the order of declaration.
    pub const ALL: [Self; 10] = [
        Self::Connect,
        Self::Timeout,
        Self::Reset,
        Self::Throttled,
        Self::Server,
        Self::Denied,
        Self::Missing,
        Self::Refused,
        Self::Malformed,
        Self::Short,
    ];

    /// Name for metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Throttled => "throttled",
            Self::Server => "server",
            Self::Denied => "denied",
            Self::Missing => "missing",
            Self::Refused => "refused",
            Self::Malformed => "malformed",
            Self::Short => "short",
        }
    }

    /// What to do about it, for the person who reads the log.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Connect => "check endpoint, network and certificates",
            Self::Timeout | Self::Reset | Self::Throttled | Self::Server => {
                "tried again by itself; check the bucket's service"
            }
            Self::Denied => "renew the credentials, or grant list, get, put and delete under the prefix",
            Self::Missing => "check bucket name and region; a single missing object is a removed one",
            Self::Refused => "check region, bucket name and the service's limits",
            Self::Malformed | Self::Short => "check what stands between this store and the bucket",
        }
    }

    /// Whether the same request may succeed in a moment.
    pub(super) const fn is_transient(self) -> bool {
        matches!(
            self,
            Self::Connect | Self::Timeout | Self::Reset | Self::Throttled | Self::Server
        )
    }

    /// Whether it says that the bucket does not serve us, as against this one object.
    pub(super) const fn is_outage(self) -> bool {
        !matches!(self, Self::Missing | Self::Refused)
    }

    /// Whether the status of an answer says that something failed. 404 and 2xx are left to the caller.
    pub(super) fn of_status(status: u16, error_body: &[u8]) -> Option<Self> {
        let says = |word: &str| error_body.windows(word.len()).any(|window| window == word.as_bytes());
        match status {
            200..=299 | 304 | 404 => None,
            401 | 403 => Some(Self::Denied),
            400 if says("ExpiredToken") || says("InvalidToken") || says("TokenRefreshRequired") => Some(Self::Denied),
            408 => Some(Self::Timeout),
            416 => Some(Self::Malformed),
            429 | 503 => Some(Self::Throttled),
            500..=599 => Some(Self::Server),
            _ => Some(Self::Refused),
        }
    }

    /// The kind of an error that the client library gave us.
    pub(super) fn of(error: &object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { .. } => return Self::Missing,
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                return Self::Denied;
            }
            _ => {}
        }
        let mut transport = None;
        let mut next: Option<&(dyn Error + 'static)> = Some(error);
        while let Some(cause) = next {
            if let Some(BadStatus { failure, .. }) = cause.downcast_ref() {
                return *failure;
            }
            if let Some(http) = cause.downcast_ref::<HttpError>() {
                transport = transport.or(Some(match http.kind() {
                    HttpErrorKind::Connect => Self::Connect,
                    HttpErrorKind::Timeout => Self::Timeout,
                    _ => Self::Reset,
                }));
            }
            if let Some(io) = cause.downcast_ref::<std::io::Error>() {
                transport = transport.or(Some(match io.kind() {
                    std::io::ErrorKind::NotFound => Self::Missing,
                    std::io::ErrorKind::PermissionDenied => Self::Denied,
                    std::io::ErrorKind::TimedOut => Self::Timeout,
                    std::io::ErrorKind::UnexpectedEof => Self::Short,
                    _ => Self::Server,
                }));
            }
            next = cause.source();
        }
        transport.unwrap_or(Self::Malformed)
    }
}

/// An answer whose status says that it failed. Made where the status is seen, found again by [`ObjectFailure::of`].
#[derive(Debug)]
pub(super) struct BadStatus {
    pub(super) status: u16,
    pub(super) failure: ObjectFailure,
}

impl fmt::Display for BadStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the bucket answered with status {} ({})",
            self.status,
            self.failure.name()
        )
    }
}

impl Error for BadStatus {}

/// How often each kind happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FailureCounts([u64; ObjectFailure::ALL.len()]);

impl FailureCounts {
    /// How often `failure` happened.
    pub fn of(&self, failure: ObjectFailure) -> u64 {
        self.0[failure as usize]
    }

    /// All failures together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Every kind with its count.
    pub fn iter(&self) -> impl Iterator<Item = (ObjectFailure, u64)> + '_ {
        ObjectFailure::ALL.into_iter().zip(self.0)
    }

    pub(super) fn add(&mut self, failure: ObjectFailure) {
        self.0[failure as usize] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_a_kind() {
        let expired: &[u8] = b"<Error><Code>ExpiredToken</Code></Error>";
        let table = [
            (200, &b""[..], None),
            (206, b"", None),
            (404, b"", None),
            (400, b"", Some(ObjectFailure::Refused)),
            (400, expired, Some(ObjectFailure::Denied)),
            (401, b"", Some(ObjectFailure::Denied)),
            (403, b"", Some(ObjectFailure::Denied)),
            (408, b"", Some(ObjectFailure::Timeout)),
            (409, b"", Some(ObjectFailure::Refused)),
            (416, b"", Some(ObjectFailure::Malformed)),
            (429, b"", Some(ObjectFailure::Throttled)),
            (500, b"", Some(ObjectFailure::Server)),
            (503, b"", Some(ObjectFailure::Throttled)),
            (301, b"", Some(ObjectFailure::Refused)),
        ];
        for (status, body, failure) in table {
            assert_eq!(ObjectFailure::of_status(status, body), failure, "status {status}");
        }
    }

    #[test]
    fn kinds_are_complete_and_distinct() {
        let mut counts = FailureCounts::default();
        for (i, failure) in ObjectFailure::ALL.into_iter().enumerate() {
            assert_eq!(failure as usize, i, "{}", failure.name());
            assert!(!failure.advice().is_empty());
            counts.add(failure);
        }
        assert!(counts.iter().all(|(_, count)| count == 1));
        assert_eq!(counts.total(), ObjectFailure::ALL.len() as u64);
    }

    #[test]
    fn a_status_is_found_behind_the_library() {
        let bad = BadStatus {
            status: 503,
            failure: ObjectFailure::Throttled,
        };
        let error = object_store::Error::Generic {
            store: "S3",
            source: Box::new(HttpError::new(HttpErrorKind::Unknown, bad)),
        };
        assert_eq!(ObjectFailure::of(&error), ObjectFailure::Throttled);
    }
}
