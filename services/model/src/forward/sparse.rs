//! Attention of whole blocks under their heads' masks.
//!
//! A task is one head of one block: it gathers the keys up to the block's end, plans, and attends row block by row block over
//! what the mask holds. Where that is everything, the bits are those of full attention: the same runs of keys, cut and joined
//! at the same positions.

use std::ops::Range;

use half::f16;
use kvasir_simd::{Partial, Segment, attend, merge};
use kvasir_sparse::{HeadChunk, HeadMask, Held, Pattern};
use parking_lot::Mutex;

use super::{
    CpuModel,
    batch::{Plan, Sequence},
};
use crate::{PagePool, weights::Columns};

/// Queries that are attended for at a time: as many as share a converted run of keys in the kernel. Row blocks of a mask are
/// as high, or a multiple.
const STRIP: usize = 64;

/// One head of one block.
#[derive(Clone, Copy)]
struct Task {
    sequence: usize,
    /// First token of the block, in its sequence.
    first: usize,
    head: usize,
}

/// Buffers of a task, reused.
#[derive(Default)]
pub(super) struct TaskScratch {
    queries: Vec<f32>,
    /// All keys up to the block's end, for planning.
    keys: Vec<f16>,
    /// Gathered columns.
    column_keys: Vec<f16>,
    column_values: Vec<f16>,
    partial: Partial,
    part: Partial,
    visible: Vec<usize>,
    /// `[block_tokens, head_dim]`.
    out: Vec<f32>,
}

/// A layer at work, as tasks see it.
struct Layer<'a> {
    plan: &'a Plan,
    layer: usize,
    qkv: &'a [f32],
    q: Columns,
    pool: &'a PagePool,
    patterns: &'a [Pattern],
    /// Height of the masks' row blocks.
    rows: usize,
}

impl CpuModel {
    /// Attends for the blocks of the step that are sparse (in the last layer: those that matter) into their rows of `attended`.
    #[expect(
        clippy::too_many_arguments,
        reason = "a layer's whole state; a struct for one call would hide it"
    )]
    pub(super) fn attend_sparsely(
        &self,
        plan: &Plan,
        layer: usize,
        last: bool,
        q: Columns,
        pool: &PagePool,
        qkv: &[f32],
        scratch: &mut Vec<Mutex<TaskScratch>>,
        attended: &mut [f32],
    ) {
        let Some(sparse) = &self.sparse else { return };
        let block_tokens = pool.layout().block_tokens;
        let mut tasks = Vec::new();
        for (index, sequence) in plan.sequences.iter().enumerate() {
            let kept_from = sequence.rows.len() - sequence.logits.len();
            for first in sequence.sparse.clone().step_by(block_tokens) {
                if !last || first + block_tokens > kept_from {
                    tasks.extend((0..self.shape.q_heads).map(|head| Task {
                        sequence: index,
                        first,
                        head,
                    }));
                }
            }
        }
        if scratch.len() < tasks.len() {
            scratch.resize_with(tasks.len(), Mutex::default);
        }
        let work = Layer {
            plan,
            layer,
            qkv,
            q,
            pool,
            patterns: sparse.layer(layer),
            rows: sparse.tile_rows().rows(),
        };
        let buffers = &scratch[..];
        self.threads.run(tasks.len(), &|task| {
            self.run_task(&work, tasks[task], &mut buffers[task].lock())
        });
        let (d, q_heads) = (self.shape.head_dim, self.shape.q_heads);
        for (task, buffers) in tasks.iter().zip(scratch) {
            let first = plan.sequences[task.sequence].rows.start + task.first;
            for (row, out) in (first..).zip(buffers.get_mut().out.chunks_exact(d)) {
                attended[(row * q_heads + task.head) * d..][..d].copy_from_slice(out);
            }
        }
    }

    fn run_task(&self, work: &Layer<'_>, task: Task, scratch: &mut TaskScratch) {
        let sequence = &work.plan.sequences[task.sequence];
        let (d, block_tokens) = (self.shape.head_dim, work.pool.layout().block_tokens);
        let kv_head = task.head / self.shape.group();
        let offset = sequence.position + task.first;
        scratch.queries.clear();
        for row in sequence.rows.start + task.first..sequence.rows.start + task.first + block_tokens {
            let heads = &work.qkv[work.q.row(row)];
            scratch.queries.extend_from_slice(&heads[task.head * d..][..d]);
        }
        let mask = self.mask(work, task, kv_head, offset, scratch);
        scratch.out.resize(block_tokens * d, 0.0);
        for strip in 0..block_tokens / STRIP {
            let block = strip * STRIP / work.rows;
            let held = mask.held(offset + (block + 1) * work.rows, block);
            let end = offset + (strip + 1) * STRIP;
            scratch.visible.clear();
            scratch.visible.extend(end - STRIP + 1..=end);
            self.attend_held(work, sequence, kv_head, strip, &held, scratch);
            scratch.out[strip * STRIP * d..][..STRIP * d].copy_from_slice(&scratch.partial.o);
        }
    }

    /// The mask of a head of a block that begins at position `offset`.
    fn mask(&self, work: &Layer<'_>, task: Task, kv_head: usize, offset: usize, scratch: &mut TaskScratch) -> HeadMask {
        let pattern = &work.patterns[task.head];
        if matches!(pattern, Pattern::Dense) {
            return HeadMask::Dense;
        }
        let layout = work.pool.layout();
        let end = offset + layout.block_tokens;
        scratch.keys.clear();
        for span in &work.plan.sequences[task.sequence].spans {
            if span.position < end {
                let keys = &work.pool.page(work.layer, span.page)[layout.keys(kv_head)];
                scratch
                    .keys
                    .extend_from_slice(&keys[..span.rows.len() * layout.head_dim]);
            }
        }
        match HeadChunk::new(&scratch.queries, &scratch.keys, layout.head_dim, self.softmax_scale()) {
            Ok(chunk) => pattern.plan(&chunk, work.rows),
            Err(error) => unreachable!("a block's queries and the keys up to its end: {error}"),
        }
    }

    /// Attention of strip `strip` over what is held, into `scratch.partial`.
    fn attend_held(
        &self,
        work: &Layer<'_>,
        sequence: &Sequence,
        kv_head: usize,
        strip: usize,
        held: &Held,
        scratch: &mut TaskScratch,
    ) {
        let layout = work.pool.layout();
        let (d, block_tokens) = (layout.head_dim, layout.block_tokens);
        let (keys, values) = (layout.keys(kv_head), layout.values(kv_head));
        let TaskScratch {
            queries,
            column_keys,
            column_values,
            partial,
            part,
            visible,
            ..
        } = scratch;
        let queries = &queries[strip * STRIP * d..][..STRIP * d];
        let page = |index: usize| work.pool.page(work.layer, sequence.spans[index].page);
        let mut attend_to = |segments: &[Segment<'_>], first: &mut bool| {
            let into = if *first { &mut *partial } else { &mut *part };
            attend(queries, visible, d, self.softmax_scale(), segments, into);
            if !std::mem::replace(first, false) {
                merge(partial, part, d);
            }
        };
        let (mut first, mut segments) = (true, Vec::new());
        for split in &sequence.splits {
            segments.clear();
            for range in &held.ranges {
                for index in pages_within(range, split, block_tokens) {
                    let start = index * block_tokens;
                    let rows = range.start.max(start) - start..range.end.min(start + block_tokens) - start;
                    let at = rows.start * d..rows.end * d;
                    segments.push(Segment {
                        keys: &page(index)[keys.clone()][at.clone()],
                        values: &page(index)[values.clone()][at],
                        position: start + rows.start,
                    });
                }
            }
            if !segments.is_empty() {
                attend_to(&segments, &mut first);
            }
        }
        if held.columns.is_empty() {
            return;
        }
        column_keys.clear();
        column_values.clear();
        for &column in &held.columns {
            let (index, row) = (column as usize / block_tokens, column as usize % block_tokens * d);
            column_keys.extend_from_slice(&page(index)[keys.clone()][row..row + d]);
            column_values.extend_from_slice(&page(index)[values.clone()][row..row + d]);
        }
        // Every mask holds its diagonal as tiles, so columns outside of tiles lie before the row block and all of its queries
        // see them all; there are fewer of them than positions, so neither does their number exceed what is visible.
        let segment = Segment {
            keys: column_keys,
            values: column_values,
            position: 0,
        };
        attend_to(&[segment], &mut first);
    }
}

/// Indices of the pages of `split` that hold positions of `range`. A sparse sequence's spans are its pages, one by one from
/// position 0.
fn pages_within(range: &Range<usize>, split: &Range<usize>, block_tokens: usize) -> Range<usize> {
    let start = (range.start / block_tokens).max(split.start);
    start..range.end.div_ceil(block_tokens).min(split.end).max(start)
}
