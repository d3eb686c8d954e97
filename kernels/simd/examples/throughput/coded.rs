//! The scan of coded keys beside a plain read and a copy of the same bytes.

use std::hint::black_box;

use kvasir_simd::{
    CodedKeys, CodedQueries, Found, GROUP, Level, Line, RUN_GROUPS, UNIT, coded_levels, coded_scan, coded_scan_listed,
    room_for,
};

use crate::{fastest, wave};

const NIBBLES: usize = 32;
const LINES: usize = NIBBLES / 8;
const HEADS: usize = 4;
/// Groups of a block, which has a step of its own.
const BLOCK: usize = 4;
/// Groups a call.
const TILE: usize = 256;
/// Contexts that are read in turn where none is to be in a cache.
const CONTEXTS: usize = 48;
/// Of a context, as the scan of it takes them.
const KEYS: usize = 1 << 17;
/// Share of the keys that each head keeps.
const KEPT: f64 = 0.02;
/// One group of so many is listed.
const LISTED: usize = 10;

pub(crate) fn coded() {
    let queries = queries();
    for (place, keys, contexts) in [("L2", 1 << 15, 1), ("L3", KEYS, 1), ("memory", KEYS, CONTEXTS)] {
        let contexts: Vec<_> = (0..contexts).map(|seed| Context::new(seed, keys)).collect();
        let floors = contexts[0].floors(&queries);
        let mut next = (0..contexts.len()).cycle();
        let mut turn = || &contexts[next.next().unwrap_or(0)];
        let read = fastest(|| {
            let fold = |sum: [u64; 8], line: &Line| {
                let words = line.0.as_chunks().0;
                std::array::from_fn(|at| sum[at] ^ u64::from_ne_bytes(words[at]))
            };
            black_box(turn().codes.iter().fold([0; 8], fold));
        });
        let mut copy = vec![Line([0; 64]); contexts[0].codes.len()];
        let copied = fastest(|| black_box(&mut copy).copy_from_slice(&turn().codes));
        print(place, keys, "plain read", read, read);
        print(place, keys, "copy", copied, read);
        let mut room = Room::new(keys);
        for few in [false, true] {
            let seconds = fastest(|| room.scan(&queries, turn(), &floors, few));
            let share = room.counts.iter().sum::<usize>() as f64 / (HEADS * keys) as f64;
            print(
                place,
                keys,
                &format!("scan, {HEADS} heads, few {few}, {share:.3} kept"),
                seconds,
                read,
            );
        }
        let rising: Vec<u32> = (0..UNIT / GROUP / LISTED)
            .map(|at| (at * LISTED + at * at % LISTED) as u32)
            .collect();
        let seconds = fastest(|| room.scan_listed(&queries, turn(), &floors, &rising));
        print(
            place,
            keys,
            &format!("scan of a {LISTED}th of the groups"),
            seconds,
            read,
        );
        let mut levels = vec![0; HEADS * keys];
        let seconds = fastest(|| coded_levels(&queries, 0..HEADS, turn().keys(0..keys / GROUP), &mut levels, keys));
        print(place, keys, &format!("levels, {HEADS} heads"), seconds, read);
    }
}

fn print(place: &str, keys: usize, what: &str, seconds: f64, read: f64) {
    println!(
        "coded, {keys} keys in {place}: {what}: {:.1} us, {:.3} ns a key, {:.1} GB/s, {:.2} of a plain read",
        seconds * 1e6,
        seconds * 1e9 / keys as f64,
        (keys * NIBBLES / 2) as f64 / seconds / 1e9,
        seconds / read,
    );
}

/// Their scores spread by some four powers of two.
fn queries() -> CodedQueries {
    let mut queries = CodedQueries::default();
    queries.begin(NIBBLES);
    for weights in wave(HEADS * NIBBLES).chunks(NIBBLES) {
        let falling: Vec<f32> = weights
            .iter()
            .enumerate()
            .map(|(at, w)| 4.0 * w / (1 + at) as f32)
            .collect();
        queries.push(&falling);
    }
    queries
}

struct Context {
    codes: Vec<Line>,
    steps: Vec<f32>,
    masks: Vec<u16>,
}

impl Context {
    fn new(seed: usize, keys: usize) -> Self {
        let groups = keys / GROUP;
        let mut state = seed as u64 + 1;
        let mut byte = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        Self {
            codes: (0..groups * LINES)
                .map(|_| Line(std::array::from_fn(|_| byte())))
                .collect(),
            steps: (0..groups)
                .map(|group| 0.3 + 0.01 * (group / BLOCK % 7) as f32)
                .collect(),
            masks: vec![u16::MAX; groups],
        }
    }

    fn keys(&self, groups: std::ops::Range<usize>) -> CodedKeys<'_> {
        CodedKeys {
            codes: &self.codes[groups.start * LINES..groups.end * LINES],
            steps: &self.steps[groups.clone()],
            masks: &self.masks[groups],
        }
    }

    /// Levels that the share of the keys reaches.
    fn floors(&self, queries: &CodedQueries) -> Vec<Level> {
        let keys = self.masks.len() * GROUP;
        let mut levels = vec![0; HEADS * keys];
        coded_levels(queries, 0..HEADS, self.keys(0..self.masks.len()), &mut levels, keys);
        let floor = |levels: &mut [u16]| {
            levels.sort_unstable();
            Level(levels[keys - (keys as f64 * KEPT) as usize])
        };
        levels.chunks_mut(keys).map(floor).collect()
    }
}

struct Room {
    kept: Vec<u32>,
    counts: [usize; HEADS],
    sums: Vec<f32>,
    stride: usize,
    sums_stride: usize,
}

impl Room {
    fn new(keys: usize) -> Self {
        let (stride, sums_stride) = (keys / 4 + room_for(UNIT / GROUP), keys / GROUP);
        Self {
            kept: vec![0; HEADS * stride],
            counts: [0; HEADS],
            sums: vec![0.0; HEADS * sums_stride],
            stride,
            sums_stride,
        }
    }

    fn found<'a>(&'a mut self, floors: &'a [Level], first: usize, few: bool) -> Found<'a> {
        Found {
            floors,
            kept: &mut self.kept,
            stride: self.stride,
            counts: &mut self.counts,
            sums: &mut self.sums[first..],
            sums_stride: self.sums_stride,
            few,
        }
    }

    /// Tile after tile, as an index does.
    fn scan(&mut self, queries: &CodedQueries, context: &Context, floors: &[Level], few: bool) {
        self.counts = [0; HEADS];
        for first in (0..context.masks.len()).step_by(TILE) {
            let keys = context.keys(first..first + TILE);
            let mut found = self.found(floors, first / RUN_GROUPS, few);
            coded_scan(queries, 0..HEADS, keys, first * GROUP, &mut found);
        }
    }

    /// Unit after unit.
    fn scan_listed(&mut self, queries: &CodedQueries, context: &Context, floors: &[Level], list: &[u32]) {
        self.counts = [0; HEADS];
        let groups = context.masks.len();
        for first in (0..groups).step_by(UNIT / GROUP) {
            let end = groups.min(first + UNIT / GROUP);
            let list = &list[..list.partition_point(|group| (*group as usize) < end - first)];
            let mut found = self.found(floors, first, false);
            coded_scan_listed(
                queries,
                0..HEADS,
                context.keys(first..end),
                first * GROUP,
                list,
                &mut found,
            );
        }
    }
}
