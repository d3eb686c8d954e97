//! Key blocks that are chosen for their share of the mass, against the references' masses.

use std::{collections::BTreeSet, ops::Range};

use kvasir_cuda::{
    FlexChosen, FlexPrefill, HeadMask, HeadPlan,
    plan::{ROWS, TILE},
    reference,
};

use crate::{
    check::Tally,
    planner::{Case, SCALE},
};

/// What a chosen set's share may be off. XAttention's masses are sums of f32; FlexPrefill's map is of means that are rounded to bf16.
const X_SHARE: f64 = 1e-3;
const FLEX_SHARE: f64 = 1e-2;
/// What a block may have more than one that was chosen before it, of the latter.
const X_ORDER: f64 = 1e-3;
const FLEX_ORDER: f64 = 5e-2;
/// Distance of the estimate from the truth.
const DISTANCE: f64 = 1e-2;

/// The key blocks of a row block.
struct Chosen {
    blocks: BTreeSet<usize>,
    /// That it sees any of; that lie wholly before it.
    seen: usize,
    before: usize,
}

impl Chosen {
    fn has(&self, number: usize) -> bool {
        self.blocks.contains(&number)
    }
}

/// Whether the free blocks are the fewest with a share of the mass, `masses` and what is chosen given row block by row block; the rest
/// is kept whatever it has.
fn is_smallest(
    rows: &[(&[f64], &Chosen)],
    free: impl Fn(&Chosen, usize) -> bool,
    [share, off, order]: [f64; 3],
) -> bool {
    let (mut total, mut kept, mut chosen) = (0.0, 0.0, 0.0);
    let (mut least, mut left_out) = (f64::INFINITY, 0.0_f64);
    for (masses, row) in rows {
        for (number, &mass) in masses[..row.seen].iter().enumerate() {
            total += mass;
            match (free(row, number), row.has(number)) {
                (false, _) => kept += mass,
                (true, true) => {
                    chosen += mass;
                    least = least.min(mass);
                }
                (true, false) => left_out = left_out.max(mass),
            }
        }
    }
    let enough = chosen + kept >= (share - off) * total;
    // What is kept may count among the chosen or not: the fewest are no more than if none of it does.
    let fewest = least.is_infinite() || chosen - least <= (share + off) * total;
    enough && fewest && left_out <= least * (1.0 + order) + 1e-9
}

impl Case<'_> {
    /// The list of row block `block` of the sparse rows, if it is in order and holds what is always kept.
    fn chosen(&self, list: &HeadMask, block: usize, tally: &mut Tally) -> Option<Chosen> {
        let sparse = &self.rows.sparse;
        let first = self.offset() + sparse.start + block * ROWS;
        let end = (first + ROWS).min(self.offset() + sparse.end);
        let HeadMask::Absolute { rows } = list else {
            self.wrong(true, tally, "tiles by distance");
            return None;
        };
        let tiles = &rows[0];
        let chosen = Chosen {
            blocks: tiles.iter().map(|&tile| tile as usize / TILE).collect(),
            seen: end.div_ceil(TILE),
            before: first / TILE,
        };
        let orderly = tiles.windows(2).all(|pair| pair[0] < pair[1])
            && tiles
                .iter()
                .all(|tile| tile.is_multiple_of(TILE as u32) && (*tile as usize) < end);
        let kept = chosen.has(0) && (chosen.before..chosen.seen).all(|number| chosen.has(number));
        self.wrong(!(orderly && kept), tally, "blocks out of order, or not kept");
        Some(chosen)
    }

    /// The fewest blocks with a share of the antidiagonals' mass.
    pub(crate) fn x_attention(&self, lists: &[Vec<HeadMask>], tally: &mut Tally) {
        let sparse = &self.rows.sparse;
        let kv = self.kv_below(self.offset() + sparse.end);
        let (key_blocks, row_blocks) = (kv.tokens.div_ceil(TILE), sparse.len().div_ceil(ROWS));
        let masses = |stride| {
            let q = self.queries(sparse.clone());
            reference::antidiagonal_masses(self.shape, q, self.heads.len(), &kv, stride, SCALE)
        };
        let by_stride = [8, 16].map(|stride| (stride, masses(stride)));
        for (head, plan) in self.heads.iter().enumerate() {
            let HeadPlan::XAttention(plan) = plan else { continue };
            let (_, masses) = &by_stride[usize::from(plan.stride == 16)];
            for block in 0..row_blocks {
                let list = &lists[head][sparse.start / ROWS + block];
                let Some(chosen) = self.chosen(list, block, tally) else {
                    continue;
                };
                let masses = &masses[(head * row_blocks + block) * key_blocks..][..key_blocks];
                if sparse.len() - block * ROWS < plan.stride {
                    self.wrong(
                        chosen.blocks.len() < chosen.seen,
                        tally,
                        "too few queries, and not all is seen",
                    );
                    continue;
                }
                let free = |chosen: &Chosen, number: usize| number > 0 && number < chosen.before;
                let smallest = is_smallest(
                    &[(masses, &chosen)],
                    free,
                    [f64::from(plan.threshold), X_SHARE, X_ORDER],
                );
                self.wrong(!smallest, tally, "not the fewest blocks with the share");
            }
        }
    }

    /// The test, and what it decides over.
    pub(crate) fn flex_prefill(&self, lists: &[Vec<HeadMask>], decided: &[FlexChosen], tally: &mut Tally) {
        let of_heads = self.heads.iter().enumerate().filter_map(|(head, plan)| match plan {
            HeadPlan::FlexPrefill(plan) => Some((head, *plan)),
            _ => None,
        });
        let heads: Vec<(usize, FlexPrefill)> = of_heads.collect();
        if heads.is_empty() {
            return;
        }
        let (sparse, part_rows) = (&self.rows.sparse, self.rows.part_rows);
        for (nth, first) in sparse.clone().step_by(part_rows).enumerate() {
            let part = Part::new(self, first..sparse.end.min(first + part_rows));
            for (at, (head, plan)) in heads.iter().enumerate() {
                let decided = &decided[nth * heads.len() + at];
                if plan.tau > 0.0 {
                    let apart = (f64::from(decided.distance) - part.distance(*head)).abs();
                    tally.count(apart, DISTANCE, || format!("distance: {}", self.text));
                }
                let rows = (part.rows.start / ROWS..part.rows.end.div_ceil(ROWS)).map(|block| &lists[*head][block]);
                let rows: Vec<&HeadMask> = rows.collect();
                if decided.distance < plan.tau {
                    part.by_map(*head, *plan, &rows, tally);
                } else {
                    part.by_columns(*head, *plan, &decided.blocks, &rows, tally);
                }
            }
        }
    }
}

/// A part of a case, and what the references say of it.
struct Part<'a> {
    case: &'a Case<'a>,
    /// Of the call.
    rows: Range<usize>,
    /// Keys up to its end.
    end: usize,
    columns: Vec<f64>,
    diagonals: Vec<f64>,
    /// Scores of means: of the last queries, and of each row block.
    last: Vec<f64>,
    map: Vec<f64>,
}

impl<'a> Part<'a> {
    fn new(case: &'a Case<'a>, rows: Range<usize>) -> Self {
        let (end, q_heads) = (case.offset() + rows.end, case.heads.len());
        let (kv, q) = (case.kv_below(end), case.queries(rows.clone()));
        let (columns, diagonals) = reference::vs_estimate(case.shape, q, q_heads, &kv, ROWS, SCALE);
        let last = case.queries(rows.end - rows.len().min(ROWS)..rows.end);
        Self {
            last: reference::block_scores(case.shape, last, q_heads, &kv, SCALE),
            map: reference::block_scores(case.shape, q, q_heads, &kv, SCALE),
            case,
            rows,
            end,
            columns,
            diagonals,
        }
    }

    fn key_blocks(&self) -> usize {
        self.end.div_ceil(TILE)
    }

    fn pooled(&self, sums: &[f64], head: usize) -> Vec<f64> {
        let sums = &sums[head * self.end..][..self.end];
        sums.chunks(TILE).map(|sums| sums.iter().sum()).collect()
    }

    /// Square root of the Jensen-Shannon divergence, base 2.
    fn distance(&self, head: usize) -> f64 {
        let estimated = weights(&self.last[head * self.key_blocks()..][..self.key_blocks()]);
        let found = self.pooled(&self.columns, head);
        let sum: f64 = found.iter().sum();
        let terms = estimated.iter().zip(&found).map(|(&p, &found)| {
            let q = found / sum;
            let part = |x: f64| {
                if x > 0.0 {
                    x / 2.0 * (x / (0.5 * (p + q))).log2()
                } else {
                    0.0
                }
            };
            part(p) + part(q)
        });
        terms.sum::<f64>().max(0.0).sqrt()
    }

    /// Whole blocks of columns and runs of diagonals: how many, which, and the tiles that they make.
    fn by_columns(
        &self,
        head: usize,
        plan: FlexPrefill,
        decided: &[Vec<u32>; 2],
        lists: &[&HeadMask],
        tally: &mut Tally,
    ) {
        for (sums, decided) in [&self.columns, &self.diagonals].into_iter().zip(decided) {
            let pooled = self.pooled(sums, head);
            let count = |share: f64| {
                let few = fewest(&sums[head * self.end..][..self.end], share);
                (few / TILE + 1).max(plan.budget_min.div_ceil(TILE)).min(pooled.len())
            };
            let gamma = f64::from(plan.gamma);
            let right = count(gamma - FLEX_SHARE)..=count(gamma + FLEX_SHARE);
            self.case.wrong(
                !right.contains(&decided.len()),
                tally,
                "another number of blocks than holds the share",
            );
            let (mut least, mut left_out) = (f64::INFINITY, 0.0_f64);
            for (number, &mass) in pooled.iter().enumerate().skip(1) {
                if decided.contains(&(number as u32)) {
                    least = least.min(mass);
                } else {
                    left_out = left_out.max(mass);
                }
            }
            let best = left_out <= least * (1.0 + FLEX_ORDER) + 1e-6;
            self.case
                .wrong(!best, tally, "a better block of columns or diagonals is left out");
        }
        let whole = |blocks: &[u32]| -> Vec<u32> {
            let tile = TILE as u32;
            blocks
                .iter()
                .flat_map(|&block| block * tile..(block + 1) * tile)
                .collect()
        };
        let mask = HeadMask::vertical_slash(ROWS, &whole(&decided[0]), &whole(&decided[1]));
        for (block, list) in lists.iter().enumerate() {
            let Some(chosen) = self.chosen(list, block, tally) else {
                continue;
            };
            let held = mask.held(self.case.offset() + self.rows.start + (block + 1) * ROWS, block);
            let positions = held.ranges.into_iter().flatten();
            let positions = positions.chain(held.columns.iter().map(|&column| column as usize));
            let expected: BTreeSet<usize> = positions.map(|at| at / TILE).filter(|&at| at < chosen.seen).collect();
            self.case.wrong(
                expected != chosen.blocks,
                tally,
                "other blocks than the columns' and the diagonals'",
            );
        }
    }

    /// The best blocks of the map of means, and the floor.
    fn by_map(&self, head: usize, plan: FlexPrefill, lists: &[&HeadMask], tally: &mut Tally) {
        let floor = plan.budget_min.div_ceil(TILE);
        let (mut rows, mut masses) = (Vec::new(), Vec::new());
        for (block, list) in lists.iter().enumerate() {
            let Some(chosen) = self.chosen(list, block, tally) else {
                return;
            };
            let few = chosen.blocks.len() < floor.min(chosen.before);
            self.case.wrong(few, tally, "fewer blocks than the floor");
            rows.push(chosen);
            masses.push(weights(
                &self.map[(head * lists.len() + block) * self.key_blocks()..][..self.key_blocks()],
            ));
        }
        // The nearest ones may be there for the floor.
        let free = |row: &Chosen, number: usize| number > 0 && number + floor < row.before;
        let rows: Vec<(&[f64], &Chosen)> = masses.iter().map(Vec::as_slice).zip(&rows).collect();
        let smallest = is_smallest(&rows, free, [f64::from(plan.gamma), FLEX_SHARE, FLEX_ORDER]);
        self.case
            .wrong(!smallest, tally, "not the fewest blocks of the map with the share");
    }

    fn chosen(&self, list: &HeadMask, block: usize, tally: &mut Tally) -> Option<Chosen> {
        let before = (self.rows.start - self.case.rows.sparse.start) / ROWS;
        self.case.chosen(list, before + block, tally)
    }
}

/// The softmax; nothing where a score is `-inf`.
fn weights(scores: &[f64]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
    scores.iter().map(|score| (score - most).exp() / sum).collect()
}

/// How many the fewest entries with a share of the sum are.
fn fewest(masses: &[f64], share: f64) -> usize {
    let mut sorted = masses.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let wanted = share.min(1.0) * sorted.iter().sum::<f64>();
    let mut sum = 0.0;
    let within = |mass: &&f64| {
        let more = sum < wanted;
        sum += **mass;
        more
    };
    sorted.iter().take_while(within).count()
}
