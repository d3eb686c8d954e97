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

/// Writable room for one layer block of a namespace; what is in it at first is not said, and is not to be read. Dropping it gives
/// the room back.
#[derive(Debug)]
pub struct PutBuffer {
    buffer: Buffer,
    /// Of a buffer outside the arena.
    _permit: Option<HeapPermit>,
}

impl PutBuffer {
    /// The room: exactly a layer block.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.buffer.as_mut_slice()
    }
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
            return Ok(Some(PutBuffer { buffer, _permit: None }));
        }
        let permit = HeapPermit::take(&shared.heap_reserved, bytes as u64, shared.config.flush_queue_bytes_max);
        Ok(permit.map(|permit| PutBuffer {
            buffer: Buffer::heap(bytes),
            _permit: Some(permit),
        }))
    }

    /// [`Self::put`] of what was received into `buffer`, all of it, without copying it.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn put_reserved(
        &self,
        key: LayerBlockKey,
        buffer: PutBuffer,
        checksum: Checksum,
    ) -> Result<PutOutcome, CacheError> {
        let bytes = buffer.buffer.len();
        self.put_as(key, buffer.buffer.freeze(0..bytes), checksum, |_, payload| payload)
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
