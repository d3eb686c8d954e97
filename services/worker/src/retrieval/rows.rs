//! Attention over rows that the store found: those that came, and those that were kept.

use half::f16;
use kvasir_client::HeadRows;
use kvasir_simd::{Partial, Segment, attend, read_f16};

use super::{
    link::LinkShape,
    row_cache::{RowCache, SentRows},
};

/// What a sequence keeps of the rows it was sent, for every layer and KV head.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// `[layers, kv_heads]`; empty where nothing is kept.
    caches: Vec<RowCache>,
    keys: Vec<f16>,
    values: Vec<f16>,
}

impl Kept {
    /// Keeps at most `rows_max` rows of each layer and KV head.
    pub(crate) fn new(shape: LinkShape, rows_max: usize) -> Self {
        let caches = if rows_max == 0 {
            0
        } else {
            shape.layers * shape.kv_heads
        };
        Self {
            caches: (0..caches).map(|_| RowCache::new(rows_max, shape.head_dim)).collect(),
            ..Self::default()
        }
    }
}

/// Rows of one reply, over KV heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RowCount {
    pub(crate) all: u64,
    /// Of those, kept before.
    pub(crate) kept: u64,
}

/// Attention of `q[q_heads, head_dim]` over the rows of one reply. The rows of a KV head are the union over its group, and each
/// query head of the group attends to all of them: what came is used.
///
/// # Errors
/// In words, if the rows do not fit together.
pub(crate) fn attend_rows(
    heads: &[HeadRows],
    q: &[f32],
    shape: LinkShape,
    layer: usize,
    kept: &mut Kept,
) -> Result<(Partial, RowCount), String> {
    let LinkShape {
        q_heads,
        kv_heads,
        head_dim,
        softmax_scale,
        ..
    } = shape;
    if heads.len() != kv_heads {
        return Err(format!("rows of {} KV heads came back, not of {kv_heads}", heads.len()));
    }
    let group = q_heads / kv_heads;
    let (mut all, mut count) = (Partial::default(), RowCount::default());
    let mut one = Partial::default();
    for (head, rows) in heads.iter().enumerate() {
        let (came_keys, came_values) = (read_f16(&rows.keys), read_f16(&rows.values));
        count.all += rows.positions.len() as u64;
        let (keys, values) = match &rows.sent {
            None => (&came_keys[..], &came_values[..]),
            Some(sent) => {
                let Some(cache) = kept.caches.get_mut(layer * kv_heads + head) else {
                    return Err("the store left rows out, and none are kept here".to_owned());
                };
                let reply = SentRows {
                    positions: &rows.positions,
                    sent,
                    keys: &came_keys,
                    values: &came_values,
                };
                (kept.keys.clear(), kept.values.clear());
                cache.complete(reply, &mut kept.keys, &mut kept.values)?;
                count.kept += (rows.positions.len() - sent.len()) as u64;
                (&kept.keys[..], &kept.values[..])
            }
        };
        let elements = rows.positions.len() * head_dim;
        if keys.len() != elements || values.len() != elements {
            return Err(format!(
                "{} positions came back with {} elements of keys and {} of values, not {elements}",
                rows.positions.len(),
                keys.len(),
                values.len()
            ));
        }
        let segment = Segment {
            keys,
            values,
            position: 0,
        };
        let queries = &q[head * group * head_dim..(head + 1) * group * head_dim];
        // The store searches the context only, so every row lies before the query.
        let visible = vec![rows.positions.len(); group];
        attend(queries, &visible, head_dim, softmax_scale, &[segment], &mut one);
        all.o.extend_from_slice(&one.o);
        all.lse.extend_from_slice(&one.lse);
    }
    Ok((all, count))
}

#[cfg(test)]
mod tests;
