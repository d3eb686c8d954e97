//! A batch as rows of a step on the device: which are prompt rows, which are sampled, and what each sees.

use std::ops::Range;

use kvasir_cuda::{StepRow, plan};

use crate::{StepError, StepSequence, forward::Plan};

/// Rows of a step, prompt rows first.
pub(super) struct RowLayout {
    pub(super) rows: Vec<StepRow>,
    /// A page table per sequence.
    pub(super) tables: Vec<Vec<u32>>,
    pub(super) sequences: Vec<SequenceRows>,
    /// Prompt rows, those that nobody reads included.
    pub(super) prompt: usize,
}

/// Where a sequence's rows are.
pub(super) struct SequenceRows {
    /// Prompt rows that stand for a token.
    pub(super) prompt: Range<usize>,
    /// Rows before them that only fill their row block.
    pub(super) filling: usize,
    /// Position behind the last prompt row.
    pub(super) prompt_end: usize,
    /// Sampled rows.
    pub(super) sampled: Range<usize>,
    /// How many of these, from the end, have logits.
    pub(super) logits: usize,
    /// Prompt rows, from the sequence's first, that attend by their heads' patterns: blocks of prompt rows alone. A block with a
    /// sampled row is dense, and has no name.
    pub(super) sparse: Range<usize>,
    pub(super) local: bool,
}

impl SequenceRows {
    /// Prompt rows, those that only fill their row block included.
    pub(super) fn rows(&self) -> Range<usize> {
        self.prompt.start - self.filling..self.prompt.end
    }
}

impl RowLayout {
    pub(super) fn new(batch: &[StepSequence<'_>], plan: &Plan, block_tokens: usize) -> Result<Self, StepError> {
        let mut out = Self {
            rows: Vec::new(),
            tables: Vec::new(),
            sequences: Vec::new(),
            prompt: 0,
        };
        let mut sampled = Vec::new();
        for (index, (asked, planned)) in batch.iter().zip(&plan.sequences).enumerate() {
            let count = asked.tokens.len();
            let logits = planned.logits.len();
            let prompt = if planned.local { 0 } else { count - logits };
            let (table, seen) = table(planned, block_tokens)
                .map_err(|problem| StepError::Invalid(format!("sequence {index} of the batch {problem}")))?;
            let row = |token: usize| {
                let slot = &plan.slots[planned.rows.start + token];
                StepRow {
                    token: asked.tokens[token],
                    position: (asked.position + token) as u32,
                    slot: Some((slot.page.0, slot.row as u32)),
                    table: index as u32,
                    sees: seen(asked.position + token + 1) as u32,
                }
            };
            let filling = if prompt > 0 { asked.position % plan::ROWS } else { 0 };
            out.rows.extend(std::iter::repeat_n(StepRow::default(), filling));
            let first = out.rows.len();
            out.rows.extend((0..prompt).map(row));
            let first_sampled = sampled.len();
            sampled.extend((prompt..count).map(row));
            out.sequences.push(SequenceRows {
                prompt: first..first + prompt,
                filling,
                prompt_end: asked.position + prompt,
                sampled: first_sampled..sampled.len(),
                logits,
                sparse: whole(planned.sparse.clone(), prompt, block_tokens),
                local: planned.local,
            });
            out.tables.push(table);
        }
        out.prompt = out.rows.len();
        out.rows.extend(sampled);
        for sequence in &mut out.sequences {
            sequence.sampled = out.prompt + sequence.sampled.start..out.prompt + sequence.sampled.end;
        }
        Ok(out)
    }

    pub(super) fn sampled(&self) -> Range<usize> {
        self.prompt..self.rows.len()
    }
}

/// Those of the `sparse` tokens that lie in whole blocks of the first `prompt` ones.
fn whole(sparse: Range<usize>, prompt: usize, block_tokens: usize) -> Range<usize> {
    let end = sparse.end.min(prompt / block_tokens * block_tokens);
    sparse.start.min(end)..end
}

type Seen<'a> = Box<dyn Fn(usize) -> usize + 'a>;

/// The pages that a sequence attends to, one behind the other, and how many of their tokens a query sees whose successor is
/// at the given position. Attention does not mind the gaps between ranges, so long as they are whole pages.
fn table<'a>(
    planned: &'a crate::forward::PlannedSequence,
    block_tokens: usize,
) -> Result<(Vec<u32>, Seen<'a>), String> {
    let spans = &planned.spans;
    let last = spans.len().saturating_sub(1);
    let whole = |(i, span): (usize, &crate::forward::Span)| {
        span.rows.start == 0 && (i == last || span.rows.end == block_tokens)
    };
    if !spans.iter().enumerate().all(whole) {
        return Err("attends to ranges that do not begin and end with whole pages, which a GPU needs".to_owned());
    }
    let pages = spans.iter().map(|span| span.page.0).collect();
    let seen = |end: usize| {
        let count = |span: &crate::forward::Span| end.saturating_sub(span.position).min(span.rows.len());
        spans.iter().map(count).sum()
    };
    Ok((pages, Box::new(seen)))
}

#[cfg(test)]
mod tests;
