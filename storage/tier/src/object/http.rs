//! What we put between the client library and its HTTP client: statuses become failures of a kind, and answers that are
//! not blocks have a bound before they are read.
//!
//! The library would retry by itself and show only text; here a bad status is an error that carries its kind
//! ([`BadStatus`]), and retrying is this tier's business, since it knows the caller's deadline.

use std::{future::Future, pin::Pin};

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
        ReqwestConnector,
    },
};

use super::failure::{BadStatus, ObjectFailure};

/// Most bytes of an error page; services send about 500.
const ERROR_BODY_BYTES_MAX: usize = 16 << 10;
/// Most bytes of a page of a listing: 1,000 keys of at most 1 KiB, with their tags.
const PAGE_BYTES_MAX: usize = 8 << 20;

/// Makes HTTP clients that answer with kinds.
#[derive(Debug, Default)]
pub(super) struct Connector(ReqwestConnector);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Watched(self.0.connect(options)?)))
    }
}

#[derive(Debug)]
struct Watched(HttpClient);

impl HttpService for Watched {
    fn call<'s, 'f>(
        &'s self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'f>>
    where
        's: 'f,
        Self: 'f,
    {
        Box::pin(async move {
            let is_object =
                request.method() == "GET" && !request.uri().query().is_some_and(|q| q.contains("list-type="));
            let response = self.0.execute(request).await?;
            let (parts, body) = response.into_parts();
            let status = parts.status.as_u16();
            if parts.status.is_success() {
                if is_object {
                    return Ok(HttpResponse::from_parts(parts, body));
                }
                let body = collect(body, PAGE_BYTES_MAX).await?;
                return Ok(HttpResponse::from_parts(parts, body.into()));
            }
            // An error page that cannot be read changes nothing about the error.
            let page = collect(body, ERROR_BODY_BYTES_MAX).await.unwrap_or_default();
            match ObjectFailure::of_status(status, &page) {
                None => Ok(HttpResponse::from_parts(parts, page.into())),
                Some(failure) => Err(HttpError::new(HttpErrorKind::Unknown, BadStatus { status, failure })),
            }
        })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("an answer of more than {0} bytes, where a page was expected")]
struct TooLong(usize);

async fn collect(body: HttpResponseBody, bytes_max: usize) -> Result<Bytes, HttpError> {
    let mut pieces = body.bytes_stream();
    let mut whole = BytesMut::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        if whole.len() + piece.len() > bytes_max {
            return Err(HttpError::new(HttpErrorKind::Unknown, TooLong(bytes_max)));
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.freeze())
}
