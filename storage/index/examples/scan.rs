//! Microseconds per query of the exact flat scan, one thread, beside a plain read of the keys it must read.
//!
//! `cargo run --release -p kvasir-index --example scan`
//!
//! Keys and values are noise, queries three keys added up, so that the softmax has peaks and a
//! tail. Kinds alternate and each figure is the median, so that a busy machine hurts all of them alike.

use std::{
    hint::black_box,
    io::{self, Write as _},
    time::Instant,
};

use half::f16;
use kvasir_index::{Excluded, FlatScan, Segment};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

const BLOCK_TOKENS: usize = 64;
const ROUNDS: usize = 31;
const K: usize = 100;
const MASS: f32 = 0.99;

/// Keys and values of one KV head, and the query rows of its group.
struct Head {
    q: Vec<f32>,
    keys: Vec<f16>,
    values: Vec<f16>,
}

impl Head {
    fn random(rng: &mut SmallRng, tokens: usize, group: usize, head_dim: usize) -> Self {
        let mut noise = |count: usize| -> Vec<f32> {
            let draw = |_| (0..4).map(|_| rng.random_range(-1.0..1.0_f32)).sum();
            (0..count).map(draw).collect()
        };
        let (keys, values) = (noise(tokens * head_dim), noise(tokens * head_dim));
        let q = (0..group * head_dim)
            .map(|i| {
                let near = |nth: usize| keys[(i / head_dim + nth) * 997 % tokens * head_dim + i % head_dim];
                near(1) + near(2) + near(3)
            })
            .collect();
        let halves = |values: Vec<f32>| values.into_iter().map(f16::from_f32).collect();
        Self {
            q,
            keys: halves(keys),
            values: halves(values),
        }
    }

    fn scan<'a>(&'a self, scan: &mut FlatScan<'a>, head_dim: usize) {
        scan.begin(&self.q);
        let rows = BLOCK_TOKENS * head_dim;
        for (at, (keys, values)) in self.keys.chunks(rows).zip(self.values.chunks(rows)).enumerate() {
            let position = at * BLOCK_TOKENS;
            scan.scan(Segment { keys, values, position }, &Excluded::none());
        }
    }
}

/// Reads every byte of the keys and does next to nothing with it.
fn read(heads: &[Head]) -> u64 {
    let sum = |head: &Head| head.keys.iter().map(|key| u64::from(key.to_bits())).sum::<u64>();
    heads.iter().map(sum).sum()
}

fn micros(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "| keys | KV heads x group, d | read keys, µs | rows k={K}, µs | attend {MASS}, µs | keys attended to |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|")?;
    for (kv_heads, group, head_dim) in [(3, 3, 64), (8, 4, 128)] {
        for tokens in [4 << 10, 32 << 10] {
            let mut rng = SmallRng::seed_from_u64(tokens as u64);
            let heads: Vec<Head> = (0..kv_heads)
                .map(|_| Head::random(&mut rng, tokens, group, head_dim))
                .collect();
            let mut scan = FlatScan::new(head_dim, 1.0 / (head_dim as f32).sqrt());
            let mut times = [const { Vec::new() }; 3];
            let mut attended = 0;
            for _ in 0..ROUNDS {
                let start = Instant::now();
                black_box(read(black_box(&heads)));
                times[0].push(start.elapsed().as_secs_f64() * 1e6);

                let start = Instant::now();
                for head in &heads {
                    head.scan(&mut scan, head_dim);
                    black_box(scan.rows(K));
                }
                times[1].push(start.elapsed().as_secs_f64() * 1e6);

                attended = 0;
                let start = Instant::now();
                for head in &heads {
                    head.scan(&mut scan, head_dim);
                    attended += black_box(scan.attend(MASS, None)).keys.iter().sum::<usize>();
                }
                times[2].push(start.elapsed().as_secs_f64() * 1e6);
            }
            let [read, rows, attend] = &mut times;
            let share = 100.0 * attended as f64 / (kv_heads * group * tokens) as f64;
            let (read, rows, attend) = (micros(read), micros(rows), micros(attend));
            writeln!(
                out,
                "| {tokens} | {kv_heads} x {group}, {head_dim} | {read:.0} | {rows:.0} | {attend:.0} | {share:.0} % |"
            )?;
        }
    }
    Ok(())
}
