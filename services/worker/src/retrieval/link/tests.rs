use std::{collections::VecDeque, sync::Arc};

use kvasir_client::{Reply, Report};
use parking_lot::Mutex;

use super::*;

const SHAPE: LinkShape = LinkShape {
    layers: 9,
    q_heads: 4,
    kv_heads: 2,
    head_dim: 8,
    softmax_scale: 0.3,
};

fn attention(mode: AttentionMode) -> Attention {
    Attention {
        mode,
        k: 3,
        k_max: 3,
        target_mass: 0.9,
        sink: 2,
        window: 2,
        ..Attention::default()
    }
}

/// The store's end: what was sent, and what it says.
#[derive(Clone, Debug, Default)]
struct Store(Arc<Mutex<Exchange>>);

#[derive(Debug, Default)]
struct Exchange {
    queries: Vec<Query>,
    replies: VecDeque<Result<Reply, String>>,
    hints: Vec<Hint>,
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

    fn hint(&mut self, hint: Hint) -> Result<(), String> {
        self.0.lock().hints.push(hint);
        Ok(())
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

fn link(mode: AttentionMode, index: &str) -> (Link, Store) {
    let store = Store::default();
    let attention = attention(mode);
    let plan = LinkPlan {
        split: Split::new(32, 4, &attention).expect("something to retrieve"),
        attention,
        shape: SHAPE,
        hint_from: 3,
        row_cache_rows: 0,
    };
    let around = LinkAround {
        metrics: StoreMetrics::new(),
        experience: Arc::default(),
    };
    let opened = Opened {
        index: index.to_owned(),
        ..Opened::default()
    };
    (Link::new(Box::new(store.clone()), &opened, &plan, around), store)
}

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32)
        .map(|i| ((i * 37 + seed * 101) % 97) as f32 / 48.5 - 1.0)
        .collect()
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
            search: Duration::from_micros(50),
            ..Report::default()
        },
        wire_bytes: 1234,
    }
}

const SOON: Duration = Duration::from_millis(30);

#[test]
fn a_partial_passes_through_and_is_tallied() {
    let (mut link, store) = link(AttentionMode::Attend, "flat");
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
            k_max: 3,
            options: AttendOptions::default(),
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

/// What a token attends to here travels with the next one's query and hint, by layer.
#[test]
fn local_attention_is_told_for_the_next_token() {
    let (mut link, store) = link(AttentionMode::Attend, "sketch");
    for (told, expected) in [(7, vec![]), (8, values(4, 3)), (9, values(4, 3))] {
        link.begin(7, &values(32, 9), SOON).expect("is sent");
        link.hint(7, &values(32, 9)).expect("is sent");
        let hint = store.0.lock().hints.pop().expect("a hint");
        assert_eq!((store.heard().local_lse, hint.local_lse), (expected.clone(), expected));
        // Of the first token, then of another layer and of none.
        link.attended(told, &values(4, if told == 7 { 3 } else { 5 }));
    }
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
        let (mut link, store) = link(AttentionMode::Attend, "flat");
        link.begin(7, &values(32, 9), SOON).expect("is sent");
        if let Some(reply) = reply {
            store.say(reply);
        }
        let why = link.finish(SOON).expect_err(words);
        assert!(why.contains(words), "{why} lacks {words:?}");
    }
    let (mut link, store) = link(AttentionMode::Attend, "flat");
    store.0.lock().gone = true;
    assert!(
        link.begin(7, &values(32, 9), SOON)
            .expect_err("nobody listens")
            .contains("gone")
    );
    assert!(link.begin(7, &values(31, 9), SOON).is_err());
}

#[test]
fn hints_go_ahead_where_an_index_can_use_them() {
    // Index, layer, whether a hint is worth it.
    let table = [
        ("sketch", 2, false),
        ("sketch", 3, true),
        ("sketch", 8, true),
        ("flat", 8, false),
    ];
    for (index, layer, wanted) in table {
        assert_eq!(
            link(AttentionMode::Attend, index).0.wants_hint(layer),
            wanted,
            "{index}, layer {layer}"
        );
    }
    let (mut link, store) = link(AttentionMode::Attend, "sketch");
    link.hint(4, &values(32, 5)).expect("is sent");
    let hint = store.0.lock().hints.pop().expect("a hint");
    assert_eq!((hint.layer, hint.q), (4, values(32, 5)));
    assert!(link.hint(4, &values(31, 5)).is_err());
}
