//! The forward on a GPU: the same model, the same steps, the same pages.
//!
//! Rows of a step are of two kinds, and each kind has its own kernels. *Prompt rows* go through products and attention made
//! for many rows; *sampled rows*, those that logits are asked for or that attend locally, through ones that read weights and
//! keys once, at memory speed. Which kind a token is follows from what is asked for, never from the size of the batch, and
//! each kernel gives a row the same bits in any company. So a prompt row's KV, and the logits of any token, are the same
//! in any batch and any chunking; and a block of prompt rows alone has a name (`Model::names_sampled_tokens`).
//!
//! To the same end a sequence's prompt rows are attended to in row blocks of absolute positions: up to 127 rows that
//! nobody reads stand before its first one.

mod layout;
mod output;
mod pages;
mod scratch;
mod sending;
mod sparse;
mod step;
mod warm_up;
mod watch;
mod weights;

use std::path::PathBuf;

use kvasir_block::KvSchema;
use kvasir_cuda::{DeviceTiles, Dtype, Gpu, GpuError, KvShape, Options, Pairs, Products, Rope};

use self::{scratch::Scratch, sparse::GpuSparse, weights::GpuWeights};
use crate::{LoadError, MadeUp, ModelFile, ModelShape, PagePool, PoolError, SparsePrefill, StepError, file::FORWARD};

pub(crate) use self::pages::DevicePages;

/// How the kernels and the forward order their floating-point steps; changes whenever the bits of named blocks change.
const KERNELS: &str = "cuda/2";

/// Which GPU, where its compiler is, and what it takes of the host's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuOptions {
    /// Index of the GPU, as the driver counts.
    pub index: usize,
    /// Folder of NVRTC's libraries; by default the system's loader is asked.
    pub nvrtc: Option<PathBuf>,
    /// Folder for compiled kernels; without one they are compiled at each start.
    pub cache: Option<PathBuf>,
    /// Bytes of page-locked memory that a pool makes for pages on their way to the host ([`crate::StepHooks::wanted_pages`]). A step
    /// sends as many pages as half of it holds in one layer.
    pub landing_bytes: usize,
}

impl GpuOptions {
    /// What a worker's queue to the store takes by default on a GPU, and a third more for what is on the wire and lands.
    pub const LANDING_BYTES: usize = 2 << 30;
}

impl Default for GpuOptions {
    fn default() -> Self {
        Self {
            index: 0,
            nvrtc: None,
            cache: None,
            landing_bytes: Self::LANDING_BYTES,
        }
    }
}

/// An open GPU.
#[derive(Clone, Debug)]
pub struct GpuDevice {
    gpu: Gpu,
    landing_bytes: usize,
}

impl GpuDevice {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`LoadError::Gpu`] with what is missing: a driver, the GPU, or NVRTC.
    pub fn open(options: &GpuOptions) -> Result<Self, LoadError> {
        let found = Options {
            nvrtc: options.nvrtc.clone(),
            cache: options.cache.clone(),
            ..Options::default()
        };
        Ok(Self {
            gpu: Gpu::open(options.index, &found).map_err(|error| LoadError::Gpu(error.to_string()))?,
            landing_bytes: options.landing_bytes,
        })
    }

    /// Name, as the driver gives it.
    pub fn name(&self) -> &str {
        self.gpu.name()
    }

    /// Bytes of its memory that are free now.
    ///
    /// # Errors
    /// If the driver failed.
    pub fn free_bytes(&self) -> Result<usize, LoadError> {
        self.gpu.memory().map(|(free, _)| free).map_err(load_error)
    }

    /// What decides the bits of named blocks: prompt rows' kernels, and the type they compute in.
    pub(crate) fn numerics(&self) -> String {
        let products = match Products::best(&self.gpu) {
            Products::Wgmma => "wgmma",
            Products::Mma => "mma",
        };
        format!("{KERNELS}-{products}+f16+{FORWARD}")
    }
}

fn load_error(error: GpuError) -> LoadError {
    LoadError::Gpu(error.to_string())
}

fn step_error(error: GpuError) -> StepError {
    StepError::Gpu(error.to_string())
}

fn pool_error(error: GpuError) -> PoolError {
    PoolError::Gpu(error.to_string())
}

/// Weights on a GPU, and scratch for steps.
pub(crate) struct GpuModel {
    gpu: Gpu,
    landing_bytes: usize,
    shape: ModelShape,
    schema: KvSchema,
    /// Of the same model without sparse prefill.
    plain_schema: KvSchema,
    kv: KvShape,
    weights: GpuWeights,
    rope: Rope,
    /// Full causal attention.
    dense: DeviceTiles,
    products: Products,
    sparse: Option<GpuSparse>,
    scratch: Option<Scratch>,
}

impl GpuModel {
    pub(crate) fn load(file: &ModelFile, device: &GpuDevice, block_tokens: u16) -> Result<Self, LoadError> {
        let schema = crate::Device::Gpu(device.clone()).schema(file, block_tokens);
        let shape = file.shape().clone();
        if shape.head_dim != 64 && shape.head_dim != 128 {
            return Err(LoadError::Unsupported {
                path: file.path().to_owned(),
                what: format!("a head of {} elements on a GPU", shape.head_dim),
                instead: "use a model with heads of 64 or 128, or the CPU".to_owned(),
            });
        }
        let out = Self::new(device, shape, schema, |gpu| GpuWeights::load(file, gpu))?;
        file.tensors().check_unchanged()?;
        tracing::debug!(model = file.name(), gpu = out.gpu.name(), "loaded weights");
        Ok(out)
    }

    /// With weights of noise.
    pub(crate) fn made_up(made_up: &MadeUp, device: &GpuDevice, block_tokens: u16) -> Result<Self, LoadError> {
        let schema = made_up.schema(block_tokens, device.numerics());
        Self::new(device, made_up.shape.clone(), schema, |gpu| {
            GpuWeights::made_up(made_up, gpu).map_err(load_error)
        })
    }

    fn new(
        device: &GpuDevice,
        shape: ModelShape,
        schema: KvSchema,
        weights: impl FnOnce(&Gpu) -> Result<GpuWeights, LoadError>,
    ) -> Result<Self, LoadError> {
        let (gpu, block_tokens) = (device.gpu.clone(), schema.block_tokens);
        schema.validate().map_err(|error| LoadError::Option {
            option: "block_tokens",
            found: error.found,
            expected: error.expected,
        })?;
        if !block_tokens.is_multiple_of(16) {
            return Err(LoadError::Option {
                option: "block_tokens",
                found: block_tokens.to_string(),
                expected: "a multiple of 16 on a GPU",
            });
        }
        let weights = weights(&gpu)?;
        let (context, dims) = (shape.context_tokens_max, shape.rope_dims);
        Ok(Self {
            kv: KvShape {
                dtype: Dtype::F16,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
            },
            rope: Rope::new(&gpu, context, dims, shape.rope_theta, Pairs::Interleaved).map_err(load_error)?,
            dense: DeviceTiles::dense(&gpu, shape.q_heads).map_err(load_error)?,
            products: Products::best(&gpu),
            landing_bytes: device.landing_bytes,
            sparse: None,
            scratch: None,
            weights,
            gpu,
            shape,
            plain_schema: schema.clone(),
            schema,
        })
    }

    /// Makes [`crate::Attention::Sparse`] possible, and names the KV accordingly.
    pub(crate) fn set_sparse_prefill(&mut self, sparse: &SparsePrefill) -> Result<(), LoadError> {
        self.sparse = Some(GpuSparse::new(&self.gpu, self.kv, &self.shape, &self.schema, sparse)?);
        self.schema = sparse.schema(&self.plain_schema);
        Ok(())
    }

    pub(crate) fn shape(&self) -> &ModelShape {
        &self.shape
    }

    pub(crate) fn schema(&self) -> &KvSchema {
        &self.schema
    }

    pub(crate) fn pool(&self, pages: usize) -> Result<PagePool, PoolError> {
        let layout = self.schema.layout();
        let pages = DevicePages::new(&self.gpu, layout, self.shape.layers, pages, self.landing_bytes)?;
        Ok(PagePool::on_gpu(layout, pages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_the_error_says_what_is_missing() {
        // Beyond every GPU that a machine has; where there is no driver, that comes first.
        let options = GpuOptions {
            index: 4096,
            ..GpuOptions::default()
        };
        let error = GpuDevice::open(&options).expect_err("no such GPU").to_string();
        let known = ["no NVIDIA driver", "GPU 4096 does not exist"];
        assert!(known.iter().any(|known| error.contains(known)), "{error}");
    }
}
