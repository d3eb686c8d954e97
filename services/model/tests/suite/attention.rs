//! Local attention with the rest from elsewhere, and what hooks see.

use std::ops::Range;

use kvasir_model::{Attention, Logits, Model, PageId, PagePool, StepAborted, StepError, StepHooks, StepSequence};
use kvasir_simd::{Partial, Segment, attend};

use crate::{
    made_up::{pages, pool_for, small_model},
    smollm,
};

/// Answers for everything that is not local, from a pool where all pages are.
struct Elsewhere<'a> {
    pool: &'a PagePool,
    pages: &'a [Option<PageId>],
    ranges: Vec<Range<usize>>,
    q_heads: usize,
    scale: f32,
    asked: Vec<(usize, usize, Vec<f32>)>,
}

impl StepHooks for Elsewhere<'_> {
    fn remote_begin(&mut self, layer: usize, sequence: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.asked.push((layer, sequence, q.to_vec()));
        Ok(())
    }

    fn remote_finish(&mut self, layer: usize, sequence: usize) -> Result<Option<Partial>, StepAborted> {
        let (asked_layer, asked_sequence, q) = self.asked.pop().expect("begun before it is finished");
        assert_eq!((asked_layer, asked_sequence), (layer, sequence));
        let layout = self.pool.layout();
        let mut partial = Partial::default();
        let group = self.q_heads / layout.kv_heads;
        for (head, q) in q.chunks_exact(layout.head_dim).enumerate() {
            let kv_head = head % self.q_heads / group;
            // Row by row: the simplest reading of what these keys are.
            let segments: Vec<Segment<'_>> = self
                .ranges
                .iter()
                .flat_map(Clone::clone)
                .map(|position| {
                    let page = self
                        .pool
                        .page(layer, self.pages[position / layout.block_tokens].expect("resident"));
                    let row = position % layout.block_tokens * layout.head_dim;
                    let row = row..row + layout.head_dim;
                    Segment {
                        keys: &page[layout.keys(kv_head)][row.clone()],
                        values: &page[layout.values(kv_head)][row],
                        position,
                    }
                })
                .collect();
            let mut one = Partial::default();
            attend(q, &[usize::MAX], layout.head_dim, self.scale, &segments, &mut one);
            partial.o.extend(one.o);
            partial.lse.extend(one.lse);
        }
        Ok(Some(partial))
    }
}

/// Logits of `tokens` at `position` with full attention, and with `local` ranges here and the rest elsewhere, where the
/// pages that are not needed here are given up.
fn both_ways(model: &mut Model, prompt: &[u32], tokens: &[u32], local: &[Range<usize>]) -> (Vec<f32>, Vec<f32>) {
    let block_tokens = model.schema().layout().block_tokens;
    let end = prompt.len() + tokens.len();
    let own = pages(0, end.div_ceil(block_tokens) as u32);
    let mut pool = pool_for(model, own.len());
    step(model, &mut pool, prompt, 0, &own, Attention::Full, &mut ()).expect("a sound step");
    let full = step(model, &mut pool, tokens, prompt.len(), &own, Attention::Full, &mut ()).expect("a sound step");

    let mut rest = Vec::new();
    let mut before = 0;
    for range in local {
        rest.push(before..range.start);
        before = range.end;
    }
    let mut resident = own.clone();
    for (block, page) in resident.iter_mut().enumerate() {
        let positions = block * block_tokens..(block + 1) * block_tokens;
        let needed = local
            .iter()
            .any(|range| range.start < positions.end && positions.start < range.end);
        if !needed {
            *page = None;
        }
    }
    let mut local_pool = pool_for(model, own.len());
    for layer in 0..model.shape().layers {
        for page in resident.iter().flatten() {
            let payload = pool.page_bytes(layer, *page).expect("host pages");
            local_pool
                .fill(layer, *page, &payload)
                .expect("a payload of the same layout");
        }
    }
    let mut hooks = Elsewhere {
        pool: &pool,
        pages: &own,
        ranges: rest,
        q_heads: model.shape().q_heads,
        scale: model.softmax_scale(),
        asked: Vec::new(),
    };
    let attention = Attention::Local(local.to_vec());
    let split = step(
        model,
        &mut local_pool,
        tokens,
        prompt.len(),
        &resident,
        attention,
        &mut hooks,
    )
    .expect("a sound step");
    (full, split)
}

fn step(
    model: &mut Model,
    pool: &mut PagePool,
    tokens: &[u32],
    position: usize,
    pages: &[Option<PageId>],
    attention: Attention,
    hooks: &mut dyn StepHooks,
) -> Result<Vec<f32>, StepError> {
    let sequence = StepSequence {
        tokens,
        position,
        pages,
        attention,
        logits: Logits::All,
    };
    model
        .step(&[sequence], pool, hooks)
        .map(|mut output| output.rows.remove(0))
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn local_and_remote_together_are_full_attention() {
    let mut model = small_model(2);
    let prompt: Vec<u32> = (0..203).map(|i| (i * 7) % 250).collect();
    let table: [(&[u32], &[Range<usize>]); 5] = [
        (&[5], &[0..16, 150..204]),
        (&[5], &[0..3, 5..6, 101..204]),
        (&[5], &[203..204]),
        (&[5, 6, 7], &[0..10, 190..206]),
        (&[5], &[0..204]),
    ];
    for (tokens, local) in table {
        let (full, split) = both_ways(&mut model, &prompt, tokens, local);
        // Int8 activations may round the other way where a sum was taken in another order; one step of them moves a logit
        // of this model by about a hundredth.
        let worst = furthest(&full, &split);
        assert!(worst <= 0.05, "{local:?}: {worst}");
    }
}

#[test]
fn smollm_attends_elsewhere_as_well() {
    let mut model = smollm::model(2);
    let file = smollm::file();
    let text = "The lighthouse was built in 1874 by a man named Holm, who liked the sea. ".repeat(12);
    let prompt = file.tokenizer().encode(&text, false).expect("any text");
    let end = prompt.len() + 1;
    // All of it here, cut at other places: what the order of sums alone does, through thirty layers of int8 rounding.
    let (full, cut) = both_ways(&mut model, &prompt, &[prompt[3]], &[0..5, 5..77, 77..end]);
    let (_, split) = both_ways(&mut model, &prompt, &[prompt[3]], &[0..32, end - 64..end]);
    let (noise, found) = (mean_distance(&full, &cut), mean_distance(&full, &split));
    assert!(
        noise > 0.0 && found <= 2.0 * noise,
        "mean distance {found}, by the order of sums {noise}"
    );
    assert!(
        furthest(&full, &split) <= 1.0,
        "{} {}",
        furthest(&full, &split),
        furthest(&full, &cut)
    );
}

fn mean_distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>() / a.len() as f32
}

/// Notes what is called, and gives up where told to.
#[derive(Default)]
struct Log {
    calls: Vec<String>,
    abort_at: Option<&'static str>,
}

impl Log {
    fn note(&mut self, call: String) -> Result<(), StepAborted> {
        let abort = self.abort_at == Some(call.as_str());
        self.calls.push(call);
        if abort {
            Err(StepAborted("as told".to_owned()))
        } else {
            Ok(())
        }
    }
}

impl StepHooks for Log {
    fn before_layer(&mut self, layer: usize, _: &mut PagePool) -> Result<(), StepAborted> {
        self.note(format!("before {layer}"))
    }

    fn after_layer(&mut self, layer: usize, _: &PagePool) {
        self.calls.push(format!("after {layer}"));
    }

    fn remote_begin(&mut self, layer: usize, sequence: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.note(format!("begin {layer} {sequence} {}", q.len()))
    }

    fn remote_finish(&mut self, layer: usize, sequence: usize) -> Result<Option<Partial>, StepAborted> {
        self.note(format!("finish {layer} {sequence}")).map(|()| None)
    }
}

#[test]
fn hooks_are_called_in_order_and_for_local_sequences_only() {
    let mut model = small_model(1);
    let mut pool = pool_for(&model, 4);
    let local = |range| Attention::Local(vec![range]);
    let own: Vec<_> = (0..4).map(|page| [Some(PageId(page))]).collect();
    let sequence = |index: usize, tokens, attention| StepSequence {
        tokens,
        position: 0,
        pages: &own[index],
        attention,
        logits: Logits::Last,
    };
    let batch = [
        sequence(0, &[1, 2], local(0..2)),
        sequence(1, &[3], Attention::Full),
        sequence(2, &[4], local(0..1)),
    ];
    let mut log = Log::default();
    model.step(&batch, &mut pool, &mut log).expect("a sound step");
    let layer = |layer| {
        [
            format!("before {layer}"),
            format!("begin {layer} 0 128"),
            format!("begin {layer} 2 64"),
        ]
        .into_iter()
        .chain([
            format!("finish {layer} 0"),
            format!("finish {layer} 2"),
            format!("after {layer}"),
        ])
    };
    assert_eq!(log.calls, layer(0).chain(layer(1)).collect::<Vec<_>>());

    // Wherever a hook gives up, the step ends there, and the next one is as if nothing had been.
    let before = model.step(&batch, &mut pool, &mut ()).expect("a sound step");
    for (abort_at, calls) in [
        ("before 0", 1),
        ("before 1", 7),
        ("begin 0 2 64", 3),
        ("finish 1 0", 10),
    ] {
        let mut log = Log {
            abort_at: Some(abort_at),
            ..Log::default()
        };
        let error = model.step(&batch, &mut pool, &mut log).expect_err(abort_at);
        assert_eq!(error.to_string(), "the step was aborted: as told");
        assert_eq!(log.calls.len(), calls, "{abort_at}");
    }
    assert_eq!(model.step(&batch, &mut pool, &mut ()).expect("a sound step"), before);
}

/// Fills pages just before they are read, as onboarding does.
struct Onboard<'a>(&'a PagePool, &'a [Option<PageId>]);

impl StepHooks for Onboard<'_> {
    fn before_layer(&mut self, layer: usize, pool: &mut PagePool) -> Result<(), StepAborted> {
        for page in self.1.iter().flatten() {
            let payload = self.0.page_bytes(layer, *page).expect("host pages");
            pool.fill(layer, *page, &payload)
                .map_err(|error| StepAborted(error.to_string()))?;
        }
        Ok(())
    }
}

#[test]
fn pages_that_are_loaded_give_the_bits_of_pages_that_were_computed() {
    let mut model = small_model(2);
    let tokens: Vec<u32> = (0..30).map(|i| (i * 11) % 250).collect();
    let own = pages(0, 8);
    let mut pool = pool_for(&model, 8);
    let cold = step(&mut model, &mut pool, &tokens, 0, &own, Attention::Full, &mut ()).expect("a sound step");
    let mut warm_pool = pool_for(&model, 8);
    let mut hooks = Onboard(&pool, &own[..5]);
    let warm = step(
        &mut model,
        &mut warm_pool,
        &tokens[20..],
        20,
        &own,
        Attention::Full,
        &mut hooks,
    );
    let warm = warm.expect("a sound step");
    assert!(warm == cold[cold.len() - warm.len()..]);
}

/// Answers with a fixed partial.
struct Fixed(Partial);

impl StepHooks for Fixed {
    fn remote_finish(&mut self, _: usize, _: usize) -> Result<Option<Partial>, StepAborted> {
        Ok(Some(self.0.clone()))
    }
}

#[test]
fn a_remote_partial_is_checked() {
    let mut model = small_model(1);
    let mut pool = pool_for(&model, 1);
    let own = [Some(PageId(0))];
    let partial = |rows: usize, o: f32, lse: f32| Partial {
        o: vec![o; rows * 16],
        lse: vec![lse; rows],
    };
    let mut with = |partial| {
        let attention = Attention::Local(vec![0..1]);
        step(&mut model, &mut pool, &[1], 0, &own, attention, &mut Fixed(partial)).map_err(|error| error.to_string())
    };
    let nothing = with(partial(4, 0.0, f32::NEG_INFINITY)).expect("an empty partial is sound");
    assert_ne!(nothing, with(partial(4, 1.0, 2.0)).expect("a finite partial is sound"));
    for (bad, expected) in [
        (
            partial(3, 0.0, 0.0),
            "has 3 rows and 48 elements, and must have 4 rows of 16",
        ),
        (partial(4, f32::NAN, 0.0), "is not finite"),
        (partial(4, 0.0, f32::INFINITY), "is not finite"),
        (partial(4, 0.0, f32::NAN), "is not finite"),
    ] {
        let error = with(bad).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }
}
