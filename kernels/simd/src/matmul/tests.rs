use half::f16;
use kvasir_reference as reference;
use proptest::prelude::*;

use super::*;
use crate::testing::{bits, bytes, error, values};

/// GGUF blocks of random integers with finite scales: any byte is a valid quant, -128 included.
fn raw(seed: u64, blocks: usize, block_bytes: usize, scales: usize) -> Vec<u8> {
    let mut raw = bytes(seed, blocks * block_bytes);
    let scale = values(seed + 1, blocks * scales);
    for (block, scale) in raw.chunks_exact_mut(block_bytes).zip(scale.chunks_exact(scales)) {
        for (at, scale) in block.chunks_exact_mut(2).zip(scale) {
            at.copy_from_slice(&f16::from_f32(scale * 0.01).to_le_bytes());
        }
    }
    raw
}

fn product(isa: Isa, weights: &Weights, x: &[f32], pool: &Pool) -> Vec<f32> {
    let mut quantised = Activations::default();
    quantised.quantize_on(isa, x, weights.cols(), pool);
    let mut out = vec![f32::NAN; quantised.tokens() * weights.rows()];
    matmul_on(isa, &quantised, &mut [(weights, &mut out)], pool);
    out
}

/// Both formats with the matrix in f32.
fn matrices(seed: u64, rows: usize, cols: usize) -> [(Weights, Vec<f32>); 2] {
    let blocks = rows * cols / 32;
    let four = raw(seed, blocks, 20, 2);
    let eight = raw(seed + 5, blocks, 34, 1);
    [
        (
            Weights::from_q4_1(&four, rows, cols).unwrap(),
            reference::dequantize_q4_1(&four),
        ),
        (
            Weights::from_q8_0(&eight, rows, cols).unwrap(),
            reference::dequantize_q8_0(&eight),
        ),
    ]
}

/// The truth within 3e-6 of the largest output, and equal bits on every instruction set and any number of threads.
fn check(seed: u64, rows: usize, cols: usize, tokens: usize, pool: &Pool) {
    for (weights, plain) in matrices(seed, rows, cols) {
        let mut row = vec![0.0; cols];
        for (r, plain) in plain.chunks_exact(cols).enumerate() {
            weights.dequantize_row(r, &mut row);
            assert!(error(&row, &plain.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()) < 1e-7);
        }
        let x = values(seed + 9, tokens * cols);
        let scalar = product(Isa::Scalar, &weights, &x, &Pool::new(1));
        let truth = reference::quantized_matmul(&plain, rows, cols, &x);
        assert!(
            error(&scalar, &truth) < 3e-6,
            "{rows}x{cols} {tokens}: off by {}",
            error(&scalar, &truth)
        );
        for isa in Isa::available() {
            assert_eq!(
                bits(&product(isa, &weights, &x, pool)),
                bits(&scalar),
                "{isa:?} {rows}x{cols} {tokens}"
            );
        }
    }
}

#[test]
fn truth_on_the_shapes_of_a_small_llama() {
    let pool = Pool::new(3);
    for (rows, cols, tokens) in [
        (576, 576, 1),
        (192, 576, 13),
        (1536, 576, 3),
        (576, 1536, 2),
        (1, 32, 1),
        (17, 64, 9),
    ] {
        check(1, rows, cols, tokens, &pool);
    }
}

#[test]
fn a_token_has_the_same_bits_in_any_batch() {
    let pool = Pool::new(2);
    for (weights, _) in matrices(4, 80, 96) {
        let x = values(8, 23 * 96);
        let whole = product(Isa::active(), &weights, &x, &pool);
        for tokens in [0..1, 1..3, 2..9, 5..23, 22..23] {
            let part = product(Isa::active(), &weights, &x[tokens.start * 96..tokens.end * 96], &pool);
            assert_eq!(
                bits(&part),
                bits(&whole[tokens.start * 80..tokens.end * 80]),
                "{tokens:?}"
            );
        }
    }
}

#[test]
fn several_products_are_each_their_own() {
    let pool = Pool::new(2);
    let [(a, _), (b, _)] = matrices(6, 48, 64);
    let x = values(2, 5 * 64);
    let mut quantised = Activations::default();
    quantised.quantize(&x, 64, &pool);
    let (mut out_a, mut out_b) = (vec![0.0; 5 * 48], vec![0.0; 5 * 48]);
    matmul_many(&quantised, &mut [(&a, &mut out_a), (&b, &mut out_b)], &pool);
    assert_eq!(out_a, product(Isa::active(), &a, &x, &pool));
    assert_eq!(out_b, product(Isa::active(), &b, &x, &pool));
}

#[test]
fn the_largest_integers_do_not_overflow() {
    // All weights at their largest and smallest, all activations at the ends of their range.
    let mut raw4 = vec![0xff_u8; 40];
    let mut raw8 = vec![0x80_u8; 68];
    for block in raw4.chunks_exact_mut(20) {
        block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
        block[2..4].copy_from_slice(&f16::ZERO.to_le_bytes());
    }
    for block in raw8.chunks_exact_mut(34) {
        block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
    }
    let (four, eight) = (
        Weights::from_q4_1(&raw4, 1, 64).unwrap(),
        Weights::from_q8_0(&raw8, 1, 64).unwrap(),
    );
    for isa in Isa::available() {
        for sign in [1.0, -1.0] {
            let x = vec![sign * 127.0; 64];
            assert_eq!(
                product(isa, &four, &x, &Pool::new(1)),
                [sign * 127.0 * 15.0 * 64.0],
                "{isa:?}"
            );
            assert_eq!(
                product(isa, &eight, &x, &Pool::new(1)),
                [sign * 127.0 * -128.0 * 64.0],
                "{isa:?}"
            );
        }
    }
}

#[test]
fn odd_inputs_do_not_panic_and_agree() {
    for x in [f32::NAN, f32::INFINITY, f32::MIN_POSITIVE, 1e-40, 0.0, -0.0, f32::MAX] {
        let weights = Weights::from_f32(&values(1, 64), 2, 32).unwrap();
        let mut row = values(2, 32);
        row[7] = x;
        let scalar = product(Isa::Scalar, &weights, &row, &Pool::new(1));
        for isa in Isa::available() {
            let found = product(isa, &weights, &row, &Pool::new(1));
            for (a, b) in found.iter().zip(&scalar) {
                assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{isa:?} {x}");
            }
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    use crate::ShapeError;
    assert_eq!(
        Weights::from_q4_1(&[0; 20], 1, 33).err(),
        Some(ShapeError::Columns { cols: 33 })
    );
    assert_eq!(
        Weights::from_q8_0(&[0; 33], 1, 32).err(),
        Some(ShapeError::Length {
            expected: 34,
            found: 33
        })
    );
    assert_eq!(Weights::from_f32(&[], usize::MAX, 64).err(), Some(ShapeError::TooLarge));
    assert_eq!(Weights::from_q4_1(&[], 0, 32).map(|weights| weights.rows()), Ok(0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn truth_on_any_shape(seed in 0_u64..1000, rows in 1_usize..70, blocks in 1_usize..7, tokens in 0_usize..20) {
        check(seed, rows, blocks * 32, tokens, &Pool::new(2));
    }
}
