use super::*;

#[test]
fn e4m3_has_the_published_landmarks() {
    // OCP 8-bit Floating Point Specification 1.0, table of e4m3.
    let landmarks = [
        (0x00, 0.0),
        (0x01, 0.001_953_125),
        (0x07, 0.013_671_875),
        (0x08, 0.015_625),
        (0x38, 1.0),
        (0x7e, 448.0),
    ];
    for (code, value) in landmarks {
        assert_eq!(
            (e4m3_to_f32(code), e4m3_to_f32(code | 0x80)),
            (value, -value),
            "{code:#x}"
        );
    }
    assert!(e4m3_to_f32(0x7f).is_nan());
}

#[test]
fn every_code_comes_back_and_middles_go_to_even() {
    for code in (0..=0x7e).chain(0x80..=0xfe) {
        assert_eq!(e4m3_from_f32(e4m3_to_f32(code)), code, "{code:#x}");
    }
    for low in 0..0x7e_u8 {
        let middle = (e4m3_to_f32(low) + e4m3_to_f32(low + 1)) / 2.0;
        assert_eq!(e4m3_from_f32(middle), low + (low & 1), "{low:#x}");
    }
    for (x, code) in [
        (1e9, 0x7e),
        (-1e9, 0xfe),
        (f32::INFINITY, 0x7e),
        (f32::NAN, 0x7f),
        (-0.0, 0x80),
    ] {
        assert_eq!(e4m3_from_f32(x), code, "{x}");
    }
}

#[test]
fn quantized_rows_are_within_a_sixteenth_of_each_number() {
    let row: Vec<f32> = (0..128).map(|i| (i as f32 - 60.5) * 0.37).collect();
    let (codes, scale) = quantize(&row);
    let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    for (x, back) in row.iter().zip(dequantize(&codes, scale)) {
        assert!((x - back).abs() <= x.abs() / 16.0 + most / 448.0 / 512.0, "{x} {back}");
    }
    assert_eq!(quantize(&[0.0, 1e-38, 0.0]), (vec![0, 0, 0], 1.0));
}

#[test]
fn layouts_write_and_read_the_same_rows() {
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::E4m3] {
        let shape = KvShape {
            dtype,
            kv_heads: 3,
            head_dim: 64,
        };
        let tokens = 37;
        let values = |from: usize| {
            (0..3 * tokens * 64)
                .map(|i| ((i * 7 + from) % 61) as f32 - 30.0)
                .collect()
        };
        let rows = Rows {
            k: values(0),
            v: values(13),
            tokens,
        };
        let cases = [
            (Layout::block(shape, 40), None, 1),
            (Layout::records(shape, 40), None, 1),
            (Layout::block(shape, 16), Some((16, vec![4, 1, 3])), 5),
        ];
        for (layout, pages, count) in cases {
            let placement = Placement { shape, layout, pages };
            let mut bytes = vec![0xff; layout.bytes * count];
            placement.write(&rows, &mut bytes);
            let back = placement.read(tokens, &bytes);
            let worst = rows
                .k
                .iter()
                .zip(&back.k)
                .chain(rows.v.iter().zip(&back.v))
                .map(|(a, b)| (a - b).abs());
            let limit = if dtype == Dtype::E4m3 { 2.0 } else { 0.0 };
            assert!(worst.fold(0.0, f32::max) <= limit, "{dtype:?} {layout:?}");
        }
    }
}

#[test]
fn attention_over_parts_merged_is_attention_over_all() {
    let shape = KvShape {
        dtype: Dtype::F16,
        kv_heads: 2,
        head_dim: 64,
    };
    let rows = |tokens: usize, from: usize| Rows {
        k: (0..2 * tokens * 64)
            .map(|i| ((i * 5 + from) % 17) as f32 / 8.0 - 1.0)
            .collect(),
        v: (0..2 * tokens * 64)
            .map(|i| ((i * 3 + from) % 23) as f32 / 8.0 - 1.0)
            .collect(),
        tokens,
    };
    let q: Vec<f32> = (0..6 * 64).map(|i| (i % 11) as f32 / 8.0 - 0.5).collect();
    let (a, b, none) = (rows(5, 1), rows(9, 2), rows(0, 0));
    let all = |rows: &Rows| vec![rows.tokens; 2];
    let (o, lse) = attend(shape, &q, 0.125, &[&a, &b], &[all(&a), all(&b)]);
    let part = |rows: &Rows| {
        let (o, lse) = attend(shape, &q, 0.125, &[rows], &[all(rows)]);
        (
            o.iter().map(|&x| x as f32).collect(),
            lse.iter().map(|&x| x as f32).collect(),
        )
    };
    let (joined, joined_lse) = merge(&[part(&a), part(&none), part(&b)], 6, 64);
    for (x, y) in o.iter().chain(&lse).zip(joined.iter().chain(&joined_lse)) {
        assert!((x - y).abs() < 1e-5, "{x} {y}");
    }
    assert_eq!(part(&none), (vec![0.0; 6 * 64], vec![f32::NEG_INFINITY; 6]));
}

#[test]
fn top_k_prefers_the_lower_of_equals() {
    let scores = [1.0, 3.0, -0.0, 3.0, 0.0, f32::NEG_INFINITY, 3.0];
    for (k, expected) in [
        (0, vec![]),
        (2, vec![1, 3]),
        (5, vec![0, 1, 2, 3, 6]),
        (9, (0..7).collect()),
    ] {
        assert_eq!(top_k(&scores, k), expected, "{k}");
    }
}
