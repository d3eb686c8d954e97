//! Drawing a token, by the definition that the kernel has too: the same steps in the same arithmetic, so the same token.
//!
//! A token's weight is `exp((logit - most) / temperature)` in f32, by the polynomial below, and then a whole number of
//! 2^-42: sums of those come out the same in any order. Tokens below 2^-42 of the likeliest are never drawn.

use crate::{SampleRow, Sampled};

/// Weights are whole numbers below it; 2^18 of them fit a `u64` with room to spare.
const UNIT: u64 = 1 << 42;

/// What is drawn from `logits`, none of which is drawn if it is NaN, unless all are: then token 0 is. The likeliest token
/// (ties by lower id) where `row.temperature` is not above 0 or the largest logit not finite. Otherwise tokens come in the order
/// of falling weight (ties by lower id), cut off after the fewest that hold `row.top_p` of the weight, or, where `top_p` is not
/// between 0 and 1, in the order of ids; the first one drawn with which they hold more than `row.uniform` of the rest.
///
/// The logarithm is that of the softmax of the logits themselves; NaN where no logit is finite or one is infinite.
pub fn sample(logits: &[f32], row: &SampleRow) -> Sampled {
    let best = greedy(logits);
    let high = logits.get(best as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let is_drawn = row.temperature > 0.0 && row.temperature.is_finite() && high.is_finite();
    let token = if is_drawn { draw(logits, high, row) } else { best };
    let sum: f64 = logits
        .iter()
        .filter(|logit| !logit.is_nan())
        .map(|&logit| (f64::from(logit) - f64::from(high)).exp())
        .sum();
    let at = logits.get(token as usize).copied().unwrap_or(f32::NAN);
    Sampled {
        token,
        logprob: (f64::from(at) - f64::from(high) - sum.ln()) as f32,
    }
}

fn greedy(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.0 || (best.1.is_none() && !logit.is_nan()) {
            best = (logit, Some(id as u32));
        }
    }
    best.1.unwrap_or(0)
}

fn draw(logits: &[f32], high: f32, row: &SampleRow) -> u32 {
    let weigh = |(id, &logit): (usize, &f32)| {
        let weight = weight(logit, high, row.temperature);
        (weight.to_bits(), whole(weight), id as u32)
    };
    let mut tokens: Vec<(u32, u64, u32)> = logits
        .iter()
        .enumerate()
        .map(weigh)
        .filter(|token| token.1 > 0)
        .collect();
    let mut held: u64 = tokens.iter().map(|token| token.1).sum();
    if row.top_p > 0.0 && row.top_p < 1.0 {
        tokens.sort_by(|a, b| b.0.cmp(&a.0).then(a.2.cmp(&b.2)));
        let needed = ((f64::from(row.top_p) * held as f64).ceil() as u64).clamp(1, held);
        held = 0;
        let last = tokens.iter().position(|token| {
            held += token.1;
            held >= needed
        });
        tokens.truncate(last.map_or(0, |last| last + 1));
    }
    let mut rest = ((row.uniform * held as f64) as u64).min(held.saturating_sub(1));
    for &(_, weight, id) in &tokens {
        if rest < weight {
            return id;
        }
        rest -= weight;
    }
    0
}

fn whole(weight: f32) -> u64 {
    ((weight * UNIT as f32) as u64).min(UNIT - 1)
}

/// `exp((logit - high) / temperature)` after Cephes' `expf`, every step rounded as it stands; 0 from 2^-43 down, and for NaN.
fn weight(logit: f32, high: f32, temperature: f32) -> f32 {
    let x = (logit - high) / temperature;
    if x.is_nan() || x <= -30.0 {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut p = 1.987_569_1e-4f32;
    for factor in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, factor);
    }
    let near_one = p.mul_add(r * r, r) + 1.0;
    f32::from_bits(near_one.to_bits().wrapping_add_signed((n as i32) << 23))
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    const fn row(temperature: f32, top_p: f32, uniform: f64) -> SampleRow {
        SampleRow {
            temperature,
            top_p,
            uniform,
        }
    }

    #[test]
    fn weights_are_those_of_exp() {
        let mut rng = StdRng::seed_from_u64(3);
        for _ in 0..20_000 {
            let (high, temperature) = (rng.random_range(-20.0f32..20.0), rng.random_range(0.05f32..2.0));
            let logit = high - rng.random_range(0.0f32..30.0) * temperature;
            let exact = f64::from((logit - high) / temperature).exp();
            let found = f64::from(weight(logit, high, temperature));
            if exact > 1e-12 {
                assert!(
                    (found / exact - 1.0).abs() < 3e-7,
                    "{logit} below {high} at {temperature}"
                );
            }
        }
        assert_eq!(weight(7.5, 7.5, 0.3), 1.0);
        for never in [f32::NAN, f32::NEG_INFINITY, -1e30] {
            assert_eq!(weight(never, 0.0, 1.0), 0.0);
        }
    }

    #[test]
    fn the_likeliest_is_the_lowest_of_the_largest() {
        const INF: f32 = f32::INFINITY;
        const NAN: f32 = f32::NAN;
        let table: [(&[f32], u32); 7] = [
            (&[1.0, 3.0, 2.0], 1),
            (&[3.0, 1.0, 3.0], 0),
            (&[NAN, -5.0, NAN, -4.0], 3),
            (&[NAN, NAN], 0),
            (&[NAN, -INF, -INF], 1),
            (&[0.0, INF, INF], 1),
            (&[-0.0, 0.0], 0),
        ];
        for (logits, expected) in table {
            assert_eq!(sample(logits, &row(0.0, 1.0, 0.5)).token, expected, "{logits:?}");
        }
    }

    #[test]
    fn every_place_of_the_unit_interval_has_its_token() {
        // Probabilities 0.5, 0.25, 0.125, 0.125 in ids 2, 0, 1, 3.
        let logits = [0.25_f32, 0.125, 0.5, 0.125].map(f32::ln);
        let table: [(f32, &[(f64, u32)]); 4] = [
            (0.4, &[(0.0, 2), (0.99, 2)]),
            // The nucleus holds 0.75: two thirds are id 2's.
            (0.7, &[(0.0, 2), (0.66, 2), (0.67, 0), (0.999, 0)]),
            // All of them, likeliest first; then by id.
            (0.9999, &[(0.49, 2), (0.51, 0), (0.76, 1), (0.88, 3)]),
            (1.0, &[(0.24, 0), (0.26, 1), (0.38, 2), (0.87, 2), (0.88, 3)]),
        ];
        for (top_p, places) in table {
            for &(uniform, expected) in places {
                let found = sample(&logits, &row(1.0, top_p, uniform));
                assert_eq!(found.token, expected, "top_p {top_p} at {uniform}");
                assert!((found.logprob - logits[expected as usize]).abs() < 1e-5);
            }
        }
    }
}
