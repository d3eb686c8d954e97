//! The whole system on a real model, from the outside: one file per subject in `tests/`.
//!
//! The suites start real parts (crate `kvasir-testkit`) and speak to them over their real protocols. What needs a process of
//! its own, to be killed or to be asked for its exit status, is tested beside the binary, in `services/cli/tests`.
//!
//! This library holds the prompts that the suites share: pieces of a real page, cut to a known number of tokens.
//!
//! ```no_run
//! let prompt = kvasir_integration::prompt(&kvasir_testkit::model(), 700);
//! assert_eq!(prompt.len(), 700);
//! ```
#![forbid(unsafe_code)]

use kvasir_model::ModelFile;

/// A text that is not made up for a test.
pub const PAGE: &str = include_str!("../../../ARCHITECTURE.md");

/// The first `count` tokens of [`PAGE`].
///
/// # Panics
/// When the page has fewer.
pub fn prompt(file: &ModelFile, count: usize) -> Vec<u32> {
    let mut tokens = file.tokenizer().encode(PAGE, false).expect("a page of text has tokens");
    assert!(
        tokens.len() >= count,
        "the page has {} tokens, {count} are wanted",
        tokens.len()
    );
    tokens.truncate(count);
    tokens
}

/// A piece of [`PAGE`] as text: from its first character on, about `words` words.
pub fn words(words: usize) -> &'static str {
    let end = PAGE.match_indices(' ').nth(words).map_or(PAGE.len(), |(end, _)| end);
    &PAGE[..end]
}
