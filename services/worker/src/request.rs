//! A request at the door: what was asked, checked against what this worker can do, before any work.

use kvasir_model::{InvalidSampling, Sampling};
use kvasir_runtime::request_id::RequestId;

use crate::config::{AttentionConfig, AttentionMode, Certificate, IndexWanted};

/// A request as it came: nothing checked, absent where the caller left a field out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: Option<u32>,
    /// `None` is greedy.
    pub(crate) sampling: Option<AskedSampling>,
    pub(crate) stop: Vec<String>,
    pub(crate) attention: AskedAttention,
    pub(crate) cache_salt: String,
    pub(crate) no_cache: bool,
    pub(crate) forced: Vec<u32>,
    pub(crate) ignore_eos: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct AskedSampling {
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct AskedAttention {
    pub(crate) mode: Option<AttentionMode>,
    pub(crate) k: Option<u32>,
    pub(crate) target_mass: Option<f32>,
    pub(crate) sink: Option<u32>,
    pub(crate) window: Option<u32>,
    pub(crate) index: Option<IndexWanted>,
    pub(crate) tail: Option<bool>,
    pub(crate) certificate: Option<Certificate>,
    pub(crate) missed_mass_max: Option<f32>,
    pub(crate) effort: Option<f32>,
}

/// What this worker can do.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) vocab: usize,
    pub(crate) context_tokens_max: usize,
    pub(crate) block_tokens: usize,
    /// Pages of the pool.
    pub(crate) pages: usize,
    /// New tokens where the request does not say.
    pub(crate) max_tokens: usize,
    pub(crate) attention: AttentionConfig,
}

/// A request that can be computed.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    pub(crate) prompt: Vec<u32>,
    /// At least 1; prompt and new tokens fit the window and the pool.
    pub(crate) max_tokens: usize,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
    pub(crate) attention: Attention,
    pub(crate) cache_salt: String,
    pub(crate) no_cache: bool,
    /// Whether all of the prompt is to attend densely, where the worker would not: who asks for `full` by name gets it.
    pub(crate) dense_prefill: bool,
    /// Empty, or one token for each of `max_tokens`.
    pub(crate) forced: Vec<u32>,
    pub(crate) ignore_eos: bool,
}

/// Attention options with every default filled in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Attention {
    pub(crate) mode: AttentionMode,
    /// Keys per query head that `rows` brings.
    pub(crate) k: u32,
    /// Most keys per query head of `attend`, where the request set a bound; else 0.
    pub(crate) k_max: u32,
    pub(crate) target_mass: f32,
    pub(crate) sink: usize,
    pub(crate) window: usize,
    pub(crate) index: IndexWanted,
    pub(crate) tail: bool,
    pub(crate) certificate: Certificate,
    /// 0 for any.
    pub(crate) missed_mass_max: f32,
    /// 0 for the store's default.
    pub(crate) effort: f32,
}

/// A request that is refused; both messages say what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub(crate) struct Refusal {
    pub(crate) field: &'static str,
    pub(crate) problem: String,
}

fn refuse<T>(field: &'static str, problem: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal {
        field,
        problem: problem.into(),
    })
}

const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;
const SALT_BYTES_MAX: usize = 1024;

impl Request {
    /// Checks `asked`; `seed` is taken where the caller gave none.
    pub(crate) fn check(id: RequestId, asked: Asked, limits: &Limits, seed: u64) -> Result<Self, Refusal> {
        check_tokens("prompt", &asked.prompt, limits.vocab)?;
        check_tokens("forced", &asked.forced, limits.vocab)?;
        let max_tokens = max_tokens(&asked, limits)?;
        let sampling = sampling(asked.sampling, seed)?;
        check_stops(&asked.stop)?;
        if asked.cache_salt.len() > SALT_BYTES_MAX {
            let problem = format!("{} bytes, at most {SALT_BYTES_MAX}", asked.cache_salt.len());
            return refuse("cache_salt", problem);
        }
        let attention = attention(&asked.attention, &limits.attention)?;
        if asked.no_cache && attention.mode != AttentionMode::Full {
            let problem = format!(
                "{} retrieves from the store, and no_cache forbids it: leave one of them out",
                attention.mode.name()
            );
            return refuse("attention.mode", problem);
        }
        let dense_prefill = asked.attention.mode == Some(AttentionMode::Full);
        let mut forced = asked.forced;
        forced.truncate(max_tokens);
        Ok(Self {
            id,
            prompt: asked.prompt,
            max_tokens,
            sampling,
            stop: asked.stop,
            attention,
            cache_salt: asked.cache_salt,
            no_cache: asked.no_cache,
            dense_prefill,
            forced,
            ignore_eos: asked.ignore_eos,
        })
    }

    /// Pages for the prompt and all new tokens.
    pub(crate) fn pages(&self, block_tokens: usize) -> usize {
        (self.prompt.len() + self.max_tokens).div_ceil(block_tokens)
    }
}

fn check_tokens(field: &'static str, tokens: &[u32], vocab: usize) -> Result<(), Refusal> {
    if field == "prompt" && tokens.is_empty() {
        return refuse(field, "empty: send at least one token");
    }
    match tokens.iter().position(|token| *token as usize >= vocab) {
        // The id itself is content and stays out of errors, which are logged.
        Some(at) => refuse(
            field,
            format!(
                "the token at index {at} is not in the vocabulary of {vocab}: tokenise with this model's tokenizer"
            ),
        ),
        None => Ok(()),
    }
}

fn max_tokens(asked: &Asked, limits: &Limits) -> Result<usize, Refusal> {
    let prompt = asked.prompt.len();
    let window = limits.context_tokens_max;
    if prompt + 1 > window {
        let problem = format!(
            "{prompt} tokens and one new token do not fit the context window of {window}: shorten the prompt to {} tokens",
            window.saturating_sub(1)
        );
        return refuse("prompt", problem);
    }
    let pool = limits.pages * limits.block_tokens;
    if prompt + 1 > pool {
        let problem = format!(
            "{prompt} tokens and one new token do not fit the page pool of {pool} tokens: shorten the prompt or raise worker.kv_bytes_max"
        );
        return refuse("prompt", problem);
    }
    let wanted = asked.max_tokens.map(|n| n as usize).filter(|n| *n > 0);
    let forced = (!asked.forced.is_empty()).then_some(asked.forced.len());
    let explicit = match (wanted, forced) {
        (Some(wanted), Some(forced)) => Some(wanted.min(forced)),
        (one, other) => one.or(other),
    };
    // The window ends every generation, as a caller expects; the pool is this worker's affair, so a wish that it cannot
    // hold is refused rather than cut short in silence.
    let room = window - prompt;
    match explicit {
        Some(n) if prompt + n.min(room) > pool => {
            let problem = format!(
                "{prompt} prompt tokens and {} new ones do not fit the page pool of {pool} tokens: ask for at most {} or raise worker.kv_bytes_max",
                n.min(room),
                pool - prompt
            );
            refuse("max_tokens", problem)
        }
        Some(n) => Ok(n.min(room)),
        None => Ok(limits.max_tokens.min(room).min(pool - prompt)),
    }
}

fn sampling(asked: Option<AskedSampling>, seed: u64) -> Result<Sampling, Refusal> {
    let Some(asked) = asked else {
        return Ok(Sampling {
            seed,
            ..Sampling::greedy()
        });
    };
    let sampling = Sampling {
        temperature: asked.temperature,
        top_p: asked.top_p,
        seed: asked.seed.unwrap_or(seed),
    };
    match sampling.validate() {
        Ok(()) => Ok(sampling),
        Err(InvalidSampling { field, found, expected }) => {
            let field = if field == "top_p" {
                "sampling.top_p"
            } else {
                "sampling.temperature"
            };
            refuse(field, format!("{found}: must be {expected}"))
        }
    }
}

fn check_stops(stops: &[String]) -> Result<(), Refusal> {
    if stops.len() > STOPS_MAX {
        return refuse("stop", format!("{} stop strings, at most {STOPS_MAX}", stops.len()));
    }
    if stops.iter().any(String::is_empty) {
        return refuse("stop", "an empty stop string would stop everything: leave it out");
    }
    match stops.iter().find(|stop| stop.len() > STOP_BYTES_MAX) {
        Some(stop) => refuse(
            "stop",
            format!("a stop string of {} bytes, at most {STOP_BYTES_MAX}", stop.len()),
        ),
        None => Ok(()),
    }
}

fn attention(asked: &AskedAttention, default: &AttentionConfig) -> Result<Attention, Refusal> {
    let mut filled = AttentionConfig {
        mode: asked.mode.unwrap_or(default.mode),
        k: asked.k.unwrap_or(default.k),
        target_mass: asked.target_mass.unwrap_or(default.target_mass),
        sink: asked.sink.unwrap_or(default.sink),
        window: asked.window.unwrap_or(default.window),
        index: asked.index.unwrap_or(default.index),
        tail: asked.tail.unwrap_or(default.tail),
        certificate: asked.certificate.unwrap_or(default.certificate),
        missed_mass_max: asked.missed_mass_max.unwrap_or(default.missed_mass_max),
        effort: asked.effort.unwrap_or(default.effort),
        ..*default
    };
    if filled.certificate == Certificate::None && asked.missed_mass_max.is_none() {
        // Who asks for no certificate asks for no bound either.
        filled.missed_mass_max = 0.0;
    }
    if let Some((key, problem)) = filled.problem() {
        return refuse(field_of(key), problem);
    }
    Ok(Attention {
        mode: filled.mode,
        k: filled.k,
        k_max: asked.k.unwrap_or(0),
        target_mass: filled.target_mass,
        sink: filled.sink as usize,
        window: filled.window as usize,
        index: filled.index,
        tail: filled.tail,
        certificate: filled.certificate,
        missed_mass_max: filled.missed_mass_max,
        effort: filled.effort,
    })
}

/// The path of an attention option, as errors name it.
fn field_of(key: &str) -> &'static str {
    match key {
        "target_mass" => "attention.target_mass",
        "k" => "attention.k",
        "missed_mass_max" => "attention.missed_mass_max",
        "effort" => "attention.effort",
        _ => "attention",
    }
}

#[cfg(test)]
mod tests;
