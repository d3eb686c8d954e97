//! Room for a layer block before its bytes are there, so that they are received where they will rest.

use std::{
    ops::Range,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use kvasir_block::{Checksum, LayerBlockKey, NamespaceId};
use kvasir_device::Buffer;

use super::{BlockCache, PutOutcome};
use crate::CacheError;

/// Bytes that are filled and then summed at a time: they are still in the processor's cache.
const STEP_BYTES: usize = 256 << 10;

/// Writable room for one layer block of a namespace, filled from its start; what is in the rest of it is not said, and is not to be
/// read. The checksum is made of each part as it is filled, while it is in the processor's cache. Dropping it gives the room back.
#[derive(Debug)]
pub struct PutBuffer {
    buffer: Buffer,
    filled: usize,
    checksum: Checksum,
    permit: Option<HeapPermit>,
}

impl PutBuffer {
    fn new(buffer: Buffer, permit: Option<HeapPermit>) -> Self {
        Self {
            buffer,
            filled: 0,
            checksum: Checksum::EMPTY,
            permit,
        }
    }

    /// What is to be filled next, at most 256 KiB; empty when all of the layer block is there.
    pub fn next_part(&mut self) -> &mut [u8] {
        let end = (self.filled + STEP_BYTES).min(self.buffer.len());
        &mut self.buffer.as_mut_slice()[self.filled..end]
    }

    /// Notes that the first `bytes` of [`Self::next_part`] were filled.
    pub fn fill(&mut self, bytes: usize) {
        let end = (self.filled + bytes).min(self.buffer.len());
        self.checksum = self.checksum.append(&self.buffer.as_slice()[self.filled..end]);
        self.filled = end;
    }

    /// What was filled, which nobody changes any more.
    pub fn freeze(self) -> PutPayload {
        PutPayload {
            payload: self.buffer.freeze(0..self.filled),
            checksum: self.checksum,
            _permit: self.permit,
        }
    }
}

/// A layer block where it will rest, and the checksum that its bytes have. It may be put until it is taken.
#[derive(Debug)]
pub struct PutPayload {
    payload: Bytes,
    checksum: Checksum,
    /// Of a buffer outside the arena.
    _permit: Option<HeapPermit>,
}

/// Bytes outside the arena, counted while they are being received.
#[derive(Debug)]
struct HeapPermit {
    reserved: Arc<AtomicU64>,
    bytes: u64,
}

impl HeapPermit {
    fn take(reserved: &Arc<AtomicU64>, bytes: u64, bytes_max: u64) -> Option<Self> {
        let taken = reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |before| {
            Some(before + bytes).filter(|&after| after <= bytes_max)
        });
        taken.ok().map(|_| Self {
            reserved: Arc::clone(reserved),
            bytes,
        })
    }
}

impl Drop for HeapPermit {
    fn drop(&mut self) {
        self.reserved.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl BlockCache {
    /// Room for a layer block of `namespace`, for [`Self::put_reserved`]: where it will rest in memory, or, where everything there
    /// must stay, outside, of which there is as much as the disk's queue may hold. `None` when that is in use too: the put is then
    /// busy.
    ///
    /// # Errors
    /// `UnknownNamespace`.
    pub fn reserve(&self, namespace: NamespaceId) -> Result<Option<PutBuffer>, CacheError> {
        let shared = &self.shared;
        let bytes = shared.schema_of(namespace)?.layer_block_bytes();
        if let Some(buffer) = shared.reserve(namespace, bytes) {
            return Ok(Some(PutBuffer::new(buffer, None)));
        }
        let permit = HeapPermit::take(&shared.heap_reserved, bytes as u64, shared.config.flush_queue_bytes_max);
        Ok(permit.map(|permit| PutBuffer::new(Buffer::heap(bytes), Some(permit))))
    }

    /// [`Self::put`] of what was received into room, without copying it or reading it again. It can be put again where the answer
    /// is `Busy`.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn put_reserved(
        &self,
        key: LayerBlockKey,
        received: &PutPayload,
        checksum: Checksum,
    ) -> Result<PutOutcome, CacheError> {
        let PutPayload {
            payload,
            checksum: found,
            ..
        } = received;
        self.put_as(key, payload.len(), checksum, || *found == checksum, |_| payload.clone())
    }

    /// Where a payload that was got lies in [`Self::arena_file`]; `None` when it lies elsewhere. It stays as it is while the payload
    /// lives, so who passes the range on keeps the payload until its reader is done.
    pub fn locate(&self, payload: &Bytes) -> Option<Range<u64>> {
        self.shared.arena.locate(payload)
    }

    /// The file of the host tier's memory, for a process that may read everything in it, and its size: what
    /// [`kvasir_device::ArenaView::map`] wants.
    pub fn arena_file(&self) -> (BorrowedFd<'_>, u64) {
        (self.shared.arena.file(), self.shared.arena.file_bytes())
    }
}
