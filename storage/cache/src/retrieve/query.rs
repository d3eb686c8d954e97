//! What a caller may ask, checked before anything is done for it.

use kvasir_block::KvSchema;

use super::{Context, Form, Query};
use crate::{CacheError, ErrorKind};

/// Query heads beyond this are a mistake: the largest models have 128.
const Q_HEADS_MAX: usize = 4096;

/// An argument that cannot be served, by its field's name.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {problem}")]
pub(super) struct InvalidQuery {
    field: &'static str,
    problem: String,
}

impl InvalidQuery {
    pub(super) fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self {
            field,
            problem: problem.into(),
        }
    }
}

impl From<InvalidQuery> for CacheError {
    fn from(error: InvalidQuery) -> Self {
        Self::new(ErrorKind::InvalidArgument, error.to_string())
    }
}

pub(super) fn check_blocks(schema: &KvSchema, blocks: usize, blocks_max: usize) -> Result<(), CacheError> {
    if blocks == 0 {
        return Err(InvalidQuery::new("hashes", "the chain is empty: name at least one whole block").into());
    }
    let positions = blocks as u64 * u64::from(schema.block_tokens);
    if blocks > blocks_max || positions > u64::from(u32::MAX) {
        let message = format!(
            "a context of {blocks} blocks is more than context_blocks_max ({blocks_max}) or 32-bit positions allow"
        );
        return Err(CacheError::new(ErrorKind::LimitReached, message));
    }
    Ok(())
}

pub(super) fn check_heads(schema: &KvSchema, q_heads: usize, softmax_scale: f32) -> Result<(), CacheError> {
    let kv_heads = usize::from(schema.kv_heads);
    if q_heads == 0 || q_heads > Q_HEADS_MAX || !q_heads.is_multiple_of(kv_heads) {
        let problem = format!("{q_heads} is not a multiple of the {kv_heads} KV heads up to {Q_HEADS_MAX}");
        return Err(InvalidQuery::new("q_heads", problem).into());
    }
    if !(softmax_scale.is_finite() && softmax_scale > 0.0) {
        let problem = format!("{softmax_scale} is not a positive number: it is usually 1/sqrt(head_dim)");
        return Err(InvalidQuery::new("softmax_scale", problem).into());
    }
    Ok(())
}

pub(super) fn check(query: &Query<'_>, context: &Context) -> Result<(), InvalidQuery> {
    let schema = context.schema();
    if query.layer >= schema.layers {
        let problem = format!(
            "{} does not exist: the schema has {} layers, from 0",
            query.layer, schema.layers
        );
        return Err(InvalidQuery::new("layer", problem));
    }
    let (q_heads, head_dim) = (context.q_heads(), usize::from(schema.head_dim));
    if query.q.len() != q_heads * head_dim {
        let (found, expected) = (query.q.len(), q_heads * head_dim);
        let problem = format!("{found} elements, {expected} are wanted: {q_heads} query heads of {head_dim}");
        return Err(InvalidQuery::new("q", problem));
    }
    if let Some(at) = query.q.iter().position(|value| !value.is_finite()) {
        let problem = format!("element {at} is not finite: the forward that made it went wrong");
        return Err(InvalidQuery::new("q", problem));
    }
    if !query.local_lse.is_empty() && query.local_lse.len() != q_heads {
        let problem = format!("{} numbers for {q_heads} query heads", query.local_lse.len());
        return Err(InvalidQuery::new("local_lse", problem));
    }
    let is_number = |lse: &f32| !lse.is_nan() && *lse < f32::INFINITY;
    if let Some(at) = query.local_lse.iter().position(|lse| !is_number(lse)) {
        let problem = format!("element {at} is no log-sum-exp of finite scores");
        return Err(InvalidQuery::new("local_lse", problem));
    }
    match query.form {
        Form::Rows { k: 0 } => return Err(InvalidQuery::new("k", "0 keys per query head: ask for at least one")),
        Form::Attend { target_mass, .. } if !(target_mass > 0.0 && target_mass <= 1.0) => {
            let problem = format!("{target_mass} is not a share of the mass: it lies above 0 and is at most 1");
            return Err(InvalidQuery::new("target_mass", problem));
        }
        Form::Attend { k_max: Some(0), .. } => {
            return Err(InvalidQuery::new(
                "k_max",
                "0 keys per query head: leave it out for no bound",
            ));
        }
        Form::Attend { options, .. } if !(0.0..=1.0).contains(&options.effort) => {
            let problem = format!(
                "{} is not a share of the keys: it is 0 (the default) to 1",
                options.effort
            );
            return Err(InvalidQuery::new("effort", problem));
        }
        Form::Attend { options, .. } if !(0.0..=1.0).contains(&options.missed_mass_max) => {
            let problem = format!(
                "{} is not a share of the mass: it is 0 (no demand) to 1",
                options.missed_mass_max
            );
            return Err(InvalidQuery::new("missed_mass_max", problem));
        }
        Form::Rows { .. } | Form::Attend { .. } => {}
    }
    if query.excluded.len() > Query::EXCLUDED_MAX {
        let problem = format!(
            "{} ranges, at most {} are taken: join them",
            query.excluded.len(),
            Query::EXCLUDED_MAX
        );
        return Err(InvalidQuery::new("excluded", problem));
    }
    if let Some(range) = query.excluded.iter().find(|range| range.start > range.end) {
        let problem = format!("{}..{} ends before it starts", range.start, range.end);
        return Err(InvalidQuery::new("excluded", problem));
    }
    Ok(())
}
