//! Contains: which blocks are there, without their bytes.

use kvasir_block::{BlockHash, NamespaceId};

use super::BlockCache;
use crate::CacheError;

impl BlockCache {
    /// Which of `hashes` are available, all their layers held, in their order. No I/O, no lease, no touch: it says what is so now.
    ///
    /// # Errors
    /// `UnknownNamespace`.
    pub fn contains_blocks(&self, namespace: NamespaceId, hashes: &[BlockHash]) -> Result<Vec<bool>, CacheError> {
        self.shared.schema_of(namespace)?;
        let mut state = self.shared.state.lock();
        Ok(hashes
            .iter()
            .map(|&hash| self.shared.is_available(&mut state, &namespace.block(hash)))
            .collect())
    }
}
