//! A step's batch: what is asked for, checked, and laid out as work.

use std::{collections::HashSet, ops::Range};

use kvasir_block::KvSchema;

use super::StepError;
use crate::{Draw, ModelShape, PageId, PagePool};

/// Attention is summed over runs of this many positions (in whole pages), then joined in order. Fixed, because the order
/// of a sum decides its bits; short enough that one long sequence keeps several threads busy.
const SPLIT_TOKENS: usize = 512;

/// Query rows of a tile: as many as share a converted run of keys in the kernel.
const TILE_ROWS: usize = 64;

/// Tiles per thread from which each is one task; below, their splits are.
const TILES_PER_THREAD: usize = 4;

/// Which positions a sequence's queries attend to in the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attention {
    /// All before and including themselves.
    Full,
    /// As `Full`, but the queries of each block that is whole in the step, from [`crate::SparsePrefill::from`] on, attend under
    /// the masks that the model's patterns make of that block. The sequence's tokens begin with a block's first. A block's KV
    /// is then a function of the tokens up to its end, however many blocks a step holds.
    Sparse,
    /// Only these rising, disjoint ranges (and never behind themselves); the rest comes from
    /// [`super::StepHooks::remote_finish`].
    Local(Vec<Range<usize>>),
}

/// Which tokens of a sequence get logits, and what is made of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Logits {
    /// None: the step only makes KV.
    None,
    /// The last.
    Last,
    /// Each.
    All,
    /// The last, and a token is drawn from it where the model computes: nothing but that token comes back.
    Drawn(Draw),
}

/// Tokens of one sequence in a step.
#[derive(Clone, Debug)]
pub struct StepSequence<'a> {
    /// Token ids, consecutive; not empty.
    pub tokens: &'a [u32],
    /// Position of the first token.
    pub position: usize,
    /// Page of each block from position 0; `None` where a block is not resident (only under `Local`).
    pub pages: &'a [Option<PageId>],
    /// What the tokens attend to.
    pub attention: Attention,
    /// Which rows of logits to return.
    pub logits: Logits,
}

/// A batch as work. The same in every layer.
pub(crate) struct Plan {
    pub(crate) tokens: usize,
    pub(crate) sequences: Vec<Sequence>,
    /// Where K and V of each token go.
    pub(crate) slots: Vec<Slot>,
    /// Rows that logits are made of, rising.
    pub(crate) kept: Vec<usize>,
    pub(crate) tiles: Vec<Tile>,
    pub(crate) jobs: Vec<Job>,
}

pub(crate) struct Sequence {
    /// Its rows in the step.
    pub(crate) rows: Range<usize>,
    /// Position of its first token.
    pub(crate) position: usize,
    pub(crate) local: bool,
    /// Its tokens that attend sparsely: whole blocks.
    pub(crate) sparse: Range<usize>,
    /// Keys and values attended to, in order of position.
    pub(crate) spans: Vec<Span>,
    /// Runs of `spans` that are summed together.
    pub(crate) splits: Vec<Range<usize>>,
    /// Its rows among [`Plan::kept`].
    pub(crate) logits: Range<usize>,
}

/// A token's row in a page.
pub(crate) struct Slot {
    pub(crate) page: PageId,
    pub(crate) row: usize,
}

/// Rows of a page that are attended to.
pub(crate) struct Span {
    pub(crate) page: PageId,
    pub(crate) rows: Range<usize>,
    pub(crate) position: usize,
}

/// Queries of one KV head that are attended for together.
pub(crate) struct Tile {
    pub(crate) sequence: usize,
    pub(crate) kv_head: usize,
    /// Tokens of the sequence.
    pub(crate) tokens: Range<usize>,
    /// Its jobs, in order of position.
    pub(crate) jobs: Range<usize>,
    /// Whether the last layer needs it.
    pub(crate) kept: bool,
}

/// What one task attends to.
pub(crate) struct Job {
    pub(crate) tile: usize,
    pub(crate) splits: Range<usize>,
}

impl Plan {
    /// For a model whose blocks from position `sparse_from` on may be sparse, if any.
    pub(crate) fn new(
        batch: &[StepSequence<'_>],
        pool: &PagePool,
        shape: &ModelShape,
        schema: &KvSchema,
        threads: usize,
        sparse_from: Option<usize>,
    ) -> Result<Self, StepError> {
        if pool.layout() != schema.layout() || pool.layers() != shape.layers {
            return Err(StepError::Invalid(format!(
                "the pool has {} layers of {:?}, and the model {} of {:?}",
                pool.layers(),
                pool.layout(),
                shape.layers,
                schema.layout()
            )));
        }
        let mut plan = Self {
            tokens: 0,
            sequences: Vec::with_capacity(batch.len()),
            slots: Vec::new(),
            kept: Vec::new(),
            tiles: Vec::new(),
            jobs: Vec::new(),
        };
        for (index, sequence) in batch.iter().enumerate() {
            plan.add(sequence, pool, shape, sparse_from)
                .map_err(|problem| StepError::Invalid(format!("sequence {index} of the batch {problem}")))?;
        }
        plan.check_owners(batch, pool.layout().block_tokens)?;
        plan.cut(shape, threads);
        Ok(plan)
    }

    /// `(row, position)` of all tokens.
    pub(crate) fn positions(&self) -> impl Iterator<Item = (usize, usize)> {
        self.sequences
            .iter()
            .flat_map(|sequence| sequence.rows.clone().zip(sequence.position..))
    }

    fn add(
        &mut self,
        sequence: &StepSequence<'_>,
        pool: &PagePool,
        shape: &ModelShape,
        sparse_from: Option<usize>,
    ) -> Result<(), String> {
        let block_tokens = pool.layout().block_tokens;
        let StepSequence {
            tokens,
            position,
            pages,
            attention,
            logits,
        } = sequence;
        if tokens.is_empty() {
            return Err("has no tokens".to_owned());
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= shape.vocab) {
            return Err(format!("has token {token}, and the vocabulary has {}", shape.vocab));
        }
        let end = position
            .checked_add(tokens.len())
            .filter(|end| *end <= shape.context_tokens_max)
            .ok_or_else(|| {
                let (count, most) = (tokens.len(), shape.context_tokens_max);
                format!("has {count} tokens from position {position} on, and the context ends at {most}")
            })?;
        let page = |block: usize| match pages.get(block) {
            Some(Some(page)) if (page.0 as usize) < pool.pages() => Ok(*page),
            Some(Some(page)) => Err(format!("has page {}, and the pool has {}", page.0, pool.pages())),
            Some(None) | None => Err(format!("has no page for block {block}, which it needs")),
        };
        for position in *position..end {
            self.slots.push(Slot {
                page: page(position / block_tokens)?,
                row: position % block_tokens,
            });
        }
        // Whole pages: how far a query sees is its own matter, and the cut of a run must not depend on the step's end.
        let whole = 0..end.next_multiple_of(block_tokens);
        let ranges = match attention {
            Attention::Full | Attention::Sparse => std::slice::from_ref(&whole),
            Attention::Local(ranges) => ranges,
        };
        if shape.sliding().is_some() && matches!(attention, Attention::Local(_)) {
            return Err(
                "is local, and layers of the model see a window: they would miss what lies elsewhere".to_owned(),
            );
        }
        let (spans, splits) = spans(ranges, end, block_tokens, page)?;
        let sparse = match (attention, sparse_from) {
            (Attention::Sparse, Some(from)) => sparse_tokens(*position, tokens.len(), block_tokens, from)?,
            (Attention::Sparse, None) => return Err("is sparse, and the model was given no patterns".to_owned()),
            _ => 0..0,
        };
        let rows = self.tokens..self.tokens + tokens.len();
        let first_kept = match logits {
            Logits::None => rows.end,
            Logits::Last | Logits::Drawn(_) => rows.end - 1,
            Logits::All => rows.start,
        };
        let kept = self.kept.len();
        self.kept.extend(first_kept..rows.end);
        self.tokens = rows.end;
        self.sequences.push(Sequence {
            rows,
            position: *position,
            local: matches!(attention, Attention::Local(_)),
            sparse,
            spans,
            splits,
            logits: kept..self.kept.len(),
        });
        Ok(())
    }

    /// A page that is written belongs to one block of one sequence: anything else would read what another one writes.
    fn check_owners(&self, batch: &[StepSequence<'_>], block_tokens: usize) -> Result<(), StepError> {
        let written: HashSet<PageId> = self.slots.iter().map(|slot| slot.page).collect();
        let mut seen = HashSet::with_capacity(written.len());
        for (sequence, planned) in batch.iter().zip(&self.sequences) {
            let blocks = (planned.position + planned.rows.len()).div_ceil(block_tokens);
            for page in sequence.pages.iter().take(blocks).flatten() {
                if written.contains(page) && !seen.insert(*page) {
                    let problem = format!("page {} is written and has two owners in the batch", page.0);
                    return Err(StepError::Invalid(problem));
                }
            }
        }
        Ok(())
    }

    /// Cuts attention into tiles and jobs. Latest tokens first: they see most, and the longest work should not come last.
    fn cut(&mut self, shape: &ModelShape, threads: usize) {
        let step = (TILE_ROWS / shape.group()).max(1);
        for (index, sequence) in self.sequences.iter().enumerate() {
            let len = sequence.rows.len();
            let kept_from = len - sequence.logits.len();
            // What is sparse has tasks of its own.
            let dense = [0..sequence.sparse.start, sequence.sparse.end..len];
            let starts = dense.into_iter().rev().flat_map(|dense| {
                let starts = dense.clone().step_by(step).rev();
                starts.map(move |start| start..(start + step).min(dense.end))
            });
            for tokens in starts {
                let kept = sequence.local || tokens.end > kept_from;
                self.tiles.extend((0..shape.kv_heads).map(|kv_head| Tile {
                    sequence: index,
                    kv_head,
                    tokens: tokens.clone(),
                    jobs: 0..0,
                    kept,
                }));
            }
        }
        let whole = self.tiles.len() >= TILES_PER_THREAD * threads;
        for (index, tile) in self.tiles.iter_mut().enumerate() {
            let sequence = &self.sequences[tile.sequence];
            let seen = sequence.position + tile.tokens.end;
            let splits = sequence
                .splits
                .partition_point(|split| sequence.spans[split.start].position < seen);
            let first = self.jobs.len();
            if whole || splits == 0 {
                self.jobs.push(Job {
                    tile: index,
                    splits: 0..splits,
                });
            } else {
                self.jobs.extend((0..splits).map(|split| Job {
                    tile: index,
                    splits: split..split + 1,
                }));
            }
            tile.jobs = first..self.jobs.len();
        }
    }
}

/// Which of `count` tokens from `position` on lie in whole blocks that begin at or behind `from`.
fn sparse_tokens(position: usize, count: usize, block_tokens: usize, from: usize) -> Result<Range<usize>, String> {
    if !position.is_multiple_of(block_tokens) {
        return Err(format!(
            "is sparse from position {position} on, in the middle of a block of {block_tokens} tokens"
        ));
    }
    let end = count / block_tokens * block_tokens;
    let start = from.next_multiple_of(block_tokens).saturating_sub(position).min(end);
    Ok(start..end)
}

/// The pages of `ranges` below `end`, cut at range ends, and the runs of them that are summed together.
fn spans(
    ranges: &[Range<usize>],
    end: usize,
    block_tokens: usize,
    page: impl Fn(usize) -> Result<PageId, String>,
) -> Result<(Vec<Span>, Vec<Range<usize>>), String> {
    let split_blocks = (SPLIT_TOKENS / block_tokens).max(1);
    let (mut spans, mut splits): (Vec<Span>, Vec<Range<usize>>) = (Vec::new(), Vec::new());
    let (mut before, mut last_split) = (0, None);
    for range in ranges {
        if range.start < before || range.end < range.start {
            return Err(format!(
                "has local range {range:?} behind {before}: ranges must rise and not overlap"
            ));
        }
        before = range.end;
        let mut position = range.start;
        while position < range.end.min(end) {
            let block = position / block_tokens;
            let stop = ((block + 1) * block_tokens).min(range.end);
            let rows = position % block_tokens..stop - block * block_tokens;
            spans.push(Span {
                page: page(block)?,
                rows,
                position,
            });
            let split = block / split_blocks;
            match splits.last_mut() {
                Some(run) if last_split == Some(split) => run.end = spans.len(),
                _ => splits.push(spans.len() - 1..spans.len()),
            }
            last_split = Some(split);
            position = stop;
        }
    }
    Ok((spans, splits))
}
