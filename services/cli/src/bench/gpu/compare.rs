//! Greedy texts on the GPU beside the CPU's, and the GPU beside itself: a prompt in one step and in many.

use std::fmt;

use anyhow::{Result, ensure};
use kvasir_model::{Device, ModelFile};
use kvasir_worker::{DeviceKind, WorkerConfig};
use serde::Serialize;

use super::{STEP_TOKENS, forward::Forward};

/// How far two greedy texts from one prompt go together.
#[derive(Debug, Serialize)]
pub(super) struct Agreement {
    prompt_tokens: usize,
    tokens: usize,
    /// Tokens that agree before the first that does not.
    equal: usize,
    /// At the first that does not: by how much the CPU's logits, and the GPU's, prefer their own token to the other's.
    cpu_margin: Option<f32>,
    gpu_margin: Option<f32>,
    /// The largest difference of the prompt's logits, and the mean.
    logits_apart_most: f32,
    logits_apart_mean: f32,
    /// Whether the prompt's logits on the GPU had the same bits when it came in uneven steps.
    same_bits_in_steps: bool,
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "prompt of {:4}: {} of {} tokens equal, logits apart by {:.3} at most and {:.3} on average, {} in uneven steps",
            self.prompt_tokens,
            self.equal,
            self.tokens,
            self.logits_apart_most,
            self.logits_apart_mean,
            if self.same_bits_in_steps {
                "same bits"
            } else {
                "OTHER BITS"
            }
        )?;
        match (self.cpu_margin, self.gpu_margin) {
            (Some(cpu), Some(gpu)) => write!(f, "; then a margin of {cpu:.3} on the CPU, {gpu:.3} on the GPU"),
            _ => Ok(()),
        }
    }
}

/// Steps that neither blocks nor row blocks divide.
const UNEVEN_STEP: usize = 77;

pub(super) fn compare(
    file: &ModelFile,
    device: &Device,
    worker: &WorkerConfig,
    prompts: &[&[u32]],
    count: usize,
) -> Result<Vec<Agreement>> {
    let cpu = WorkerConfig {
        device: DeviceKind::Cpu,
        ..worker.clone()
    }
    .open_device()?;
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0) + count;
    let mut on_cpu = Forward::load(file, &cpu, worker.block_tokens, longest, 1)?;
    let mut on_gpu = Forward::load(file, device, worker.block_tokens, longest, 2)?;
    prompts
        .iter()
        .map(|prompt| agreement(&mut on_cpu, &mut on_gpu, prompt, count, [STEP_TOKENS, UNEVEN_STEP]))
        .collect()
}

/// A greedy text of `count` tokens behind `prompt`, which comes in steps of so many tokens, and on the GPU in others beside.
pub(super) fn agreement(
    cpu: &mut Forward,
    gpu: &mut Forward,
    prompt: &[u32],
    count: usize,
    [step, uneven]: [usize; 2],
) -> Result<Agreement> {
    let uneven = gpu.prompt(1, prompt, uneven)?;
    let mut theirs = cpu.prompt(0, prompt, step)?;
    let mut ours = gpu.prompt(0, prompt, step)?;
    ensure!(ours.len() == theirs.len(), "the two vocabularies differ");
    let apart: Vec<f32> = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).collect();
    let same = uneven.iter().zip(&ours).all(|(a, b)| a.to_bits() == b.to_bits());
    let mut out = Agreement {
        prompt_tokens: prompt.len(),
        tokens: count,
        equal: 0,
        cpu_margin: None,
        gpu_margin: None,
        logits_apart_most: apart.iter().copied().fold(0.0, f32::max),
        logits_apart_mean: apart.iter().sum::<f32>() / apart.len().max(1) as f32,
        same_bits_in_steps: same,
    };
    while out.equal < count {
        let (a, b) = (largest(&ours), largest(&theirs));
        if a != b {
            out.gpu_margin = Some(ours[a] - ours[b]);
            out.cpu_margin = Some(theirs[b] - theirs[a]);
            break;
        }
        let position = prompt.len() + out.equal;
        out.equal += 1;
        theirs = cpu.next(a as u32, position)?;
        ours = gpu.next(a as u32, position)?;
    }
    Ok(out)
}

fn largest(logits: &[f32]) -> usize {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(index, _)| index)
}
