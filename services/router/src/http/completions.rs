//! `POST /v1/completions`: what is read from its body.

use serde_json::Value;

use super::{
    Parsed,
    error::ApiError,
    params::{Common, Fields, is_empty, wrong_type},
};
use crate::prompt::{Budget, Source};

/// What OpenAI generates when a request does not say how many tokens.
const TOKENS_DEFAULT: u32 = 16;

/// Reads the request, which may have `prompts_max` prompts.
pub(crate) fn parse(body: Value, prompts_max: usize) -> Result<Parsed, ApiError> {
    let mut fields = Fields::of("", body)?;
    let model = fields.text("model")?;
    let prompt = fields.take("prompt");
    let budget = fields.count("max_tokens", 1..=u32::MAX)?.map(Budget::Asked);
    fields.refuse(&["best_of"], |value| value.as_u64() == Some(1))?;
    fields.refuse(&["echo"], |value| value == &Value::Bool(false))?;
    fields.refuse(&["logprobs"], |_| false)?;
    fields.refuse(&["suffix"], is_empty)?;
    let common = Common::take(&mut fields, budget)?;
    fields.finish()?;
    let sources = match prompt {
        None => {
            return Err(ApiError::invalid(
                "prompt",
                "prompt is missing: send a string, or an array of token ids",
            ));
        }
        Some(prompt) => sources(prompt, prompts_max)?,
    };
    Ok(Parsed {
        model,
        sources,
        prompt_field: "prompt",
        budget: common.budget.unwrap_or(Budget::AtMost(TOKENS_DEFAULT)),
        options: common.options,
        stream: common.stream,
        include_usage: common.include_usage,
    })
}

/// The four forms: a text, several texts, token ids, several lists of token ids.
fn sources(prompt: Value, prompts_max: usize) -> Result<Vec<Source>, ApiError> {
    let expected = "a string, an array of strings, an array of token ids, or an array of such arrays";
    let values = match prompt {
        Value::String(text) => return Ok(vec![Source::Text(text)]),
        Value::Array(values) => values,
        other => return Err(wrong_type("prompt", expected, &other)),
    };
    match values.first() {
        None => return Err(ApiError::invalid("prompt", "prompt is empty: send at least one token")),
        Some(Value::Number(_)) => return Ok(vec![Source::Tokens(ids("prompt", &values)?)]),
        Some(_) => {}
    }
    if values.len() > prompts_max {
        let message = format!(
            "{} prompts, at most {prompts_max} are accepted in one request: send several requests",
            values.len()
        );
        return Err(ApiError::invalid("prompt", message));
    }
    let sources = values.into_iter().enumerate().map(|(index, value)| match value {
        Value::String(text) => Ok(Source::Text(text)),
        Value::Array(values) => Ok(Source::Tokens(ids(&format!("prompt[{index}]"), &values)?)),
        other => Err(wrong_type(
            &format!("prompt[{index}]"),
            "a string or an array of token ids",
            &other,
        )),
    });
    sources.collect()
}

fn ids(path: &str, values: &[Value]) -> Result<Vec<u32>, ApiError> {
    let ids = values.iter().enumerate().map(|(index, value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong_type(&format!("{path}[{index}]"), "a token id, a whole number from 0", value))
    });
    ids.collect()
}
