use super::*;
use crate::{Excluded, suite::Data};

const ORIGIN: Origin = Origin([1; 32]);
const SMALL: WaveParams = WaveParams {
    segment_keys: 256,
    cluster_keys: 16,
    iterations: 10,
};

fn wave(data: &Data) -> Wave {
    let mut wave = Wave::new(data.head_dim, SMALL, true, ORIGIN).expect("parameters");
    wave.append_rows(&data.keys, &data.values).expect("rows");
    wave
}

#[test]
fn segments_fill_one_by_one() {
    let data = Data::clustered(31, 600, 32, 2);
    let whole = wave(&data);
    assert_eq!((whole.keys(), whole.clustered), (600, 512));
    assert_eq!(whole.segments.len(), 3);
    assert!(
        (24..=32).contains(&whole.clusters()),
        "{} clusters of 512 keys",
        whole.clusters()
    );
    let mut parts = Wave::new(32, SMALL, true, ORIGIN).expect("parameters");
    for (keys, values) in data.keys.chunks(32 * 41).zip(data.values.chunks(32 * 41)) {
        parts.append_rows(keys, values).expect("rows");
    }
    assert_eq!(parts, whole);
    assert_eq!(Wave::decode(&whole.encode(), ORIGIN), Ok(whole));
}

#[test]
fn clusters_hold_their_means() {
    let data = Data::clustered(32, 512, 32, 1);
    let wave = wave(&data);
    for cluster in 0..wave.clusters() {
        let members = wave.clusters.get(cluster);
        for (means, rows) in [(&wave.centroids, &data.keys), (&wave.values, &data.values)] {
            for d in 0..32 {
                let mean = members
                    .iter()
                    .map(|at| rows[*at as usize * 32 + d].to_f64())
                    .sum::<f64>()
                    / members.len() as f64;
                let found = means[cluster * 32 + d].to_f64();
                assert!(
                    (found - mean).abs() < 2e-3 * (1.0 + mean.abs()),
                    "cluster {cluster}: {found}, not {mean}"
                );
            }
        }
    }
}

/// Jensen: a cluster's mean key stands for no more mass than its keys have. And the clusters scored and estimated are all there are.
#[test]
fn the_estimate_is_a_lower_bound_of_what_was_not_scored() {
    let data = Data::clustered(33, 512, 32, 3);
    let wave = wave(&data);
    let blocks = data.blocks();
    for excluded in [Excluded::none(), Excluded::new(&[0..4, 300..340])] {
        for effort in [0.02, 0.3, 0.8] {
            let search = data.search(&blocks, 512, effort, &excluded);
            let hits = wave.search(&search).expect("a search");
            let estimate = wave.estimate(&search, 1.0).expect("an estimate");
            let searched = excluded.searched_count(512) as usize;
            assert_eq!(hits.heads[0].len() + estimate.keys, searched, "effort {effort}");
            for head in 0..3 {
                let scored: Vec<u32> = hits.heads[head].iter().map(|(position, _)| *position).collect();
                let rest: f64 = (0..512)
                    .filter(|position| !excluded.contains(*position) && !scored.contains(position))
                    .map(|position| data.score(head, position).exp2())
                    .sum();
                let lse = f64::from(estimate.partial.lse[head]);
                // Means of clusters that lost excluded or scored members are those of all: a little slack.
                assert!(lse <= rest.log2() + 0.25, "effort {effort}: {lse} of {}", rest.log2());
                assert!(lse >= rest.log2() - 3.0, "effort {effort}: {lse} of {}", rest.log2());
            }
        }
        let search = data.search(&blocks, 512, 1.0, &excluded);
        let nothing = wave.estimate(&search, 1.0).expect("an estimate");
        assert_eq!((nothing.keys, nothing.clusters), (0, 0));
        assert!(nothing.partial.lse.iter().all(|lse| *lse == f32::NEG_INFINITY));
        assert!(nothing.partial.o.iter().all(|o| *o == 0.0));
    }
}

#[test]
fn the_share_bounds_the_zone() {
    let data = Data::clustered(34, 512, 32, 2);
    let wave = wave(&data);
    let blocks = data.blocks();
    let none = Excluded::none();
    let search = data.search(&blocks, 10, 0.018, &none);
    let mut before = 0;
    for (share, least, most) in [(0.0, 0, 0), (0.232, 118, 160), (0.6, 307, 350), (1.0, 502, 512)] {
        let found = wave.estimate(&search, share).expect("an estimate");
        assert!((least..=most).contains(&found.keys), "{share}: {} keys", found.keys);
        assert!(found.bytes_read >= before, "{share}");
        before = found.bytes_read;
    }
}

#[test]
fn what_cannot_be_is_named() {
    let data = Data::clustered(35, 300, 32, 1);
    for (head_dim, params, expected) in [
        (0, SMALL, "head_dim: is 1 to 1024"),
        (
            32,
            WaveParams {
                segment_keys: 15,
                ..SMALL
            },
            "segment_keys: is 16 to 1,048,576",
        ),
        (
            32,
            WaveParams {
                cluster_keys: 257,
                ..SMALL
            },
            "cluster_keys: is 1 to segment_keys",
        ),
        (32, WaveParams { iterations: 0, ..SMALL }, "iterations: is 1 to 1000"),
    ] {
        let error = Wave::new(head_dim, params, false, ORIGIN).expect_err(expected);
        assert_eq!(error.to_string(), expected);
    }
    let blocks = data.blocks();
    let none = Excluded::none();
    let search = data.search(&blocks, 10, 0.1, &none);
    let mut with = wave(&data);
    let mut without = Wave::new(32, SMALL, false, ORIGIN).expect("parameters");
    without.append(&data.keys).expect("keys");
    for (error, expected) in [
        (
            with.append(&data.keys).expect_err("keys alone"),
            "wave was made with values: append keys and values together",
        ),
        (
            without.append_rows(&data.keys, &data.values).expect_err("values too"),
            "wave was made for keys alone: append keys, or make it with values",
        ),
        (
            with.append_rows(&data.keys, &data.values[32..])
                .expect_err("a value short"),
            "values: 9568 elements for 9600 of keys",
        ),
        (
            without.estimate(&search, 0.5).expect_err("no values"),
            "wave has no values to estimate with: make it with values",
        ),
        (
            with.estimate(&search, 1.5).expect_err("a share"),
            "share: 1.5 is not 0 to 1",
        ),
    ] {
        assert_eq!(error.to_string(), expected);
    }
    assert_eq!(
        (with.keys(), without.keys()),
        (300, 300),
        "what was refused changed nothing"
    );
}
