//! Sizes and constants of a forward, read from a file's metadata and checked.

use kvasir_block::RopeStyle;

use super::EMBEDDING;
use crate::{LoadError, gguf::Metadata};

/// Memory the rope table of a whole context may take.
const ROPE_BYTES_MAX: usize = 1 << 30;

/// One in so many layers of Gemma 3 attends to the whole context (Gemma Team 2025, section 2); files say it seldom.
const GEMMA3_PERIOD: usize = 6;
/// Rotary base of the others.
const GEMMA3_THETA: f32 = 10_000.0;

/// Sizes and constants of a forward.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// What a layer is made of.
    pub architecture: Architecture,
    /// Transformer layers.
    pub layers: usize,
    /// Elements of a token's hidden state.
    pub hidden: usize,
    /// Elements of the feed-forward's inner state.
    pub feed_forward: usize,
    /// Query heads per layer.
    pub q_heads: usize,
    /// KV heads per layer; divides `q_heads`.
    pub kv_heads: usize,
    /// Elements per query, key or value row.
    pub head_dim: usize,
    /// Tokens there are.
    pub vocab: usize,
    /// Most tokens of a sequence.
    pub context_tokens_max: usize,
    /// Base of the rotary embedding, in layers that attend to the whole context.
    pub rope_theta: f32,
    /// Rotated elements per query or key row.
    pub rope_dims: usize,
    /// Added to the mean square in the norms.
    pub norm_epsilon: f32,
}

/// What the layers of a forward are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Architecture {
    /// Llama (Touvron et al. 2023): a norm before each half of a layer, SiLU, interleaved rope.
    Llama,
    /// Gemma 3 (Gemma Team 2025): a norm before and after each half, normed queries and keys, GELU, rope in halves, scaled
    /// embeddings, and most layers see a window only.
    Gemma3(Sliding),
}

/// Which layers see a window only, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sliding {
    /// Keys that a query sees: its own and those before it.
    pub window: usize,
    /// Base of their rotary embedding.
    pub rope_theta: f32,
    /// Each `period`-th layer attends to the whole context instead.
    pub period: usize,
}

impl ModelShape {
    pub(super) fn read(metadata: &Metadata) -> Result<Self, LoadError> {
        let key = "general.architecture";
        let name = match metadata.text(key)? {
            Some(name @ ("llama" | "gemma3")) => name,
            Some(other) => {
                let instead = "use a model of architecture llama or gemma3";
                return Err(metadata.unsupported(format!("architecture {other:?}"), instead));
            }
            None => return Err(metadata.error(key, "is missing")),
        };
        let keys = Keys { metadata, name };
        keys.refuse_extensions()?;
        let small = usize::from(u16::MAX);
        let hidden = keys.number("embedding_length", 1 << 20)?;
        let q_heads = keys.number("attention.head_count", small)?;
        let kv_heads = keys.number_or("attention.head_count_kv", small, q_heads)?;
        if !q_heads.is_multiple_of(kv_heads) {
            let problem = format!("is {kv_heads}, which does not divide the {q_heads} query heads");
            return Err(keys.error("attention.head_count_kv", problem));
        }
        let head_dim = keys.head_dim(hidden, q_heads)?;
        let rope_dims = keys.number_or("rope.dimension_count", small, head_dim)?;
        if rope_dims > head_dim || !rope_dims.is_multiple_of(2) {
            let problem = format!("is {rope_dims}, and must be even and at most the {head_dim} elements of a head");
            return Err(keys.error("rope.dimension_count", problem));
        }
        let context_tokens_max = keys.number("context_length", usize::MAX)?;
        if context_tokens_max
            .checked_mul(4 * rope_dims)
            .is_none_or(|bytes| bytes > ROPE_BYTES_MAX)
        {
            let problem = format!("is {context_tokens_max}, whose rope table would take more than 1 GiB");
            return Err(keys.error("context_length", problem));
        }
        let vocab = match metadata.number(&keys.of("vocab_size"))? {
            Some(vocab) => vocab,
            None => metadata
                .texts("tokenizer.ggml.tokens")?
                .map_or(0, |tokens| tokens.len()),
        };
        Ok(Self {
            architecture: keys.architecture()?,
            layers: keys.number("block_count", small)?,
            hidden,
            feed_forward: keys.number("feed_forward_length", 1 << 22)?,
            q_heads,
            kv_heads,
            head_dim,
            vocab,
            context_tokens_max,
            // 10,000 is what the format says a missing base means.
            rope_theta: keys.positive("rope.freq_base", Some(10_000.0))?,
            rope_dims,
            norm_epsilon: keys.positive("attention.layer_norm_rms_epsilon", None)?,
        })
    }

    /// What scores are multiplied by before the softmax: `1 / sqrt(head_dim)`.
    pub fn softmax_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// The layers that see a window only, `None` where there are none.
    pub fn sliding(&self) -> Option<&Sliding> {
        match &self.architecture {
            Architecture::Llama => None,
            Architecture::Gemma3(sliding) => Some(sliding),
        }
    }

    /// Keys that a query of `layer` sees, its own included; `None` if all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let sliding = self.sliding()?;
        (!(layer + 1).is_multiple_of(sliding.period)).then_some(sliding.window)
    }

    /// Which pairs the rotary embedding turns.
    pub fn rope_style(&self) -> RopeStyle {
        match self.architecture {
            Architecture::Llama => RopeStyle::Interleaved,
            Architecture::Gemma3(_) => RopeStyle::Halves,
        }
    }

    /// What embeddings are multiplied by.
    pub(crate) fn embedding_scale(&self) -> Option<f32> {
        match self.architecture {
            Architecture::Llama => None,
            Architecture::Gemma3(_) => Some((self.hidden as f32).sqrt()),
        }
    }

    /// What queries attend to, as a part of the KV's identity.
    pub(crate) fn attention(&self) -> String {
        match self.sliding() {
            None => "full".to_owned(),
            Some(Sliding {
                window,
                rope_theta,
                period,
            }) => format!("sliding(window={window},rope_theta={rope_theta},full_every={period})"),
        }
    }

    /// Every tensor of a model of this shape: name, rows, columns (no columns: a vector), in the order of the forward.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        let (hidden, inner) = (self.hidden, self.feed_forward);
        let (q, kv) = (self.q_heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut of_layer = vec![
            ("attn_norm", vec![hidden]),
            ("attn_q", vec![q, hidden]),
            ("attn_k", vec![kv, hidden]),
            ("attn_v", vec![kv, hidden]),
            ("attn_output", vec![hidden, q]),
            ("ffn_norm", vec![hidden]),
            ("ffn_gate", vec![inner, hidden]),
            ("ffn_up", vec![inner, hidden]),
            ("ffn_down", vec![hidden, inner]),
        ];
        if let Architecture::Gemma3(_) = self.architecture {
            of_layer.extend([
                ("attn_q_norm", vec![self.head_dim]),
                ("attn_k_norm", vec![self.head_dim]),
                ("post_attention_norm", vec![hidden]),
                ("post_ffw_norm", vec![hidden]),
            ]);
        }
        let layers = (0..self.layers).flat_map(move |layer| {
            of_layer
                .clone()
                .into_iter()
                .map(move |(name, dims)| (format!("blk.{layer}.{name}.weight"), dims))
        });
        let ends = [
            (EMBEDDING.to_owned(), vec![self.vocab, hidden]),
            ("output_norm.weight".to_owned(), vec![hidden]),
        ];
        ends.into_iter().chain(layers)
    }
}

impl Architecture {
    /// Name of the forward and its version, a part of the KV's identity; changes whenever its bits change.
    pub(crate) fn forward(&self) -> &'static str {
        match self {
            Self::Llama => super::FORWARD,
            Self::Gemma3(_) => "gemma3/1",
        }
    }
}

/// The metadata keys of an architecture.
struct Keys<'a> {
    metadata: &'a Metadata,
    name: &'a str,
}

impl Keys<'_> {
    /// The whole key called `name` under the architecture.
    fn of(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    fn error(&self, name: &str, problem: impl Into<String>) -> LoadError {
        self.metadata.error(&self.of(name), problem)
    }

    fn number(&self, name: &str, most: usize) -> Result<usize, LoadError> {
        match self.metadata.number(&self.of(name))? {
            Some(number) if (1..=most).contains(&number) => Ok(number),
            Some(number) => Err(self.error(name, format!("is {number}, and must be from 1 to {most}"))),
            None => Err(self.error(name, "is missing")),
        }
    }

    fn number_or(&self, name: &str, most: usize, otherwise: usize) -> Result<usize, LoadError> {
        if self.metadata.has(&self.of(name)) {
            self.number(name, most)
        } else {
            Ok(otherwise)
        }
    }

    fn positive(&self, name: &str, otherwise: Option<f32>) -> Result<f32, LoadError> {
        match self.metadata.float(&self.of(name))?.or(otherwise) {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err(self.error(name, format!("is {value}, and must be above 0"))),
            None => Err(self.error(name, "is missing")),
        }
    }

    fn head_dim(&self, hidden: usize, q_heads: usize) -> Result<usize, LoadError> {
        let (keys, values) = ("attention.key_length", "attention.value_length");
        let head_dim = if self.metadata.has(&self.of(keys)) {
            self.number(keys, usize::from(u16::MAX))?
        } else if hidden.is_multiple_of(q_heads) {
            hidden / q_heads
        } else {
            let problem = format!("is missing, and {hidden} hidden elements do not divide into {q_heads} heads");
            return Err(self.error(keys, problem));
        };
        match self.metadata.number(&self.of(values))? {
            Some(length) if length != head_dim => {
                Err(self.error(values, format!("is {length}, and keys have {head_dim} elements")))
            }
            _ => Ok(head_dim),
        }
    }

    fn architecture(&self) -> Result<Architecture, LoadError> {
        if self.name == "llama" {
            return Ok(Architecture::Llama);
        }
        Ok(Architecture::Gemma3(Sliding {
            window: self.number("attention.sliding_window", usize::MAX)?,
            rope_theta: self.positive("rope.freq_base_swa", Some(GEMMA3_THETA))?,
            period: self.number_or("attention.sliding_window_pattern", usize::from(u16::MAX), GEMMA3_PERIOD)?,
        }))
    }

    /// What files may ask for beyond the plain forward. Ignoring any of it would give fluent nonsense. Gemma 3 from 4B on, whose
    /// largest scales its scores in another way too, scales its positions and is refused by that.
    fn refuse_extensions(&self) -> Result<(), LoadError> {
        let (metadata, without) = (self.metadata, "use a model without rope scaling");
        match metadata.text(&self.of("rope.scaling.type"))? {
            None | Some("none") => {}
            Some(other) => return Err(metadata.unsupported(format!("rope scaling {other:?}"), without)),
        }
        for name in ["rope.scaling.factor", "rope.scale_linear"] {
            let key = self.of(name);
            if metadata.float(&key)?.is_some_and(|factor| factor != 1.0) {
                return Err(metadata.unsupported(format!("rope scaling ({key})"), without));
            }
        }
        let mut counts = vec![("expert_count", "a mixture of experts")];
        if self.name == "llama" {
            counts.push(("attention.sliding_window", "sliding-window attention"));
        }
        for (name, what) in counts {
            let key = self.of(name);
            if metadata.number(&key)?.is_some_and(|count| count > 0) {
                return Err(metadata.unsupported(format!("{what} ({key})"), "use a plain model"));
            }
        }
        for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
            let key = self.of(name);
            if metadata.float(&key)?.is_some_and(|cap| cap != 0.0) {
                return Err(metadata.unsupported(format!("capped scores ({key})"), "use a plain model"));
            }
        }
        Ok(())
    }
}
