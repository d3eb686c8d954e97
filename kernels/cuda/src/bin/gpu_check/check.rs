//! Every kernel against its reference, on random shapes with tails, empty sets and poisoned outputs.

use kvasir_cuda::{
    Decode, Dtype, Gpu, GpuError, KvShape, KvViewMut, Layout, MAX_VIEWS, PageTable, Partials, Query, copy_rows,
    key_scores, merge,
    reference::{self, Placement},
    top_k,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::cases::{Form, Held, PAGE_TOKENS, any_form, any_shape, length, numbers};

#[derive(Default)]
pub(crate) struct Tally {
    passed: usize,
    failed: usize,
    worst: f64,
}

impl Tally {
    /// Counts a case; prints it if its error is above the limit, or not a number.
    pub(crate) fn count(&mut self, error: f64, limit: f64, case: impl FnOnce() -> String) {
        self.worst = if error.is_nan() { error } else { self.worst.max(error) };
        if error <= limit {
            self.passed += 1;
        } else {
            self.failed += 1;
            println!("FAILED: error {error:.3e} > {limit:.0e}: {}", case());
        }
    }
}

/// `||a - b|| / ||b||`, with elements that are infinite in both taken as equal.
pub(crate) fn distance(a: &[f32], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        let a = f64::from(a);
        if a == b {
            norm += if b.is_finite() { b * b } else { 0.0 };
            continue;
        }
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    if difference == 0.0 {
        0.0
    } else {
        (difference / norm.max(1e-12)).sqrt()
    }
}

/// The largest `|a - b|`, infinities of the same sign being equal; NaN if there is one.
pub(crate) fn furthest(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).fold(0.0, |worst: f64, (&a, &b)| {
        let apart = if f64::from(a) == b {
            0.0
        } else {
            (f64::from(a) - b).abs()
        };
        if worst.is_nan() || apart <= worst { worst } else { apart }
    })
}

/// Limit of decode and of its lse, in bf16 or f16 arithmetic.
pub(crate) fn limit(dtype: Dtype) -> f64 {
    if dtype == Dtype::Bf16 { 5e-3 } else { 1e-3 }
}

/// Opens the same GPU with kernels that dawdle.
pub(crate) type Slow<'a> = &'a dyn Fn() -> Result<Gpu, String>;

/// Runs all checks, or the one named `only`; whether all passed.
pub(crate) fn run(gpu: &Gpu, slow: Slow<'_>, seed: u64, cases: usize, only: Option<&str>) -> Result<bool, GpuError> {
    type Check = fn(&Gpu, &mut StdRng, usize, &mut Tally) -> Result<(), GpuError>;
    type Checked<'a> = &'a dyn Fn(&Gpu, &mut StdRng, usize, &mut Tally) -> Result<(), GpuError>;
    let attended: Checked<'_> = &|gpu, rng, cases, tally| crate::prefill::delayed(gpu, slow, rng, cases, tally);
    let multiplied: Checked<'_> = &|gpu, rng, cases, tally| crate::linear::delayed(gpu, slow, rng, cases, tally);
    let checks: [(&str, Check); 17] = [
        ("decode", decode),
        ("decode in a graph", recorded),
        ("merge", merged),
        ("copy_rows", copied),
        ("key_scores", scored),
        ("top_k", selected),
        ("prefill", crate::prefill::prefilled),
        ("prefill, batched", crate::batch::prefilled),
        ("planner", crate::planner::planned),
        ("linear", crate::linear::products),
        ("rows", crate::forward::rows),
        ("steps", crate::forward::steps),
        ("sample", crate::sample::sampled),
        ("noise", crate::transfer::noises),
        ("pages sent", crate::transfer::sent),
        ("pages received", crate::transfer::received),
        ("refusals", crate::refusals::refused),
    ];
    let (mut passed, mut failed) = (0, 0);
    let checks = checks.iter().map(|(name, check)| (*name, check as Checked<'_>));
    let all = checks
        .chain([("prefill, delayed", attended), ("linear, delayed", multiplied)])
        .enumerate();
    for (i, (name, check)) in all.filter(|(_, (name, _))| only.is_none_or(|only| only == *name)) {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(i as u64));
        let mut tally = Tally::default();
        check(gpu, &mut rng, cases, &mut tally)?;
        println!(
            "{name:18} {:4} passed, {} failed, worst error {:.2e}",
            tally.passed, tally.failed, tally.worst
        );
        passed += tally.passed;
        failed += tally.failed;
    }
    println!("{passed} passed, {failed} failed");
    if passed + failed == 0 {
        println!("no check has that name");
    }
    Ok(failed == 0 && passed > 0)
}

fn decode(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for case in 0..cases {
        let shape = any_shape(rng);
        let heads = shape.kv_heads * [1, 3, 4, 8, 11][rng.random_range(0..5)];
        let parts = rng.random_range(0..=4);
        let most = if case % 8 == 0 { 20_000 } else { 1500 };
        let held = (0..parts)
            .map(|_| {
                let (form, tokens, cut) = (any_form(rng, shape.dtype), length(rng, most), rng.random_bool(0.3));
                Held::new(gpu, rng, shape, form, tokens, cut)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let views = held.iter().map(Held::view).collect::<Result<Vec<_>, _>>()?;
        let q = numbers(rng, heads * shape.head_dim);
        // Some queries are so aligned that one weight is nearly 1, some so flat that all are equal.
        let scale = [0.01, 1.0, 4.0][rng.random_range(0..3)] / (shape.head_dim as f32).sqrt();
        let mut out = Partials::empty(gpu, 1, heads, shape.head_dim)?;
        let mut decode = Decode::new(gpu, shape, heads)?;
        let rounded: Vec<f32> = q.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        let as_bf16: Vec<half::bf16> = q.iter().map(|&x| half::bf16::from_f32(x)).collect();
        let (in_f32, in_bf16) = (gpu.upload(&q)?, gpu.upload(&as_bf16)?);
        let (query, q) = if rng.random_bool(0.5) {
            (Query::f32(&in_f32), &q)
        } else {
            (Query::bf16(&in_bf16), &rounded)
        };
        let rows: Vec<_> = held.iter().map(|held| &held.rows).collect();
        let lengths: Vec<_> = held.iter().map(|held| held.lengths.clone()).collect();
        let (o, lse) = reference::attend(shape, q, scale, &rows, &lengths);
        // Twice with the same workspace: the first must leave it as it was.
        for round in 0..2 {
            out.poison(0xff)?;
            decode.attend(gpu, query, &views, scale, &mut out)?;
            let describe = || {
                let forms: Vec<_> = held
                    .iter()
                    .map(|held| (held.form, held.rows.tokens, &held.lengths))
                    .collect();
                format!("decode {shape:?}, {heads} heads, scale {scale}, round {round}, {forms:?}")
            };
            tally.count(distance(&out.o().download()?, &o), limit(shape.dtype), describe);
            // An error of lse is a relative error of the sum of weights.
            let apart = furthest(&out.lse().download()?, &lse);
            tally.count(apart, limit(shape.dtype), || format!("lse of {}", describe()));
        }
    }
    Ok(())
}

fn recorded(gpu: &Gpu, rng: &mut StdRng, _: usize, tally: &mut Tally) -> Result<(), GpuError> {
    let shape = KvShape {
        dtype: Dtype::Bf16,
        kv_heads: 8,
        head_dim: 128,
    };
    let fixed = Held::new(gpu, rng, shape, Form::Paged, 640, false)?;
    let rows = Held::new(gpu, rng, shape, Form::Records, 2048, true)?;
    let q = numbers(rng, 32 * 128);
    let on_device = gpu.upload(&q)?;
    let (mut direct, mut replayed) = (Partials::empty(gpu, 1, 32, 128)?, Partials::empty(gpu, 1, 32, 128)?);
    let mut decode = Decode::new(gpu, shape, 32)?;
    let views = [fixed.view()?, rows.view()?];
    decode.attend(gpu, Query::f32(&on_device), &views, 0.09, &mut direct)?;
    replayed.poison(0xff)?;
    let graph = gpu.record(|gpu| decode.attend(gpu, Query::f32(&on_device), &views, 0.09, &mut replayed))?;
    for _ in 0..3 {
        graph.replay()?;
    }
    drop(graph);
    let expected: Vec<f64> = direct.o().download()?.iter().map(|&x| f64::from(x)).collect();
    tally.count(distance(&replayed.o().download()?, &expected), 0.0, || {
        "replayed decode".into()
    });
    let lengths = [fixed.lengths.clone(), rows.lengths.clone()];
    let (o, _) = reference::attend(shape, &q, 0.09, &[&fixed.rows, &rows.rows], &lengths);
    tally.count(distance(&replayed.o().download()?, &o), 1e-2, || {
        "replayed decode, reference".into()
    });
    Ok(())
}

fn merged(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for _ in 0..cases {
        let (heads, head_dim) = (rng.random_range(1..40), [64, 80, 128, 300][rng.random_range(0..4)]);
        let mut sets = Vec::new();
        for _ in 0..rng.random_range(0..=MAX_VIEWS) {
            let mut o = numbers(rng, heads * head_dim);
            let mut lse = vec![f32::NEG_INFINITY; heads];
            for (lse, o) in lse.iter_mut().zip(o.chunks_exact_mut(head_dim)) {
                match rng.random_range(0..4) {
                    // What an empty set has as output is nobody's business.
                    0 => o.fill(f32::NAN),
                    1 => *lse = rng.random_range(-300.0..300.0),
                    _ => *lse = rng.random_range(-3.0..3.0),
                }
            }
            sets.push((o, lse));
        }
        let mut held = Vec::new();
        for (o, lse) in &sets {
            let mut set = Partials::empty(gpu, 1, heads, head_dim)?;
            set.upload(o, lse)?;
            held.push(set);
        }
        let mut out = Partials::empty(gpu, 1, heads, head_dim)?;
        out.poison(0xff)?;
        merge(gpu, &held.iter().collect::<Vec<_>>(), &mut out)?;
        let (o, lse) = reference::merge(&sets, heads, head_dim);
        let describe = || format!("merge of {} sets, {heads} heads of {head_dim}", sets.len());
        tally.count(distance(&out.o().download()?, &o), 1e-5, describe);
        tally.count(distance(&out.lse().download()?, &lse), 1e-5, describe);
    }
    Ok(())
}

fn copied(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for _ in 0..cases {
        let shape = any_shape(rng);
        let (form, tokens, cut) = (any_form(rng, shape.dtype), length(rng, 700), rng.random_bool(0.2));
        let from = Held::new(gpu, rng, shape, form, tokens, cut)?;
        let dtype = match (shape.dtype, rng.random_range(0..3)) {
            (Dtype::E4m3, 0) => Dtype::Bf16,
            (Dtype::E4m3, 1) => Dtype::F16,
            (_, 2) => Dtype::E4m3,
            (same, _) => same,
        };
        let target = KvShape { dtype, ..shape };
        let room = tokens + rng.random_range(0..3);
        let pages: Vec<u32> = (0..tokens.div_ceil(PAGE_TOKENS) as u32).rev().collect();
        let table = PageTable::upload(gpu, &pages)?;
        let form_of_target = rng.random_range(0..3);
        let (layout, count) = match form_of_target {
            0 => (Layout::block(target, room), 1),
            1 => (Layout::records(target, room), 1),
            _ => (Layout::block(target, PAGE_TOKENS), pages.len() + 1),
        };
        let placement = Placement {
            shape: target,
            layout,
            pages: (form_of_target == 2).then_some((PAGE_TOKENS, pages)),
        };
        // What is not written must stay as it was, so the expected bytes begin with the same poison.
        let mut expected = vec![0xa5; layout.bytes * count];
        let mut buffer = gpu.upload(&expected)?;
        let mut to = match form_of_target {
            0 => KvViewMut::block(target, &mut buffer, room, tokens)?,
            1 => KvViewMut::records(target, &mut buffer, room, tokens)?,
            _ => KvViewMut::paged(target, &mut buffer, PAGE_TOKENS, &table, tokens)?,
        };
        copy_rows(gpu, &from.view()?, &mut to)?;
        from.placement
            .copy(&from.host, &placement, &mut expected, &from.lengths);
        let wrong = buffer.download()?.iter().zip(&expected).filter(|(a, b)| a != b).count();
        tally.count(wrong as f64, 0.0, || {
            format!("copy {tokens} of {shape:?} {form:?} to {target:?} {layout:?}, cut {cut}")
        });
    }
    Ok(())
}

fn scored(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for _ in 0..cases {
        let shape = any_shape(rng);
        let heads = shape.kv_heads * [1, 3, 4, 11][rng.random_range(0..4)];
        let (form, tokens, cut) = (any_form(rng, shape.dtype), length(rng, 3000), rng.random_bool(0.3));
        let held = Held::new(gpu, rng, shape, form, tokens, cut)?;
        let q = numbers(rng, heads * shape.head_dim);
        let mut out = gpu.zeros::<f32>(heads * tokens)?;
        out.fill(0xff)?;
        key_scores(gpu, Query::f32(&gpu.upload(&q)?), heads, &held.view()?, 0.3, &mut out)?;
        let expected = reference::key_scores(shape, &q, 0.3, &held.rows, &held.lengths);
        tally.count(distance(&out.download()?, &expected), 1e-5, || {
            format!("key_scores {shape:?}, {heads} heads, {form:?} of {tokens}, cut {cut}")
        });
    }
    Ok(())
}

fn selected(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for case in 0..cases {
        let (rows, n) = (
            rng.random_range(1..5),
            1 + length(rng, if case % 8 == 0 { 200_000 } else { 5000 }),
        );
        let k = match rng.random_range(0..4) {
            0 => n,
            1 => 1,
            _ => rng.random_range(0..=n.min(4000)),
        };
        let kind = rng.random_range(0..4);
        let scores: Vec<f32> = (0..rows * n)
            .map(|_| match kind {
                0 => rng.random_range(-1.0..1.0),
                1 => rng.random_range(0..5) as f32 - 2.0,
                2 => [0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY][rng.random_range(0..4)],
                _ => f32::from_bits(rng.random()),
            })
            .collect();
        let mut out = gpu.upload(&vec![u32::MAX; rows * k])?;
        top_k(gpu, &gpu.upload(&scores)?, rows, k, &mut out)?;
        let expected: Vec<u32> = scores
            .chunks_exact(n)
            .flat_map(|row| reference::top_k(row, k))
            .collect();
        let wrong = out.download()?.iter().zip(&expected).filter(|(a, b)| a != b).count();
        tally.count(wrong as f64, 0.0, || {
            format!("top_k {k} of {n}, {rows} rows, kind {kind}")
        });
    }
    Ok(())
}
