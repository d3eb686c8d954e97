//! Lists that the device makes from a prompt itself: what is chosen against the references, and attention over it.

use kvasir_cuda::{
    BlockSparse, FlexPrefill, Gpu, GpuError, HeadMask, HeadPlan, KvShape, Mask, Planner, Prefill, SparseRows,
    VerticalSlash, XAttention,
    plan::{ROWS, TILE},
    reference::{self, Rows},
};
use rand::{Rng, rngs::StdRng};

use crate::{
    check::{Tally, distance},
    prefill::{Queries, any_case, compare, products},
};

/// Products that differ by less than this share of the product of the norms may be taken for each other: means are rounded
/// after sums in another order.
const CLOSE: f64 = 4e-3;
pub(crate) const SCALE: f32 = 0.1;

/// One call: what its heads do, and what they do it with.
pub(crate) struct Case<'a> {
    pub(crate) shape: KvShape,
    q: &'a [f32],
    kv: &'a Rows,
    pub(crate) heads: Vec<HeadPlan>,
    pub(crate) rows: SparseRows,
    pub(crate) text: String,
}

/// `aligned`: the sparse rows begin where a key block does.
fn any_plan(rng: &mut StdRng, aligned: bool) -> HeadPlan {
    match rng.random_range(0..if aligned { 9 } else { 7 }) {
        3 | 4 => HeadPlan::XAttention(XAttention {
            stride: [8, 16][rng.random_range(0..2)],
            threshold: rng.random_range(0.3..1.0),
        }),
        7 | 8 => HeadPlan::FlexPrefill(FlexPrefill {
            gamma: rng.random_range(0.3..1.0),
            tau: [0.0, 0.2, 1.0][rng.random_range(0..3)],
            budget_min: rng.random_range(0..300),
        }),
        0 => HeadPlan::Fixed(HeadMask::Dense),
        1 => HeadPlan::Fixed(HeadMask::a_shape(
            ROWS,
            rng.random_range(0..100),
            rng.random_range(0..200),
        )),
        2 => HeadPlan::BlockSparse(BlockSparse {
            blocks: rng.random_range(3..12),
        }),
        _ => HeadPlan::VerticalSlash(VerticalSlash {
            verticals: rng.random_range(0..80),
            slashes: rng.random_range(1..20),
            sink: rng.random_range(0..5),
            near: rng.random_range(1..5),
        }),
    }
}

fn any_rows(rng: &mut StdRng, rows: usize) -> SparseRows {
    let blocks = rows.div_ceil(ROWS);
    let first = rng.random_range(0..blocks);
    let last = rng.random_range(first + 1..=blocks);
    let sparse = first * ROWS..(last * ROWS).min(rows);
    let part_rows = match rng.random_range(0..3) {
        0 => sparse.len(),
        _ => ROWS * rng.random_range(1..=last - first),
    };
    SparseRows {
        rows,
        sparse,
        part_rows,
    }
}

pub(crate) fn planned(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for _ in 0..cases {
        let (held, rows, q_heads) = any_case(gpu, rng)?;
        let (shape, tokens) = (held.shape, held.rows.tokens);
        let rows = if rng.random_bool(0.5) {
            rows
        } else {
            tokens - (tokens - rows) / TILE * TILE
        };
        let aligned = (tokens - rows).is_multiple_of(TILE);
        let q = Queries::new(gpu, rng, shape.dtype, rows * q_heads * shape.head_dim)?;
        let mut layer = || (0..q_heads).map(|_| any_plan(rng, aligned)).collect::<Vec<_>>();
        let layers = [layer(), layer()];
        let rows = any_rows(rng, rows);
        let mut planner = Planner::new(gpu, shape, tokens + rng.random_range(0..100), &layers)?;
        // What one layer leaves behind must not show in the next.
        planner.build(gpu, 0, q.query(), &rows, &held.view()?, SCALE)?;
        planner.build(gpu, 1, q.query(), &rows, &held.view()?, SCALE)?;
        let [_, heads] = layers;
        let case = Case {
            shape,
            q: &q.numbers,
            kv: &held.rows,
            text: format!("{heads:?}, {rows:?} over {tokens} {shape:?} {:?}", held.form),
            heads,
            rows: rows.clone(),
        };
        let lists = planner.lists()?;
        case.fixed(&lists, tally);
        case.vertical_slash(&lists, &planner, tally)?;
        case.block_sparse(&lists, tally);
        case.x_attention(&lists, tally);
        case.flex_prefill(&lists, &planner.flex_chosen()?, tally);
        let expected = case.attended(&lists);
        // Any part of them, planned for alone, has the same lists.
        let nth = rng.random_range(0..rows.sparse.len().div_ceil(rows.part_rows));
        let first = rows.sparse.start + nth * rows.part_rows;
        let part = first..rows.sparse.end.min(first + rows.part_rows);
        let alone = SparseRows {
            rows: part.len(),
            sparse: 0..part.len(),
            part_rows: part.len(),
        };
        let (query, view) = (
            q.rows(part.clone(), q_heads * shape.head_dim)?,
            held.view_below(case.offset() + part.end)?,
        );
        planner.build(gpu, 1, query, &alone, &view, SCALE)?;
        let blocks = part.start / ROWS..part.end.div_ceil(ROWS);
        let same = planner
            .lists()?
            .iter()
            .zip(&lists)
            .all(|(alone, all)| *alone == all[blocks.clone()]);
        case.wrong(!same, tally, "other lists than the part's alone");
        for &products in products(gpu) {
            let prefill = Prefill {
                rows: rows.rows,
                q_heads,
                scale: SCALE,
                products,
            };
            let tiles = planner.build(gpu, 1, q.query(), &rows, &held.view()?, SCALE)?;
            compare(gpu, &held, &q, prefill, tiles, &expected, tally)?;
        }
    }
    Ok(())
}

impl Case<'_> {
    pub(crate) fn offset(&self) -> usize {
        self.kv.tokens - self.rows.rows
    }

    pub(crate) fn wrong(&self, wrong: bool, tally: &mut Tally, what: &str) {
        tally.count(f64::from(u8::from(wrong)), 0.0, || format!("{what}: {}", self.text));
    }

    fn is_sparse(&self, block: usize) -> bool {
        self.rows.sparse.contains(&(block * ROWS))
    }

    /// Queries of some rows of the call.
    pub(crate) fn queries(&self, rows: std::ops::Range<usize>) -> &[f32] {
        let width = self.heads.len() * self.shape.head_dim;
        &self.q[rows.start * width..rows.end * width]
    }

    /// Keys and values below position `end`.
    pub(crate) fn kv_below(&self, end: usize) -> Rows {
        let (d, tokens) = (self.shape.head_dim, self.kv.tokens);
        let cut = |all: &[f32]| {
            let heads = all.chunks_exact(tokens * d);
            heads.flat_map(|head| &head[..end * d]).copied().collect()
        };
        Rows {
            k: cut(&self.kv.k),
            v: cut(&self.kv.v),
            tokens: end,
        }
    }

    /// Lists that no queries decide.
    fn fixed(&self, lists: &[Vec<HeadMask>], tally: &mut Tally) {
        for (plan, lists) in self.heads.iter().zip(lists) {
            for (block, list) in lists.iter().enumerate() {
                match plan {
                    _ if !self.is_sparse(block) => {
                        self.wrong(*list != HeadMask::Dense, tally, "a row that is not sparse misses keys");
                    }
                    HeadPlan::Fixed(mask) => self.wrong(list != mask, tally, "another mask than was fixed"),
                    _ => {}
                }
            }
        }
    }

    /// The estimate against its reference; the choice against exact choice from the estimate; tiles against the constructor's.
    fn vertical_slash(&self, lists: &[Vec<HeadMask>], planner: &Planner, tally: &mut Tally) -> Result<(), GpuError> {
        let heads: Vec<(usize, VerticalSlash)> = self
            .heads
            .iter()
            .enumerate()
            .filter_map(|(head, plan)| match plan {
                HeadPlan::VerticalSlash(plan) => Some((head, *plan)),
                _ => None,
            })
            .collect();
        if heads.is_empty() {
            return Ok(());
        }
        let [columns, diagonals] = planner.estimated()?;
        let slashes = planner.chosen_slashes()?;
        let SparseRows { sparse, part_rows, .. } = &self.rows;
        let parts = sparse.len().div_ceil(*part_rows);
        let (width, room) = (
            columns.len() / (parts * heads.len()),
            slashes.len() / (parts * heads.len()),
        );
        for part in 0..parts {
            let first = sparse.start + part * part_rows;
            let rows = first..(first + part_rows).min(sparse.end);
            let end = self.offset() + rows.end;
            let kv = self.kv_below(end);
            let expected =
                reference::vs_estimate(self.shape, self.queries(rows.clone()), self.heads.len(), &kv, 64, SCALE);
            for (nth, &(head, plan)) in heads.iter().enumerate() {
                let item = part * heads.len() + nth;
                let mut chosen = Vec::new();
                for (all, expected, forced, k) in [
                    (&columns, &expected.0, plan.sink, plan.verticals),
                    (&diagonals, &expected.1, plan.near, plan.slashes),
                ] {
                    let mut found = all[item * width..][..end].to_vec();
                    let mut expected = expected[head * end..][..end].to_vec();
                    chosen.push(reference::top_k(&found, k.min(end)));
                    // What is forced is far above all else: compared by itself, then left out.
                    let forced = forced.min(end);
                    self.wrong(found[..forced].iter().any(|sum| *sum < 1e38), tally, "not forced");
                    found[..forced].fill(0.0);
                    expected[..forced].fill(0.0);
                    tally.count(distance(&found, &expected), 1e-2, || self.text.clone());
                }
                let own = &slashes[item * room..][..plan.slashes.min(end)];
                self.wrong(own != chosen[1], tally, "other diagonals than the best");
                let list = HeadMask::vertical_slash(ROWS, &chosen[0], &chosen[1]);
                let blocks = rows.start / ROWS..rows.end.div_ceil(ROWS);
                let same = lists[head][blocks].iter().all(|found| *found == list);
                self.wrong(!same, tally, "other tiles than the diagonals'");
            }
        }
        Ok(())
    }

    /// What is chosen, and that nothing much better was left out.
    fn block_sparse(&self, lists: &[Vec<HeadMask>], tally: &mut Tally) {
        let SparseRows { sparse, .. } = &self.rows;
        let end = self.offset() + sparse.end;
        let (kv, key_blocks) = (self.kv_below(end), end.div_ceil(TILE));
        let q = self.queries(sparse.clone());
        let scores = reference::block_scores(self.shape, q, self.heads.len(), &kv, 1.0);
        // What any product of means can be: the scale of what is close.
        let finite = scores.iter().copied().filter(|score| score.is_finite());
        let most = finite.fold(0.0, |a: f64, b| a.max(b.abs()));
        let row_blocks = sparse.len().div_ceil(ROWS);
        for (head, plan) in self.heads.iter().enumerate() {
            let HeadPlan::BlockSparse(plan) = plan else { continue };
            for block in 0..row_blocks {
                let scores = &scores[(head * row_blocks + block) * key_blocks..][..key_blocks];
                let HeadMask::Absolute { rows } = &lists[head][sparse.start / ROWS + block] else {
                    self.wrong(true, tally, "tiles by distance");
                    continue;
                };
                let tiles = &rows[0];
                let first = self.offset() + sparse.start + block * ROWS;
                let end = end.min(first + ROWS);
                let seen = end.div_ceil(TILE);
                let has = |number: usize| tiles.contains(&((number * TILE) as u32));
                // The first block comes on top where it is not among the best.
                let chosen = plan.blocks.min(seen);
                let orderly = (chosen..=chosen + 1).contains(&tiles.len())
                    && tiles.windows(2).all(|pair| pair[0] < pair[1])
                    && tiles
                        .iter()
                        .all(|tile| tile.is_multiple_of(TILE as u32) && (*tile as usize) < end);
                let own = first / TILE..seen;
                let forced = has(0) && own.clone().all(has);
                self.wrong(!(orderly && forced), tally, "blocks out of order, or not forced");
                let on_top = tiles.len() > chosen;
                let free = |number: &usize| (*number > 0 || !on_top) && !own.contains(number);
                let chosen = (0..seen).filter(free).filter(|&number| has(number));
                let others = (0..seen).filter(free).filter(|&number| !has(number));
                let worst = chosen.map(|number| scores[number]).fold(f64::INFINITY, f64::min);
                let best = others.map(|number| scores[number]).fold(f64::NEG_INFINITY, f64::max);
                tally.count((best - worst).max(0.0) / most.max(1e-12), CLOSE, || {
                    format!("a better block is left out: {}", self.text)
                });
            }
        }
    }

    /// Attention over the lists, row block by row block.
    fn attended(&self, lists: &[Vec<HeadMask>]) -> (Vec<f64>, Vec<f64>) {
        let (rows, q_heads) = (self.rows.rows, self.heads.len());
        let (mut out, mut lse) = (Vec::new(), vec![f64::NEG_INFINITY; q_heads * rows]);
        for first in (0..rows).step_by(ROWS) {
            let some = first..rows.min(first + ROWS);
            let heads = lists.iter().map(|lists| lists[first / ROWS].clone());
            let tiles = Mask::new(ROWS, heads.collect()).expect("in order");
            let kv = self.kv_below(self.offset() + some.end);
            let (o, logs) = reference::prefill(self.shape, self.queries(some.clone()), q_heads, &kv, &tiles, SCALE);
            out.extend(o);
            for (head, logs) in logs.chunks_exact(some.len()).enumerate() {
                lse[head * rows + some.start..][..some.len()].copy_from_slice(logs);
            }
        }
        (out, lse)
    }
}
