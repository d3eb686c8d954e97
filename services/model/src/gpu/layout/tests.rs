use std::ops::Range;

use kvasir_block::{Dtype, KvSchema, RopeStyle};

use super::*;
use crate::{Attention, Draw, Logits, ModelShape, PageId, PagePool};

const BLOCK: usize = 16;

fn shape() -> ModelShape {
    ModelShape {
        architecture: crate::Architecture::Llama,
        layers: 1,
        hidden: 64,
        feed_forward: 64,
        q_heads: 1,
        kv_heads: 1,
        head_dim: 64,
        vocab: 100,
        context_tokens_max: 4096,
        rope_theta: 10_000.0,
        rope_dims: 64,
        norm_epsilon: 1e-5,
    }
}

fn schema() -> KvSchema {
    KvSchema {
        model: "made-up".to_owned(),
        weights_sha256: [0; 32],
        tokenizer_sha256: [0; 32],
        adapter_sha256: None,
        layers: 1,
        kv_heads: 1,
        head_dim: 64,
        block_tokens: BLOCK as u16,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 10_000.0,
        rope_dims: 64,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "none".to_owned(),
    }
}

/// One sequence of a batch: position, tokens, first page, attention, logits.
type Asked = (usize, usize, u32, Attention, Logits);

fn lay(batch: &[Asked]) -> Result<RowLayout, StepError> {
    let pool = PagePool::new(schema().layout(), 1, 600).expect("a small pool");
    let tokens: Vec<u32> = (0..64).collect();
    let pages: Vec<Vec<Option<PageId>>> = batch
        .iter()
        .map(|(.., first, _, _)| (*first..*first + 40).map(|page| Some(PageId(page))).collect())
        .collect();
    let batch: Vec<StepSequence<'_>> = batch
        .iter()
        .zip(&pages)
        .map(|((position, count, _, attention, logits), pages)| StepSequence {
            tokens: &tokens[..*count],
            position: *position,
            pages,
            attention: attention.clone(),
            logits: *logits,
        })
        .collect();
    let plan = Plan::new(&batch, &pool, &shape(), &schema(), 1, Some(48))?;
    RowLayout::new(&batch, &plan, BLOCK)
}

fn local(ranges: &[Range<usize>]) -> Attention {
    Attention::Local(ranges.to_vec())
}

#[test]
fn tokens_with_logits_are_sampled_rows_and_the_rest_stand_in_row_blocks() {
    let full = || Attention::Full;
    // (batch, rows in all, prompt rows, per sequence: filling, prompt, sampled)
    let table: [(&[Asked], usize, usize, &str); 5] = [
        (&[(0, 10, 0, full(), Logits::Last)], 10, 9, "0 0..9 9..10"),
        (&[(130, 10, 0, full(), Logits::None)], 12, 12, "2 2..12 12..12"),
        (&[(300, 1, 0, full(), Logits::Last)], 1, 0, "0 0..0 0..1"),
        (&[(7, 3, 0, full(), Logits::All)], 3, 0, "0 0..0 0..3"),
        (
            &[
                (20, 4, 0, full(), Logits::Last),
                (100, 1, 100, local(&[0..16, 64..101]), Logits::Last),
                (128, 5, 200, full(), Logits::Last),
            ],
            30,
            27,
            "20 20..23 27..28, 0 23..23 28..29, 0 23..27 29..30",
        ),
    ];
    for (batch, rows, prompt, expected) in table {
        let layout = lay(batch).expect(expected);
        let text: Vec<String> = layout
            .sequences
            .iter()
            .map(|sequence| format!("{} {:?} {:?}", sequence.filling, sequence.prompt, sequence.sampled))
            .collect();
        assert_eq!(text.join(", "), expected);
        assert_eq!((layout.rows.len(), layout.prompt), (rows, prompt), "{expected}");
        for sequence in &layout.sequences {
            let first = sequence.prompt.start - sequence.filling;
            let filling = &layout.rows[first..sequence.prompt.start];
            assert!(filling.iter().all(|row| *row == StepRow::default()), "{expected}");
            if !sequence.prompt.is_empty() {
                let begins = layout.rows[sequence.prompt.start].position as usize - sequence.filling;
                assert_eq!(begins % plan::ROWS, 0, "{expected}");
            }
        }
    }
}

#[test]
fn blocks_of_prompt_rows_alone_are_sparse() {
    // (position, tokens, attention, logits, tokens that are sparse): blocks of 16, sparse from 48 on.
    let table: [(usize, usize, Attention, Logits, Range<usize>); 8] = [
        (0, 64, Attention::Full, Logits::None, 0..0),
        (0, 64, Attention::Sparse, Logits::None, 48..64),
        (32, 50, Attention::Sparse, Logits::None, 16..48),
        (48, 32, Attention::Sparse, Logits::None, 0..32),
        // The last block has a sampled row.
        (48, 32, Attention::Sparse, Logits::Last, 0..16),
        (48, 33, Attention::Sparse, Logits::Drawn(Draw::GREEDY), 0..32),
        (48, 16, Attention::Sparse, Logits::Last, 0..0),
        (48, 32, Attention::Sparse, Logits::All, 0..0),
    ];
    for (position, count, attention, logits, sparse) in table {
        let asked = (position, count, 0, attention, logits);
        let layout = lay(std::slice::from_ref(&asked)).expect("fits");
        assert_eq!(layout.sequences[0].sparse, sparse, "{asked:?}");
        assert!(layout.sequences[0].sparse.end <= layout.sequences[0].prompt.len());
    }
}

#[test]
fn a_row_sees_what_is_before_it_in_its_own_ranges() {
    // (position, attention, pages of the table, tokens seen)
    let table: [(usize, Attention, &[u32], u32); 4] = [
        (0, Attention::Full, &[5], 1),
        (33, Attention::Full, &[5, 6, 7], 34),
        (100, local(&[0..16, 64..101]), &[5, 9, 10, 11], 16 + 37),
        (100, local(std::slice::from_ref(&(64..200))), &[9, 10, 11], 37),
    ];
    for (position, attention, pages, seen) in table {
        let layout = lay(&[(position, 1, 5, attention.clone(), Logits::Last)]).expect("fits");
        assert_eq!(layout.tables, [pages], "{position} {attention:?}");
        assert_eq!(layout.rows[0].sees, seen, "{position} {attention:?}");
        let slot = (5 + position as u32 / 16, position as u32 % 16);
        assert_eq!(layout.rows[0].slot, Some(slot));
    }
}

#[test]
fn ranges_that_cut_pages_are_refused() {
    for ranges in [&[0..20, 64..101][..], &[0..16, 70..101]] {
        let error = lay(&[(100, 1, 0, local(ranges), Logits::Last)]).map(|_| ());
        let expected = "sequence 0 of the batch attends to ranges that do not begin and end with whole pages";
        assert!(
            matches!(&error, Err(StepError::Invalid(problem)) if problem.starts_with(expected)),
            "{error:?}"
        );
    }
}
