//! The scan in plain code: what the others must equal.

use super::{Call, Found, GROUP, HIGHEST, LOWEST, Level, Map, Places, RUN_GROUPS, SLOTS};

/// Levels of one group for one head.
fn group(call: &Call<'_>, head: usize, group: usize) -> [u16; GROUP] {
    let map = Map::new(call.heads[head], call.keys.steps[group]);
    let lanes = &call.lanes[head * call.lines * 2..][..call.lines * 2];
    let codes = &call.keys.codes[group * call.stride..][..call.lines];
    let mut levels = [0; GROUP];
    for (slot, key) in SLOTS.into_iter().enumerate() {
        let mut product = call.heads[head].start as i16;
        for (line, lanes) in codes.iter().zip(lanes.chunks_exact(2)) {
            for i in 0..4 {
                let code = line.0[slot * 4 + i];
                product += i16::from(code & 15) * i16::from(lanes[0].0[i]);
                product += i16::from(code >> 4) * i16::from(lanes[1].0[i]);
            }
        }
        let product = (i32::from(product) << map.doubled).clamp(i16::MIN.into(), i16::MAX.into());
        let scaled = (((product * i32::from(map.factor)) >> 14) + 1) >> 1;
        let level = (scaled as i16).saturating_add(map.offset).clamp(LOWEST, HIGHEST);
        if (call.keys.masks[group] >> key) & 1 == 1 {
            levels[key] = level as u16;
        }
    }
    levels
}

pub(super) fn levels(call: Call<'_>, out: &mut [u16], stride: usize) {
    for (head, out) in out.chunks_mut(stride).take(call.heads.len()).enumerate() {
        let groups = out.as_chunks_mut::<GROUP>().0.iter_mut().take(call.keys.masks.len());
        groups.enumerate().for_each(|(at, out)| *out = group(&call, head, at));
    }
}

pub(super) fn scan<P: Places>(call: Call<'_>, places: P, out: &mut Found<'_>) {
    for head in 0..call.heads.len() {
        for (run, first) in (0..places.len()).step_by(RUN_GROUPS).enumerate() {
            let mut sums = [[0.0_f32; 8]; 2];
            for place in first..(first + RUN_GROUPS).min(places.len()) {
                let pairs = keep(&call, head, places.group(place), out);
                if P::APART {
                    out.sums[head * out.sums_stride + place] = sum(pairs);
                }
                sums[place % 2]
                    .iter_mut()
                    .zip(pairs)
                    .for_each(|(sum, pair)| *sum += pair);
            }
            if !P::APART {
                out.sums[head * out.sums_stride + run] = sum(std::array::from_fn(|l| sums[0][l] + sums[1][l]));
            }
        }
    }
}

/// Keeps what reaches the floor in a group; weights of the others, by pairs of neighbours.
fn keep(call: &Call<'_>, head: usize, at: usize, out: &mut Found<'_>) -> [f32; 8] {
    let floor = out.floors[head].0.max(Level::LOWEST.0);
    let kept = &mut out.kept[head * out.stride..][..out.stride];
    let mut levels = group(call, head, at);
    for (key, level) in levels.iter_mut().enumerate().filter(|(_, level)| **level >= floor) {
        kept[out.counts[head]] = u32::from(*level) << 16 | (call.first + at * GROUP + key) as u32;
        out.counts[head] += 1;
        *level = 0;
    }
    std::array::from_fn(|l| Level(levels[2 * l]).weight() + Level(levels[2 * l + 1]).weight())
}

/// Pair `l` and `l + 4`, `l + 2`, `l + 1`.
fn sum(pairs: [f32; 8]) -> f32 {
    let four: [f32; 4] = std::array::from_fn(|l| pairs[l] + pairs[l + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
