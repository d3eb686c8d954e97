//! Keys that hold a share of each head's mass, read in the order in which they are worth it.
//!
//! Of all keys the first of four lines of digits is read, those behind it only where they [save more rows than they cost](codes).
//! Then key rows are read, each time for the head that lacks most, and scored for every head of the group, until each is estimated to have its
//! share: exact scores of what was read, sketches of the rest. So a head that spreads its mass costs no rows of those that do not, and what
//! it reads counts for them.
//!
//! Sketches say too little of what is not read, by a factor that differs between heads: without it rows are read for the wrong head. What
//! is read for one head is no choice of another, whose sketches it tests; so the factor is the mean over the rows read of late for any.

mod codes;

use kvasir_simd::{GROUP, Level, scores};

use super::super::{
    column::Column,
    search::{Masks, Table},
};
use crate::{Cost, Hits, Search, bits::Bits};

/// Rows that are read for a head before the heads are compared again.
const BATCH: usize = 4;
/// Rows for which sketches are believed before any was read.
const BELIEVED: f64 = 20.0;
/// What is left of a row's part in that mean after another one.
const MEMORY: f64 = 0.998;

/// What is known of the keys of one query head.
struct Head {
    /// By sketch; 0 of a key that is not searched.
    levels: Vec<u16>,
    /// Searched slots, the best by sketch first; ties go to the lower.
    order: Vec<u32>,
    /// How many of them were looked at.
    next: usize,
    /// Rows that may still be read for it.
    budget: usize,
    /// Exact weight of the rows that were read, in the unit of [`Level::weight`].
    found: f64,
    /// Weight by sketch of the others.
    rest: f64,
    /// Sum of exact weights of rows in parts of those by sketch, and of how much each row counts.
    ratios: f64,
    compared: f64,
    /// Levels do not tell its keys apart: nothing is known of what was not read.
    unsure: bool,
}

/// Answers `search`, of which `masks` has one sequence of searched keys.
pub(super) fn search(search: &Search<'_>, table: &Table, column: &Column, masks: &Masks) -> Hits {
    let d = search.keys.head_dim();
    let (words, searched) = (&masks.words[0], masks.searched[0]);
    let budget = ((f64::from(search.effort) * searched as f64).ceil() as usize).max(1);
    let (levels, coded) = codes::levels(f64::from(search.mass), table, column, words);
    let mut heads: Vec<Head> = levels.into_iter().map(|levels| Head::new(levels, budget)).collect();
    let mut read = Bits::default();
    read.reset(column.groups() * GROUP);
    let mut rows: Vec<(u32, f32)> = Vec::new();
    let mut out = vec![0.0; heads.len()];
    let mut slots = 0;
    while slots < searched {
        let open = heads
            .iter_mut()
            .filter(|head| head.next < head.order.len() && head.budget > 0);
        let worst = open.min_by(|a, b| a.share().total_cmp(&b.share()));
        let Some(worst) = worst.filter(|head| head.share() < f64::from(search.mass)) else {
            break;
        };
        let from = rows.len() / out.len();
        while rows.len() / out.len() < from + BATCH && worst.budget > 0 {
            let Some(&slot) = worst.order.get(worst.next) else {
                break;
            };
            worst.next += 1;
            if !read.contains(slot) {
                read.insert(slot);
                worst.budget -= 1;
                // Whole blocks before the last: a slot is a position.
                scores(search.q, search.keys.row(slot as usize), d, search.scale, &mut out);
                rows.extend(out.iter().map(|score| (slot, *score)));
            }
        }
        slots = rows.len() / out.len();
        for row in rows[from * out.len()..].chunks(out.len()) {
            for ((at, head), (slot, score)) in heads.iter_mut().enumerate().zip(row) {
                head.take(*slot, *score, table.average[at]);
            }
        }
    }
    let all = slots == searched;
    let mut hits = Hits {
        cost: Cost {
            keys_scored: rows.len() as u64,
            bytes_read: (coded + slots * d * 2) as u64,
        },
        covered: heads
            .iter()
            .map(|head| if all { 1.0 } else { head.share() as f32 })
            .collect(),
        heads: Vec::with_capacity(heads.len()),
    };
    for head in 0..heads.len() {
        let own = rows.iter().skip(head).step_by(heads.len());
        let mut found: Vec<(u32, f32)> = own.copied().filter(|(_, score)| score.is_finite()).collect();
        found.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        found.truncate(search.k);
        hits.heads.push(found);
    }
    hits
}

impl Head {
    /// Of which no row was read.
    fn new(levels: codes::Levels, budget: usize) -> Self {
        let mut head = Self {
            levels: levels.levels,
            order: Vec::new(),
            next: 0,
            budget,
            found: 0.0,
            rest: 0.0,
            ratios: BELIEVED,
            compared: BELIEVED,
            unsure: levels.unsure,
        };
        head.sort();
        head
    }

    /// Share of the mass that was found, as far as is known.
    fn share(&self) -> f64 {
        let all = self.found + self.rest.max(0.0) * self.ratios / self.compared;
        if self.unsure || all <= 0.0 {
            0.0
        } else {
            self.found / all
        }
    }

    fn take(&mut self, slot: u32, score: f32, average: f32) {
        let sketched = f64::from(Level(self.levels[slot as usize]).weight());
        self.rest -= sketched;
        if score.is_finite() {
            let exact = f64::from(score - average + Level::UNIT).min(500.0).exp2();
            self.found += exact;
            let ratio = exact / sketched.max(f64::from(Level::LOWEST.weight()));
            self.ratios = self.ratios * MEMORY + ratio;
            self.compared = self.compared * MEMORY + 1.0;
        }
    }

    /// Sorts the searched keys by level, and sums them up.
    fn sort(&mut self) {
        let mut ends = vec![0_u32; usize::from(Level::HIGHEST.0) + 2];
        for level in self.levels.iter().filter(|level| **level > 0) {
            ends[usize::from(Level::HIGHEST.0 - level) + 1] += 1;
            self.rest += f64::from(Level(*level).weight());
        }
        for at in 1..ends.len() {
            ends[at] += ends[at - 1];
        }
        self.order.resize(ends.last().map_or(0, |end| *end as usize), 0);
        for (slot, level) in (0..).zip(&self.levels).filter(|(_, level)| **level > 0) {
            let at = &mut ends[usize::from(Level::HIGHEST.0 - level)];
            self.order[*at as usize] = slot;
            *at += 1;
        }
        let best = self.order.first().map_or(0, |slot| self.levels[*slot as usize]);
        self.unsure |= Table::is_at_an_end(best);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head whose sketches say half of each weight has found what it has found.
    #[test]
    fn what_sketches_err_by_is_learnt() {
        let levels = codes::Levels {
            levels: vec![39 * 128; 1000],
            unsure: false,
        };
        let mut head = Head::new(levels, 1000);
        let sketched = Level(39 * 128).above_average();
        for slot in 0..500 {
            head.take(slot, sketched + 1.0, 0.0);
        }
        assert!((head.share() - 0.5).abs() < 0.01, "{}", head.share());
        // Of scores beyond all weights too a share is a number.
        (500..900).for_each(|slot| head.take(slot, f32::MAX, 0.0));
        (900..1000).for_each(|slot| head.take(slot, f32::INFINITY, 0.0));
        assert!((0.0..=1.0).contains(&head.share()), "{}", head.share());
    }
}
