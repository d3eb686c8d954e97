//! The first level of a scan: groups of keys, each known by the level of its centroid, are listed or weighed.

use crate::{
    coded::{GROUP, Level, RUN_GROUPS, UNIT},
    isa::{Isa, dispatched},
    lanes::Lanes,
};

/// Groups at a time: those of four runs.
const STEP: usize = 16;
const RUNS: usize = STEP / RUN_GROUPS;

/// What a first level finds.
#[derive(Debug)]
pub struct Near<'a> {
    /// Groups that are near enough, rising: each one's number in its unit of 65,536 keys. Added to what is there.
    pub list: &'a mut Vec<u32>,
    /// What searched keys of the other groups weigh by their centroid, per run.
    pub sums: &'a mut [f32],
    /// The level of a run's centroid; empty where nobody asks.
    pub centres: &'a mut [Level],
}

/// Lists the groups with a searched key whose centroid's level is at least `from`, and weighs the keys of the others: each as its
/// centroid, times `excess`. `levels` and `masks` (a bit per key that is searched) are one per group, and the first group is the
/// first of a unit.
///
/// Of sums the order is: both first groups of a run, both last, both sums.
///
/// # Panics
/// If levels and masks are not as many, or not whole segments of sixteen groups; or sums, or centres if there are any, are not one per run.
pub fn near(levels: &[u16], masks: &[u16], from: u16, excess: f32, out: &mut Near<'_>) {
    let runs = levels.len() / RUN_GROUPS;
    assert!(
        levels.len() == masks.len() && levels.len().is_multiple_of(STEP),
        "near: a level and a word of the mask per group, sixteen groups at a time"
    );
    assert!(
        out.sums.len() == runs && (out.centres.is_empty() || out.centres.len() == runs),
        "near: a sum and a centre per run"
    );
    near_on(Isa::active(), levels, masks, from, excess, out);
}

dispatched!(pub(crate) fn near_on(levels: &[u16], masks: &[u16], from: u16, excess: f32, out: &mut Near<'_>) = near_in);
#[inline(always)]
fn near_in<L: Lanes>(_l: L, levels: &[u16], masks: &[u16], from: u16, excess: f32, out: &mut Near<'_>) {
    let (levels, masks) = (levels.as_chunks::<STEP>().0, masks.as_chunks::<STEP>().0);
    let sums = out.sums.as_chunks_mut::<RUNS>().0;
    let whole = GROUP as f32 * excess;
    for (at, ((levels, masks), sums)) in levels.iter().zip(masks).zip(sums).enumerate() {
        let all = masks.iter().fold(u16::MAX, |all, mask| all & mask) == u16::MAX;
        let keys: [f32; STEP] = if all {
            [whole; STEP]
        } else {
            std::array::from_fn(|i| masks[i].count_ones() as f32 * excess)
        };
        let listed: [bool; STEP] = std::array::from_fn(|i| levels[i] >= from);
        let weights: [f32; STEP] = std::array::from_fn(|i| {
            let weight = Level(levels[i]).weight() * keys[i];
            if listed[i] { 0.0 } else { weight }
        });
        *sums = std::array::from_fn(|run| {
            let [a, b, c, d] = std::array::from_fn(|group| weights[run * RUN_GROUPS + group]);
            (a + b) + (c + d)
        });
        let mut bits = (0..STEP).fold(0_u32, |bits, i| bits | u32::from(listed[i]) << i);
        while bits != 0 {
            let group = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            if masks[group] != 0 {
                out.list.push(((at * STEP + group) % (UNIT / GROUP)) as u32);
            }
        }
    }
    for (levels, centres) in levels.iter().zip(out.centres.as_chunks_mut::<RUNS>().0) {
        *centres = std::array::from_fn(|run| {
            let own = &levels[run * RUN_GROUPS..(run + 1) * RUN_GROUPS];
            Level((own.iter().map(|level| u32::from(*level)).sum::<u32>() / RUN_GROUPS as u32) as u16)
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn listed_or_weighed(
            groups in prop::collection::vec((128_u16..20_000, prop_oneof![Just(u16::MAX), Just(0), any::<u16>()]), 0..300),
            from in prop_oneof![Just(0_u16), 128..20_000_u16, Just(u16::MAX)],
            centred in any::<bool>(),
        ) {
            let groups = &groups[..groups.len() / STEP * STEP];
            let (levels, masks): (Vec<u16>, Vec<u16>) = groups.iter().copied().unzip();
            let runs = levels.len() / RUN_GROUPS;
            let (mut list, mut sums, mut centres) = (vec![7], vec![-1.0; runs], vec![Level(0); if centred { runs } else { 0 }]);
            for isa in Isa::available() {
                list.truncate(1);
                let mut out = Near { list: &mut list, sums: &mut sums, centres: &mut centres };
                near_on(isa, &levels, &masks, from, 1.5, &mut out);
                let near = |at: &usize| levels[*at] >= from && masks[*at] != 0;
                let expected: Vec<u32> = (0..groups.len()).filter(near).map(|at| at as u32).collect();
                prop_assert_eq!(&list[1..], &expected);
                for run in 0..runs {
                    let own = run * RUN_GROUPS..(run + 1) * RUN_GROUPS;
                    let weight = |at: usize| {
                        let keys = masks[at].count_ones() as f32 * 1.5;
                        if levels[at] >= from { 0.0 } else { Level(levels[at]).weight() * keys }
                    };
                    let [a, b, c, d] = std::array::from_fn(|group| weight(own.start + group));
                    prop_assert_eq!(sums[run].to_bits(), ((a + b) + (c + d)).to_bits(), "{:?}", isa);
                    if centred {
                        let sum: u32 = levels[own].iter().map(|level| u32::from(*level)).sum();
                        prop_assert_eq!(centres[run], Level((sum / 4) as u16));
                    }
                }
            }
        }
    }
}
