//! Products of rows with a matrix: against the reference, in any company, and with threads that dawdle.

use kvasir_cuda::{Gpu, GpuError, Matrix, Products, Rows, Sums, linear, reference};
use rand::{Rng, rngs::StdRng};

use crate::{
    cases::numbers,
    check::{Slow, Tally, distance},
    forward::{any_dtype, floats, rounded, rounding},
};

/// Every way of reading and of storing; then the same rows in other company must have the same bits.
pub(crate) fn products(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for case in 0..cases {
        let dtype = any_dtype(rng);
        let rows = [Rows::Few, Rows::Many][case % 2];
        let m = match rng.random_range(0..3) {
            0 => rng.random_range(1..=9),
            1 => rng.random_range(1..=70),
            _ => rng.random_range(1..=300),
        };
        // One in eight is large enough for the large tiles.
        let most = if case % 8 == 1 { 9000 } else { 400 };
        let (n, k) = (rng.random_range(1..=most), 32 * rng.random_range(1..=30));
        let m = if case % 8 == 1 { m + 500 } else { m };
        let ((x_bits, x), (w_bits, w)) = (rounded(rng, dtype, m * k), rounded(rng, dtype, n * k));
        let matrix = Matrix::upload(gpu, dtype, n, k, &w_bits)?;
        let x_buffer = gpu.upload(&x_bits)?;
        let from = rng.random_range(0..m);
        let to = rng.random_range(0..3);
        let before = numbers(rng, (to + m - from) * n);
        let mut sums = gpu.upload(&before)?;
        linear(gpu, rows, &matrix, &x_buffer, from..m, Sums::Add(&mut sums), to)?;
        let expected = reference::linear(&x[from * k..], &w, k);
        let describe = || format!("linear {rows:?} {dtype:?} [{m}, {k}] from {from}, {n} results");
        let added: Vec<f64> = before[..to * n]
            .iter()
            .map(|&x| f64::from(x))
            .chain(
                before[to * n..]
                    .iter()
                    .zip(&expected)
                    .map(|(&before, sum)| f64::from(before) + sum),
            )
            .collect();
        tally.count(distance(&sums.download()?, &added), 1e-5, || {
            format!("{} added", describe())
        });
        let mut stored = gpu.zeros::<f32>((m - from) * n)?;
        stored.fill(0xff)?;
        linear(gpu, rows, &matrix, &x_buffer, from..m, Sums::StoreF32(&mut stored), 0)?;
        let all = stored.download()?;
        tally.count(distance(&all, &expected), 1e-5, describe);
        let mut narrow = gpu.zeros::<u16>((m - from) * n)?;
        narrow.fill(0xff)?;
        linear(gpu, rows, &matrix, &x_buffer, from..m, Sums::Store(&mut narrow), 0)?;
        tally.count(distance(&floats(dtype, &narrow)?, &expected), rounding(dtype), || {
            format!("{} rounded", describe())
        });
        let alone = rng.random_range(from..m);
        let mut one = gpu.zeros::<f32>(n)?;
        linear(
            gpu,
            rows,
            &matrix,
            &x_buffer,
            alone..alone + 1,
            Sums::StoreF32(&mut one),
            0,
        )?;
        let company = &all[(alone - from) * n..][..n];
        let one = one.download()?;
        let differ = one.iter().zip(company).filter(|(a, b)| a.to_bits() != b.to_bits());
        tally.count(differ.count() as f64, 0.0, || {
            format!("{} row {alone} alone", describe())
        });
    }
    Ok(())
}

/// As `prefill::delayed`, of products.
pub(crate) fn delayed(
    gpu: &Gpu,
    slow: Slow<'_>,
    rng: &mut StdRng,
    cases: usize,
    tally: &mut Tally,
) -> Result<(), GpuError> {
    if Products::best(gpu) != Products::Wgmma {
        println!("the kernels of this GPU have no barriers of their own to dawdle at");
        return Ok(());
    }
    let slow = match slow() {
        Ok(slow) => slow,
        Err(why) => {
            tally.count(1.0, 0.0, || format!("the GPU cannot be opened twice: {why}"));
            return Ok(());
        }
    };
    for _ in 0..cases {
        let (dtype, m) = (any_dtype(rng), rng.random_range(1..600));
        let (n, k) = (rng.random_range(1..2000), 32 * rng.random_range(1..40));
        let ((x, _), (w, _)) = (rounded(rng, dtype, m * k), rounded(rng, dtype, n * k));
        let bits = |gpu: &Gpu| {
            let (matrix, x) = (Matrix::upload(gpu, dtype, n, k, &w)?, gpu.upload(&x)?);
            let mut out = gpu.zeros::<f32>(m * n)?;
            out.fill(0xff)?;
            linear(gpu, Rows::Many, &matrix, &x, 0..m, Sums::StoreF32(&mut out), 0)?;
            Ok::<_, GpuError>(out.download()?.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        let (quick, dawdled) = (bits(gpu)?, bits(&slow)?);
        let wrong = quick.iter().zip(&dawdled).filter(|(a, b)| a != b).count();
        tally.count(wrong as f64, 0.0, || {
            format!("other bits when threads dawdle: {dtype:?} [{m}, {k}], {n} results")
        });
    }
    Ok(())
}
