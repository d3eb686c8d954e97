//! What a person reads: results on standard output, progress and errors on standard error.
//!
//! The printing macros panic when the reader has gone, so nothing here uses them.

use std::io::Write;

/// A line of a result. A reader that has gone (`kvasir config explain | head`) is no error.
pub(crate) fn print(line: impl std::fmt::Display) {
    let _reader_gone = writeln!(std::io::stdout().lock(), "{line}");
}

/// A line of progress.
pub(crate) fn say(line: impl std::fmt::Display) {
    let _reader_gone = writeln!(std::io::stderr().lock(), "kvasir: {line}");
}

/// An error with its causes, each once: a cause that its error already told is not repeated.
pub(crate) fn say_error(error: &anyhow::Error) {
    say(format_args!("error: {}", told(error)));
}

fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn causes_are_told_once() {
        let table = [
            (anyhow!("a"), "a"),
            (Err::<(), _>(anyhow!("b")).context("a").expect_err("an error"), "a: b"),
            (
                Err::<(), _>(anyhow!("b")).context("a: b").expect_err("an error"),
                "a: b",
            ),
        ];
        for (error, expected) in table {
            assert_eq!(told(&error), expected);
        }
    }
}
