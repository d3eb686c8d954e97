//! Memory of the device, and page-locked memory of the host that the device reaches at full speed.

use std::{marker::PhantomData, sync::Arc};

use cudarc::driver::{result, sys};

use crate::{
    GpuError,
    gpu::{Memory, Shared},
};

/// Types that are the same bytes on host and device, any bits of which are a value.
///
/// # Safety
/// Only for types without padding, pointers or invalid bit patterns.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: plain numbers.
unsafe impl Plain for u8 {}
// SAFETY: plain numbers.
unsafe impl Plain for u16 {}
// SAFETY: plain numbers.
unsafe impl Plain for u32 {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}
// SAFETY: transparent wrappers of 16 bits.
unsafe impl Plain for half::f16 {}
// SAFETY: transparent wrappers of 16 bits.
unsafe impl Plain for half::bf16 {}

/// `len` elements on the device. Allocated ahead, not per token: allocation and release wait for the device.
#[derive(Debug)]
pub struct Buffer<T> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) pointer: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    pub(crate) fn zeroed(shared: &Arc<Shared>, len: usize) -> Result<Self, GpuError> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or(GpuError::OutOfMemory { bytes: usize::MAX })?;
        shared.bind("allocating")?;
        // SAFETY: the context is bound; the memory is freed once, in `drop`. The driver refuses 0 bytes, hence the 1.
        let pointer = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => GpuError::OutOfMemory { bytes },
            _ => GpuError::driver("allocating")(error),
        })?;
        let mut out = Self {
            shared: Arc::clone(shared),
            pointer,
            len,
            element: PhantomData,
        };
        out.fill(0)?;
        Ok(out)
    }

    /// Elements.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    pub const fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Sets every byte, in the order of the stream.
    ///
    /// # Errors
    /// If the device failed.
    pub fn fill(&mut self, byte: u8) -> Result<(), GpuError> {
        if self.is_empty() {
            return Ok(());
        }
        self.shared.bind("filling a buffer")?;
        // SAFETY: the buffer has these bytes, and only this stream uses it.
        unsafe { result::memset_d8_async(self.pointer, byte, self.bytes(), self.shared.stream.cu_stream()) }
            .map_err(GpuError::driver("filling a buffer"))
    }

    /// Copies `from` to the buffer's start, and waits.
    ///
    /// # Errors
    /// If `from` is longer than the buffer, or the device failed.
    pub fn upload(&mut self, from: &[T]) -> Result<(), GpuError> {
        if from.len() > self.len {
            let why = format!("{} elements do not fit a buffer of {}", from.len(), self.len);
            return Err(GpuError::shape("upload", why));
        }
        if from.is_empty() {
            return Ok(());
        }
        self.shared.bind("uploading")?;
        // SAFETY: the lengths were checked, and the call below waits, so that `from` outlives the copy.
        unsafe { result::memcpy_htod_async(self.pointer, from, self.shared.stream.cu_stream()) }
            .map_err(GpuError::driver("uploading"))?;
        self.shared.synchronize("uploading")
    }

    /// Copies the whole buffer to the host, after all work that was given to the stream before.
    ///
    /// # Errors
    /// If the device failed, now or in earlier work.
    pub fn download(&self) -> Result<Vec<T>, GpuError> {
        self.download_range(0..self.len)
    }

    /// The same for some elements.
    ///
    /// # Errors
    /// As there, and if they lie outside the buffer.
    pub fn download_range(&self, range: std::ops::Range<usize>) -> Result<Vec<T>, GpuError> {
        if range.start > range.end || range.end > self.len {
            let why = format!("elements {range:?} of {}", self.len);
            return Err(GpuError::shape("download", why));
        }
        if range.is_empty() {
            return Ok(Vec::new());
        }
        self.shared.bind("downloading")?;
        let mut out: Vec<T> = Vec::with_capacity(range.len());
        // SAFETY: the range lies in the buffer, the vector has room for it, any bits are a value of `T` (`Plain`), and the length is set only
        // after the copy was waited for.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                out.as_mut_ptr().cast(),
                self.pointer + (range.start * size_of::<T>()) as u64,
                range.len() * size_of::<T>(),
                self.shared.stream.cu_stream(),
            )
            .result()
            .map_err(GpuError::driver("downloading"))?;
            self.shared.synchronize("downloading")?;
            out.set_len(range.len());
        }
        Ok(out)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // Work that was given to any stream may still use the memory; the driver would wait too, but does not promise it.
        self.shared.release(Memory::Device(self.pointer));
    }
}

/// Page-locked bytes of the host: copies to and from the device run at the bus's speed and beside other work.
#[derive(Debug)]
pub struct PinnedBuffer {
    pub(crate) shared: Arc<Shared>,
    pub(crate) pointer: *mut u8,
    len: usize,
}

// SAFETY: the memory is owned, and reached only through `&self` and `&mut self`.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub(crate) fn zeroed(shared: &Arc<Shared>, len: usize) -> Result<Self, GpuError> {
        shared.bind("allocating page-locked memory")?;
        // SAFETY: the context is bound; freed once, in `drop`; zeroed before anyone reads it.
        let pointer = unsafe { result::malloc_host(len.max(1), 0) }
            .map_err(GpuError::driver("allocating page-locked memory"))?
            .cast::<u8>();
        // SAFETY: the allocation has these bytes.
        unsafe { pointer.write_bytes(0, len) };
        Ok(Self {
            shared: Arc::clone(shared),
            pointer,
            len,
        })
    }

    /// Bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, once all work of the stream is done.
    ///
    /// # Errors
    /// If the device failed.
    pub fn read(&self) -> Result<&[u8], GpuError> {
        self.shared.synchronize("waiting for a copy to the host")?;
        // SAFETY: `len` initialised bytes, and no copy is in flight.
        Ok(unsafe { std::slice::from_raw_parts(self.pointer, self.len) })
    }

    /// The bytes to write to, once all work of the stream is done.
    ///
    /// # Errors
    /// If the device failed.
    pub fn write(&mut self) -> Result<&mut [u8], GpuError> {
        self.shared.synchronize("waiting for a copy from the host")?;
        // SAFETY: as in `read`, and `&mut self` is the only way to them.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) })
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        self.shared.release(Memory::Host(self.pointer));
    }
}
