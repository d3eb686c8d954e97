//! One id per request, end to end: made at the router (or taken from the caller), carried as the HTTP header and gRPC
//! metadata `x-request-id`, and put on every span along the way.

use std::{fmt, str::FromStr};

/// The header, and the metadata key.
pub const HEADER: &str = "x-request-id";

/// The longest id taken from a caller.
pub const LEN_MAX: usize = 128;

/// A request's id: 1 to 128 characters out of letters, digits and `-_.:`, so that it is safe in headers and logs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestId(String);

/// Why a caller's id is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a request id has 1 to {LEN_MAX} characters out of letters, digits and \"-_.:\"")]
pub struct InvalidRequestId;

impl RequestId {
    /// A new random id (32 hex digits).
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }

    /// The caller's id if the headers hold a usable one, else a new one. A caller's bad id is no reason to refuse work.
    pub fn from_headers(headers: &http::HeaderMap) -> Self {
        let given = headers.get(HEADER).and_then(|value| value.to_str().ok());
        given.and_then(|text| text.parse().ok()).unwrap_or_else(Self::random)
    }

    /// The same for gRPC metadata.
    pub fn from_metadata(metadata: &tonic::metadata::MetadataMap) -> Self {
        let given = metadata.get(HEADER).and_then(|value| value.to_str().ok());
        given.and_then(|text| text.parse().ok()).unwrap_or_else(Self::random)
    }

    /// The id that [`crate::grpc::GrpcServer`] put on the request, or else one from its metadata.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        request
            .extensions()
            .get::<Self>()
            .cloned()
            .unwrap_or_else(|| Self::from_metadata(request.metadata()))
    }

    /// Puts the id on an outgoing gRPC request.
    pub fn attach<T>(&self, request: &mut tonic::Request<T>) {
        if let Ok(value) = self.0.parse() {
            request.metadata_mut().insert(HEADER, value);
        }
    }

    /// Puts the id on outgoing HTTP headers.
    pub fn attach_http(&self, headers: &mut http::HeaderMap) {
        if let Ok(value) = http::HeaderValue::from_str(&self.0) {
            headers.insert(HEADER, value);
        }
    }

    /// A span that carries the id; `what` names the work.
    pub fn span(&self, what: &'static str) -> tracing::Span {
        tracing::info_span!("request", what, request_id = %self)
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RequestId {
    type Err = InvalidRequestId;

    fn from_str(text: &str) -> Result<Self, InvalidRequestId> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
        let good = (1..=LEN_MAX).contains(&text.len()) && text.chars().all(allowed);
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidRequestId)
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usable_id_is_kept_and_another_replaced() {
        let long = "x".repeat(LEN_MAX + 1);
        let table = [
            ("req-1.a:b_C", true),
            ("", false),
            ("two words", false),
            ("a\u{7f}b", false),
            (&long, false),
        ];
        for (given, kept) in table {
            let mut headers = http::HeaderMap::new();
            if let Ok(value) = http::HeaderValue::from_bytes(given.as_bytes()) {
                headers.insert(HEADER, value);
            }
            let id = RequestId::from_headers(&headers);
            assert_eq!(id.as_str() == given, kept, "{given:?} became {id}");
            assert!(id.as_str().parse::<RequestId>().is_ok(), "{id} must be usable");
        }
    }

    #[test]
    fn an_id_survives_the_way_through_metadata() {
        let id = RequestId::random();
        let mut request = tonic::Request::new(());
        id.attach(&mut request);
        assert_eq!(RequestId::of(&request), id);
        let mut headers = http::HeaderMap::new();
        id.attach_http(&mut headers);
        assert_eq!(RequestId::from_headers(&headers), id);
        assert_ne!(RequestId::random(), RequestId::random());
    }
}
