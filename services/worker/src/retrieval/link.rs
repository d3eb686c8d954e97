//! The compute thread's side of one sequence's retrieval: a query out, a partial in.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_client::{AttendOptions, Form, Found, Hint, Opened, Query, Reply, Shortfall};
use kvasir_model::ModelShape;
use kvasir_simd::Partial;

use super::{
    Split, Tally,
    auto::{self, Experience, Sample},
    hints::Hints,
    rows::{Kept, attend_rows},
    tally::{Waits, in_the_store},
    wire::Wire,
};
use crate::{
    config::{AttentionMode, Certificate},
    metrics::StoreMetrics,
    request::Attention,
};

/// An open decode stream, as the compute thread sees it.
#[derive(Debug)]
pub(crate) struct Link {
    wire: Box<dyn Wire>,
    split: Split,
    /// What the store leaves out, made once.
    excluded: Vec<Range<u32>>,
    form: Form,
    shape: LinkShape,
    hints: Hints,
    next: u64,
    asked: Option<Asked>,
    /// The last query, where its answer is attended to here.
    q: Vec<f32>,
    kept: Kept,
    /// By layer, base-2 log-sum-exp of what the last token attended to here: about that of the next one. Empty before the first.
    local_lse: Vec<Vec<f32>>,
    tally: Tally,
    around: LinkAround,
}

/// What of the model's shape retrieval needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkShape {
    pub(crate) layers: usize,
    pub(crate) q_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) softmax_scale: f32,
}

/// Who is told about what came.
#[derive(Clone, Debug)]
pub(crate) struct LinkAround {
    pub(crate) metrics: StoreMetrics,
    pub(crate) experience: Arc<Experience>,
}

/// How a sequence retrieves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkPlan {
    pub(crate) split: Split,
    pub(crate) attention: Attention,
    pub(crate) shape: LinkShape,
    /// First layer whose search may begin ahead.
    pub(crate) hint_from: usize,
    /// Rows per layer and KV head that are kept of what comes.
    pub(crate) row_cache_rows: usize,
}

impl LinkShape {
    pub(crate) fn new(shape: &ModelShape, softmax_scale: f32) -> Self {
        Self {
            layers: shape.layers,
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            softmax_scale,
        }
    }
}

#[derive(Debug)]
struct Asked {
    sequence: u64,
    layer: u16,
    at: Instant,
}

/// The index that takes nothing from a forecast: it scores every key with the query itself.
const EXACT_INDEX: &str = "flat";

impl Link {
    pub(crate) fn new(wire: Box<dyn Wire>, opened: &Opened, plan: &LinkPlan, around: LinkAround) -> Self {
        let LinkPlan {
            split,
            attention,
            shape,
            ..
        } = *plan;
        Self {
            wire,
            split,
            excluded: split.excluded(),
            form: form(&attention),
            shape,
            hints: Hints::new(
                shape.layers,
                if opened.index == EXACT_INDEX {
                    usize::MAX
                } else {
                    plan.hint_from
                },
            ),
            next: 0,
            asked: None,
            q: Vec::new(),
            kept: Kept::new(shape, plan.row_cache_rows),
            local_lse: vec![Vec::new(); shape.layers],
            tally: Tally::new(opened),
            around,
        }
    }

    pub(crate) fn split(&self) -> &Split {
        &self.split
    }

    pub(crate) fn into_tally(self) -> Tally {
        self.tally
    }

    /// Sends the query of one layer.
    ///
    /// # Errors
    /// Why retrieval is at an end.
    pub(crate) fn begin(&mut self, layer: usize, q: &[f32], deadline: Duration) -> Result<(), String> {
        self.check(q)?;
        if let Form::Rows { .. } = self.form {
            self.q.clear();
            self.q.extend_from_slice(q);
        }
        self.next += 1;
        let asked = Asked {
            sequence: self.next,
            layer: layer as u16,
            at: Instant::now(),
        };
        self.wire.send(Query {
            sequence: asked.sequence,
            layer: asked.layer,
            q: q.to_vec(),
            form: self.form,
            excluded: self.excluded.clone(),
            deadline: Some(deadline),
            local_lse: self.local_lse.get(layer).cloned().unwrap_or_default(),
        })?;
        self.asked = Some(asked);
        self.hints.asked(layer);
        Ok(())
    }

    /// Whether the search of `layer` is worth beginning with a forecast.
    pub(crate) fn wants_hint(&self, layer: usize) -> bool {
        self.hints.wants(layer)
    }

    /// Sends about what the queries of `layer` will be.
    ///
    /// # Errors
    /// Why retrieval is at an end.
    pub(crate) fn hint(&mut self, layer: usize, q: &[f32]) -> Result<(), String> {
        self.check(q)?;
        self.hints.sent(layer);
        self.wire.hint(Hint {
            layer: layer as u16,
            q: q.to_vec(),
            local_lse: self.local_lse.get(layer).cloned().unwrap_or_default(),
        })
    }

    /// Takes what the token attends to here in a layer.
    pub(crate) fn attended(&mut self, layer: usize, lse: &[f32]) {
        if let Some(local) = self.local_lse.get_mut(layer) {
            local.clear();
            local.extend_from_slice(lse);
        }
    }

    /// Waits for the answer to the last query and makes it a partial: `[q_heads]` rows.
    ///
    /// # Errors
    /// Why retrieval is at an end: no answer in time, an error, or an answer that does not cover what was asked.
    pub(crate) fn finish(&mut self, timeout: Duration) -> Result<Partial, String> {
        let Some(asked) = self.asked.take() else {
            return Err("no query was sent for this layer".to_owned());
        };
        let waiting = Instant::now();
        let reply = self
            .wire
            .receive(timeout.saturating_sub(asked.at.elapsed()))
            .map_err(|why| why.unwrap_or_else(|| format!("the store did not answer a query within {timeout:?}")))?;
        let waits = Waits {
            whole: asked.at.elapsed(),
            waited: waiting.elapsed(),
        };
        if (reply.sequence, reply.layer) != (asked.sequence, asked.layer) {
            return Err("the store answered another query than the one that was asked".to_owned());
        }
        match reply.report.shortfall {
            // The bound was the caller's own.
            None | Some(Shortfall::KMax) => {}
            Some(Shortfall::Deadline) => return Err(format!("the store ran out of time on a query ({timeout:?})")),
            Some(Shortfall::MissingBlocks) => return Err("the store lost blocks of the context".to_owned()),
        }
        let layer = usize::from(asked.layer);
        self.hints.answered(reply.report.hinted);
        self.note(&reply, waits);
        self.partial(layer, reply.found)
    }

    fn check(&self, q: &[f32]) -> Result<(), String> {
        if q.len() == self.shape.q_heads * self.shape.head_dim {
            Ok(())
        } else {
            Err(format!("a query of {} values, one token was expected", q.len()))
        }
    }

    fn note(&mut self, reply: &Reply, waits: Waits) {
        self.tally.add(reply, waits);
        let metrics = &self.around.metrics;
        metrics.retrieval_seconds.record(waits.whole.as_secs_f64());
        metrics.retrieval_wait_seconds.record(waits.waited.as_secs_f64());
        metrics
            .retrieval_search_seconds
            .record(reply.report.search.as_secs_f64());
        if reply.report.hinted {
            metrics.retrieval_hinted.increment(1);
        }
        if reply.report.escalated {
            metrics.retrieval_escalations.increment(1);
        }
        self.around.experience.add(Sample {
            form: match reply.found {
                Found::Rows(_) => auto::Form::Rows,
                Found::Attend { .. } => auto::Form::Attend,
            },
            bytes: reply.wire_bytes,
            whole: waits.whole,
            store: in_the_store(reply),
        });
    }

    /// The partial attention that an answer for `layer` stands for.
    fn partial(&mut self, layer: usize, found: Found) -> Result<Partial, String> {
        match found {
            Found::Attend { o, lse } => {
                let LinkShape { q_heads, head_dim, .. } = self.shape;
                if o.len() != q_heads * head_dim || lse.len() != q_heads {
                    return Err(format!("a partial of {} x {} values came back", lse.len(), o.len()));
                }
                Ok(Partial { o, lse })
            }
            Found::Rows(heads) => {
                let (partial, rows) = attend_rows(&heads, &self.q, self.shape, layer, &mut self.kept)?;
                self.tally.rows += rows.all;
                self.tally.rows_kept += rows.kept;
                self.around.metrics.rows.increment(rows.all);
                self.around.metrics.rows_kept.increment(rows.kept);
                Ok(partial)
            }
        }
    }
}

/// What is asked of the store.
fn form(attention: &Attention) -> Form {
    match attention.mode {
        AttentionMode::Rows => Form::Rows { k: attention.k },
        AttentionMode::Full | AttentionMode::Attend | AttentionMode::Auto => Form::Attend {
            target_mass: attention.target_mass,
            k_max: attention.k_max,
            options: AttendOptions {
                tail: attention.tail,
                certificate: match attention.certificate {
                    Certificate::None => kvasir_client::Certificate::None,
                    Certificate::Statistical => kvasir_client::Certificate::Statistical,
                    Certificate::Deterministic => kvasir_client::Certificate::Deterministic,
                },
                missed_mass_max: attention.missed_mass_max,
                unbiased: false,
                effort: attention.effort,
            },
        },
    }
}

#[cfg(test)]
mod tests;
