//! Room for a layer block before its bytes are there, so that they are received where they will rest.

use bytes::Bytes;
use kvasir_block::{Checksum, LayerBlockKey, NamespaceId};

use super::{BlockCache, PutOutcome};
use crate::CacheError;

/// Writable room for one layer block of a namespace; what is in it at first is not said. Dropping it gives the room back.
#[derive(Debug)]
pub struct PutBuffer {
    bytes: Vec<u8>,
}

impl PutBuffer {
    /// The room: exactly a layer block.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl BlockCache {
    /// Room for a layer block of `namespace`, for [`Self::put_reserved`]; `None` when all memory is in use: the put is then
    /// busy.
    ///
    /// # Errors
    /// `UnknownNamespace`.
    pub fn reserve(&self, namespace: NamespaceId) -> Result<Option<PutBuffer>, CacheError> {
        let bytes = self.shared.schema_of(namespace)?.layer_block_bytes();
        Ok(Some(PutBuffer { bytes: vec![0; bytes] }))
    }

    /// [`Self::put`] of what was received into `buffer`, without copying it.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn put_reserved(
        &self,
        key: LayerBlockKey,
        buffer: PutBuffer,
        checksum: Checksum,
    ) -> Result<PutOutcome, CacheError> {
        self.put(key, Bytes::from(buffer.bytes), checksum)
    }
}
