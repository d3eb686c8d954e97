//! To the device.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, sys};

use super::{event, new_stream, wait};
use crate::{Buffer, Gpu, GpuError, PinnedBuffer, Plain, gpu::Shared};

/// Places that become free together: recording an event takes the driver about as long as a copy.
const GROUP: usize = 8;

/// Bytes on their way to the device: a ring of page-locked places.
#[derive(Debug)]
pub struct Inbound {
    shared: Arc<Shared>,
    stream: Arc<CudaStream>,
    ring: PinnedBuffer,
    place_bytes: usize,
    places: usize,
    /// When each [`GROUP`] of places may be written again.
    free: Vec<Option<CudaEvent>>,
    next: usize,
    pending: bool,
}

impl Inbound {
    /// A ring of `places` of `place_bytes` each.
    ///
    /// # Errors
    /// If there are none, or the host has no room.
    pub fn new(gpu: &Gpu, places: usize, place_bytes: usize) -> Result<Self, GpuError> {
        let Some(bytes) = places.checked_mul(place_bytes).filter(|&bytes| bytes > 0) else {
            return Err(GpuError::shape(
                "ring",
                format!("{places} places of {place_bytes} bytes"),
            ));
        };
        Ok(Self {
            stream: new_stream(gpu)?,
            ring: gpu.pinned(bytes)?,
            shared: Arc::clone(&gpu.shared),
            place_bytes,
            places,
            free: (0..places.div_ceil(GROUP)).map(|_| None).collect(),
            next: 0,
            pending: false,
        })
    }

    /// Copies `bytes`, at most a place, to byte `at` of `to`, beside the main stream: what it runs until [`Inbound::join`] must
    /// leave that place alone. Waits only when the ring is full.
    ///
    /// # Errors
    /// If they do not fit, or the device failed.
    pub fn send<T: Plain>(&mut self, to: &mut Buffer<T>, at: usize, bytes: &[u8]) -> Result<(), GpuError> {
        if bytes.len() > self.place_bytes || at.checked_add(bytes.len()).is_none_or(|end| end > to.bytes()) {
            let why = format!(
                "{} bytes to {at} of {}; a place has {}",
                bytes.len(),
                to.bytes(),
                self.place_bytes
            );
            return Err(GpuError::shape("send", why));
        }
        self.shared.bind("sending to the device")?;
        let place = self.next;
        if place.is_multiple_of(GROUP)
            && let Some(free) = self.free[place / GROUP].take()
        {
            free.synchronize()
                .map_err(GpuError::driver("waiting for a copy to the device"))?;
        }
        // SAFETY: the place is inside the ring, its last copy is over as its group's are, and the target was checked; ring and buffer wait for all
        // streams before they are released.
        unsafe {
            let from = self.ring.pointer.add(place * self.place_bytes);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), from, bytes.len());
            sys::cuMemcpyHtoDAsync_v2(
                to.pointer + at as u64,
                from.cast(),
                bytes.len(),
                self.stream.cu_stream(),
            )
        }
        .result()
        .map_err(GpuError::driver("sending to the device"))?;
        self.next = (place + 1) % self.places;
        if self.next.is_multiple_of(GROUP) || self.next == 0 {
            self.free[place / GROUP] = Some(event(&self.stream)?);
        }
        self.pending = true;
        Ok(())
    }

    /// Makes the main stream wait for everything sent so far; the host does not wait.
    ///
    /// # Errors
    /// If the device failed.
    pub fn join(&mut self) -> Result<(), GpuError> {
        if std::mem::take(&mut self.pending) {
            self.shared.bind("waiting for copies to the device")?;
            wait(&self.shared.stream, &event(&self.stream)?)?;
        }
        Ok(())
    }
}
