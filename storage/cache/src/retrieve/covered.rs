//! What a built index finds among the keys of one KV head that it covers, and how that is joined with a scan of the keys behind.
//!
//! The index answers for the blocks that it covers, the scan (sketches or flat) for those behind; both attend to the wanted share of
//! their own mass, so together they attend to that share of the whole, and partials merge exactly.
//!
//! What of the mass of the covered keys was not scored is estimated: with `wave` from its clusters' means, which is never more than the
//! truth; with `roar` from a sample of keys, which is right on average and may miss a key that the walk missed too. So `mass_covered`
//! is an estimate here, and whoever asks for a bound is answered by a scan.

use half::f16;
use kvasir_index::{Attended, Cost, Estimate, Excluded, IndexError, KeyRows, Search as Asked};
use kvasir_simd::{Partial, log_sum_exp2, merge, score_rows, top_k, weigh_rows};

use super::{
    AttendOptions,
    sketches::{EFFORT, rows_effort},
};

/// By how much more of the keys is searched where those that were found do not hold the mass that is wanted.
const EFFORT_GROWTH: f32 = 4.0;
use crate::indexes::HeadIndex;

/// Keys, evenly spread, whose scores tell what a walk did not see.
const SAMPLES: usize = 256;

/// Positions and base-2 scores of one query head's keys, best first.
type Scored = Vec<(u32, f32)>;

/// Attention over some of a head's keys.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    pub(super) attended: Attended,
    /// Base-2 log of the mass that was searched, per query head; what `attended.mass` is a share of.
    pub(super) total: Vec<f32>,
}

/// What a search through an index cost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    /// Keys scored exactly, each query head by itself.
    pub(super) scored: u64,
    pub(super) bytes: u64,
}

/// The keys and values of one KV head that an index covers.
pub(super) struct Covered<'a> {
    pub(super) index: &'a HeadIndex,
    pub(super) keys: KeyRows<'a>,
    pub(super) values: KeyRows<'a>,
    pub(super) excluded: &'a Excluded,
    pub(super) scale: f32,
}

/// The best keys of a group's query heads among those that an index covers.
pub(super) struct Best {
    /// Rising.
    pub(super) positions: Vec<u32>,
    pub(super) total: Vec<f32>,
}

impl Covered<'_> {
    fn head_dim(&self) -> usize {
        self.keys.head_dim()
    }

    /// Keys that are not excluded.
    pub(super) fn searched(&self) -> usize {
        self.excluded.searched_count(self.keys.len() as u32) as usize
    }

    /// Attends to the fewest best keys of each of one group's heads that hold `target_mass`, as far as the index finds them.
    pub(super) fn attend(
        &self,
        q: &[f32],
        target_mass: f32,
        k_max: Option<usize>,
        options: AttendOptions,
        work: &mut Work,
    ) -> Result<Part, IndexError> {
        let mut effort = match (target_mass, options.effort) {
            (1.0, _) => 1.0,
            (_, 0.0) => EFFORT,
            (_, effort) => effort,
        };
        // Who names an effort or a number of keys wants no more than that.
        let bounded = options.effort != 0.0 || k_max.is_some();
        loop {
            let asked = self.asked(q, self.keys.len(), effort);
            let (hits, estimate) = self.find(&asked, work)?;
            let totals = self.totals(q, &hits, estimate.as_ref(), work);
            let part = self.choose(&hits, &totals, estimate.as_ref(), target_mass, k_max, options.tail);
            if bounded || effort >= 1.0 || !part.attended.cut_short {
                work.bytes += (part.attended.value_rows * self.head_dim() * size_of::<f16>()) as u64;
                return Ok(part);
            }
            effort = (effort * EFFORT_GROWTH).min(1.0);
        }
    }

    /// The `k` best keys of each of one group's heads, as far as the index finds them.
    pub(super) fn rows(&self, q: &[f32], k: usize, work: &mut Work) -> Result<Best, IndexError> {
        let effort = rows_effort(k, self.searched());
        let asked = self.asked(q, self.keys.len(), effort);
        let (hits, estimate) = self.find(&asked, work)?;
        let mut best = Best {
            positions: Vec::new(),
            total: self.totals(q, &hits, estimate.as_ref(), work),
        };
        for hits in &hits {
            best.positions
                .extend(hits.iter().take(k).map(|(position, _)| *position));
        }
        best.positions.sort_unstable();
        best.positions.dedup();
        Ok(best)
    }

    fn asked<'s>(&'s self, q: &'s [f32], k: usize, effort: f32) -> Asked<'s> {
        Asked {
            q,
            scale: self.scale,
            keys: self.keys,
            k: k.max(1),
            effort,
            mass: 1.0,
            excluded: self.excluded,
        }
    }

    /// Per query head the keys that were scored, best first, and what stands for the others.
    fn find(&self, asked: &Asked<'_>, work: &mut Work) -> Result<(Vec<Scored>, Option<Estimate>), IndexError> {
        let hits = self.index.keys().search(asked)?;
        let Cost {
            keys_scored,
            bytes_read,
        } = hits.cost;
        work.scored += keys_scored;
        work.bytes += bytes_read;
        let estimate = match self.index {
            HeadIndex::Wave(wave) => Some(wave.estimate(asked, 1.0)?),
            HeadIndex::Roar(_) => None,
        };
        work.bytes += estimate.as_ref().map_or(0, |estimate| estimate.bytes_read);
        Ok((hits.heads, estimate))
    }

    /// Base-2 log of the mass of all keys that are searched, per query head.
    fn totals(&self, q: &[f32], hits: &[Scored], estimate: Option<&Estimate>, work: &mut Work) -> Vec<f32> {
        let sampled = match estimate {
            Some(_) => Vec::new(),
            None => self.samples(),
        };
        let of_head = |(head, (q, hits)): (usize, (&[f32], &Scored))| {
            let scores: Vec<f32> = hits.iter().map(|(_, score)| *score).collect();
            let unseen = match estimate {
                Some(estimate) => estimate.partial.lse[head],
                None => self.unseen(q, hits, &sampled, work),
            };
            log_sum_exp2(&[log_sum_exp2(&scores), unseen])
        };
        q.chunks_exact(self.head_dim())
            .zip(hits)
            .enumerate()
            .map(of_head)
            .collect()
    }

    /// Evenly spread keys that are searched.
    fn samples(&self) -> Vec<u32> {
        let stride = self.searched().div_ceil(SAMPLES).max(1);
        let all = self.excluded.searched(0..self.keys.len() as u32).flatten();
        all.skip(stride / 2).step_by(stride).collect()
    }

    /// Base-2 log of the mass of the keys that were not scored, as those of `sampled` show it that were not either.
    fn unseen(&self, q: &[f32], hits: &[(u32, f32)], sampled: &[u32], work: &mut Work) -> f32 {
        let mut seen: Vec<u32> = hits.iter().map(|(at, _)| *at).collect();
        seen.sort_unstable();
        let rows: Vec<&[f16]> = (sampled.iter())
            .filter(|at| seen.binary_search(at).is_err())
            .map(|at| self.keys.row(*at as usize))
            .collect();
        let left = self.searched().saturating_sub(hits.len());
        if left == 0 || rows.is_empty() {
            return f32::NEG_INFINITY;
        }
        let mut scores = vec![0.0; rows.len()];
        score_rows(q, &rows, self.head_dim(), self.scale, &mut scores);
        scores
            .iter_mut()
            .filter(|score| !score.is_finite())
            .for_each(|score| *score = f32::NEG_INFINITY);
        work.scored += rows.len() as u64;
        work.bytes += (rows.len() * self.head_dim() * size_of::<f16>()) as u64;
        log_sum_exp2(&scores) + (left as f32 / rows.len() as f32).log2()
    }

    fn choose(
        &self,
        hits: &[Scored],
        totals: &[f32],
        estimate: Option<&Estimate>,
        target_mass: f32,
        k_max: Option<usize>,
        tail: bool,
    ) -> Part {
        let d = self.head_dim();
        let mut part = Part::default();
        let mut taken = Vec::new();
        for (head, (hits, &total)) in hits.iter().zip(totals).enumerate() {
            // An estimate stands for what was not scored: it joins with all that was.
            let tail = estimate.filter(|_| tail && k_max.is_none());
            let scores: Vec<f32> = hits.iter().map(|(_, score)| *score).collect();
            let wanted = match tail {
                Some(_) => scores.len(),
                None => fewest(&scores, total, target_mass).min(k_max.unwrap_or(usize::MAX)),
            };
            let scores = &scores[..wanted];
            let lse = log_sum_exp2(scores);
            let mass = share(lse, total);
            let weights: Vec<f32> = scores.iter().map(|score| (score - lse).exp2()).collect();
            let rows: Vec<&[f16]> = hits[..wanted]
                .iter()
                .map(|(at, _)| self.values.row(*at as usize))
                .collect();
            let mut found = Partial {
                o: vec![0.0; d],
                lse: vec![lse],
            };
            weigh_rows(&weights, &rows, d, &mut found.o);
            if let Some(estimate) = tail {
                let of_head = Partial {
                    o: estimate.partial.o[head * d..][..d].to_vec(),
                    lse: vec![estimate.partial.lse[head]],
                };
                merge(&mut found, &of_head, d);
            }
            taken.extend(hits[..wanted].iter().map(|(at, _)| *at));
            let out = &mut part.attended;
            out.o.extend(found.o);
            out.lse.extend(found.lse);
            out.mass.push(mass);
            out.keys.push(wanted);
            // What is summed in another order differs in its last bits.
            out.cut_short |= mass < target_mass - 1e-4;
            part.total.push(total);
        }
        taken.sort_unstable();
        taken.dedup();
        part.attended.value_rows = taken.len();
        part
    }
}

impl Part {
    /// Attention over the keys of both parts, which have none in common.
    pub(super) fn join(mut self, other: Self, head_dim: usize) -> Self {
        let (a, b) = (&mut self.attended, other.attended);
        let mut joined = Partial {
            o: std::mem::take(&mut a.o),
            lse: std::mem::take(&mut a.lse),
        };
        merge(&mut joined, &Partial { o: b.o, lse: b.lse }, head_dim);
        (a.o, a.lse) = (joined.o, joined.lse);
        for (head, total) in self.total.iter_mut().enumerate() {
            let both = log_sum_exp2(&[*total, other.total[head]]);
            let covered = [*total + a.mass[head].log2(), other.total[head] + b.mass[head].log2()];
            a.mass[head] = share(log_sum_exp2(&covered), both);
            a.keys[head] += b.keys[head];
            *total = both;
        }
        a.value_rows += b.value_rows;
        a.cut_short |= b.cut_short;
        self
    }

    /// Puts the heads of another sequence behind.
    pub(super) fn append(&mut self, other: Self) {
        let (a, b) = (&mut self.attended, other.attended);
        a.o.extend(b.o);
        a.lse.extend(b.lse);
        a.mass.extend(b.mass);
        a.keys.extend(b.keys);
        a.value_rows += b.value_rows;
        a.cut_short |= b.cut_short;
        self.total.extend(other.total);
    }

    /// What another scan attended to; `tail` if its `lse` stands for all that it searched.
    pub(super) fn of_scan(attended: Attended, tail: bool) -> Self {
        let total = attended.lse.iter().zip(&attended.mass);
        let total = total
            .map(|(lse, mass)| {
                if tail {
                    *lse
                } else {
                    lse - mass.max(f32::MIN_POSITIVE).log2()
                }
            })
            .collect();
        Self { attended, total }
    }
}

/// Of candidates `rows`, those that are among the `k` best of some query head, as rising indices; and the share of `total` that they
/// hold, per head.
pub(super) fn best_of(
    q: &[f32],
    rows: &[&[f16]],
    head_dim: usize,
    scale: f32,
    k: usize,
    total: &[f32],
) -> (Vec<u32>, Vec<f32>) {
    let mut scores = vec![0.0; q.len() / head_dim * rows.len()];
    score_rows(q, rows, head_dim, scale, &mut scores);
    let (mut chosen, mut best) = (Vec::new(), Vec::new());
    if !rows.is_empty() {
        for scores in scores.chunks_exact(rows.len()) {
            top_k(scores, k, &mut best);
            chosen.extend_from_slice(&best);
        }
    }
    chosen.sort_unstable();
    chosen.dedup();
    let mass = total.iter().enumerate().map(|(head, total)| {
        let scores = &scores[head * rows.len()..][..rows.len()];
        let held: Vec<f32> = chosen.iter().map(|at| scores[*at as usize]).collect();
        share(log_sum_exp2(&held), *total)
    });
    let mass = mass.collect();
    (chosen, mass)
}

/// Base-2 log of the mass that rows hold, per query head.
pub(super) fn mass_of(q: &[f32], rows: &[&[f16]], head_dim: usize, scale: f32) -> Vec<f32> {
    let heads = q.len() / head_dim;
    let mut scores = vec![0.0; heads * rows.len()];
    score_rows(q, rows, head_dim, scale, &mut scores);
    let of = |head: usize| log_sum_exp2(&scores[head * rows.len()..][..rows.len()]);
    (0..heads).map(of).collect()
}

/// How many of `scores`, best first, hold `target` of the mass under `total`; all of them if they do not.
fn fewest(scores: &[f32], total: f32, target: f32) -> usize {
    if target >= 1.0 {
        return scores.len();
    }
    let mut sum = 0.0_f64;
    for (at, score) in scores.iter().enumerate() {
        sum += f64::from((score - total).exp2());
        if sum >= f64::from(target) {
            return at + 1;
        }
    }
    scores.len()
}

/// Share of the mass under `all` that `chosen` holds; all of nothing where there is none.
fn share(chosen: f32, all: f32) -> f32 {
    if all == f32::NEG_INFINITY {
        1.0
    } else {
        (chosen - all).exp2().min(1.0)
    }
}
