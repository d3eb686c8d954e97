//! The segments of a column that are clustered.

use half::f16;
use kvasir_simd::{CodedKeys, GROUP, Line, RUN_GROUPS, SEGMENT};

use super::Column;
use crate::{
    IndexError,
    sketch::{
        cluster::{SAMPLES, SEGMENT_GROUPS, cluster},
        format::{SketchFormat, invalid, mean_values},
    },
};

/// The first clustered segments are learnt from, of those behind them one of so many: with two learnt of seven, errors of the tail are a
/// tenth higher than with all.
const LEARN: usize = 8;
const LEARN_EVERY: usize = 4;

impl Column {
    /// Bytes that clustering adds for every group of sixteen keys, at most.
    pub const CLUSTERED_GROUP_BYTES: usize = GROUP * 2 + (1 + SAMPLES * GROUP / SEGMENT_GROUPS) * 32 + 1;

    /// The blocks of the segment that [`Column::cluster`] clusters next; `None` while it is not there whole, and for blocks that do
    /// not fill segments of 1,024 keys: of fewer than 16 keys, or not a power of two of them.
    pub fn next_segment(&self) -> Option<std::ops::Range<usize>> {
        let each = self.block_keys;
        if !each.is_power_of_two() || each < GROUP {
            return None;
        }
        let blocks = SEGMENT / each;
        let first = self.order.len() / SEGMENT * blocks;
        (self.keys / each >= first + blocks).then_some(first..first + blocks)
    }

    /// Puts the keys of the [next segment](Column::next_segment), all of whose blocks were [set](Column::set), in an order in which
    /// alike ones lie together, so that scans read only groups that matter: `values` are those of its blocks, as they were given
    /// to [`Column::sketch`], and ignored if the column has none. What was learnt of blocks is learnt anew of segments.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if there is no such segment, or values are not those of its blocks.
    pub fn cluster(&mut self, values: &[&[f16]]) -> Result<(), IndexError> {
        let Some(blocks) = self.next_segment() else {
            return Err(invalid("segment", "no whole one is left to cluster".to_owned()));
        };
        let d = self.format.head_dim;
        let whole = values.len() == blocks.len() && values.iter().all(|values| values.len() == self.block_keys * d);
        if self.format.values && !whole {
            return Err(invalid(
                "values",
                format!("wants {} blocks of {} rows of {d}", blocks.len(), self.block_keys),
            ));
        }
        let groups = self.clustered_groups()..self.clustered_groups() + SEGMENT_GROUPS;
        let lines = groups.start * self.lines()..groups.end * self.lines();
        let found = cluster(
            self.format,
            &self.codes[lines.clone()],
            &self.steps[groups.clone()],
            &self.masks[groups.clone()],
        );
        self.codes[lines].copy_from_slice(&found.codes);
        self.steps[groups.clone()].fill(found.step);
        self.step_max = self.step_max.max(found.step);
        self.masks[groups.clone()].copy_from_slice(&found.masks);
        if self.format.values {
            let mut rows = Vec::with_capacity(SEGMENT * d);
            for row in &found.order {
                let (block, row) = (usize::from(*row) / self.block_keys, usize::from(*row) % self.block_keys);
                rows.extend_from_slice(&values[block][row * d..][..d]);
            }
            let runs = groups.start / RUN_GROUPS..groups.end / RUN_GROUPS;
            let mut means = vec![0; runs.len() * d * 2];
            mean_values(&rows, d, &mut means);
            let into = self.means[runs.start * d..runs.end * d].iter_mut();
            for (mean, bytes) in into.zip(means.as_chunks().0) {
                *mean = f16::from_le_bytes(*bytes);
            }
            let segment = groups.start / SEGMENT_GROUPS;
            if segment == 0 {
                self.slopes.clear();
            }
            if segment < LEARN || segment.is_multiple_of(LEARN_EVERY) {
                self.slopes.learn(&found.z, self.format.directions(), &rows, d);
            }
        }
        self.order.extend_from_slice(&found.order);
        self.centroids.extend_from_slice(&found.centroids);
        let centroids = SEGMENT_GROUPS / GROUP;
        self.centroid_steps
            .resize(self.centroid_steps.len() + centroids, found.step);
        self.centroid_masks
            .resize(self.centroid_masks.len() + centroids, u16::MAX);
        self.samples.extend_from_slice(&found.samples);
        Ok(())
    }

    /// Clusters all segments that are whole: `values` are those of all blocks, one behind another.
    ///
    /// # Errors
    /// As [`Column::cluster`].
    pub fn cluster_all(&mut self, values: &[f16]) -> Result<(), IndexError> {
        let rows = (self.block_keys * self.format.head_dim).max(1);
        while let Some(blocks) = self.next_segment() {
            let own: Vec<&[f16]> = values.chunks(rows).skip(blocks.start).take(blocks.len()).collect();
            self.cluster(&own)?;
        }
        Ok(())
    }

    /// Codes of sample `at` of a clustered segment, and their step.
    pub(in crate::sketch) fn sample(&self, segment: usize, at: usize) -> (&[Line], f32) {
        let lines = self.lines();
        let first = (segment * SAMPLES + at) * lines;
        (
            &self.samples[first..first + lines],
            self.steps[segment * SEGMENT_GROUPS],
        )
    }

    /// Row in its segment of each slot of those that are clustered, which are the first.
    pub(in crate::sketch) fn order(&self) -> &[u16] {
        &self.order
    }

    /// Groups of clustered segments, which are the first.
    pub(in crate::sketch) fn clustered_groups(&self) -> usize {
        self.order.len() / GROUP
    }

    /// A key for each clustered group.
    pub(in crate::sketch) fn centroids(&self) -> CodedKeys<'_> {
        CodedKeys {
            codes: &self.centroids,
            steps: &self.centroid_steps,
            masks: &self.centroid_masks,
        }
    }
}

impl SketchFormat {
    /// Bytes of codes of a group of sixteen keys.
    pub(in crate::sketch) fn group_bytes(self) -> usize {
        GROUP * self.nibbles() / 2
    }
}
