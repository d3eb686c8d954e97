//! The scan in plain code: what the others must equal.

use super::{Call, GROUP, HIGHEST, LOWEST, Map, SLOTS};

pub(super) fn strip(call: Call<'_>, levels: &mut [u16], stride: usize, sums: &mut [f32], sums_stride: usize) {
    let group_bytes = call.lines * 64;
    for (head, weights) in call.heads.iter().enumerate() {
        let map = Map::new(*weights, call.keys.step);
        let lanes = &call.lanes[head * call.lines * 2..][..call.lines * 2];
        for first in (0..call.groups).step_by(call.run) {
            let mut sum = [0.0_f32; 8];
            for group in first..(first + call.run).min(call.groups) {
                let codes = &call.keys.codes[group * group_bytes..][..group_bytes];
                let out = &mut levels[head * stride + group * GROUP..][..GROUP];
                for (slot, key) in SLOTS.into_iter().enumerate() {
                    let mut product = 0_i16;
                    for (line, lanes) in codes.chunks_exact(64).zip(lanes.chunks_exact(2)) {
                        for i in 0..4 {
                            let code = line[slot * 4 + i];
                            product += i16::from(code & 15) * i16::from(lanes[0].0[i]);
                            product += i16::from(code >> 4) * i16::from(lanes[1].0[i]);
                        }
                    }
                    let scaled = (((i32::from(product) * i32::from(map.factor)) >> 14) + 1) >> 1;
                    let level = (scaled as i16).saturating_add(map.offset).clamp(LOWEST, HIGHEST);
                    let searched = call.keys.mask.is_none_or(|mask| (mask[group] >> key) & 1 == 1);
                    out[key] = if searched { level as u16 } else { 0 };
                }
                for (sum, pair) in sum.iter_mut().zip(out.chunks_exact(2)) {
                    let weight = |level: u16| f32::from_bits(u32::from(level) << 16);
                    *sum += weight(pair[0]) + weight(pair[1]);
                }
            }
            let four: [f32; 4] = std::array::from_fn(|l| sum[l] + sum[l + 4]);
            sums[head * sums_stride + first / call.run] = (four[0] + four[2]) + (four[1] + four[3]);
        }
    }
}
