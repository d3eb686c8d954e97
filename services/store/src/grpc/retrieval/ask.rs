//! What a decode stream asks, from the wire.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use kvasir_cache::retrieve::{AttendOptions, Certificate, Context, Form, IndexChoice};
use kvasir_proto::{InvalidMessage, convert, v1};

use crate::searches::Asked;

/// Ranges that a caller holds itself: a sink, a window, and some.
const EXCLUDED_MAX: usize = 1024;

pub(super) fn index_choice(name: &str) -> Result<IndexChoice, InvalidMessage> {
    match name {
        "" => Ok(IndexChoice::Best),
        "flat" => Ok(IndexChoice::Flat),
        "sketch" => Ok(IndexChoice::Sketch),
        "roar" => Ok(IndexChoice::Roar),
        "wave" => Ok(IndexChoice::Wave),
        other => {
            let shown: String = other.chars().take(40).collect();
            let problem = format!(
                "{shown:?} is no index: say \"flat\", \"sketch\", \"roar\", \"wave\", or leave it empty for the best there is"
            );
            Err(InvalidMessage::new("index", problem))
        }
    }
}

pub(super) fn layer(layer: u32, context: &Context) -> Result<u16, InvalidMessage> {
    let layers = context.schema().layers;
    let found = u16::try_from(layer).ok().filter(|layer| *layer < layers);
    found.ok_or_else(|| {
        let problem = format!("{layer}: the namespace has layers 0 to {}", layers - 1);
        InvalidMessage::new("layer", problem)
    })
}

/// Base-2 log-sum-exp of what the caller attends to by itself; empty where he does not say.
pub(super) fn local_lse(bytes: &[u8], q_heads: usize) -> Result<Vec<f32>, InvalidMessage> {
    if !bytes.is_empty() && bytes.len() != q_heads * 4 {
        let problem = format!("{} bytes instead of {} or none", bytes.len(), q_heads * 4);
        return Err(InvalidMessage::new("local_lse", problem));
    }
    // What they may be is for the cache to say.
    Ok(convert::float_values(bytes))
}

/// A query's fields, as far as the wire has rules for them; the cache checks the rest.
pub(super) fn checked(query: v1::Query, context: &Context, reply_bytes_max: usize) -> Result<Asked, InvalidMessage> {
    let schema = context.schema();
    let layer = layer(query.layer, context)?;
    let head_dim = usize::from(schema.head_dim);
    let q = convert::floats("q", &query.q, context.q_heads() * head_dim)?;
    if query.excluded.len() > EXCLUDED_MAX {
        let problem = format!(
            "{} ranges, at most {EXCLUDED_MAX}: join neighbours",
            query.excluded.len()
        );
        return Err(InvalidMessage::new("excluded", problem));
    }
    let excluded = query.excluded.into_iter().enumerate().map(|(i, range)| {
        Range::try_from(range).map_err(|error: InvalidMessage| error.inside(&format!("excluded[{i}]")))
    });
    let form = match query.form {
        Some(v1::query::Form::Rows(v1::Rows { k })) => {
            let k = k as usize;
            // The union of a KV head's query heads, at most all tokens; keys and values and a position each.
            let rows = k
                .saturating_mul(context.q_heads())
                .min(usize::from(schema.kv_heads) * context.tokens());
            let bytes = rows.saturating_mul(2 * head_dim * schema.dtype.bytes() + 4);
            if bytes > reply_bytes_max {
                let problem = format!(
                    "{k}: the reply could have {bytes} bytes, store.reply_bytes_max is {reply_bytes_max}: ask for fewer keys"
                );
                return Err(InvalidMessage::new("rows.k", problem));
            }
            Form::Rows { k }
        }
        Some(v1::query::Form::Attend(attend)) => attend_form(&attend).map_err(|error| error.inside("attend"))?,
        None => return Err(InvalidMessage::new("form", "is missing: ask for rows or attend")),
    };
    let local_lse = local_lse(&query.local_lse, context.q_heads())?;
    Ok(Asked {
        local_lse,
        layer,
        q,
        form,
        excluded: excluded.collect::<Result<_, _>>()?,
        deadline: deadline(query.deadline_ms),
    })
}

fn attend_form(attend: &v1::Attend) -> Result<Form, InvalidMessage> {
    let certificate = match v1::Certificate::try_from(attend.certificate) {
        Ok(v1::Certificate::None) => Certificate::None,
        Ok(v1::Certificate::Statistical) => Certificate::Statistical,
        Ok(v1::Certificate::Deterministic) => Certificate::Deterministic,
        Err(_) => {
            let problem = format!("{} is no kind of certificate", attend.certificate);
            return Err(InvalidMessage::new("certificate", problem));
        }
    };
    Ok(Form::Attend {
        target_mass: attend.target_mass,
        k_max: (attend.k_max > 0).then_some(attend.k_max as usize),
        options: AttendOptions {
            tail: attend.tail,
            certificate,
            missed_mass_max: attend.missed_mass_max,
            unbiased: attend.unbiased,
            effort: attend.effort,
        },
    })
}

/// When an answer is of no use any more; 0 is never.
fn deadline(ms: u32) -> Option<Instant> {
    (ms > 0).then(|| Instant::now() + Duration::from_millis(ms.into()))
}
