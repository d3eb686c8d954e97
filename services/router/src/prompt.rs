//! From messages, text or ids to a prompt that fits, with the names of its blocks.
//!
//! What a worker will hash, the router hashes first, so one component decides what the prompt is. Long text leaves the
//! async threads by one door, [`prepare`]; how many go through it at once is bounded by the places of `admission`.

use std::{
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use kvasir_block::{BlockHash, ExtraKeys, KvSchema, block_hashes};
use kvasir_model::{ChatMessage, ModelFile};

use crate::metrics;

/// The model that this router serves.
pub(crate) struct Served {
    file: Arc<ModelFile>,
    /// Its name in requests.
    pub(crate) name: String,
    /// Identity of its blocks; workers must have the same.
    pub(crate) schema: KvSchema,
    /// Tokens of prompt and answer together.
    pub(crate) context_tokens_max: usize,
    /// OpenAI's `system_fingerprint`: what would change the answer.
    pub(crate) fingerprint: String,
    /// Seconds since 1970: when this router began to serve it.
    pub(crate) created: u64,
}

/// What a prompt is made from.
pub(crate) enum Source {
    /// Rendered by the model's chat template.
    Chat(Vec<ChatMessage>),
    /// Taken as it is.
    Text(String),
    /// Tokenised by the caller.
    Tokens(Vec<u32>),
}

/// A prompt that can be sent.
pub(crate) struct Prepared {
    pub(crate) tokens: Arc<[u32]>,
    /// Names of its whole blocks.
    pub(crate) chain: Arc<[BlockHash]>,
    /// Tokens that may be generated; `None` leaves it to the worker.
    pub(crate) max_tokens: Option<u32>,
}

/// How many tokens may be generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    /// The caller's number: more than fits is refused.
    Asked(u32),
    /// This API's number: cut to what fits.
    AtMost(u32),
    /// The worker's own number.
    Worker,
}

/// Why there is no prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PromptError {
    #[error("the prompt is empty: send at least one token")]
    Empty,
    #[error(
        "this model's context window is {window} tokens, but the prompt has {prompt} and leaves no room for an answer: \
         shorten it"
    )]
    TooLong { prompt: usize, window: usize },
    #[error(
        "this model's context window is {window} tokens, but {requested} were requested ({prompt} in the prompt, {asked} \
         in the answer): shorten the prompt or ask for fewer tokens"
    )]
    NoRoom {
        prompt: usize,
        asked: u32,
        requested: usize,
        window: usize,
    },
    #[error(
        "the token at index {index} of the prompt is not in the vocabulary of {vocab}: tokenise with this model's tokenizer"
    )]
    UnknownToken { index: usize, vocab: usize },
    #[error("this model has no chat template: use /v1/completions")]
    NoTemplate,
    #[error("the chat template refused the messages: {0}")]
    Template(String),
    #[error("the prompt cannot be tokenised: {0}")]
    Tokenize(String),
    #[error("the thread that tokenised the prompt ended early")]
    Interrupted,
}

/// Text up to this size is tokenised in place: it takes less time than going to another thread and back is worth.
const IN_PLACE_BYTES_MAX: usize = 2048;

impl Served {
    /// The model in `file`, with blocks of `block_tokens`.
    pub(crate) fn new(file: Arc<ModelFile>, block_tokens: u16) -> Self {
        let schema = file.schema(block_tokens);
        let digest = schema.fingerprint();
        let hex = digest
            .iter()
            .take(5)
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>();
        Self {
            name: file.name().to_owned(),
            context_tokens_max: file.shape().context_tokens_max,
            schema,
            fingerprint: format!("fp_{hex}"),
            created: unix_seconds(),
            file,
        }
    }

    fn tokenize(&self, source: Source) -> Result<Vec<u32>, PromptError> {
        let encode = |text: &str| {
            let ids = self.file.tokenizer().encode(text, true);
            ids.map_err(|error| PromptError::Tokenize(error.to_string()))
        };
        match source {
            Source::Tokens(ids) => {
                let vocab = self.file.tokenizer().vocab();
                match ids.iter().position(|id| *id as usize >= vocab) {
                    Some(index) => Err(PromptError::UnknownToken { index, vocab }),
                    None => Ok(ids),
                }
            }
            Source::Text(text) => encode(&text),
            Source::Chat(messages) => {
                let template = self.file.template().ok_or(PromptError::NoTemplate)?;
                let text = template
                    .render(&messages, true)
                    .map_err(|error| PromptError::Template(error.to_string()))?;
                encode(&text)
            }
        }
    }

    fn prepare(&self, source: Source, salt: &str, budget: Budget) -> Result<Prepared, PromptError> {
        let since = Instant::now();
        let tokens = self.tokenize(source)?;
        let max_tokens = fit(tokens.len(), budget, self.context_tokens_max)?;
        let extra = ExtraKeys::with_cache_salt(salt);
        let chain = block_hashes(&tokens, usize::from(self.schema.block_tokens), &extra);
        metrics::tokenized(since.elapsed());
        Ok(Prepared {
            tokens: tokens.into(),
            chain: chain.into(),
            max_tokens,
        })
    }
}

/// Makes the prompt, on another thread where that takes long.
pub(crate) async fn prepare(
    served: &Arc<Served>,
    source: Source,
    salt: &str,
    budget: Budget,
) -> Result<Prepared, PromptError> {
    if source.bytes() <= IN_PLACE_BYTES_MAX {
        return served.prepare(source, salt, budget);
    }
    let (served, salt) = (Arc::clone(served), salt.to_owned());
    let prepared = tokio::task::spawn_blocking(move || served.prepare(source, &salt, budget)).await;
    prepared.unwrap_or(Err(PromptError::Interrupted))
}

impl Source {
    fn bytes(&self) -> usize {
        match self {
            Self::Chat(messages) => messages.iter().map(|message| message.content.len() + 16).sum(),
            Self::Text(text) => text.len(),
            Self::Tokens(ids) => ids.len() * 4,
        }
    }
}

/// Tokens to generate after `prompt` tokens in a window.
fn fit(prompt: usize, budget: Budget, window: usize) -> Result<Option<u32>, PromptError> {
    if prompt == 0 {
        return Err(PromptError::Empty);
    }
    let room = window.saturating_sub(prompt);
    if room == 0 {
        return Err(PromptError::TooLong { prompt, window });
    }
    match budget {
        Budget::Asked(asked) if asked as usize > room => Err(PromptError::NoRoom {
            prompt,
            asked,
            requested: prompt.saturating_add(asked as usize),
            window,
        }),
        Budget::Asked(asked) => Ok(Some(asked)),
        Budget::AtMost(most) => Ok(Some(u32::try_from(room).unwrap_or(u32::MAX).min(most))),
        Budget::Worker => Ok(None),
    }
}

/// Seconds since 1970; 0 before that.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_and_answer_fit_in_the_window() {
        let no_room = |prompt, asked| {
            Err(PromptError::NoRoom {
                prompt,
                asked,
                requested: prompt + asked as usize,
                window: 100,
            })
        };
        let table = [
            (0, Budget::Worker, Err(PromptError::Empty)),
            (1, Budget::Asked(99), Ok(Some(99))),
            (1, Budget::Asked(100), no_room(1, 100)),
            (99, Budget::Asked(1), Ok(Some(1))),
            (99, Budget::AtMost(10), Ok(Some(1))),
            (50, Budget::AtMost(10), Ok(Some(10))),
            (50, Budget::Worker, Ok(None)),
            (
                100,
                Budget::Worker,
                Err(PromptError::TooLong {
                    prompt: 100,
                    window: 100,
                }),
            ),
            (
                101,
                Budget::Asked(1),
                Err(PromptError::TooLong {
                    prompt: 101,
                    window: 100,
                }),
            ),
        ];
        for (prompt, budget, expected) in table {
            assert_eq!(fit(prompt, budget, 100), expected, "{prompt} tokens, {budget:?}");
        }
    }
}
