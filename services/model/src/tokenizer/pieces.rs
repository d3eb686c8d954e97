//! SentencePiece's merges (Kudo & Richardson 2018): of all neighbours whose union is a token, the pair whose token has the highest
//! score is joined, until none is left; what is no token then falls apart into bytes.
//!
//! A space is written as U+2581, and none is put before a text, as Gemma wants it. The order of equal scores, leftmost first, is
//! that of the library and of llama.cpp.

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, HashMap},
    ops::Range,
};

use crate::{LoadError, gguf::Metadata};

/// What a space is written as.
pub(super) const SPACE: char = '\u{2581}';

/// A vocabulary of pieces with their scores.
pub(super) struct Pieces {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    /// The token of each byte.
    bytes: Vec<u32>,
}

/// A pair of neighbours that could be joined.
#[derive(Clone, Copy, PartialEq)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both; another number means that one of them has been joined since.
    len: usize,
}

impl Eq for Pair {}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        let score = self.score.total_cmp(&other.score);
        score.then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A stretch of the text, linked to its neighbours; empty once it was joined to the one before.
struct Symbol {
    text: Range<usize>,
    before: Option<usize>,
    after: Option<usize>,
}

impl Pieces {
    /// `texts` of all tokens with the scores of the file; tokens called `<0xHH>` are bytes.
    pub(super) fn new(metadata: &Metadata, texts: &[&str]) -> Result<Self, LoadError> {
        if metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
            return Err(metadata.unsupported(
                "a space before each text (tokenizer.ggml.add_space_prefix)",
                "use a model without it, as Gemma",
            ));
        }
        let key = "tokenizer.ggml.scores";
        let scores = metadata.floats(key)?.ok_or_else(|| metadata.error(key, "is missing"))?;
        if scores.len() != texts.len() {
            let problem = format!("has {} entries for {} tokens", scores.len(), texts.len());
            return Err(metadata.error(key, problem));
        }
        let ids: HashMap<String, u32> = texts.iter().map(|text| (*text).to_owned()).zip(0..).collect();
        if ids.len() != texts.len() {
            return Err(metadata.error("tokenizer.ggml.tokens", "has the same token twice"));
        }
        let byte = |byte: u8| {
            let text = format!("<0x{byte:02X}>");
            ids.get(&text)
                .copied()
                .ok_or_else(|| metadata.error("tokenizer.ggml.tokens", format!("lacks the byte {text}")))
        };
        let bytes = (0..=u8::MAX).map(byte).collect::<Result<_, _>>()?;
        Ok(Self { ids, scores, bytes })
    }

    /// Appends the ids of `text`, which holds no special token.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        let text = text.replace(' ', SPACE.encode_utf8(&mut [0; 4]));
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(index, (at, c))| Symbol {
                text: at..at + c.len_utf8(),
                before: index.checked_sub(1),
                after: Some(index + 1),
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.after = None;
        }
        let mut pairs = BinaryHeap::new();
        for left in 1..symbols.len() {
            pairs.extend(self.pair(&text, &symbols, Some(left - 1), Some(left)));
        }
        while let Some(Pair { left, right, len, .. }) = pairs.pop() {
            let (a, b) = (symbols[left].text.clone(), symbols[right].text.clone());
            if a.is_empty() || b.is_empty() || a.len() + b.len() != len {
                continue;
            }
            let after = symbols[right].after;
            symbols[left].text.end = b.end;
            symbols[left].after = after;
            symbols[right].text.end = b.start;
            if let Some(after) = after {
                symbols[after].before = Some(left);
            }
            pairs.extend(self.pair(&text, &symbols, symbols[left].before, Some(left)));
            pairs.extend(self.pair(&text, &symbols, Some(left), after));
        }
        for symbol in symbols.iter().filter(|symbol| !symbol.text.is_empty()) {
            let piece = &text[symbol.text.clone()];
            match self.ids.get(piece) {
                Some(id) => out.push(*id),
                None => out.extend(piece.bytes().map(|byte| self.bytes[usize::from(byte)])),
            }
        }
    }

    fn pair(&self, text: &str, symbols: &[Symbol], left: Option<usize>, right: Option<usize>) -> Option<Pair> {
        let (left, right) = (left?, right?);
        let joined = symbols[left].text.start..symbols[right].text.end;
        let id = self.ids.get(&text[joined.clone()])?;
        Some(Pair {
            score: self.scores[*id as usize],
            left,
            right,
            len: joined.len(),
        })
    }
}
