use super::*;
use crate::plan::tests::real_like;

const D: usize = 16;

fn options() -> Options {
    Options {
        rows: 64,
        chunk_tokens: 512,
        from: 512,
        budget: (64, 256),
        criterion: Criterion::OutputError,
        space: Space::Paper,
        every: 16,
    }
}

fn with<T>(tokens: usize, act: impl FnOnce(&HeadText<'_>) -> T) -> T {
    let (q, keys, values) = real_like(tokens, 21);
    act(&HeadText {
        q: &q,
        keys: &keys,
        values: &values,
        head_dim: D,
        scale: 0.25,
    })
}

#[test]
fn candidates_cost_the_same_and_the_best_wins() {
    with(2048, |text| {
        for space in [Space::Paper, Space::Wide] {
            let found = search(text, &Options { space, ..options() }).expect("a search");
            assert_eq!(found.tried.len(), if space == Space::Paper { 6 } else { 10 });
            let target = found.tried[0].1.work;
            for (pattern, quality) in &found.tried {
                // Families change in steps; none may cost more, and a search over none that costs half would be unfair.
                assert!(
                    quality.work <= target && quality.work * 2 > target,
                    "{pattern:?} {quality:?} for {target}"
                );
            }
            let least = found
                .tried
                .iter()
                .map(|(_, quality)| quality.output_error)
                .fold(f64::INFINITY, f64::min);
            assert_eq!(found.quality.output_error, least);
            assert!(
                !matches!(found.pattern, Pattern::AShape { .. }),
                "looking pays on such a text: {:?}",
                found.pattern
            );
        }
        let most = search(
            text,
            &Options {
                criterion: Criterion::KeptMass,
                ..options()
            },
        )
        .expect("a search");
        assert!(most.tried.iter().all(|(_, quality)| quality.mass <= most.quality.mass));
    });
}

#[test]
fn cost_is_counted_for_the_tile_of_the_kernel() {
    // Diagonals far apart: a row block of 64 meets each in two tiles, one of 128 in three.
    with(1024, |text| {
        let work = |rows: usize| {
            let options = Options {
                rows,
                chunk_tokens: 1024,
                from: 0,
                ..options()
            };
            Sections::new(text, &options).expect("sections").work(&Pattern::AShape {
                initial: 64,
                local: 128,
            }) * rows
        };
        assert!(work(128) > work(64), "{} and {}", work(128), work(64));
    });
}

#[test]
fn the_released_search_writes_vertical_slash_alone() {
    with(3200, |text| {
        let options = Options {
            space: Space::Released,
            criterion: Criterion::KeptMass,
            chunk_tokens: 4096,
            ..options()
        };
        let found = search(text, &options).expect("a search");
        assert!(matches!(found.pattern, Pattern::VerticalSlash { .. }), "{found:?}");
        assert_eq!(found.tried.len(), 6);
    });
}

#[test]
fn what_cannot_be_searched_is_said() {
    with(600, |text| {
        let bad = [
            Options { rows: 0, ..options() },
            Options { every: 0, ..options() },
            Options { from: 600, ..options() },
        ];
        for options in bad {
            assert!(
                matches!(search(text, &options), Err(SearchError::Options(_))),
                "{options:?}"
            );
        }
        let torn = HeadText {
            q: &text.q[..10],
            ..*text
        };
        assert!(matches!(search(&torn, &options()), Err(SearchError::Chunk(_))));
    });
    assert_eq!(default_budget(1 << 20), (1024, 4096));
    assert_eq!(default_budget(8192), (256, 1024));
    assert_eq!(default_budget(10), (64, 64));
}
