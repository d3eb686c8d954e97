//! A client of the OpenAI API that keeps time.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};

/// Asks one router.
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    model: String,
}

/// A streamed answer and its times.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    /// From sending the request to the first piece of text.
    pub(super) ttft_ms: f64,
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) kvasir: Kvasir,
}

/// What the server says about the request's KV: the `kvasir` field of the last piece.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Kvasir {
    pub(super) cached_tokens: u64,
    pub(super) cached_tokens_device: u64,
    pub(super) cached_tokens_store: u64,
    pub(super) fell_back: bool,
    pub(super) reason: Option<String>,
    pub(super) keys_scanned: u64,
    pub(super) keys_total: u64,
    pub(super) keys_attended: u64,
    pub(super) mass_covered_p50: f64,
    pub(super) mass_covered_min: f64,
    pub(super) index: Option<String>,
    pub(super) search_hidden: f64,
    pub(super) rows: u64,
    pub(super) rows_kept: u64,
    pub(super) retrieved_bytes: u64,
    pub(super) queue_ms: f64,
    pub(super) prefill_ms: f64,
    pub(super) decode_ms: f64,
}

impl Client {
    pub(super) fn new(base: &str, model: &str) -> Self {
        Self {
            http: reqwest::Client::new(),
            base: base.to_owned(),
            model: model.to_owned(),
        }
    }

    /// Asks greedily and reads the stream to its end.
    pub(super) async fn ask(&self, messages: &Value, max_tokens: u32, kvasir: &Value) -> Result<Answer> {
        let request = json!({
            "model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0,
            "stream": true, "stream_options": {"include_usage": true}, "kvasir": kvasir,
        });
        let url = format!("{}/v1/chat/completions", self.base);
        let sent = Instant::now();
        let response = self
            .http
            .post(&url)
            .json(&request)
            .send()
            .await
            .with_context(|| format!("cannot reach {url}"))?;
        let status = response.status();
        if !status.is_success() {
            let body = response.text().await.unwrap_or_default();
            bail!("{url} answered {status}: {}", message_of(&body));
        }
        let mut reader = Reader::default();
        let mut body = response.bytes_stream();
        while let Some(bytes) = body.next().await {
            reader.read(&bytes.context("the answer broke off")?, sent)?;
        }
        reader.finish()
    }
}

/// The words of an error in OpenAI's shape, or the body as it is.
fn message_of(body: &str) -> String {
    let parsed: Option<Value> = serde_json::from_str(body).ok();
    let message = parsed
        .as_ref()
        .and_then(|error| error.pointer("/error/message"))
        .and_then(Value::as_str);
    message.unwrap_or(body).to_owned()
}

/// Puts a stream of server-sent events together.
#[derive(Default)]
struct Reader {
    unread: Vec<u8>,
    text: String,
    ttft_ms: Option<f64>,
    usage: Option<(u64, u64)>,
    kvasir: Option<Kvasir>,
    done: bool,
}

impl Reader {
    fn read(&mut self, bytes: &[u8], sent: Instant) -> Result<()> {
        self.unread.extend_from_slice(bytes);
        while let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            // Anything else is an empty line between events, or a comment that keeps the connection.
            if let Some(data) = line.strip_prefix("data: ") {
                self.event(data.trim(), sent)?;
            }
        }
        Ok(())
    }

    fn event(&mut self, data: &str, sent: Instant) -> Result<()> {
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Value = serde_json::from_str(data).context("a piece of the answer is not JSON")?;
        if event.get("error").is_some() {
            bail!("the answer ended with an error: {}", message_of(data));
        }
        let piece = event
            .pointer("/choices/0/delta/content")
            .and_then(Value::as_str)
            .unwrap_or("");
        if !piece.is_empty() {
            self.ttft_ms.get_or_insert_with(|| sent.elapsed().as_secs_f64() * 1e3);
            self.text.push_str(piece);
        }
        let count = |name: &str| event.pointer(&format!("/usage/{name}")).and_then(Value::as_u64);
        if let (Some(prompt), Some(completion)) = (count("prompt_tokens"), count("completion_tokens")) {
            self.usage = Some((prompt, completion));
        }
        if let Some(kvasir) = event.get("kvasir").filter(|kvasir| kvasir.is_object()) {
            self.kvasir = Some(Kvasir::deserialize(kvasir).context("the `kvasir` field is not as documented")?);
        }
        Ok(())
    }

    fn finish(self) -> Result<Answer> {
        if !self.done {
            bail!("the answer ended without [DONE]");
        }
        let (prompt_tokens, completion_tokens) = self.usage.context("the answer has no usage")?;
        Ok(Answer {
            text: self.text,
            ttft_ms: self.ttft_ms.context("the answer has no text")?,
            prompt_tokens,
            completion_tokens,
            kvasir: self
                .kvasir
                .context("the answer has no `kvasir` field: is it Kvasir that listens there?")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_put_together_wherever_they_are_cut() {
        let stream = concat!(
            ": a comment\n\n",
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}],\"usage\":null}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"two \\u00e4\"}}],\"usage\":null}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\" words\"}}],\"usage\":null}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2},\"kvasir\":{\"cached_tokens_store\":64,\"reason\":null}}\n\n",
            "data: [DONE]\n\n",
        );
        for cut in 1..stream.len() {
            let mut reader = Reader::default();
            for part in stream.as_bytes().chunks(cut) {
                reader.read(part, Instant::now()).expect("a good stream");
            }
            let answer = reader.finish().expect("a whole stream");
            assert_eq!(answer.text, "two ä words", "cut at {cut}");
            assert_eq!((answer.prompt_tokens, answer.completion_tokens), (7, 2));
            assert_eq!(answer.kvasir.cached_tokens_store, 64);
        }
    }

    #[test]
    fn broken_streams_are_errors() {
        let table = [
            ("data: {\"choices\":[]}\n\n", "without [DONE]"),
            ("data: [DONE]\n\n", "no usage"),
            (
                "data: {\"error\":{\"message\":\"the worker left\"}}\n\n",
                "the worker left",
            ),
            ("data: {\n\n", "not JSON"),
        ];
        for (stream, expected) in table {
            let mut reader = Reader::default();
            let read = reader.read(stream.as_bytes(), Instant::now());
            let error = read.and_then(|()| reader.finish().map(drop)).expect_err(stream);
            assert!(error.to_string().contains(expected), "{stream}: {error}");
        }
    }
}
