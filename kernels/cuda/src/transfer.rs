//! Copies between device and host on streams of their own, beside the work of the main stream.

use std::{ops::Range, sync::Arc};

use cudarc::driver::{CudaEvent, CudaStream, sys};

use crate::{Buffer, Gpu, GpuError, PinnedBuffer, Plain, gpu::Shared};

fn new_stream(gpu: &Gpu) -> Result<Arc<CudaStream>, GpuError> {
    gpu.shared.bind("opening a stream")?;
    gpu.shared
        .context()
        .new_stream()
        .map_err(GpuError::driver("opening a stream"))
}

fn event(stream: &CudaStream) -> Result<CudaEvent, GpuError> {
    stream
        .record_event(Some(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))
        .map_err(GpuError::driver("recording an event"))
}

fn wait(stream: &CudaStream, event: &CudaEvent) -> Result<(), GpuError> {
    stream.wait(event).map_err(GpuError::driver("waiting for an event"))
}

/// Bytes on their way to the host: room in page-locked memory that is filled from the front until it is cleared.
#[derive(Debug)]
pub struct Outbound {
    shared: Arc<Shared>,
    stream: Arc<CudaStream>,
    room: PinnedBuffer,
    used: usize,
    /// Counts clearings: what was sent before one is gone.
    round: u64,
}

/// What one call of [`Outbound::send`] copies.
#[derive(Debug)]
pub struct Sent {
    bytes: Range<usize>,
    done: CudaEvent,
    round: u64,
}

impl Outbound {
    /// Room for `bytes` between two clearings.
    ///
    /// # Errors
    /// If the host has no room.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self, GpuError> {
        Ok(Self {
            stream: new_stream(gpu)?,
            room: gpu.pinned(bytes)?,
            shared: Arc::clone(&gpu.shared),
            used: 0,
            round: 0,
        })
    }

    /// Bytes between two clearings.
    pub const fn room(&self) -> usize {
        self.room.len()
    }

    /// Copies byte ranges of `from`, end to end, once everything has run that was given to the main stream so far. What
    /// is given to it later runs beside the copy and must leave these bytes alone.
    ///
    /// # Errors
    /// If a range lies outside the buffer, or there is no room; nothing is copied then.
    pub fn send<T: Plain>(&mut self, from: &Buffer<T>, ranges: &[Range<usize>]) -> Result<Sent, GpuError> {
        let total = ranges
            .iter()
            .try_fold(self.used, |total: usize, range| total.checked_add(range.len()));
        let outside = ranges
            .iter()
            .any(|range| range.start > range.end || range.end > from.bytes());
        let Some(end) = total.filter(|&end| end <= self.room.len() && !outside) else {
            let why = format!(
                "{} ranges of {} bytes behind {} of {}",
                ranges.len(),
                from.bytes(),
                self.used,
                self.room.len()
            );
            return Err(GpuError::shape("send", why));
        };
        self.shared.bind("sending to the host")?;
        wait(&self.stream, &event(&self.shared.stream)?)?;
        let start = self.used;
        for range in ranges {
            // SAFETY: the range lies in the buffer, and the target in the room behind everything sent before; both wait for
            // all streams before they are released.
            unsafe {
                sys::cuMemcpyDtoHAsync_v2(
                    self.room.pointer.add(self.used).cast(),
                    from.pointer + range.start as u64,
                    range.len(),
                    self.stream.cu_stream(),
                )
            }
            .result()
            .map_err(GpuError::driver("sending to the host"))?;
            self.used += range.len();
        }
        Ok(Sent {
            bytes: start..end,
            done: event(&self.stream)?,
            round: self.round,
        })
    }

    /// Whether what was sent is there.
    pub fn is_there(&self, sent: &Sent) -> bool {
        sent.done.is_complete()
    }

    /// What was sent; waits for it.
    ///
    /// # Errors
    /// If it was sent before the last clearing, or the device failed.
    pub fn read(&self, sent: &Sent) -> Result<&[u8], GpuError> {
        if sent.round != self.round || sent.bytes.end > self.used {
            return Err(GpuError::shape("read", "the bytes were cleared"));
        }
        self.shared.bind("waiting for a copy to the host")?;
        sent.done
            .synchronize()
            .map_err(GpuError::driver("waiting for a copy to the host"))?;
        // SAFETY: initialised bytes inside the room; their copy is over, and no other goes there before the next clearing,
        // which needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(self.room.pointer.add(sent.bytes.start), sent.bytes.len()) })
    }

    /// Makes all room free again; waits for what is on its way.
    ///
    /// # Errors
    /// If the device failed.
    pub fn clear(&mut self) -> Result<(), GpuError> {
        self.shared.bind("waiting for copies to the host")?;
        self.stream
            .synchronize()
            .map_err(GpuError::driver("waiting for copies to the host"))?;
        self.used = 0;
        self.round += 1;
        Ok(())
    }
}

/// Bytes on their way to the device: a ring of page-locked places.
#[derive(Debug)]
pub struct Inbound {
    shared: Arc<Shared>,
    stream: Arc<CudaStream>,
    ring: PinnedBuffer,
    place_bytes: usize,
    /// When each place may be written again.
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
            free: (0..places).map(|_| None).collect(),
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
        if let Some(free) = self.free[place].take() {
            free.synchronize()
                .map_err(GpuError::driver("waiting for a copy to the device"))?;
        }
        // SAFETY: the place is inside the ring, its last copy is over, and the target was checked; ring and buffer wait for all
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
        self.free[place] = Some(event(&self.stream)?);
        self.next = (place + 1) % self.free.len();
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
