//! Captures: what a sink is handed is what the pages hold and the hooks saw, however the text is cut into steps.

use std::{collections::BTreeMap, ops::Range};

use half::f16;
use kvasir_model::{
    Attention, CaptureOptions, CaptureSink, CapturedLayer, Logits, PagePool, StepAborted, StepHooks, StepSequence,
    capture,
};

use crate::made_up::{pages, pool_for, small_model};

/// Everything, by layer.
#[derive(Default, PartialEq)]
struct All {
    q: BTreeMap<usize, Vec<f32>>,
    predicted: BTreeMap<usize, Vec<f32>>,
    /// Per layer and KV head.
    keys: BTreeMap<(usize, usize), Vec<f16>>,
    values: BTreeMap<(usize, usize), Vec<f16>>,
    logits: Vec<f32>,
    steps: Vec<Range<usize>>,
    give_up_at: Option<(usize, usize)>,
}

impl CaptureSink for All {
    fn layer(&mut self, layer: &CapturedLayer<'_>) -> Result<(), StepAborted> {
        if self.give_up_at == Some((layer.layer, layer.tokens.start)) {
            return Err(StepAborted("enough".to_owned()));
        }
        self.q.entry(layer.layer).or_default().extend_from_slice(layer.q);
        if let Some(predicted) = layer.predicted {
            self.predicted
                .entry(layer.layer)
                .or_default()
                .extend_from_slice(predicted);
        }
        for head in 0..2 {
            let key = (layer.layer, head);
            layer.keys(head, layer.tokens.clone(), self.keys.entry(key).or_default());
            layer.values(head, layer.tokens.clone(), self.values.entry(key).or_default());
            // What was gathered step by step is what is gathered at once.
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            layer.keys(head, 0..layer.tokens.end, &mut keys);
            layer.values(head, 0..layer.tokens.end, &mut values);
            assert!(keys == self.keys[&key] && values == self.values[&key]);
        }
        Ok(())
    }

    fn step(&mut self, tokens: Range<usize>, logits: &[f32]) -> Result<(), StepAborted> {
        self.steps.push(tokens);
        self.logits.extend_from_slice(logits);
        Ok(())
    }
}

/// The queries of one step over everything.
#[derive(Default)]
struct Queries(Vec<Vec<f32>>);

impl StepHooks for Queries {
    fn wants_queries(&self, _: usize) -> bool {
        true
    }

    fn queries(&mut self, _: usize, _: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.0.push(q.to_vec());
        Ok(())
    }
}

#[test]
fn a_sink_is_handed_what_was_computed() {
    let mut model = small_model(2);
    let tokens: Vec<u32> = (0..31).map(|i| (i * 17) % 250).collect();
    let own = pages(0, 8);
    let mut pool: PagePool = pool_for(&model, 8);
    let sequence = StepSequence {
        tokens: &tokens,
        position: 0,
        pages: &own,
        attention: Attention::Full,
        logits: Logits::All,
    };
    let mut queries = Queries::default();
    let output = model.step(&[sequence], &mut pool, &mut queries).expect("a sound step");
    let options = |step_tokens| CaptureOptions {
        step_tokens,
        predicted: true,
        logits: true,
    };
    let mut before: Option<All> = None;
    for (step_tokens, steps) in [(64, 1), (31, 1), (10, 4), (3, 11), (1, 31)] {
        let mut all = All::default();
        capture(&mut model, &tokens, &options(step_tokens), &mut all).expect("a sound capture");
        assert_eq!(all.steps.len(), steps);
        assert!(all.logits == output.rows[0], "steps of {step_tokens}");
        assert!(all.q.values().eq(&queries.0), "steps of {step_tokens}");
        assert_eq!(all.predicted.keys().copied().collect::<Vec<_>>(), [1]);
        assert_eq!(all.predicted[&1].len(), all.q[&1].len());
        let layout = pool.layout();
        for (&(layer, head), keys) in &all.keys {
            for position in 0..tokens.len() {
                let page = pool.page(layer, own[position / 4].expect("a page"));
                let row = position % 4 * 16..(position % 4 + 1) * 16;
                let at = position * 16..(position + 1) * 16;
                assert!(keys[at.clone()] == page[layout.keys(head)][row.clone()]);
                assert!(all.values[&(layer, head)][at] == page[layout.values(head)][row]);
            }
        }
        if let Some(before) = &before {
            assert!(before.predicted == all.predicted, "steps of {step_tokens}");
        }
        before = Some(all);
    }
    // Nothing that is not asked for is made.
    let mut all = All::default();
    capture(&mut model, &tokens, &CaptureOptions::default(), &mut all).expect("a sound capture");
    assert!(all.predicted.is_empty() && all.logits.is_empty());
}

#[test]
fn a_capture_ends_where_it_cannot_go_on() {
    let mut model = small_model(1);
    let tokens: Vec<u32> = (0..12).collect();
    let options = |step_tokens| CaptureOptions {
        step_tokens,
        ..CaptureOptions::default()
    };
    for (at, steps) in [((0, 0), 0), ((1, 0), 0), ((0, 8), 2), ((1, 8), 2)] {
        let mut all = All {
            give_up_at: Some(at),
            ..All::default()
        };
        let error = capture(&mut model, &tokens, &options(4), &mut all).expect_err("the sink gives up");
        assert_eq!(error.to_string(), "the step was aborted: enough");
        assert_eq!(all.steps.len(), steps, "{at:?}");
    }
    let long = vec![1; 2049];
    let table: [(&[u32], usize, &str); 4] = [
        (&[], 4, "a capture of 0 tokens in steps of 4: give 1 to 2048 tokens"),
        (&long, 4, "a capture of 2049 tokens"),
        (&tokens, 0, "steps of at least 1"),
        (&[1, 259], 4, "has token 259"),
    ];
    for (tokens, step_tokens, expected) in table {
        let error = capture(&mut model, tokens, &options(step_tokens), &mut All::default()).expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}");
    }
}
