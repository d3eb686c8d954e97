//! Sparse prefill of one model: which heads do what, from where on, and what that makes of the KV's identity.
//!
//! A block's name is a hash of the tokens up to its end (`storage/block/src/hash_chain.rs`), so its KV may depend on those and
//! on nothing else. MInference and its successors plan from the last queries of whatever a step happens to hold: the KV of a
//! token would depend on the tokens behind it, and on how the prompt was cut. Here the unit that is planned for is the token
//! block itself: its mask is a function of the block's own queries and of the keys up to its end. Only whole blocks are
//! sparse; the tokens behind the last one attend densely, and a block that they begin never gets a name.

use kvasir_block::KvSchema;
use kvasir_sparse::{HeadPatterns, PLANNERS};

use crate::{LoadError, ModelFile};

/// Queries of a row block on the CPU: as many as share a converted run of keys in the kernel.
pub(crate) const ROWS: usize = 64;

/// Patterns that fit a model.
#[derive(Clone, Debug, PartialEq)]
pub struct SparsePrefill {
    patterns: HeadPatterns,
    block_tokens: usize,
}

impl SparsePrefill {
    /// `patterns` for the model in `file`, planned for blocks of `block_tokens`.
    ///
    /// # Errors
    /// [`LoadError::Sparse`] if they are another model's, or blocks are no whole row blocks of 64 tokens.
    pub fn new(patterns: HeadPatterns, file: &ModelFile, block_tokens: u16) -> Result<Self, LoadError> {
        let shape = file.shape();
        let (layers, heads) = (patterns.layers().len(), patterns.layers().first().map_or(0, Vec::len));
        if (layers, heads) != (shape.layers, shape.q_heads) {
            return Err(LoadError::Sparse(format!(
                "patterns of {layers} layers of {heads} heads, and the model has {} of {}: search them for this model with \
                 `kvasir search-heads`",
                shape.layers, shape.q_heads
            )));
        }
        let model: String = file
            .schema(1)
            .model_fingerprint()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        if let Some(theirs) = patterns.model_fingerprint.as_ref().filter(|theirs| **theirs != model) {
            return Err(LoadError::Sparse(format!(
                "patterns of the model with fingerprint {theirs}, and this one's is {model}: search them for this model with \
                 `kvasir search-heads`"
            )));
        }
        let block_tokens = usize::from(block_tokens);
        if block_tokens == 0 || !block_tokens.is_multiple_of(ROWS) {
            return Err(LoadError::Sparse(format!(
                "blocks of {block_tokens} tokens: sparse prefill plans for whole blocks, which must be multiples of {ROWS}, and \
                 pays with 256 and more"
            )));
        }
        Ok(Self { patterns, block_tokens })
    }

    /// The patterns.
    pub fn patterns(&self) -> &HeadPatterns {
        &self.patterns
    }

    /// Position of the first token that may attend sparsely: a block's first.
    pub fn from(&self) -> usize {
        let from = self.patterns.dense_up_to;
        from.checked_next_multiple_of(self.block_tokens).unwrap_or(usize::MAX)
    }

    /// The identity of what is computed this way: `schema` with everything that changes a mask in its numerics. Not in its
    /// attention kind, on which the model's fingerprint and with it every sketch basis depends: keys of a sparse prefill are
    /// searched like any others.
    pub fn schema(&self, schema: KvSchema) -> KvSchema {
        let id: String = self
            .patterns
            .fingerprint()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        KvSchema {
            numerics: format!("{}+{PLANNERS}:{id}", schema.numerics),
            ..schema
        }
    }
}
