//! What does not fit is refused before anything is launched.

use kvasir_cuda::{
    Decode, DeviceTiles, Dtype, FlexPrefill, Gpu, GpuError, HeadMask, HeadPlan, KvShape, KvView, Layout, Mask,
    PageTable, Partials, Planner, Prefill, PrefillSequence, Products, Query, SampleRow, SampleRows, SparseRows,
    VOCAB_MAX, XAttention, key_scores, merge, plan, top_k,
};
use rand::rngs::StdRng;

use crate::{
    cases::{Form, Held},
    check::Tally,
};

/// What does not fit must be refused before anything is launched.
pub(crate) fn refused(gpu: &Gpu, rng: &mut StdRng, _: usize, tally: &mut Tally) -> Result<(), GpuError> {
    let shape = KvShape {
        dtype: Dtype::F16,
        kv_heads: 2,
        head_dim: 64,
    };
    let held = Held::new(gpu, rng, shape, Form::Block, 32, false)?;
    let small = gpu.zeros::<u8>(100)?;
    let pool = gpu.zeros::<u8>(4 * Layout::block(shape, 16).bytes)?;
    let (inside, outside) = (PageTable::upload(gpu, &[3])?, PageTable::upload(gpu, &[0, 4])?);
    let q = gpu.zeros::<f32>(4 * 64)?;
    let (mut out, mut narrow) = (Partials::empty(gpu, 1, 4, 64)?, Partials::empty(gpu, 1, 2, 64)?);
    let mut decode = Decode::new(gpu, shape, 4)?;
    let mut scores = gpu.zeros::<f32>(4 * 31)?;
    let mut picks = gpu.zeros::<u32>(8)?;
    let odd = KvShape { head_dim: 80, ..shape };
    let view = held.view()?;
    let mut rows = SampleRows::new(gpu, 31, 2)?;
    let fair = SampleRow {
        uniform: 1.0,
        ..SampleRow::GREEDY
    };
    let outcomes = [
        (
            "a vocabulary too large",
            SampleRows::new(gpu, VOCAB_MAX + 1, 1).map(|_| ()),
        ),
        ("more rows than room", rows.set(gpu, &[SampleRow::GREEDY; 3])),
        ("chance of 1", rows.set(gpu, &[fair])),
        ("more rows than logits", rows.sample(gpu, &gpu.zeros::<f32>(61)?, 2)),
        ("a short block", KvView::block(shape, &small, 32, 32).map(|_| ())),
        ("tokens past the room", KvView::block(shape, &pool, 16, 17).map(|_| ())),
        ("a head dim without kernel", KvView::block(odd, &pool, 1, 1).map(|_| ())),
        (
            "a page outside the pool",
            KvView::paged(shape, &pool, 16, &outside, 32).map(|_| ()),
        ),
        (
            "too few pages",
            KvView::paged(shape, &pool, 16, &inside, 17).map(|_| ()),
        ),
        (
            "pages of 8 tokens",
            KvView::paged(shape, &pool, 8, &inside, 8).map(|_| ()),
        ),
        ("too few lengths", view.with_lengths(&gpu.zeros::<u32>(1)?).map(|_| ())),
        ("query heads that do not divide", Decode::new(gpu, shape, 3).map(|_| ())),
        (
            "a narrow output",
            decode.attend(gpu, Query::f32(&q), &[view], 1.0, &mut narrow),
        ),
        (
            "nine views",
            decode.attend(gpu, Query::f32(&q), &[view; 9], 1.0, &mut out),
        ),
        (
            "a query of other heads",
            key_scores(gpu, Query::f32(&q), 2, &view, 1.0, &mut scores),
        ),
        (
            "short scores",
            key_scores(gpu, Query::f32(&q), 4, &view, 1.0, &mut scores),
        ),
        ("k above n", top_k(gpu, &scores, 4, 32, &mut picks)),
        ("rows that do not divide", top_k(gpu, &scores, 5, 1, &mut picks)),
        ("merge of other shapes", merge(gpu, &[&narrow], &mut out)),
        ("an upload too long", picks.upload(&[0; 9])),
    ];
    for (what, outcome) in outcomes {
        is_refused(what, &outcome, tally);
    }
    prompts(gpu, tally)?;
    plans(gpu, tally)
}

fn is_refused(what: &str, outcome: &Result<(), GpuError>, tally: &mut Tally) {
    let refused = matches!(outcome, Err(GpuError::Shape { .. }));
    tally.count(if refused { 0.0 } else { 1.0 }, 0.0, || format!("{what}: {outcome:?}"));
}

const PROMPT: KvShape = KvShape {
    dtype: Dtype::F16,
    kv_heads: 2,
    head_dim: 64,
};

/// Attention of prompts in one launch.
fn prompts(gpu: &Gpu, tally: &mut Tally) -> Result<(), GpuError> {
    const ROWS: usize = 40;
    let (heads, width) = (4, 4 * 64);
    let layout = Layout::block(PROMPT, 64);
    let (pool, other) = (gpu.zeros::<u8>(2 * layout.bytes)?, gpu.zeros::<u8>(2 * layout.bytes)?);
    let table = PageTable::upload(gpu, &[1])?;
    let view = KvView::paged(PROMPT, &pool, 64, &table, 20)?;
    let elsewhere = KvView::paged(PROMPT, &other, 64, &table, 20)?;
    let unpaged = KvView::block(PROMPT, &pool, 64, 20)?;
    let lengths = gpu.zeros::<u32>(2)?;
    let counted = view.with_lengths(&lengths)?;
    let e4m3 = KvShape {
        dtype: Dtype::E4m3,
        ..PROMPT
    };
    let narrow = KvView::block(e4m3, &pool, 64, 20)?;
    let q = gpu.zeros::<u16>(ROWS * width)?;
    let mut out = gpu.zeros::<u16>(ROWS * width)?;
    let mut wide = gpu.zeros::<f32>(ROWS * width)?;
    let mut lse = gpu.zeros::<f32>(ROWS * heads)?;
    let mut short = gpu.zeros::<f32>(ROWS * heads - 1)?;
    let (dense, three) = (DeviceTiles::dense(gpu, heads)?, DeviceTiles::dense(gpu, 3)?);
    let one_block = HeadMask::Absolute { rows: vec![vec![0]] };
    let few = DeviceTiles::upload(gpu, &Mask::new(plan::ROWS, vec![one_block; heads]).expect("in order"))?;
    let prefill = Prefill {
        rows: ROWS,
        q_heads: heads,
        scale: 0.1,
        products: Products::Mma,
    };
    let some = |rows, view| PrefillSequence { rows, view };
    let two = [some(0..20, view), some(20..40, view)];
    let (f16, bf16) = (Query::bits(&q, Dtype::F16), Query::bits(&q, Dtype::Bf16));
    let mut attend = |prefill: Prefill, q, sequences: &[PrefillSequence<'_>], tiles, to| {
        prefill.attend_batch(gpu, q, sequences, tiles, &mut out, to, &mut lse)
    };
    // None at all is nothing to do.
    let nothing = attend(prefill, f16, &[], &dense, 0);
    tally.count(f64::from(u8::from(nothing.is_err())), 0.0, || {
        format!("no sequence: {nothing:?}")
    });
    let both = attend(prefill, f16, &two, &dense, 0);
    tally.count(f64::from(u8::from(both.is_err())), 0.0, || {
        format!("two sequences: {both:?}")
    });
    let outcomes = [
        ("queries of another type", attend(prefill, bf16, &two, &dense, 0)),
        ("keys in e4m3", attend(prefill, f16, &[some(0..20, narrow)], &dense, 0)),
        (
            "heads that do not divide",
            attend(Prefill { q_heads: 3, ..prefill }, f16, &two, &three, 0),
        ),
        (
            "no heads",
            attend(Prefill { q_heads: 0, ..prefill }, f16, &two, &dense, 0),
        ),
        (
            "other rows than queries",
            attend(Prefill { rows: 39, ..prefill }, f16, &two, &dense, 0),
        ),
        ("a place past the output", attend(prefill, f16, &two, &dense, 1)),
        (
            "a place past all numbers",
            attend(prefill, f16, &two, &dense, usize::MAX),
        ),
        (
            "a scale of 0",
            attend(Prefill { scale: 0.0, ..prefill }, f16, &two, &dense, 0),
        ),
        (
            "a scale of NaN",
            attend(
                Prefill {
                    scale: f32::NAN,
                    ..prefill
                },
                f16,
                &two,
                &dense,
                0,
            ),
        ),
        ("tiles of other heads", attend(prefill, f16, &two, &three, 0)),
        ("tiles of fewer row blocks", attend(prefill, f16, &two, &few, 0)),
        (
            "rows past the queries",
            attend(prefill, f16, &[some(0..20, view), some(21..41, view)], &dense, 0),
        ),
        (
            "rows of two sequences",
            attend(prefill, f16, &[some(0..20, view), some(19..39, view)], &dense, 0),
        ),
        (
            "more rows than tokens",
            attend(prefill, f16, &[some(0..21, view)], &dense, 0),
        ),
        (
            "two pools",
            attend(prefill, f16, &[some(0..20, view), some(20..40, elsewhere)], &dense, 0),
        ),
        (
            "two without pages",
            attend(prefill, f16, &[some(0..20, unpaged), some(20..40, unpaged)], &dense, 0),
        ),
        (
            "lengths of the device",
            attend(prefill, f16, &[some(0..20, counted)], &dense, 0),
        ),
    ];
    for (what, outcome) in outcomes {
        is_refused(what, &outcome, tally);
    }
    let outcome = prefill.attend_batch(gpu, f16, &two, &dense, &mut out, 0, &mut short);
    is_refused("too few logs", &outcome, tally);
    let outcome = prefill.attend_batch(gpu, f16, &two, &dense, &mut wide, 0, &mut lse);
    is_refused("an output in f32", &outcome, tally);
    Ok(())
}

/// Lists from prompts.
fn plans(gpu: &Gpu, tally: &mut Tally) -> Result<(), GpuError> {
    let flex = |gamma, tau| {
        HeadPlan::FlexPrefill(FlexPrefill {
            gamma,
            tau,
            budget_min: 64,
        })
    };
    let antidiagonals = |stride, threshold| HeadPlan::XAttention(XAttention { stride, threshold });
    let new = |tokens, head| Planner::new(gpu, PROMPT, tokens, &[vec![head; 4]]).map(|_| ());
    let outcomes = [
        ("a share of 0", new(100, flex(0.0, 0.1))),
        ("a share of NaN", new(100, flex(f32::NAN, 0.1))),
        ("a distance above 1", new(100, flex(0.9, 1.5))),
        ("a stride of 4", new(100, antidiagonals(4, 0.9))),
        ("a share above 1", new(100, antidiagonals(8, 1.1))),
        (
            "more tokens than masses have room",
            new((1 << 21) + 1, antidiagonals(8, 0.9)),
        ),
        ("no tokens", new(0, antidiagonals(8, 0.9))),
    ];
    for (what, outcome) in outcomes {
        is_refused(what, &outcome, tally);
    }
    let mut planner = Planner::new(gpu, PROMPT, 200, &[vec![flex(0.9, 0.1); 4]])?;
    let (pool, q) = (
        gpu.zeros::<u8>(Layout::block(PROMPT, 200).bytes)?,
        gpu.zeros::<u16>(128 * 4 * 64)?,
    );
    let query = Query::bits(&q, Dtype::F16);
    let mut build = |tokens: usize, sparse, part_rows, layer| {
        let view = KvView::block(PROMPT, &pool, 200, tokens)?;
        let rows = SparseRows {
            rows: 128,
            sparse,
            part_rows,
        };
        planner.build(gpu, layer, query, &rows, &view, 0.1).map(|_| ())
    };
    let fits = build(192, 0..128, 128, 0);
    tally.count(f64::from(u8::from(fits.is_err())), 0.0, || format!("a plan: {fits:?}"));
    let outcomes = [
        ("sparse rows from within a key block on", build(193, 0..128, 128, 0)),
        ("sparse rows from within a row block on", build(192, 1..128, 128, 0)),
        ("no sparse rows", build(192, 0..0, 128, 0)),
        ("parts of no rows", build(192, 0..128, 0, 0)),
        ("parts of half row blocks", build(192, 0..128, 64, 0)),
        ("another layer", build(192, 0..128, 128, 1)),
        ("fewer tokens than rows", build(127, 0..127, 128, 0)),
    ];
    for (what, outcome) in outcomes {
        is_refused(what, &outcome, tally);
    }
    Ok(())
}
