//! GGUF's block formats and products with int8 activations.

use half::f16;

/// Elements of a block.
const BLOCK: usize = 32;

/// GGUF Q4_1: blocks of d and m as f16 and 16 bytes; byte i holds element i low and element 16 + i high;
/// value = d * q + m.
pub fn dequantize_q4_1(raw: &[u8]) -> Vec<f32> {
    let mut out = Vec::new();
    for block in raw.chunks_exact(20) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        out.extend(block[4..].iter().map(|byte| f32::from(byte & 15) * d + m));
        out.extend(block[4..].iter().map(|byte| f32::from(byte >> 4) * d + m));
    }
    out
}

/// GGUF Q8_0: blocks of d as f16 and 32 int8; value = d * q.
pub fn dequantize_q8_0(raw: &[u8]) -> Vec<f32> {
    let mut out = Vec::new();
    for block in raw.chunks_exact(34) {
        let d = half_at(block, 0);
        out.extend(block[2..].iter().map(|&byte| f32::from(byte as i8) * d));
    }
    out
}

/// What int8 activations stand for: blocks of 32 with `d = max|x| / 127` and `q = round(x / d)`, ties to even.
pub fn quantize_activations(x: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    for block in x.chunks(BLOCK) {
        let high = block.iter().fold(0.0_f32, |high, x| high.max(x.abs()));
        let inverse = if high > 0.0 { 127.0 / high } else { 0.0 };
        out.extend(
            block
                .iter()
                .map(|x| f64::from((x * inverse).round_ties_even()) * f64::from(high / 127.0)),
        );
    }
    out
}

/// `out[t, r] = sum_c weights[r, c] * x[t, c]` with `x` quantised as [`quantize_activations`] does.
///
/// # Panics
/// If `cols` is 0.
pub fn quantized_matmul(weights: &[f32], rows: usize, cols: usize, x: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks_exact(cols) {
        let x = quantize_activations(x);
        for weights in weights.chunks_exact(cols).take(rows) {
            out.push(weights.iter().zip(&x).map(|(&w, x)| f64::from(w) * x).sum());
        }
    }
    out
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_by_hand() {
        // d = 1, m = -2; byte 0 holds 3 low and 15 high.
        let mut raw = vec![0x00, 0x3c, 0x00, 0xc0, 0xf3];
        raw.resize(20, 0);
        let values = dequantize_q4_1(&raw);
        assert_eq!((values[0], values[16], values[1], values.len()), (1.0, 13.0, -2.0, 32));
        // d = 0.5; the first two are -128 and 127.
        let mut raw = vec![0x00, 0x38, 0x80, 0x7f];
        raw.resize(34, 0);
        assert_eq!(dequantize_q8_0(&raw)[..3], [-64.0, 63.5, 0.0]);
    }

    #[test]
    fn activations_round_to_even() {
        let mut x = [0.0; 32];
        (x[0], x[1], x[2]) = (127.0, 2.5, 3.5);
        assert_eq!(quantize_activations(&x)[..3], [127.0, 2.0, 4.0]);
    }
}
