//! No marks of unfinished work: they belong into issues, where they are seen.

use crate::{Repository, Violation, source};

/// In split spelling, so that this file does not find itself.
const MACROS: [&str; 2] = [concat!("to", "do!"), concat!("unimpl", "emented!")];
const WORDS: [&str; 3] = [concat!("FIX", "ME"), concat!("TO", "DO"), concat!("XX", "X")];

/// Finds marks in code, scripts, protocol files and manifests.
pub fn check(repository: &Repository) -> Vec<Violation> {
    let mut found = Vec::new();
    for (path, text) in repository.with_extension(&["rs", "py", "sh", "proto", "toml", "yaml", "yml", "md"]) {
        for (i, line) in text.lines().enumerate() {
            let macro_call = path.ends_with(".rs") && MACROS.iter().any(|mark| line.contains(mark));
            if macro_call
                || WORDS
                    .iter()
                    .any(|word| source::lines_with_word(line, word).next().is_some())
            {
                found.push(Violation::new(
                    path,
                    i + 1,
                    "unfinished work: finish it, or open an issue and delete the mark",
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planted_marks_are_found() {
        for mark in MACROS.iter().chain(&WORDS) {
            let text = format!("fn f() {{\n    // {mark} later\n    {mark}();\n}}\n");
            let found = check(&Repository::of(&[("a/src/lib.rs", &text)]));
            assert_eq!(found.iter().map(|v| v.line).collect::<Vec<_>>(), [2, 3], "{mark}");
        }
        assert!(check(&Repository::of(&[("a/src/lib.rs", "fn methodology() {}\n")])).is_empty());
    }
}
