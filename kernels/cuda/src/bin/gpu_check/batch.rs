//! Prefill of several sequences in a launch: each as the reference has it, and with the bits that it has alone.

use kvasir_cuda::{
    Buffer, DeviceTiles, Dtype, Gpu, GpuError, HeadMask, KvShape, KvView, Layout, Mask, PageTable, Prefill,
    PrefillSequence, SEQUENCES,
    plan::ROWS,
    reference::{self, Placement, Rows},
};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};

use crate::{
    cases::{PAGE_TOKENS, numbers},
    check::{Tally, distance, furthest},
    prefill::{Queries, floats, limit, products},
};

/// A sequence in pages of the common pool.
struct Member {
    rows: std::ops::Range<usize>,
    kv: Rows,
    table: PageTable,
    masks: Vec<HeadMask>,
}

impl Member {
    fn offset(&self) -> usize {
        self.kv.tokens - self.rows.len()
    }
}

struct Batch {
    shape: KvShape,
    q_heads: usize,
    /// Rows of all members and between them.
    rows: usize,
    members: Vec<Member>,
    pool: Buffer<u8>,
    tiles: DeviceTiles,
}

impl Batch {
    fn any(gpu: &Gpu, rng: &mut StdRng, many: bool) -> Result<Self, GpuError> {
        let shape = KvShape {
            dtype: [Dtype::Bf16, Dtype::F16][rng.random_range(0..2)],
            kv_heads: rng.random_range(1..3),
            head_dim: [64, 128][rng.random_range(0..2)],
        };
        let q_heads = shape.kv_heads * [1, 3, 4][rng.random_range(0..3)];
        let count = if many { SEQUENCES + 3 } else { rng.random_range(1..6) };
        let most: usize = if many { 40 } else { 500 };
        // Heads that see the same distances in all sequences, and heads with tiles of their own for each row block.
        let common: Vec<Option<HeadMask>> = (0..q_heads)
            .map(|_| match rng.random_range(0..4) {
                0 => Some(HeadMask::Dense),
                1 => Some(HeadMask::a_shape(
                    ROWS,
                    rng.random_range(0..60),
                    rng.random_range(0..100),
                )),
                2 => Some(HeadMask::vertical_slash(ROWS, &[1, 7, 30], &[0, 70])),
                _ => None,
            })
            .collect();
        let layout = Layout::block(shape, PAGE_TOKENS);
        let (mut members, mut rows, mut free) = (Vec::<Member>::new(), 0, Vec::new());
        let mut lengths: Vec<(usize, usize)> = Vec::new();
        for _ in 0..count {
            let tokens = rng.random_range(1..most);
            lengths.push((
                tokens,
                if rng.random_bool(0.3) {
                    tokens
                } else {
                    rng.random_range(0..=tokens)
                },
            ));
        }
        let pages = lengths
            .iter()
            .map(|(tokens, _)| tokens.div_ceil(PAGE_TOKENS))
            .sum::<usize>()
            + 2;
        free.extend(0..pages as u32);
        free.shuffle(rng);
        let mut host = vec![0xff; layout.bytes * pages];
        for (tokens, queries) in lengths {
            rows += rng.random_range(0..4);
            let elements = shape.kv_heads * tokens * shape.head_dim;
            let kv = Rows {
                k: numbers(rng, elements),
                v: numbers(rng, elements),
                tokens,
            };
            let own = free.split_off(free.len() - tokens.div_ceil(PAGE_TOKENS));
            let placement = Placement {
                shape,
                layout,
                pages: Some((PAGE_TOKENS, own.clone())),
            };
            placement.write(&kv, &mut host);
            let offset = tokens - queries;
            let masks = common.iter().map(|common| {
                let mut some = || (0..2).map(|_| rng.random_range(0..=tokens as u32 / 64)).collect();
                let chosen: Vec<Vec<u32>> = (0..queries.div_ceil(ROWS)).map(|_| some()).collect();
                common
                    .clone()
                    .unwrap_or_else(|| HeadMask::block_sparse(ROWS, offset, &chosen))
            });
            members.push(Member {
                rows: rows..rows + queries,
                masks: masks.collect(),
                kv: placement.read(tokens, &host),
                table: PageTable::upload(gpu, &own)?,
            });
            rows += queries;
        }
        rows += rng.random_range(0..3);
        let joined = (0..q_heads).map(|head| match &common[head] {
            Some(mask) => mask.clone(),
            None => HeadMask::Absolute {
                rows: members.iter().flat_map(|member| lists(&member.masks[head])).collect(),
            },
        });
        let mask = Mask::new(ROWS, joined.collect()).expect("in order");
        Ok(Self {
            shape,
            q_heads,
            rows,
            tiles: DeviceTiles::upload(gpu, &mask)?,
            pool: gpu.upload(&host)?,
            members,
        })
    }

    fn sequences(&self) -> Result<Vec<PrefillSequence<'_>>, GpuError> {
        let views = self.members.iter().map(|member| {
            let view = KvView::paged(self.shape, &self.pool, PAGE_TOKENS, &member.table, member.kv.tokens)?;
            let rows = member.rows.clone();
            Ok(PrefillSequence { rows, view })
        });
        views.collect()
    }
}

fn lists(mask: &HeadMask) -> Vec<Vec<u32>> {
    match mask {
        HeadMask::Absolute { rows } => rows.clone(),
        HeadMask::Dense | HeadMask::Relative { .. } => Vec::new(),
    }
}

pub(crate) fn prefilled(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    const POISON: u16 = 0xffff;
    for case in 0..cases {
        let batch = Batch::any(gpu, rng, case % 16 == 5)?;
        let (shape, width) = (batch.shape, batch.q_heads * batch.shape.head_dim);
        let q = Queries::new(gpu, rng, shape.dtype, batch.rows * width)?;
        let sequences = batch.sequences()?;
        for &products in products(gpu) {
            let prefill = Prefill {
                rows: batch.rows,
                q_heads: batch.q_heads,
                scale: 0.1,
                products,
            };
            let describe = || {
                let lengths: Vec<_> = batch
                    .members
                    .iter()
                    .map(|one| (one.kv.tokens, one.rows.clone()))
                    .collect();
                format!("{prefill:?} of {shape:?}, {lengths:?}")
            };
            let mut out = gpu.upload(&vec![POISON; (2 + batch.rows) * width])?;
            let mut lse = gpu.zeros::<f32>(batch.q_heads * batch.rows)?;
            lse.fill(0xff)?;
            prefill.attend_batch(gpu, q.query(), &sequences, &batch.tiles, &mut out, 2, &mut lse)?;
            let (out, lse) = (out.download()?, lse.download()?);
            let mut is_free = vec![true; 2 + batch.rows];
            for (member, sequence) in batch.members.iter().zip(&sequences) {
                let rows = member.rows.clone();
                is_free[2 + rows.start..2 + rows.end].fill(false);
                if rows.is_empty() {
                    continue;
                }
                let mask = Mask::new(ROWS, member.masks.clone()).expect("in order");
                let queries = &q.numbers[rows.start * width..rows.end * width];
                let expected = reference::prefill(shape, queries, batch.q_heads, &member.kv, &mask, 0.1);
                let found = &out[(2 + rows.start) * width..(2 + rows.end) * width];
                let error = distance(&floats(shape.dtype, found), &expected.0);
                tally.count(error, limit(shape.dtype), describe);
                let logs: Vec<f32> = (0..batch.q_heads)
                    .flat_map(|head| lse[head * batch.rows..][rows.clone()].to_vec())
                    .collect();
                tally.count(furthest(&logs, &expected.1), 1e-3, describe);
                // Alone, with lists of its own.
                let tiles = DeviceTiles::upload(gpu, &mask)?;
                let (mut alone, mut alone_lse) = (
                    gpu.upload(&vec![POISON; batch.rows * width])?,
                    gpu.zeros::<f32>(batch.q_heads * batch.rows)?,
                );
                let one = std::slice::from_ref(sequence);
                prefill.attend_batch(gpu, q.query(), one, &tiles, &mut alone, 0, &mut alone_lse)?;
                let alone = alone.download_range(rows.start * width..rows.end * width)?;
                let differ = alone.iter().zip(found).filter(|(a, b)| a != b).count();
                tally.count(differ as f64, 0.0, || {
                    format!("rows {rows:?} at {} alone: {}", member.offset(), describe())
                });
            }
            let touched = is_free
                .iter()
                .zip(out.chunks_exact(width))
                .filter(|(is_free, row)| **is_free && row.iter().any(|&bits| bits != POISON));
            tally.count(touched.count() as f64, 0.0, || {
                format!("rows of nobody: {}", describe())
            });
        }
    }
    Ok(())
}
