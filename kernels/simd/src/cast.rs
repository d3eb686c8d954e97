//! Stored bytes seen as halves, without a copy.

use std::borrow::Cow;

use half::f16;

/// `bytes`, little-endian, as halves where they lie; `None` where they are not aligned to two bytes, are of odd number, or
/// the machine is big-endian: then copy them through [`f16::from_le_bytes`].
pub fn cast_f16(bytes: &[u8]) -> Option<&[f16]> {
    if cfg!(target_endian = "big") {
        return None;
    }
    // SAFETY: f16 is a transparent u16: every bit pattern is one, and align_to keeps alignment and bounds itself.
    let (before, halves, after) = unsafe { bytes.align_to::<f16>() };
    (before.is_empty() && after.is_empty()).then_some(halves)
}

/// `bytes`, little-endian, as halves: where they lie if [`cast_f16`] can, else copied. A last odd byte is left out.
pub fn read_f16(bytes: &[u8]) -> Cow<'_, [f16]> {
    let (pairs, _) = bytes.as_chunks::<2>();
    match cast_f16(&bytes[..2 * pairs.len()]) {
        Some(halves) => Cow::Borrowed(halves),
        None => Cow::Owned(pairs.iter().map(|&pair| f16::from_le_bytes(pair)).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_address_reads_the_same() {
        let bytes: Vec<u8> = (0..64).collect();
        for start in 0..4 {
            for len in [0, 1, 2, 31, 58] {
                let part = &bytes[start..start + len];
                let expected: Vec<u16> = part
                    .chunks_exact(2)
                    .map(|two| u16::from_le_bytes([two[0], two[1]]))
                    .collect();
                let found = read_f16(part);
                assert_eq!(
                    found.iter().map(|half| half.to_bits()).collect::<Vec<_>>(),
                    expected,
                    "{len} bytes from {start}"
                );
                let aligned = part.as_ptr().align_offset(2) == 0;
                assert_eq!(
                    matches!(found, Cow::Borrowed(_)),
                    aligned || len < 2,
                    "{len} bytes from {start}"
                );
            }
        }
    }

    #[test]
    fn whole_aligned_halves_only() {
        let values: Vec<f16> = [1.0, -2.5, 65504.0, f32::NAN].map(f16::from_f32).to_vec();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        // One of the two is aligned, whatever the allocator gave.
        let (mut shifted, mut whole) = (vec![0], bytes.clone());
        shifted.extend_from_slice(&bytes);
        whole.shrink_to_fit();
        let mut seen = 0;
        for view in [&whole[..], &shifted[1..]] {
            match cast_f16(view) {
                Some(halves) => {
                    seen += 1;
                    assert!(halves.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()) && halves.len() == 4);
                    assert_eq!(cast_f16(&view[1..]), None, "odd start");
                    assert_eq!(cast_f16(&view[..7]), None, "odd number");
                }
                None => assert_ne!(view.as_ptr().align_offset(2), 0, "aligned bytes need no copy"),
            }
        }
        assert!(seen > 0 || whole.as_ptr().align_offset(2) != 0);
        assert_eq!(cast_f16(&[]).map(<[_]>::len), Some(0));
    }
}
