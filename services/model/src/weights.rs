//! Weights of a model, packed for the kernels.

use candle_core::quantized::GgmlDType;
use half::f16;
use kvasir_simd::{Activations, Pool, ShapeError, Weights, matmul};

use crate::{
    Architecture, LoadError, ModelFile,
    file::{EMBEDDING, OUTPUT},
    gguf::Tensors,
};

/// Bytes of a Q4_0 block: scale as f16, then 32 nibbles, each 8 too high.
const Q4_0_BYTES: usize = 18;

/// All weights of a model.
pub(crate) struct ModelWeights {
    pub(crate) embedding: Weights,
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) output_norm: Vec<f32>,
    /// `None`: the embedding is the output matrix too.
    output: Option<Weights>,
}

/// Weights of a layer.
pub(crate) struct LayerWeights {
    pub(crate) attention_norm: Vec<f32>,
    /// Query, key, value.
    pub(crate) qkv: Projection,
    pub(crate) attention_output: Projection,
    pub(crate) feed_forward_norm: Vec<f32>,
    /// Gate, up.
    pub(crate) gate_up: Projection,
    pub(crate) down: Projection,
    /// What Gemma 3 has beside.
    pub(crate) further_norms: Option<FurtherNorms>,
}

/// Norms of a layer of Gemma 3 that a Llama has not.
pub(crate) struct FurtherNorms {
    /// Of each query, `[head_dim]`, before it is rotated.
    pub(crate) query: Vec<f32>,
    /// Of each key, likewise.
    pub(crate) key: Vec<f32>,
    /// Of what attention adds to the residual stream.
    pub(crate) attention_output: Vec<f32>,
    /// Of what the feed-forward adds.
    pub(crate) feed_forward_output: Vec<f32>,
}

impl ModelWeights {
    pub(crate) fn load(file: &ModelFile) -> Result<Self, LoadError> {
        let tensors = file.tensors();
        let further = matches!(file.shape().architecture, Architecture::Gemma3(_));
        let layer = |layer: usize| {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let projection =
                |parts: &[&str]| Projection::load(tensors, &parts.iter().map(|part| name(part)).collect::<Vec<_>>());
            Ok(LayerWeights {
                attention_norm: tensors.values(&name("attn_norm"))?,
                qkv: projection(&["attn_q", "attn_k", "attn_v"])?,
                attention_output: projection(&["attn_output"])?,
                feed_forward_norm: tensors.values(&name("ffn_norm"))?,
                gate_up: projection(&["ffn_gate", "ffn_up"])?,
                down: projection(&["ffn_down"])?,
                further_norms: further
                    .then(|| {
                        Ok::<_, LoadError>(FurtherNorms {
                            query: tensors.values(&name("attn_q_norm"))?,
                            key: tensors.values(&name("attn_k_norm"))?,
                            attention_output: tensors.values(&name("post_attention_norm"))?,
                            feed_forward_output: tensors.values(&name("post_ffw_norm"))?,
                        })
                    })
                    .transpose()?,
            })
        };
        let matrix = |name: &str| Raw::read(tensors, name)?.pack(tensors, name);
        Ok(Self {
            embedding: matrix(EMBEDDING)?,
            layers: (0..file.shape().layers).map(layer).collect::<Result<_, LoadError>>()?,
            output_norm: tensors.values("output_norm.weight")?,
            output: tensors.info(OUTPUT).map(|_| matrix(OUTPUT)).transpose()?,
        })
    }

    /// The matrix from a final hidden state to logits.
    pub(crate) fn output(&self) -> &Weights {
        self.output.as_ref().unwrap_or(&self.embedding)
    }
}

/// Matrices that multiply the same input. Those of one format lie in one matrix, so that a step has fewer, longer loops.
pub(crate) struct Projection {
    parts: Vec<Weights>,
    /// Per matrix, in the order given: which part it lies in, from which row, and how many rows it has.
    places: Vec<(usize, usize, usize)>,
}

/// Where a matrix's results lie in a projection's output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Columns {
    start: usize,
    stride: usize,
    width: usize,
}

impl Columns {
    /// Elements of token `token`.
    pub(crate) fn row(self, token: usize) -> std::ops::Range<usize> {
        let start = self.start + token * self.stride;
        start..start + self.width
    }
}

impl Projection {
    fn load(tensors: &Tensors, names: &[String]) -> Result<Self, LoadError> {
        let mut raw: Vec<(Raw, &String)> = Vec::new();
        let mut places = Vec::new();
        for name in names {
            let next = Raw::read(tensors, name)?;
            let rows = next.rows;
            let start = match raw.last_mut() {
                Some((last, _)) => match last.append(next) {
                    Ok(start) => start,
                    Err(next) => {
                        raw.push((next, name));
                        0
                    }
                },
                None => {
                    raw.push((next, name));
                    0
                }
            };
            places.push((raw.len() - 1, start, rows));
        }
        let parts = raw.into_iter().map(|(raw, name)| raw.pack(tensors, name));
        Ok(Self {
            parts: parts.collect::<Result<_, _>>()?,
            places,
        })
    }

    /// `out`: part after part, each `[tokens, rows of the part]`.
    pub(crate) fn matmul(&self, x: &Activations, out: &mut Vec<f32>, pool: &Pool) {
        out.resize(x.tokens() * self.rows(), 0.0);
        let mut rest = &mut out[..];
        for part in &self.parts {
            let (here, after) = rest.split_at_mut(x.tokens() * part.rows());
            matmul(part, x, here, pool);
            rest = after;
        }
    }

    /// Multiplies with the part that matrix `index` lies in alone, and returns where that matrix's results lie in `out`.
    pub(crate) fn matmul_one(&self, index: usize, x: &Activations, out: &mut Vec<f32>, pool: &Pool) -> Columns {
        let (part, start, width) = self.places[index];
        let part = &self.parts[part];
        out.resize(x.tokens() * part.rows(), 0.0);
        matmul(part, x, out, pool);
        Columns {
            start,
            stride: part.rows(),
            width,
        }
    }

    /// Where the results of matrix `index` lie in [`Projection::matmul`]'s output for `tokens` tokens.
    pub(crate) fn columns(&self, index: usize, tokens: usize) -> Columns {
        let (part, row, rows) = self.places[index];
        let before: usize = self.parts[..part].iter().map(Weights::rows).sum();
        Columns {
            start: before * tokens + row,
            stride: self.parts[part].rows(),
            width: rows,
        }
    }

    fn rows(&self) -> usize {
        self.parts.iter().map(Weights::rows).sum()
    }
}

/// A matrix as it will be packed.
struct Raw {
    rows: usize,
    cols: usize,
    data: Data,
}

enum Data {
    Q4_1(Vec<u8>),
    Q8_0(Vec<u8>),
    /// To be quantised to Q8_0.
    F32(Vec<f32>),
}

impl Raw {
    fn read(tensors: &Tensors, name: &str) -> Result<Self, LoadError> {
        let info = tensors.info(name).ok_or_else(|| tensors.error(name, "is missing"))?;
        let [rows, cols] = info.dims[..] else {
            return Err(tensors.error(name, format!("has shape {:?}, and must be a matrix", info.dims)));
        };
        let data = match info.dtype {
            GgmlDType::Q4_1 => Data::Q4_1(tensors.bytes(name)?),
            GgmlDType::Q4_0 => Data::Q4_1(with_minimum(&tensors.bytes(name)?)),
            GgmlDType::Q8_0 => Data::Q8_0(tensors.bytes(name)?),
            _ => Data::F32(tensors.values(name)?),
        };
        Ok(Self { rows, cols, data })
    }

    /// Puts `next` below this matrix, and returns its first row; gives it back if it is of another kind.
    fn append(&mut self, next: Self) -> Result<usize, Self> {
        match (&mut self.data, &next.data) {
            _ if self.cols != next.cols => return Err(next),
            (Data::Q4_1(bytes), Data::Q4_1(more)) | (Data::Q8_0(bytes), Data::Q8_0(more)) => {
                bytes.extend_from_slice(more)
            }
            (Data::F32(values), Data::F32(more)) => values.extend_from_slice(more),
            _ => return Err(next),
        }
        let start = self.rows;
        self.rows += next.rows;
        Ok(start)
    }

    fn pack(self, tensors: &Tensors, name: &str) -> Result<Weights, LoadError> {
        let packed = match &self.data {
            Data::Q4_1(bytes) => Weights::from_q4_1(bytes, self.rows, self.cols),
            Data::Q8_0(bytes) => Weights::from_q8_0(bytes, self.rows, self.cols),
            Data::F32(values) => Weights::from_f32(values, self.rows, self.cols),
        };
        packed.map_err(|error: ShapeError| tensors.error(name, format!("cannot be packed: {error}")))
    }
}

/// Q4_0 as Q4_1: `d * (q - 8)` is `d * q + m` with `m = -8 d`, which f16 holds exactly.
fn with_minimum(bytes: &[u8]) -> Vec<u8> {
    let blocks = bytes.as_chunks::<Q4_0_BYTES>().0;
    let mut out = Vec::with_capacity(blocks.len() * (Q4_0_BYTES + 2));
    for block in blocks {
        let d = f16::from_le_bytes([block[0], block[1]]);
        out.extend_from_slice(&block[..2]);
        out.extend_from_slice(&f16::from_f32(-8.0 * d.to_f32()).to_le_bytes());
        out.extend_from_slice(&block[2..]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q4_0_is_q4_1_with_a_minimum() {
        let mut block = f16::from_f32(0.125).to_le_bytes().to_vec();
        block.extend((0..16).map(|i| i | ((15 - i) << 4)));
        let weights = Weights::from_q4_1(&with_minimum(&block), 1, 32).expect("one block");
        let mut values = [0.0; 32];
        weights.dequantize_row(0, &mut values);
        for i in 0..16 {
            assert_eq!(values[i], (i as f32 - 8.0) * 0.125);
            assert_eq!(values[16 + i], (15.0 - i as f32 - 8.0) * 0.125);
        }
    }
}
