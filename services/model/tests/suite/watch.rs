//! What hooks may watch: queries of a layer, and the forecast of the next layer's.

use kvasir_model::{Attention, Logits, Model, PageId, StepAborted, StepHooks, StepOutput, StepSequence};

use crate::{
    made_up::{Gguf, load, pool_for, small_model},
    smollm,
};

/// Notes all that it is shown.
#[derive(Default)]
struct Watcher {
    queries: Vec<(usize, usize, Vec<f32>)>,
    predicted: Vec<(usize, usize, Vec<f32>)>,
    begun: Vec<(usize, usize, Vec<f32>)>,
    /// Names of calls, in order.
    calls: Vec<String>,
    /// Sequences that are not watched.
    blind: Vec<usize>,
    abort_at: Option<&'static str>,
}

impl Watcher {
    fn note(&mut self, call: String) -> Result<(), StepAborted> {
        self.calls.push(call);
        if self.calls.last().map(String::as_str) == self.abort_at {
            return Err(StepAborted("as told".to_owned()));
        }
        Ok(())
    }
}

impl StepHooks for Watcher {
    fn remote_begin(&mut self, layer: usize, sequence: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.begun.push((layer, sequence, q.to_vec()));
        self.note(format!("begin {layer} {sequence}"))
    }

    fn wants_queries(&self, sequence: usize) -> bool {
        !self.blind.contains(&sequence)
    }

    fn queries(&mut self, layer: usize, sequence: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.queries.push((layer, sequence, q.to_vec()));
        self.note(format!("queries {layer} {sequence}"))
    }

    fn wants_predicted(&self, sequence: usize) -> bool {
        !self.blind.contains(&sequence)
    }

    fn predicted(&mut self, layer: usize, sequence: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.predicted.push((layer, sequence, q.to_vec()));
        self.note(format!("predicted {layer} {sequence}"))
    }
}

/// One step of two sequences, the first local.
fn step(model: &mut Model, hooks: &mut dyn StepHooks) -> Result<StepOutput, kvasir_model::StepError> {
    let mut pool = pool_for(model, 20);
    let tokens: Vec<u32> = (0..60).map(|i| (i * 13) % 250).collect();
    let own: Vec<_> = (0..20).map(|page| Some(PageId(page))).collect();
    let sequence = |tokens, pages, attention| StepSequence {
        tokens,
        position: 0,
        pages,
        attention,
        logits: Logits::All,
    };
    let batch = [
        sequence(&tokens[..3], &own[..1], Attention::Local(vec![0..3])),
        sequence(&tokens[3..], &own[1..], Attention::Full),
    ];
    model.step(&batch, &mut pool, hooks)
}

#[test]
fn watching_comes_in_order_and_changes_nothing() {
    let mut model = small_model(2);
    let plain = step(&mut model, &mut ()).expect("a sound step");
    let mut watcher = Watcher::default();
    assert_eq!(step(&mut model, &mut watcher).expect("a sound step"), plain);
    let expected = [
        "begin 0 0",
        "queries 0 0",
        "predicted 1 0",
        "queries 0 1",
        "predicted 1 1",
        "begin 1 0",
        "queries 1 0",
        "queries 1 1",
    ];
    assert_eq!(watcher.calls, expected);
    // A local sequence's queries are those that go elsewhere.
    let local: Vec<_> = watcher
        .queries
        .iter()
        .filter(|(_, sequence, _)| *sequence == 0)
        .collect();
    assert_eq!(local, watcher.begun.iter().collect::<Vec<_>>());
    let (_, _, q) = &watcher.queries[1];
    assert_eq!(q.len(), 57 * 4 * 16);

    let mut one_eyed = Watcher {
        blind: vec![1],
        ..Watcher::default()
    };
    assert_eq!(step(&mut model, &mut one_eyed).expect("a sound step"), plain);
    let expected: Vec<_> = expected.into_iter().filter(|call| call.ends_with('0')).collect();
    assert_eq!(one_eyed.calls, expected);

    for (abort_at, calls) in [("queries 0 1", 4), ("predicted 1 0", 3)] {
        let mut watcher = Watcher {
            abort_at: Some(abort_at),
            ..Watcher::default()
        };
        let error = step(&mut model, &mut watcher).expect_err(abort_at);
        assert_eq!(error.to_string(), "the step was aborted: as told");
        assert_eq!(watcher.calls.len(), calls, "{abort_at}");
    }
    assert_eq!(step(&mut model, &mut ()).expect("a sound step"), plain);
}

#[test]
fn behind_a_layer_that_adds_nothing_the_forecast_is_exact() {
    let mut gguf = Gguf::small();
    for name in ["blk.0.attn_output.weight", "blk.0.ffn_down.weight"] {
        gguf.tensor(name).data.fill(0);
    }
    let mut watcher = Watcher::default();
    step(&mut load(&gguf, 1), &mut watcher).expect("a sound step");
    let real: Vec<_> = watcher.queries.into_iter().filter(|(layer, ..)| *layer == 1).collect();
    assert!(real == watcher.predicted);

    // With both layers at work it is a forecast only.
    let mut watcher = Watcher::default();
    step(&mut small_model(1), &mut watcher).expect("a sound step");
    assert!(
        watcher
            .queries
            .into_iter()
            .filter(|(layer, ..)| *layer == 1)
            .ne(watcher.predicted)
    );
}

#[test]
fn forecasts_of_a_real_model_point_where_its_queries_do() {
    let mut model = smollm::model(2);
    let text = "The lighthouse was built in 1874 by a man named Holm, who liked the sea. ".repeat(12);
    let tokens = smollm::file().tokenizer().encode(&text, false).expect("any text");
    let own: Vec<_> = (0..8).map(|page| Some(PageId(page))).collect();
    let mut pool = pool_for(&model, own.len());
    let sequence = StepSequence {
        tokens: &tokens,
        position: 0,
        pages: &own,
        attention: Attention::Full,
        logits: Logits::None,
    };
    let mut watcher = Watcher::default();
    model.step(&[sequence], &mut pool, &mut watcher).expect("a sound step");
    let layers = model.shape().layers;
    assert_eq!((watcher.queries.len(), watcher.predicted.len()), (layers, layers - 1));
    for ((layer, _, real), (of, _, predicted)) in watcher.queries[1..].iter().zip(&watcher.predicted) {
        assert_eq!(layer, of);
        let cosines = real.chunks_exact(64).zip(predicted.chunks_exact(64)).map(|(a, b)| {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        });
        let mean = cosines.sum::<f32>() / (real.len() / 64) as f32;
        assert!(*layer < 4 || mean > 0.9, "layer {layer}: mean cosine {mean}");
    }
}
