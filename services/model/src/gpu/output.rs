//! What comes back from a step: tokens that were drawn on the device, and logits where somebody wants them.

use std::ops::Range;

use kvasir_cuda::{GpuError, SampleRow};

use super::{
    GpuModel,
    layout::{RowLayout, SequenceRows},
    scratch::Scratch,
};
use crate::{Logits, StepOutput, StepSequence};

/// How tokens are drawn of a step's sampled rows, up to the last that one is drawn of; rows without get one that nobody reads.
pub(super) fn drawn_rows(batch: &[StepSequence<'_>], layout: &RowLayout) -> Vec<SampleRow> {
    let mut rows = Vec::new();
    for (asked, sequence) in batch.iter().zip(&layout.sequences) {
        if let Logits::Drawn(draw) = asked.logits {
            rows.resize(sequence.sampled.end - layout.prompt - 1, SampleRow::GREEDY);
            rows.push(SampleRow {
                temperature: draw.temperature,
                top_p: draw.top_p,
                uniform: draw.uniform,
            });
        }
    }
    rows
}

impl GpuModel {
    /// Brings what was asked for to the host, which waits for the step: tokens that were drawn, and logits where they are wanted.
    pub(super) fn output(
        &self,
        batch: &[StepSequence<'_>],
        layout: &RowLayout,
        drawn: usize,
        scratch: &mut Scratch,
    ) -> Result<StepOutput, GpuError> {
        let (vocab, count) = (self.shape.vocab, layout.sampled().len());
        let mut out = StepOutput::empty(vocab, batch.len());
        let is_drawn = |asked: &StepSequence<'_>| matches!(asked.logits, Logits::Drawn(_));
        let wanted = |sequence: &SequenceRows| {
            let end = sequence.sampled.end - layout.prompt;
            end - sequence.logits..end
        };
        let tokens = match drawn {
            0 => Vec::new(),
            _ => scratch.draws.read(drawn)?,
        };
        let sequences = || batch.iter().zip(&layout.sequences).enumerate();
        for (index, (_, sequence)) in sequences().filter(|(_, (asked, _))| is_drawn(asked)) {
            let row = wanted(sequence).start;
            out.drawn[index] = tokens.get(row).map(|sampled| sampled.token);
        }
        let logits = sequences().filter(|(_, (asked, sequence))| !is_drawn(asked) && sequence.logits > 0);
        let logits: Vec<(usize, Range<usize>)> =
            logits.map(|(index, (_, sequence))| (index, wanted(sequence))).collect();
        if logits.is_empty() {
            if drawn == 0 {
                self.gpu.synchronize()?;
            }
            return Ok(out);
        }
        let bytes = 4 * scratch.room.sampled * vocab;
        let on_host = match &mut scratch.logits_on_host {
            Some(room) => room,
            none => none.insert(self.gpu.pinned(bytes)?),
        };
        self.gpu.copy_to_host(&scratch.logits, on_host, 0, 4 * count * vocab)?;
        let words = on_host.read()?.as_chunks::<4>().0;
        for (index, rows) in logits {
            let words = &words[rows.start * vocab..rows.end * vocab];
            out.rows[index] = words.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        }
        Ok(out)
    }
}
