use kvasir_simd::Pool;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::*;
use crate::{Excluded, KeyRows, suite::Data};

const ORIGIN: Origin = Origin([2; 32]);
const SMALL: RoarParams = RoarParams {
    nearest: 24,
    degree: 8,
    connections: 8,
    beam: 32,
    metric: Metric::Keys,
};

fn built(data: &Data, samples: Samples<'_>, params: RoarParams, threads: usize) -> Result<Roar, IndexError> {
    let blocks = data.blocks();
    let keys = KeyRows::new(&blocks, 64, data.head_dim);
    Roar::build(keys, samples, params, ORIGIN, &Pool::new(threads))
}

#[test]
fn threads_and_blocks_change_nothing() {
    let data = Data::clustered(41, 700, 32, 2);
    let one = built(&data, Samples::Shared(&data.samples), SMALL, 1).expect("a graph");
    assert_eq!(built(&data, Samples::Shared(&data.samples), SMALL, 2), Ok(one.clone()));
    let whole = [data.keys.as_slice()];
    let keys = KeyRows::new(&whole, 700, 32);
    assert_eq!(
        Roar::build(keys, Samples::Shared(&data.samples), SMALL, ORIGIN, &Pool::new(1)),
        Ok(one)
    );
}

#[test]
fn edges_stay_within_the_degree_and_every_key_has_some() {
    let data = Data::clustered(42, 700, 32, 2);
    let roar = built(&data, Samples::Shared(&data.samples), SMALL, 2).expect("a graph");
    for graph in &roar.graphs {
        for key in 0..700 {
            let edges = graph.neighbours(key);
            // Twice the degree from each of the two steps.
            assert!(
                (1..=4 * SMALL.degree).contains(&edges.len()),
                "key {key}: {} edges",
                edges.len()
            );
            let mut sorted = edges.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            assert!(
                sorted.len() == edges.len() && !edges.contains(&key),
                "key {key}: {edges:?}"
            );
        }
    }
    assert_eq!(roar.bytes(), (roar.edges() + 701) * 4);
}

/// Queries are far from keys: what a graph drawn by queries is for. The same graph drawn by noise finds less.
#[test]
fn samples_lead_queries_to_their_keys() {
    let data = Data::clustered(43, 3000, 32, 4);
    let none = Excluded::none();
    let blocks = data.blocks();
    let search = data.search(&blocks, 10, 0.05, &none);
    let found = |samples: &[f32]| {
        let roar = built(&data, Samples::Shared(samples), SMALL, 2).expect("a graph");
        let hits = roar.search(&search).expect("a search");
        let heads = hits.heads.iter().enumerate();
        let found = heads.map(|(head, hits)| {
            let exact = data.exact(head, 10, &none);
            hits.iter().filter(|(position, _)| exact.contains(position)).count()
        });
        found.sum::<usize>()
    };
    let mut rng = SmallRng::seed_from_u64(3);
    let noise: Vec<f32> = data.samples.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
    let (drawn, undrawn) = (found(&data.samples), found(&noise));
    assert!(drawn > undrawn, "{drawn} of 40 by queries, {undrawn} by noise");
}

#[test]
fn a_graph_for_each_query_head_wants_as_many_heads() {
    let data = Data::clustered(44, 300, 32, 3);
    let none = Excluded::none();
    let blocks = data.blocks();
    let heads = [data.samples.as_slice(), &data.samples[..64], &data.samples[640..]];
    let roar = built(&data, Samples::PerQueryHead(&heads), SMALL, 2).expect("graphs");
    assert_eq!(roar.graphs.len(), 3);
    let search = data.search(&blocks, 10, 0.2, &none);
    let together = roar.search(&search).expect("a search");
    for (head, samples) in heads.iter().enumerate() {
        let alone = built(&data, Samples::Shared(samples), SMALL, 1).expect("a graph");
        let q = &data.q[head * 32..][..32];
        let found = alone.search(&Search { q, ..search }).expect("a search");
        assert_eq!(found.heads[0], together.heads[head], "head {head}");
    }
    let error = roar
        .search(&Search {
            q: &data.q[..64],
            ..search
        })
        .expect_err("two heads");
    assert_eq!(
        error.to_string(),
        "q: 2 query heads, the index has a graph for each of 3"
    );
}

#[test]
fn a_beam_is_the_walk_cut_where_it_ends() {
    let data = Data::clustered(45, 800, 32, 1);
    let roar = built(&data, Samples::Shared(&data.samples), SMALL, 1).expect("a graph");
    let score = |key: u32| data.score(0, key) as f32;
    let mut walk = Walk::new(800);
    for width in [1, 5, 40, 800] {
        let calls = std::cell::Cell::new(0);
        let counted = |key: u32| {
            calls.set(calls.get() + 1);
            score(key)
        };
        let beam = walk.beam(&roar.graphs[0], width, counted);
        let mut best = Best::new(width);
        walk.best_first(&roar.graphs[0], calls.get(), score, |key, score| best.push(key, score));
        assert_eq!(beam, best.into_sorted(), "width {width}, {} keys scored", calls.get());
    }
}

#[test]
fn what_cannot_be_is_named() {
    let data = Data::clustered(46, 100, 32, 1);
    let nan = [f32::NAN; 32];
    let good = data.samples.as_slice();
    let (empty, bad): ([&[f32]; 0], [&[f32]; 2]) = ([], [good, &good[..5]]);
    for (samples, params, expected) in [
        (
            Samples::Shared(&[]),
            SMALL,
            "samples: are not at least one row of head_dim for each query head",
        ),
        (
            Samples::PerQueryHead(&bad),
            SMALL,
            "samples: are not at least one row of head_dim for each query head",
        ),
        (Samples::PerQueryHead(&empty), SMALL, "samples: there is no query head"),
        (Samples::Shared(&nan), SMALL, "samples: an element is not finite"),
        (
            Samples::Shared(good),
            RoarParams { nearest: 1, ..SMALL },
            "nearest: is 2 to 4096",
        ),
        (
            Samples::Shared(good),
            RoarParams { degree: 257, ..SMALL },
            "degree: is 2 to 256",
        ),
        (
            Samples::Shared(good),
            RoarParams {
                connections: 0,
                ..SMALL
            },
            "connections: is 1 to 256",
        ),
        (
            Samples::Shared(good),
            RoarParams { beam: 7, ..SMALL },
            "beam: is at least connections and at most 65,536",
        ),
    ] {
        let error = built(&data, samples, params, 1).expect_err(expected);
        assert_eq!(error.to_string(), expected);
    }
    let mut roar = built(&data, Samples::Shared(good), SMALL, 1).expect("a graph");
    let error = roar.append(&data.keys).expect_err("built once");
    assert_eq!(
        error.to_string(),
        "roar is built once from keys and query samples: build it anew, or scan newer keys flat beside it"
    );
}
