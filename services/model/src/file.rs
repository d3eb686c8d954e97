//! What a model file says: shape, identity, tokenizer, template.

mod shape;

use std::{path::Path, sync::Arc};

use candle_core::quantized::GgmlDType;
use kvasir_block::{Dtype, KvSchema};
use sha2::{Digest, Sha256};

pub use self::shape::{Architecture, ModelShape, Sliding};
use crate::{
    ChatTemplate, LoadError, Tokenizer,
    gguf::{self, Metadata, Tensors},
};

/// How the forward of a Llama orders its floating-point steps, above the kernels; changes whenever its bits change.
pub(crate) const FORWARD: &str = "llama/1";

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

impl ModelFile {
    /// Opens the GGUF file at `path` and checks that this forward can run it: architecture `llama` or `gemma3`, sizes that agree,
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
            numerics: numerics(&tensors, &shape),
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
            attention: self.shape.attention(),
            rope_theta: self.shape.rope_theta,
            rope_dims: narrow(self.shape.rope_dims),
            rope_style: self.shape.rope_style(),
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

/// Token embeddings; also the output matrix where there is none of its own.
pub(crate) const EMBEDDING: &str = "token_embd.weight";
/// The output matrix.
pub(crate) const OUTPUT: &str = "output.weight";

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
            "use a plain model, without biases or adapters",
        )),
    }
}

/// The kernels, the forward, and whether weights were quantised again: all that decides the bits beside the file.
fn numerics(tensors: &Tensors, shape: &ModelShape) -> String {
    let requantised = tensors
        .names()
        .filter_map(|name| tensors.info(name))
        .any(|info| info.dims.len() > 1 && !matches!(info.dtype, GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q8_0));
    let weights = if requantised { "+q8_0" } else { "" };
    format!("{}+{}{weights}", kvasir_simd::NUMERICS, shape.architecture.forward())
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
    // Where pieces are merged by score, scores decide; other files have none that count.
    if metadata.text("tokenizer.ggml.model")? == Some("llama") {
        let scores = metadata.floats("tokenizer.ggml.scores")?.unwrap_or_default();
        part(&scores.iter().flat_map(|score| score.to_le_bytes()).collect::<Vec<u8>>());
    }
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
