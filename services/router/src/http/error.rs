//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. Messages say what, why and what to do, and
//! never repeat a prompt.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use crate::{admission::Full, dispatch::DispatchError, prompt::PromptError};

/// An error that a client sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: &'static str,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
    code: Option<&'static str>,
    retry_after_secs: Option<u64>,
}

/// The body.
#[derive(Serialize)]
pub(crate) struct Body<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code,
            retry_after_secs: None,
        }
    }

    /// 400: the request is wrong; `param` is the field.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::malformed(message)
        }
    }

    /// 400: the request is wrong as a whole.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// 400: a standard field that this server has no answer to.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: Some("unsupported_parameter"),
            ..Self::invalid(param, message)
        }
    }

    /// 400: a field that no one knows.
    pub(crate) fn unknown(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: Some("unknown_parameter"),
            ..Self::invalid(param, message)
        }
    }

    /// 404: another model.
    pub(crate) fn no_such_model(asked: &str, served: &str) -> Self {
        // Names are echoed, but not whatever someone put in their place.
        let asked: String = asked.chars().take(100).collect();
        Self {
            status: StatusCode::NOT_FOUND,
            code: Some("model_not_found"),
            ..Self::invalid(
                "model",
                format!("there is no model {asked:?} here: this server serves {served:?}"),
            )
        }
    }

    /// 404: another path.
    pub(crate) fn no_such_path(method: &str, path: &str) -> Self {
        let path: String = path.chars().take(100).collect();
        let message = format!(
            "there is no {method} {path} here: this server has POST /v1/chat/completions, POST /v1/completions, GET \
             /v1/models and GET /v1/models/{{id}}"
        );
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("unknown_url"),
            message,
        )
    }

    /// 405.
    pub(crate) fn no_such_method(method: &str, path: &str) -> Self {
        let path: String = path.chars().take(100).collect();
        let message = format!("{path} does not answer to {method}: use POST for completions and GET for models");
        let status = StatusCode::METHOD_NOT_ALLOWED;
        Self::new(status, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// 413.
    pub(crate) fn too_large(bytes_max: usize) -> Self {
        let message = format!(
            "the request body has more than {bytes_max} bytes: send less, or raise router.body_bytes_max on the server"
        );
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        Self::new(status, "invalid_request_error", Some("request_too_large"), message)
    }

    /// 415.
    pub(crate) fn not_json(content_type: &str) -> Self {
        let content_type: String = content_type.chars().take(100).collect();
        let message =
            format!("the body is declared as {content_type:?}: send JSON with content-type: application/json");
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        Self::new(status, "invalid_request_error", Some("unsupported_media_type"), message)
    }

    /// 408: the body did not come.
    pub(crate) fn slow_body(within: std::time::Duration) -> Self {
        let message = format!("the request body did not arrive within {within:?}: send it again");
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            Some("request_timeout"),
            message,
        )
    }

    /// 429, to be tried again later.
    pub(crate) fn busy(message: impl Into<String>, retry_after_secs: u64) -> Self {
        let status = StatusCode::TOO_MANY_REQUESTS;
        Self {
            retry_after_secs: Some(retry_after_secs),
            ..Self::new(status, "rate_limit_error", Some("rate_limit_exceeded"), message)
        }
    }

    /// 429 because this router is full.
    pub(crate) fn full(full: Full, retry_after_secs: u64) -> Self {
        let message = format!(
            "this server has {} prompts in flight, its most: try again in {retry_after_secs} s",
            full.max
        );
        Self::busy(message, retry_after_secs)
    }

    fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            retry_after_secs: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some(code), message)
        }
    }

    /// The error's code, for logs.
    pub(crate) fn code(&self) -> &'static str {
        self.code.unwrap_or(self.kind)
    }

    /// The body, for a stream that has begun and can change its status no more.
    pub(crate) fn body(&self) -> Body<'_> {
        Body {
            error: Inner {
                message: &self.message,
                r#type: self.kind,
                param: self.param.as_deref(),
                code: self.code,
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_secs {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<DispatchError> for ApiError {
    fn from(error: DispatchError) -> Self {
        let message = error.to_string();
        match error {
            DispatchError::NoWorker(_) => Self::unavailable("no_worker", message),
            DispatchError::Stopping => Self::unavailable("stopping", format!("{message}: try again, or elsewhere")),
            DispatchError::Busy { retry_after_secs, .. } => Self::busy(message, retry_after_secs),
            DispatchError::Refused(_) => Self::malformed(message),
            DispatchError::FirstTokenLate(_) | DispatchError::Silent(_) => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                Some("timeout"),
                format!(
                    "{message}: try again, or raise router.first_token_timeout or router.idle_timeout on the server"
                ),
            ),
            DispatchError::Failed(_) => Self::new(
                StatusCode::BAD_GATEWAY,
                "server_error",
                Some("worker_failed"),
                format!("{message}: try again"),
            ),
        }
    }
}

impl PromptError {
    /// As an error of the field `param`.
    pub(crate) fn of(self, param: &str) -> ApiError {
        let error = ApiError::invalid(param, self.to_string());
        match self {
            Self::TooLong { .. } | Self::NoRoom { .. } => ApiError {
                code: Some("context_length_exceeded"),
                ..error
            },
            Self::Interrupted => ApiError::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "server_error",
                None,
                format!("{}: try again", self),
            ),
            _ => error,
        }
    }
}
