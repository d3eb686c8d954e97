//! Segments in which alike keys lie together, sixteen to a group, and a centroid of every group: the first level of a scan.
//!
//! RetroInfer (Chen et al. 2025, arXiv 2505.02922) clusters keys by spherical k-means in segments of 8,192. Here they are clustered
//! as queries see them and by halving (the k-d tree of Bentley 1975): a segment is cut in two along the direction in which
//! it spreads widest, its halves again, until sixteen keys are left. So clusters are groups, none is fuller than another, and
//! a segment of 1,024 takes a fraction of a millisecond. On real keys of 8,192 tokens segments of 1,024 and of all 8,192 need
//! equally many groups for the same candidates (.225 of them for .98 of the best 2 %).
//!
//! A function of the segment's sketches: nothing of it is stored.

use kvasir_simd::{GROUP, Line, RUN_GROUPS, SEGMENT, SLOTS};

use super::format::{LINES_MAX, RANK, SketchFormat};

/// Groups of a segment.
pub(super) const SEGMENT_GROUPS: usize = SEGMENT / GROUP;
/// Directions that a segment may be cut along; those behind them matter too little.
const CUT: usize = 16;
/// How much less a direction matters than those before it: with a power of 1, or with what queries of the text weigh it by, as many groups
/// are needed.
const FALL: f32 = -0.7;

/// Samples of a segment: a group of sixteen keys each, of every so many groups one. In four of them each group has a key, in all of them
/// four.
pub(super) const SAMPLES: usize = 4 * RUN_GROUPS;

/// Group in its segment, and key in that, of key `at` of a sample: of run `at` the group of that number.
pub(super) const fn sampled(sample: usize, at: usize) -> (usize, usize) {
    let group = at * RUN_GROUPS + sample % RUN_GROUPS;
    (group, (group * 5 + 3 + sample / RUN_GROUPS * 4) % GROUP)
}

/// What becomes of a segment's sketches.
pub(super) struct Clustered {
    /// `order[slot]` is the row, in the order of positions, of what is now in `slot`.
    pub(super) order: Vec<u16>,
    /// Of all groups.
    pub(super) step: f32,
    pub(super) codes: Vec<Line>,
    pub(super) masks: Vec<u16>,
    /// A key per group, sixteen a group of their own.
    pub(super) centroids: Vec<Line>,
    /// [`SAMPLES`] groups.
    pub(super) samples: Vec<Line>,
    /// Coordinates, per group `[direction][key]`.
    pub(super) z: Vec<[f32; GROUP]>,
}

/// Clusters a segment, given by its groups' codes, steps and masks.
pub(super) fn cluster(format: SketchFormat, codes: &[Line], steps: &[f32], masks: &[u16]) -> Clustered {
    let directions = format.directions();
    let lines = codes.len() / SEGMENT_GROUPS;
    let mut before = vec![[0.0; GROUP]; SEGMENT_GROUPS * directions];
    let mut points = vec![[0.0; CUT]; SEGMENT];
    let importance: [f32; CUT] = std::array::from_fn(|direction| (1.0 + direction as f32).powf(FALL));
    for (group, z) in before.chunks_exact_mut(directions).enumerate() {
        format.coordinates(steps[group], &codes[group * lines..][..lines], z);
        for (direction, (z, importance)) in z.iter().zip(importance).enumerate() {
            for (point, z) in points[group * GROUP..].iter_mut().zip(z) {
                point[direction] = z * importance;
            }
        }
    }
    let order = halve(&points);
    let mut z = vec![[0.0; GROUP]; SEGMENT_GROUPS * directions];
    let mut moved = vec![0_u16; SEGMENT_GROUPS];
    for (slot, row) in order.iter().enumerate() {
        let (to, from) = (slot / GROUP, usize::from(*row) / GROUP);
        let (key, before_key) = (slot % GROUP, usize::from(*row) % GROUP);
        let rows = before[from * directions..][..directions].iter();
        for (z, before) in z[to * directions..].iter_mut().zip(rows) {
            z[key] = before[before_key];
        }
        moved[to] |= ((masks[from] >> before_key) & 1) << key;
    }
    let step = common(steps);
    let mut out = Clustered {
        order,
        step,
        codes: Vec::with_capacity(codes.len()),
        masks: moved,
        centroids: Vec::with_capacity(codes.len() / GROUP),
        samples: vec![Line([0; 64]); SAMPLES * lines],
        z,
    };
    let mut room = [0; LINES_MAX * 64];
    let bytes = &mut room[..lines * 64];
    let mut code = |z: &[[f32; GROUP]], codes: &mut Vec<Line>| {
        format.quantise(z, step, bytes);
        codes.extend(bytes.as_chunks::<64>().0.iter().map(|bytes| Line(*bytes)));
    };
    let mut centroids = [[0.0; GROUP]; RANK];
    for (group, z) in out.z.chunks_exact(directions).enumerate() {
        code(z, &mut out.codes);
        let (mask, at) = (out.masks[group], group % GROUP);
        let count = mask.count_ones().max(1) as f32;
        for (centroids, z) in centroids.iter_mut().zip(z) {
            let searched = (0..GROUP).filter(|key| (mask >> key) & 1 == 1);
            centroids[at] = searched.map(|key| z[key]).sum::<f32>() / count;
        }
        if at == GROUP - 1 {
            code(&centroids[..directions], &mut out.centroids);
        }
    }
    for (sample, to) in out.samples.chunks_exact_mut(lines).enumerate() {
        for (slot, key) in SLOTS.into_iter().enumerate() {
            let (group, from) = sampled(sample, key);
            // The order of slots is its own inverse.
            let from = SLOTS[from];
            for (to, line) in to.iter_mut().zip(&out.codes[group * lines..]) {
                to.0[slot * 4..][..4].copy_from_slice(&line.0[from * 4..][..4]);
            }
        }
    }
    out
}

/// A step for keys of blocks that have each their own: their root mean square. Blocks of a text differ by some percent, and coding their
/// keys anew costs .004 of the recall at 2 %.
fn common(steps: &[f32]) -> f32 {
    let first = steps.first().copied().unwrap_or_default();
    if steps.iter().all(|step| step.to_bits() == first.to_bits()) {
        return first;
    }
    let squares: f64 = steps.iter().map(|step| f64::from(*step).powi(2)).sum();
    (squares / steps.len() as f64).sqrt() as f32
}

/// Rows in the order of a tree's leaves, rising in each.
fn halve(points: &[[f32; CUT]]) -> Vec<u16> {
    let mut order: Vec<u16> = (0..points.len() as u16).collect();
    let mut ranks: Vec<u64> = vec![0; points.len()];
    let mut length = points.len();
    while length > GROUP {
        for part in order.chunks_exact_mut(length) {
            let direction = widest(points, part);
            let ranks = &mut ranks[..length];
            for (rank, row) in ranks.iter_mut().zip(&*part) {
                *rank = u64::from(rising(points[usize::from(*row)][direction])) << 16 | u64::from(*row);
            }
            ranks.select_nth_unstable(length / 2);
            part.iter_mut().zip(ranks).for_each(|(row, rank)| *row = *rank as u16);
        }
        length /= 2;
    }
    order.chunks_mut(GROUP).for_each(<[u16]>::sort_unstable);
    order
}

/// The direction in which some points spread widest.
fn widest(points: &[[f32; CUT]], rows: &[u16]) -> usize {
    let (mut sums, mut squares) = ([0.0_f32; CUT], [0.0_f32; CUT]);
    for row in rows {
        let point = &points[usize::from(*row)];
        for ((sum, square), x) in sums.iter_mut().zip(&mut squares).zip(point) {
            *sum += x;
            *square += x * x;
        }
    }
    let spread = |at: &usize| squares[*at] - sums[*at] * sums[*at] / rows.len() as f32;
    (0..CUT)
        .max_by(|a, b| spread(a).total_cmp(&spread(b)).then(b.cmp(a)))
        .unwrap_or_default()
}

/// Bits that rise as a finite number does.
fn rising(x: f32) -> u32 {
    let bits = x.to_bits();
    if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits }
}
