//! Tokens of text that was seen before, without running the merges again.
//!
//! The library takes 10 ms for 25 KB of text, most of it for cutting the text into words, and prompts repeat: a document, a system
//! prompt, the conversation so far, and the words of any language. So text is cut where every pre-tokenizer that is supported
//! cuts it, whatever stands before and behind, and the tokens of each such *segment* are remembered.
//!
//! A cut is between an ASCII letter, digit or mark and a space, or between an ASCII letter or digit and a line feed. No pattern
//! goes on there: a run of letters, digits or marks ends at a space, only marks take line feeds behind them (Llama 3), and the
//! one look ahead is that of white space, which begins a segment and never ends it but at the end of the text. None looks back.

use std::{collections::HashMap, sync::Arc};

use parking_lot::RwLock;

/// Longest segment that is remembered: others seldom come again.
const SEGMENT_BYTES_MAX: usize = 64;
/// Segments of a generation. Two of them, at about 100 bytes a segment, are 13 MB at most.
const SEGMENTS_MAX: usize = 64 << 10;

/// Segments and their tokens, the least recently used forgotten by the generation.
#[derive(Default)]
pub(super) struct Segments {
    known: RwLock<Generations>,
}

#[derive(Default)]
struct Generations {
    new: HashMap<Box<str>, Arc<[u32]>>,
    /// Not asked for since `new` was begun.
    old: HashMap<Box<str>, Arc<[u32]>>,
}

impl Segments {
    /// Appends the ids of `text`, which `encode` makes of what is not known.
    ///
    /// # Errors
    /// What `encode` ends with.
    pub(super) fn encode<E>(
        &self,
        text: &str,
        out: &mut Vec<u32>,
        mut encode: impl FnMut(&str, &mut Vec<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        for segment in cut(text) {
            if segment.len() > SEGMENT_BYTES_MAX {
                encode(segment, out)?;
                continue;
            }
            if let Some(ids) = self.known.read().new.get(segment) {
                out.extend_from_slice(ids);
                continue;
            }
            let old = self.known.read().old.get(segment).cloned();
            let ids = match old {
                Some(ids) => ids,
                None => {
                    let mut ids = Vec::new();
                    encode(segment, &mut ids)?;
                    ids.into()
                }
            };
            out.extend_from_slice(&ids);
            self.known.write().insert(segment, ids);
        }
        Ok(())
    }
}

impl Generations {
    fn insert(&mut self, segment: &str, ids: Arc<[u32]>) {
        if self.new.len() >= SEGMENTS_MAX {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(segment.into(), ids);
    }
}

/// The segments of a text, end to end.
pub(super) fn cut(text: &str) -> impl Iterator<Item = &str> {
    let bytes = text.as_bytes();
    let mut begun = 0;
    std::iter::from_fn(move || {
        if begun == bytes.len() {
            return None;
        }
        let pairs = bytes[begun..].windows(2);
        let end = pairs
            .zip(begun + 1..)
            .find(|(pair, _)| is_cut(pair[0], pair[1]))
            .map_or(bytes.len(), |(_, end)| end);
        // Both sides are ASCII, so this is no place inside a character.
        let segment = &text[begun..end];
        begun = end;
        Some(segment)
    })
}

fn is_cut(before: u8, behind: u8) -> bool {
    match behind {
        b' ' => before.is_ascii_graphic(),
        b'\n' => before.is_ascii_alphanumeric(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_before_white_space_behind_ascii_alone() {
        for (text, expected) in [
            ("", vec![]),
            (" ", vec![" "]),
            ("a", vec!["a"]),
            ("two words", vec!["two", " words"]),
            ("two   words ", vec!["two", "   words", " "]),
            ("end\n\nnext line", vec!["end", "\n\nnext", " line"]),
            // Llama 3 keeps line feeds with the marks before them.
            ("end.\nnext; line", vec!["end.\nnext;", " line"]),
            ("1, 2\n3\t4", vec!["1,", " 2", "\n3\t4"]),
            ("é a\u{3000}b\u{a0}c 日本 d", vec!["é a\u{3000}b\u{a0}c", " 日本 d"]),
        ] {
            assert_eq!(cut(text).collect::<Vec<_>>(), expected, "{text:?}");
        }
    }

    #[test]
    fn known_segments_are_not_made_again_and_memory_is_bounded() {
        let segments = Segments::default();
        let run = |text: &str| {
            let (mut ids, mut count) = (Vec::new(), 0);
            let encoded = segments.encode(text, &mut ids, |segment, ids| {
                count += 1;
                ids.extend(segment.bytes().map(u32::from));
                Ok::<(), ()>(())
            });
            encoded.expect("does not fail");
            assert_eq!(ids, text.bytes().map(u32::from).collect::<Vec<_>>());
            count
        };
        assert_eq!(run("a word and a word"), 4, "a, and the words behind it once each");
        assert_eq!(run("a word and a word"), 0);
        let long = "x".repeat(SEGMENT_BYTES_MAX + 1);
        assert_eq!((run(&long), run(&long)), (1, 1), "what is long is made each time");
        // Asked for in each generation, a segment stays; others go.
        assert_eq!(run("word"), 1);
        for n in 0..3 * SEGMENTS_MAX {
            let text = format!("word {n}");
            assert!(run(&text) <= 1, "word stays known at {n}");
        }
        assert_eq!(run("word 0"), 1, "0 is forgotten");
        let known = segments.known.read();
        assert!(known.new.len() <= SEGMENTS_MAX && known.old.len() <= SEGMENTS_MAX);
    }

    #[test]
    fn an_error_ends_it() {
        let encoded = Segments::default().encode("a b", &mut Vec::new(), |_, _| Err("no"));
        assert_eq!(encoded, Err("no"));
    }
}
