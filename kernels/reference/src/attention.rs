//! Attention over explicit sets of keys, and how partial results join.

use std::f64::consts::LOG2_E;

use half::f16;

/// Dot products `q[g, d] . keys[n, d]`, `[g, n]`, neither scaled nor in base 2.
///
/// # Panics
/// If `head_dim` is 0.
pub fn scores(q: &[f32], keys: &[f16], head_dim: usize) -> Vec<f64> {
    q.chunks_exact(head_dim)
        .flat_map(|q| keys.chunks_exact(head_dim).map(move |key| dot(q, key)))
        .collect()
}

/// Attention of one query over `(key, value)` rows: `(o[d], lse)`, lse in base 2; `(0, -inf)` without keys.
pub fn attend(q: &[f32], seen: &[(&[f16], &[f16])], scale: f32) -> (Vec<f64>, f64) {
    let scores: Vec<f64> = seen
        .iter()
        .map(|(key, _)| dot(q, key) * f64::from(scale) * LOG2_E)
        .collect();
    let lse = log_sum_exp2(&scores);
    let mut o = vec![0.0; q.len()];
    for ((_, value), score) in seen.iter().zip(&scores) {
        for (o, value) in o.iter_mut().zip(*value) {
            *o += (score - lse).exp2() * f64::from(value.to_f32());
        }
    }
    (o, lse)
}

/// Joins two partials over disjoint sets of keys.
pub fn merge(a: (&[f32], f32), b: (&[f32], f32)) -> (Vec<f64>, f64) {
    let lse = log_sum_exp2(&[f64::from(a.1), f64::from(b.1)]);
    if lse == f64::NEG_INFINITY {
        return (a.0.iter().map(|&o| f64::from(o)).collect(), lse);
    }
    let weight = |part: f32| (f64::from(part) - lse).exp2();
    let o =
        a.0.iter()
            .zip(b.0)
            .map(|(&o_a, &o_b)| f64::from(o_a) * weight(a.1) + f64::from(o_b) * weight(b.1));
    (o.collect(), lse)
}

/// Indices of the `k` largest scores, ties by lower index, in rising order of index.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    // Stable: equal scores stay in order of index. Adding 0 makes the two zeros one.
    order.sort_by(|&a, &b| (scores[b as usize] + 0.0).total_cmp(&(scores[a as usize] + 0.0)));
    order.truncate(k);
    order.sort_unstable();
    order
}

fn dot(q: &[f32], key: &[f16]) -> f64 {
    q.iter()
        .zip(key)
        .map(|(&q, key)| f64::from(q) * f64::from(key.to_f32()))
        .sum()
}

fn log_sum_exp2(scores: &[f64]) -> f64 {
    let high = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if high == f64::NEG_INFINITY {
        return high;
    }
    high + scores.iter().map(|score| (score - high).exp2()).sum::<f64>().log2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_by_hand() {
        // Scores 0 and ln(3): weights 1/4 and 3/4.
        let one = [f16::ONE];
        let values = [[f16::from_f32(8.0)], [f16::from_f32(4.0)]];
        let (o, lse) = attend(&[3.0_f32.ln()], &[(&[f16::ZERO], &values[0]), (&one, &values[1])], 1.0);
        assert!((o[0] - 5.0).abs() < 1e-6 && (lse - 2.0).abs() < 1e-6);
        assert_eq!(attend(&[1.0], &[], 1.0), (vec![0.0], f64::NEG_INFINITY));
    }

    #[test]
    fn merge_by_hand() {
        assert_eq!(merge((&[2.0], 0.0), (&[4.0], 0.0)), (vec![3.0], 1.0));
        assert_eq!(merge((&[2.0], f32::NEG_INFINITY), (&[4.0], 5.0)), (vec![4.0], 5.0));
    }

    #[test]
    fn top_k_breaks_ties_by_index() {
        assert_eq!(top_k(&[1.0, 3.0, 1.0, 3.0, 1.0], 3), [0, 1, 3]);
        assert_eq!(top_k(&[1.0], 0), [0_u32; 0]);
    }
}
