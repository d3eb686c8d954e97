//! The k largest of many scores without sorting them.

/// Indices of the `k` largest scores, ties by lower index, in rising order of index. NaN ranks below all else.
pub fn top_k(scores: &[f32], k: usize, out: &mut Vec<u32>) {
    out.clear();
    if k == 0 || scores.is_empty() {
        return;
    }
    if k >= scores.len() {
        out.extend(0..scores.len() as u32);
        return;
    }
    let (threshold, mut ties) = threshold(scores, k);
    for (index, &score) in scores.iter().enumerate() {
        let rank = rank(score);
        if rank > threshold {
            out.push(index as u32);
        } else if rank == threshold && ties > 0 {
            ties -= 1;
            out.push(index as u32);
        }
    }
}

/// The k-th largest rank, and how many scores of that rank are among the k; `0 < k < scores.len()`.
///
/// One pass counts the leading [`BIN_BITS`] bits, which finds the bin of the k-th; only its members are selected from.
fn threshold(scores: &[f32], k: usize) -> (u32, usize) {
    let mut counts = [0_usize; 1 << BIN_BITS];
    for &score in scores {
        counts[bin(rank(score))] += 1;
    }
    let mut wanted = k;
    let mut chosen = 0;
    for (index, &count) in counts.iter().enumerate().rev() {
        chosen = index;
        if wanted <= count {
            break;
        }
        wanted -= count;
    }
    let mut members = Vec::with_capacity(counts[chosen]);
    members.extend(
        scores
            .iter()
            .map(|&score| rank(score))
            .filter(|&rank| bin(rank) == chosen),
    );
    let (above, &mut threshold, _) = members.select_nth_unstable_by(wanted - 1, |a, b| b.cmp(a));
    let over = above.iter().filter(|&&rank| rank > threshold).count();
    (threshold, wanted - over)
}

/// Leading bits counted: sign, exponent and three of the mantissa.
const BIN_BITS: u32 = 12;

#[inline(always)]
fn bin(rank: u32) -> usize {
    (rank >> (32 - BIN_BITS)) as usize
}

/// An order-preserving map to u32: NaN is 0, and the two zeros are one.
#[inline(always)]
fn rank(score: f32) -> u32 {
    if score.is_nan() {
        return 0;
    }
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits }
}

#[cfg(test)]
mod tests {
    use kvasir_reference as reference;
    use proptest::prelude::*;

    use super::top_k;

    fn check(scores: &[f32], k: usize) {
        let mut out = vec![7];
        top_k(scores, k, &mut out);
        assert_eq!(out, reference::top_k(scores, k), "{k} of {scores:?}");
    }

    #[test]
    fn edges() {
        for scores in [
            &[][..],
            &[1.0],
            &[1.0, 1.0, 1.0],
            &[-0.0, 0.0, -1.0],
            &[f32::NEG_INFINITY, 3.0, f32::INFINITY],
        ] {
            for k in 0..=scores.len() + 1 {
                check(scores, k);
            }
        }
    }

    #[test]
    fn nan_ranks_last() {
        let mut out = Vec::new();
        top_k(&[f32::NAN, -1.0, f32::NEG_INFINITY], 2, &mut out);
        assert_eq!(out, [1, 2]);
    }

    proptest! {
        #[test]
        fn as_a_full_sort(scores in prop::collection::vec(-8_i8..8, 0..300), k in 0_usize..310) {
            // Few distinct values: ties at the threshold.
            check(&scores.iter().map(|&s| f32::from(s) / 3.0).collect::<Vec<_>>(), k);
        }

        #[test]
        fn as_a_full_sort_of_any(scores in prop::collection::vec(-1e30_f32..1e30, 0..300), k in 0_usize..310) {
            check(&scores, k);
        }
    }
}
