//! What is gathered from a forward: moments of queries and keys, and how much mass lies outside sink and window.

use kvasir_index::{Moments, OutsideMass, Streaming};
use kvasir_model::{CaptureSink, CapturedLayer, ModelShape, StepAborted};

use crate::token_bar::TokenBar;

/// First tokens whose keys are left out: sinks look like no other key, and are never searched for.
const SINK_KEYS: usize = 4;

/// Between two positions whose full attention is looked at; prime, so that no rhythm of a text hides something.
const OUTSIDE_EVERY: usize = 31;

/// All heads of a model, layer after layer.
pub(super) struct Gathered {
    shape: ModelShape,
    pub(super) policy: Streaming,
    pub(super) heads: Vec<Head>,
    threads: usize,
}

/// One KV head.
pub(super) struct Head {
    pub(super) moments: Moments,
    /// Nothing where the layer sees a window only.
    pub(super) outside: OutsideMass,
}

impl Gathered {
    pub(super) fn new(shape: &ModelShape, threads: usize) -> Self {
        let head = || Head {
            moments: Moments::new(shape.head_dim),
            outside: OutsideMass::default(),
        };
        Self {
            shape: shape.clone(),
            policy: Streaming::default(),
            heads: (0..shape.layers * shape.kv_heads).map(|_| head()).collect(),
            threads: threads.max(1),
        }
    }

    /// A sink for one window. `moments` is false for a text that only shows what heads can do.
    pub(super) fn sink<'a>(&'a mut self, moments: bool, bar: &'a mut TokenBar) -> impl CaptureSink + 'a {
        Window {
            gathered: self,
            moments,
            bar,
        }
    }
}

struct Window<'a> {
    gathered: &'a mut Gathered,
    moments: bool,
    bar: &'a mut TokenBar,
}

impl CaptureSink for Window<'_> {
    fn layer(&mut self, layer: &CapturedLayer<'_>) -> Result<(), StepAborted> {
        let Gathered {
            shape,
            policy,
            heads,
            threads,
        } = self.gathered;
        let heads = &mut heads[layer.layer * shape.kv_heads..][..shape.kv_heads];
        let (shape, policy, moments) = (&*shape, &*policy, self.moments);
        let per_thread = shape.kv_heads.div_ceil(*threads);
        std::thread::scope(|scope| {
            for (first, heads) in (0..).step_by(per_thread).zip(heads.chunks_mut(per_thread)) {
                scope.spawn(move || {
                    for (kv_head, head) in (first..).zip(heads) {
                        head.take(layer, kv_head, shape, policy, moments);
                    }
                });
            }
        });
        Ok(())
    }

    fn step(&mut self, tokens: std::ops::Range<usize>, _: &[f32]) -> Result<(), StepAborted> {
        self.bar.add(tokens.len());
        Ok(())
    }
}

impl Head {
    fn take(
        &mut self,
        layer: &CapturedLayer<'_>,
        kv_head: usize,
        shape: &ModelShape,
        policy: &Streaming,
        moments: bool,
    ) {
        let (head_dim, width) = (shape.head_dim, shape.group() * shape.head_dim);
        let rows = layer.q.chunks_exact(shape.q_heads * head_dim);
        let group = rows.map(|row| &row[kv_head * width..][..width]);
        if moments {
            group.clone().for_each(|q| self.moments.add_queries(q));
            let mut keys = Vec::new();
            let first = layer.tokens.start.max(SINK_KEYS).min(layer.tokens.end);
            layer.keys(kv_head, first..layer.tokens.end, &mut keys);
            self.moments.add_keys(&keys);
        }
        if shape.window(layer.layer).is_some() {
            return;
        }
        let mut keys = Vec::new();
        for (position, q) in layer.tokens.clone().zip(group) {
            if position % OUTSIDE_EVERY == 0 && position > policy.sink + policy.window {
                let have = keys.len() / head_dim;
                layer.keys(kv_head, have..position + 1, &mut keys);
                let scale = 1.0 / (head_dim as f32).sqrt();
                self.outside.add(q, &keys, head_dim, scale, policy);
            }
        }
    }
}
