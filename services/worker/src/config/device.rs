//! `worker.device` and `[worker.gpu]`: what computes.

use std::path::{Path, PathBuf};

use kvasir_model::{Device, GpuDevice, GpuOptions, LoadError, TileRows};
use kvasir_runtime::units::ByteSize;
use serde::{Deserialize, Serialize};

use super::WorkerConfig;

/// What computes the forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The CPU.
    #[default]
    Cpu,
    /// An NVIDIA GPU, Ampere or later; needs its driver and NVRTC.
    Gpu,
}

impl DeviceKind {
    /// Tokens of a step that use the device well and do not hold up others for long: the default of `worker.step_tokens_max`.
    pub const fn step_tokens(self) -> usize {
        match self {
            Self::Cpu => 256,
            Self::Gpu => 2048,
        }
    }

    /// Streams over which blocks are pushed: the default of `worker.offload_streams`. One takes what a CPU makes.
    pub const fn offload_streams(self) -> usize {
        match self {
            Self::Cpu => 1,
            Self::Gpu => 4,
        }
    }

    /// Height of the row blocks that masks of sparse prefill are planned for.
    pub const fn tile_rows(self) -> TileRows {
        match self {
            Self::Cpu => TileRows::Rows64,
            Self::Gpu => TileRows::Rows128,
        }
    }
}

/// `[worker.gpu]`: which GPU, its compiler, and what differs from a CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GpuConfig {
    /// Index of the GPU, as nvidia-smi counts.
    pub index: usize,
    /// Folder of NVRTC's libraries (`libnvrtc.so.13`); empty asks the system's loader and looks in CUDA's usual folders.
    pub nvrtc_dir: PathBuf,
    /// Folder for compiled kernels; empty compiles them at each start, which takes a minute or so. `kvasir kernels build`
    /// fills it ahead.
    pub kernels_dir: PathBuf,
    /// Page-locked memory of the host for blocks on their way to the store, made at start. What is queued lies in it
    /// (`worker.offload_queue_bytes_max`, by default three quarters of it), and so does what is on the wire and what lands. Blocks that
    /// find no room are dropped and counted.
    ///
    /// 2 GiB, which a start takes a second to make: an H100 makes keys and values of Llama-3-8B's shape at 4.6 GB/s in a prompt of
    /// 8K tokens, 3.1 in one of 32K and 1.4 in one of 128K, and a store on its host takes 1.8 to 2.5 (`kvasir bench gpu --made-up`),
    /// so no prompt is ever more than about 1.3 GB ahead of the store.
    pub pinned_bytes: ByteSize,
    /// With `worker.sparse_prefill`: tokens at positions below this attend densely, whatever the file of patterns says; 0 leaves
    /// it to the file. Up to there making the lists costs what they save. A part of the KV's namespace, as the patterns are.
    pub dense_up_to: usize,
}

impl GpuConfig {
    /// What of the page-locked memory queued blocks may take: the default of `worker.offload_queue_bytes_max` on a GPU.
    pub fn queue_bytes(&self) -> ByteSize {
        ByteSize::bytes(self.pinned_bytes.as_u64() / 4 * 3)
    }

    /// The default of `dense_up_to`: from there on each step of `kvasir bench gpu --made-up --sparse` was faster with Vertical-Slash
    /// (1000, 6096) in blocks of 1,024 tokens, on an NVIDIA H100; with an A-shape, the best blocks, or blocks of 4,096 it pays
    /// earlier.
    pub const DENSE_UP_TO: usize = 12_288;
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            index: 0,
            nvrtc_dir: PathBuf::new(),
            kernels_dir: PathBuf::new(),
            pinned_bytes: ByteSize::bytes(GpuOptions::LANDING_BYTES as u64),
            dense_up_to: Self::DENSE_UP_TO,
        }
    }
}

impl WorkerConfig {
    /// Opens what is to compute. May take seconds on a GPU: not for an async thread.
    ///
    /// # Errors
    /// [`LoadError::Gpu`] with what is missing.
    pub fn open_device(&self) -> Result<Device, LoadError> {
        let folder = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
        match self.device {
            DeviceKind::Cpu => Ok(Device::Cpu {
                threads: self.threads_or_cores(),
            }),
            DeviceKind::Gpu => GpuDevice::open(&GpuOptions {
                index: self.gpu.index,
                nvrtc: folder(&self.gpu.nvrtc_dir),
                cache: folder(&self.gpu.kernels_dir),
                landing_bytes: self.gpu.pinned_bytes.as_usize(),
            })
            .map(Device::Gpu),
        }
    }
}
