//! What a sample of coded keys says of one query: levels of the keys beside those of the centroids that stand for them. Sixteen keys at
//! a time.

use crate::{
    coded::{GROUP, Level},
    isa::{Isa, dispatched},
    lanes::Lanes,
};

/// Sums over keys; above is the score over that of what stands for the key, in powers of two.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// Of squares of what keys are above.
    pub squares: f64,
    /// Of weights of keys below the floor.
    pub weights: f64,
    /// Of those times what they are above.
    pub moments: f64,
}

/// Appends how far below it, or below `floor` where the key is above that, the centroid lies of each key from `from` on.
///
/// # Panics
/// If there are not as many centroids as keys.
pub fn gaps(levels: &[[u16; GROUP]], centroids: &[[u16; GROUP]], from: Level, floor: Level, out: &mut Vec<u16>) {
    assert_eq!(levels.len(), centroids.len(), "gaps: a centroid for each key");
    for (levels, centroids) in levels.iter().zip(centroids) {
        // Few are: mostly none of sixteen.
        let mut bits = (0..GROUP).fold(0_u32, |bits, i| bits | u32::from(levels[i] >= from.0) << i);
        while bits != 0 {
            let at = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            out.push(levels[at].min(floor.0).saturating_sub(centroids[at]));
        }
    }
}

/// Sums of the weights of searched keys whose centroid lies below `from`, and of what they would weigh as their centroids.
///
/// # Panics
/// If there are not as many centroids as keys.
pub fn weights_beside(levels: &[[u16; GROUP]], centroids: &[[u16; GROUP]], from: u16) -> (f64, f64) {
    assert_eq!(levels.len(), centroids.len(), "weights_beside: a centroid for each key");
    weights_beside_on(Isa::active(), levels, centroids, from)
}

dispatched!(pub(crate) fn weights_beside_on(levels: &[[u16; GROUP]], centroids: &[[u16; GROUP]], from: u16) -> (f64, f64) = weights_beside_in);
#[inline(always)]
fn weights_beside_in<L: Lanes>(_l: L, levels: &[[u16; GROUP]], centroids: &[[u16; GROUP]], from: u16) -> (f64, f64) {
    let (mut exact, mut by_centroid) = ([0.0_f32; GROUP], [0.0_f32; GROUP]);
    for (levels, centroids) in levels.iter().zip(centroids) {
        for i in 0..GROUP {
            let counts = (levels[i] > 0) & (centroids[i] < from);
            exact[i] += if counts { Level(levels[i]).weight() } else { 0.0 };
            by_centroid[i] += if counts { Level(centroids[i]).weight() } else { 0.0 };
        }
    }
    (sum(&exact), sum(&by_centroid))
}

/// How searched keys lie about what stands for them, whose levels are `centres`.
///
/// # Panics
/// If there are not as many centres as keys.
pub fn spread(levels: &[[u16; GROUP]], centres: &[[u16; GROUP]], floor: Level) -> Spread {
    assert_eq!(levels.len(), centres.len(), "spread: a centre for each key");
    spread_on(Isa::active(), levels, centres, floor.0)
}

dispatched!(pub(crate) fn spread_on(levels: &[[u16; GROUP]], centres: &[[u16; GROUP]], floor: u16) -> Spread = spread_in);
#[inline(always)]
fn spread_in<L: Lanes>(_l: L, levels: &[[u16; GROUP]], centres: &[[u16; GROUP]], floor: u16) -> Spread {
    let (mut squares, mut weights, mut moments) = ([0.0_f32; GROUP], [0.0_f32; GROUP], [0.0_f32; GROUP]);
    for (levels, centres) in levels.iter().zip(centres) {
        for i in 0..GROUP {
            let above = (i32::from(levels[i]) - i32::from(centres[i])) as f32 * (1.0 / 128.0);
            let above = if levels[i] > 0 { above } else { 0.0 };
            let weight = if levels[i] < floor {
                Level(levels[i]).weight()
            } else {
                0.0
            };
            squares[i] += above * above;
            weights[i] += weight;
            moments[i] += weight * above;
        }
    }
    Spread {
        squares: sum(&squares),
        weights: sum(&weights),
        moments: sum(&moments),
    }
}

fn sum(lanes: &[f32; GROUP]) -> f64 {
    lanes.iter().map(|x| f64::from(*x)).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Levels of keys, of which some are not searched.
    fn levels() -> impl Strategy<Value = [u16; GROUP]> {
        prop::array::uniform16(prop_oneof![8 => 6000_u16..10_000, 1 => Just(0)])
    }

    proptest! {
        #[test]
        fn sums_are_those_of_each_key(
            keys in prop::collection::vec((levels(), prop::array::uniform16(6000_u16..10_000)), 0..30),
            from in 6000_u16..10_000,
            floor in 6000_u16..10_000,
        ) {
            let (levels, others): (Vec<_>, Vec<_>) = keys.into_iter().unzip();
            let each: Vec<(u16, u16)> = levels.as_flattened().iter().copied().zip(others.as_flattened().iter().copied()).collect();
            let searched = || each.iter().filter(|(level, _)| *level > 0);
            let weight = |level: u16| f64::from(Level(level).weight());
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-4 * b.abs() + 1e-30;
            let above = |(level, centre): &(u16, u16)| f64::from(Level(*level).above_average() - Level(*centre).above_average());
            let below = || searched().filter(|(level, _)| *level < floor);
            for isa in Isa::available() {
                let (exact, by_centroid) = weights_beside_on(isa, &levels, &others, from);
                let counted = || searched().filter(|(_, centroid)| *centroid < from);
                prop_assert!(close(exact, counted().map(|(level, _)| weight(*level)).sum()));
                prop_assert!(close(by_centroid, counted().map(|(_, centroid)| weight(*centroid)).sum()));
                let found = spread_on(isa, &levels, &others, floor);
                prop_assert_eq!(found, spread_on(Isa::Scalar, &levels, &others, floor));
                prop_assert!(close(found.squares, searched().map(|key| above(key).powi(2)).sum()));
                prop_assert!(close(found.weights, below().map(|(level, _)| weight(*level)).sum()));
                let size: f64 = below().map(|key| weight(key.0) * above(key).abs()).sum();
                let moments: f64 = below().map(|key| weight(key.0) * above(key)).sum();
                prop_assert!((found.moments - moments).abs() <= 1e-4 * size + 1e-30);
            }
            let mut found = vec![1];
            gaps(&levels, &others, Level(from), Level(floor), &mut found);
            let expected: Vec<u16> = each.iter().filter(|(level, _)| *level >= from)
                .map(|(level, centroid)| (*level).min(floor).saturating_sub(*centroid)).collect();
            prop_assert_eq!(&found[1..], &expected);
        }
    }
}
