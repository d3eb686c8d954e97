//! Microseconds of a sketch scan of one KV head of 131,072 keys, one thread, beside a copy of the sketch's bytes.
//!
//! `cargo run --release -p kvasir-index --example sketch -- [rounds [sequences..]]`
//!
//! Noise along 32 directions of falling spread; queries near a few keys. Kinds alternate and each figure is the median.

use std::{hint::black_box, io::Write as _, time::Instant};

use half::f16;
use kvasir_index::{Attend, Excluded, HeadBasis, Segment, SketchAttended, SketchFormat, SketchScan, encode_block};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

const KEYS: usize = 131_072;
const D: usize = 128;
const BLOCK: usize = 64;

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse());
    let rounds = args.next().unwrap_or(Ok(31))?;
    let mut sequences = args.collect::<Result<Vec<usize>, _>>()?;
    if sequences.is_empty() {
        sequences = vec![1, 16];
    }
    let mut rng = SmallRng::seed_from_u64(1);
    let mut noise = |count: usize| -> Vec<f32> {
        (0..count)
            .map(|_| (0..4).map(|_| rng.random_range(-1.0..1.0_f32)).sum())
            .collect()
    };
    let spread = |i: usize| 4.0 / (1.0 + (i % D) as f32 / 3.0);
    let keys: Vec<f16> = noise(KEYS * D)
        .iter()
        .enumerate()
        .map(|(i, x)| f16::from_f32(x * spread(i)))
        .collect();
    let values: Vec<f16> = noise(KEYS * D).into_iter().map(f16::from_f32).collect();
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
    let mut sketches = Vec::with_capacity(KEYS / BLOCK * each);
    let start = Instant::now();
    for (keys, values) in keys.chunks(BLOCK * D).zip(values.chunks(BLOCK * D)) {
        encode_block(format, &basis, keys, values, &mut sketches)?;
    }
    let encode = start.elapsed().as_secs_f64() * 1e6 / (KEYS / BLOCK) as f64;
    let mut out = std::io::stdout().lock();
    writeln!(out, "sketching a block of 64 keys, d {D}: {encode:.1} us; {each} bytes")?;
    let none = Excluded::none();
    let mut copy = vec![0_u8; sketches.len()];
    for sequences in sequences {
        let heads = 4 * sequences;
        let q: Vec<f32> = (0..heads * D)
            .map(|i| 0.15 * keys[(i / D * 7919 + 5) % KEYS * D + i % D].to_f32())
            .collect();
        let mut scan = SketchScan::new(format, 1.0 / (D as f32).sqrt());
        let mut attended = SketchAttended::default();
        let mut times = [const { Vec::new() }; 4];
        for _ in 0..rounds {
            let start = Instant::now();
            copy.copy_from_slice(black_box(&sketches));
            black_box(&copy);
            times[0].push(start.elapsed().as_secs_f64() * 1e6);
            let start = Instant::now();
            scan.begin(&q, &basis)?;
            let blocks = keys
                .chunks(BLOCK * D)
                .zip(values.chunks(BLOCK * D))
                .zip(sketches.chunks(each));
            for (at, ((keys, values), sketch)) in blocks.enumerate() {
                scan.scan(
                    Segment {
                        keys,
                        values,
                        position: at * BLOCK,
                    },
                    sketch,
                    &none,
                )?;
            }
            times[1].push(start.elapsed().as_secs_f64() * 1e6);
            let how = Attend {
                target_mass: 0.95,
                k_max: Some(KEYS / 100),
                effort: 0.02,
                certificate: false,
                ..Attend::default()
            };
            let start = Instant::now();
            scan.attend_into(how, &mut attended);
            times[2].push(start.elapsed().as_secs_f64() * 1e6);
            let start = Instant::now();
            scan.attend_into(
                Attend {
                    certificate: true,
                    ..how
                },
                &mut attended,
            );
            times[3].push(start.elapsed().as_secs_f64() * 1e6);
        }
        let [copy, scan, attend, certified] = times.each_mut().map(|times| median(times));
        writeln!(
            out,
            "{sequences} x 4 query heads: copy {copy:.0} us, scan {scan:.0} us ({:.1} GB/s), attend {attend:.0} us, with certificate {certified:.0} us; {} keys scored, {} attended",
            sketches.len() as f64 / scan * 1e-3,
            attended.keys_scored,
            attended.keys.iter().sum::<usize>()
        )?;
    }
    Ok(())
}
