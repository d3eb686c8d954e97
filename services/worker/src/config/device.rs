//! `worker.device` and `[worker.gpu]`: what computes.

use std::path::{Path, PathBuf};

use kvasir_model::{Device, GpuDevice, GpuOptions, LoadError};
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

/// `[worker.gpu]`: which GPU, and its compiler.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GpuConfig {
    /// Index of the GPU, as nvidia-smi counts.
    pub index: usize,
    /// Folder of NVRTC's libraries (`libnvrtc.so.13`); empty asks the system's loader and looks in CUDA's usual folders.
    pub nvrtc_dir: PathBuf,
    /// Folder for compiled kernels; empty compiles them at each start, which takes a minute or so. `kvasir kernels build`
    /// fills it ahead.
    pub kernels_dir: PathBuf,
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
            })
            .map(Device::Gpu),
        }
    }
}
