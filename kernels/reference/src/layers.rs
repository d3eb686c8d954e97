//! The small steps between matrix products.

/// `x / sqrt(mean(x^2) + epsilon) * weight` of one row (Zhang & Sennrich 2019).
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f64> {
    let square: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let root = (square / x.len() as f64 + f64::from(epsilon)).sqrt();
    x.iter()
        .zip(weight)
        .map(|(&x, &weight)| f64::from(x) / root * f64::from(weight))
        .collect()
}

/// `gate / (1 + exp(-gate)) * up`.
pub fn silu_mul(gate: &[f32], up: &[f32]) -> Vec<f64> {
    let silu = |gate: f64| gate / (1.0 + (-gate).exp());
    gate.iter()
        .zip(up)
        .map(|(&gate, &up)| silu(f64::from(gate)) * f64::from(up))
        .collect()
}

/// `gelu(gate) * up`, GELU in its tanh form: `0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))`.
pub fn gelu_mul(gate: &[f32], up: &[f32]) -> Vec<f64> {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let gelu = |g: f64| 0.5 * g * (1.0 + (root * (g + 0.044_715 * g.powi(3))).tanh());
    gate.iter()
        .zip(up)
        .map(|(&gate, &up)| gelu(f64::from(gate)) * f64::from(up))
        .collect()
}

/// Rotary embedding of one row at `position` (Su et al. 2021): pair i of the first `dims` elements turns by
/// `position * theta^(-2i / dims)`. Pairs are (2i, 2i + 1) if `interleaved`, else (i, i + dims / 2).
pub fn rope(x: &[f32], dims: usize, theta: f64, position: usize, interleaved: bool) -> Vec<f64> {
    let mut out: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    for i in 0..dims / 2 {
        let (a, b) = if interleaved {
            (2 * i, 2 * i + 1)
        } else {
            (i, i + dims / 2)
        };
        let angle = position as f64 * theta.powf(-2.0 * i as f64 / dims as f64);
        let (x, y) = (out[a], out[b]);
        out[a] = x * angle.cos() - y * angle.sin();
        out[b] = x * angle.sin() + y * angle.cos();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        assert_eq!(rms_norm(&[3.0, 4.0], &[2.0, 1.0], 12.5), [6.0 / 5.0, 4.0 / 5.0]);
        assert!((silu_mul(&[3.0_f32.ln()], &[4.0])[0] - 3.0 * 3.0_f64.ln()).abs() < 1e-6);
        let gelu = gelu_mul(&[1.0, -1.0], &[2.0, 2.0]);
        assert!((gelu[0] - 1.682_383_981).abs() < 1e-9, "{gelu:?}");
        // gelu(g) - gelu(-g) is g.
        assert!((gelu[0] - gelu[1] - 2.0).abs() < 1e-12, "{gelu:?}");
        // The first pair turns by one radian per position, whatever theta is.
        let turned = rope(&[1.0, 0.0, 7.0], 2, 10_000.0, 1, true);
        assert!((turned[0] - 1.0_f64.cos()).abs() < 1e-12 && (turned[1] - 1.0_f64.sin()).abs() < 1e-12);
        assert_eq!(turned[2], 7.0);
        // Halves pair 0 with 2.
        let turned = rope(&[1.0, 0.0, 0.0, 0.0], 4, 10_000.0, 1, false);
        assert!((turned[2] - 1.0_f64.sin()).abs() < 1e-12 && turned[1] == 0.0);
    }
}
