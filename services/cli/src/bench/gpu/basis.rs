//! A sketch basis for a model of noise: directions from the keys of a context and the queries that were asked of it.

use anyhow::{Context, Result};
use half::f16;
use kvasir_index::{Basis, Calibrated, Moments};

use super::forward::Forward;

/// Of so many blocks of the context one is looked at.
const EVERY: usize = 32;

/// Moments of every KV head, layer after layer.
pub(super) struct Gathered {
    layers: usize,
    kv_heads: usize,
    heads: Vec<Moments>,
}

impl Gathered {
    /// Keys of the first sequence's first `blocks` blocks, of one in [`EVERY`].
    pub(super) fn keys(forward: &Forward, blocks: usize) -> Result<Self> {
        let shape = forward.shape();
        let (layers, kv_heads) = (shape.layers, shape.kv_heads);
        let layout = forward.schema().layout();
        let mut keys: Vec<Vec<f16>> = vec![Vec::new(); layers * kv_heads];
        for (head, keys) in keys.iter_mut().enumerate() {
            let range = layout.keys(head % kv_heads);
            for block in (0..blocks).step_by(EVERY) {
                let bytes = forward.block(head / kv_heads, block)?;
                let words = bytes.as_chunks::<2>().0.get(range.clone());
                let words = words.context("a page is shorter than its layout says")?;
                keys.extend(words.iter().map(|word| f16::from_le_bytes(*word)));
            }
        }
        let mut heads = vec![Moments::new(shape.head_dim); layers * kv_heads];
        on_all_threads(&mut heads, &keys, |moments, keys| moments.add_keys(keys));
        Ok(Self {
            layers,
            kv_heads,
            heads,
        })
    }

    /// With queries, of each layer `[n, q_heads, head_dim]`; the basis in as many directions as a sketch has by default.
    pub(super) fn basis(mut self, forward: &Forward, queries: &[Vec<f32>]) -> Result<Basis> {
        let shape = forward.shape();
        let width = shape.q_heads * shape.head_dim;
        let per_head = shape.group() * shape.head_dim;
        let of_head = |head: usize| -> Vec<f32> {
            let kv_head = head % self.kv_heads;
            let rows = queries.get(head / self.kv_heads).map_or(&[][..], Vec::as_slice);
            rows.chunks_exact(width)
                .flat_map(|row| &row[kv_head * per_head..][..per_head])
                .copied()
                .collect()
        };
        let queries: Vec<Vec<f32>> = (0..self.heads.len()).map(of_head).collect();
        on_all_threads(&mut self.heads, &queries, |moments, q| moments.add_queries(q));
        let mut found: Vec<Option<Result<Calibrated, _>>> = Vec::new();
        found.resize_with(self.heads.len(), || None);
        on_all_threads(&mut found, &self.heads, |found, moments| {
            *found = Some(moments.basis(Basis::RANK));
        });
        let mut heads = Vec::with_capacity(found.len());
        for head in found.into_iter().flatten() {
            heads.push(head?.basis);
        }
        Ok(Basis {
            model: forward.schema().model_fingerprint(),
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: shape.head_dim,
            rank: Basis::RANK,
            heads,
        })
    }
}

/// Calls `act` for each of `to` and what stands in the same place of `from`, on all processors.
fn on_all_threads<T: Send, F: Sync>(to: &mut [T], from: &[F], act: impl Fn(&mut T, &F) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let some = to.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (to, from) in to.chunks_mut(some).zip(from.chunks(some)) {
            let act = &act;
            scope.spawn(move || to.iter_mut().zip(from).for_each(|(to, from)| act(to, from)));
        }
    });
}
