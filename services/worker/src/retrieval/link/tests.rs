use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use half::f16;
use kvasir_client::{Reply, Report};
use parking_lot::Mutex;

use super::*;

const SHAPE: LinkShape = LinkShape {
    q_heads: 4,
    kv_heads: 2,
    head_dim: 8,
    softmax_scale: 0.3,
};

fn attention(mode: AttentionMode) -> Attention {
    Attention {
        mode,
        k: Some(3),
        target_mass: 0.9,
        sink: 2,
        window: 2,
    }
}

/// The store's end: what was sent, and what it says.
#[derive(Clone, Debug, Default)]
struct Store(Arc<Mutex<Exchange>>);

#[derive(Debug, Default)]
struct Exchange {
    queries: Vec<Query>,
    replies: VecDeque<Result<Reply, String>>,
    gone: bool,
}

impl Wire for Store {
    fn send(&mut self, query: Query) -> Result<(), String> {
        let mut exchange = self.0.lock();
        exchange.queries.push(query);
        if exchange.gone {
            Err("the store is gone".into())
        } else {
            Ok(())
        }
    }

    fn receive(&mut self, _: Duration) -> Result<Reply, Option<String>> {
        let reply = self.0.lock().replies.pop_front();
        reply.map_or(Err(None), |reply| reply.map_err(Some))
    }
}

impl Store {
    fn say(&self, reply: Result<Reply, String>) {
        self.0.lock().replies.push_back(reply);
    }

    fn heard(&self) -> Query {
        self.0.lock().queries.pop().expect("a query")
    }
}

fn link(mode: AttentionMode) -> (Link, Store) {
    let store = Store::default();
    let attention = attention(mode);
    let split = Split::new(32, 4, &attention).expect("something to retrieve");
    let link = Link::new(Box::new(store.clone()), split, &attention, SHAPE, StoreMetrics::new());
    (link, store)
}

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

fn attend_reply(sequence: u64, shortfall: Option<Shortfall>) -> Reply {
    Reply {
        sequence,
        layer: 7,
        found: Found::Attend {
            o: values(32, 1),
            lse: vec![1.0; 4],
        },
        report: Report {
            keys_scanned: 10,
            keys_total: 20,
            keys_attended: 5,
            mass_covered: vec![0.9; 4],
            shortfall,
            bytes_read: 100,
        },
        wire_bytes: 1234,
    }
}

const SOON: Duration = Duration::from_millis(30);

#[test]
fn a_partial_passes_through_and_is_tallied() {
    let (mut link, store) = link(AttentionMode::Attend);
    link.begin(7, &values(32, 9), SOON).expect("is sent");
    let query = store.heard();
    assert_eq!(
        (query.layer, query.q, query.excluded),
        (7, values(32, 9), vec![0..2, 30..32])
    );
    assert_eq!(
        query.form,
        Form::Attend {
            target_mass: 0.9,
            k_max: 3
        }
    );
    store.say(Ok(attend_reply(query.sequence, Some(Shortfall::KMax))));
    let partial = link.finish(SOON).expect("a partial");
    assert_eq!(
        partial,
        Partial {
            o: values(32, 1),
            lse: vec![1.0; 4]
        }
    );
    let tally = link.into_tally();
    assert_eq!((tally.keys_scanned, tally.bytes, tally.round_trips), (10, 1234, 1));
    assert!((tally.mass_p50() - 0.9).abs() < 0.002);
}

#[test]
fn what_ends_retrieval_is_said_in_words() {
    let short = |mut reply: Reply| {
        reply.found = Found::Attend {
            o: vec![0.0; 31],
            lse: vec![0.0; 4],
        };
        reply
    };
    let table: Vec<(Option<Result<Reply, String>>, &str)> = vec![
        (None, "did not answer a query within 30ms"),
        (Some(Err("the store is going away".into())), "going away"),
        (Some(Ok(attend_reply(1, Some(Shortfall::Deadline)))), "ran out of time"),
        (Some(Ok(attend_reply(1, Some(Shortfall::MissingBlocks)))), "lost blocks"),
        (Some(Ok(attend_reply(2, None))), "another query"),
        (Some(Ok(short(attend_reply(1, None)))), "4 x 31 values"),
    ];
    for (reply, words) in table {
        let (mut link, store) = link(AttentionMode::Attend);
        link.begin(7, &values(32, 9), SOON).expect("is sent");
        if let Some(reply) = reply {
            store.say(reply);
        }
        let why = link.finish(SOON).expect_err(words);
        assert!(why.contains(words), "{why} lacks {words:?}");
    }
    let (mut link, store) = link(AttentionMode::Attend);
    store.0.lock().gone = true;
    assert!(
        link.begin(7, &values(32, 9), SOON)
            .expect_err("nobody listens")
            .contains("gone")
    );
    assert!(link.begin(7, &values(31, 9), SOON).is_err());
}

#[test]
fn rows_are_attended_by_every_query_head_of_their_group() {
    let q = values(32, 3);
    let heads: Vec<HeadRows> = [5usize, 1]
        .iter()
        .enumerate()
        .map(|(head, n)| HeadRows {
            positions: (0..*n as u32).map(|i| i * 3).collect(),
            keys: to_bytes(&values(n * 8, 10 + head as u32)),
            values: to_bytes(&values(n * 8, 20 + head as u32)),
        })
        .collect();
    let partial = attend_rows(&heads, &q, SHAPE).expect("well-formed rows");
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
        keys: to_bytes(&values(8, 1)),
        values: to_bytes(&values(8, 2)),
    };
    let short = HeadRows {
        keys: Bytes::from_static(&[0; 15]),
        ..good.clone()
    };
    assert!(
        attend_rows(&[good.clone(), short], &q, SHAPE)
            .expect_err("15 bytes")
            .contains("15 bytes of keys")
    );
    assert!(
        attend_rows(&[good], &q, SHAPE)
            .expect_err("one head")
            .contains("of 1 KV heads")
    );
}
