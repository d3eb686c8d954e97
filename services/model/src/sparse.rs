//! Sparse prefill of one model: which heads do what, from where on, and what that makes of the KV's identity.
//!
//! A block's name is a hash of the tokens up to its end (`storage/block/src/hash_chain.rs`), so its KV may depend on those and
//! on nothing else. MInference and its successors plan from the last queries of whatever a step happens to hold: the KV of a
//! token would depend on the tokens behind it, and on how the prompt was cut. Here the unit that is planned for is the token
//! block itself: its mask is a function of the block's own queries and of the keys up to its end. Only whole blocks are
//! sparse; the tokens behind the last one attend densely, and a block that they begin never gets a name.
//!
//! CPU and GPU share the definition of a mask and the planners' rules, not their last bits: sums are taken in other orders, so a
//! key at the edge of a choice may be in one mask and not in the other. Their namespaces differ anyway.

use kvasir_block::KvSchema;
use kvasir_sparse::{HeadPatterns, PLANNERS, Pattern};

use crate::{LoadError, ModelShape};

/// Height of a row block, the queries of one head that share their tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileRows {
    /// What the CPU's kernel takes at a time; a diagonal that stands alone costs least so.
    Rows64,
    /// What the GPU's kernel takes at a time.
    Rows128,
}

impl TileRows {
    /// As a number.
    pub const fn rows(self) -> usize {
        match self {
            Self::Rows64 => 64,
            Self::Rows128 => 128,
        }
    }
}

/// Patterns that fit a model.
#[derive(Clone, Debug, PartialEq)]
pub struct SparsePrefill {
    patterns: HeadPatterns,
    block_tokens: usize,
    tile_rows: TileRows,
}

impl SparsePrefill {
    /// `patterns` for the model of this shape and identity, planned for its blocks; `tile_rows` is
    /// [`Device::tile_rows`](crate::Device::tile_rows) of what is to compute.
    ///
    /// # Errors
    /// [`LoadError::Sparse`] if they are another model's, or blocks are no whole row blocks.
    pub fn new(
        patterns: HeadPatterns,
        shape: &ModelShape,
        schema: &KvSchema,
        tile_rows: TileRows,
    ) -> Result<Self, LoadError> {
        let (layers, heads) = (patterns.layers().len(), patterns.layers().first().map_or(0, Vec::len));
        if (layers, heads) != (shape.layers, shape.q_heads) {
            return Err(LoadError::Sparse(format!(
                "patterns of {layers} layers of {heads} heads, and the model has {} of {}: search them for this model with \
                 `kvasir search-heads`",
                shape.layers, shape.q_heads
            )));
        }
        let model = hex(&schema.model_fingerprint());
        if let Some(theirs) = patterns.model_fingerprint.as_ref().filter(|theirs| **theirs != model) {
            return Err(LoadError::Sparse(format!(
                "patterns of the model with fingerprint {theirs}, and this one's is {model}: search them for this model with \
                 `kvasir search-heads`"
            )));
        }
        let (block_tokens, rows) = (usize::from(schema.block_tokens), tile_rows.rows());
        if block_tokens == 0 || !block_tokens.is_multiple_of(rows) {
            return Err(LoadError::Sparse(format!(
                "blocks of {block_tokens} tokens: sparse prefill plans for whole blocks, which must be multiples of {rows} on this \
                 device, and pays with 256 and more"
            )));
        }
        Ok(Self {
            patterns,
            block_tokens,
            tile_rows,
        })
    }

    /// Height of a row block.
    pub(crate) fn tile_rows(&self) -> TileRows {
        self.tile_rows
    }

    /// The patterns of a layer's query heads.
    pub(crate) fn layer(&self, layer: usize) -> &[Pattern] {
        self.patterns.layers().get(layer).map_or(&[], Vec::as_slice)
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
    pub fn schema(&self, schema: &KvSchema) -> KvSchema {
        let (rows, id) = (self.tile_rows.rows(), hex(&self.patterns.fingerprint()));
        KvSchema {
            numerics: format!("{}+{PLANNERS}x{rows}:{id}", schema.numerics),
            ..schema.clone()
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
