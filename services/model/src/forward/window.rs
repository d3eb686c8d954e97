//! Attention in layers that see a window only.
//!
//! A token is attended for by itself, over the keys of its window from the first on: the kernel cuts keys into tiles from where
//! they begin, so a token's bits depend on its position and on nothing else of the step. Pages are kept whole, as in other
//! layers; a window says what of them is read.

use kvasir_simd::{Segment, attend};

use super::{
    CpuModel,
    attention::JobScratch,
    batch::{Plan, Span, Tile},
};
use crate::{PagePool, weights::Columns};

impl CpuModel {
    /// Attends for the tokens of `tile` to the last `window` keys of each, into `scratch.partial`.
    #[expect(
        clippy::too_many_arguments,
        reason = "called once, from a closure over the same names"
    )]
    pub(super) fn attend_in_window(
        &self,
        plan: &Plan,
        tile: &Tile,
        window: usize,
        layer: usize,
        qkv: &[f32],
        q: Columns,
        pool: &PagePool,
        scratch: &mut JobScratch,
    ) {
        let sequence = &plan.sequences[tile.sequence];
        let (group, head_dim) = (self.shape.group(), self.shape.head_dim);
        let layout = pool.layout();
        let (keys, values) = (layout.keys(tile.kv_head), layout.values(tile.kv_head));
        scratch.partial.o.clear();
        scratch.partial.lse.clear();
        let mut segments = Vec::new();
        for token in tile.tokens.clone() {
            let end = sequence.position + token + 1;
            let start = end.saturating_sub(window);
            segments.clear();
            segments.extend(spans_from(&sequence.spans, start, end).map(|(span, rows)| {
                let page = pool.page(layer, span.page);
                let elements = rows.start * head_dim..rows.end * head_dim;
                Segment {
                    keys: &page[keys.clone()][elements.clone()],
                    values: &page[values.clone()][elements],
                    position: span.position + rows.start - span.rows.start,
                }
            }));
            let heads = &qkv[q.row(sequence.rows.start + token)][tile.kv_head * group * head_dim..][..group * head_dim];
            scratch.visible.clear();
            scratch.visible.resize(group, end);
            let scale = self.softmax_scale();
            attend(heads, &scratch.visible, head_dim, scale, &segments, &mut scratch.split);
            scratch.partial.o.extend_from_slice(&scratch.split.o);
            scratch.partial.lse.extend_from_slice(&scratch.split.lse);
        }
    }
}

/// The spans that hold positions of `start..end`, each with its rows from `start` on. Rows at `end` and behind are not seen anyway.
fn spans_from(spans: &[Span], start: usize, end: usize) -> impl Iterator<Item = (&Span, std::ops::Range<usize>)> {
    let first = spans.partition_point(|span| span.position + span.rows.len() <= start);
    let seen = spans[first..].iter().take_while(move |span| span.position < end);
    seen.map(move |span| {
        let skipped = start.saturating_sub(span.position);
        (span, span.rows.start + skipped..span.rows.end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageId;

    #[test]
    fn a_window_begins_inside_a_page() {
        let spans: Vec<Span> = (0..4)
            .map(|page| Span {
                page: PageId(page),
                rows: 0..4,
                position: 4 * page as usize,
            })
            .collect();
        // Window, then page and rows of each span.
        type Seen<'a> = &'a [(u32, std::ops::Range<usize>)];
        let table: [(std::ops::Range<usize>, Seen<'_>); 5] = [
            (0..1, &[(0, 0..4)]),
            (0..5, &[(0, 0..4), (1, 0..4)]),
            (3..8, &[(0, 3..4), (1, 0..4)]),
            (4..8, &[(1, 0..4)]),
            (9..16, &[(2, 1..4), (3, 0..4)]),
        ];
        for (window, expected) in table {
            let found: Vec<_> = spans_from(&spans, window.start, window.end)
                .map(|(span, rows)| (span.page.0, rows))
                .collect();
            assert_eq!(found, expected, "{window:?}");
        }
    }
}
