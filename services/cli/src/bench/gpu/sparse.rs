//! Sparse prefill of the configured model on the GPU: beside the CPU under the same masks, and beside full attention where the
//! masks leave nothing out.

use std::fmt;

use anyhow::{Context, Result};
use kvasir_model::{Device, ModelFile, TileRows};
use kvasir_sparse::{HeadPatterns, Pattern};
use kvasir_worker::{DeviceKind, WorkerConfig};
use serde::Serialize;

use super::{
    compare::{Agreement, agreement},
    forward::Forward,
};

/// Tokens of a block, and of the prompt: whole blocks and a tail.
const BLOCK_TOKENS: u16 = 256;
const PROMPT: usize = 3000;
/// Prompt tokens of a step, and of the uneven steps that are to give the same bits: both whole blocks.
const STEP_TOKENS: usize = 8 * BLOCK_TOKENS as usize;
const UNEVEN_STEP: usize = 3 * BLOCK_TOKENS as usize;

/// Masks that leave out most of such a prompt. The last is of heads that differ.
const NARROW: [&[&str]; 4] = [
    &["a-shape:64,256"],
    &["vertical-slash:60,200"],
    &["block-sparse:12"],
    &[
        "vertical-slash:100,120",
        "block-sparse:8",
        "a-shape:16,512",
        "dense",
        "vertical-slash:30,300",
    ],
];
/// Masks that leave out nothing of it.
const WHOLE: [&[&str]; 4] = [
    &["dense"],
    &["a-shape:1,4096"],
    &["vertical-slash:4096,4096"],
    &["block-sparse:64"],
];

/// One set of masks on GPU and CPU.
#[derive(Debug, Serialize)]
pub(super) struct SparseAgreement {
    patterns: String,
    block_tokens: u16,
    /// Mean difference of the prompt's logits between sparse and full attention on the GPU: what the masks change.
    changed_mean: f32,
    /// Of masks that leave nothing out: whether the logits have the bits of full attention.
    same_bits_as_dense: Option<bool>,
    /// Beside the CPU under the same patterns, planned for in row blocks of the same height.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Agreement>,
}

impl fmt::Display for SparseAgreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: logits changed by {:.3} on average",
            self.patterns, self.changed_mean
        )?;
        match self.same_bits_as_dense {
            Some(true) => f.write_str(", the bits of full attention")?,
            Some(false) => f.write_str(", not the bits of full attention")?,
            None => {}
        }
        match &self.cpu {
            Some(cpu) => write!(f, "; beside the CPU: {cpu}"),
            None => Ok(()),
        }
    }
}

pub(super) fn compare_sparse(
    file: &ModelFile,
    device: &Device,
    worker: &WorkerConfig,
    tokens: &[u32],
    count: usize,
) -> Result<Vec<SparseAgreement>> {
    let cpu = WorkerConfig {
        device: DeviceKind::Cpu,
        ..worker.clone()
    }
    .open_device()?;
    let prompt = &tokens[..PROMPT.min(tokens.len())];
    let room = prompt.len() + count;
    let mut on_cpu = Forward::load(file, &cpu, BLOCK_TOKENS, room, 1)?;
    let mut on_gpu = Forward::load(file, device, BLOCK_TOKENS, room, 2)?;
    let dense = on_gpu.prompt(0, prompt, STEP_TOKENS)?;
    let mut out = Vec::new();
    for (texts, is_narrow) in NARROW
        .map(|texts| (texts, true))
        .into_iter()
        .chain(WHOLE.map(|texts| (texts, false)))
    {
        let patterns = patterns(file, texts)?;
        on_gpu = on_gpu.sparse(patterns.clone(), TileRows::Rows128)?;
        let found = on_gpu.prompt(0, prompt, STEP_TOKENS)?;
        let apart: f32 = found.iter().zip(&dense).map(|(a, b)| (a - b).abs()).sum();
        let same = || found.iter().zip(&dense).all(|(a, b)| a.to_bits() == b.to_bits());
        let mut row = SparseAgreement {
            patterns: texts.join(" "),
            block_tokens: BLOCK_TOKENS,
            changed_mean: apart / found.len().max(1) as f32,
            same_bits_as_dense: (!is_narrow).then(same),
            cpu: None,
        };
        if is_narrow {
            on_cpu = on_cpu.sparse(patterns, TileRows::Rows128)?;
            let steps = [STEP_TOKENS, UNEVEN_STEP];
            row.cpu = Some(agreement(&mut on_cpu, &mut on_gpu, prompt, count, steps)?);
        }
        out.push(row);
    }
    Ok(out)
}

/// `texts` for the heads of every layer in turn, sparse from the first block on.
fn patterns(file: &ModelFile, texts: &[&str]) -> Result<HeadPatterns> {
    let shape = file.shape();
    let kinds = texts
        .iter()
        .map(|text| text.parse::<Pattern>().map_err(anyhow::Error::msg))
        .collect::<Result<Vec<_>>>()?;
    let all = kinds.iter().copied().cycle();
    let heads = |layer: usize| all.clone().skip(layer).take(shape.q_heads).collect();
    let mut patterns = HeadPatterns::new((0..shape.layers).map(heads).collect()).context("patterns of the bench")?;
    patterns.dense_up_to = 0;
    Ok(patterns)
}
