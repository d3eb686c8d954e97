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
    let mut keys: Vec<u32> = scores.iter().map(|&score| rank(score)).collect();
    let (_, &mut threshold, above) = keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
    let _ = above;
    let over = scores.iter().filter(|&&score| rank(score) > threshold).count();
    let mut ties = k - over;
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

/// An order-preserving map to u32: NaN is 0, and the two zeros are one.
#[inline(always)]
fn rank(score: f32) -> u32 {
    if score.is_nan() {
        return 0;
    }
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits }
}
