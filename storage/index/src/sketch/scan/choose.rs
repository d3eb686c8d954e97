//! The fewest best of a head's candidates for a wanted mass.
//!
//! Weights are powers of two of scores, made once for all that follows. Their leading bits (exponent and three of the
//! mantissa) are a histogram's bucket, so one pass finds the bucket where the mass is reached. Its members are divided once
//! more, and only those of the last part are sorted.

/// Bits of a weight that its bucket leaves out.
const SHIFT: u32 = 20;
/// Bits that divide a bucket.
const FINE: u32 = 7;
/// Weights are at most 1.
const BUCKETS: usize = (0x3f80_0000 >> SHIFT) + 1;

#[derive(Debug, Default)]
pub(super) struct Choice {
    /// What was chosen, rising.
    pub(super) picked: Vec<u32>,
    /// Mass of what was chosen, in the unit of the weights.
    pub(super) mass: f64,
    /// Nothing that could be chosen was not.
    pub(super) all: bool,
    members: Vec<u32>,
    last: Vec<u32>,
}

impl Choice {
    /// Chooses the fewest best whose weights reach `wanted`, at most `k_max`; all if they do not reach it. Answers whether
    /// `k_max` stopped it before that. Scores of -inf are not chosen; ties go to the lower index. `weights[i]` is
    /// `2^(scores[i] - highest)`.
    pub(super) fn fewest(&mut self, scores: &[f32], weights: &[f32], wanted: f64, k_max: usize) -> bool {
        self.picked.clear();
        self.mass = 0.0;
        let bucket = |weight: f32| ((weight.to_bits() >> SHIFT) as usize).min(BUCKETS - 1);
        let (mut mass, mut counts) = ([0.0_f64; BUCKETS], [0_u32; BUCKETS]);
        let mut none = 0;
        for (score, weight) in scores.iter().zip(weights) {
            let at = bucket(*weight);
            mass[at] += f64::from(*weight);
            counts[at] += 1;
            none += u32::from(*score == f32::NEG_INFINITY);
        }
        counts[0] -= none;
        let (mut left, mut edge) = (k_max, BUCKETS);
        for at in (0..BUCKETS).rev().filter(|at| counts[*at] > 0) {
            if self.mass + mass[at] >= wanted || counts[at] as usize > left {
                break;
            }
            edge = at;
            self.mass += mass[at];
            left -= counts[at] as usize;
        }
        // Whole buckets from `edge` on; of the next one below it as many as are still wanted, first by bits more.
        let last = (0..edge).rev().find(|at| counts[*at] > 0);
        self.last.clear();
        let mut fine = (edge as u32) << FINE;
        if let Some(last) = last.filter(|_| self.mass < wanted && left > 0) {
            let finite = |at: &u32| bucket(weights[*at as usize]) == last && scores[*at as usize] > f32::NEG_INFINITY;
            self.members.clear();
            self.members.extend((0..scores.len() as u32).filter(finite));
            fine = ((last as u32) << FINE) + self.refine(scores, weights, wanted, left);
        }
        // Written whether chosen or not: which are is not for a processor to guess.
        self.picked.resize(scores.len(), 0);
        let mut more = self.last.iter().copied();
        let (mut next, mut count) = (more.next(), 0);
        for (at, (score, weight)) in (0..).zip(scores.iter().zip(weights)) {
            self.picked[count] = at;
            let better = (weight.to_bits() >> (SHIFT - FINE) >= fine) & (*score > f32::NEG_INFINITY);
            let last = next == Some(at);
            if last {
                next = more.next();
            }
            count += usize::from(better | last);
        }
        self.picked.truncate(count);
        self.all = self.picked.len() + none as usize == scores.len();
        self.mass < wanted && !self.all
    }

    /// Of the members of one bucket the fewest best that reach `wanted`, at most `left`: all parts from the one answered on,
    /// and `last`, rising, of the part before it.
    fn refine(&mut self, scores: &[f32], weights: &[f32], wanted: f64, mut left: usize) -> u32 {
        const PARTS: usize = 1 << FINE;
        let part = |at: &u32| (weights[*at as usize].to_bits() >> (SHIFT - FINE)) as usize % PARTS;
        let (mut mass, mut counts) = ([0.0_f64; PARTS], [0_usize; PARTS]);
        for at in &self.members {
            mass[part(at)] += f64::from(weights[*at as usize]);
            counts[part(at)] += 1;
        }
        let mut edge = PARTS;
        while edge > 0 && self.mass + mass[edge - 1] < wanted && counts[edge - 1] <= left {
            edge -= 1;
            self.mass += mass[edge];
            left -= counts[edge];
        }
        if edge > 0 {
            self.last.extend(self.members.iter().filter(|at| part(at) == edge - 1));
            let better = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
            self.last.sort_unstable_by(better);
            let mut count = 0;
            while count < left.min(self.last.len()) && self.mass < wanted {
                self.mass += f64::from(weights[self.last[count] as usize]);
                count += 1;
            }
            self.last.truncate(count);
            self.last.sort_unstable();
        }
        edge as u32
    }
}

#[cfg(test)]
mod tests {
    use kvasir_simd::exp2_weights;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn as_a_full_sort(
            scores in prop::collection::vec(prop_oneof![-8..8_i16, -1000..1000_i16, Just(i16::MIN)], 0..300),
            share in prop_oneof![0.0..1.0_f64, Just(0.0), Just(f64::INFINITY)],
            k_max in prop_oneof![0..310_usize, Just(usize::MAX)],
        ) {
            let score = |s: i16| if s == i16::MIN { f32::NEG_INFINITY } else { f32::from(s) / 3.0 };
            let scores: Vec<f32> = scores.into_iter().map(score).collect();
            let mut weights = vec![0.0; scores.len()];
            exp2_weights(&scores, &mut weights);
            let wanted = share * weights.iter().map(|weight| f64::from(*weight)).sum::<f64>();
            let wanted = if wanted.is_nan() { f64::INFINITY } else { wanted };
            let mut order: Vec<u32> = (0..scores.len() as u32).filter(|at| scores[*at as usize] > f32::NEG_INFINITY).collect();
            order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
            let mut mass = 0.0;
            let weight = |at: &u32| f64::from(weights[*at as usize]);
            // Sums in another order round otherwise: shares that are met to the last bit are left out.
            let near = |mass: f64| (mass - wanted).abs() < 1e-12 * wanted;
            let mut sums = order.iter().scan(0.0, |sum, at| { *sum += weight(at); Some(*sum) });
            prop_assume!(!sums.any(near) || wanted == f64::INFINITY);
            let mut expected: Vec<u32> = order.iter().copied().take_while(|at| {
                let more = mass < wanted;
                mass += weight(at);
                more
            }).collect();
            let cut = expected.len() > k_max;
            expected.truncate(k_max);
            expected.sort_unstable();
            let mut choice = Choice::default();
            prop_assert_eq!(choice.fewest(&scores, &weights, wanted, k_max), cut);
            prop_assert_eq!(&choice.picked, &expected);
            let mass: f64 = expected.iter().map(weight).sum();
            prop_assert!((choice.mass - mass).abs() <= 1e-9 * mass);
        }
    }
}
