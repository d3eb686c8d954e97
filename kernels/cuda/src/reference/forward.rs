//! What a forward does besides attention, in f64 and without rounding the results.

use crate::{Pairs, rows::NOISE_UNIT};

/// `x [m, k]` times every row of `w [n, k]`: `[m, n]`.
pub fn linear(x: &[f32], w: &[f32], k: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
    x.chunks_exact(k)
        .flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w)))
        .collect()
}

/// `x / sqrt(mean(x^2) + epsilon) * weight` for each row of `x`.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f64> {
    x.chunks_exact(weight.len())
        .flat_map(|row| {
            let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / row.len() as f64;
            let factor = 1.0 / (mean + f64::from(epsilon)).sqrt();
            row.iter()
                .zip(weight)
                .map(move |(&x, &w)| f64::from(x) * factor * f64::from(w))
        })
        .collect()
}

/// `silu(gate) * up` for each row of `gate_up [rows, 2, inner]`.
pub fn silu_mul(gate_up: &[f32], inner: usize) -> Vec<f64> {
    gate_up
        .chunks_exact(2 * inner)
        .flat_map(|row| {
            let (gate, up) = row.split_at(inner);
            gate.iter().zip(up).map(|(&gate, &up)| {
                let gate = f64::from(gate);
                gate / (1.0 + (-gate).exp()) * f64::from(up)
            })
        })
        .collect()
}

/// Turns the first `dims` elements of a head at `position`.
pub fn rope(head: &[f32], position: usize, dims: usize, theta: f32, pairs: Pairs) -> Vec<f64> {
    let mut out: Vec<f64> = head.iter().map(|&x| f64::from(x)).collect();
    for i in 0..dims / 2 {
        let rate = f64::from(theta).powf(-2.0 * i as f64 / dims as f64);
        let (sin, cos) = (position as f64 * rate).sin_cos();
        let (first, second) = match pairs {
            Pairs::Interleaved => (2 * i, 2 * i + 1),
            Pairs::Halves => (i, i + dims / 2),
        };
        let (a, b) = (f64::from(head[first]), f64::from(head[second]));
        out[first] = a * cos - b * sin;
        out[second] = a * sin + b * cos;
    }
    out
}

/// Numbers spread evenly between `-most` and `most` that depend on the seed and their place alone, before they are rounded; `len`
/// is even. Mixed as in splitmix64.
pub fn noise(len: usize, seed: u64, most: f32) -> Vec<f32> {
    (0..len as u64 / 2)
        .flat_map(|i| {
            let mut x = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^= x >> 31;
            [x as u32, (x >> 32) as u32].map(|half| half.cast_signed() as f32 * (most * NOISE_UNIT))
        })
        .collect()
}
