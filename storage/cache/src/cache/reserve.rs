//! Room for a layer block before its bytes are there, so that they are received where they will rest.

use std::time::Instant;

use bytes::Bytes;
use kvasir_block::{Checksum, LayerBlockKey, NamespaceId};

use super::{BlockCache, GetOutcome, PutOutcome};
use crate::{CacheError, LeaseId};

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

/// How a get of many is done.
#[derive(Clone, Copy, Debug)]
pub struct GetOptions {
    /// What was not read by then is answered [`GetOutcome::TooLate`]; looked at before each read of a slower tier.
    pub deadline: Option<Instant>,
    /// The lease that covers the blocks: it is then known that more of them will be asked for soon.
    pub lease: Option<LeaseId>,
    /// Whether bytes from memory are verified here. Off only where the receiver verifies them, which it says; bytes from
    /// slower tiers are always verified.
    pub verify: bool,
}

impl Default for GetOptions {
    fn default() -> Self {
        Self {
            deadline: None,
            lease: None,
            verify: true,
        }
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

    /// Reads many layer blocks, one outcome each, in their order.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` for a layer that the schema lacks.
    pub fn get_many(&self, keys: &[LayerBlockKey], options: &GetOptions) -> Result<Vec<GetOutcome>, CacheError> {
        let late = |now: Instant| options.deadline.is_some_and(|deadline| now >= deadline);
        keys.iter()
            .map(|&key| {
                if late(Instant::now()) {
                    return Ok(GetOutcome::TooLate);
                }
                self.get(key)
            })
            .collect()
    }
}
