use bytes::Bytes;

use super::*;

const SHAPE: LinkShape = LinkShape {
    layers: 3,
    q_heads: 4,
    kv_heads: 2,
    head_dim: 8,
    softmax_scale: 0.3,
};

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32)
        .map(|i| ((i * 37 + seed * 101) % 97) as f32 / 48.5 - 1.0)
        .collect()
}

fn to_bytes(values: &[f32]) -> Bytes {
    values
        .iter()
        .flat_map(|value| f16::from_f32(*value).to_le_bytes())
        .collect::<Vec<u8>>()
        .into()
}

#[test]
fn rows_are_attended_by_every_query_head_of_their_group() {
    let q = values(32, 3);
    let heads: Vec<HeadRows> = [5usize, 1]
        .iter()
        .enumerate()
        .map(|(head, n)| HeadRows {
            positions: (0..*n as u32).map(|i| i * 3).collect(),
            sent: None,
            keys: to_bytes(&values(n * 8, 10 + head as u32)),
            values: to_bytes(&values(n * 8, 20 + head as u32)),
        })
        .collect();
    let (partial, count) = attend_rows(&heads, &q, SHAPE, 0, &mut Kept::default()).expect("well-formed rows");
    assert_eq!(count, RowCount { all: 6, kept: 0 });
    for q_head in 0..4 {
        // Plain attention in f64, straight from the definition.
        let rows = &heads[q_head / 2];
        let (keys, vals) = (read_f16(&rows.keys), read_f16(&rows.values));
        let scores: Vec<f64> = keys
            .chunks(8)
            .map(|key| {
                let dot: f64 = key
                    .iter()
                    .zip(&q[q_head * 8..])
                    .map(|(k, q)| f64::from(k.to_f32()) * f64::from(*q))
                    .sum();
                dot * 0.3 * std::f64::consts::LOG2_E
            })
            .collect();
        let sum: f64 = scores.iter().map(|score| score.exp2()).sum();
        assert!(
            (f64::from(partial.lse[q_head]) - sum.log2()).abs() < 1e-4,
            "lse of head {q_head}"
        );
        for d in 0..8 {
            let expected: f64 = scores
                .iter()
                .enumerate()
                .map(|(i, score)| score.exp2() / sum * f64::from(vals[i * 8 + d].to_f32()))
                .sum();
            let found = f64::from(partial.o[q_head * 8 + d]);
            assert!(
                (found - expected).abs() < 1e-3,
                "head {q_head} element {d}: {found} is not {expected}"
            );
        }
    }
}

#[test]
fn malformed_rows_are_refused() {
    let q = values(32, 3);
    let good = HeadRows {
        positions: vec![1],
        sent: None,
        keys: to_bytes(&values(8, 1)),
        values: to_bytes(&values(8, 2)),
    };
    let short = HeadRows {
        keys: Bytes::from_static(&[0; 15]),
        ..good.clone()
    };
    let left_out = HeadRows {
        sent: Some(Vec::new()),
        keys: Bytes::new(),
        values: Bytes::new(),
        ..good.clone()
    };
    let table: [(&[HeadRows], &str); 3] = [
        (&[good.clone(), short], "7 elements of keys"),
        (std::slice::from_ref(&good), "of 1 KV heads"),
        (&[good.clone(), left_out], "none are kept here"),
    ];
    for (heads, words) in table {
        let error = attend_rows(heads, &q, SHAPE, 0, &mut Kept::default()).expect_err(words);
        assert!(error.contains(words), "{error} lacks {words:?}");
    }
}

/// What came and what was kept are attended to as if all had come: the same bits.
#[test]
fn kept_rows_give_what_sent_rows_give() {
    let row = |layer: usize, head: usize, position: u32, part: u32| {
        values(8, 1 + position * 8 + part + (layer * 2 + head) as u32 * 1000)
    };
    let head_of = |layer: usize, head: usize, positions: &[u32], sent: Option<Vec<u32>>| {
        let which: Vec<u32> = match &sent {
            Some(sent) => sent.iter().map(|at| positions[*at as usize]).collect(),
            None => positions.to_vec(),
        };
        let bytes = |part| {
            to_bytes(
                &which
                    .iter()
                    .flat_map(|p| row(layer, head, *p, part))
                    .collect::<Vec<f32>>(),
            )
        };
        HeadRows {
            positions: positions.to_vec(),
            keys: bytes(0),
            values: bytes(1),
            sent,
        }
    };
    let mut kept = Kept::new(SHAPE, 6);
    // Positions known to the store as kept, per layer and head.
    let mut known: Vec<Vec<u32>> = vec![Vec::new(); SHAPE.layers * SHAPE.kv_heads];
    let mut total = RowCount::default();
    for step in 0..40_u32 {
        for layer in 0..SHAPE.layers {
            let q = values(32, step * 31 + layer as u32);
            let positions = |head: u32| -> Vec<u32> { (0..5).map(|i| step / 4 + i * 3 + (step + head) % 2).collect() };
            let mut partly = Vec::new();
            let mut whole = Vec::new();
            for head in 0..SHAPE.kv_heads {
                let positions = positions(head as u32);
                let known = &mut known[layer * SHAPE.kv_heads + head];
                let is_new = |at: &u32| !known.contains(&positions[*at as usize]);
                let sent = (0..positions.len() as u32).filter(is_new).collect();
                partly.push(head_of(layer, head, &positions, Some(sent)));
                whole.push(head_of(layer, head, &positions, None));
                known.retain(|position| !positions.contains(position));
                known.extend(&positions);
                known.drain(..known.len().saturating_sub(6));
            }
            let (found, count) = attend_rows(&partly, &q, SHAPE, layer, &mut kept).expect("well-formed");
            let (expected, _) = attend_rows(&whole, &q, SHAPE, layer, &mut Kept::default()).expect("well-formed");
            assert_eq!(found, expected, "step {step}, layer {layer}");
            total.all += count.all;
            total.kept += count.kept;
        }
    }
    assert!(total.kept * 4 > total.all && total.kept < total.all, "{total:?}");
}
