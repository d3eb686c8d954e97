//! Weights on the device, in f16.

use half::{f16, slice::HalfFloatSliceExt};
use kvasir_cuda::{Buffer, Dtype, Gpu, GpuError, Matrix};

use super::load_error;
use crate::{
    LoadError, MadeUp, ModelFile,
    file::{EMBEDDING, OUTPUT},
    gguf::Tensors,
};

pub(super) struct GpuWeights {
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<GpuLayer>,
    pub(super) output_norm: Buffer<f32>,
    /// `None`: the embedding is the output matrix too.
    output: Option<Matrix>,
}

/// Weights of a layer.
pub(super) struct GpuLayer {
    pub(super) attention_norm: Buffer<f32>,
    /// Query, key, value, one below the other.
    pub(super) qkv: Matrix,
    pub(super) attention_output: Matrix,
    pub(super) feed_forward_norm: Buffer<f32>,
    /// Gate, up.
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
}

impl GpuWeights {
    pub(super) fn load(file: &ModelFile, gpu: &Gpu) -> Result<Self, LoadError> {
        let tensors = file.tensors();
        let vector = |name: &str| gpu.upload(&tensors.values(name)?).map_err(load_error);
        let layer = |layer: usize| {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let stack = |parts: &[&str]| {
                let names: Vec<String> = parts.iter().map(|part| name(part)).collect();
                matrix(gpu, tensors, &names)
            };
            Ok(GpuLayer {
                attention_norm: vector(&name("attn_norm"))?,
                qkv: stack(&["attn_q", "attn_k", "attn_v"])?,
                attention_output: stack(&["attn_output"])?,
                feed_forward_norm: vector(&name("ffn_norm"))?,
                gate_up: stack(&["ffn_gate", "ffn_up"])?,
                down: stack(&["ffn_down"])?,
            })
        };
        let one = |name: &str| matrix(gpu, tensors, &[name.to_owned()]);
        Ok(Self {
            embedding: one(EMBEDDING)?,
            layers: (0..file.shape().layers).map(layer).collect::<Result<_, LoadError>>()?,
            output_norm: vector("output_norm.weight")?,
            output: tensors.info(OUTPUT).map(|_| one(OUTPUT)).transpose()?,
        })
    }

    /// Noise, so scaled that rows keep about the size they have through all layers and no number leaves f16's range.
    pub(super) fn made_up(made_up: &MadeUp, gpu: &Gpu) -> Result<Self, GpuError> {
        let shape = &made_up.shape;
        let (hidden, inner) = (shape.hidden, shape.feed_forward);
        let (q, kv) = (shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let mut seed = made_up.seed;
        // Results of a row of ones and minus ones have the standard deviation `size`.
        let mut noise = |rows: usize, columns: usize, size: f32| {
            seed = seed.wrapping_add(0x5851_f42d_4c95_7f2d);
            Matrix::noise(
                gpu,
                Dtype::F16,
                rows,
                columns,
                seed,
                size * (3.0 / columns as f32).sqrt(),
            )
        };
        let ones = || gpu.upload(&vec![1.0f32; hidden]);
        // What a layer adds twice must not grow with their number.
        let added = (0.5 / shape.layers as f32).sqrt();
        // Values have the queries' and keys' scale too, the three being one matrix; the output makes up for it.
        let peaked = made_up.score_deviation.sqrt();
        let mut layer = || {
            Ok::<_, GpuError>(GpuLayer {
                attention_norm: ones()?,
                qkv: noise(q + 2 * kv, hidden, peaked)?,
                attention_output: noise(hidden, q, added / peaked)?,
                feed_forward_norm: ones()?,
                gate_up: noise(2 * inner, hidden, 1.0)?,
                down: noise(hidden, inner, added)?,
            })
        };
        let layers = (0..shape.layers).map(|_| layer()).collect::<Result<_, _>>()?;
        Ok(Self {
            layers,
            embedding: noise(shape.vocab, hidden, (hidden as f32).sqrt())?,
            output_norm: ones()?,
            output: Some(noise(shape.vocab, hidden, 1.0)?),
        })
    }

    /// The matrix from a final hidden state to logits.
    pub(super) fn output(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }
}

/// Matrices with rows of one length, one below the other. Whatever a file holds is spread to f16: exactly up to f16's own
/// rounding, which is finer than that of any quantised format.
fn matrix(gpu: &Gpu, tensors: &Tensors, names: &[String]) -> Result<Matrix, LoadError> {
    let (mut bits, mut rows, mut columns) = (Vec::<u16>::new(), 0, 0);
    for name in names {
        let info = tensors.info(name).ok_or_else(|| tensors.error(name, "is missing"))?;
        let [height, width] = info.dims[..] else {
            return Err(tensors.error(name, format!("has shape {:?}, and must be a matrix", info.dims)));
        };
        let values = tensors.values(name)?;
        let mut narrow = vec![f16::ZERO; values.len()];
        narrow.convert_from_f32_slice(&values);
        bits.extend(narrow.iter().map(|value| value.to_bits()));
        (rows, columns) = (rows + height, width);
    }
    Matrix::upload(gpu, Dtype::F16, rows, columns, &bits).map_err(load_error)
}
