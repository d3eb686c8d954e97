//! The OpenAI API as a test speaks to it: JSON in, status, headers and JSON out.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::Cluster;

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body; a JSON text where it is no JSON.
    pub body: Value,
    /// `retry-after`, where there is one.
    pub retry_after: Option<String>,
    /// `x-request-id`.
    pub request_id: Option<String>,
}

impl Answer {
    /// The text of the first choice, chat or not.
    pub fn text(&self) -> &str {
        let choice = &self.body["choices"][0];
        choice["message"]["content"]
            .as_str()
            .or(choice["text"].as_str())
            .unwrap_or("")
    }

    /// Prompt tokens that came from a cache, as OpenAI's usage counts them.
    pub fn cached_tokens(&self) -> u64 {
        self.body["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap_or(0)
    }

    /// `error.message`.
    pub fn error(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or("")
    }
}

impl Cluster {
    /// `POST /v1/chat/completions`, greedy, with the model's name filled in; fields of `request` win.
    ///
    /// # Errors
    /// When nothing answers.
    pub async fn chat(&self, request: Value) -> Result<Answer> {
        self.post("/v1/chat/completions", &self.filled_in(request)).await
    }

    /// `POST /v1/completions`, likewise.
    ///
    /// # Errors
    /// When nothing answers.
    pub async fn complete(&self, request: Value) -> Result<Answer> {
        self.post("/v1/completions", &self.filled_in(request)).await
    }

    /// Posts text as it is, JSON or not.
    ///
    /// # Errors
    /// When nothing answers.
    pub async fn post(&self, path: &str, body: &(impl ToString + ?Sized)) -> Result<Answer> {
        let request = self.client.post(format!("{}{path}", self.router_url()));
        let request = request
            .header("content-type", "application/json")
            .body(body.to_string());
        let response = request
            .send()
            .await
            .with_context(|| format!("nothing answers at {path}"))?;
        let header = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let (status, retry_after, request_id) = (
            response.status().as_u16(),
            header("retry-after"),
            header("x-request-id"),
        );
        let text = response.text().await.context("the answer broke off")?;
        Ok(Answer {
            status,
            body: serde_json::from_str(&text).unwrap_or(Value::String(text)),
            retry_after,
            request_id,
        })
    }

    fn filled_in(&self, request: Value) -> Value {
        let mut filled = json!({"model": self.file().name(), "temperature": 0});
        if let (Some(filled), Value::Object(given)) = (filled.as_object_mut(), request) {
            filled.extend(given);
        }
        filled
    }
}
