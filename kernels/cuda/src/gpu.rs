//! A device, the one stream that all work on it is given to, and its kernels.

use std::{collections::HashMap, ffi::c_void, path::PathBuf, sync::Arc};

use cudarc::{
    driver::{CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaStream, result, sys},
    nvrtc::Ptx,
};
use parking_lot::Mutex;

use crate::{Buffer, Compiler, Family, GpuError, Kernels, OpenError, PinnedBuffer, Plain, Variant};

/// Where to find the compiler and where to keep what it makes.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Folder of NVRTC's libraries; by default the system's loader is asked.
    pub nvrtc: Option<PathBuf>,
    /// Folder for compiled kernels; without one they are compiled at each start (some seconds).
    pub cache: Option<PathBuf>,
    /// How kernels are compiled; anything but plain is for tests.
    pub variant: Variant,
}

/// An open GPU. All work goes to one stream and runs in the order in which it was given; the calls return before it has
/// run, except those that say they wait. Buffers are for the [`Gpu`] that made them (and its clones): between two that were
/// opened apart nothing orders the work.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    context: Arc<CudaContext>,
    pub(crate) stream: Arc<CudaStream>,
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
    kernels: Kernels,
    modules: Mutex<HashMap<Family, Arc<CudaModule>>>,
    functions: Mutex<HashMap<&'static str, CudaFunction>>,
    recorded: Mutex<Recorded>,
}

/// What recorded work may still use. A graph knows addresses, not owners, so memory that is released while any graph
/// lives is kept until the last one goes.
#[derive(Default)]
struct Recorded {
    graphs: usize,
    kept: Vec<Memory>,
}

/// Memory without an owner.
#[derive(Clone, Copy)]
pub(crate) enum Memory {
    Device(sys::CUdeviceptr),
    Host(*mut u8),
}

// SAFETY: addresses to be released; nobody reads through them.
unsafe impl Send for Memory {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name, self.kernels.arch())
    }
}

impl Gpu {
    /// Opens GPU `index`. Looks before it leaps: without a driver this is an error that says so.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, no NVRTC, or the GPU is older than Ampere.
    pub fn open(index: usize, options: &Options) -> Result<Self, OpenError> {
        let driver = |error: cudarc::driver::DriverError| OpenError::Driver(error.to_string());
        // SAFETY: opens the driver's library, whose initialisers are made for that.
        if !unsafe { sys::is_culib_present() } {
            return Err(OpenError::NoDriver);
        }
        result::init().map_err(driver)?;
        let count = usize::try_from(CudaContext::device_count().map_err(driver)?).unwrap_or(0);
        if index >= count {
            return Err(OpenError::NoSuchGpu { index, count });
        }
        let context = CudaContext::new(index).map_err(driver)?;
        // SAFETY: events order work between streams, and there is one stream; releases wait (`Buffer::drop`).
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(driver)?;
        let (major, minor) = context.compute_capability().map_err(driver)?;
        if major < 8 {
            return Err(OpenError::TooOld { name, major, minor });
        }
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(driver)?;
        let compiler = Compiler::open(options.nvrtc.as_deref())?;
        let kernels =
            Kernels::new(compiler, &Kernels::arch_of(major, minor), options.cache.clone()).variant(options.variant);
        let stream = context.new_stream().map_err(driver)?;
        Ok(Self {
            shared: Arc::new(Shared {
                context,
                stream,
                name,
                capability: (major, minor),
                multiprocessors: usize::try_from(multiprocessors).unwrap_or(1).max(1),
                kernels,
                modules: Mutex::default(),
                functions: Mutex::default(),
                recorded: Mutex::default(),
            }),
        })
    }

    /// Name, as the driver gives it.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Compute capability, `(9, 0)` for Hopper.
    pub fn capability(&self) -> (i32, i32) {
        self.shared.capability
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.shared.multiprocessors
    }

    /// Bytes of memory: free now, and in all.
    ///
    /// # Errors
    /// If the driver failed.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        self.shared
            .context
            .mem_get_info()
            .map_err(GpuError::driver("asking for free memory"))
    }

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn zeros<T: Plain>(&self, len: usize) -> Result<Buffer<T>, GpuError> {
        Buffer::zeroed(&self.shared, len)
    }

    /// A buffer that holds a copy of `from`.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn upload<T: Plain>(&self, from: &[T]) -> Result<Buffer<T>, GpuError> {
        let mut out = self.zeros(from.len())?;
        out.upload(from)?;
        Ok(out)
    }

    /// `len` zero bytes of page-locked host memory.
    ///
    /// # Errors
    /// If the host has no room.
    pub fn pinned(&self, len: usize) -> Result<PinnedBuffer, GpuError> {
        PinnedBuffer::zeroed(&self.shared, len)
    }

    /// Copies a buffer's first `bytes` to another, in the order of the stream.
    ///
    /// # Errors
    /// If either is too short.
    pub fn copy<T: Plain>(&self, from: &Buffer<T>, to: &mut Buffer<T>, bytes: usize) -> Result<(), GpuError> {
        if bytes > from.bytes() || bytes > to.bytes() {
            let why = format!("{bytes} bytes from {} to {}", from.bytes(), to.bytes());
            return Err(GpuError::shape("copy", why));
        }
        self.shared.bind("copying")?;
        // SAFETY: the lengths were checked, and both buffers wait for the stream before they are released.
        unsafe { sys::cuMemcpyDtoDAsync_v2(to.pointer, from.pointer, bytes, self.shared.stream.cu_stream()) }
            .result()
            .map_err(GpuError::driver("copying"))
    }

    /// Copies a buffer's first `bytes` to page-locked memory at `at`, in the order of the stream.
    ///
    /// # Errors
    /// If either is too short.
    pub fn copy_to_host<T: Plain>(
        &self,
        from: &Buffer<T>,
        to: &mut PinnedBuffer,
        at: usize,
        bytes: usize,
    ) -> Result<(), GpuError> {
        if bytes > from.bytes() || at.checked_add(bytes).is_none_or(|end| end > to.len()) {
            let why = format!("{bytes} bytes from {} to {at} of {}", from.bytes(), to.len());
            return Err(GpuError::shape("copy_to_host", why));
        }
        if !Arc::ptr_eq(&self.shared, &to.shared) {
            return Err(GpuError::shape(
                "copy_to_host",
                "the page-locked memory belongs to another open GPU",
            ));
        }
        self.shared.bind("copying to the host")?;
        // SAFETY: the lengths were checked; both sides wait for the stream before they are read or released.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                to.pointer.add(at).cast(),
                from.pointer,
                bytes,
                self.shared.stream.cu_stream(),
            )
        }
        .result()
        .map_err(GpuError::driver("copying to the host"))
    }

    /// Copies the first `bytes` of page-locked memory to a buffer, in the order of the stream.
    ///
    /// # Errors
    /// If either is too short, or the page-locked memory belongs to another open GPU.
    pub fn copy_from_host<T: Plain>(
        &self,
        from: &PinnedBuffer,
        to: &mut Buffer<T>,
        bytes: usize,
    ) -> Result<(), GpuError> {
        if bytes > from.len() || bytes > to.bytes() || !Arc::ptr_eq(&self.shared, &from.shared) {
            let why = format!("{bytes} bytes from {} to {}, both of this GPU", from.len(), to.bytes());
            return Err(GpuError::shape("copy_from_host", why));
        }
        self.shared.bind("copying from the host")?;
        // SAFETY: the lengths were checked; both sides wait for the stream before they are written or released.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to.pointer, from.pointer.cast(), bytes, self.shared.stream.cu_stream()) }
            .result()
            .map_err(GpuError::driver("copying from the host"))
    }

    /// Waits until all work that was given has run.
    ///
    /// # Errors
    /// If any of it failed.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.shared.synchronize("waiting")
    }

    /// Records what `work` launches, to be replayed at the price of one launch. Memory that it uses may be released before
    /// the graph is: it is kept until the last graph of this GPU goes, so a replay never meets memory that is gone. Kernels
    /// must have been launched once before: loading code, allocating and copying from plain host memory are refused while
    /// recording.
    ///
    /// # Errors
    /// If `work` fails or does what cannot be recorded.
    pub fn record(&self, work: impl FnOnce(&Self) -> Result<(), GpuError>) -> Result<Graph, GpuError> {
        let stream = &self.shared.stream;
        self.shared.recorded.lock().graphs += 1;
        let mut recorded = Graph {
            graph: None,
            shared: Arc::clone(&self.shared),
        };
        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(GpuError::driver("starting to record"))?;
        let worked = work(self);
        let graph = stream
            .end_capture(sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .map_err(GpuError::driver("recording"));
        worked?;
        recorded.graph = graph?;
        Ok(recorded)
    }

    /// Starts to measure time on the device.
    ///
    /// # Errors
    /// If the driver failed.
    pub fn stopwatch(&self) -> Result<Stopwatch, GpuError> {
        Ok(Stopwatch {
            start: self.shared.event()?,
            shared: Arc::clone(&self.shared),
        })
    }

    /// Launches `kernel`, whose one argument is `params`, with static shared memory only.
    ///
    /// # Safety
    /// As [`Gpu::launch_with`].
    pub(crate) unsafe fn launch<P>(
        &self,
        family: Family,
        kernel: &'static str,
        grid: (u32, u32, u32),
        threads: u32,
        params: &P,
    ) -> Result<(), GpuError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(family, kernel, grid, threads, 0, params) }
    }

    /// Launches `kernel`, whose one argument is `params`, with `shared` bytes of dynamic shared memory.
    ///
    /// # Safety
    /// `P` must be the C layout of the kernel's parameter, and every address in it must be good for what the kernel does
    /// with it until the work has run: [`Buffer`] waits before it is released.
    pub(crate) unsafe fn launch_with<P>(
        &self,
        family: Family,
        kernel: &'static str,
        grid: (u32, u32, u32),
        threads: u32,
        shared: u32,
        params: &P,
    ) -> Result<(), GpuError> {
        let function = self.shared.function(family, kernel)?;
        self.shared.bind(kernel)?;
        if shared > 0 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(attribute, shared as i32)
                .map_err(GpuError::driver(kernel))?;
        }
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the driver copies the parameter during the call; the rest is the caller's promise.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                grid,
                (threads, 1, 1),
                shared,
                self.shared.stream.cu_stream(),
                &mut arguments,
            )
        }
        .map_err(GpuError::driver(kernel))
    }
}

impl Shared {
    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Releases memory once no work can use it any more: after all streams have run, or with the last graph.
    pub(crate) fn release(&self, memory: Memory) {
        {
            let mut recorded = self.recorded.lock();
            if recorded.graphs > 0 {
                recorded.kept.push(memory);
                return;
            }
        }
        let waited = self.wait_for_all("releasing memory");
        // SAFETY: an allocation of `Buffer` or `PinnedBuffer` that has lost its owner; freed once, and no work uses it.
        let freed = unsafe {
            match memory {
                Memory::Device(pointer) => result::free_sync(pointer),
                Memory::Host(pointer) => result::free_host(pointer.cast()),
            }
        };
        if waited.is_err() || freed.is_err() {
            tracing::warn!("memory of the GPU could not be released: the device has failed");
        }
    }

    /// Makes the context the calling thread's; the driver's calls need one.
    pub(crate) fn bind(&self, doing: &'static str) -> Result<(), GpuError> {
        self.context.bind_to_thread().map_err(GpuError::driver(doing))
    }

    pub(crate) fn synchronize(&self, doing: &'static str) -> Result<(), GpuError> {
        self.bind(doing)?;
        self.stream.synchronize().map_err(GpuError::driver(doing))
    }

    /// Waits for every stream of the device that this process uses.
    pub(crate) fn wait_for_all(&self, doing: &'static str) -> Result<(), GpuError> {
        self.bind(doing)?;
        self.context.synchronize().map_err(GpuError::driver(doing))
    }

    fn function(&self, family: Family, kernel: &'static str) -> Result<CudaFunction, GpuError> {
        if let Some(function) = self.functions.lock().get(kernel) {
            return Ok(function.clone());
        }
        let known = self.modules.lock().get(&family).cloned();
        let module = match known {
            Some(module) => module,
            None => {
                let cubin = self.kernels.cubin(family)?;
                let module = self
                    .context
                    .load_module(Ptx::from_binary(cubin))
                    .map_err(GpuError::driver("loading kernels"))?;
                self.modules.lock().entry(family).or_insert(module).clone()
            }
        };
        let function = module.load_function(kernel).map_err(GpuError::driver(kernel))?;
        self.functions.lock().insert(kernel, function.clone());
        Ok(function)
    }

    fn event(&self) -> Result<CudaEvent, GpuError> {
        self.stream
            .record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))
            .map_err(GpuError::driver("recording an event"))
    }
}

/// Recorded launches.
pub struct Graph {
    graph: Option<CudaGraph>,
    shared: Arc<Shared>,
}

// SAFETY: a graph is launched and released through the driver, which may be called from any thread; no two at a time,
// because both take `&mut self` or the stream's own lock, and `Sync` is not promised.
unsafe impl Send for Graph {}

impl Graph {
    /// Gives the recorded work to the stream again.
    ///
    /// # Errors
    /// If the driver failed.
    pub fn replay(&self) -> Result<(), GpuError> {
        self.shared.bind("replaying a graph")?;
        self.graph.as_ref().map_or(Ok(()), |graph| {
            graph.launch().map_err(GpuError::driver("replaying a graph"))
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.graph.is_some() && self.shared.synchronize("releasing a graph").is_err() {
            tracing::warn!("a graph was released on a failed device");
        }
        self.graph = None;
        let kept = {
            let mut recorded = self.shared.recorded.lock();
            recorded.graphs -= 1;
            if recorded.graphs > 0 {
                return;
            }
            std::mem::take(&mut recorded.kept)
        };
        kept.into_iter().for_each(|memory| self.shared.release(memory));
    }
}

/// Time between two points of the stream, by the device's own clock.
#[derive(Debug)]
pub struct Stopwatch {
    start: CudaEvent,
    shared: Arc<Shared>,
}

impl Stopwatch {
    /// Waits for the work so far; microseconds it took since the start.
    ///
    /// # Errors
    /// If the work failed.
    pub fn stop(self) -> Result<f64, GpuError> {
        let end = self.shared.event()?;
        end.synchronize().map_err(GpuError::driver("measuring time"))?;
        let milliseconds = self
            .start
            .elapsed_ms(&end)
            .map_err(GpuError::driver("measuring time"))?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}
