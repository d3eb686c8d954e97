//! How well sketches answer on real queries, keys and values.
//!
//! `cargo run --release -p kvasir-index --example quality -- DIR tokens q_heads kv_heads head_dim layer..`
//!
//! `DIR/L{layer}.{q,k,v}.f16` are `[heads, tokens, head_dim]`, rotated; `DIR/L{layer}.basis.f32` is, per KV head, mean key,
//! 32 directions for keys and 32 for queries. The last 256 queries ask; sink (4) and window (64) before them are excluded and
//! so are keys after the prompt. Optional `DIR/L{layer}.spec.f16`, `[q_heads, 256, head_dim]`: predicted queries.

use std::{env, error::Error, fs, io::Write as _, path::Path};

use half::f16;
use kvasir_index::{
    Attend, Column, Excluded, FlatScan, HeadBasis, KeyIndex as _, Origin, Segment, Sketch, SketchFormat, SketchScan,
    Width,
    evaluate::{Exact, MassTally, Recording, Setting},
};
use kvasir_simd::{Partial, Pool, attend, merge};

const ASKED: usize = 256;
const EVERY: usize = 8;
const BLOCK: usize = 64;

fn halves(path: &Path) -> Result<Vec<f16>, Box<dyn Error>> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect())
}

fn floats(path: &Path) -> Result<Vec<f32>, Box<dyn Error>> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

#[derive(Default)]
struct Sums {
    recall: [f64; 3],
    errors: [[f64; 3]; 2],
    covered: f64,
    missed: Vec<(f64, f64)>,
    holds: f64,
    speculated: [f64; 2],
    queries: f64,
    heads: f64,
    bytes: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [dir, tokens, q_heads, kv_heads, d, layers @ ..] = args.as_slice() else {
        return Err("quality DIR tokens q_heads kv_heads head_dim layer..".into());
    };
    let (tokens, q_heads, kv_heads, d): (usize, usize, usize, usize) =
        (tokens.parse()?, q_heads.parse()?, kv_heads.parse()?, d.parse()?);
    let (group, prompt) = (q_heads / kv_heads, tokens - ASKED);
    let excluded = Excluded::new(&[0..4, (prompt - 64) as u32..prompt as u32]);
    let searched = (prompt - 68) as f32;
    let scale = 1.0 / (d as f32).sqrt();
    let mut sums = Sums::default();
    let mut for_mass = MassTally::new(0.95, &[1.0]);
    for layer in layers {
        let file = |name: &str| Path::new(dir).join(format!("L{layer}.{name}"));
        let (q, k, v) = (
            halves(&file("q.f16"))?,
            halves(&file("k.f16"))?,
            halves(&file("v.f16"))?,
        );
        let (bases, spec) = (floats(&file("basis.f32"))?, halves(&file("spec.f16")).ok());
        for head in 0..kv_heads {
            let basis = &bases[head * (d + 64 * d)..];
            let basis = HeadBasis {
                mean: basis[..d].to_vec(),
                keys: basis[d..33 * d].to_vec(),
                queries: basis[33 * d..65 * d].to_vec(),
                streaming: false,
            };
            let format = SketchFormat::new(d);
            let rows = head * tokens * d..(head * tokens + prompt) * d;
            let blocks: Vec<_> = k[rows.clone()]
                .chunks(BLOCK * d)
                .zip(v[rows.clone()].chunks(BLOCK * d))
                .collect();
            let mut column = Column::new(format);
            let mut room = Vec::new();
            for (at, (keys, values)) in blocks.iter().enumerate() {
                column.push_missing(keys.len() / d)?;
                column.sketch(at, &basis, keys, values, &mut room)?;
            }
            // As a store's are once it had the time.
            column.cluster_all(&v[rows])?;
            let segments = || {
                blocks.iter().enumerate().map(|(at, &(keys, values))| Segment {
                    keys,
                    values,
                    position: at * BLOCK,
                })
            };
            let setting = Setting {
                stride: 2 * EVERY,
                ..Setting::default()
            };
            let recording = Recording {
                q: &q[head * group * tokens * d..(head + 1) * group * tokens * d],
                keys: &k[head * tokens * d..(head + 1) * tokens * d],
                values: &v[head * tokens * d..(head + 1) * tokens * d],
                heads: group,
                head_dim: d,
            };
            let mut index = Sketch::new(d, Width::Four, basis.clone(), Origin::default())?;
            index.append(&k[head * tokens * d..(head * tokens + prompt) * d])?;
            for_mass.add(&index, &Exact::of(recording, &setting, 1, &Pool::new(1))?)?;
            let excluded = std::slice::from_ref(&excluded);
            let mut scan = SketchScan::new(format, scale);
            let mut flat = FlatScan::new(d, scale);
            for at in (0..ASKED).step_by(EVERY) {
                let rows = |source: &[f16], tokens: usize, at: usize| -> Vec<f32> {
                    let row = |h: usize| {
                        source[((head * group + h) * tokens + at) * d..][..d]
                            .iter()
                            .map(|x| x.to_f32())
                    };
                    (0..group).flat_map(row).collect()
                };
                let asked = rows(&q, tokens, prompt + at);
                for h in 0..group {
                    let asked = &asked[h * d..][..d];
                    flat.begin(asked);
                    scan.begin(asked, &basis)?;
                    segments().for_each(|segment| flat.scan(segment, &excluded[0]));
                    scan.scan_column(&column, segments().map(Some), excluded)?;
                    let (truth, best) = (flat.attend(1.0, None), flat.rows(100));
                    // What the worker attends to by itself: errors are those of the merged output.
                    let all = head * tokens * d;
                    let own = [0..4, prompt - 64..prompt + at + 1].map(|rows| Segment {
                        keys: &k[all + rows.start * d..all + rows.end * d],
                        values: &v[all + rows.start * d..all + rows.end * d],
                        position: rows.start,
                    });
                    let mut fixed = Partial::default();
                    attend(asked, &[usize::MAX], d, scale, &own, &mut fixed);
                    let merged = |o: &[f32], lse: f32| {
                        let mut into = fixed.clone();
                        merge(
                            &mut into,
                            &Partial {
                                o: o.to_vec(),
                                lse: vec![lse],
                            },
                            d,
                        );
                        into
                    };
                    let whole = merged(&truth.o, truth.lse[0]);
                    let hit = |found: &[u32]| {
                        found
                            .iter()
                            .filter(|p| best.positions().binary_search(p).is_ok())
                            .count() as f64
                            / 100.0
                    };
                    for (recall, effort) in sums.recall.iter_mut().zip([0.01, 0.02, 0.05]) {
                        *recall += hit(&scan.candidates((searched * effort) as usize));
                    }
                    for (errors, tail) in sums.errors.iter_mut().zip([false, true]) {
                        for (error, share) in errors.iter_mut().zip([0.01_f32, 0.02, 0.05]) {
                            let how = Attend {
                                target_mass: 1.0,
                                k_max: Some((searched * share) as usize),
                                effort: 2.0 * share,
                                tail,
                                certificate: tail,
                                missed_mass_max: None,
                            };
                            let found = scan.attend(how);
                            let norm =
                                |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                            let joined = merged(&found.o, found.lse[0]);
                            *error += norm(&mut joined.o.iter().zip(&whole.o).map(|(a, b)| a - b))
                                / norm(&mut whole.o.iter().copied());
                            if tail && share == 0.02 {
                                let chosen = f64::from(found.mass[0]) * f64::from(found.lse[0] - truth.lse[0]).exp2();
                                let (bound, missed) = (f64::from(found.missed_max[0]), (1.0 - chosen).max(0.0));
                                sums.holds += f64::from(u8::from(bound >= missed));
                                sums.missed.push((bound, missed));
                            }
                        }
                    }
                    if let Some(spec) = &spec {
                        let predicted = rows(spec, ASKED, at);
                        scan.begin(&predicted[h * d..][..d], &basis)?;
                        scan.scan_column(&column, segments().map(Some), excluded)?;
                        for (recall, share) in sums.speculated.iter_mut().zip([0.05, 0.1]) {
                            *recall += hit(&scan.candidates((searched * share) as usize));
                        }
                    }
                    sums.heads += 1.0;
                }
                scan.begin(&asked, &basis)?;
                scan.scan_column(&column, segments().map(Some), excluded)?;
                let found = scan.attend(Attend {
                    target_mass: 0.95,
                    certificate: false,
                    ..Attend::default()
                });
                sums.bytes += found.bytes_read as f64;
                sums.covered += found.mass.iter().map(|mass| f64::from(*mass)).sum::<f64>() / group as f64;
                sums.queries += 1.0;
            }
        }
    }
    let mut out = std::io::stdout().lock();
    let of = |x: f64| x / sums.heads;
    let of_index = for_mass.figures();
    writeln!(
        out,
        "as an index, .95 of the mass of every head: {:.1} KiB read (p90 {:.1}) at a stated {:.4}, reached {:.3}",
        of_index.bytes.mean / 1024.0,
        of_index.bytes.p90 / 1024.0,
        of_index.effort.mean,
        of_index.reached
    )?;
    writeln!(out, "{} head-queries", sums.heads)?;
    writeln!(
        out,
        "recall@100 of candidates at 1, 2, 5 %: {:.3?}",
        sums.recall.map(of)
    )?;
    writeln!(
        out,
        "output error at 1, 2, 5 % of rows, top-k: {:.4?}, with tail: {:.4?}",
        sums.errors[0].map(of),
        sums.errors[1].map(of)
    )?;
    sums.missed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let bound = sums.missed[sums.missed.len() / 2].0;
    sums.missed.sort_by(|a, b| a.1.total_cmp(&b.1));
    let missed = sums.missed[sums.missed.len() / 2].1;
    writeln!(
        out,
        "bound at 2 %: holds {:.3}, median {bound:.4} of median missed {missed:.4}",
        of(sums.holds)
    )?;
    writeln!(
        out,
        "recall@100 of candidates from predicted queries at 5, 10 %: {:.3?}",
        sums.speculated.map(of)
    )?;
    writeln!(
        out,
        "for .95 of the mass, per group: {:.0} bytes read, {:.4} covered",
        sums.bytes / sums.queries,
        sums.covered / sums.queries
    )?;
    Ok(())
}
