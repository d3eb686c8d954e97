//! Recall against keys scored and bytes read, for every index on one synthetic recording that passed its gate.
//!
//! `cargo run --release -p kvasir-index --example curves -- [tokens] [head_dim] [heads] [index,index,..]`
//!
//! Defaults: 131,072 tokens, 128 elements, 4 query heads, every index. Builds take minutes at this size; the tables are
//! written row by row.

use std::{
    io::{self, Write as _},
    time::Instant,
};

use half::f16;
use kvasir_index::{
    Hnsw, IndexError, Ivf, KeyIndex, KeyRows, Origin, Quest, Roar, RoarParams, Samples, Wave, WaveParams,
    evaluate::{
        Exact, Setting, judge,
        synthetic::{Shape, Synthetic},
    },
};
use kvasir_simd::Pool;

const ORIGIN: Origin = Origin([0; 32]);
const EFFORTS: [f32; 9] = [0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4];
const NAMES: [&str; 5] = ["roar", "quest", "ivf", "wave", "hnsw"];
const K: usize = 100;

/// Builds the index of that name over the prefill.
fn build(
    name: &str,
    keys: &[f16],
    values: &[f16],
    head_dim: usize,
    samples: &[f32],
    pool: &Pool,
) -> Result<Box<dyn KeyIndex>, IndexError> {
    let blocks: Vec<&[f16]> = keys.chunks(64 * head_dim).collect();
    let rows = KeyRows::new(&blocks, 64, head_dim);
    Ok(match name {
        "roar" => Box::new(Roar::build(
            rows,
            Samples::Shared(samples),
            RoarParams::default(),
            ORIGIN,
            pool,
        )?),
        "wave" => {
            let mut wave = Wave::new(head_dim, WaveParams::default(), true, ORIGIN)?;
            wave.append_rows(keys, values)?;
            Box::new(wave)
        }
        "ivf" => Box::new(Ivf::build(rows, None, ORIGIN, pool)?),
        "quest" => {
            let mut quest = Quest::new(head_dim, ORIGIN);
            quest.append(keys)?;
            Box::new(quest)
        }
        "hnsw" => {
            let mut hnsw = Hnsw::new(head_dim, rows.len(), ORIGIN);
            hnsw.append(keys)?;
            Box::new(hnsw)
        }
        _ => {
            return Err(IndexError::Invalid {
                argument: "index",
                problem: format!("{name} is none of {}", NAMES.join(", ")),
            });
        }
    })
}

fn main() -> io::Result<()> {
    let mut out = io::stdout().lock();
    let mut args = std::env::args().skip(1);
    let mut number = |default: usize| args.next().and_then(|arg| arg.parse().ok()).unwrap_or(default);
    let (tokens, head_dim, heads) = (number(131_072), number(128), number(4));
    let names = args.next().unwrap_or_else(|| NAMES.join(","));
    let pool = Pool::new(2);
    let shape = Shape {
        tokens,
        head_dim,
        heads,
        theta: Shape::theta_for(tokens),
        seed: 1,
    };
    let setting = Setting {
        stride: 16,
        ..Setting::default()
    };
    let (synthetic, statistics) =
        Synthetic::accepted(shape, &Setting::default(), 4, &pool).map_err(io::Error::other)?;
    writeln!(out, "{:?}\n{statistics:#?}\n", synthetic.shape())?;
    let recording = synthetic.recording();
    let exact = Exact::of(recording, &setting, K, &pool).map_err(io::Error::other)?;
    let prefill = setting.prefill(&recording) * head_dim;
    let (keys, values) = (&recording.keys[..prefill], &recording.values[..prefill]);
    // AlayaDB's 0.4 samples per key, from all query heads together.
    let samples = recording.samples(&setting, (heads as f64 / 0.4).round() as usize);
    writeln!(
        out,
        "| index | build s | bytes per key | effort | keys scored | bytes read | recall@10 | recall@100 | mass | error mean | error p90 |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|---|---|---|")?;
    for name in names.split(',') {
        let start = Instant::now();
        let index = build(name, keys, values, head_dim, &samples, &pool).map_err(io::Error::other)?;
        let seconds = start.elapsed().as_secs_f64();
        let bytes = index.bytes() as f64 / index.keys() as f64;
        for effort in EFFORTS {
            let found = judge(index.as_ref(), &exact, &[10, K], K, effort, None).map_err(io::Error::other)?;
            writeln!(
                out,
                "| {name} | {seconds:.1} | {bytes:.0} | {effort} | {:.2} % | {:.1} % | {:.3} | {:.3} | {:.3} | {:.3} | {:.3} |",
                100.0 * found.keys_share,
                100.0 * found.bytes_share,
                found.recall[0].1,
                found.recall[1].1,
                found.mass.mean,
                found.error.mean,
                found.error.p90,
            )?;
            out.flush()?;
        }
    }
    Ok(())
}
