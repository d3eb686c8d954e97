//! What a retrieval did, counted while it is done.

use kvasir_index::Excluded;

use super::Context;

/// Why a result covers less than was asked. Where there are several reasons, the first of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortfall {
    /// The deadline passed; blocks not reached are not covered.
    Deadline,
    /// A block vanished or was corrupt, or too many disk reads were running; it is not covered.
    MissingBlocks,
    /// `k_max` was reached before `target_mass`.
    KMax,
}

/// What a retrieval did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Keys whose score was computed exactly, summed over KV heads.
    pub keys_scanned: u64,
    /// Keys that could have been searched (context minus exclusions), summed over KV heads.
    pub keys_total: u64,
    /// Keys that took part in the result, summed over query heads.
    pub keys_attended: u64,
    /// Share of the searched softmax mass that the result covers, per query head. Exact when every key was scanned. Where a
    /// deadline or a missing block kept keys from being scanned, those count as if each had the mean mass of those that
    /// were: an estimate. 1 where exclusions left nothing to search.
    pub mass_covered: Vec<f32>,
    /// Why it covers less than was asked.
    pub shortfall: Option<Shortfall>,
    /// Bytes of keys and values read: each scanned key once per KV head, and each value row that was taken once per KV head.
    pub bytes_read: u64,
}

/// A report in the making.
#[derive(Debug)]
pub(super) struct Progress {
    report: Report,
    /// Keys to search per KV head.
    keys: u64,
    row_bytes: u64,
    late: bool,
    missing: bool,
    cut_short: bool,
}

impl Progress {
    pub(super) fn new(context: &Context, excluded: &Excluded) -> Self {
        let layout = context.schema().layout();
        let keys = u64::from(excluded.searched_count(context.tokens() as u32));
        Self {
            report: Report {
                keys_total: keys * layout.kv_heads as u64,
                ..Report::default()
            },
            keys,
            row_bytes: (layout.head_dim * layout.dtype.bytes()) as u64,
            late: false,
            missing: false,
            cut_short: false,
        }
    }

    /// One KV head is done: keys scanned, the share of their mass per query head, keys that take part over all query heads,
    /// value rows read.
    pub(super) fn head(&mut self, scanned: usize, mass: &[f32], attended: usize, value_rows: usize) {
        let reached = if self.keys == 0 {
            1.0
        } else {
            scanned as f32 / self.keys as f32
        };
        self.report.mass_covered.extend(mass.iter().map(|mass| mass * reached));
        self.report.keys_scanned += scanned as u64;
        self.report.keys_attended += attended as u64;
        self.report.bytes_read += (scanned + value_rows) as u64 * self.row_bytes;
    }

    pub(super) fn late(&mut self) {
        self.late = true;
    }

    pub(super) fn is_late(&self) -> bool {
        self.late
    }

    pub(super) fn missing(&mut self) {
        self.missing = true;
    }

    pub(super) fn cut_short(&mut self, cut_short: bool) {
        self.cut_short |= cut_short;
    }

    pub(super) fn finish(mut self) -> Report {
        let reasons = [
            (self.late, Shortfall::Deadline),
            (self.missing, Shortfall::MissingBlocks),
            (self.cut_short, Shortfall::KMax),
        ];
        self.report.shortfall = reasons.iter().find(|(holds, _)| *holds).map(|&(_, reason)| reason);
        self.report
    }
}
