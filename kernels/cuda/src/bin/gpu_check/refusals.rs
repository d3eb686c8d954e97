//! What does not fit must be refused before anything is launched.

use std::ops::Range;

use kvasir_cuda::{
    Buffer, Decode, DeviceTiles, Dtype, Gpu, GpuError, KvShape, KvView, Layout, PageTable, Partials, Prefill,
    PrefillSequence, Products, Query, SampleRow, SampleRows, VOCAB_MAX, key_scores, merge, top_k,
};
use rand::rngs::StdRng;

use crate::{
    cases::{Form, Held},
    check::Tally,
};

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
        let refused = matches!(&outcome, Err(GpuError::Shape { .. }));
        tally.count(if refused { 0.0 } else { 1.0 }, 0.0, || format!("{what}: {outcome:?}"));
    }
    Ok(())
}
