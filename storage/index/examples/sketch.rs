//! Microseconds of a sketch scan and of attention through it, of one KV head of 131,072 keys, one thread, beside a copy of the
//! sketch's bytes; then of a whole token of a model with 256 KV heads, on all threads.
//!
//! `cargo run --release -p kvasir-index --example sketch -- [rounds [sequences [keys [threads]]]]`
//!
//! Noise along 32 directions of falling spread; queries near a few keys. Kinds alternate and each figure is the median. "From
//! memory" goes through contexts of which none is left in a cache. With any number of keys as many are attended to as 1 % of
//! 131,072, and twice as many scored. The four heads of a group are asked twice: apart, so that hardly a key serves two of them, and
//! alike, so that together they want some 2.8 times the keys of one, which real groups of four do. Columns are clustered but where every
//! key is said to be scanned; whether a scan of them then takes the first level is its own matter.

use std::{
    hint::black_box,
    io::Write as _,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use half::f16;
use kvasir_index::{Attend, Column, Excluded, HeadBasis, Segment, SketchAttended, SketchFormat, SketchScan};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

/// Keys that a head attends to; scored are twice as many.
const ATTENDED: usize = 1310;
/// KV heads of all layers of a model.
const MODEL_HEADS: usize = 256;
/// What heads that ask alike have in common, as a share of the variance of their scores.
const ALIKE: f32 = 0.3;
const D: usize = 128;
const BLOCK: usize = 64;
/// Keys that are clustered together.
const SEGMENT: usize = 1024;

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Keys, values and sketches of one KV head.
struct Context {
    keys: Vec<f16>,
    values: Vec<f16>,
    /// As sketches came, and with clustered segments.
    columns: [Column; 2],
}

const EVERY: usize = 0;
const CLUSTERED: usize = 1;

impl Context {
    fn segments(&self) -> impl Iterator<Item = Option<Segment<'_>>> {
        let blocks = self.keys.chunks(BLOCK * D).zip(self.values.chunks(BLOCK * D));
        blocks.enumerate().map(|(at, (keys, values))| {
            Some(Segment {
                keys,
                values,
                position: at * BLOCK,
            })
        })
    }
}

/// Scans a column of `context` for `q`; what is asked of it then is `ask`. Microseconds of both.
fn timed<'a>(
    scan: &mut SketchScan<'a>,
    (context, column, basis): (&'a Context, usize, &HeadBasis),
    q: &[f32],
    ask: impl FnOnce(&mut SketchScan<'a>),
) -> Result<f64, Box<dyn std::error::Error>> {
    let start = Instant::now();
    scan.begin(q, basis)?;
    scan.scan_column(&context.columns[column], context.segments(), &[Excluded::none()])?;
    ask(scan);
    Ok(start.elapsed().as_secs_f64() * 1e6)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>());
    let rounds = args.next().unwrap_or(Ok(31))?;
    let sequences = args.next().unwrap_or(Ok(16))?.max(1);
    let count = args.next().unwrap_or(Ok(131_072))?.next_multiple_of(BLOCK);
    let threads = match args.next() {
        Some(threads) => threads?.max(1),
        None => std::thread::available_parallelism()?.get(),
    };
    let mut rng = SmallRng::seed_from_u64(1);
    let mut noise = |count: usize| -> Vec<f32> {
        (0..count)
            .map(|_| (0..4).map(|_| rng.random_range(-1.0..1.0_f32)).sum())
            .collect()
    };
    let spread = |i: usize| 4.0 / (1.0 + (i % D) as f32 / 3.0);
    let keys: Vec<f16> = noise(count * D)
        .iter()
        .enumerate()
        .map(|(i, x)| f16::from_f32(x * spread(i)))
        .collect();
    let values: Vec<f16> = noise(count * D).into_iter().map(f16::from_f32).collect();
    let (mut to_keys, mut to_queries) = (vec![0.0; 32 * D], vec![0.0; 32 * D]);
    for i in 0..32 {
        (to_keys[i * D + i], to_queries[i * D + i]) = (1.0 / spread(i), spread(i));
    }
    let basis = HeadBasis {
        mean: vec![0.0; D],
        keys: to_keys,
        queries: to_queries,
        streaming: false,
    };
    let format = SketchFormat::new(D);
    let each = format.bytes(BLOCK);
    let mut sketches = Vec::with_capacity(count / BLOCK * each);
    let mut column = Column::new(format);
    let mut room = Vec::new();
    let start = Instant::now();
    for (at, (keys, values)) in keys.chunks(BLOCK * D).zip(values.chunks(BLOCK * D)).enumerate() {
        column.push_missing(BLOCK)?;
        column.sketch(at, &basis, keys, values, &mut room)?;
        sketches.extend_from_slice(&room);
    }
    let encode = start.elapsed().as_secs_f64() * 1e6 / (count / BLOCK) as f64;
    let mut clustered = column.clone();
    let start = Instant::now();
    clustered.cluster_all(&values)?;
    let cluster = start.elapsed().as_secs_f64() * 1e6 / (count / SEGMENT).max(1) as f64;
    // Equal contexts in memory of their own: each is cold when its turn comes, as one of many KV heads is.
    let contexts: Vec<Context> = (0..sequences.max(2_000_000 / count).clamp(2, 16))
        .map(|_| Context {
            keys: keys.clone(),
            values: values.clone(),
            columns: [column.clone(), clustered.clone()],
        })
        .collect();
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "sketching a block of 64 keys, d {D}: {encode:.1} us; {each} bytes; {count} keys, {:.2} MB as scanned; clustering 1,024 keys: \
         {cluster:.0} us, then {:.2} MB",
        column.bytes() as f64 * 1e-6,
        clustered.bytes() as f64 * 1e-6
    )?;
    let q: Vec<f32> = (0..4 * sequences * D)
        .map(|i| 0.15 * keys[(i / D * 7919 + 5) % count * D + i % D].to_f32())
        .collect();
    let one = &q[..4 * D];
    // What all heads ask for and what each asks for: of independent parts the lengths add up as squares.
    let alike: Vec<f32> = (0..4 * D)
        .map(|i| ALIKE.sqrt() * q[4 * D * (sequences - 1) + i % D] + (1.0 - ALIKE).sqrt() * one[i])
        .collect();
    let how = Attend {
        target_mass: 0.95,
        k_max: Some(ATTENDED),
        effort: 2.0 * ATTENDED as f32 / count as f32,
        certificate: false,
        ..Attend::default()
    };
    let certified = Attend {
        certificate: true,
        ..how
    };
    let mut copy = vec![0_u8; sketches.len()];
    let mut scan = SketchScan::new(format, 1.0 / (D as f32).sqrt());
    let mut found = SketchAttended::default();
    let mut times = [const { Vec::new() }; 14];
    for _ in 0..rounds {
        let mut note = |at: usize, time: f64| times[at].push(time);
        let start = Instant::now();
        copy.copy_from_slice(black_box(&sketches));
        black_box(&copy);
        note(0, start.elapsed().as_secs_f64() * 1e6);
        let warm = (&contexts[0], CLUSTERED, &basis);
        let every = (&contexts[0], EVERY, &basis);
        let candidates = |scan: &mut SketchScan<'_>| {
            black_box(scan.find_best(2 * ATTENDED));
        };
        note(1, timed(&mut scan, every, one, candidates)?);
        note(10, timed(&mut scan, warm, one, candidates)?);
        note(
            11,
            timed(&mut scan, every, one, |scan| scan.attend_into(how, &mut found))?,
        );
        note(
            2,
            timed(&mut scan, warm, one, |scan| scan.attend_into(how, &mut found))?,
        );
        note(
            3,
            timed(&mut scan, warm, one, |scan| scan.attend_into(certified, &mut found))?,
        );
        note(
            8,
            timed(&mut scan, warm, &alike, |scan| scan.attend_into(how, &mut found))?,
        );
    }
    for round in 0..rounds {
        let mut note = |at: usize, time: f64| times[at].push(time);
        let cold = |at: usize| (&contexts[(5 * round + at) % contexts.len()], CLUSTERED, &basis);
        let every = |at: usize| (&contexts[(5 * round + at) % contexts.len()], EVERY, &basis);
        let candidates = |scan: &mut SketchScan<'_>| {
            black_box(scan.find_best(2 * ATTENDED));
        };
        note(4, timed(&mut scan, every(0), one, candidates)?);
        note(12, timed(&mut scan, cold(3), one, candidates)?);
        note(
            13,
            timed(&mut scan, every(4), &alike, |scan| scan.attend_into(how, &mut found))?,
        );
        note(
            5,
            timed(&mut scan, cold(1), one, |scan| scan.attend_into(how, &mut found))?,
        );
        note(
            9,
            timed(&mut scan, cold(2), &alike, |scan| scan.attend_into(how, &mut found))?,
        );
        if round % 4 == 0 {
            let attend = |scan: &mut SketchScan<'_>| scan.attend_into(how, &mut found);
            note(6, timed(&mut scan, cold(3), &q, attend)?);
            let mut alone = 0.0;
            for (context, q) in contexts.iter().zip(q.chunks(4 * D)) {
                alone += timed(&mut scan, (context, CLUSTERED, &basis), q, |scan| {
                    scan.attend_into(how, &mut found)
                })?;
            }
            note(7, alone);
        }
    }
    timed(&mut scan, (&contexts[0], CLUSTERED, &basis), one, |scan| {
        scan.attend_into(how, &mut found)
    })?;
    let (scored, attended) = (found.keys_scored, found.keys.iter().sum::<usize>());
    timed(&mut scan, (&contexts[0], CLUSTERED, &basis), &alike, |scan| {
        scan.attend_into(how, &mut found)
    })?;
    let [
        copy,
        scan,
        attend,
        certified,
        cold_scan,
        cold,
        shared,
        alone,
        same,
        cold_same,
        near,
        every,
        cold_near,
        cold_every,
    ] = times.each_mut().map(|times| median(times));
    writeln!(
        out,
        "4 query heads: copy {copy:.0} us; every key scanned, and choice: {scan:.0} us, from memory {cold_scan:.0}; through the first level \
         {near:.0} us, from memory {cold_near:.0}; with it attend {attend:.0} us (every key: {every:.0}), from memory {cold:.0}; with \
         certificate {certified:.0} us; {scored} keys scored, {attended} attended"
    )?;
    writeln!(
        out,
        "4 query heads alike: attend {same:.0} us, from memory {cold_same:.0} (every key: {cold_every:.0}); {} keys scored, {:.2} times \
         those of one head",
        found.keys_scored,
        found.keys_scored as f64 / (2 * ATTENDED) as f64
    )?;
    writeln!(
        out,
        "{sequences} sequences over one context {shared:.0} us, over one each {alone:.0} us: {:.2} times the tokens",
        alone / shared
    )?;
    for (name, q) in [("apart", one), ("alike", &alike)] {
        let mut walls: Vec<f64> = (0..rounds.min(5))
            .map(|_| token(&contexts, &basis, q, how, threads))
            .collect();
        writeln!(
            out,
            "a token of {MODEL_HEADS} KV heads on {threads} threads, from memory, heads {name}: {:.1} ms",
            median(&mut walls)
        )?;
    }
    Ok(())
}

/// Milliseconds until all heads of a model have attended, each to the next of the contexts.
fn token(contexts: &[Context], basis: &HeadBasis, q: &[f32], how: Attend, threads: usize) -> f64 {
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut scan = SketchScan::new(SketchFormat::new(D), 1.0 / (D as f32).sqrt());
                let mut found = SketchAttended::default();
                loop {
                    let head = next.fetch_add(1, Ordering::Relaxed);
                    if head >= MODEL_HEADS {
                        break;
                    }
                    let context = (&contexts[head % contexts.len()], CLUSTERED, basis);
                    timed(&mut scan, context, q, |scan| scan.attend_into(how, &mut found))
                        .expect("a context of its own");
                }
            });
        }
    });
    start.elapsed().as_secs_f64() * 1e3
}
