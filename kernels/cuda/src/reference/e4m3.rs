//! OCP 8-bit floating point, e4m3: sign, four exponent bits (bias 7), three mantissa bits; no infinity, NaN is `0x7f`.

/// The largest number.
const MAX: f32 = 448.0;
/// Rows whose magnitudes are all below this become zeros: the inverse of their scale would not be finite.
const SMALLEST: f32 = 1e-30;

/// The nearest e4m3 number, ties to even, saturating at 448; NaN stays NaN.
pub fn e4m3_from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return 0x7f;
    }
    // Numbers in [2^e, 2^(e+1)) are multiples of 2^(e-3); below 2^-6 of 2^-9.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f64::from(exponent - 3).exp2();
    let rounded = ((f64::from(magnitude) / step).round_ties_even() * step).min(f64::from(MAX));
    // Positive e4m3 numbers are in the order of their codes.
    let code = (0..=0x7e_u8)
        .find(|&code| f64::from(e4m3_to_f32(code)) >= rounded)
        .unwrap_or(0x7e);
    sign | code
}

/// The number that a code stands for.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * (-9f32).exp2(),
        _ => (8.0 + mantissa) * ((exponent - 10) as f32).exp2(),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// A row as e4m3 codes and the scale that they are multiplied by.
pub fn quantize(row: &[f32]) -> (Vec<u8>, f32) {
    let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let (scale, inverse) = if most < SMALLEST {
        (1.0, 1.0)
    } else {
        (most / MAX, MAX / most)
    };
    (row.iter().map(|x| e4m3_from_f32(x * inverse)).collect(), scale)
}

/// The row that codes and a scale stand for.
pub fn dequantize(codes: &[u8], scale: f32) -> Vec<f32> {
    codes.iter().map(|&code| e4m3_to_f32(code) * scale).collect()
}
