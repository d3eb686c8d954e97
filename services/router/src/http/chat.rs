//! `POST /v1/chat/completions`: what is read from its body.

use kvasir_model::ChatMessage;
use serde_json::Value;

use super::{
    Parsed,
    error::ApiError,
    params::{Common, Fields, is_empty, wrong_type},
};
use crate::prompt::{Budget, Source};

/// Most messages of one request; far beyond what a window holds.
const MESSAGES_MAX: usize = 65_536;

/// Reads the request.
pub(crate) fn parse(body: Value) -> Result<Parsed, ApiError> {
    let mut fields = Fields::of("", body)?;
    let model = fields.text("model")?;
    let messages = fields.take("messages");
    let budget = budget(&mut fields)?;
    fields.refuse(&["tools", "functions"], is_empty)?;
    fields.refuse(&["tool_choice", "function_call"], |value| {
        value == "none" || value == "auto"
    })?;
    fields.refuse(&["logprobs"], |value| value == &Value::Bool(false))?;
    fields.refuse(&["top_logprobs"], |value| value.as_u64() == Some(0))?;
    fields.refuse(&["response_format"], |value| {
        value.get("type").is_some_and(|kind| kind == "text")
    })?;
    fields.refuse(&["modalities"], |value| value == &serde_json::json!(["text"]))?;
    fields.refuse(&["store"], |value| value == &Value::Bool(false))?;
    fields.refuse(&["reasoning_effort"], |value| value == "none")?;
    fields.refuse(&["audio", "prediction", "web_search_options"], |_| false)?;
    fields.ignore(&[
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "verbosity",
    ]);
    let common = Common::take(&mut fields, budget)?;
    fields.finish()?;
    let messages = match messages {
        None => {
            return Err(ApiError::invalid(
                "messages",
                "messages is missing: send at least one message",
            ));
        }
        Some(Value::Array(messages)) if messages.is_empty() => {
            return Err(ApiError::invalid(
                "messages",
                "messages is empty: send at least one message",
            ));
        }
        Some(Value::Array(messages)) if messages.len() > MESSAGES_MAX => {
            let message = format!("{} messages, at most {MESSAGES_MAX} are accepted", messages.len());
            return Err(ApiError::invalid("messages", message));
        }
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong_type("messages", "an array", &other)),
    };
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(index, value)| message(index, value));
    Ok(Parsed {
        model,
        sources: vec![Source::Chat(messages.collect::<Result<_, _>>()?)],
        prompt_field: "messages",
        budget: common.budget.unwrap_or(Budget::Worker),
        options: common.options,
        stream: common.stream,
        include_usage: common.include_usage,
    })
}

fn budget(fields: &mut Fields) -> Result<Option<Budget>, ApiError> {
    let current = fields.count("max_completion_tokens", 1..=u32::MAX)?;
    let former = fields.count("max_tokens", 1..=u32::MAX)?;
    match (current, former) {
        (Some(a), Some(b)) if a != b => Err(ApiError::invalid(
            "max_tokens",
            "max_tokens and max_completion_tokens differ: max_tokens is the former name, send max_completion_tokens only",
        )),
        (current, former) => Ok(current.or(former).map(Budget::Asked)),
    }
}

fn message(index: usize, value: Value) -> Result<ChatMessage, ApiError> {
    let path = format!("messages[{index}]");
    let mut fields = Fields::of(&path, value)?;
    let role = match fields.text("role")?.as_deref() {
        // OpenAI's newer name for the same thing; templates know the older one.
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => {
            let message = format!("{path}.role: this server supports no tools, so there can be no answer of one");
            return Err(ApiError::unsupported(format!("{path}.role"), message));
        }
        Some(_) => {
            let message = format!("{path}.role is none of \"system\", \"developer\", \"user\" and \"assistant\"");
            return Err(ApiError::invalid(format!("{path}.role"), message));
        }
        None => {
            let message = format!("{path}.role is missing: send \"system\", \"developer\", \"user\" or \"assistant\"");
            return Err(ApiError::invalid(format!("{path}.role"), message));
        }
    };
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => content(&path, parts)?,
        Some(other) => {
            let path = format!("{path}.content");
            return Err(wrong_type(&path, "a string or an array of parts", &other));
        }
        None => {
            let message = format!("{path}.content is missing: send a string, or an array of text parts");
            return Err(ApiError::invalid(format!("{path}.content"), message));
        }
    };
    // Clients send answers back as they got them, empty fields and all.
    fields.refuse(
        &["tool_calls", "function_call", "audio", "refusal", "tool_call_id"],
        is_empty,
    )?;
    fields.ignore(&["annotations", "name"]);
    fields.finish()?;
    Ok(ChatMessage {
        role: role.to_owned(),
        content,
    })
}

/// Text parts, joined by line breaks, as vLLM joins them.
fn content(path: &str, parts: Vec<Value>) -> Result<String, ApiError> {
    let texts = parts.into_iter().enumerate().map(|(index, part)| {
        let path = format!("{path}.content[{index}]");
        let mut fields = Fields::of(&path, part)?;
        match fields.text("type")?.as_deref() {
            Some("text") => {}
            Some("image_url" | "input_audio" | "file" | "refusal") => {
                let message = format!("{path}.type: this server reads text only");
                return Err(ApiError::unsupported(format!("{path}.type"), message));
            }
            _ => {
                let message = format!("{path}.type is not \"text\", the only kind of part that this server reads");
                return Err(ApiError::invalid(format!("{path}.type"), message));
            }
        }
        let text = fields.text("text")?;
        fields.finish()?;
        text.ok_or_else(|| ApiError::invalid(format!("{path}.text"), format!("{path}.text is missing")))
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}
