//! The JSON that goes out: whole answers and the pieces of a stream, for both routes.
//!
//! Fields come in the order that OpenAI sends them. `kvasir` is our addition: it stands at the top of an answer to one
//! prompt, in the last piece of a stream, and on each choice where there are several prompts.

use serde::Serialize;
use serde_json::Value;

use crate::{
    answer::{End, KvasirReport},
    job::FinishReason,
    prompt::unix_seconds,
};

/// Which route asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Text,
}

/// What all pieces of one answer have in common.
pub(crate) struct Reply {
    shape: Shape,
    model: String,
    fingerprint: String,
    id: String,
    created: u64,
    /// Whether a stream ends with its usage; then all its pieces have the field.
    include_usage: bool,
    /// Prompts of the request.
    prompts: usize,
}

/// OpenAI's `usage`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
    audio_tokens: u32,
}

/// Nothing of this exists here, and clients expect it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct CompletionDetails {
    reasoning_tokens: u32,
    audio_tokens: u32,
    accepted_prediction_tokens: u32,
    rejected_prediction_tokens: u32,
}

#[derive(Serialize)]
struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    /// The outer `None` leaves the field out, the inner one is `null`.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<&'a Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kvasir: Option<&'a KvasirReport>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(flatten)]
    content: Content<'a>,
    logprobs: Option<Value>,
    finish_reason: Option<FinishReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kvasir: Option<&'a KvasirReport>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Content<'a> {
    Text(&'a str),
    Message(Message<'a>),
    Delta(Delta<'a>),
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<&'a str>,
    annotations: [Value; 0],
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

const ASSISTANT: &str = "assistant";

impl Reply {
    /// The frame of an answer that begins now.
    pub(crate) fn new(shape: Shape, model: &str, fingerprint: &str, include_usage: bool, prompts: usize) -> Self {
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Text => "cmpl",
        };
        Self {
            shape,
            model: model.to_owned(),
            fingerprint: fingerprint.to_owned(),
            id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
            created: unix_seconds(),
            include_usage,
            prompts,
        }
    }

    /// A whole answer: text and end per prompt, in their order.
    pub(crate) fn whole(&self, answers: &[(String, End)]) -> String {
        let choices = answers.iter().enumerate().map(|(index, (text, end))| {
            let content = match self.shape {
                Shape::Text => Content::Text(text),
                Shape::Chat => Content::Message(Message {
                    role: ASSISTANT,
                    content: text,
                    refusal: None,
                    annotations: [],
                }),
            };
            self.choice(index, content, Some(end))
        });
        let usage = Usage::of(answers.iter().map(|(_, end)| end));
        let object = match self.shape {
            Shape::Chat => "chat.completion",
            Shape::Text => "text_completion",
        };
        let only = match answers {
            [(_, end)] => Some(&end.report),
            _ => None,
        };
        json(&self.envelope(object, choices.collect(), Some(Some(&usage)), only))
    }

    /// The first piece of a choice, before any text; chat streams name the speaker.
    pub(crate) fn opening(&self, index: usize) -> Option<String> {
        let delta = Delta {
            role: Some(ASSISTANT),
            content: Some(""),
        };
        match self.shape {
            Shape::Text => None,
            Shape::Chat => Some(self.piece(vec![self.choice(index, Content::Delta(delta), None)], None, None)),
        }
    }

    /// A piece of text.
    pub(crate) fn text(&self, index: usize, text: &str) -> String {
        let content = match self.shape {
            Shape::Text => Content::Text(text),
            Shape::Chat => Content::Delta(Delta {
                role: None,
                content: Some(text),
            }),
        };
        self.piece(vec![self.choice(index, content, None)], None, None)
    }

    /// The last piece of a choice.
    pub(crate) fn end(&self, index: usize, end: &End) -> String {
        let content = match self.shape {
            Shape::Text => Content::Text(""),
            Shape::Chat => Content::Delta(Delta::default()),
        };
        let last = self.prompts == 1 && !self.include_usage;
        let report = last.then_some(&end.report);
        self.piece(vec![self.choice(index, content, Some(end))], None, report)
    }

    /// The piece after all choices, where usage was asked for.
    pub(crate) fn usage(&self, ends: &[End]) -> Option<String> {
        let only = match ends {
            [end] => Some(&end.report),
            _ => None,
        };
        let usage = Usage::of(ends);
        self.include_usage.then(|| self.piece(Vec::new(), Some(&usage), only))
    }

    fn piece(&self, choices: Vec<Choice<'_>>, usage: Option<&Usage>, report: Option<&KvasirReport>) -> String {
        let object = match self.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Text => "text_completion",
        };
        json(&self.envelope(object, choices, self.include_usage.then_some(usage), report))
    }

    fn choice<'a>(&self, index: usize, content: Content<'a>, end: Option<&'a End>) -> Choice<'a> {
        Choice {
            index,
            content,
            logprobs: None,
            finish_reason: end.map(|end| end.reason),
            kvasir: end.map(|end| &end.report).filter(|_| self.prompts > 1),
        }
    }

    fn envelope<'a, C>(
        &'a self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<&'a Usage>>,
        kvasir: Option<&'a KvasirReport>,
    ) -> Envelope<'a, C> {
        Envelope {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage,
            kvasir,
        }
    }
}

impl Usage {
    fn of<'a>(ends: impl IntoIterator<Item = &'a End>) -> Self {
        ends.into_iter().fold(Self::default(), |mut usage, end| {
            usage.prompt_tokens = usage.prompt_tokens.saturating_add(end.prompt_tokens);
            usage.completion_tokens = usage.completion_tokens.saturating_add(end.completion_tokens);
            usage.total_tokens = usage.prompt_tokens.saturating_add(usage.completion_tokens);
            let cached = &mut usage.prompt_tokens_details.cached_tokens;
            *cached = cached.saturating_add(end.report.cached_tokens);
            usage
        })
    }
}

/// Text of a value made here. Only a map with odd keys cannot be written, and there is none.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "{}".to_owned())
}

#[cfg(test)]
mod tests;
