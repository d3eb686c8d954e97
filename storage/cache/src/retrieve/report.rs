//! What a retrieval did, counted while it is done.

use kvasir_block::LayerBlockLayout;
use kvasir_index::Excluded;

use super::parked::Ahead;

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
    /// Keys that were searched: scored exactly by the flat index, by their sketches first with `sketch`, covered by a built index.
    /// Summed over KV heads.
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
    /// Bytes of keys and values read: each scanned key once per KV head, and each value row that was taken once per KV head. Where
    /// several queries shared the scan, this one's equal share.
    pub bytes_read: u64,
    /// Bound of the share of the searched softmax mass that the result misses, per query head; empty where no certificate was
    /// asked for. 1, which says nothing, where keys were not reached.
    pub missed_mass_bound: Vec<f32>,
    /// More keys were attended to than `target_mass` and `k_max` ask for, since the bound was larger than `missed_mass_max`.
    pub escalated: bool,
    /// Keys that were scored exactly after a scan of sketches or by a built index, summed over KV heads; 0 with the flat index.
    pub keys_rescored: u64,
    /// KV heads whose search had begun with a prediction.
    pub heads_ahead: u32,
    /// KV heads whose prediction was too far off, so that they were searched anew.
    pub heads_too_far: u32,
    /// Index that served: `"flat"`, `"sketch"`, `"roar"` or `"wave"`.
    pub index: &'static str,
    /// Why another than its context was opened with, for a person; empty where it is that one.
    pub index_reason: &'static str,
}

/// A report in the making.
#[derive(Debug)]
pub(super) struct Progress {
    report: Report,
    /// Keys to search per KV head.
    keys: u64,
    row_bytes: u64,
    /// Bounds by sampling, of the KV heads so far.
    bounds: Vec<f32>,
    /// The KV head that comes next was not searched on purpose, or through sketches that were counted already.
    skip: Option<Skip>,
    /// Queries that share the scan.
    queries: u64,
    late: bool,
    missing: bool,
    cut_short: bool,
}

/// What [`Progress::head`] leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skip {
    Search,
    Bytes,
}

/// What was done for one KV head.
#[derive(Debug)]
pub(super) struct HeadCount<'a> {
    /// Keys scanned.
    pub(super) scanned: usize,
    /// Share of their mass that is covered, per query head.
    pub(super) mass: &'a [f32],
    /// Keys that take part, over all query heads.
    pub(super) attended: usize,
    /// Value rows read, for all queries of the scan.
    pub(super) value_rows: usize,
}

impl Progress {
    /// Of one of `queries` that share a scan over so many tokens.
    pub(super) fn new(layout: &LayerBlockLayout, tokens: usize, excluded: &Excluded, queries: usize) -> Self {
        let keys = u64::from(excluded.searched_count(tokens as u32));
        Self {
            report: Report {
                keys_total: keys * layout.kv_heads as u64,
                ..Report::default()
            },
            keys,
            row_bytes: (layout.head_dim * layout.dtype.bytes()) as u64,
            bounds: Vec::new(),
            skip: None,
            queries: queries as u64,
            late: false,
            missing: false,
            cut_short: false,
        }
    }

    /// One KV head is done.
    pub(super) fn head(&mut self, head: HeadCount<'_>) {
        let skip = self.skip.take();
        let reached = if self.keys == 0 || skip == Some(Skip::Search) {
            1.0
        } else {
            head.scanned as f32 / self.keys as f32
        };
        self.report
            .mass_covered
            .extend(head.mass.iter().map(|mass| mass * reached));
        self.report.keys_scanned += head.scanned as u64;
        self.report.keys_attended += head.attended as u64;
        if skip == Some(Skip::Bytes) {
            return;
        }
        // What was scanned key by key is known, not estimated.
        let missed = head.mass.iter().map(|mass| (1.0 - mass * reached).max(0.0));
        self.bounds.extend(missed);
        self.report.bytes_read += (head.scanned + head.value_rows) as u64 * self.row_bytes / self.queries;
    }

    /// Why the scan of a KV head did not reach every block, if it did not.
    pub(super) fn stopped(&mut self, late: bool, missing: bool) {
        self.late |= late;
        self.missing |= missing;
    }

    /// What became of a search of a KV head that had begun ahead.
    pub(super) fn ahead(&mut self, ahead: Ahead) {
        self.report.heads_ahead += u32::from(ahead == Ahead::Used);
        self.report.heads_too_far += u32::from(ahead == Ahead::TooFar);
    }

    pub(super) fn cut_short(&mut self, cut_short: bool) {
        self.cut_short |= cut_short;
    }

    /// The KV head that comes next attends to sink and window only: there is nothing to search.
    pub(super) fn streaming(&mut self) {
        self.report.keys_total -= self.keys;
        self.skip = Some(Skip::Search);
    }

    /// The KV head that comes next was searched through sketches: keys scored exactly, bytes of all queries, bounds.
    pub(super) fn sketched(&mut self, rescored: u64, bytes_read: u64, bounds: &[f32]) {
        self.report.keys_rescored += rescored;
        self.report.bytes_read += bytes_read / self.queries;
        self.bounds.extend_from_slice(bounds);
        self.skip = Some(Skip::Bytes);
    }

    pub(super) fn index(&mut self, index: &'static str, reason: &'static str) {
        (self.report.index, self.report.index_reason) = (index, reason);
    }

    pub(super) fn escalated(&mut self, escalated: bool) {
        self.report.escalated |= escalated;
    }

    /// Gives the bounds that a certificate asks for. Of keys that were not scanned nothing is known.
    pub(super) fn certify(&mut self, sampled: bool) {
        let whole = !self.late && !self.missing;
        let exact = self.report.mass_covered.iter().map(|mass| (1.0 - mass).max(0.0));
        self.report.missed_mass_bound = if sampled {
            std::mem::take(&mut self.bounds)
        } else {
            exact.collect()
        };
        if !whole {
            self.report.missed_mass_bound.fill(1.0);
        }
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
