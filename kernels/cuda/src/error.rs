//! What can go wrong, one enum per operation.

/// Why a kernel family could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// NVRTC, CUDA's run-time compiler, was not found.
    #[error(
        "NVRTC was not found ({tried}): install CUDA's nvrtc library or the Python wheel nvidia-cuda-nvrtc, and name its \
         folder if it is not where the system's loader looks"
    )]
    NoCompiler {
        /// The names and folders that were tried.
        tried: String,
    },
    /// The library has not the function that is needed.
    #[error("{0} is not a usable NVRTC: {1}; install CUDA 12.0 or later")]
    UnusableCompiler(String, String),
    /// The sources do not compile for the architecture.
    #[error("kernel family {family} does not compile for {arch}: {log}")]
    Rejected {
        /// Name of the family.
        family: &'static str,
        /// Architecture, as NVRTC names it.
        arch: String,
        /// What the compiler said.
        log: String,
    },
}

/// Why a GPU could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No driver library: most often simply a machine without a GPU.
    #[error(
        "no NVIDIA driver: libcuda was not found; run on a machine with an NVIDIA GPU and its driver, or on the CPU"
    )]
    NoDriver,
    /// The driver is there but does not answer.
    #[error("the NVIDIA driver did not start: {0}; check nvidia-smi")]
    Driver(String),
    /// The index is too large.
    #[error("GPU {index} does not exist: the driver shows {count}")]
    NoSuchGpu {
        /// Index that was asked for.
        index: usize,
        /// GPUs that the driver shows.
        count: usize,
    },
    /// The GPU is older than the kernels' instructions.
    #[error("{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later")]
    TooOld {
        /// Name of the GPU.
        name: String,
        /// Major compute capability.
        major: i32,
        /// Minor compute capability.
        minor: i32,
    },
    /// The kernels could not be compiled.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Why work on an open GPU was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// The arguments of a launch do not fit each other; nothing was launched.
    #[error("{what}: {why}")]
    Shape {
        /// The operation or argument.
        what: &'static str,
        /// What does not fit.
        why: String,
    },
    /// The device has no room.
    #[error("GPU memory is full: {bytes} bytes could not be allocated")]
    OutOfMemory {
        /// Size of the request.
        bytes: usize,
    },
    /// The driver failed; after most of these the context is unusable and the process should give the GPU up.
    #[error("the GPU failed while {doing}: {why}")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// The driver's own words.
        why: String,
    },
    /// A family was compiled for the first time and failed.
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl GpuError {
    pub(crate) fn shape(what: &'static str, why: impl Into<String>) -> Self {
        Self::Shape { what, why: why.into() }
    }

    pub(crate) fn driver(doing: &'static str) -> impl FnOnce(cudarc::driver::DriverError) -> Self {
        move |error| Self::Driver {
            doing,
            why: error.to_string(),
        }
    }
}
