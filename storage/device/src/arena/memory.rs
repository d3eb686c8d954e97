//! The arena's memory: an anonymous file that can neither shrink nor grow nor be mapped for writing again, mapped once.

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    slice,
};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};

use super::{ArenaError, HugePages};
use crate::PAGE_BYTES;

/// What an arena's file must have so that its mappings stay whole (no shrinking means no SIGBUS) and others can only read.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::FUTURE_WRITE)
    .union(SealFlags::SEAL);
const HUGE_BYTES: u64 = 2 << 20;

/// The pages that an arena's memory has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Pages of 4 KiB.
    Base,
    /// Pages of 4 KiB that the kernel was asked, and is set, to join to 2 MiB where it can.
    Transparent,
    /// Reserved pages of 2 MiB.
    Huge,
}

/// A mapped file. Who may touch which bytes is the arena's affair; here is only that they exist as long as `self`.
#[derive(Debug)]
pub(super) struct Memory {
    file: File,
    map: MmapRaw,
    pages: PageKind,
}

impl Memory {
    /// `bytes` of memory, a multiple of a page and not nothing; with huge pages down to a multiple of 2 MiB.
    pub(super) fn new(bytes: u64, huge_pages: HugePages) -> Result<Self, ArenaError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let whole = bytes / HUGE_BYTES * HUGE_BYTES;
        if huge_pages == HugePages::Auto && whole > 0 {
            // Mapping reserves all pages or fails, so there is no page that could be lacking later. What is lost at the end
            // must be little.
            let huge = flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
            if bytes - whole <= bytes / 64
                && let Ok((file, map)) = sealed(whole, huge)
            {
                return Ok(Self {
                    file,
                    map,
                    pages: PageKind::Huge,
                });
            }
        }
        let (file, map) = sealed(bytes, flags).map_err(|(what, source)| ArenaError { what, bytes, source })?;
        let asked = huge_pages == HugePages::Auto && map.advise(Advice::HugePage).is_ok();
        let pages = if asked && shared_memory_may_be_huge() {
            PageKind::Transparent
        } else {
            PageKind::Base
        };
        Ok(Self { file, map, pages })
    }

    /// Maps another process's arena, for reading, once it is known that it cannot change its size.
    pub(super) fn view(fd: OwnedFd, bytes: u64) -> Result<Self, ViewProblem> {
        let seals = fcntl_get_seals(&fd).map_err(|error| ViewProblem::Io("read the seals", error.into()))?;
        if !seals.contains(SEALS) {
            return Err(ViewProblem::NotSealed);
        }
        let stat = fstat(&fd).map_err(|error| ViewProblem::Io("read the size", error.into()))?;
        let found = u64::try_from(stat.st_size).unwrap_or_default();
        let len = usize::try_from(bytes).ok().filter(|&len| len > 0 && found == bytes);
        let len = len.ok_or(ViewProblem::Size { found })?;
        let file = File::from(fd);
        let map = MmapOptions::new().len(len).map_raw_read_only(&file);
        Ok(Self {
            map: map.map_err(|error| ViewProblem::Io("map it", error))?,
            file,
            pages: PageKind::Base,
        })
    }

    pub(super) fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Has the system make the pages of a range, which changes nothing in them: first in the file, which holds up nobody and is
    /// half of the work, then in the mapping, and meanwhile the process can map nothing else.
    pub(super) fn touch(&self, range: Range<usize>) -> io::Result<()> {
        let (from, bytes) = (range.start as u64, range.len() as u64);
        fallocate(&self.file, FallocateFlags::empty(), from, bytes)?;
        self.map.advise_range(Advice::PopulateWrite, range.start, range.len())
    }

    pub(super) fn pages(&self) -> PageKind {
        self.pages
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where `bytes` begin, if they are in this mapping.
    pub(super) fn offset_of(&self, bytes: &[u8]) -> Option<usize> {
        let offset = (bytes.as_ptr() as usize).checked_sub(self.map.as_ptr() as usize)?;
        let end = offset.checked_add(bytes.len())?;
        (end <= self.map.len()).then_some(offset)
    }

    /// # Safety
    /// `offset + len` is at most [`Self::len`], and nothing in this process writes to these bytes while the slice lives.
    pub(super) unsafe fn slice(&self, offset: usize, len: usize) -> &[u8] {
        debug_assert!(offset + len <= self.map.len());
        // SAFETY: inside the mapping, by the caller's word; the file is sealed against shrinking, so every page of it exists.
        unsafe { slice::from_raw_parts(self.map.as_ptr().add(offset), len) }
    }

    /// # Safety
    /// As [`Self::slice`], the mapping is writable, and no other slice of these bytes exists in this process.
    #[expect(clippy::mut_from_ref, reason = "exclusive by page: the caller owns these pages")]
    pub(super) unsafe fn slice_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        debug_assert!(offset + len <= self.map.len());
        // SAFETY: as in `slice`; exclusive by the caller's word.
        unsafe { slice::from_raw_parts_mut(self.map.as_mut_ptr().add(offset), len) }
    }
}

/// Why a descriptor is not mapped as an arena.
pub(super) enum ViewProblem {
    NotSealed,
    Size { found: u64 },
    Io(&'static str, io::Error),
}

fn sealed(bytes: u64, flags: MemfdFlags) -> Result<(File, MmapRaw), (&'static str, io::Error)> {
    let file = memfd_create("kvasir-arena", flags).map_err(|error| ("create an anonymous file", error.into()))?;
    ftruncate(&file, bytes).map_err(|error| ("set its size", error.into()))?;
    let file = File::from(file);
    let map = MmapRaw::map_raw(&file).map_err(|error| ("map it", error))?;
    // After the mapping: it is the one that may write.
    fcntl_add_seals(&file, SEALS).map_err(|error| ("seal it", error.into()))?;
    Ok((file, map))
}

/// Whether the system joins pages of shared memory on advice.
fn shared_memory_may_be_huge() -> bool {
    let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    ["[always]", "[within_size]", "[advise]", "[force]"]
        .iter()
        .any(|chosen| setting.contains(chosen))
}

const _: () = assert!(HUGE_BYTES.is_multiple_of(PAGE_BYTES as u64));
