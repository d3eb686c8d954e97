//! Prefill against its reference.

use std::ops::Range;

use half::{bf16, f16};
use kvasir_cuda::{
    Buffer, DeviceTiles, Dtype, Gpu, GpuError, HeadMask, KvShape, Mask, Prefill, Products, Query, plan::ROWS, reference,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    cases::{Form, Held, numbers},
    check::{Slow, Tally, distance, furthest},
};

/// Queries in the keys' type: the numbers after rounding, and the device's copy.
pub(crate) struct Queries {
    pub(crate) numbers: Vec<f32>,
    bits: Buffer<u16>,
    dtype: Dtype,
}

impl Queries {
    pub(crate) fn new(gpu: &Gpu, rng: &mut StdRng, dtype: Dtype, len: usize) -> Result<Self, GpuError> {
        let bits: Vec<u16> = numbers(rng, len)
            .into_iter()
            .map(|x| match dtype {
                Dtype::Bf16 => bf16::from_f32(x).to_bits(),
                _ => f16::from_f32(x).to_bits(),
            })
            .collect();
        Ok(Self {
            numbers: floats(dtype, &bits),
            bits: gpu.upload(&bits)?,
            dtype,
        })
    }

    pub(crate) fn query(&self) -> Query<'_> {
        Query::bits(&self.bits, self.dtype)
    }

    /// Rows of `width` numbers each.
    pub(crate) fn rows(&self, rows: Range<usize>, width: usize) -> Result<Query<'_>, GpuError> {
        Query::rows(&self.bits, self.dtype, rows, width)
    }
}

pub(crate) fn floats(dtype: Dtype, bits: &[u16]) -> Vec<f32> {
    bits.iter()
        .map(|&bits| match dtype {
            Dtype::Bf16 => bf16::from_bits(bits).to_f32(),
            _ => f16::from_bits(bits).to_f32(),
        })
        .collect()
}

/// Limit of the output, which is itself rounded to bf16 or f16.
pub(crate) fn limit(dtype: Dtype) -> f64 {
    if dtype == Dtype::Bf16 { 1e-2 } else { 2e-3 }
}

fn any_head(rng: &mut StdRng, offset: usize, rows: usize) -> HeadMask {
    let tokens = (offset + rows) as u32;
    let mut some = |most: usize| -> Vec<u32> {
        (0..rng.random_range(0..most))
            .map(|_| rng.random_range(0..tokens))
            .collect()
    };
    let (columns, slashes) = (some(150), some(6));
    match rng.random_range(0..5) {
        0 => HeadMask::Dense,
        1 => HeadMask::a_shape(ROWS, rng.random_range(0..100), rng.random_range(0..200)),
        2 => {
            let blocks = (0..rows.div_ceil(128)).map(|_| (0..3).map(|_| rng.random_range(0..=tokens / 64)).collect());
            HeadMask::block_sparse(ROWS, offset, &blocks.collect::<Vec<_>>())
        }
        // No tile at all: only columns, so that some rows see nothing.
        3 if rng.random_bool(0.3) => {
            let mut columns = columns;
            columns.sort_unstable();
            columns.dedup();
            HeadMask::Relative {
                tiles: Vec::new(),
                columns,
            }
        }
        _ => HeadMask::vertical_slash(ROWS, &columns, &slashes),
    }
}

pub(crate) fn any_case(gpu: &Gpu, rng: &mut StdRng) -> Result<(Held, usize, usize), GpuError> {
    let shape = KvShape {
        dtype: [Dtype::Bf16, Dtype::F16][rng.random_range(0..2)],
        kv_heads: rng.random_range(1..4),
        head_dim: [64, 128][rng.random_range(0..2)],
    };
    let most = [20, 200, 900][rng.random_range(0..3)];
    let tokens = rng.random_range(1..most);
    let rows = if rng.random_bool(0.5) {
        tokens
    } else {
        rng.random_range(1..=tokens)
    };
    let form = [Form::Block, Form::Records, Form::Paged, Form::Fresh][rng.random_range(0..4)];
    let q_heads = shape.kv_heads * [1, 3, 4][rng.random_range(0..3)];
    Ok((Held::new(gpu, rng, shape, form, tokens, false)?, rows, q_heads))
}

pub(crate) fn products(gpu: &Gpu) -> &'static [Products] {
    match Products::best(gpu) {
        Products::Mma => &[Products::Mma],
        Products::Wgmma => &[Products::Mma, Products::Wgmma],
    }
}

pub(crate) fn compare(
    gpu: &Gpu,
    held: &Held,
    q: &Queries,
    prefill: Prefill,
    tiles: &DeviceTiles,
    expected: &(Vec<f64>, Vec<f64>),
    tally: &mut Tally,
) -> Result<(), GpuError> {
    let shape = held.shape;
    let mut out = gpu.upload(&vec![0xffffu16; q.numbers.len()])?;
    let mut lse = gpu.zeros::<f32>(prefill.q_heads * prefill.rows)?;
    lse.fill(0xff)?;
    prefill.attend(gpu, q.query(), &held.view()?, tiles, &mut out, &mut lse)?;
    let case = || format!("{prefill:?} of {} {shape:?} {:?}", held.rows.tokens, held.form);
    tally.count(
        distance(&floats(shape.dtype, &out.download()?), &expected.0),
        limit(shape.dtype),
        case,
    );
    tally.count(furthest(&lse.download()?, &expected.1), 1e-3, case);
    Ok(())
}

pub(crate) fn prefilled(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for _ in 0..cases {
        let (held, rows, q_heads) = any_case(gpu, rng)?;
        let offset = held.rows.tokens - rows;
        let list = Mask::new(ROWS, (0..q_heads).map(|_| any_head(rng, offset, rows)).collect()).expect("in order");
        let q = Queries::new(gpu, rng, held.shape.dtype, rows * q_heads * held.shape.head_dim)?;
        let scale = 0.1;
        let expected = reference::prefill(held.shape, &q.numbers, q_heads, &held.rows, &list, scale);
        let tiles = DeviceTiles::upload(gpu, &list)?;
        for &products in products(gpu) {
            let prefill = Prefill {
                rows,
                q_heads,
                scale,
                products,
            };
            compare(gpu, &held, &q, prefill, &tiles, &expected, tally)?;
        }
    }
    Ok(())
}

/// Kernels whose threads dawdle wherever they wait for each other give the same bits as kernels that do not, time and again:
/// nothing hangs on who comes first.
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
        // Each open GPU has buffers of its own, so both draw the same numbers.
        let seed: u64 = rng.random();
        let bits = |gpu: &Gpu, times: usize| {
            let mut rng = StdRng::seed_from_u64(seed);
            let (held, rows, q_heads) = any_case(gpu, &mut rng)?;
            let offset = held.rows.tokens - rows;
            let heads = (0..q_heads).map(|_| any_head(&mut rng, offset, rows)).collect();
            let list = Mask::new(ROWS, heads).expect("in order");
            let q = Queries::new(gpu, &mut rng, held.shape.dtype, rows * q_heads * held.shape.head_dim)?;
            let tiles = DeviceTiles::upload(gpu, &list)?;
            let prefill = Prefill {
                rows,
                q_heads,
                scale: 0.1,
                products: Products::Wgmma,
            };
            let mut out = gpu.zeros::<u16>(q.numbers.len())?;
            let mut lse = gpu.zeros::<f32>(q_heads * rows)?;
            let mut all = Vec::new();
            for _ in 0..times {
                out.fill(0xff)?;
                lse.fill(0xff)?;
                prefill.attend(gpu, q.query(), &held.view()?, &tiles, &mut out, &mut lse)?;
                let lse = lse.download()?.into_iter().map(f32::to_bits);
                all.push((out.download()?, lse.collect::<Vec<_>>()));
            }
            Ok::<_, GpuError>((
                all,
                format!("{prefill:?} of {} {:?} {:?}", held.rows.tokens, held.shape, held.form),
            ))
        };
        let (quick, case) = bits(gpu, 1)?;
        for dawdled in bits(&slow, 3)?.0 {
            let wrong = u8::from(dawdled != quick[0]);
            tally.count(f64::from(wrong), 0.0, || {
                format!("other bits when threads dawdle: {case}")
            });
        }
    }
    Ok(())
}
