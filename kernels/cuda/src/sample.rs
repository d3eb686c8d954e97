//! Drawing the next token of every row on the device: of the logits nothing leaves it.

use crate::{Buffer, Family, Gpu, GpuError, PinnedBuffer};

/// Most tokens of a vocabulary: sums of weights then fit their words.
pub const VOCAB_MAX: usize = 1 << 18;
/// Tokens that one CTA reads before the last launch.
const PART: usize = 8192;
/// Tokens of a row's list.
const LIST: usize = 2048;
/// Bins of the coarse weights: 42 powers of two in 32 steps each, and 1 itself.
const BINS: usize = 42 * 32 + 1;

/// How the token of one row is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleRow {
    /// Logits are divided by it; where it is not above 0, the likeliest token is taken (ties by lower id).
    pub temperature: f32,
    /// Share of the probability that the likeliest tokens drawn from hold; 1 draws from all.
    pub top_p: f32,
    /// What chance says, in `[0, 1)`; by the caller, so that a seed has its meaning there.
    pub uniform: f64,
}

impl SampleRow {
    /// The likeliest token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        uniform: 0.0,
    };
}

/// What was drawn from a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its softmax weight among the row's logits as they are, whatever the temperature; NaN where no
    /// logit is finite or one is infinite.
    pub logprob: f32,
}

/// How rows are drawn and what was drawn, in buffers that stay where they are, so that recorded work finds the next step's there.
#[derive(Debug)]
pub struct SampleRows {
    vocab: usize,
    room: usize,
    parts: usize,
    rows: Buffer<u32>,
    staged: PinnedBuffer,
    best: Buffer<u32>,
    sums: Buffer<f32>,
    part_masses: Buffer<u32>,
    /// All zeros between launches.
    masses: Buffer<u32>,
    lists: Buffer<u32>,
    /// All zeros between launches.
    listed: Buffer<u32>,
    drawn: Buffer<u32>,
    on_host: PinnedBuffer,
}

#[repr(C)]
struct SampleParams {
    logits: u64,
    rows: u64,
    best: u64,
    sums: u64,
    part_masses: u64,
    masses: u64,
    lists: u64,
    listed: u64,
    drawn: u64,
    vocab: u32,
    parts: u32,
}

impl SampleRows {
    /// Room for `rows` rows of `vocab` logits.
    ///
    /// # Errors
    /// If there are no tokens or more than [`VOCAB_MAX`], more than 65,535 rows, or no room.
    pub fn new(gpu: &Gpu, vocab: usize, rows: usize) -> Result<Self, GpuError> {
        if vocab == 0 || vocab > VOCAB_MAX || rows > 65_535 {
            let why = format!("{rows} rows of {vocab} tokens; at most 65,535 of {VOCAB_MAX} are possible");
            return Err(GpuError::shape("sample", why));
        }
        let parts = vocab.div_ceil(PART);
        Ok(Self {
            vocab,
            room: rows,
            parts,
            rows: gpu.zeros(4 * rows)?,
            staged: gpu.pinned(16 * rows)?,
            best: gpu.zeros(2 * rows * parts)?,
            sums: gpu.zeros(rows * parts)?,
            part_masses: gpu.zeros(2 * rows * parts)?,
            masses: gpu.zeros(2 * rows * BINS)?,
            lists: gpu.zeros(2 * rows * LIST)?,
            listed: gpu.zeros(rows)?,
            drawn: gpu.zeros(2 * rows)?,
            on_host: gpu.pinned(8 * rows)?,
        })
    }

    /// Rows that there is room for.
    pub const fn room(&self) -> usize {
        self.room
    }

    /// Says how the first rows are drawn; waits for the step before. Rows beyond stay as they were.
    ///
    /// # Errors
    /// If there are too many, or a uniform number is not in `[0, 1)`; nothing changes then.
    pub fn set(&mut self, gpu: &Gpu, rows: &[SampleRow]) -> Result<(), GpuError> {
        let bad = rows.iter().find(|row| !(0.0..1.0).contains(&row.uniform));
        if rows.len() > self.room || bad.is_some() {
            let why = format!("{} rows in room for {}, {bad:?}", rows.len(), self.room);
            return Err(GpuError::shape("sample", why));
        }
        let bytes = self.staged.write()?;
        for (to, row) in bytes.chunks_exact_mut(16).zip(rows) {
            to[..4].copy_from_slice(&row.temperature.to_le_bytes());
            to[4..8].copy_from_slice(&row.top_p.to_le_bytes());
            to[8..].copy_from_slice(&row.uniform.to_le_bytes());
        }
        gpu.copy_from_host(&self.staged, &mut self.rows, 16 * rows.len())
    }

    /// Draws a token of each of the first `rows` rows of `logits`, `[.., vocab]`, as the last [`SampleRows::set`] says, and copies
    /// them to the host, where [`SampleRows::read`] finds them; may be recorded. A row's token is that of
    /// [`reference::sample`](crate::reference::sample), exactly and in any company; its `logprob` within 1e-4.
    ///
    /// # Errors
    /// If there are more rows than room or logits; nothing is launched then.
    pub fn sample(&mut self, gpu: &Gpu, logits: &Buffer<f32>, rows: usize) -> Result<(), GpuError> {
        if rows > self.room || rows.saturating_mul(self.vocab) > logits.len() {
            let why = format!(
                "{rows} rows of {} tokens in {} logits, room for {}",
                self.vocab,
                logits.len(),
                self.room
            );
            return Err(GpuError::shape("sample", why));
        }
        if rows == 0 {
            return Ok(());
        }
        let params = SampleParams {
            logits: logits.pointer,
            rows: self.rows.pointer,
            best: self.best.pointer,
            sums: self.sums.pointer,
            part_masses: self.part_masses.pointer,
            masses: self.masses.pointer,
            lists: self.lists.pointer,
            listed: self.listed.pointer,
            drawn: self.drawn.pointer,
            vocab: self.vocab as u32,
            parts: self.parts as u32,
        };
        let by_part = (self.parts as u32, rows as u32, 1);
        // SAFETY: `SampleParams` is sample.cu's; `new` made the buffers for these rows and parts, the logits were checked above.
        unsafe {
            gpu.launch(Family::Sample, "sample_best", by_part, 1024, &params)?;
            gpu.launch(Family::Sample, "sample_weigh", by_part, 1024, &params)?;
            gpu.launch(Family::Sample, "sample_list", by_part, 1024, &params)?;
            gpu.launch(Family::Sample, "sample_draw", (rows as u32, 1, 1), 1024, &params)?;
        }
        gpu.copy_to_host(&self.drawn, &mut self.on_host, 0, 8 * rows)
    }

    /// What was drawn last from the first `rows` rows; waits for the device.
    ///
    /// # Errors
    /// If the device failed, or there are fewer rows.
    pub fn read(&self, rows: usize) -> Result<Vec<Sampled>, GpuError> {
        if rows > self.room {
            return Err(GpuError::shape(
                "sample",
                format!("{rows} rows in room for {}", self.room),
            ));
        }
        let words = self.on_host.read()?.as_chunks::<4>().0.as_chunks::<2>().0;
        let drawn = words.iter().take(rows).map(|[token, logprob]| Sampled {
            token: u32::from_le_bytes(*token),
            logprob: f32::from_le_bytes(*logprob),
        });
        Ok(drawn.collect())
    }
}
