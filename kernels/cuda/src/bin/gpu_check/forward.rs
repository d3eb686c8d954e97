//! What a forward is made of besides attention, and attention of a step's rows: against the references.

use half::{bf16, f16};
use kvasir_cuda::{
    Buffer, DecodeRows, Dtype, Gpu, GpuError, KvShape, Layout, Matrix, Pairs, Partials, Rope, RowsOut, StepLimits,
    StepRow, StepRows, embed, reference, reference::Placement, rms_norm, round, silu_mul,
};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};

use crate::{
    cases::{PAGE_TOKENS, numbers},
    check::{Tally, distance, limit},
};

fn bits(dtype: Dtype, x: f32) -> u16 {
    match dtype {
        Dtype::Bf16 => bf16::from_f32(x).to_bits(),
        _ => f16::from_f32(x).to_bits(),
    }
}

fn float(dtype: Dtype, bits: u16) -> f32 {
    match dtype {
        Dtype::Bf16 => bf16::from_bits(bits).to_f32(),
        _ => f16::from_bits(bits).to_f32(),
    }
}

/// Random numbers that `dtype` holds, as bits and as floats.
pub(crate) fn rounded(rng: &mut StdRng, dtype: Dtype, len: usize) -> (Vec<u16>, Vec<f32>) {
    let bits: Vec<u16> = numbers(rng, len).into_iter().map(|x| bits(dtype, x)).collect();
    let floats = bits.iter().map(|&bits| float(dtype, bits)).collect();
    (bits, floats)
}

pub(crate) fn floats(dtype: Dtype, buffer: &Buffer<u16>) -> Result<Vec<f32>, GpuError> {
    Ok(buffer.download()?.into_iter().map(|bits| float(dtype, bits)).collect())
}

/// Error of a result that was itself rounded: half a step of the type, and a little.
pub(crate) fn rounding(dtype: Dtype) -> f64 {
    if dtype == Dtype::Bf16 { 4e-3 } else { 5e-4 }
}

pub(crate) fn any_dtype(rng: &mut StdRng) -> Dtype {
    [Dtype::Bf16, Dtype::F16][rng.random_range(0..2)]
}

pub(crate) fn rows(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for _ in 0..cases {
        let dtype = any_dtype(rng);
        let (count, hidden) = (rng.random_range(1..40), 4 * rng.random_range(1..400));
        let (x, weight) = (numbers(rng, count * hidden), numbers(rng, hidden));
        let mut out = gpu.zeros::<u16>(count * hidden)?;
        out.fill(0xff)?;
        rms_norm(
            gpu,
            dtype,
            &gpu.upload(&x)?,
            &gpu.upload(&weight)?,
            1e-5,
            0..count,
            &mut out,
        )?;
        let expected = reference::rms_norm(&x, &weight, 1e-5);
        tally.count(distance(&floats(dtype, &out)?, &expected), rounding(dtype), || {
            format!("rms_norm {dtype:?} [{count}, {hidden}]")
        });

        let inner = hidden / 2;
        let (gate_up, values) = rounded(rng, dtype, count * 2 * inner);
        let mut out = gpu.zeros::<u16>(count * inner)?;
        out.fill(0xff)?;
        silu_mul(gpu, dtype, &gpu.upload(&gate_up)?, inner, 0..count, &mut out)?;
        let expected = reference::silu_mul(&values, inner);
        tally.count(distance(&floats(dtype, &out)?, &expected), rounding(dtype), || {
            format!("silu_mul {dtype:?} [{count}, {inner}]")
        });

        let mut narrow = gpu.zeros::<u16>(count * hidden + 2)?;
        round(gpu, dtype, &gpu.upload(&x)?, &mut narrow, 2)?;
        let expected = x.iter().map(|&x| bits(dtype, x));
        let wrong = narrow.download()?[2..]
            .iter()
            .zip(expected)
            .filter(|(a, b)| **a != *b)
            .count();
        tally.count(wrong as f64, 0.0, || format!("round {dtype:?} [{count}, {hidden}]"));
    }
    Ok(())
}

/// Embedding, then rope with the way into pages, then attention of the rows: all of them led by one step's numbers.
pub(crate) fn steps(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for case in 0..cases {
        let shape = KvShape {
            dtype: any_dtype(rng),
            kv_heads: [1, 2, 3, 8][rng.random_range(0..4)],
            head_dim: [64, 128][rng.random_range(0..2)],
        };
        let (d, q_heads) = (shape.head_dim, shape.kv_heads * [1, 3, 4][rng.random_range(0..3)]);
        let count = rng.random_range(1..12);
        let most = if case % 8 == 0 { 9000 } else { 700 };
        let pages = most / PAGE_TOKENS * 3 + 2;
        let limits = StepLimits {
            vocab: 50,
            positions: 4000,
            pages,
            page_tokens: PAGE_TOKENS,
        };
        let mut step = StepRows::new(gpu, limits, 16, 16, most / PAGE_TOKENS + 1)?;
        let mut free: Vec<u32> = (0..pages as u32).collect();
        free.shuffle(rng);
        let slots = free.split_off(pages - count.min(pages));
        let (mut set, mut tables) = (Vec::new(), Vec::new());
        for row in 0..count {
            let sees = rng.random_range(0..=most);
            let numbers: Vec<u32> = (0..sees.div_ceil(PAGE_TOKENS))
                .map(|_| free[rng.random_range(0..free.len())])
                .collect();
            let slot = slots
                .get(row)
                .map(|&page| (page, rng.random_range(0..PAGE_TOKENS as u32)));
            set.push(StepRow {
                token: rng.random_range(0..50),
                position: rng.random_range(0..4000),
                slot: slot.filter(|_| row % 4 != 3),
                table: row as u32,
                sees: sees as u32,
            });
            tables.push(numbers);
        }
        step.set(gpu, &set, &tables)?;
        let describe = || format!("step {shape:?}, {q_heads} heads, {set:?}");

        let hidden = 32 * rng.random_range(1..10);
        let (table_bits, table) = rounded(rng, shape.dtype, 50 * hidden);
        let embeddings = Matrix::upload(gpu, shape.dtype, 50, hidden, &table_bits)?;
        let mut x = gpu.zeros::<f32>(count * hidden)?;
        x.fill(0xff)?;
        embed(gpu, &embeddings, &step, 0..count, &mut x)?;
        let expected = set
            .iter()
            .flat_map(|row| &table[row.token as usize * hidden..][..hidden]);
        let wrong = x.download()?.iter().zip(expected).filter(|(a, b)| a != b).count();
        tally.count(wrong as f64, 0.0, || format!("embed of {}", describe()));

        let heads = q_heads + 2 * shape.kv_heads;
        let (qkv_bits, qkv) = rounded(rng, shape.dtype, count * heads * d);
        let dims = if rng.random_bool(0.5) { d } else { d / 2 };
        let pairs = [Pairs::Interleaved, Pairs::Halves][rng.random_range(0..2)];
        let rope = Rope::new(gpu, 4000, dims, 10_000.0, pairs)?;
        let layout = Layout::block(shape, PAGE_TOKENS);
        let (pool_bits, _) = rounded(rng, shape.dtype, pages * layout.bytes / 2);
        let mut expected_pool: Vec<u8> = pool_bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let mut pool = gpu.upload(&pool_bits)?;
        let mut q = gpu.zeros::<u16>(count * q_heads * d)?;
        q.fill(0xff)?;
        rope.apply(
            gpu,
            shape,
            q_heads,
            &step,
            0..count,
            &gpu.upload(&qkv_bits)?,
            &mut q,
            Some(&mut pool),
        )?;
        let turn = |row: usize, head: usize| {
            let from = &qkv[(row * heads + head) * d..][..d];
            reference::rope(from, set[row].position as usize, dims, 10_000.0, pairs)
        };
        let expected: Vec<f64> = (0..count)
            .flat_map(|row| (0..q_heads).flat_map(move |head| turn(row, head)))
            .collect();
        let queries = floats(shape.dtype, &q)?;
        tally.count(distance(&queries, &expected), rounding(shape.dtype), || {
            format!("rope {pairs:?} of {dims} of {}", describe())
        });
        // Keys and values, each in its page, and nothing else changed.
        let placed = pool.download()?;
        let (mut worst, half) = (0.0f64, layout.bytes / 4);
        let mut expected_words: Vec<u16> = pool_bits.clone();
        for (row, (page, inside)) in set.iter().enumerate().filter_map(|(i, row)| Some((i, row.slot?))) {
            for head in 0..shape.kv_heads {
                let at = page as usize * 2 * half + (head * PAGE_TOKENS + inside as usize) * d;
                let key: Vec<f32> = placed[at..at + d]
                    .iter()
                    .map(|&bits| float(shape.dtype, bits))
                    .collect();
                worst = worst.max(distance(&key, &turn(row, q_heads + head)));
                expected_words[at..at + d].copy_from_slice(&placed[at..at + d]);
                let value = &qkv_bits[(row * heads + q_heads + shape.kv_heads + head) * d..][..d];
                expected_words[at + half..at + half + d].copy_from_slice(value);
            }
        }
        tally.count(worst, rounding(shape.dtype), || format!("keys of {}", describe()));
        let wrong = placed.iter().zip(&expected_words).filter(|(a, b)| a != b).count();
        tally.count(wrong as f64, 0.0, || format!("pages of {}", describe()));

        for (bytes, word) in expected_pool.chunks_exact_mut(2).zip(&placed) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        attended(
            gpu,
            rng,
            tally,
            &Attended {
                shape,
                q_heads,
                set: &set,
                tables: &tables,
                step: &step,
                q: &q,
                queries: &queries,
                pool: &pool,
                bytes: &expected_pool,
            },
        )?;
    }
    Ok(())
}

struct Attended<'a> {
    shape: KvShape,
    q_heads: usize,
    set: &'a [StepRow],
    tables: &'a [Vec<u32>],
    step: &'a StepRows,
    q: &'a Buffer<u16>,
    queries: &'a [f32],
    pool: &'a Buffer<u16>,
    bytes: &'a [u8],
}

fn attended(gpu: &Gpu, rng: &mut StdRng, tally: &mut Tally, case: &Attended<'_>) -> Result<(), GpuError> {
    let Attended { shape, q_heads, .. } = *case;
    let (count, width) = (case.set.len(), q_heads * shape.head_dim);
    let mut decode = DecodeRows::new(gpu, shape, q_heads, count)?;
    let mut rounded = gpu.zeros::<u16>(count * width)?;
    let mut partial = Partials::empty(gpu, 1, count * q_heads, shape.head_dim)?;
    for round in 0..2 {
        rounded.fill(0xff)?;
        partial.poison(0xff)?;
        decode.attend(
            gpu,
            case.q,
            case.step,
            0..count,
            case.pool,
            0.1,
            RowsOut::Rounded(&mut rounded),
        )?;
        decode.attend(
            gpu,
            case.q,
            case.step,
            0..count,
            case.pool,
            0.1,
            RowsOut::Partial(&mut partial),
        )?;
        let (narrow, wide) = (floats(shape.dtype, &rounded)?, partial.o().download()?);
        for (row, entry) in case.set.iter().enumerate() {
            let placement = Placement {
                shape,
                layout: Layout::block(shape, PAGE_TOKENS),
                pages: Some((PAGE_TOKENS, case.tables[row].clone())),
            };
            let held = placement.read(entry.sees as usize, case.bytes);
            let q = &case.queries[row * width..][..width];
            let lengths = vec![held.tokens; shape.kv_heads];
            let (o, _) = reference::attend(shape, q, 0.1, &[&held], &[lengths]);
            let describe = || format!("rows, round {round}: {entry:?} of {shape:?}, {q_heads} heads");
            tally.count(
                distance(&wide[row * width..][..width], &o),
                limit(shape.dtype),
                describe,
            );
            let most = limit(shape.dtype) + self::rounding(shape.dtype);
            tally.count(distance(&narrow[row * width..][..width], &o), most, describe);
        }
    }
    // The same row alone has the same bits.
    let row = rng.random_range(0..count);
    let together = rounded.download()?;
    rounded.fill(0xff)?;
    decode.attend(
        gpu,
        case.q,
        case.step,
        row..row + 1,
        case.pool,
        0.1,
        RowsOut::Rounded(&mut rounded),
    )?;
    let alone = rounded.download()?;
    let differ = (row * width..(row + 1) * width)
        .filter(|&i| alone[i] != together[i])
        .count();
    tally.count(differ as f64, 0.0, || format!("row {row} alone, {shape:?}"));
    Ok(())
}
