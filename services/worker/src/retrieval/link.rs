//! The compute thread's side of one sequence's retrieval: a query out, a partial in.

use std::time::{Duration, Instant};

use half::f16;
use kvasir_client::{Form, Found, HeadRows, Query, Reply, Shortfall};
use kvasir_model::ModelShape;
use kvasir_simd::{Partial, Segment, attend};
use tokio::{runtime::Handle, sync::mpsc};

use super::{Split, Tally};
use crate::{config::AttentionMode, metrics::StoreMetrics, request::Attention};

/// An open decode stream, as the compute thread sees it.
#[derive(Debug)]
pub(crate) struct Link {
    queries: mpsc::Sender<Query>,
    replies: mpsc::Receiver<Result<Reply, String>>,
    split: Split,
    form: Form,
    shape: LinkShape,
    next: u64,
    asked: Option<Asked>,
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
    q: Vec<f32>,
    at: Instant,
}

impl Link {
    pub(crate) fn new(
        queries: mpsc::Sender<Query>,
        replies: mpsc::Receiver<Result<Reply, String>>,
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
            queries,
            replies,
            split,
            form,
            shape,
            next: 0,
            asked: None,
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

    /// Sends the query of one layer; never waits.
    ///
    /// # Errors
    /// Why retrieval is at an end.
    pub(crate) fn begin(&mut self, layer: usize, q: &[f32], deadline: Duration) -> Result<(), String> {
        if q.len() != self.shape.q_heads * self.shape.head_dim {
            return Err(format!("a query of {} values, one token was expected", q.len()));
        }
        self.next += 1;
        let asked = Asked {
            sequence: self.next,
            layer: layer as u16,
            q: q.to_vec(),
            at: Instant::now(),
        };
        let query = Query {
            sequence: asked.sequence,
            layer: asked.layer,
            q: asked.q.clone(),
            form: self.form,
            excluded: self.split.excluded(),
            deadline: Some(deadline),
        };
        self.asked = Some(asked);
        self.queries
            .try_send(query)
            .map_err(|_| "the retrieval stream is gone or behind".to_owned())
    }

    /// Waits for the answer to the last query and makes it a partial: `[q_heads]` rows.
    ///
    /// # Errors
    /// Why retrieval is at an end: no answer in time, an error, or an answer that does not cover what was asked.
    pub(crate) fn finish(&mut self, timeout: Duration, runtime: &Handle) -> Result<Partial, String> {
        let Some(asked) = self.asked.take() else {
            return Err("no query was sent for this layer".to_owned());
        };
        let next =
            async { tokio::time::timeout(timeout.saturating_sub(asked.at.elapsed()), self.replies.recv()).await };
        let reply = match runtime.block_on(next) {
            Ok(Some(reply)) => reply?,
            Ok(None) => return Err("the retrieval stream ended".to_owned()),
            Err(_) => return Err(format!("the store did not answer a query within {timeout:?}")),
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
        let partial = partial(&reply.found, &asked.q, self.shape)?;
        self.tally.add(&reply);
        self.metrics.retrieval_seconds.record(asked.at.elapsed().as_secs_f64());
        Ok(partial)
    }
}

/// The partial attention of `q[q_heads, head_dim]` that a reply stands for.
fn partial(found: &Found, q: &[f32], shape: LinkShape) -> Result<Partial, String> {
    match found {
        Found::Attend { o, lse } => {
            if o.len() != q.len() || lse.len() != shape.q_heads {
                return Err(format!("a partial of {} x {} values came back", lse.len(), o.len()));
            }
            Ok(Partial {
                o: o.clone(),
                lse: lse.clone(),
            })
        }
        Found::Rows(heads) => attend_rows(heads, q, shape),
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
        let (keys, values) = (halves(&rows.keys), halves(&rows.values));
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

fn halves(bytes: &[u8]) -> Vec<f16> {
    bytes
        .chunks_exact(2)
        .map(|two| f16::from_le_bytes([two[0], two[1]]))
        .collect()
}

#[cfg(test)]
mod tests;
