//! Sketches of a context's blocks in columns, as a scan reads them: codes beside codes, then steps, masks and means.
//!
//! Derived from the sketches of blocks and never stored. A scan over blocks as they come would wait for each block's header and
//! skip over its means; here a core reads one stream.
//!
//! A *slot* is a key's place in the order of scanning. Slots are in the order of positions, blocks rounded up to groups of sixteen,
//! but for the first segments once they are [clustered](Column::cluster).

mod clustered;
mod searched;

use half::f16;
use kvasir_simd::{CodedKeys, GROUP, Line, RUN_GROUPS};

use super::{
    format::{RUN, SketchFormat, View, encode_block_and, invalid},
    slopes::Slopes,
};
use crate::{HeadBasis, IndexError};

/// Of so many blocks one is learnt from. From all of them errors of the tail are 3 % lower (.0114 for .0118 on real text), and a
/// block whose sketch was kept would cost as much as a new one.
const LEARN_EVERY: usize = 4;

/// Sketches of consecutive blocks of one KV head. All blocks but the last have the same number of keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    format: SketchFormat,
    /// Keys of each block but the last, which may have fewer; 0 while there is none.
    block_keys: usize,
    keys: usize,
    blocks: usize,
    codes: Vec<Line>,
    /// Per group.
    steps: Vec<f32>,
    masks: Vec<u16>,
    step_max: f32,
    /// `[runs, head_dim]`
    means: Vec<f16>,
    /// Keys per run.
    run_keys: Vec<f32>,
    /// Of what was learnt from.
    slopes: Slopes,
    /// Of clustered segments, what [`super::cluster::Clustered::order`] is of one.
    order: Vec<u16>,
    /// A key per group of clustered segments, sixteen a group, and their steps and masks.
    centroids: Vec<Line>,
    centroid_steps: Vec<f32>,
    centroid_masks: Vec<u16>,
    /// Samples of clustered segments: groups of sixteen keys each.
    samples: Vec<Line>,
}

impl Column {
    /// Of no blocks yet.
    pub fn new(format: SketchFormat) -> Self {
        Self {
            format,
            block_keys: 0,
            keys: 0,
            blocks: 0,
            codes: Vec::new(),
            steps: Vec::new(),
            masks: Vec::new(),
            step_max: 0.0,
            means: Vec::new(),
            run_keys: Vec::new(),
            slopes: Slopes::default(),
            order: Vec::new(),
            centroids: Vec::new(),
            centroid_steps: Vec::new(),
            centroid_masks: Vec::new(),
            samples: Vec::new(),
        }
    }

    /// As new, with the room that was made.
    pub(super) fn clear(&mut self, format: SketchFormat) {
        (self.format, self.block_keys, self.keys, self.blocks, self.step_max) = (format, 0, 0, 0, 0.0);
        self.codes.clear();
        self.steps.clear();
        self.masks.clear();
        self.means.clear();
        self.run_keys.clear();
        self.slopes.clear();
        self.order.clear();
        self.centroids.clear();
        self.centroid_steps.clear();
        self.centroid_masks.clear();
        self.samples.clear();
    }

    /// Appends a block by its sketch.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if `sketch` is not one of this format; [`IndexError::Invalid`] if it is of another number of
    /// keys than the blocks before, or follows one of fewer.
    pub fn push(&mut self, sketch: &[u8]) -> Result<(), IndexError> {
        let keys = View::new(self.format, sketch)?.keys;
        self.push_missing(keys)?;
        self.set(self.blocks - 1, sketch)
    }

    /// Sketches block `at`, which was pushed as missing, from its `keys[n, head_dim]` and `values` into `room`, takes the sketch as
    /// [`Column::set`] does, and learns from the block where [`Column::learns`] says so.
    ///
    /// # Errors
    /// As [`crate::encode_block`] and [`Column::set`].
    pub fn sketch(
        &mut self,
        at: usize,
        basis: &HeadBasis,
        keys: &[f16],
        values: &[f16],
        room: &mut Vec<u8>,
    ) -> Result<(), IndexError> {
        let format = self.format;
        self.check(at, keys.len() / format.head_dim)?;
        room.clear();
        let mut learnt = std::mem::take(&mut self.slopes);
        let encoded = encode_block_and(format, basis, keys, values, room, |z| {
            if self.learns(at) {
                learnt.learn(z, format.directions(), values, format.head_dim);
            }
        });
        self.slopes = learnt;
        encoded?;
        self.set(at, room)
    }

    /// Whether the column learns from block `at` how values go with keys, which makes the estimate of what an answer does not attend
    /// to much better. A sketch does not say it, so a block whose sketch was made before is shown by [`Column::learn`]; some blocks
    /// of a context say it for all. Once segments are clustered they say it.
    pub fn learns(&self, at: usize) -> bool {
        self.format.values && self.order.is_empty() && at.is_multiple_of(LEARN_EVERY)
    }

    /// Learns from a block that was given by [`Column::set`].
    ///
    /// # Errors
    /// As [`crate::encode_block`].
    pub fn learn(&mut self, basis: &HeadBasis, keys: &[f16], values: &[f16]) -> Result<(), IndexError> {
        let (format, mut sketch) = (self.format, Vec::new());
        let learnt = &mut self.slopes;
        encode_block_and(format, basis, keys, values, &mut sketch, |z| {
            learnt.learn(z, format.directions(), values, format.head_dim);
        })
    }

    /// Gives block `at`, which was pushed as missing, its sketch. Once per block: blocks that share a run share its mean.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if `sketch` is not one of this format, [`IndexError::Invalid`] if it is not one of that block.
    pub fn set(&mut self, at: usize, sketch: &[u8]) -> Result<(), IndexError> {
        let view = View::new(self.format, sketch)?;
        self.check(at, view.keys)?;
        let first = at * self.block_groups();
        let groups = view.keys.div_ceil(GROUP);
        let lines = self.lines();
        let codes = &mut self.codes[first * lines..(first + groups) * lines];
        for (line, bytes) in codes.iter_mut().zip(view.codes.as_chunks::<64>().0) {
            line.0 = *bytes;
        }
        self.steps[first..first + groups].fill(view.step);
        for (group, mask) in self.masks[first..first + groups].iter_mut().enumerate() {
            *mask = view.mask(group);
        }
        self.step_max = self.step_max.max(view.step);
        for group in 0..groups {
            let keys = GROUP.min(view.keys - group * GROUP) as f32;
            let run = (first + group) / RUN_GROUPS;
            let before = self.run_keys[run];
            self.run_keys[run] = before + keys;
            if self.format.values {
                let d = self.format.head_dim;
                let mean = &view.means[group / (RUN / GROUP) * d..][..d];
                let into = &mut self.means[run * d..][..d];
                if before == 0.0 {
                    into.copy_from_slice(mean);
                } else if into != mean {
                    for (into, mean) in into.iter_mut().zip(mean) {
                        let both = into.to_f32() * before + mean.to_f32() * keys;
                        *into = f16::from_f32(both / (before + keys));
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes the last block off, which lies in runs of its own and has no values.
    pub(super) fn pop(&mut self) {
        debug_assert!(!self.format.values && (self.blocks == 1 || self.block_groups().is_multiple_of(RUN_GROUPS)));
        self.keys -= self.last_keys();
        self.blocks -= 1;
        let groups = self.blocks * self.block_groups();
        self.codes.truncate(groups * self.lines());
        self.steps.truncate(groups);
        self.masks.truncate(groups);
        self.run_keys.truncate(groups.div_ceil(RUN_GROUPS));
        self.step_max = self.steps.iter().copied().fold(0.0, f32::max);
        if self.blocks == 0 {
            self.block_keys = 0;
        }
    }

    /// Appends the sketch of block `at`, of a column without values, to `out`.
    pub(super) fn write(&self, at: usize, out: &mut Vec<u8>) {
        let keys = if at + 1 < self.blocks {
            self.block_keys
        } else {
            self.last_keys()
        };
        let first = at * self.block_groups();
        let groups = first..first + keys.div_ceil(GROUP);
        let codes = &self.codes[groups.start * self.lines()..groups.end * self.lines()];
        self.format
            .write(keys, self.steps[first], &self.masks[groups], codes, out);
    }

    /// Whether block `at` is one of `keys`.
    fn check(&self, at: usize, keys: usize) -> Result<(), IndexError> {
        let expected = if at + 1 < self.blocks {
            self.block_keys
        } else {
            self.last_keys()
        };
        if at * self.block_groups() * GROUP < self.order.len() {
            return Err(invalid("block", format!("block {at} is in a clustered segment")));
        }
        if at >= self.blocks || keys != expected {
            return Err(invalid(
                "block",
                format!("{keys} keys for block {at} of {}, which has {expected}", self.blocks),
            ));
        }
        Ok(())
    }

    /// Appends a block of `keys` that has no sketch: none of it is found.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] as of [`Column::push`].
    pub fn push_missing(&mut self, keys: usize) -> Result<(), IndexError> {
        self.begin_block(keys)?;
        let groups = self.masks.len() + keys.div_ceil(GROUP);
        let lines = groups * self.lines();
        self.codes.resize(lines, Line([0; 64]));
        self.steps.resize(groups, 0.0);
        self.masks.resize(groups, 0);
        self.grow_runs();
        Ok(())
    }

    fn begin_block(&mut self, keys: usize) -> Result<(), IndexError> {
        if self.block_keys == 0 {
            self.block_keys = keys;
        } else if keys > self.block_keys || self.keys != self.blocks * self.block_keys {
            return Err(invalid(
                "blocks",
                format!(
                    "all but the last have as many keys: {} before one of {keys}",
                    self.block_keys
                ),
            ));
        }
        self.blocks += 1;
        self.keys += keys;
        Ok(())
    }

    fn grow_runs(&mut self) {
        let runs = self.masks.len().div_ceil(RUN_GROUPS);
        self.run_keys.resize(runs, 0.0);
        if self.format.values {
            self.means.resize(runs * self.format.head_dim, f16::ZERO);
        }
    }

    /// Lines of codes per group.
    pub(super) fn lines(&self) -> usize {
        self.format.nibbles() / 8
    }

    /// Blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.codes.len() * 64
            + self.steps.len() * 4
            + self.masks.len() * 2
            + self.means.len() * 2
            + self.run_keys.len() * 4
            + self.slopes.bytes()
            + self.order.len() * 2
            + (self.centroids.len() + self.samples.len()) * 64
            + self.centroid_steps.len() * 6
    }

    pub(super) fn slopes(&self) -> &Slopes {
        &self.slopes
    }

    /// Bytes of all codes.
    pub(super) fn coded_bytes(&self) -> usize {
        self.codes.len() * 64
    }

    pub(super) fn format(&self) -> SketchFormat {
        self.format
    }

    pub(super) fn block_keys(&self) -> usize {
        self.block_keys
    }

    /// Keys of the last block.
    pub(super) fn last_keys(&self) -> usize {
        self.keys - self.blocks.saturating_sub(1) * self.block_keys
    }

    /// Groups of a block.
    pub(super) fn block_groups(&self) -> usize {
        self.block_keys.div_ceil(GROUP).max(1)
    }

    pub(super) fn groups(&self) -> usize {
        self.masks.len()
    }

    pub(super) fn runs(&self) -> usize {
        self.run_keys.len()
    }

    pub(super) fn step_max(&self) -> f32 {
        self.step_max
    }

    pub(super) fn means(&self) -> &[f16] {
        &self.means
    }

    pub(super) fn run_keys(&self) -> &[f32] {
        &self.run_keys
    }

    /// Keys of some groups, of which those are searched that `masks` (of all groups) names.
    pub(super) fn coded<'a>(&'a self, groups: std::ops::Range<usize>, masks: &'a [u16]) -> CodedKeys<'a> {
        let lines = self.lines();
        CodedKeys {
            codes: &self.codes[groups.start * lines..groups.end * lines],
            steps: &self.steps[groups.clone()],
            masks: &masks[groups],
        }
    }
}
