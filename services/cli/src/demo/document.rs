//! What is read and what is asked.

use anyhow::{Context, Result, bail};
use kvasir_model::{ChatMessage, ModelFile};
use serde_json::{Value, json};

/// A page that is worth reading: what this project is and how it works.
const DOCUMENT: &str = include_str!("../../../../ARCHITECTURE.md");
pub(super) const NAME: &str = "ARCHITECTURE.md";
/// What the demo promises to read, in tokens.
const TOKENS_MIN: usize = 3000;

const QUESTIONS: [&str; 5] = [
    "In which order are the router, the worker and the store stopped, and what does each do before it ends?",
    "What happens when the checksum of a block does not match?",
    "Why are keys and values kept in f16 and not in bf16 or f32?",
    "How does the router choose a worker?",
    "What does a worker do when the store is gone while it decodes?",
];
const PRIMER: &str = "What is this page about?";

/// A question about the document.
pub(super) struct Question {
    pub(super) text: &'static str,
    /// OpenAI's `messages`.
    pub(super) messages: Value,
    /// The token ids that the router makes of them.
    pub(super) prompt: Vec<u32>,
}

/// The question that is asked first, so that the others meet filled caches.
pub(super) fn primer() -> Value {
    messages(PRIMER)
}

/// The first `count` questions, tokenised as the router does it.
pub(super) fn questions(file: &ModelFile, count: usize, max_tokens: u32) -> Result<Vec<Question>> {
    let window = file.shape().context_tokens_max;
    QUESTIONS
        .iter()
        .take(count)
        .map(|text| {
            let prompt = tokens(file, text)?;
            let wanted = prompt.len() + max_tokens as usize;
            if prompt.len() < TOKENS_MIN || wanted > window {
                bail!(
                    "{NAME} with a question has {} tokens: the demo reads at least {TOKENS_MIN}, and with {max_tokens} new \
                     ones at most the window of {window}",
                    prompt.len()
                );
            }
            Ok(Question {
                text,
                messages: messages(text),
                prompt,
            })
        })
        .collect()
}

fn system() -> String {
    format!("Answer questions about this page in a few words.\n\n{DOCUMENT}")
}

fn messages(question: &str) -> Value {
    json!([{"role": "system", "content": system()}, {"role": "user", "content": question}])
}

fn tokens(file: &ModelFile, question: &str) -> Result<Vec<u32>> {
    let template = file
        .template()
        .context("the demo asks questions, and this model has no chat template: use an instruct model")?;
    let message = |role: &str, content: String| ChatMessage {
        role: role.to_owned(),
        content,
    };
    let text = template.render(
        &[message("system", system()), message("user", question.to_owned())],
        true,
    )?;
    Ok(file.tokenizer().encode(&text, true)?)
}
