//! Reads request fields one by one, so that every mistake is answered with the field's name.
//!
//! [`Fields`] hands out the fields of one JSON object; what is asked for is thereby known, and [`Fields::finish`] refuses
//! the rest with the nearest known name. A JSON `null` means that the field is absent, as OpenAI's clients use it.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::{
    job::{Attention, AttentionMode, Options},
    prompt::Budget,
};

/// The fields of one object of a request.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Path of the object, with a dot at its end; empty for the request itself.
    path: String,
    map: Map<String, Value>,
    known: Vec<&'static str>,
}

/// What both completion routes have in common.
pub(crate) struct Common {
    pub(crate) options: Options,
    pub(crate) budget: Option<Budget>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

/// How alike two names must be (0 to 1) before one is suggested for the other.
const ALIKE_MIN: f64 = 0.6;
/// OpenAI's bound.
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 1024;
const SALT_BYTES_MAX: usize = 256;

impl Fields {
    /// The fields of `value`, which stands at `path` (empty for the request itself).
    pub(crate) fn of(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self {
                path: if path.is_empty() {
                    String::new()
                } else {
                    format!("{path}.")
                },
                map,
                known: Vec::new(),
            }),
            other if path.is_empty() => Err(ApiError::malformed(format!(
                "the request is {}: send a JSON object",
                type_of(&other)
            ))),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// The path of field `name`.
    pub(crate) fn path_of(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// Takes a field as it is; `null` is absent.
    pub(crate) fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a text.
    pub(crate) fn text(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.path_of(name), "a string", &other)),
        }
    }

    /// Takes one of a few texts.
    pub(crate) fn choice(
        &mut self,
        name: &'static str,
        choices: &[&'static str],
    ) -> Result<Option<&'static str>, ApiError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match choices.iter().find(|choice| **choice == text) {
            Some(choice) => Ok(Some(choice)),
            None => {
                let path = self.path_of(name);
                let message = format!("{path} is none of {}", choices.join(", "));
                Err(ApiError::invalid(path, message))
            }
        }
    }

    /// Takes a truth value.
    pub(crate) fn flag(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong_type(&self.path_of(name), "true or false", &other)),
        }
    }

    /// Takes a number in a range.
    pub(crate) fn number(&mut self, name: &'static str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value
            .as_f64()
            .ok_or_else(|| wrong_type(&self.path_of(name), "a number", &value))?;
        if range.contains(&number) {
            Ok(Some(number))
        } else {
            Err(out_of_range(&self.path_of(name), &value, range.start(), range.end()))
        }
    }

    /// Takes a whole number in a range.
    pub(crate) fn count(&mut self, name: &'static str, range: RangeInclusive<u32>) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        if !value.is_i64() && !value.is_u64() {
            return Err(wrong_type(&self.path_of(name), "a whole number", &value));
        }
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        match number {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(out_of_range(&self.path_of(name), &value, range.start(), range.end())),
        }
    }

    /// Fields of the standard that change nothing here: accepted and ignored.
    pub(crate) fn ignore(&mut self, names: &[&'static str]) {
        for name in names {
            self.take(name);
        }
    }

    /// Fields of the standard that would change the answer: accepted only with a value that asks for nothing.
    pub(crate) fn refuse(&mut self, names: &[&'static str], idle: fn(&Value) -> bool) -> Result<(), ApiError> {
        for name in names {
            if let Some(value) = self.take(name)
                && !idle(&value)
            {
                let path = self.path_of(name);
                let message = format!("{path} is not supported by this server: leave it out");
                return Err(ApiError::unsupported(path, message));
            }
        }
        Ok(())
    }

    /// Refuses what was not asked for.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let Some(name) = self.map.keys().next() else {
            return Ok(());
        };
        let name: String = name.chars().take(64).collect();
        let alike = |known: &&&str| strsim::normalized_damerau_levenshtein(&name, known);
        let nearest = self.known.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
        let hint = match nearest.filter(|known| alike(known) >= ALIKE_MIN) {
            Some(known) => format!("did you mean `{}{known}`?", self.path),
            None => "leave it out".to_owned(),
        };
        let path = self.path_of(&name);
        Err(ApiError::unknown(
            path.clone(),
            format!("there is no field `{path}`: {hint}"),
        ))
    }
}

impl Common {
    /// Takes the fields that both routes have, after the route has taken its own.
    pub(crate) fn take(fields: &mut Fields, budget: Option<Budget>) -> Result<Self, ApiError> {
        let stream = fields.flag("stream")?.unwrap_or(false);
        let include_usage = stream_options(fields, stream)?;
        let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0);
        let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
        if top_p == 0.0 {
            let message = "top_p = 0 leaves no token to choose: use temperature = 0 for the most probable one";
            return Err(ApiError::invalid("top_p", message));
        }
        let seed = seed(fields)?;
        let stop = stop(fields)?;
        if fields.count("n", 1..=128)?.is_some_and(|n| n != 1) {
            let message = "n is not supported by this server beyond 1: send the request several times";
            return Err(ApiError::unsupported("n", message));
        }
        fields.refuse(&["frequency_penalty", "presence_penalty"], |value| {
            value.as_f64() == Some(0.0)
        })?;
        fields.refuse(&["logit_bias"], is_empty)?;
        fields.ignore(&["user"]);
        let kvasir = Kvasir::take(fields)?;
        Ok(Self {
            options: Options {
                temperature: temperature as f32,
                top_p: top_p as f32,
                seed,
                stop,
                attention: kvasir.attention,
                cache_salt: kvasir.cache_salt,
                no_cache: kvasir.no_cache,
                ignore_eos: kvasir.ignore_eos,
            },
            budget,
            stream,
            include_usage,
        })
    }
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(value) = fields.take("stream_options") else {
        return Ok(false);
    };
    if !stream {
        let message = "stream_options is for streams only: set stream to true, or leave it out";
        return Err(ApiError::invalid("stream_options", message));
    }
    let mut options = Fields::of("stream_options", value)?;
    let include_usage = options.flag("include_usage")?.unwrap_or(false);
    // Padding against traffic analysis; there is no encryption here that it could help.
    options.flag("include_obfuscation")?;
    options.finish()?;
    Ok(include_usage)
}

/// OpenAI's seeds are signed; the bits are what counts.
fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    match fields.take("seed") {
        None => Ok(None),
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(seed), _) => Ok(Some(seed)),
            (None, Some(seed)) => Ok(Some(seed.cast_unsigned())),
            (None, None) => Err(wrong_type("seed", "a whole number of 64 bits", &value)),
        },
    }
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let texts = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(values)) => values
            .into_iter()
            .enumerate()
            .map(|(index, value)| match value {
                Value::String(text) => Ok(text),
                other => Err(wrong_type(&format!("stop[{index}]"), "a string", &other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", &other)),
    };
    if texts.len() > STOPS_MAX {
        let message = format!("stop has {} texts, at most {STOPS_MAX} are accepted", texts.len());
        return Err(ApiError::invalid("stop", message));
    }
    for (index, text) in texts.iter().enumerate() {
        if text.is_empty() || text.len() > STOP_BYTES_MAX {
            let message = format!(
                "stop text {index} has {} bytes: 1 to {STOP_BYTES_MAX} are accepted",
                text.len()
            );
            return Err(ApiError::invalid("stop", message));
        }
    }
    Ok(texts)
}

/// The request field `kvasir`: this server's own options.
struct Kvasir {
    attention: Attention,
    cache_salt: String,
    no_cache: bool,
    ignore_eos: bool,
}

impl Kvasir {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let value = fields.take("kvasir").unwrap_or_else(|| Value::Object(Map::new()));
        let mut own = Fields::of("kvasir", value)?;
        let mode = match own.text("attention")?.as_deref() {
            None => None,
            Some("full") => Some(AttentionMode::Full),
            Some("rows") => Some(AttentionMode::Rows),
            Some("attend") => Some(AttentionMode::Attend),
            Some("auto") => Some(AttentionMode::Auto),
            Some(_) => {
                let message = "kvasir.attention is none of \"full\", \"rows\", \"attend\" and \"auto\"";
                return Err(ApiError::invalid("kvasir.attention", message));
            }
        };
        let target_mass = own.number("target_mass", 0.0..=1.0)?;
        if target_mass == Some(0.0) {
            let message = "kvasir.target_mass must be above 0: it is the share of the attention that is wanted";
            return Err(ApiError::invalid("kvasir.target_mass", message));
        }
        let attention = Attention {
            mode,
            k: own.count("k", 1..=u32::MAX)?,
            target_mass: target_mass.map(|mass| mass as f32),
            sink: own.count("sink", 0..=u32::MAX)?,
            window: own.count("window", 0..=u32::MAX)?,
            index: own.choice("index", &["best", "flat", "sketch"])?,
            tail: own.flag("tail")?,
            certificate: own.choice("certificate", &["none", "statistical", "deterministic"])?,
            missed_mass_max: own.number("missed_mass_max", 0.0..=1.0)?.map(|mass| mass as f32),
            effort: own.number("effort", 0.0..=1.0)?.map(|share| share as f32),
        };
        let cache_salt = own.text("cache_salt")?.unwrap_or_default();
        if cache_salt.len() > SALT_BYTES_MAX {
            let message = format!(
                "kvasir.cache_salt has {} bytes, at most {SALT_BYTES_MAX} are accepted",
                cache_salt.len()
            );
            return Err(ApiError::invalid("kvasir.cache_salt", message));
        }
        let no_cache = own.flag("no_cache")?.unwrap_or(false);
        let ignore_eos = own.flag("ignore_eos")?.unwrap_or(false);
        own.finish()?;
        Ok(Self {
            attention,
            cache_salt,
            no_cache,
            ignore_eos,
        })
    }
}

/// An empty array, object or text.
pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// The error that the field at `path` has a value of the wrong type. The value itself is not repeated.
pub(crate) fn wrong_type(path: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::invalid(path, format!("{path} must be {expected}, and it is {}", type_of(found)))
}

fn out_of_range(path: &str, found: &Value, least: &impl std::fmt::Display, most: &impl std::fmt::Display) -> ApiError {
    ApiError::invalid(
        path,
        format!("{path} is {found}, and it must be from {least} to {most}"),
    )
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(number) if number.is_f64() => "a number with a fraction",
        Value::Number(_) => "a whole number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
