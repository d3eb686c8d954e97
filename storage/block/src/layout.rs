//! Where a key or value row lies inside a layer block's payload.

use std::ops::Range;

use crate::Dtype;

/// Layout `k-then-v/head-major/v1`: first all keys, then all values; inside each, KV head after KV head; inside a
/// head, token after token; rows of `head_dim` elements. The keys of one head are contiguous, which is what a scan
/// wants, and a worker's page has the same layout, so that offload and onboard are plain copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerBlockLayout {
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Elements per row.
    pub head_dim: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Element type.
    pub dtype: Dtype,
}

impl LayerBlockLayout {
    /// Name of the layout in schemas.
    pub const NAME: &'static str = "k-then-v/head-major/v1";

    /// Elements of the keys (or of the values) of one KV head.
    pub const fn head_elements(&self) -> usize {
        self.block_tokens * self.head_dim
    }

    /// Elements of a layer block: keys and values of all heads.
    pub const fn elements(&self) -> usize {
        2 * self.kv_heads * self.head_elements()
    }

    /// Bytes of a layer block.
    pub const fn bytes(&self) -> usize {
        self.elements() * self.dtype.bytes()
    }

    /// Elements of the keys of `kv_head`: `block_tokens x head_dim`.
    pub const fn keys(&self, kv_head: usize) -> Range<usize> {
        let start = kv_head * self.head_elements();
        start..start + self.head_elements()
    }

    /// Elements of the values of `kv_head`: `block_tokens x head_dim`.
    pub const fn values(&self, kv_head: usize) -> Range<usize> {
        let start = (self.kv_heads + kv_head) * self.head_elements();
        start..start + self.head_elements()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_tile_the_block() {
        let layout = LayerBlockLayout {
            kv_heads: 3,
            head_dim: 64,
            block_tokens: 64,
            dtype: Dtype::F16,
        };
        let mut end = 0;
        for range in (0..3)
            .map(|head| layout.keys(head))
            .chain((0..3).map(|head| layout.values(head)))
        {
            assert_eq!(range.start, end);
            end = range.end;
        }
        assert_eq!((end, layout.bytes()), (layout.elements(), 49_152));
    }
}
