//! What a model file says: shape, identity, tokenizer, template.

use std::{path::Path, sync::Arc};

use candle_core::quantized::GgmlDType;
use kvasir_block::{Dtype, KvSchema, RopeStyle};
use sha2::{Digest, Sha256};

use crate::{
    ChatTemplate, LoadError, Tokenizer,
    gguf::{self, Metadata, Tensors},
};

/// How the forward orders its floating-point steps, above the kernels; changes whenever its bits change.
pub(crate) const FORWARD: &str = "llama/1";

/// Memory the rope table of a whole context may take.
const ROPE_BYTES_MAX: usize = 1 << 30;

/// A GGUF file whose metadata is read and checked: shape, identity, tokenizer, template. No weights: opening reads the
/// file once for its hash (98 MB in about 0.1 s) and keeps the vocabulary only.
pub struct ModelFile {
    name: String,
    shape: ModelShape,
    tensors: Tensors,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    weights_sha256: [u8; 32],
    tokenizer_sha256: [u8; 32],
    numerics: String,
}

/// Sizes and constants of a forward.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
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
    /// Base of the rotary embedding.
    pub rope_theta: f32,
    /// Rotated elements per query or key row.
    pub rope_dims: usize,
    /// Added to the mean square in the norms.
    pub norm_epsilon: f32,
}

impl ModelFile {
    /// Opens the GGUF file at `path` and checks that this forward can run it: architecture `llama`, sizes that agree,
    /// every tensor there, whole and of the right shape, and none that would be ignored.
    ///
    /// # Errors
    /// [`LoadError`] with what is wrong and what to do.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let (metadata, tensors) = gguf::open(path)?;
        let shape = ModelShape::read(&metadata)?;
        check_tensors(&metadata, &tensors, &shape)?;
        let tokenizer = Tokenizer::from_gguf(&metadata)?;
        if tokenizer.vocab() != shape.vocab {
            let problem = format!("has {} tokens, and vocab_size says {}", tokenizer.vocab(), shape.vocab);
            return Err(metadata.error("tokenizer.ggml.tokens", problem));
        }
        let template = match metadata.text(TEMPLATE)? {
            None => None,
            Some(source) => Some(
                ChatTemplate::new(source, tokenizer.bos_text(), tokenizer.eos_text())
                    .map_err(|error| metadata.error(TEMPLATE, format!("cannot be used: {error}")))?,
            ),
        };
        Ok(Self {
            name: public_name(path, &metadata)?,
            weights_sha256: tensors.sha256()?,
            tokenizer_sha256: tokenizer_sha256(&metadata)?,
            numerics: numerics(&tensors),
            shape,
            tensors,
            tokenizer: Arc::new(tokenizer),
            template,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.tensors.path()
    }

    /// Public name, for `/v1/models` (for example `smollm2-135m-instruct`): the file's, without its quantisation.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sizes and constants of the forward.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Complete identity of KV blocks made by this model with this code and `block_tokens`.
    pub fn schema(&self, block_tokens: u16) -> KvSchema {
        // Checked to fit when the shape was read.
        let narrow = |size: usize| u16::try_from(size).unwrap_or(u16::MAX);
        KvSchema {
            model: self.name.clone(),
            weights_sha256: self.weights_sha256,
            tokenizer_sha256: self.tokenizer_sha256,
            adapter_sha256: None,
            layers: narrow(self.shape.layers),
            kv_heads: narrow(self.shape.kv_heads),
            head_dim: narrow(self.shape.head_dim),
            block_tokens,
            dtype: Dtype::F16,
            attention: "full".to_owned(),
            rope_theta: self.shape.rope_theta,
            rope_dims: narrow(self.shape.rope_dims),
            rope_style: RopeStyle::Interleaved,
            rope_scaling: "none".to_owned(),
            tp_rank: 0,
            tp_world: 1,
            numerics: self.numerics.clone(),
        }
    }

    /// The file's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The file's chat template, `None` if it has none (base models).
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    pub(crate) fn tensors(&self) -> &Tensors {
        &self.tensors
    }
}

const TEMPLATE: &str = "tokenizer.chat_template";

impl ModelShape {
    fn read(metadata: &Metadata) -> Result<Self, LoadError> {
        let key = "general.architecture";
        match metadata.text(key)? {
            Some("llama") => {}
            Some(other) => {
                return Err(
                    metadata.unsupported(format!("architecture {other:?}"), "use a model of architecture llama")
                );
            }
            None => return Err(metadata.error(key, "is missing")),
        }
        refuse_extensions(metadata)?;
        let number = |key: &str, most: usize| match metadata.number(key)? {
            Some(number) if (1..=most).contains(&number) => Ok(number),
            Some(number) => Err(metadata.error(key, format!("is {number}, and must be from 1 to {most}"))),
            None => Err(metadata.error(key, "is missing")),
        };
        let small = usize::from(u16::MAX);
        let hidden = number("llama.embedding_length", 1 << 20)?;
        let q_heads = number("llama.attention.head_count", small)?;
        let kv_key = "llama.attention.head_count_kv";
        let kv_heads = if metadata.has(kv_key) {
            number(kv_key, small)?
        } else {
            q_heads
        };
        if !q_heads.is_multiple_of(kv_heads) {
            return Err(metadata.error(
                kv_key,
                format!("is {kv_heads}, which does not divide the {q_heads} query heads"),
            ));
        }
        let key_length = "llama.attention.key_length";
        let head_dim = if metadata.has(key_length) {
            number(key_length, small)?
        } else if hidden.is_multiple_of(q_heads) {
            hidden / q_heads
        } else {
            let problem = format!("is missing, and {hidden} hidden elements do not divide into {q_heads} heads");
            return Err(metadata.error(key_length, problem));
        };
        let value_length = "llama.attention.value_length";
        match metadata.number(value_length)? {
            Some(length) if length != head_dim => {
                return Err(metadata.error(value_length, format!("is {length}, and keys have {head_dim} elements")));
            }
            _ => {}
        }
        let rope_key = "llama.rope.dimension_count";
        let rope_dims = if metadata.has(rope_key) {
            number(rope_key, small)?
        } else {
            head_dim
        };
        if rope_dims > head_dim || !rope_dims.is_multiple_of(2) {
            let problem = format!("is {rope_dims}, and must be even and at most the {head_dim} elements of a head");
            return Err(metadata.error(rope_key, problem));
        }
        let context_key = "llama.context_length";
        let context_tokens_max = number(context_key, usize::MAX)?;
        if context_tokens_max
            .checked_mul(4 * rope_dims)
            .is_none_or(|bytes| bytes > ROPE_BYTES_MAX)
        {
            let problem = format!("is {context_tokens_max}, whose rope table would take more than 1 GiB");
            return Err(metadata.error(context_key, problem));
        }
        let positive = |key: &str, default: Option<f32>| match metadata.float(key)?.or(default) {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err(metadata.error(key, format!("is {value}, and must be above 0"))),
            None => Err(metadata.error(key, "is missing")),
        };
        let vocab_key = "llama.vocab_size";
        let vocab = match metadata.number(vocab_key)? {
            Some(vocab) => vocab,
            None => metadata
                .texts("tokenizer.ggml.tokens")?
                .map_or(0, |tokens| tokens.len()),
        };
        Ok(Self {
            layers: number("llama.block_count", small)?,
            hidden,
            feed_forward: number("llama.feed_forward_length", 1 << 22)?,
            q_heads,
            kv_heads,
            head_dim,
            vocab,
            context_tokens_max,
            // 10,000 is what the format says a missing base means.
            rope_theta: positive("llama.rope.freq_base", Some(10_000.0))?,
            rope_dims,
            norm_epsilon: positive("llama.attention.layer_norm_rms_epsilon", None)?,
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

    /// Every tensor of a model of this shape: name, rows, columns (0 columns: a vector), in the order of the forward.
    fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        let (hidden, inner) = (self.hidden, self.feed_forward);
        let (q, kv) = (self.q_heads * self.head_dim, self.kv_heads * self.head_dim);
        let of_layer = [
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

/// Token embeddings; also the output matrix where there is none of its own.
pub(crate) const EMBEDDING: &str = "token_embd.weight";
/// The output matrix.
pub(crate) const OUTPUT: &str = "output.weight";

/// What llama files may ask for beyond the plain forward. Ignoring any of it would give fluent nonsense.
fn refuse_extensions(metadata: &Metadata) -> Result<(), LoadError> {
    let plain = "use a plain Llama model";
    match metadata.text("llama.rope.scaling.type")? {
        None | Some("none") => {}
        Some(other) => {
            return Err(metadata.unsupported(format!("rope scaling {other:?}"), "use a model without rope scaling"));
        }
    }
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        if metadata.float(key)?.is_some_and(|factor| factor != 1.0) {
            return Err(metadata.unsupported(format!("rope scaling ({key})"), "use a model without rope scaling"));
        }
    }
    for (key, what) in [
        ("llama.expert_count", "a mixture of experts"),
        ("llama.attention.sliding_window", "sliding-window attention"),
    ] {
        if metadata.number(key)?.is_some_and(|count| count > 0) {
            return Err(metadata.unsupported(format!("{what} ({key})"), plain));
        }
    }
    Ok(())
}

fn check_tensors(metadata: &Metadata, tensors: &Tensors, shape: &ModelShape) -> Result<(), LoadError> {
    let mut known = std::collections::HashSet::new();
    let output = tensors
        .info(OUTPUT)
        .map(|_| (OUTPUT.to_owned(), vec![shape.vocab, shape.hidden]));
    for (name, dims) in shape.tensors().chain(output) {
        let Some(info) = tensors.info(&name) else {
            return Err(tensors.error(&name, "is missing"));
        };
        if info.dims != dims {
            return Err(tensors.error(
                &name,
                format!("has shape {:?}, and the metadata says {dims:?}", info.dims),
            ));
        }
        if let [_, cols] = dims[..]
            && !cols.is_multiple_of(32)
        {
            let what = format!("tensor {name} with rows of {cols} elements");
            return Err(metadata.unsupported(what, "use a model whose sizes are multiples of 32"));
        }
        known.insert(name);
    }
    match tensors.names().filter(|name| !known.contains(*name)).min() {
        None => Ok(()),
        Some(name) if name.starts_with("rope_freqs") || name.contains(".rope_") => Err(metadata.unsupported(
            format!("rope scaling (tensor {name})"),
            "use a model without rope scaling",
        )),
        Some(name) => Err(metadata.unsupported(
            format!("tensor {name}"),
            "use a plain Llama model, without biases or adapters",
        )),
    }
}

/// The kernels, the forward, and whether weights were quantised again: all that decides the bits beside the file.
fn numerics(tensors: &Tensors) -> String {
    let requantised = tensors
        .names()
        .filter_map(|name| tensors.info(name))
        .any(|info| info.dims.len() > 1 && !matches!(info.dtype, GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q8_0));
    let weights = if requantised { "+q8_0" } else { "" };
    format!("{}+{FORWARD}{weights}", kvasir_simd::NUMERICS)
}

/// SHA-256 over what decides which ids a text becomes, each part with its length.
fn tokenizer_sha256(metadata: &Metadata) -> Result<[u8; 32], LoadError> {
    let mut sha = Sha256::new();
    let mut part = |bytes: &[u8]| {
        sha.update((bytes.len() as u64).to_le_bytes());
        sha.update(bytes);
    };
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.pre", TEMPLATE] {
        part(metadata.text(key)?.unwrap_or_default().as_bytes());
    }
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        let texts = metadata.texts(key)?.unwrap_or_default();
        part(&(texts.len() as u64).to_le_bytes());
        texts.iter().for_each(|text| part(text.as_bytes()));
    }
    let types = metadata.numbers("tokenizer.ggml.token_type")?.unwrap_or_default();
    part(&types.iter().flat_map(|kind| kind.to_le_bytes()).collect::<Vec<u8>>());
    part(&[u8::from(
        metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(false),
    )]);
    Ok(sha.finalize().into())
}

/// The file's stem without its quantisation, lower-cased: converters fill `general.*` with names of training runs, and
/// people name files by what the model is called. Falls back to `general.name`, then `general.basename`.
fn public_name(path: &Path, metadata: &Metadata) -> Result<String, LoadError> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    for name in [
        Some(stem),
        metadata.text("general.name")?,
        metadata.text("general.basename")?,
    ]
    .into_iter()
    .flatten()
    {
        let name = slug(without_quantisation(name));
        if !name.is_empty() && name != "model" && name != "ggml" {
            return Ok(name);
        }
    }
    Ok("llama".to_owned())
}

/// Cuts a last part like `Q4_1`, `q8_0`, `F16`, `IQ4_XS`, set off by a dot, dash or underscore.
fn without_quantisation(stem: &str) -> &str {
    for (at, _) in stem.char_indices().filter(|(_, c)| matches!(c, '.' | '-' | '_')) {
        let tail = stem[at + 1..].to_ascii_lowercase();
        let digits = tail.strip_prefix("iq").or_else(|| tail.strip_prefix('q'));
        let quantised = digits.is_some_and(|rest| {
            rest.starts_with(|c: char| c.is_ascii_digit())
                && rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
                && rest[1..].chars().next().is_none_or(|c| c == '_')
        });
        if quantised || matches!(tail.as_str(), "f16" | "f32" | "bf16" | "fp16") {
            return &stem[..at];
        }
    }
    stem
}

fn slug(name: &str) -> String {
    let dashed = name
        .to_lowercase()
        .replace(|c: char| !(c.is_alphanumeric() || matches!(c, '.' | '_' | '-')), "-");
    dashed.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests;
