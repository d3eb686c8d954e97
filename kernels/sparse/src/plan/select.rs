//! The smallest sets with a share of the mass.

/// Indices of the fewest entries of `mass` that together have at least `share` of its sum, in rising order. Entries must be
/// 0 or more; ties go to the lower index.
pub(super) fn cover(mass: &[f32], share: f32, out: &mut Vec<u32>) {
    out.clear();
    let total: f64 = mass.iter().map(|&mass| f64::from(mass)).sum();
    out.extend(0..mass.len() as u32);
    out.sort_by(|&a, &b| mass[b as usize].total_cmp(&mass[a as usize]));
    let (mut sum, mut count) = (0.0, 0);
    while count < out.len() && sum < f64::from(share) * total {
        sum += f64::from(mass[out[count] as usize]);
        count += 1;
    }
    out.truncate(count);
    out.sort_unstable();
}

/// `log2(x)` for normal `x > 0`, the same on every machine: what decides over a mask must not depend on a libm.
pub(super) fn log2(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) as i64 - 1023) as f64;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1.0;
    }
    // ln(m) = 2 atanh((m - 1) / (m + 1)), the argument below 0.172: ten terms leave 1e-16.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let (square, mut sum) = (t * t, 0.0);
    for k in (0..10).rev() {
        sum = sum * square + 1.0 / f64::from(2 * k + 1);
    }
    exponent + 2.0 * t * sum * std::f64::consts::LOG2_E
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covers_are_the_fewest() {
        // Mass, share, chosen.
        let table: [(&[f32], f32, &[u32]); 7] = [
            (&[1.0, 4.0, 2.0, 1.0], 0.5, &[1]),
            (&[1.0, 4.0, 2.0, 1.0], 0.51, &[1, 2]),
            (&[1.0, 4.0, 2.0, 1.0], 0.8, &[0, 1, 2]),
            (&[1.0, 4.0, 2.0, 1.0], 1.0, &[0, 1, 2, 3]),
            (&[0.0, 0.0], 0.9, &[]),
            (&[3.0, 0.0], 1.0, &[0]),
            (&[], 0.9, &[]),
        ];
        for (mass, share, expected) in table {
            let mut found = vec![7];
            cover(mass, share, &mut found);
            assert_eq!(found, expected, "{share} of {mass:?}");
        }
    }

    #[test]
    fn logs_are_close() {
        for x in [1.0, 2.0, 0.125, 1e-30, 0.3, 1.5, 7.7, 1e300] {
            assert!((log2(x) - x.log2()).abs() < 1e-13 * (1.0 + x.log2().abs()), "log2({x})");
        }
    }
}
