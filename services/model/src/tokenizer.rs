//! Text to token ids and back: byte-level BPE and SentencePiece's BPE, as GGUF files carry them.
//!
//! The merges of the first are run by the `tokenizers` library, those of the second by `pieces`. Special tokens are found here,
//! because whether they count is decided per call: in a rendered template they do, in a user's text they must not.

mod bytes;
mod decoder;
mod pieces;
mod segments;
mod special;

use std::sync::Arc;

use tokenizers::{
    SplitDelimiterBehavior,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use self::{
    bytes::TokenBytes,
    pieces::Pieces,
    segments::Segments,
    special::{Kind, Piece, Specials},
};
use crate::{LoadError, gguf::Metadata};

pub use self::decoder::TextDecoder;

/// How Llama 3 cuts text before merging: like GPT-2, with case-insensitive contractions, digits in threes, and line
/// breaks kept with what precedes them.
const LLAMA_BPE: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Texts that end a generation wherever they are control tokens, beside the ids that the metadata names.
const STOP_TEXTS: [&str; 6] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
];

/// A text that has no token ids.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the text cannot be tokenised: {0}")]
pub struct TokenizeError(pub String);

/// A vocabulary with its merges. Shared by all sequences of a model.
pub struct Tokenizer {
    merges: Merges,
    specials: Specials,
    tokens: TokenBytes,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    stops: Vec<u32>,
    bos_text: String,
    eos_text: String,
}

/// What makes tokens of a text without special ones.
enum Merges {
    /// Over bytes, in the order of a list.
    Bytes(Box<tokenizers::Tokenizer>, Segments),
    /// Over characters, by score.
    Pieces(Pieces),
}

impl Tokenizer {
    pub(crate) fn from_gguf(metadata: &Metadata) -> Result<Self, LoadError> {
        let tokens_key = "tokenizer.ggml.tokens";
        let texts = metadata.texts(tokens_key)?;
        let needed = || metadata.error(tokens_key, "is missing");
        let model_key = "tokenizer.ggml.model";
        let (texts, merges) = match metadata.text(model_key)? {
            Some("gpt2") => {
                let texts = texts.ok_or_else(needed)?;
                let merges = Merges::Bytes(Box::new(byte_level(metadata, &texts)?), Segments::default());
                (texts, merges)
            }
            Some("llama") => {
                let texts = texts.ok_or_else(needed)?;
                let merges = Merges::Pieces(Pieces::new(metadata, &texts)?);
                (texts, merges)
            }
            Some(other) => {
                return Err(metadata.unsupported(
                    format!("tokenizer model {other:?}"),
                    "use a model with a byte-level BPE (gpt2) or SentencePiece's (llama)",
                ));
            }
            None => return Err(metadata.error(model_key, "is missing")),
        };
        let kinds = kinds(metadata, texts.len())?;
        let bos = metadata.token("tokenizer.ggml.bos_token_id", texts.len())?;
        let eos = metadata.token("tokenizer.ggml.eos_token_id", texts.len())?;
        let text_of = |id: Option<u32>| id.map_or_else(String::new, |id| texts[id as usize].to_owned());
        let named = [eos, metadata.token("tokenizer.ggml.eot_token_id", texts.len())?];
        let by_text = (0_u32..)
            .zip(texts.iter().zip(&kinds))
            .filter(|(_, (text, kind))| **kind == Some(Kind::Control) && STOP_TEXTS.contains(text));
        let mut stops: Vec<u32> = named.into_iter().flatten().chain(by_text.map(|(id, _)| id)).collect();
        stops.sort_unstable();
        stops.dedup();
        let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(false);
        if add_bos && bos.is_none() {
            return Err(metadata.error(
                "tokenizer.ggml.bos_token_id",
                "is missing, and add_bos_token asks for it",
            ));
        }
        let tokens = match merges {
            Merges::Bytes(..) => TokenBytes::new(&texts, &kinds),
            Merges::Pieces(_) => TokenBytes::of_pieces(&texts, &kinds),
        };
        Ok(Self {
            merges,
            tokens,
            specials: Specials::new(&texts, &kinds),
            bos,
            eos,
            add_bos,
            stops,
            bos_text: text_of(bos),
            eos_text: text_of(eos),
        })
    }

    /// Token ids of `text`; special tokens in the text are recognised when `special` is true. Starts with the
    /// beginning-of-sequence token where the model wants one and the text does not bring it.
    ///
    /// A byte that the vocabulary has no token for (SmolLM2 lacks seven control characters) is left out, as llama.cpp
    /// does: the unknown token is a control token, and plain text must not become one.
    ///
    /// # Errors
    /// [`TokenizeError`] if the library refuses the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        if self.add_bos {
            ids.extend(self.bos);
        }
        for (index, piece) in self.specials.split(text, special).into_iter().enumerate() {
            match piece {
                // A template may bring the first token itself; twice would be another prompt.
                Piece::Token(id) if self.add_bos && Some(id) == self.bos && index == 0 => {}
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => match &self.merges {
                    Merges::Bytes(bpe, segments) => segments.encode(text, &mut ids, |text, ids| {
                        let encoded = bpe.encode_fast(text, false);
                        let encoded = encoded.map_err(|error| TokenizeError(error.to_string()))?;
                        ids.extend_from_slice(encoded.get_ids());
                        Ok(())
                    })?,
                    Merges::Pieces(pieces) => pieces.encode(text, &mut ids),
                },
            }
        }
        Ok(ids)
    }

    /// Tokens there are.
    pub fn vocab(&self) -> usize {
        self.tokens.len()
    }

    /// Ids that end a generation (eos, end of turn).
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether `id` is a control token: never part of the text.
    pub fn is_control(&self, id: u32) -> bool {
        self.specials.is_control(id)
    }

    /// A decoder at the start of a text.
    pub fn decoder(self: &Arc<Self>) -> TextDecoder {
        TextDecoder::new(Arc::clone(self))
    }

    pub(crate) fn bos_text(&self) -> &str {
        &self.bos_text
    }

    pub(crate) fn eos_text(&self) -> &str {
        &self.eos_text
    }

    /// Bytes that `id` stands for in a text; none for control tokens and ids beyond the vocabulary.
    fn bytes(&self, id: u32) -> &[u8] {
        if self.is_control(id) { &[] } else { self.tokens.get(id) }
    }
}

/// Byte-level BPE over `texts`, by the merges of the file.
fn byte_level(metadata: &Metadata, texts: &[&str]) -> Result<tokenizers::Tokenizer, LoadError> {
    let vocab: Vocab = (0_u32..)
        .zip(texts)
        .map(|(id, text)| ((*text).to_owned(), id))
        .collect();
    if vocab.len() != texts.len() {
        return Err(metadata.error("tokenizer.ggml.tokens", "has the same token twice"));
    }
    let merges_key = "tokenizer.ggml.merges";
    let merges = metadata
        .texts(merges_key)?
        .ok_or_else(|| metadata.error(merges_key, "is missing"))?;
    let merges = merges.iter().map(|merge| match merge.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(metadata.error(merges_key, "has an entry that is not two tokens")),
    });
    let (pre_tokenizer, ignore_merges) = pre_tokenizer(metadata)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges.collect::<Result<Vec<_>, _>>()?)
        .ignore_merges(ignore_merges)
        .build()
        .map_err(|error| metadata.error(merges_key, format!("cannot be used: {error}")))?;
    let mut bpe = tokenizers::Tokenizer::new(bpe);
    bpe.with_pre_tokenizer(Some(pre_tokenizer));
    Ok(bpe)
}

/// How text is cut before merging, and whether a piece that is a token is taken whole.
fn pre_tokenizer(metadata: &Metadata) -> Result<(PreTokenizerWrapper, bool), LoadError> {
    let key = "tokenizer.ggml.pre";
    let supported = "use a model with pre-tokenizer smollm, gpt-2 or llama-bpe";
    let Some(name) = metadata.text(key)? else {
        return Err(metadata.error(key, format!("is missing; {supported}")));
    };
    named_pre_tokenizer(name)
        .map_err(|error| metadata.error(key, format!("cannot be built: {error}")))?
        .ok_or_else(|| metadata.unsupported(format!("pre-tokenizer {name:?}"), supported))
}

/// The same by its name; `None` for one that is not supported. [`segments`] must be right for all that are.
fn named_pre_tokenizer(name: &str) -> tokenizers::Result<Option<(PreTokenizerWrapper, bool)>> {
    let byte_level = |use_regex| ByteLevel::new(false, true, use_regex);
    Ok(match name {
        "smollm" => {
            let steps = vec![Digits::new(true).into(), byte_level(true).into()];
            Some((Sequence::new(steps).into(), false))
        }
        "gpt-2" => Some((byte_level(true).into(), false)),
        "llama-bpe" | "llama3" | "llama-v3" => {
            let pattern = SplitPattern::Regex(LLAMA_BPE.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            let steps = vec![split.into(), byte_level(false).into()];
            Some((Sequence::new(steps).into(), true))
        }
        _ => None,
    })
}

/// Per token whether it is special, from GGUF's token types.
fn kinds(metadata: &Metadata, vocab: usize) -> Result<Vec<Option<Kind>>, LoadError> {
    let key = "tokenizer.ggml.token_type";
    let types = metadata
        .numbers(key)?
        .ok_or_else(|| metadata.error(key, "is missing"))?;
    if types.len() != vocab {
        return Err(metadata.error(key, format!("has {} entries for {vocab} tokens", types.len())));
    }
    let kinds = types.into_iter().map(|kind| match kind {
        3 => Some(Kind::Control),
        4 => Some(Kind::UserDefined),
        _ => None,
    });
    Ok(kinds.collect())
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    /// The words that a pre-tokenizer cuts a text into.
    fn words(pre_tokenizer: &PreTokenizerWrapper, text: &str) -> Vec<String> {
        let mut cut = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut cut).expect("any text");
        let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(word, ..)| word.to_owned()).collect()
    }

    #[test]
    fn segments_are_cut_into_words_as_the_whole_text_is() {
        const PARTS: [&str; 34] = [
            " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u{a0}", "\u{3000}", "\u{2028}", "a", "Word", "x9", "12",
            "1234", "'s", "'LL", "'", ".", ",", "!?", "-", "_", "...", "\"", "é", "ß", "日本", "٣", "½", "Ⅷ",
            "e\u{301}", "😀", "\u{0}",
        ];
        let mut rng = StdRng::seed_from_u64(3);
        for name in ["smollm", "gpt-2", "llama-bpe"] {
            let (pre_tokenizer, _) = named_pre_tokenizer(name)
                .expect("a sound pattern")
                .expect("is supported");
            for case in 0..4000 {
                let parts = rng.random_range(0..24);
                let text: String = (0..parts).map(|_| PARTS[rng.random_range(0..PARTS.len())]).collect();
                let found: Vec<String> = segments::cut(&text)
                    .flat_map(|segment| words(&pre_tokenizer, segment))
                    .collect();
                assert_eq!(found, words(&pre_tokenizer, &text), "{name}, case {case}: {text:?}");
            }
        }
    }
}
