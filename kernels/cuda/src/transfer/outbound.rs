//! To the host: pages are gathered on the device, leave it in one copy, and stay where they land until nobody reads them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cudarc::driver::{CudaEvent, CudaStream, sys};
use parking_lot::Mutex;

use super::{event, new_stream, wait};
use crate::{Buffer, Family, Gpu, GpuError, PinnedBuffer, Plain};

/// Gathered pages on the device: one is filled while the other is copied.
const STAGES: usize = 2;

/// Pages of one step: what a grid's second dimension counts.
const PAGES_MAX: usize = 65_535;

/// Pages on their way to the host. A step names them once ([`Outbound::begin`]), then sends them of one buffer after the other.
///
/// What is sent is gathered by a kernel of the main stream, at the memory's speed, so the pages may be written again by
/// whatever is given to that stream next; the copy runs on a stream of its own. It lands in page-locked memory that nobody
/// copies from again: readers hold the place itself ([`Landed`]), and it is used again once the last of them is gone. Such memory
/// is slow to make, so all of it is made with this.
#[derive(Debug)]
pub struct Outbound {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    landings: Arc<Landings>,
    numbers: Buffer<u32>,
    count: usize,
    page_bytes: usize,
    /// One more than the largest page number.
    pages_min: usize,
    stages: [Stage; STAGES],
    next: usize,
}

#[derive(Debug)]
struct Stage {
    bytes: Buffer<u8>,
    /// When it may be filled again.
    free: Option<CudaEvent>,
}

#[repr(C)]
struct GatherParams {
    from: u64,
    to: u64,
    pages: u64,
    words: u32,
}

impl Outbound {
    /// Makes `bytes` of page-locked memory to land in.
    ///
    /// # Errors
    /// If the host has no room, or the device failed.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self, GpuError> {
        let stage = || {
            Ok::<_, GpuError>(Stage {
                bytes: gpu.zeros(0)?,
                free: None,
            })
        };
        Ok(Self {
            stream: new_stream(gpu)?,
            landings: Arc::new(Landings {
                gpu: gpu.clone(),
                room: gpu.pinned(bytes)?,
                free: Mutex::new(Ranges::of(bytes)),
            }),
            numbers: gpu.zeros(0)?,
            count: 0,
            page_bytes: 0,
            pages_min: 0,
            stages: [stage()?, stage()?],
            next: 0,
            gpu: gpu.clone(),
        })
    }

    /// Names the pages of `page_bytes` that [`Outbound::send`] sends from now on, in this order; waits for the device. Returns how
    /// many of them, from the first on, are sent: no more than half of the page-locked memory takes, so that one send can land
    /// while another is read.
    ///
    /// # Errors
    /// If a page is no multiple of 16 bytes, or the device has no room.
    pub fn begin(&mut self, pages: &[u32], page_bytes: usize) -> Result<usize, GpuError> {
        self.count = 0;
        if page_bytes == 0 || !page_bytes.is_multiple_of(16) || page_bytes / 16 > u32::MAX as usize {
            let why = format!("pages of {page_bytes} bytes; a multiple of 16 is needed");
            return Err(GpuError::shape("outbound", why));
        }
        let count = pages_max(self.landings.room.len(), page_bytes).min(pages.len());
        let (pages, needed) = (&pages[..count], count * page_bytes);
        if pages.is_empty() {
            return Ok(0);
        }
        if self.numbers.len() < pages.len() {
            self.numbers = self.gpu.zeros(pages.len().next_power_of_two())?;
        }
        for stage in &mut self.stages {
            if stage.bytes.len() < needed {
                // Releases the old one once all copies from it are over.
                stage.bytes = self.gpu.zeros(needed.next_power_of_two())?;
                stage.free = None;
            }
        }
        self.numbers.upload(pages)?;
        self.pages_min = pages.iter().max().map_or(0, |&page| page as usize + 1);
        (self.count, self.page_bytes) = (count, page_bytes);
        Ok(count)
    }

    /// Sends the pages of `from` as they are once everything has run that was given to the main stream so far; what is given
    /// to it later may write them. `None` where all page-locked memory holds what is still read: nothing is sent then.
    ///
    /// # Errors
    /// If a page lies outside the buffer, no pages were named, or the device failed.
    pub fn send<T: Plain>(&mut self, from: &Buffer<T>) -> Result<Option<Sent>, GpuError> {
        if self.count == 0 || self.pages_min.saturating_mul(self.page_bytes) > from.bytes() {
            let why = format!(
                "{} pages below {} of {} bytes in a buffer of {}",
                self.count,
                self.pages_min,
                self.page_bytes,
                from.bytes()
            );
            return Err(GpuError::shape("outbound", why));
        }
        let bytes = self.count * self.page_bytes;
        let Some(landing) = self.landings.take(bytes) else {
            return Ok(None);
        };
        let to = landing.pointer();
        let main = &self.gpu.shared.stream;
        let stage = &mut self.stages[self.next];
        self.next = (self.next + 1) % STAGES;
        self.gpu.shared.bind("sending to the host")?;
        if let Some(free) = stage.free.take() {
            wait(main, &free)?;
        }
        let words = (self.page_bytes / 16) as u32;
        let params = GatherParams {
            from: from.pointer,
            to: stage.bytes.pointer,
            pages: self.numbers.pointer,
            words,
        };
        let grid = (words.div_ceil(4 * 256).clamp(1, 16), self.count as u32, 1);
        // SAFETY: `GatherParams` is pack.cu's; the pages lie in `from`, as was checked above, and `begin` made room for all of
        // them on the stage, which no copy reads any more.
        unsafe { self.gpu.launch(Family::Pack, "gather_pages", grid, 256, &params)? };
        wait(&self.stream, &event(main)?)?;
        // SAFETY: the stage holds these bytes and the landing has room for them; both wait for all streams before they are
        // released, the stage is not filled again before `free`, and nobody reads the landing before `done`. A landing that is
        // taken again is written by this stream alone, in order.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), stage.bytes.pointer, bytes, self.stream.cu_stream()) }
            .result()
            .map_err(GpuError::driver("sending to the host"))?;
        stage.free = Some(event(&self.stream)?);
        Ok(Some(Sent {
            done: event(&self.stream)?,
            seen: AtomicBool::new(false),
            landing: Arc::new(landing),
            page_bytes: self.page_bytes,
            bytes,
        }))
    }
}

/// What one call of [`Outbound::send`] copies.
#[derive(Debug)]
pub struct Sent {
    landing: Arc<Landing>,
    done: CudaEvent,
    /// Whether `done` was seen, so that the driver is asked once and not for every page.
    seen: AtomicBool,
    page_bytes: usize,
    bytes: usize,
}

impl Sent {
    /// Whether it is there.
    pub fn is_there(&self) -> bool {
        if !self.seen.load(Ordering::Acquire) && self.done.is_complete() {
            self.seen.store(true, Ordering::Release);
        }
        self.seen.load(Ordering::Acquire)
    }

    /// The `place`th of the pages that were named; waits for it.
    ///
    /// # Errors
    /// If there is no such place, or the device failed.
    pub fn page(&self, place: usize) -> Result<Landed, GpuError> {
        let at = place.saturating_mul(self.page_bytes);
        if at >= self.bytes {
            let why = format!("place {place} of {}", self.bytes / self.page_bytes);
            return Err(GpuError::shape("sent", why));
        }
        if !self.seen.load(Ordering::Acquire) {
            self.landing.home.gpu.shared.bind("waiting for a copy to the host")?;
            self.done
                .synchronize()
                .map_err(GpuError::driver("waiting for a copy to the host"))?;
            self.seen.store(true, Ordering::Release);
        }
        Ok(Landed {
            landing: Arc::clone(&self.landing),
            at,
            bytes: self.page_bytes,
        })
    }
}

/// A page where it landed. The memory is not used again before this is dropped.
#[derive(Clone, Debug)]
pub struct Landed {
    landing: Arc<Landing>,
    at: usize,
    bytes: usize,
}

impl AsRef<[u8]> for Landed {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: initialised bytes inside the landing; the copy to it is over (`Sent::page`), and no other goes there while
        // this holds it.
        unsafe { std::slice::from_raw_parts(self.landing.pointer().add(self.at), self.bytes) }
    }
}

/// Most pages that one send takes of so much page-locked memory: half of it holds them.
fn pages_max(bytes: usize, page_bytes: usize) -> usize {
    let half = bytes / 2 / GRAIN * GRAIN;
    (half / page_bytes).min(PAGES_MAX)
}

/// Page-locked memory that copies land in.
#[derive(Debug)]
struct Landings {
    gpu: Gpu,
    room: PinnedBuffer,
    free: Mutex<Ranges>,
}

impl Landings {
    /// Some memory of `bytes` that is free.
    fn take(self: &Arc<Self>, bytes: usize) -> Option<Landing> {
        let at = self.free.lock().take(bytes)?;
        Some(Landing {
            at,
            bytes,
            home: Arc::clone(self),
        })
    }
}

/// Memory that is given back when this is dropped.
#[derive(Debug)]
struct Landing {
    at: usize,
    bytes: usize,
    home: Arc<Landings>,
}

impl Landing {
    fn pointer(&self) -> *mut u8 {
        self.home.room.pointer.wrapping_add(self.at)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.home.free.lock().give(self.at, self.bytes);
    }
}

/// Free ranges of bytes, none empty and no two touching. What is taken are a step's layers, alike in size and given back in
/// about their order, so the first range that fits leaves few gaps.
#[derive(Debug)]
struct Ranges(BTreeMap<usize, usize>);

/// Ranges begin and end at multiples of this: copies are fastest so.
const GRAIN: usize = 4096;

impl Ranges {
    /// All of so many bytes.
    fn of(bytes: usize) -> Self {
        let whole = bytes / GRAIN * GRAIN;
        Self((whole > 0).then_some((0, whole)).into_iter().collect())
    }

    /// Where `bytes` bytes are taken.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let bytes = bytes.max(1).checked_next_multiple_of(GRAIN)?;
        let (&at, &room) = self.0.iter().find(|(_, room)| **room >= bytes)?;
        self.0.remove(&at);
        if room > bytes {
            self.0.insert(at + bytes, room - bytes);
        }
        Some(at)
    }

    /// Gives back what was taken as so many bytes.
    fn give(&mut self, mut at: usize, bytes: usize) {
        let mut bytes = bytes.max(1).next_multiple_of(GRAIN);
        if let Some(room) = self.0.remove(&(at + bytes)) {
            bytes += room;
        }
        if let Some((&before, &room)) = self.0.range(..at).next_back()
            && before + room == at
        {
            (at, bytes) = (before, room + bytes);
        }
        self.0.insert(at, bytes);
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn what_is_taken_overlaps_nothing_and_comes_back_whole() {
        const BYTES: usize = 100 * GRAIN + 17;
        let mut rng = StdRng::seed_from_u64(1);
        let (mut ranges, mut taken) = (Ranges::of(BYTES), Vec::<(usize, usize)>::new());
        let mut refused = 0;
        for _ in 0..5000 {
            if rng.random_bool(0.55) {
                let bytes = rng.random_range(1..12 * GRAIN);
                let Some(at) = ranges.take(bytes) else {
                    refused += 1;
                    continue;
                };
                assert!(at.is_multiple_of(GRAIN) && at + bytes <= BYTES);
                assert!(
                    taken
                        .iter()
                        .all(|&(other, len)| at + bytes <= other || other + len <= at)
                );
                taken.push((at, bytes));
            } else if !taken.is_empty() {
                let (at, bytes) = taken.swap_remove(rng.random_range(0..taken.len()));
                ranges.give(at, bytes);
            }
        }
        assert!(refused > 0, "the bound was never met");
        taken.into_iter().for_each(|(at, bytes)| ranges.give(at, bytes));
        assert_eq!(ranges.take(100 * GRAIN), Some(0));
        assert_eq!(ranges.take(1), None);
    }

    #[test]
    fn two_sends_find_room_whatever_a_page_weighs() {
        let mut rng = StdRng::seed_from_u64(2);
        for _ in 0..2000 {
            let (bytes, page_bytes) = (
                rng.random_range(0..64 * GRAIN),
                16 * rng.random_range(1..2 * GRAIN / 16),
            );
            let most = pages_max(bytes, page_bytes);
            let mut ranges = Ranges::of(bytes);
            if most > 0 {
                let taken = [ranges.take(most * page_bytes), ranges.take(most * page_bytes)];
                assert!(
                    taken.iter().all(Option::is_some),
                    "{most} pages of {page_bytes} in {bytes}"
                );
            }
            // One page more would not leave room for another such send, but for what rounding takes.
            assert!(
                2 * (most + 1) * page_bytes + 2 * GRAIN > bytes,
                "{most} pages of {page_bytes} in {bytes}"
            );
        }
    }
}
