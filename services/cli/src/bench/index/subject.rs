//! The indexes that are measured: built over a prefill, timed from outside.

use std::time::Instant;

use anyhow::Result;
use half::f16;
use kvasir_index::{
    Attend, Column, Flat, HeadBasis, Hits, Hnsw, IndexError, Ivf, KeyIndex, KeyRows, Origin, Quest, Roar, RoarParams,
    Samples, Search, Segment, Sketch, SketchAttended, SketchFormat, SketchScan, Wave, WaveParams, Width,
};
use kvasir_simd::Pool;
use parking_lot::Mutex;

use crate::args::IndexName;

/// Tokens of a block, as a store has them.
const BLOCK: usize = 64;
/// Keys of a segment of `wave`, about, as published.
const SEGMENT_KEYS: usize = 8192;
/// Share of the keys that `wave` estimates, as published.
const ESTIMATED: f32 = 0.232;

/// What an index is built from.
pub(super) struct Prefill<'a> {
    pub(super) keys: &'a [f16],
    pub(super) values: &'a [f16],
    pub(super) head_dim: usize,
    /// Queries for `roar`.
    pub(super) samples: &'a [f32],
    pub(super) basis: &'a HeadBasis,
}

/// An index that remembers how long its searches took.
pub(super) struct Subject {
    index: Built,
    pub(super) build_seconds: f64,
    micros: Mutex<Vec<f64>>,
}

/// One index has more to say than the seam knows.
enum Built {
    Any(Box<dyn KeyIndex>),
    Wave(Box<Wave>),
}

impl Subject {
    pub(super) fn build(name: IndexName, prefill: &Prefill<'_>, pool: &Pool) -> Result<Self> {
        let d = prefill.head_dim;
        // Names are for files, and these indexes go nowhere.
        let origin = Origin::default();
        let blocks: Vec<&[f16]> = prefill.keys.chunks(BLOCK * d).collect();
        let rows = KeyRows::new(&blocks, BLOCK, d);
        let begun = Instant::now();
        let index = match name {
            IndexName::Flat => appended(Flat::new(d, origin)?, prefill.keys)?,
            IndexName::Sketch => appended(
                Sketch::new(d, Width::Four, prefill.basis.clone(), origin)?,
                prefill.keys,
            )?,
            IndexName::Quest => appended(Quest::new(d, origin), prefill.keys)?,
            IndexName::Hnsw => appended(Hnsw::new(d, rows.len(), origin), prefill.keys)?,
            #[cfg(feature = "faiss")]
            IndexName::IvfFaiss => Built::Any(Box::new(kvasir_index::FaissIvf::build(rows, None, origin)?)),
            #[cfg(feature = "faiss")]
            IndexName::HnswFaiss => appended(kvasir_index::FaissHnsw::new(d, origin)?, prefill.keys)?,
            IndexName::Ivf => Built::Any(Box::new(Ivf::build(rows, None, origin, pool)?)),
            IndexName::Roar | IndexName::RoarSeen => {
                let params = match name {
                    IndexName::RoarSeen => RoarParams::seen(),
                    _ => RoarParams::default(),
                };
                let samples = Samples::Shared(prefill.samples);
                Built::Any(Box::new(Roar::build(rows, samples, params, origin, pool)?))
            }
            IndexName::Wave => {
                let params = WaveParams {
                    segment_keys: segment_keys(rows.len()),
                    ..WaveParams::default()
                };
                let mut wave = Wave::new(d, params, true, origin)?;
                wave.append_rows(prefill.keys, prefill.values)?;
                Built::Wave(Box::new(wave))
            }
        };
        Ok(Self {
            index,
            build_seconds: begun.elapsed().as_secs_f64(),
            micros: Mutex::new(Vec::new()),
        })
    }

    fn index(&self) -> &dyn KeyIndex {
        match &self.index {
            Built::Any(index) => index.as_ref(),
            Built::Wave(wave) => wave.as_ref(),
        }
    }

    /// Keys that are attended to at an effort: all that are scored, and at least `least`. What scores beside its budget
    /// (keys in no segment yet) is not cut off.
    pub(super) fn wanted(&self, effort: f32, least: usize) -> usize {
        match self.index {
            Built::Any(_) => ((f64::from(effort) * self.keys() as f64).ceil() as usize).max(least),
            Built::Wave(_) => self.keys(),
        }
    }

    /// Estimates what a search did not score, where the index can.
    pub(super) fn estimate(&self) -> Option<impl Fn(&Search<'_>, &Hits) -> Result<kvasir_simd::Partial, IndexError>> {
        match &self.index {
            Built::Any(_) => None,
            Built::Wave(wave) => Some(|search: &Search<'_>, _: &Hits| {
                let estimated = wave.estimate(search, ESTIMATED)?;
                Ok(estimated.partial)
            }),
        }
    }

    /// Microseconds of each search since the last call.
    pub(super) fn take_micros(&self) -> Vec<f64> {
        std::mem::take(&mut *self.micros.lock())
    }
}

impl KeyIndex for Subject {
    fn name(&self) -> &'static str {
        self.index().name()
    }

    fn keys(&self) -> usize {
        self.index().keys()
    }

    fn bytes(&self) -> usize {
        self.index().bytes()
    }

    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        match &mut self.index {
            Built::Any(index) => index.append(keys),
            Built::Wave(wave) => wave.append(keys),
        }
    }

    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let begun = Instant::now();
        let hits = self.index().search(search);
        self.micros.lock().push(begun.elapsed().as_secs_f64() * 1e6);
        hits
    }

    fn counts(&self) -> bool {
        self.index().counts()
    }

    fn encode(&self) -> Vec<u8> {
        self.index().encode()
    }
}

fn appended(mut index: impl KeyIndex + 'static, keys: &[f16]) -> Result<Built, IndexError> {
    index.append(keys)?;
    Ok(Built::Any(Box::new(index)))
}

/// Segments of equal length, about as long as published, that leave nearly no key outside.
fn segment_keys(keys: usize) -> usize {
    let segments = (keys + SEGMENT_KEYS / 2) / SEGMENT_KEYS;
    (keys / segments.max(1)).max(16)
}

/// What a store does: attention over sketched blocks, with tail and bound.
pub(super) struct Served<'a> {
    prefill: &'a Prefill<'a>,
    column: Column,
    micros: Vec<f64>,
}

impl<'a> Served<'a> {
    pub(super) fn build(prefill: &'a Prefill<'a>) -> Result<Self> {
        let d = prefill.head_dim;
        let mut column = Column::new(SketchFormat::new(d));
        let mut room = Vec::new();
        let blocks = prefill.keys.chunks(BLOCK * d).zip(prefill.values.chunks(BLOCK * d));
        for (at, (keys, values)) in blocks.enumerate() {
            column.push_missing(keys.len() / d)?;
            column.sketch(at, prefill.basis, keys, values, &mut room)?;
        }
        // As a store's are once it had the time.
        column.cluster_all(prefill.values)?;
        Ok(Self {
            prefill,
            column,
            micros: Vec::new(),
        })
    }

    /// Bytes of all sketches, means of values included.
    pub(super) fn bytes(&self) -> usize {
        self.column.bytes()
    }

    /// A way to answer: one scan, whose buffers are used again.
    pub(super) fn attend(&mut self, how: Attend) -> impl FnMut(&Search<'_>) -> Result<SketchAttended, IndexError> {
        let Self {
            prefill,
            column,
            micros,
        } = self;
        // Shared from here on, so that the scan may keep them from one question to the next.
        let (prefill, column) = (*prefill, &*column);
        let d = prefill.head_dim;
        let mut scan = None;
        move |search| {
            let scan = scan.get_or_insert_with(|| SketchScan::new(SketchFormat::new(d), search.scale));
            let begun = Instant::now();
            scan.begin(search.q, prefill.basis)?;
            let blocks = prefill.keys.chunks(BLOCK * d).zip(prefill.values.chunks(BLOCK * d));
            let segments = blocks.enumerate().map(|(at, (keys, values))| {
                Some(Segment {
                    keys,
                    values,
                    position: at * BLOCK,
                })
            });
            scan.scan_column(column, segments, std::slice::from_ref(search.excluded))?;
            let found = scan.attend(how);
            micros.push(begun.elapsed().as_secs_f64() * 1e6);
            Ok(found)
        }
    }

    /// Microseconds of each answer since the last call.
    pub(super) fn take_micros(&mut self) -> Vec<f64> {
        std::mem::take(&mut self.micros)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_leave_nearly_no_key_outside() {
        for (keys, expected, outside) in [
            (7936, 7936, 0),
            (130_816, 8176, 0),
            (100, 100, 0),
            (20_001, 10_000, 1),
            (0, 16, 0),
        ] {
            let segment = segment_keys(keys);
            assert_eq!((segment, keys % segment), (expected, outside), "{keys} keys");
        }
    }
}
