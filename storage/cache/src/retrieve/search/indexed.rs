//! One KV head searched through a built index, and what lies behind the index's prefix by a scan.

use std::{ops::Range, sync::Arc};

use half::f16;
use kvasir_block::{Dtype, LayerBlockLayout};
use kvasir_index::{Excluded, IndexError, KeyRows};
use kvasir_simd::log_sum_exp2;

use super::{Buffers, Purpose, Search, wants_exact, wants_lift};
use crate::{
    indexes::{Covering, HeadIndex, LayerIndex},
    retrieve::{
        AttendOptions, Certificate, Form,
        covered::{Covered, Part, Work, best_of, mass_of},
        head::{Head, HeadFound, gather},
        parked::Ahead,
        sketches::Extra,
    },
};

/// The built index of a layer, and how far it reaches.
#[derive(Debug)]
pub(super) struct Indexed {
    index: Arc<LayerIndex>,
    pub(super) name: &'static str,
    /// Blocks that it covers.
    blocks: usize,
    /// What a scan leaves out: these, and what the queries leave out.
    behind: Excluded,
}

impl Indexed {
    pub(super) fn new(
        covering: Covering,
        index: Arc<LayerIndex>,
        layout: &LayerBlockLayout,
        excluded: &[Range<u32>],
    ) -> Self {
        let covered = 0..(covering.blocks * layout.block_tokens) as u32;
        let behind: Vec<_> = excluded.iter().cloned().chain([covered]).collect();
        Self {
            index,
            name: covering.name.kind.name(),
            blocks: covering.blocks,
            behind: Excluded::new(&behind),
        }
    }
}

impl Search {
    /// The index of a KV head, if a built one serves it. A streaming head needs none.
    pub(super) fn index_of(&self, kv_head: usize) -> Option<(&Indexed, &HeadIndex)> {
        let indexed = self.indexed.as_ref()?;
        let streams = self.sketched.as_ref().is_some_and(|sketched| {
            let layer = usize::from(sketched.layer);
            sketched.basis.basis().head(layer, kv_head).streaming
        });
        let index = indexed.index.heads[kv_head].as_ref().filter(|_| !streams)?;
        Some((indexed, index))
    }

    /// What a built index finds in the blocks that it covers, and a scan in those behind.
    pub(super) fn indexed_head<'a>(
        &'a self,
        kv_head: usize,
        halves: &[Option<&'a [f16]>],
        indexed: &'a Indexed,
        index: &HeadIndex,
        buffers: &mut Buffers<'a>,
    ) -> Head {
        if matches!(self.purpose, Purpose::Park { .. }) {
            // A walk keeps no candidates for other queries.
            return Head::parked(None);
        }
        let layout = &self.layout;
        let behind = self.scanned_head(kv_head, halves, &indexed.behind, buffers);
        if behind.late || self.is_late() {
            return Head { late: true, ..behind };
        }
        let rows = |range: Range<usize>| -> Vec<&'a [f16]> {
            let covered = halves[..indexed.blocks].iter().flatten();
            covered.map(|halves| &halves[range.clone()]).collect()
        };
        let (keys, values) = (rows(layout.keys(kv_head)), rows(layout.values(kv_head)));
        let covered = Covered {
            index,
            keys: KeyRows::new(&keys, layout.block_tokens, layout.head_dim),
            values: KeyRows::new(&values, layout.block_tokens, layout.head_dim),
            excluded: &self.excluded,
            scale: self.scale,
        };
        let row_of = |at: u32| {
            let (block, token) = (at as usize / layout.block_tokens, at as usize % layout.block_tokens);
            let row = |range: Range<usize>| {
                halves[block].map(|halves| &halves[range][token * layout.head_dim..][..layout.head_dim])
            };
            row(layout.keys(kv_head)).zip(row(layout.values(kv_head)))
        };
        let mut work = Work::default();
        let found = self.join(kv_head, &covered, behind.found, &row_of, &mut work);
        let rest = behind.sketch.unwrap_or_else(|| {
            let row_bytes = layout.head_dim * Dtype::F16.bytes();
            let read = behind.scanned * row_bytes;
            Extra {
                rescored: behind.scanned as u64,
                bytes_read: read as u64,
                ..Extra::default()
            }
        });
        let extra = Extra {
            rescored: rest.rescored + work.scored / (self.queries * self.group) as u64,
            bytes_read: rest.bytes_read + work.bytes,
            ..rest
        };
        let Some(found) = found else {
            // Arguments were checked, so this is a fault; the scan knows what there is.
            return self.scanned_head(kv_head, halves, &self.excluded, buffers);
        };
        Head {
            scanned: behind.scanned + covered.searched(),
            late: false,
            missing: behind.missing,
            sketch: Some(extra),
            streaming: false,
            ahead: Ahead::No,
            found,
        }
    }

    /// Both parts in one; `None` if the index refused.
    fn join<'a>(
        &self,
        kv_head: usize,
        covered: &Covered<'_>,
        behind: HeadFound,
        row_of: &dyn Fn(u32) -> Option<(&'a [f16], &'a [f16])>,
        work: &mut Work,
    ) -> Option<HeadFound> {
        let (d, per_query) = (self.layout.head_dim, self.group * self.layout.head_dim);
        let q = self.queries_of(kv_head);
        let refused = |error: IndexError| tracing::error!(%error, "an index refused a checked query");
        match (self.form, behind) {
            (Form::Rows { k }, HeadFound::Rows(behind, mass)) => {
                let found = covered.rows(q, k, work).map_err(refused).ok()?;
                let keys_behind: Vec<&[f16]> = behind.positions.iter().filter_map(|at| Some(row_of(*at)?.0)).collect();
                let behind_lse = mass_of(q, &keys_behind, d, self.scale);
                let total: Vec<f32> = (found.total.iter().zip(behind_lse).zip(&mass))
                    .map(|((total, lse), mass)| log_sum_exp2(&[*total, lse - mass.max(f32::MIN_POSITIVE).log2()]))
                    .collect();
                let positions: Vec<u32> = found.positions.into_iter().chain(behind.positions).collect();
                let keys: Vec<&[f16]> = positions.iter().filter_map(|at| Some(row_of(*at)?.0)).collect();
                let (chosen, mass) = best_of(q, &keys, d, self.scale, k, &total);
                let positions: Vec<u32> = chosen.iter().map(|at| positions[*at as usize]).collect();
                work.bytes += (positions.len() * d * Dtype::F16.bytes()) as u64;
                let rows = gather(&positions, d, |take| {
                    let rows = positions.iter().filter_map(|at| row_of(*at));
                    rows.for_each(|(key, value)| take(key, value));
                });
                Some(HeadFound::Rows(rows, mass))
            }
            (
                Form::Attend {
                    target_mass,
                    k_max,
                    options,
                },
                HeadFound::Attend(behind, escalated),
            ) => {
                let mut all = Part::default();
                // Each sequence for itself: what one finds must not depend on the others.
                for q in q.chunks_exact(per_query) {
                    let part = covered
                        .attend(q, target_mass, k_max, options, work)
                        .map_err(refused)
                        .ok()?;
                    all.append(part);
                }
                let behind = Part::of_scan(behind, options.tail && self.sketched.is_some());
                Some(HeadFound::Attend(all.join(behind, d).attended, escalated))
            }
            _ => None,
        }
    }
}

/// Whether only a scan, of sketches or of every key, gives what is asked for: built indexes give no bound.
pub(in crate::retrieve) fn wants_scan(form: Form) -> bool {
    let bounded = |options: AttendOptions| options.certificate != Certificate::None || options.missed_mass_max > 0.0;
    wants_exact(form) || wants_lift(form) || matches!(form, Form::Attend { options, .. } if bounded(options))
}
