//! Attention over pages, and its join with what comes from elsewhere.

use kvasir_simd::{Partial, Segment, attend, merge};
use parking_lot::Mutex;

use super::{CpuModel, Scratch, StepError, StepHooks, batch::Plan, sparse::TaskScratch};
use crate::{PagePool, weights::Columns};

/// Buffers of attention, reused.
#[derive(Default)]
pub(super) struct AttentionScratch {
    /// One per job; each is locked by its task alone.
    jobs: Vec<Mutex<JobScratch>>,
    /// A local sequence's queries, then its partial, `[tokens, q_heads, head_dim]`.
    queries: Vec<f32>,
    partial: Partial,
    /// One per head of a sparse block.
    sparse: Vec<Mutex<TaskScratch>>,
}

/// Buffers of a job.
#[derive(Default)]
pub(super) struct JobScratch {
    /// `[tokens, heads of the group, head_dim]`.
    queries: Vec<f32>,
    /// `[tokens, heads of the group]`.
    pub(super) visible: Vec<usize>,
    pub(super) partial: Partial,
    /// The partial of a split, before it is joined; of a token, in a window.
    pub(super) split: Partial,
}

impl CpuModel {
    /// Attends for all tokens of the step (in the last layer: those that matter) into `scratch.attended`,
    /// `[tokens, q_heads, head_dim]`.
    #[expect(
        clippy::too_many_arguments,
        reason = "a layer's whole state; a struct for one call would hide it"
    )]
    pub(super) fn attend(
        &self,
        plan: &Plan,
        layer: usize,
        last: bool,
        q: Columns,
        pool: &PagePool,
        hooks: &mut dyn StepHooks,
        scratch: &mut Scratch,
    ) -> Result<(), StepError> {
        for (index, sequence) in plan.sequences.iter().enumerate().filter(|(_, sequence)| sequence.local) {
            let queries = &mut scratch.attention.queries;
            queries.clear();
            sequence
                .rows
                .clone()
                .for_each(|row| queries.extend_from_slice(&scratch.qkv[q.row(row)]));
            hooks.remote_begin(layer, index, queries)?;
        }
        self.watch(plan, layer, q, hooks, scratch)?;
        let Scratch {
            qkv,
            attention,
            attended,
            ..
        } = scratch;
        let (qkv, width) = (&qkv[..], self.shape.q_heads * self.shape.head_dim);
        if attention.jobs.len() < plan.jobs.len() {
            attention.jobs.resize_with(plan.jobs.len(), Mutex::default);
        }
        let jobs = &attention.jobs;
        let window = self.shape.window(layer);
        match window {
            None => self.threads.run(plan.jobs.len(), &|job| {
                if !last || plan.tiles[plan.jobs[job].tile].kept {
                    self.run_job(plan, job, layer, qkv, q, pool, &mut jobs[job].lock());
                }
            }),
            // A tile is one task: there is little to see.
            Some(window) => self.threads.run(plan.tiles.len(), &|tile| {
                let tile = &plan.tiles[tile];
                if !last || tile.kept {
                    self.attend_in_window(
                        plan,
                        tile,
                        window,
                        layer,
                        qkv,
                        q,
                        pool,
                        &mut jobs[tile.jobs.start].lock(),
                    );
                }
            }),
        }
        attended.resize(plan.tokens * width, 0.0);
        let group = self.shape.group();
        let row_width = group * self.shape.head_dim;
        for tile in plan.tiles.iter().filter(|tile| !last || tile.kept) {
            if window.is_none() {
                join(&mut attention.jobs[tile.jobs.clone()], self.shape.head_dim);
            }
            let sequence = &plan.sequences[tile.sequence];
            if sequence.local {
                continue;
            }
            let o = &attention.jobs[tile.jobs.start].get_mut().partial.o;
            for (token, o) in tile.tokens.clone().zip(o.chunks_exact(row_width)) {
                let row = (sequence.rows.start + token) * width + tile.kv_head * row_width;
                attended[row..][..row_width].copy_from_slice(o);
            }
        }
        self.attend_sparsely(plan, layer, last, q, pool, qkv, &mut attention.sparse, attended);
        for (index, sequence) in plan.sequences.iter().enumerate().filter(|(_, sequence)| sequence.local) {
            attention.gather(plan, index, group, self.shape.q_heads, self.shape.head_dim);
            hooks.attended_locally(layer, index, &attention.partial.lse);
            if let Some(remote) = hooks.remote_finish(layer, index)? {
                check_remote(&remote, attention.partial.lse.len(), self.shape.head_dim)?;
                merge(&mut attention.partial, &remote, self.shape.head_dim);
            }
            attended[sequence.rows.start * width..sequence.rows.end * width].copy_from_slice(&attention.partial.o);
        }
        Ok(())
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "called once, from a closure over the same names"
    )]
    fn run_job(
        &self,
        plan: &Plan,
        job: usize,
        layer: usize,
        qkv: &[f32],
        q: Columns,
        pool: &PagePool,
        scratch: &mut JobScratch,
    ) {
        let job = &plan.jobs[job];
        let tile = &plan.tiles[job.tile];
        let sequence = &plan.sequences[tile.sequence];
        let (group, head_dim) = (self.shape.group(), self.shape.head_dim);
        scratch.queries.clear();
        scratch.visible.clear();
        for token in tile.tokens.clone() {
            let heads = &qkv[q.row(sequence.rows.start + token)];
            scratch
                .queries
                .extend_from_slice(&heads[tile.kv_head * group * head_dim..][..group * head_dim]);
            scratch
                .visible
                .extend(std::iter::repeat_n(sequence.position + token + 1, group));
        }
        let layout = pool.layout();
        let (keys, values) = (layout.keys(tile.kv_head), layout.values(tile.kv_head));
        let scale = self.softmax_scale();
        let mut segments: Vec<Segment<'_>> = Vec::new();
        for split in job.splits.clone() {
            segments.clear();
            segments.extend(sequence.spans[sequence.splits[split].clone()].iter().map(|span| {
                let page = pool.page(layer, span.page);
                let rows = span.rows.start * head_dim..span.rows.end * head_dim;
                Segment {
                    keys: &page[keys.clone()][rows.clone()],
                    values: &page[values.clone()][rows],
                    position: span.position,
                }
            }));
            if split == job.splits.start {
                attend(
                    &scratch.queries,
                    &scratch.visible,
                    head_dim,
                    scale,
                    &segments,
                    &mut scratch.partial,
                );
            } else {
                attend(
                    &scratch.queries,
                    &scratch.visible,
                    head_dim,
                    scale,
                    &segments,
                    &mut scratch.split,
                );
                merge(&mut scratch.partial, &scratch.split, head_dim);
            }
        }
        if job.splits.is_empty() {
            attend(
                &scratch.queries,
                &scratch.visible,
                head_dim,
                scale,
                &[],
                &mut scratch.partial,
            );
        }
    }
}

impl AttentionScratch {
    /// Puts a local sequence's tiles together.
    fn gather(&mut self, plan: &Plan, index: usize, group: usize, q_heads: usize, head_dim: usize) {
        let tokens = plan.sequences[index].rows.len();
        self.partial.o.resize(tokens * q_heads * head_dim, 0.0);
        self.partial.lse.resize(tokens * q_heads, 0.0);
        for tile in plan.tiles.iter().filter(|tile| tile.sequence == index) {
            let from = &self.jobs[tile.jobs.start].get_mut().partial;
            let rows = from.o.chunks_exact(group * head_dim).zip(from.lse.chunks_exact(group));
            for (token, (o, lse)) in tile.tokens.clone().zip(rows) {
                let row = token * q_heads + tile.kv_head * group;
                self.partial.lse[row..][..group].copy_from_slice(lse);
                self.partial.o[row * head_dim..][..group * head_dim].copy_from_slice(o);
            }
        }
    }
}

/// Joins a tile's jobs into its first, in order.
fn join(jobs: &mut [Mutex<JobScratch>], head_dim: usize) {
    if let Some((first, rest)) = jobs.split_first_mut() {
        for job in rest {
            merge(&mut first.get_mut().partial, &job.get_mut().partial, head_dim);
        }
    }
}

/// What comes from elsewhere is checked before it reaches the residual stream, where it would spoil every later token.
pub(crate) fn check_remote(remote: &Partial, rows: usize, head_dim: usize) -> Result<(), StepError> {
    if remote.lse.len() != rows || remote.o.len() != rows * head_dim {
        return Err(StepError::Invalid(format!(
            "a remote partial has {} rows and {} elements, and must have {rows} rows of {head_dim}",
            remote.lse.len(),
            remote.o.len()
        )));
    }
    let sound = |lse: &f32| lse.is_finite() || *lse == f32::NEG_INFINITY;
    if !remote.lse.iter().all(sound) || !remote.o.iter().all(|o| o.is_finite()) {
        return Err(StepError::Invalid("a remote partial is not finite".to_owned()));
    }
    Ok(())
}
