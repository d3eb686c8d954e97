//! [`Buffer`]: memory that one owner fills and many then read.

use std::{
    alloc::{self, Layout},
    ops::Range,
    ptr::NonNull,
    slice,
};

use bytes::Bytes;

use crate::arena::Slot;

/// Alignment of every buffer: what direct I/O asks of memory, lengths and offsets on the disks we know.
pub const PAGE_BYTES: usize = 4096;

/// Exclusive, writable memory that starts at a multiple of [`PAGE_BYTES`] and is usable for direct I/O. From the heap it is zeros at
/// first; from an arena ([`crate::Arena::try_reserve`]) it is what was there before, which may be another's: freeze only what
/// was written.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
}

#[derive(Debug)]
enum Memory {
    Heap(Pages),
    Arena(Slot),
}

impl Buffer {
    /// `len` bytes from the heap, zeroed.
    pub fn heap(len: usize) -> Self {
        Self {
            memory: Memory::Heap(Pages::zeroed(len)),
            len,
        }
    }

    /// `len` bytes of a slot that holds at least as many.
    pub(crate) fn in_arena(slot: Slot, len: usize) -> Self {
        debug_assert!(len <= slot.len());
        Self {
            memory: Memory::Arena(slot),
            len,
        }
    }

    /// Bytes that were asked for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match &self.memory {
            Memory::Heap(pages) => &pages.as_slice()[..self.len],
            Memory::Arena(slot) => &slot.as_slice()[..self.len],
        }
    }

    /// The bytes, to fill them.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Heap(pages) => &mut pages.as_mut_slice()[..self.len],
            Memory::Arena(slot) => &mut slot.as_mut_slice()[..self.len],
        }
    }

    /// Makes a part of it shared and immutable, without copying. The whole buffer lives until the last clone is gone.
    ///
    /// # Panics
    /// When `part` is not inside the buffer.
    pub fn freeze(self, part: Range<usize>) -> Bytes {
        assert!(part.end <= self.len, "{part:?} is not within a buffer of {}", self.len);
        match self.memory {
            Memory::Heap(_) => Bytes::from_owner(self).slice(part),
            Memory::Arena(slot) => slot.share(part).bytes(),
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// Whole pages from the heap.
#[derive(Debug)]
struct Pages {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Pages` owns its memory and hands it out only by `&self` and `&mut self`.
unsafe impl Send for Pages {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for Pages {}

impl Pages {
    fn zeroed(len: usize) -> Self {
        let bytes = len.max(1).next_multiple_of(PAGE_BYTES);
        let Ok(layout) = Layout::from_size_align(bytes, PAGE_BYTES) else {
            alloc::handle_alloc_error(Layout::new::<[u8; PAGE_BYTES]>())
        };
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => Self { start, layout },
            None => alloc::handle_alloc_error(layout),
        }
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: `layout.size()` initialised bytes from `start` belong to `self`, and nothing writes while `&self` lives.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the access exclusive.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout, and freed once.
        unsafe { alloc::dealloc(self.start.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_zeroed_and_shared_without_copying() {
        for len in [0, 1, 4095, 4096, 4097, 1 << 20] {
            let mut buffer = Buffer::heap(len);
            assert_eq!(buffer.as_slice().as_ptr() as usize % PAGE_BYTES, 0);
            assert!(buffer.as_slice().iter().all(|&byte| byte == 0) && buffer.len() == len);
            buffer.as_mut_slice().fill(7);
            let at = buffer.as_slice().as_ptr();
            let bytes = buffer.freeze(0..len);
            assert!(bytes.len() == len && (len == 0 || bytes.as_ptr() == at));
            assert!(bytes.iter().all(|&byte| byte == 7));
        }
    }
}
