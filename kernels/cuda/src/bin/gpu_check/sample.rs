//! Drawing tokens: against the definition on the CPU, token for token.

use kvasir_cuda::{Gpu, GpuError, SampleRow, SampleRows, VOCAB_MAX, reference};
use rand::{Rng, rngs::StdRng};

use crate::{cases::numbers, check::Tally};

/// Of the logarithm of a token's share.
const LIMIT: f64 = 1e-4;

fn any_row(rng: &mut StdRng) -> SampleRow {
    SampleRow {
        temperature: [0.0, 0.05, 0.7, 1.0, 2.0, f32::NAN][rng.random_range(0..6)],
        top_p: match rng.random_range(0..4) {
            0 => 1.0,
            1 => 1e-6,
            _ => rng.random_range(0.01..1.0),
        },
        uniform: match rng.random_range(0..8) {
            0 => 0.0,
            1 => 1.0 - f64::EPSILON / 2.0,
            _ => rng.random(),
        },
    }
}

/// One row: bell-like, with one token far above, flat with few values, of one value alone, or with what is not finite.
fn any_logits(rng: &mut StdRng, vocab: usize) -> Vec<f32> {
    let mut logits = numbers(rng, vocab);
    match rng.random_range(0..6) {
        0 => logits.iter_mut().for_each(|logit| *logit *= 6.0),
        1 => logits[rng.random_range(0..vocab)] = 40.0,
        2 => logits.iter_mut().for_each(|logit| *logit = logit.round()),
        3 => logits.fill(-3.25),
        4 => logits.iter_mut().for_each(|logit| {
            *logit = [*logit, *logit, f32::NAN, f32::NEG_INFINITY, -0.0][rng.random_range(0..5)];
        }),
        _ => logits.iter_mut().for_each(|logit| {
            if rng.random_bool(0.3) {
                *logit = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][rng.random_range(0..3)];
            }
        }),
    }
    logits
}

pub(crate) fn sampled(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for case in 0..cases {
        let vocab = match case % 4 {
            0 => [49_152, 128_256, VOCAB_MAX, 8193][rng.random_range(0..4)],
            1 => rng.random_range(1..40),
            _ => rng.random_range(1..20_000),
        };
        let count = rng.random_range(1..6);
        let logits: Vec<f32> = (0..count).flat_map(|_| any_logits(rng, vocab)).collect();
        let on_device = gpu.upload(&logits)?;
        let mut rows = SampleRows::new(gpu, vocab, count + 1)?;
        let mut graph = None;
        // Three times with the same workspace, the last two recorded: each must leave it as it was, and each draw is its own.
        for round in 0..3 {
            let set: Vec<SampleRow> = (0..count).map(|_| any_row(rng)).collect();
            rows.set(gpu, &set)?;
            match round {
                0 => rows.sample(gpu, &on_device, count)?,
                1 => {
                    let recorded = gpu.record(|gpu| rows.sample(gpu, &on_device, count))?;
                    recorded.replay()?;
                    graph = Some(recorded);
                }
                _ => graph.as_ref().map_or(Ok(()), kvasir_cuda::Graph::replay)?,
            }
            for ((found, set), logits) in rows.read(count)?.iter().zip(&set).zip(logits.chunks_exact(vocab)) {
                let expected = reference::sample(logits, set);
                let describe = || format!("{set:?} of {vocab}, round {round}: {found:?} for {expected:?}");
                tally.count(f64::from(found.token != expected.token), 0.0, describe);
                let apart = match (found.logprob.is_nan(), expected.logprob.is_nan()) {
                    (true, true) => 0.0,
                    _ if found.logprob == expected.logprob => 0.0,
                    _ => f64::from((found.logprob - expected.logprob).abs()),
                };
                tally.count(apart, LIMIT, || format!("logarithm of {}", describe()));
            }
        }
    }
    Ok(())
}
