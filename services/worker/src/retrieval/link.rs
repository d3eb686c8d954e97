//! The compute thread's side of one sequence's retrieval: a query out, a partial in.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use kvasir_client::{Form, Found, HeadRows, Query, Shortfall};
use kvasir_model::ModelShape;
use kvasir_simd::{Partial, Segment, attend, read_f16};

use super::{Split, Tally, wire::Wire};
use crate::{config::AttentionMode, metrics::StoreMetrics, request::Attention};

/// An open decode stream, as the compute thread sees it.
#[derive(Debug)]
pub(crate) struct Link {
    wire: Box<dyn Wire>,
    split: Split,
    /// What the store leaves out, made once.
    excluded: Vec<Range<u32>>,
    form: Form,
    shape: LinkShape,
    next: u64,
    asked: Option<Asked>,
    /// The last query, where its answer is attended to here.
    q: Vec<f32>,
    tally: Tally,
    metrics: StoreMetrics,
}

/// What of the model's shape retrieval needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkShape {
    pub(crate) q_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) softmax_scale: f32,
}

impl LinkShape {
    pub(crate) fn new(shape: &ModelShape, softmax_scale: f32) -> Self {
        Self {
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

impl Link {
    pub(crate) fn new(
        wire: Box<dyn Wire>,
        split: Split,
        attention: &Attention,
        shape: LinkShape,
        metrics: StoreMetrics,
    ) -> Self {
        let form = match attention.mode {
            AttentionMode::Rows => Form::Rows {
                k: attention.k.unwrap_or(1),
            },
            AttentionMode::Full | AttentionMode::Attend => Form::Attend {
                target_mass: attention.target_mass,
                k_max: attention.k.unwrap_or(0),
            },
        };
        Self {
            wire,
            split,
            excluded: split.excluded(),
            form,
            shape,
            next: 0,
            asked: None,
            q: Vec::new(),
            tally: Tally::default(),
            metrics,
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
        if q.len() != self.shape.q_heads * self.shape.head_dim {
            return Err(format!("a query of {} values, one token was expected", q.len()));
        }
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
        })?;
        self.asked = Some(asked);
        Ok(())
    }

    /// Waits for the answer to the last query and makes it a partial: `[q_heads]` rows.
    ///
    /// # Errors
    /// Why retrieval is at an end: no answer in time, an error, or an answer that does not cover what was asked.
    pub(crate) fn finish(&mut self, timeout: Duration) -> Result<Partial, String> {
        let Some(asked) = self.asked.take() else {
            return Err("no query was sent for this layer".to_owned());
        };
        let reply = self
            .wire
            .receive(timeout.saturating_sub(asked.at.elapsed()))
            .map_err(|why| why.unwrap_or_else(|| format!("the store did not answer a query within {timeout:?}")))?;
        if (reply.sequence, reply.layer) != (asked.sequence, asked.layer) {
            return Err("the store answered another query than the one that was asked".to_owned());
        }
        match reply.report.shortfall {
            // The bound was the caller's own.
            None | Some(Shortfall::KMax) => {}
            Some(Shortfall::Deadline) => return Err(format!("the store ran out of time on a query ({timeout:?})")),
            Some(Shortfall::MissingBlocks) => return Err("the store lost blocks of the context".to_owned()),
        }
        self.tally.add(&reply);
        self.metrics.retrieval_seconds.record(asked.at.elapsed().as_secs_f64());
        self.partial(reply.found)
    }

    /// The partial attention that a reply stands for.
    fn partial(&self, found: Found) -> Result<Partial, String> {
        match found {
            Found::Attend { o, lse } => {
                let LinkShape { q_heads, head_dim, .. } = self.shape;
                if o.len() != q_heads * head_dim || lse.len() != q_heads {
                    return Err(format!("a partial of {} x {} values came back", lse.len(), o.len()));
                }
                Ok(Partial { o, lse })
            }
            Found::Rows(heads) => attend_rows(&heads, &self.q, self.shape),
        }
    }
}

/// Attention over returned rows. The rows of a KV head are the union over its group, and each query head of the group
/// attends to all of them: what came is used.
fn attend_rows(heads: &[HeadRows], q: &[f32], shape: LinkShape) -> Result<Partial, String> {
    let LinkShape {
        q_heads,
        kv_heads,
        head_dim,
        softmax_scale,
    } = shape;
    if heads.len() != kv_heads {
        return Err(format!("rows of {} KV heads came back, not of {kv_heads}", heads.len()));
    }
    let group = q_heads / kv_heads;
    let mut all = Partial::default();
    let mut one = Partial::default();
    for (head, rows) in heads.iter().enumerate() {
        let bytes = rows.positions.len() * head_dim * 2;
        if rows.keys.len() != bytes || rows.values.len() != bytes {
            return Err(format!(
                "{} positions came back with {} bytes of keys and {} of values, not {bytes}",
                rows.positions.len(),
                rows.keys.len(),
                rows.values.len()
            ));
        }
        let (keys, values) = (read_f16(&rows.keys), read_f16(&rows.values));
        let segment = Segment {
            keys: &keys,
            values: &values,
            position: 0,
        };
        let queries = &q[head * group * head_dim..(head + 1) * group * head_dim];
        // The store searches the context only, so every row lies before the query.
        let visible = vec![rows.positions.len(); group];
        attend(queries, &visible, head_dim, softmax_scale, &[segment], &mut one);
        all.o.extend_from_slice(&one.o);
        all.lse.extend_from_slice(&one.lse);
    }
    Ok(all)
}

#[cfg(test)]
mod tests;
