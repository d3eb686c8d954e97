//! Answers of a decode stream, for the wire.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kvasir_cache::retrieve::{Context, Found, HeadRows, Report, Shortfall};
use kvasir_proto::{
    convert,
    v1::{self, decode_reply},
};

use crate::{row_cache::SentRows, searches::Times};

/// What was found in a layer; of rows those that the caller has not kept by `sent`.
pub(super) fn result(
    layer: u16,
    found: Found,
    context: &Context,
    mut sent: Option<&mut SentRows>,
) -> decode_reply::Result {
    let row_bytes = usize::from(context.schema().head_dim) * context.schema().dtype.bytes();
    match found {
        Found::Rows(heads) => {
            let heads = heads.into_iter().enumerate().map(|(kv_head, rows)| match &mut sent {
                Some(sent) => missing_rows(sent.missing(layer, kv_head, &rows.positions), rows, row_bytes),
                None => all_rows(rows),
            });
            decode_reply::Result::Rows(v1::RowsResult { heads: heads.collect() })
        }
        Found::Attend { o, lse } => decode_reply::Result::Attend(v1::AttendResult {
            o: convert::float_bytes(&o),
            lse: convert::float_bytes(&lse),
        }),
    }
}

fn all_rows(rows: HeadRows) -> v1::HeadRows {
    v1::HeadRows {
        positions: rows.positions,
        keys: rows.keys,
        values: rows.values,
        ..v1::HeadRows::default()
    }
}

/// Of `rows`, the keys and values at the indices `sent`.
fn missing_rows(sent: Vec<u32>, rows: HeadRows, row_bytes: usize) -> v1::HeadRows {
    let pick = |all: &Bytes| -> Bytes {
        let mut picked = BytesMut::with_capacity(sent.len() * row_bytes);
        for &at in &sent {
            picked.extend_from_slice(&all[at as usize * row_bytes..][..row_bytes]);
        }
        picked.freeze()
    };
    let (keys, values) = if sent.len() == rows.positions.len() {
        (rows.keys, rows.values)
    } else {
        (pick(&rows.keys), pick(&rows.values))
    };
    v1::HeadRows {
        positions: rows.positions,
        keys,
        values,
        sent,
        partial: true,
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// The account of an answer.
pub(super) fn report(report: Report, times: Times) -> v1::RetrievalReport {
    use v1::retrieval_report::Shortfall as Wire;
    let Report {
        keys_scanned,
        keys_total,
        keys_attended,
        mass_covered,
        shortfall,
        bytes_read,
        missed_mass_bound,
        escalated,
        keys_rescored,
        index,
        index_reason,
        heads_ahead,
        heads_too_far: _,
    } = report;
    let shortfall = match shortfall {
        None => Wire::None,
        Some(Shortfall::Deadline) => Wire::Deadline,
        Some(Shortfall::MissingBlocks) => Wire::MissingBlocks,
        Some(Shortfall::KMax) => Wire::KMax,
    };
    v1::RetrievalReport {
        keys_scanned,
        keys_total,
        keys_attended,
        mass_covered,
        shortfall: shortfall.into(),
        bytes_read,
        missed_mass_bound,
        escalated,
        keys_rescored,
        index: index.to_owned(),
        index_reason: index_reason.to_owned(),
        hinted: heads_ahead > 0,
        search_us: micros(times.search),
        hidden_us: micros(times.hidden),
        waited_us: micros(times.waited),
    }
}
