//! One model type, whatever computes it.

use kvasir_block::KvSchema;

use crate::{
    Architecture, GpuDevice, LoadError, LoadOptions, MadeUp, ModelFile, ModelShape, PagePool, PoolError, SparsePrefill,
    StepError, StepHooks, StepOutput, StepSequence, TileRows, forward::CpuModel, gpu::GpuModel,
};

/// What computes a forward.
#[derive(Clone, Debug)]
pub enum Device {
    /// The CPU, with so many threads, the stepping one included.
    Cpu {
        /// Threads that share each kernel.
        threads: usize,
    },
    /// An open GPU.
    Gpu(GpuDevice),
}

impl Device {
    /// Complete identity of the KV blocks that `file` makes on this device. It differs between devices, because their last
    /// bits do.
    pub fn schema(&self, file: &ModelFile, block_tokens: u16) -> KvSchema {
        let schema = file.schema(block_tokens);
        match self {
            Self::Cpu { .. } => schema,
            Self::Gpu(gpu) => KvSchema {
                numerics: gpu.numerics(),
                ..schema
            },
        }
    }

    /// Height of the row blocks that masks of sparse prefill are planned for.
    pub const fn tile_rows(&self) -> TileRows {
        match self {
            Self::Cpu { .. } => TileRows::Rows64,
            Self::Gpu(_) => TileRows::Rows128,
        }
    }
}

/// Weights and scratch for steps. One thread steps at a time.
pub struct Model(Backend);

enum Backend {
    Cpu(Box<CpuModel>),
    Gpu(Box<GpuModel>),
}

impl Model {
    /// Reads and packs the weights of `file` for the CPU.
    ///
    /// # Errors
    /// [`LoadError`] if an option is out of range, or the file changed since it was opened or cannot be read.
    pub fn load(file: &ModelFile, options: &LoadOptions) -> Result<Self, LoadError> {
        Ok(Self(Backend::Cpu(Box::new(CpuModel::load(file, options)?))))
    }

    /// Reads the weights of `file` for `device`. On a GPU they become f16, whatever the file holds.
    ///
    /// # Errors
    /// As [`Model::load`]; and if the GPU has no room, or no kernel for the model's shape.
    pub fn load_on(file: &ModelFile, device: &Device, block_tokens: u16) -> Result<Self, LoadError> {
        match device {
            Device::Cpu { threads } => Self::load(
                file,
                &LoadOptions {
                    threads: *threads,
                    block_tokens,
                },
            ),
            Device::Gpu(_) if file.shape().architecture != Architecture::Llama => Err(LoadError::Gpu(
                "its forward is that of a Llama: choose the CPU for this model (worker.device = \"cpu\")".to_owned(),
            )),
            Device::Gpu(gpu) => Ok(Self(Backend::Gpu(Box::new(GpuModel::load(file, gpu, block_tokens)?)))),
        }
    }

    /// A model without a file: weights of noise, made on the GPU. What it says means nothing; how fast it says it does.
    ///
    /// # Errors
    /// [`LoadError`] if the GPU has no room, or no kernel for the shape.
    pub fn made_up(made_up: &MadeUp, gpu: &GpuDevice, block_tokens: u16) -> Result<Self, LoadError> {
        Ok(Self(Backend::Gpu(Box::new(GpuModel::made_up(
            made_up,
            gpu,
            block_tokens,
        )?))))
    }

    /// The model with [`crate::Attention::Sparse`] under the given patterns, in place of any before; its schema changes with them.
    ///
    /// # Errors
    /// [`LoadError::Sparse`] where layers see a window only, and on a GPU for patterns that are planned for on the CPU alone, or row
    /// blocks of another height than its own; [`LoadError::Gpu`] if it has no room.
    pub fn with_sparse_prefill(mut self, sparse: SparsePrefill) -> Result<Self, LoadError> {
        if self.shape().sliding().is_some() {
            let problem = "most layers of this model see a window only: leave worker.sparse_prefill empty";
            return Err(LoadError::Sparse(problem.to_owned()));
        }
        match &mut self.0 {
            Backend::Cpu(model) => model.set_sparse_prefill(sparse),
            Backend::Gpu(model) => model.set_sparse_prefill(&sparse)?,
        }
        Ok(self)
    }

    /// Sizes and constants of the forward.
    pub fn shape(&self) -> &ModelShape {
        match &self.0 {
            Backend::Cpu(model) => model.shape(),
            Backend::Gpu(model) => model.shape(),
        }
    }

    /// Complete identity of the KV that steps write.
    pub fn schema(&self) -> &KvSchema {
        match &self.0 {
            Backend::Cpu(model) => model.schema(),
            Backend::Gpu(model) => model.schema(),
        }
    }

    /// What scores are multiplied by before the softmax: `1 / sqrt(head_dim)`.
    pub fn softmax_scale(&self) -> f32 {
        self.shape().softmax_scale()
    }

    /// A pool of `pages` pages where this model's steps can use it.
    ///
    /// # Errors
    /// [`PoolError`] if there would be no page, or no room for them.
    pub fn pool(&self, pages: usize) -> Result<PagePool, PoolError> {
        match &self.0 {
            Backend::Cpu(model) => PagePool::new(model.schema().layout(), model.shape().layers, pages),
            Backend::Gpu(model) => model.pool(pages),
        }
    }

    /// Makes ready for steps of up to `tokens` tokens over `pool`: on a GPU kernels are loaded, buffers made and decoding is
    /// recorded, which the first requests would wait for otherwise. Pages hold anything afterwards.
    ///
    /// # Errors
    /// [`StepError::Gpu`] if the GPU failed or has no room.
    pub fn warm_up(&mut self, pool: &mut PagePool, tokens: usize) -> Result<(), StepError> {
        match &mut self.0 {
            Backend::Cpu(_) => Ok(()),
            Backend::Gpu(model) => model.warm_up(pool, tokens),
        }
    }

    /// Computes nothing, and hands out the wanted pages of all layers as a step does: [`StepHooks::wanted_pages`],
    /// [`StepHooks::after_layer`]. On a GPU they come over the bus as fast as it goes, which reading them one by one does not.
    ///
    /// # Errors
    /// [`StepError::Gpu`] if the GPU failed; hooks were told of every layer all the same.
    pub fn send_pages(&self, pool: &mut PagePool, hooks: &mut dyn StepHooks) -> Result<(), StepError> {
        match &self.0 {
            Backend::Cpu(model) => {
                (0..model.shape().layers).for_each(|layer| hooks.after_layer(layer, pool));
                Ok(())
            }
            Backend::Gpu(model) => model.send_pages(pool, hooks),
        }
    }

    /// Whether the KV of a token that logits were asked for ([`crate::Logits::Last`]) has the same bits as that of any other.
    /// Where it has not, a block with such a token must get no name: on a GPU these tokens go through kernels of their own,
    /// which sum in another order. All other tokens' KV, and all logits, have the same bits in any batch and any chunking.
    pub fn names_sampled_tokens(&self) -> bool {
        matches!(self.0, Backend::Cpu(_))
    }

    /// Computes one step for a batch; writes K and V of its tokens into their pages, and returns logits as asked.
    ///
    /// Scratch grows with the tokens of the largest step: about 40 KiB each for SmolLM2-135M, logits not counted.
    ///
    /// # Errors
    /// [`StepError::Invalid`] before anything is written if a token, position, page or range of the batch cannot be;
    /// [`StepError::Aborted`] if a hook gave up; [`StepError::Gpu`] if a GPU failed.
    pub fn step(
        &mut self,
        batch: &[StepSequence<'_>],
        pool: &mut PagePool,
        hooks: &mut dyn StepHooks,
    ) -> Result<StepOutput, StepError> {
        match &mut self.0 {
            Backend::Cpu(model) => model.step(batch, pool, hooks),
            Backend::Gpu(model) => model.step(batch, pool, hooks),
        }
    }
}
