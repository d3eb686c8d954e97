//! Which codes are read before rows are.
//!
//! Another line of digits of sixteen keys costs 64 bytes and may save rows: of keys that would be read and are then seen to be light.
//! With `m` a key's weight by what was read, in units of the weight from which on keys are read, and the weight itself log-normal about it, as far
//! as it depends on the line's digits, knowing it is worth `E[max(0, w - 1)] - max(0, m - 1)` rows: the price of an option on a
//! share (Black and Scholes 1973) less what it is worth today. So heads that spread their mass read few codes, and keys that are surely read or
//! surely not read none.

use std::f64::consts::{FRAC_1_SQRT_2, LN_2, PI};

use kvasir_simd::{GROUP, Level, coded_levels};

use crate::{
    bits::Bits,
    sketch::{
        column::Column,
        format::SketchFormat,
        search::{Kind, Table},
    },
};

/// Parts of a key's digits.
const QUARTERS: usize = 4;
/// How many are read in steps.
const STEPS: [usize; 3] = [1, 2, QUARTERS];
/// Levels between prices that are computed, and from the threshold to where knowing more is worth nothing.
const SPACING: i32 = 16;
const REACH: i32 = 16 * 128;

/// What sketches say of all keys for a head.
pub(super) struct Levels {
    /// By slot; 0 of a key that is not searched.
    pub(super) levels: Vec<u16>,
    /// They do not tell keys apart.
    pub(super) unsure: bool,
}

/// Levels of each head, by as many codes as are worth it where the best keys with `mass` of the mass are read; and how many bytes of
/// codes they took. `words` has a mask of the searched keys of each group.
pub(super) fn levels(mass: f64, table: &Table, column: &Column, words: &[u16]) -> (Vec<Levels>, usize) {
    let (format, groups) = (column.format(), column.groups());
    let lines = |part: usize| part * column.lines() / QUARTERS;
    let first = table.leading(format, lines(STEPS[0]));
    let keys = column.coded(0..groups, words);
    let mut heads: Vec<Levels> = (0..table.heads())
        .map(|head| {
            let mut levels = vec![0; groups * GROUP];
            coded_levels(&first, head..head + 1, keys, &mut levels, groups * GROUP);
            Levels {
                levels,
                unsure: table.kinds[head] != Kind::Sketched || !table.fits(head, column),
            }
        })
        .collect();
    let mut read = vec![STEPS[0]; groups];
    let (line, row) = (column.coded_bytes() / groups / column.lines(), 2 * format.head_dim);
    for step in STEPS.windows(2) {
        let (before, after) = (lines(step[0]), lines(step[1]));
        let prices: Vec<Prices> = (0..heads.len())
            .map(|head| {
                let unknown = variance(table, format, head, column.lines()) - variance(table, format, head, before);
                Prices::new(&heads[head].levels, mass, unknown.max(0.0).sqrt())
            })
            .collect();
        let cost = ((after - before) * line) as f64 / row as f64;
        let mut chosen = Bits::default();
        chosen.reset(groups);
        (0..groups)
            .filter(|group| read[*group] == step[0] && worth(&heads, &prices, *group) > cost)
            .for_each(|group| chosen.insert(group as u32));
        let queries = table.leading(format, after);
        for (at, head) in heads.iter_mut().enumerate() {
            head.unsure |= !queries.fits(at, column.step_max());
            refine(&mut head.levels, &chosen, |group, levels| {
                let keys = column.coded(group..group + 1, words);
                coded_levels(&queries, at..at + 1, keys, levels, GROUP);
            });
        }
        chosen.iter().for_each(|group| read[group as usize] = step[1]);
    }
    (heads, read.into_iter().map(lines).sum::<usize>() * line)
}

/// Of a head's scores, in powers of two, as far as the leading lines of keys say them: coordinates of keys have unit spread.
fn variance(table: &Table, format: SketchFormat, head: usize, lines: usize) -> f64 {
    let mut digits = Vec::new();
    format.weigh_digits(table.along(head), &mut digits);
    let leading = format.leading_digits(&digits, lines);
    leading.iter().map(|weight| f64::from(*weight).powi(2)).sum()
}

/// Rows that knowing more of a group saves: each of its keys is read or not by the head that wants it most.
fn worth(heads: &[Levels], prices: &[Prices], group: usize) -> f64 {
    let slots = group * GROUP..(group + 1) * GROUP;
    slots
        .filter_map(|slot| {
            let searched = heads.iter().zip(prices).filter(|(head, _)| head.levels[slot] > 0);
            let above = searched.map(|(head, prices)| (i32::from(head.levels[slot]) - prices.threshold, prices));
            above.max_by_key(|(above, _)| *above)
        })
        .map(|(above, prices)| prices.of(above))
        .sum()
}

/// What knowing the weight of a key better is worth, by its level.
struct Prices {
    /// From this level on keys are read.
    threshold: i32,
    /// Rows, at every [`SPACING`] levels from [`REACH`] below the threshold on.
    rows: Vec<f64>,
}

impl Prices {
    /// For keys of these `levels`, of which the best with `mass` of their weight are read; what is not known of a score is `spread` powers of
    /// two wide, a standard deviation.
    fn new(levels: &[u16], mass: f64, spread: f64) -> Self {
        let mut weights = vec![0.0; usize::from(Level::HIGHEST.0) + 1];
        for level in levels.iter().filter(|level| **level > 0) {
            weights[usize::from(*level)] += f64::from(Level(*level).weight());
        }
        let sought = mass * weights.iter().sum::<f64>();
        let (mut found, mut threshold) = (0.0, weights.len() as i32);
        for weight in weights.iter().rev() {
            if found >= sought {
                break;
            }
            found += weight;
            threshold -= 1;
        }
        let spread = (spread * LN_2).max(1e-3);
        let price = |at: i32| {
            let above = f64::from(at * SPACING) / 128.0 * LN_2;
            let upper = above / spread + spread / 2.0;
            above.exp() * normal(upper) - normal(upper - spread) - (above.exp() - 1.0).max(0.0)
        };
        Self {
            threshold,
            rows: (-REACH / SPACING..REACH / SPACING).map(price).collect(),
        }
    }

    /// Rows, for a key whose level is so much above the threshold.
    fn of(&self, above: i32) -> f64 {
        let at = usize::try_from((above + REACH).div_euclid(SPACING)).ok();
        at.and_then(|at| self.rows.get(at)).map_or(0.0, |rows| *rows)
    }
}

/// How much of a normal variable of unit variance lies below `x`, to 1e-7 (Abramowitz and Stegun 1964, 26.2.17).
fn normal(x: f64) -> f64 {
    const POWERS: [f64; 5] = [
        1.330_274_429,
        -1.821_255_978,
        1.781_477_937,
        -0.356_563_782,
        0.319_381_530,
    ];
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let density = (-x * x / 2.0).exp() * FRAC_1_SQRT_2 / PI.sqrt();
    let beyond = density * POWERS.iter().fold(0.0, |sum, power| sum * t + power) * t;
    if x > 0.0 { 1.0 - beyond } else { beyond }
}

/// Levels of the groups `chosen` anew; those of others are moved by what that changes in the mean.
fn refine(all: &mut [u16], chosen: &Bits, levels_of: impl Fn(usize, &mut [u16])) {
    let (mut before, mut after) = (0.0_f64, 0.0_f64);
    let mut levels = [0; GROUP];
    for group in chosen.iter() {
        let group = group as usize;
        levels_of(group, &mut levels);
        for (old, new) in all[group * GROUP..].iter_mut().zip(&levels) {
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
    for (group, levels) in (0..).zip(all.chunks_mut(GROUP)) {
        if !chosen.contains(group) {
            for level in levels.iter_mut().filter(|level| **level > 0) {
                let new = i32::from(*level) + moved as i32;
                *level = new.clamp(Level::LOWEST.0.into(), Level::HIGHEST.0.into()) as u16;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the sum over the distribution itself.
    #[test]
    fn prices_are_what_knowing_is_worth() {
        for spread in [0.3_f64, 1.0, 3.0] {
            let prices = Prices::new(&[Level::LOWEST.0, 5000], 0.9, spread);
            assert_eq!(prices.threshold, 5000);
            let deviation = spread * LN_2;
            for above in [-512, -128, 0, 128, 512] {
                let mean = (f64::from(above) / 128.0).exp2();
                let (mut knowing, mut density) = (0.0, 0.0);
                for at in -8000..=8000 {
                    let x = f64::from(at) / 1000.0;
                    let weight = (-x * x / 2.0).exp();
                    knowing += weight * (mean * (deviation * x - deviation * deviation / 2.0).exp() - 1.0).max(0.0);
                    density += weight;
                }
                let worth = knowing / density - (mean - 1.0).max(0.0);
                assert!((prices.of(above) - worth).abs() < 1e-5, "{spread} {above}: {worth}");
            }
            assert_eq!((prices.of(-REACH - 1), prices.of(REACH)), (0.0, 0.0));
        }
    }

    #[test]
    fn what_is_known_is_worth_nothing() {
        let prices = Prices::new(&[4000, 5000, 0], 0.9, 0.0);
        assert!((-REACH..REACH).all(|above| prices.of(above).abs() < 1e-3));
    }

    #[test]
    fn groups_are_refined_and_the_others_follow() {
        let mut levels = vec![5000_u16; 2 * GROUP];
        levels[GROUP] = 0;
        let mut chosen = Bits::default();
        chosen.reset(2);
        chosen.insert(0);
        refine(&mut levels, &chosen, |_, levels| levels.fill(5128));
        assert!(levels[..GROUP].iter().all(|level| *level == 5128));
        assert!(levels[GROUP] == 0 && levels[GROUP + 1..].iter().all(|level| *level == 5128));
    }
}
