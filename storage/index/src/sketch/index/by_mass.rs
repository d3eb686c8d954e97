//! Keys that hold a share of each head's mass, read in the order in which they are worth it.
//!
//! Of all keys the first of four lines of digits is read, those behind it only in groups that matter: those that hold, by what was
//! read before, what is sought and much of what may be missed. Then key rows are read, each time for the head that lacks most, and scored for
//! every head of the group, until each is estimated to have its share: exact scores of what was read, sketches of the rest. So a head
//! that spreads its mass costs no rows of those that do not, and what it reads counts for them.

use kvasir_simd::{GROUP, Level, coded_levels, scores};

use super::super::{
    column::Column,
    search::{Kind, Masks, Table},
};
use crate::{Cost, Hits, Search, bits::Bits};

/// How many quarters of a key's digits are read in groups that hold, by what was read before, all but so many parts of the share
/// that may be missed. Twice and half of these parts read 1 % more in all of real heads.
const STAGES: [(usize, f64); 2] = [(2, 0.125), (4, 0.5)];
/// Parts of a key's digits.
const QUARTERS: usize = 4;
/// Rows that are read for a head before the heads are compared again.
const BATCH: usize = 4;

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
    /// Levels do not tell its keys apart: nothing is known of what was not read.
    unsure: bool,
}

/// Answers `search`, of which `masks` has one sequence of searched keys.
pub(super) fn search(search: &Search<'_>, table: &Table, column: &Column, masks: &Masks) -> Hits {
    let d = search.keys.head_dim();
    let (words, searched) = (&masks.words[0], masks.searched[0]);
    let (mut heads, coded) = heads(search, table, column, words, searched);
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
    /// Share of the mass that was found, as far as is known.
    fn share(&self) -> f64 {
        let all = self.found + self.rest.max(0.0);
        if self.unsure || all <= 0.0 {
            0.0
        } else {
            self.found / all
        }
    }

    fn take(&mut self, slot: u32, score: f32, average: f32) {
        self.rest -= f64::from(Level(self.levels[slot as usize]).weight());
        if score.is_finite() {
            self.found += f64::from(score - average + Level::UNIT).min(1000.0).exp2();
        }
    }
}

/// What sketches say of all keys for each head; and how many bytes of them were read.
fn heads(search: &Search<'_>, table: &Table, column: &Column, words: &[u16], searched: usize) -> (Vec<Head>, usize) {
    let quarters = |read: usize| table.leading(column.format(), read * column.lines() / QUARTERS);
    let first = quarters(1);
    let (keys, slots) = (column.coded(0..column.groups(), words), column.groups() * GROUP);
    let budget = ((f64::from(search.effort) * searched as f64).ceil() as usize).max(1);
    let mut heads: Vec<Head> = (0..table.heads())
        .map(|head| {
            let mut levels = vec![0; slots];
            coded_levels(&first, head..head + 1, keys, &mut levels, slots);
            Head {
                levels,
                order: Vec::new(),
                next: 0,
                budget,
                found: 0.0,
                rest: 0.0,
                unsure: table.kinds[head] != Kind::Sketched || !table.fits(head, column),
            }
        })
        .collect();
    let mut read = vec![1; column.groups()];
    for (part, unread) in STAGES {
        let chosen = worth_reading(&heads, column.groups(), 1.0 - (1.0 - f64::from(search.mass)) * unread);
        let queries = quarters(part);
        for (at, head) in heads.iter_mut().enumerate() {
            head.unsure |= !queries.fits(at, column.step_max());
            refine(head, &chosen, |group, levels| {
                let keys = column.coded(group..group + 1, words);
                coded_levels(&queries, at..at + 1, keys, levels, GROUP);
            });
        }
        chosen.iter().for_each(|group| read[group as usize] = part);
    }
    heads.iter_mut().for_each(order);
    let coded = read.iter().sum::<usize>() * (column.coded_bytes() / column.groups()) / QUARTERS;
    (heads, coded)
}

/// The groups of which every head finds `share` of its weight, those first that hold the most of any head's.
fn worth_reading(heads: &[Head], groups: usize, share: f64) -> Bits {
    let mut worth = vec![0.0_f64; groups];
    let shares: Vec<Vec<f64>> = heads
        .iter()
        .map(|head| {
            let weigh = |levels: &[u16]| levels.iter().map(|level| f64::from(Level(*level).weight())).sum();
            let weights: Vec<f64> = head.levels.chunks(GROUP).map(weigh).collect();
            let total: f64 = weights.iter().sum();
            weights
                .into_iter()
                .map(|weight| weight / total.max(f64::MIN_POSITIVE))
                .collect()
        })
        .collect();
    for shares in &shares {
        worth
            .iter_mut()
            .zip(shares)
            .for_each(|(worth, share)| *worth = share.max(*worth));
    }
    let mut order: Vec<u32> = (0..groups as u32).collect();
    order.sort_unstable_by(|&a, &b| worth[b as usize].total_cmp(&worth[a as usize]).then(a.cmp(&b)));
    let (mut chosen, mut sums) = (Bits::default(), vec![0.0; heads.len()]);
    chosen.reset(groups);
    for group in order {
        if sums.iter().all(|sum| *sum >= share) {
            break;
        }
        chosen.insert(group);
        sums.iter_mut()
            .zip(&shares)
            .for_each(|(sum, shares)| *sum += shares[group as usize]);
    }
    chosen
}

/// Levels of the groups `chosen` anew; those of others are moved by what that changes in the mean.
fn refine(head: &mut Head, chosen: &Bits, levels_of: impl Fn(usize, &mut [u16])) {
    let (mut before, mut after) = (0.0_f64, 0.0_f64);
    let mut levels = [0; GROUP];
    for group in chosen.iter() {
        let group = group as usize;
        levels_of(group, &mut levels);
        for (old, new) in head.levels[group * GROUP..].iter_mut().zip(&levels) {
            before += f64::from(Level(*old).weight());
            after += f64::from(Level(*new).weight());
            *old = *new;
        }
    }
    let moved = if before > 0.0 && after > 0.0 {
        (after / before).log2() * 128.0
    } else {
        0.0
    };
    for (group, levels) in (0..).zip(head.levels.chunks_mut(GROUP)) {
        if !chosen.contains(group) {
            for level in levels.iter_mut().filter(|level| **level > 0) {
                let new = i32::from(*level) + moved as i32;
                *level = new.clamp(Level::LOWEST.0.into(), Level::HIGHEST.0.into()) as u16;
            }
        }
    }
}

/// Sorts the searched keys by level, and sums them up.
fn order(head: &mut Head) {
    let mut ends = vec![0_u32; usize::from(Level::HIGHEST.0) + 2];
    for level in head.levels.iter().filter(|level| **level > 0) {
        ends[usize::from(Level::HIGHEST.0 - level) + 1] += 1;
        head.rest += f64::from(Level(*level).weight());
    }
    for at in 1..ends.len() {
        ends[at] += ends[at - 1];
    }
    head.order.resize(ends.last().map_or(0, |end| *end as usize), 0);
    for (slot, level) in (0..).zip(&head.levels).filter(|(_, level)| **level > 0) {
        let at = &mut ends[usize::from(Level::HIGHEST.0 - level)];
        head.order[*at as usize] = slot;
        *at += 1;
    }
    let best = head.order.first().map_or(0, |slot| head.levels[*slot as usize]);
    head.unsure |= Table::is_at_an_end(best);
}
